"""The counters of traffic.h against access patterns whose cost is computed by hand."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("traffic.cu").read_text()
ENTRIES = re.findall(r"^KERNEL\((\w+)\)", SOURCE, re.MULTILINE)
ORDERS = ["forward", "reverse", 4]


@pytest.fixture(scope="module")
def library(cuda_on_cpu):
    return cuda_on_cpu.compile(SOURCE, ENTRIES)


def aligned(size):
    memory = np.zeros(size + 16, np.uint8)
    start = -memory.ctypes.data % 16
    return memory[start : start + size]


def counts(library, entry, pitch=4, lanes=32, swizzle=0, grid=1, count=True, order="forward"):
    given, out = aligned(1024), aligned(1024)
    arguments = struct.pack("PPiii4x", given.ctypes.data, out.ctypes.data, pitch, lanes, swizzle)
    buffers = [("in", given, False), ("out", out, True)]
    return library.launch(entry, grid, 64, arguments, 8192, buffers, count=count, order=order)


# Bytes of an access, pitch, lanes, wavefronts of a warp, and how many of them are conflicts.
PATTERNS = [
    (4, 4, 32, 1, 0),
    (4, 0, 32, 1, 0),  # one word for all
    (4, 8, 32, 2, 1),
    (4, 12, 32, 1, 0),  # an odd number of words visits every bank
    (4, 128, 32, 32, 31),
    (4, 128, 5, 5, 4),
    (8, 8, 32, 2, 0),
    (8, 16, 32, 4, 2),
    (8, 8, 3, 1, 0),
    (8, 8, 17, 2, 0),
    (16, 16, 32, 4, 0),
    (16, 0, 32, 4, 0),
    (16, 32, 32, 8, 4),
    (16, 48, 32, 4, 0),
    (16, 128, 32, 32, 28),
    (16, 16, 9, 2, 0),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("size", "pitch", "lanes", "wavefronts", "conflicts"), PATTERNS)
def test_wavefronts_of_loads_and_stores(library, size, pitch, lanes, wavefronts, conflicts, order):
    loads = counts(library, f"load_{size}", pitch, lanes, order=order)
    assert loads.loads == (2 * wavefronts, 2 * conflicts)  # two warps
    assert loads.stores == loads.copies == loads.matrix_loads == (0, 0)
    if pitch:
        assert counts(library, f"store_{size}", pitch, lanes, order=order).stores == (wavefronts, conflicts)
    if pitch and size == 16:
        assert counts(library, "copy", pitch, lanes, order=order).copies == (wavefronts, conflicts)


@pytest.mark.parametrize(
    ("pitch", "swizzle", "conflicts"), [(128, 0, 28), (128, 1, 0), (144, 0, 0), (64, 0, 12), (256, 0, 28)]
)
def test_wavefronts_of_matrix_loads(library, pitch, swizzle, conflicts):
    one = counts(library, "matrices", pitch, swizzle=swizzle, grid=3).matrix_loads
    assert one == (3 * 2 * 2 * (4 + conflicts), 3 * 2 * 2 * conflicts)  # blocks, warps, loads


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("lanes", "turns"), [(32, 1), (64, 2), (72, 3), (1, 1)])
def test_turns_of_a_loop_are_counted_apart(library, lanes, turns, order):
    loop = counts(library, "loops", 4, lanes, order=order)
    assert loop.stores == loop.loads == (turns, 0)
    assert counts(library, "loops", 8, lanes, order=order).loads.conflicts == (lanes // 32) + (lanes % 32 > 16)


@pytest.mark.parametrize("order", ORDERS)
def test_branches_are_counted_apart(library, order):
    assert counts(library, "branches", order=order).loads == (2 * 2, 0)


@pytest.mark.parametrize("count", [False, True])
def test_bytes(library, count):
    moved = counts(library, "bytes", grid=1, count=count)
    assert moved.bytes_read == 64 * 4 + 3 * 8 + 10 * 16
    assert moved.bytes_written == 64 * 4 + 3 * 16
    assert moved.matrix_multiplies == 0


def test_products_count_once_for_a_warp(library):
    assert counts(library, "products", grid=5).matrix_multiplies == 5 * (2 * 3 + 1)


def test_shared_traffic_is_none_unless_counted(library):
    plain = counts(library, "load_4", count=False)
    assert plain.loads is plain.stores is plain.copies is plain.matrix_loads is None
