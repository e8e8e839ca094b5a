"""Softmax weights and their gradients, rounded to bfloat16, against NumPy in float64, with guards around results."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from ccgpu.kernels.numba_cpu import dot_products
from ccgpu.kernels.numba_cpu.dot_products import weights
from tests.kernels.numba_cpu.dot_products.bfloat16 import bits, up, values
from tests.kernels.numba_cpu.problems import address

pytestmark = pytest.mark.skipif(not dot_products.AVAILABLE, reason="Numba does not compile for AVX-512 BF16")
GUARD = -12345
KEYS = [1, 2, 15, 16, 17, 31, 33, 97]


@njit
def weigh(row, keys, target):
    return weights.weigh(row, keys, target)


@njit
def weigh_gradients(energies, step, keys, both, lse, gradients, delta, rows, rows_step, words):
    weights.weigh_gradients(
        energies,
        step,
        keys,
        both,
        lse[0],
        lse[1],
        gradients,
        delta[0],
        delta[1],
        rows,
        rows_step,
        words,
    )


@njit
def dot(a, b, channels):
    return weights.dot(a, b, channels)


@njit
def add_rounded(sums, channels, adds, row):
    weights.add_rounded(sums, channels, adds, row)


def weights_of(energies):
    """Return the weights that `weigh` writes for a row of energies, the row's maximum and its sum."""
    keys, padding = energies.size, up(energies.size, 16)
    row = np.full(padding + 2, np.nan, np.float32)  # whatever memory holds after the last key
    row[1 : keys + 1] = energies
    ours = np.full(padding + 2, GUARD, np.int16)
    row_max, row_sum = weigh(address(row[1:]), keys, address(ours[1:]))
    assert ours[0] == ours[-1] == GUARD
    assert not ours[keys + 1 : -1].any()
    return values(ours[1 : keys + 1]), row_max, row_sum


@given(st.integers(1, 130), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 30.0, 1e4]))
@settings(deadline=None)
def test_weights_are_rounded_exponentials_and_their_sum_is_not(keys, seed, size):
    energies = (size * np.random.default_rng(seed).standard_normal(keys)).astype(np.float32)
    ours, row_max, row_sum = weights_of(energies)
    exact = np.exp(energies.astype(np.float64) - energies.max())
    assert row_max == energies.max()
    np.testing.assert_allclose(ours, exact, rtol=2.0**-8, atol=1e-37)
    np.testing.assert_allclose(row_sum, exact.sum(), rtol=4e-7)


def test_exponentials_to_a_few_units_in_the_last_place():
    """The sum of one number and of zeros is that number before it is rounded."""
    for x in np.linspace(-87, 0, 1000, dtype=np.float32):
        energies = np.full(16, -np.inf, np.float32)
        energies[0], energies[1] = x, 0
        _, row_max, row_sum = weights_of(energies)
        assert row_max == 0
        assert abs((row_sum - 1.0) - np.exp(np.float64(x))) <= 1.5e-7


def test_weights_of_the_largest_energy_are_one():
    for keys in KEYS:
        ours, row_max, row_sum = weights_of(np.full(keys, 7, np.float32))
        assert (ours == 1).all()
        assert (row_max, row_sum) == (7, keys)


def test_weights_of_infinite_energies_and_nan():
    nothing, row_max, row_sum = weights_of(np.full(20, -np.inf, np.float32))
    assert not nothing.any()
    assert (row_max, row_sum) == (-np.inf, 0)
    some, row_max, row_sum = weights_of(np.array([-np.inf, 0, -1e30, -np.inf], np.float32))
    np.testing.assert_array_equal(some, [0, 1, 0, 0])
    assert (row_max, row_sum) == (0, 1)
    for place in (0, 3, 17):
        energies = np.zeros(20, np.float32)
        energies[place] = np.nan
        ours, _, row_sum = weights_of(energies)
        assert np.isnan(ours[place])
        assert np.isnan(row_sum)


@pytest.mark.parametrize(("keys", "both"), list(itertools.product(KEYS, [True, False])))
def test_gradients_of_two_queries(keys, both):
    generator, padding = np.random.default_rng(keys), up(keys, 16)
    energies, gradients = (np.full((2, padding + 16), np.nan, np.float32) for _ in "eg")
    queries = 2 if both else 1  # without a second query, its memory may hold anything
    energies[:queries, :keys] = generator.standard_normal((queries, keys))
    gradients[:queries, :padding] = 0
    gradients[:queries, :keys] = generator.standard_normal((queries, keys))
    lse, delta = np.array([1.5, 2.5], np.float32), np.array([0.25, -0.5], np.float32)
    exact = np.zeros((2, 2, keys))
    exact[0, :queries] = np.exp(energies[:queries, :keys].astype(np.float64) - lse[:queries, None])
    exact[1, :queries] = exact[0, :queries] * (gradients[:queries, :keys] - delta[:queries, None].astype(np.float64))
    rows, words = np.full((2, padding + 1), GUARD, np.int16), np.full((padding + 1, 2), GUARD, np.int16)
    step, addresses = energies.strides[0], [address(x) for x in (energies, gradients, rows, words)]
    weigh_gradients(
        addresses[0],
        step,
        keys,
        int(both),
        lse,
        addresses[1],
        delta,
        addresses[2],
        rows.strides[0],
        addresses[3],
    )
    p = gradients[0].view(np.int16).reshape(-1, 2)[:keys].T
    for ours, wanted in ((values(p.copy()), exact[0]), (values(words[:keys].T.copy()), exact[1])):
        np.testing.assert_allclose(ours, wanted, rtol=2.0**-7, atol=1e-7)
    np.testing.assert_array_equal(rows[:, :keys], words[:keys].T)
    assert not values(rows[:queries, keys:padding].copy()).any()
    assert (rows[:, padding] == GUARD).all()
    assert (words[padding] == GUARD).all()


@pytest.mark.parametrize("channels", [1, 2, 31, 32, 33, 64, 200])
def test_dot(channels):
    a, b = np.random.default_rng(channels).integers(-50, 50, (2, channels + 1))
    a[-1] = b[-1] = 10_000  # must not be read
    left, right = bits(a), bits(b)
    assert dot(address(left), address(right), channels) == (a * b)[:-1].sum()


@pytest.mark.parametrize("adds", [0, 1])
def test_add_rounded(adds):
    generator = np.random.default_rng(0)
    for channels in (32, 96):
        sums = generator.standard_normal(channels).astype(np.float32)
        row = np.concatenate([[GUARD], bits(generator.standard_normal(channels)), [GUARD]]).astype(np.int16)
        wanted = bits(sums + values(row[1:-1])) if adds else bits(sums)
        add_rounded(address(sums), channels, adds, address(row[1:]))
        np.testing.assert_array_equal(row, [GUARD, *wanted, GUARD])
