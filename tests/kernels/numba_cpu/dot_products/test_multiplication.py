"""Products of pairs of bfloat16, against NumPy: exact on integers, with guards around each result."""

import itertools

import numpy as np
import pytest
from numba import njit

from ccgpu.kernels.numba_cpu import cache, dot_products
from ccgpu.kernels.numba_cpu.dot_products import multiplication
from ccgpu.kernels.numba_cpu.matrices import Factors, Matrix
from tests.kernels.numba_cpu.dot_products.bfloat16 import bits, up, values
from tests.kernels.numba_cpu.problems import address

pytestmark = pytest.mark.skipif(not dot_products.AVAILABLE, reason="Numba does not compile for AVX-512 BF16")
GUARD = -192.0  # exact in bfloat16


@njit
def product(rows, columns, depth, a, b, panel, c, c_row, alpha, beta, rounds):
    multiplication.add_product(rows, columns, depth, a, b, panel, c, c_row, alpha, beta, rounds, c, c_row)


@pytest.fixture(scope="module", autouse=True)
def symbols():
    if dot_products.AVAILABLE:
        cache.prepare_pairs()


def words_of_rows(a):
    """Return rows of bfloat16 with an even number of them, the last one 0 if it is one too many."""
    padded = np.zeros((a.shape[0], up(a.shape[1], 2) + 2), np.float32)
    padded[:, : a.shape[1]] = a
    return bits(padded)


def words_of_columns(a):
    """Return the words (depth, rows) of a matrix (rows, depth) of which two neighbours along the depth are a word."""
    return words_of_rows(a).reshape(a.shape[0], -1, 2).transpose(1, 0, 2).copy()


def panels_of(b):
    """Return the panels of a matrix (depth, columns)."""
    depth, columns = up(b.shape[0], 2), up(b.shape[1], 32)
    padded = np.zeros((depth, columns), np.float32)
    padded[: b.shape[0], : b.shape[1]] = b
    return bits(padded).reshape(depth // 2, 2, columns // 32, 32).transpose(2, 0, 3, 1).copy()


def multiply(a, b, c, alpha, beta, *, by_columns, rounds):
    """Compute alpha a b + beta c into c[1:-1, 1:], c in float32 or in bfloat16, with guards around."""
    rows, (depth, columns) = a.shape[0], b.shape
    words = words_of_columns(a) if by_columns else words_of_rows(a)
    left = Matrix(address(words), 4, words.strides[0]) if by_columns else Matrix(address(words), words.strides[0], 4)
    panels, here = panels_of(b), c[1:, 1:]
    factors = [Factors(0, 0) if x is None else Factors(address(x), 4 if x.size > 1 else 0) for x in (alpha, beta)]
    product(
        rows, columns, depth, left, address(panels), panels.strides[0], address(here), c.strides[0], *factors, rounds
    )


KINDS = list(itertools.product([False, True], [False, True], ["one", "each"], ["none", "one", "each"]))


@pytest.mark.parametrize(("by_columns", "rounds", "alphas", "betas"), KINDS)
def test_products_of_integers(by_columns, rounds, alphas, betas):
    generator = np.random.default_rng(0)
    for rows, columns, depth in itertools.product([1, 2, 5, 11, 12, 13, 25], [1, 16, 17, 33, 97], [1, 2, 3, 8, 31]):
        a, b = generator.integers(-2, 3, (rows, depth)), generator.integers(-2, 3, (depth, columns))
        width = up(columns, 32) if rounds else up(columns, 16)
        c = generator.integers(-9, 10, (rows + 2, width + 2)).astype(np.float32)
        c[[0, -1]], c[:, [0, -1]] = GUARD, GUARD
        alpha = generator.integers(1, 3, rows if alphas == "each" else 1).astype(np.float32)
        beta = None if betas == "none" else generator.integers(-2, 3, rows if betas == "each" else 1).astype(np.float32)
        wanted = c.copy()
        before = 0 if beta is None else beta[:, None] * c[1:-1, 1:-1]
        wanted[1:-1, 1:-1] = before
        wanted[1:-1, 1 : columns + 1] += alpha[:, None] * (a @ b)
        if beta is None:
            c[1:-1, 1:-1] = np.nan
        ours = bits(c) if rounds else c
        multiply(a, b, ours, alpha, beta, by_columns=by_columns, rounds=int(rounds))
        result = values(ours) if rounds else ours
        if rounds:
            wanted = values(bits(wanted))
        np.testing.assert_array_equal(result, wanted, f"{rows} x {columns} x {depth}")


def test_sums_are_float32_and_are_rounded_once():
    generator = np.random.default_rng(0)
    a, b = (values(bits(generator.standard_normal(shape))) for shape in ((40, 301), (301, 64)))
    exact = a.astype(np.float64) @ b
    one = np.ones(1, np.float32)
    for rounds in (0, 1):
        c = np.zeros((42, 66), np.int16 if rounds else np.float32)
        multiply(a, b, c, one, None, by_columns=False, rounds=rounds)
        ours = (values(c) if rounds else c)[1:-1, 1:-1]
        bound = 301 * 2.0**-24 * (abs(a) @ abs(b)) + (2.0**-8 * abs(exact) if rounds else 0)
        assert (abs(ours - exact) <= bound).all()


def test_nan_and_infinity_reach_their_row_and_column_alone():
    for bad in (np.nan, np.inf):
        a, b, one = np.ones((13, 9)), np.ones((9, 70)), np.ones(1, np.float32)
        a[5, 8], b[0, 40] = bad, bad
        c = np.zeros((15, 98), np.int16)
        multiply(a, b, c, one, None, by_columns=False, rounds=1)
        finite = np.isfinite(values(c)[1:-1, 1:71])
        assert not finite[5].any()
        assert not finite[:, 40].any()
        assert finite.sum() == 12 * 69


def test_subnormal_numbers_are_zero():
    smallest = np.full((1, 2), 2.0**-127)
    c, one = np.zeros((3, 34), np.float32), np.ones(1, np.float32)
    multiply(smallest, np.full((2, 16), 2.0**100), c, one, None, by_columns=False, rounds=0)
    assert not c.any()
