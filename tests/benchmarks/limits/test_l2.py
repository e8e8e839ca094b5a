"""The model of a call's traffic against numbers that follow from the tensors' sizes."""

import pytest

from benchmarks.counts import IMAGES, N
from benchmarks.limits.gpus import H100
from benchmarks.limits.l2 import bytes_between_phases, simulate
from ccgpu.kernels.cuda.plans import plan

EVERYTHING = 10**10  # bytes: a cache that holds all tensors
DEPTH, CHANNELS = 64, 256


def call(
    kernel,
    images=2,
    sizes=(20, 33),
    lag=0,
    cuts=1,
    passes=1,
    l2=EVERYTHING,
    slots=40,
    hints=True,
    sets=False,
    kind="bf16",
):
    launches = plan(kernel, kind, images, sizes, DEPTH, CHANNELS, H100.limits, lag, cuts, passes)
    return simulate(launches, l2, [slots] * len(launches), hints, sets)


def whole(x):
    """Return bytes as whole sectors."""
    return -(-x // 32) * 32


@pytest.mark.parametrize(("kind", "size"), [("bf16", 2), ("tf32", 4)])
@pytest.mark.parametrize("sizes", [(20, 33), (6, 7, 8), (40, 300)])
def test_least_bytes_are_the_tensors(kind, size, sizes):
    positions = 2
    for n in sizes:
        positions *= n
    d, c, s = positions * DEPTH * size, positions * CHANNELS * size, whole(positions * 4)
    forward, backward = (call(kernel, sizes=sizes, kind=kind) for kernel in ("forward", "backward"))
    assert (forward.dram_read, forward.dram_written) == (2 * d + c, c + s)
    assert (backward.dram_read, backward.dram_written) == (2 * d + 3 * c + s, 2 * d + c + s)
    assert forward.ratio == backward.ratio == 1


@pytest.mark.parametrize("sizes", [(97, 97), (48, 40)])
def test_bytes_asked_are_those_of_the_items(sizes):
    """Lines of one segment: q, k, v once an axis; results and lse are written once an axis and read again but once."""
    positions, d, c = 2 * sizes[0] * sizes[1], DEPTH * 2, CHANNELS * 2
    assert call("forward", sizes=sizes).asked == positions * (2 * (2 * d + c) + 3 * c + 3 * 4)
    assert call("forward", sizes=sizes, cuts=2).asked == positions * (4 * 2 * d + 2 * c + 3 * c + 4 * 4)
    assert call("forward", sizes=sizes, passes=2).asked == positions * (4 * 2 * d + 2 * c + 3 * c + 6 * 4)
    assert call("forward", sizes=sizes, cuts=2, passes=2).asked == positions * (8 * 2 * d + 2 * c + 3 * c + 8 * 4)
    read = 2 * (2 * d + 2 * c + 4) + c  # q, k, v, dout, lse; out
    assert call("backward", sizes=sizes).asked == positions * (read + 3 * (c + 2 * d) + 2 * 4)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("sets", [False, True])
def test_a_smaller_cache_moves_more(kernel, sets):
    dram = [
        call(kernel, 3, (40, 40), l2=l2, hints=False, sets=sets).dram for l2 in (EVERYTHING, 10**6, 2 * 10**5, 10**4)
    ]
    assert dram == sorted(dram)
    assert dram[0] < dram[1] < dram[3]
    assert dram[3] <= 1.3 * call(kernel, 3, (40, 40)).asked


def test_hints_change_what_stays_and_nothing_else():
    kept, given_up = (call("backward", 6, (48, 48), l2=2 * 10**6, hints=hints) for hints in (False, True))
    assert given_up.dram < 0.9 * kept.dram
    assert (given_up.asked, given_up.ticks, given_up.least) == (kept.asked, kept.ticks, kept.least)


@pytest.mark.parametrize(("passes", "cuts"), [(1, 2), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("sizes", [(20, 33), (257, 40)])
def test_parts_write_arrays_like_lse_besides_the_tensors(passes, cuts, sizes):
    """A pass has two of them, of which lse is one; with one phase a pass would need but one."""
    x, (launch, *_) = (
        call("forward", sizes=sizes, passes=passes, cuts=cuts),
        plan("forward", "bf16", 2, sizes, DEPTH, CHANNELS, H100.limits, 0, cuts, passes),
    )
    array = 2 * sizes[0] * sizes[1] * 4
    assert x.least == call("forward", sizes=sizes).least
    assert x.dram - x.least == pytest.approx(launch.scratch * array, abs=64 * launch.scratch)


def test_passes_keep_an_image_in_the_cache():
    """A cache of 0.7 of an image's q, k, v and out holds what a pass of half the channels uses."""
    sizes = (60, 60)
    l2 = int(0.7 * 60 * 60 * 2 * (2 * DEPTH + 2 * CHANNELS))
    one, two = (call("forward", 6, sizes, passes=n, l2=l2, slots=20) for n in (1, 2))
    assert one.ratio > 1.3
    assert two.ratio < 1.1


@pytest.mark.parametrize(("kernel", "passes", "row", "results"), [
    ("forward", 1, 2 * 2 * DEPTH + 2 * 2 * CHANNELS + 4, 2 * CHANNELS + 4),
    ("forward", 2, 2 * 2 * DEPTH + 2 * CHANNELS + 4, CHANNELS + 4),
    ("backward", 1, 4 * 2 * DEPTH + 3 * 2 * CHANNELS + 2 * 4, 2 * 2 * DEPTH + 2 * CHANNELS),
])  # fmt: skip
def test_bytes_between_phases(kernel, passes, row, results):
    """Two phases: without a cache the second reads everything and results are written once more."""
    positions = 40 * 40
    (launch,) = plan(kernel, "bf16", 3, (40, 40), DEPTH, CHANNELS, H100.limits, 0, 1, passes)
    all_rows, units = positions * row, 3 * passes
    assert bytes_between_phases(launch, 0) == units * positions * (row + results)
    assert bytes_between_phases(launch, all_rows) == 0
    assert bytes_between_phases(launch, all_rows - 1000) == pytest.approx(units * 1000, abs=units)
    assert bytes_between_phases(launch, positions * results) == units * positions * (row - results)


def test_no_cache_beats_the_bytes_between_phases():
    (launch,) = plan("backward", "bf16", 3, (40, 40), DEPTH, CHANNELS, H100.limits)
    for l2 in (10**6, 2 * 10**6, 3 * 10**6):
        x = simulate([launch], l2, [4])
        assert x.dram >= x.least + bytes_between_phases(launch, l2) > x.least


def test_ticks_of_a_call_that_fits_at_once():
    """All items run at once: those of the second phase wait for the chunks of the first."""
    chunks = CHANNELS // 64
    x = call("forward", 1, (32, 32), slots=1000)
    assert 2 * chunks <= x.ticks <= 2 * chunks + 1  # a wait may end in the tick in which it is fulfilled
    waited = x.ticks - 1 - chunks  # by the second phase
    assert x.idle == pytest.approx(waited / (waited + 2 * (1 + chunks)))
    assert call("forward", 1, (32, 32), slots=1).ticks == 2 * 32 * (1 + chunks)
    assert call("forward", 1, (32, 32), slots=1).idle == 0


def test_sets_and_queue_agree_about_the_hot_case():
    launches = plan("forward", "bf16", IMAGES, (N, N), 64, 512, H100.limits, lag=1, cuts=1)
    queue, sets = (simulate(launches, H100.l2_bytes, [396], hints=False, sets=x) for x in (False, True))
    assert queue.asked == sets.asked
    assert queue.dram == pytest.approx(sets.dram, rel=0.05)
    assert 2.2 < queue.ratio < 2.5


def test_the_stages_are_refused():
    launches = plan("affinity", "bf16", 1, (8, 8), 64, 64, H100.limits)
    with pytest.raises(ValueError, match="forward or backward, got affinity"):
        simulate(launches, 10**6, [8])


def test_additions_in_l2_are_refused():
    launches = plan("backward", "bf16", 1, (8, 8), 64, 64, H100.limits, adds=True)
    with pytest.raises(ValueError, match=r"must not add in L2, got cca_backward_bf16_n16.*; plan them without"):
        simulate(launches, 10**6, [8])
