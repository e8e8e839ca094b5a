"""Conversions between 16 bits in memory and float32 in registers, against torch's, with guards around each result."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from ccgpu.kernels.numba_cpu import cache, conversions, matrices
from ccgpu.kernels.numba_cpu.operands import ARITHMETIC
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES
from tests.kernels.numba_cpu.problems import address

NAMES = ("bfloat16", "float16")
LANES = VECTOR_BYTES // 4
GUARD = 0x4D2
FLOAT = np.float32(0)


@njit(error_model="numpy")
def transposed(reads, writes, source, source_row, rows, columns, target, target_row):
    matrices.transpose(reads, writes, source, source_row, rows, columns, target, target_row)


class Conversions:
    """Copies of arrays between a dtype's bits and float32, by functions that are compiled anew."""

    def __init__(self, name):
        self.dtype, self.marker = getattr(torch, name), ARITHMETIC[name].kept(0)
        self._copy = njit(error_model="numpy")(matrices.copy.py_func)

    def widened(self, bits):
        """Return the numbers with these bits, as float32."""
        numbers = np.full(bits.size + 2, GUARD, np.float32)
        self._copy(self.marker, FLOAT, address(bits), bits.size, address(numbers) + 4)
        assert numbers[0] == numbers[-1] == GUARD
        return numbers[1:-1]

    def narrowed(self, numbers):
        """Return the bits of numbers."""
        bits = np.full(numbers.size + 2, GUARD, np.uint16)
        self._copy(FLOAT, self.marker, address(numbers), numbers.size, address(bits) + 2)
        assert bits[0] == bits[-1] == GUARD
        return bits[1:-1]

    def tensor(self, bits):
        """Return the tensor of this dtype that has these bits."""
        return torch.from_numpy(bits.view(np.int16).copy()).view(self.dtype)

    def bits_of(self, numbers):
        """Return the bits that torch rounds numbers to."""
        return torch.from_numpy(numbers).to(self.dtype).view(torch.int16).numpy().view(np.uint16)

    def check_narrowed(self, numbers):
        """Raise unless numbers are rounded as torch does; NaN may have any bits that stand for NaN."""
        ours, theirs = self.narrowed(numbers), self.bits_of(numbers)
        different = np.flatnonzero(ours != theirs)
        assert self.tensor(ours[different]).isnan().all(), numbers[different[:5]]
        assert np.isnan(numbers[different]).all(), numbers[different[:5]]


@pytest.fixture(params=["by the machine", "by integers"])
def machine(request, monkeypatch):
    """Compile for machines that convert float16, if this one does, and for those that do not."""
    if request.param == "by integers":
        monkeypatch.setattr(conversions, "CONVERTS_FLOAT16", False)


@pytest.fixture(params=NAMES)
def convert(request, machine):
    return Conversions(request.param)


EVERY = np.arange(2**16, dtype=np.uint16)


def test_every_number_is_widened_exactly(convert):
    ours, theirs = convert.widened(EVERY), convert.tensor(EVERY).float().numpy()
    numbers = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    np.testing.assert_array_equal(ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers])


def test_every_number_is_kept(convert):
    """All bits survive the way to float32 and back, except that NaN may have others that stand for NaN."""
    ours, numbers = convert.narrowed(convert.widened(EVERY)), ~convert.tensor(EVERY).isnan().numpy()
    np.testing.assert_array_equal(ours[numbers], EVERY[numbers])
    assert convert.tensor(ours[~numbers]).isnan().all()


def test_numbers_between_two_are_rounded_to_even(convert):
    numbers = convert.widened(EVERY)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    halves = (numbers[1:] / 2 + numbers[:-1] / 2).astype(np.float32)
    around = [np.nextafter(halves, np.float32(limit)) for limit in (np.inf, -np.inf)]
    convert.check_narrowed(np.concatenate([halves, *around]))


def test_numbers_at_the_ends(convert):
    largest = torch.finfo(convert.dtype).max
    smallest = torch.finfo(convert.dtype).smallest_normal
    ends = [0.0, np.inf, np.nan, largest, smallest, smallest / 2, smallest / 4096, 65519.996, 65520.0, 1e-45, 3.4e38]
    numbers = np.array([*ends, *(-x for x in ends)], np.float32)
    convert.check_narrowed(np.concatenate([numbers, np.nextafter(numbers, np.float32(np.inf))]))


def test_numbers_of_all_magnitudes(convert):
    bits = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    convert.check_narrowed(bits.view(np.float32))


def test_every_nan_stays_nan(convert):
    bits = np.concatenate([0x7F800000 + 2 ** np.arange(23), [0x7FFFFFFF, 0x7F80FFFF]]).astype(np.uint32)
    bits = np.concatenate([bits, bits | 0x80000000]).astype(np.uint32)
    assert convert.tensor(convert.narrowed(bits.view(np.float32))).isnan().all()


@given(count=st.integers(0, 5 * LANES))
@settings(max_examples=5 * LANES, deadline=None)
def test_copies_of_any_number(count):
    numbers = np.random.default_rng(count).standard_normal(count + 2).astype(np.float32)
    for convert in COMPILED:
        bits = convert.narrowed(numbers[1 : 1 + count])
        np.testing.assert_array_equal(bits, convert.bits_of(numbers[1 : 1 + count]))
        np.testing.assert_array_equal(convert.widened(bits), convert.tensor(bits).float().numpy())


COMPILED = [Conversions(name) for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_transposes_of_every_rectangle(name):
    """The rows of source and target have gaps between them, and their addresses are not aligned to vectors."""
    marker, most = ARITHMETIC[name].kept(0), 35
    cache.prepare(*ARITHMETIC[name])
    convert = COMPILED[NAMES.index(name)]
    numbers = np.random.default_rng(0).standard_normal((most + 1, most + 4)).astype(np.float32)
    bits = convert.bits_of(numbers.ravel()).reshape(numbers.shape)
    exact = convert.tensor(bits.ravel()).float().numpy().reshape(numbers.shape)
    ways = [(marker, FLOAT, bits, exact), (FLOAT, marker, numbers, bits)]
    for (rows, columns), (reads, writes, source, wanted) in itertools.product(
        itertools.product(range(1, most + 1), repeat=2), ways
    ):
        target = np.full((columns + 2, rows + 3), GUARD, wanted.dtype)
        expected = target.copy()
        expected[1:-1, 1:-2] = wanted[1 : rows + 1, 3 : columns + 3].T
        here, there = address(source[1:, 3:]), address(target[1:, 1:])
        transposed(reads, writes, here, source.strides[0], rows, columns, there, target.strides[0])
        np.testing.assert_array_equal(target, expected, f"{rows} x {columns}")
