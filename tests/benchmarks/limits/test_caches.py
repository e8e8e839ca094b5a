"""The models of L2 against sequences of accesses whose traffic is computed by hand."""

import numpy as np
import pytest

from benchmarks.limits.caches import LINE, SECTOR, WAYS, access, cache, traffic

ALL = 0b1111


def run(accesses, lines=64, capacity=2, sets=False):
    """Run accesses (line, "r" or "w", with "!" to give the line up) and return what `traffic` does, in lines."""
    c = cache(lines, capacity * LINE, sets)
    for line, kind in accesses:
        access(c, line, ALL, "w" in kind, "!" in kind)
    moved = traffic(c)
    assert all(x % LINE == 0 for x in moved)
    return tuple(x // LINE for x in moved)


@pytest.mark.parametrize(
    ("accesses", "read", "written", "least"),
    [
        ([(0, "r"), (1, "r"), (0, "r"), (1, "r")], 2, 0, 2),
        ([(0, "r"), (1, "r"), (2, "r"), (0, "r")], 4, 0, 3),  # 0 is the least recently used
        ([(0, "r"), (1, "r"), (0, "r"), (2, "r"), (0, "r")], 3, 0, 3),
        ([(0, "w"), (1, "r"), (2, "r"), (0, "r")], 3, 1, 3),  # 0 goes to DRAM, comes back, and is clean
        ([(0, "w"), (0, "w"), (0, "r")], 0, 1, 1),  # what is left is written at the end
        ([(0, "r"), (0, "w")], 1, 1, 2),
        ([(0, "r"), (1, "r!"), (2, "r"), (0, "r")], 3, 0, 3),  # 1 goes, though 0 is older
        ([(0, "r!"), (0, "r"), (1, "r"), (2, "r!"), (1, "r")], 3, 0, 3),  # 0 is used again, so it is not given up
        ([(0, "r!"), (1, "r!"), (2, "r"), (1, "r")], 3, 0, 3),  # of two given up, the one that was first
    ],
)
def test_queue(accesses, read, written, least):
    assert run(accesses) == (read, written, least)


def test_sectors_are_read_and_written_on_their_own():
    c = cache(4, 2 * LINE, sets=False)
    access(c, 0, 0b0011, False, False)
    access(c, 0, 0b0110, False, False)
    assert traffic(c) == (3 * SECTOR, 0, 3 * SECTOR)
    access(c, 0, 0b1000, True, False)
    access(c, 0, 0b1001, False, False)
    assert traffic(c) == (3 * SECTOR, SECTOR, 4 * SECTOR)


@pytest.mark.parametrize("seed", range(5))
def test_one_set_is_a_queue(seed):
    """A cache of one set drops the same lines as a queue of as many lines, with lines given up."""
    random = np.random.default_rng(seed)
    kinds = random.choice(["r", "w", "r!", "w!"], 3000, p=[0.5, 0.3, 0.1, 0.1])
    accesses = list(zip(random.integers(0, 40, 3000).tolist(), kinds, strict=True))
    assert run(accesses, 40, WAYS, sets=True) == run(accesses, 40, WAYS)


@pytest.mark.parametrize("sets", [False, True])
def test_a_cache_that_holds_everything_moves_the_least(sets):
    random = np.random.default_rng(0)
    accesses = list(zip(random.integers(0, 64, 2000).tolist(), random.choice(["r", "w", "r!"], 2000), strict=True))
    read, written, least = run(accesses, 64, 1024 * WAYS, sets)
    assert read + written == least
    more = run(accesses, 64, 32, sets)
    assert more[0] + more[1] > least
    assert more[2] == least


def test_sets_spread_neighbouring_lines():
    read, _, _ = run([(line, "r") for _ in range(2) for line in range(0, 4096, 8)], 4096, 1024, sets=True)
    assert read < 1.05 * 512
