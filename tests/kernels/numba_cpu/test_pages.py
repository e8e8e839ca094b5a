"""Large pages are asked for under memory that they fit into, as Linux tells in /proc/self/smaps."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from ccgpu.kernels.numba_cpu import calls, pages

SMAPS = Path("/proc/self/smaps")
LARGE = 2 << 20
needs_linux = pytest.mark.skipif(
    pages._advise()[1] is None or not SMAPS.is_file(), reason="this system has no large pages to ask for"
)


@pytest.fixture
def memory():
    """Return 16 MB of memory that no other array shares."""
    array = np.frombuffer(mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    start = -array.ctypes.data % LARGE
    return array[start : start + 3 * LARGE]


def asks(array, offset=0):
    """Tell whether large pages are wanted for the mapping of a byte of an array."""
    address, inside = array.ctypes.data + offset, False
    for line in SMAPS.read_text().splitlines():
        mapping = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if mapping:
            inside = int(mapping[1], 16) <= address < int(mapping[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the address is in no mapping")


@needs_linux
@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, LARGE, True),
        (64, 2 * LARGE, True),
        (0, LARGE - mmap.PAGESIZE, False),
        (mmap.PAGESIZE, LARGE, False),
        (64, 64, False),
        (0, 0, False),
    ],
)
def test_large_pages_are_asked_for_where_one_fits(memory, offset, size, expected):
    memory[:] = 7
    pages.prefer_large_pages(memory.ctypes.data + offset, size)
    assert asks(memory, offset) is expected
    assert not asks(memory, offset + size + 2 * mmap.PAGESIZE)
    assert (memory == 7).all()


@needs_linux
def test_the_memory_of_a_result_asks_for_large_pages(memory):
    x = memory[: 2 * LARGE].view(np.float32).reshape(1, 1024, 32, 32)
    assert not asks(memory)
    q = np.zeros((1, 1, 32, 32), np.float32)
    calls.forward(q, q, np.zeros_like(x), out=x, threads=1)
    assert asks(memory)
    assert not asks(memory, 2 * LARGE)


@needs_linux
def test_a_refusal_changes_nothing():
    pages.prefer_large_pages(LARGE, 2 * LARGE)  # no memory is there


def test_other_systems_have_no_large_pages(memory, monkeypatch):
    monkeypatch.setattr(pages, "_SIZE", Path("no such file"))
    monkeypatch.setattr(pages, "_advise", pages._advise.__wrapped__)
    pages.prefer_large_pages(memory.ctypes.data, memory.nbytes)
    assert pages._advise() == (0, None)
    if SMAPS.is_file():
        assert not asks(memory)
