"""Interleaved rows, transposes and copies of 16-bit numbers, against NumPy, with guards around the results."""

import itertools

import numpy as np
import pytest
from numba import njit

from ccgpu.kernels.numba_cpu import cache, dot_products
from ccgpu.kernels.numba_cpu.dot_products import interleaving
from tests.kernels.numba_cpu.dot_products.bfloat16 import up
from tests.kernels.numba_cpu.problems import address

pytestmark = pytest.mark.skipif(not dot_products.AVAILABLE, reason="Numba does not compile for AVX-512 BF16")
GUARD = -12345
SIDES = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 97]


@njit
def interleave(x, x_row, rows, columns, panels, panel):
    interleaving.interleave(x, x_row, rows, columns, panels, panel)


@njit
def transposed_words(x, x_row, rows, words, panels, panel):
    interleaving.columns(x, x_row, rows, words, panels, panel)


@njit
def gather(x, x_row, rows, columns, target, target_row):
    interleaving.gather(x, x_row, rows, columns, target, target_row)


@njit
def scatter(x, x_row, rows, columns, target, target_row):
    interleaving.scatter(x, x_row, rows, columns, target, target_row)


@njit
def copy_row(source, columns, target, targets):
    interleaving.copy_row(source, columns, target, targets)


@pytest.fixture(scope="module", autouse=True)
def symbols():
    if dot_products.AVAILABLE:
        cache.prepare_pairs()


def numbers(rows, columns):
    """Return a matrix whose rows have gaps between them, in memory that is not aligned to vectors."""
    generator = np.random.default_rng(rows * 1000 + columns)
    return generator.integers(-(2**15), 2**15, (rows, columns + 3)).astype(np.int16)[:, 1 : columns + 1]


@pytest.mark.parametrize("rows", SIDES)
def test_interleave(rows):
    for columns in SIDES:
        x, pairs, panels = numbers(rows, columns), (rows + 1) // 2, up(columns, 32) // 32
        ours = np.full((panels, pairs + 1, 32, 2), GUARD, np.int16)
        interleave(address(x), x.strides[0], rows, columns, address(ours), ours.strides[0])
        wanted = np.zeros((2 * pairs, 32 * panels), np.int16)
        wanted[:rows, :columns] = x
        np.testing.assert_array_equal(ours[:, :pairs], wanted.reshape(pairs, 2, panels, 32).transpose(2, 0, 3, 1))
        assert (ours[:, pairs] == GUARD).all()


@pytest.mark.parametrize("rows", SIDES)
def test_columns_are_words_transposed(rows):
    for words in SIDES:
        x, panels, depth = numbers(rows, 2 * words), up(rows, 32) // 32, up(words, 16)
        ours = np.full((panels, depth + 1, 32, 2), GUARD, np.int16)
        transposed_words(address(x), x.strides[0], rows, words, address(ours), ours.strides[0])
        wanted = np.zeros((32 * panels, depth, 2), np.int16)
        wanted[:rows, :words] = x.reshape(rows, words, 2)
        if 0 < rows % 32 <= 16:  # half of the last panel is left alone
            wanted[-16:] = GUARD
        np.testing.assert_array_equal(ours[:, :depth].transpose(0, 2, 1, 3).reshape(32 * panels, depth, 2), wanted)
        assert (ours[:, depth] == GUARD).all()


@pytest.mark.parametrize("rows", SIDES)
def test_gather_and_scatter_transpose(rows):
    for columns in SIDES:
        x = numbers(rows, columns)
        gathered = np.full((up(columns, 16) + 1, up(rows, 32) + 1), GUARD, np.int16)
        gather(address(x), x.strides[0], rows, columns, address(gathered), gathered.strides[0])
        np.testing.assert_array_equal(gathered[:columns, :rows], x.T)
        assert not gathered[:columns, rows:-1].any()
        assert (gathered[-1] == GUARD).all()
        assert (gathered[:, -1] == GUARD).all()
        back = np.full((rows + 2, columns + 2), GUARD, np.int16)
        wanted = back.copy()
        wanted[1:-1, 1:-1] = x
        there = back[1:, 1:]
        scatter(address(gathered), gathered.strides[0], columns, rows, address(there), back.strides[0])
        np.testing.assert_array_equal(back, wanted)


def test_copy_row():
    x = numbers(1, 32)
    for columns, targets in itertools.product(range(-2, 35), range(33)):
        ours = np.full(34, GUARD, np.int16)
        copy_row(address(x), columns, address(ours[1:]), targets)
        wanted = np.where(np.arange(32) < columns, x[0], 0)[:targets]
        np.testing.assert_array_equal(ours, [GUARD, *wanted, *[GUARD] * (33 - targets)])
