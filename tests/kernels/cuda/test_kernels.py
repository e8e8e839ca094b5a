"""Every kernel of the CUDA source in every arithmetic, run on the CPU by tests/cuda_on_cpu, against the reference.

Sizes lie around the edges of tiles (16 positions) and of blocks, and some examples divide lines into many segments.
Threads run in several orders, results and shared memory start as NaN, and accesses beyond the arrays fail.
"""

import contextlib
import functools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cases import precision
from ccgpu.bridges.cupy_cuda.attention import Kernels
from ccgpu.bridges.cupy_cuda.stages import Stages
from ccgpu.kernels.cuda import plans
from ccgpu.kernels.cuda.configurations import ARITHMETICS
from ccgpu.layouts import energy_dtype
from tests.ccgpu.problems import Problem, attend_plainly, check_errors, expected, row_of, run, truth_in_float64
from tests.ccgpu.stage_problems import criss_cross, plain_affinity, plain_aggregate
from tests.cuda_on_cpu.launcher import MachineLauncher
from tests.cuda_on_cpu.libraries import H100, LONG_LINES, MANY_CHANNELS, SEGMENTED, STAGED, TILES, limits
from tests.error_table import STAGES, VALUE_LIMIT, in_units

DTYPE = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "f32": torch.float32,
    "f64": torch.float64,
}
DTYPE |= {"bf16_fma": torch.bfloat16, "f16_fma": torch.float16}
# Names in the table of errors: of these kernels, and of arithmetics that are not named like the dtype.
NAME = "cupy, on the CPU"
DTYPE_NAMES = {"tf32": "tf32", "bf16_fma": "bfloat16 fma", "f16_fma": "float16 fma"}
TF32_UNIT = 2.0**-10
EDGES = [1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33]


@contextlib.contextmanager
def most_tiles(held):
    """Restrict the kernels to those whose blocks hold one of these numbers of tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "plan", plans.plan.__wrapped__)
        patch.setattr(plans, "classes", lambda *arguments: held)
        yield


class Attention(torch.autograd.Function):
    """The bridge's forward and backward as a function with gradients, like cca."""

    @staticmethod
    def forward(ctx, q, k, v, scale, bridge):
        out, lse = bridge.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.bridge = scale, bridge
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        return (*ctx.bridge.backward(dout, q, k, v, out, lse, dlse, ctx.scale), None, None)


def attend(problem, bridge):
    """Return out, lse, dq, dk, dv by the kernels."""
    return run(lambda *x: Attention.apply(*x, problem.scale, bridge), problem.tensors, problem.dout, problem.dlse)


def random_problem(dtype, batch, sizes, depth, channels, scale=1.0, seed=0, energy=1.0, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(n, factor):
        x = factor * torch.randn(batch, *sizes, n, generator=generator, dtype=torch.float64)
        return x.to(dtype).movedim(-1, 1)

    part = energy**0.5 * depth**-0.25
    q, k, v, dout = draw(depth, part), draw(depth, part), draw(channels, magnitude), draw(channels, magnitude)
    dlse = torch.randn(batch, *sizes, generator=generator, dtype=torch.float64).to(energy_dtype(dtype))
    return Problem((q, k, v), dout, dlse, scale)


LONG, SHORT, BOTH = st.sampled_from(EDGES), st.integers(1, 3), st.integers(4, 18)
MAPS = {
    1: st.tuples(LONG),
    2: st.one_of(st.tuples(LONG, SHORT), st.tuples(SHORT, LONG), st.tuples(BOTH, BOTH)),
    3: st.one_of(st.tuples(SHORT, SHORT, LONG), st.tuples(LONG, SHORT, SHORT), st.tuples(SHORT, LONG, SHORT)),
}


@st.composite
def problems(draw, dtype, rank):
    return random_problem(
        dtype,
        draw(st.integers(1, 3)),
        draw(MAPS[rank]),
        draw(st.integers(1, 16)),
        draw(st.sampled_from([1, 3, 8, 24, 40, 64, 65, 72])),
        draw(st.sampled_from([1.0, 0.3, -2.0])),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from([1.0, 1e-3, 30.0])),
        draw(st.sampled_from([1.0, 1e-3, 8.0])),
    )


ORDERS = st.one_of(st.sampled_from(["forward", "reverse"]), st.integers(0, 2**31))


def check(problem, arithmetic, ours):
    small = problem.dout[:, :1].numel() <= 64
    truth = expected(problem) if small else truth_in_float64(problem)
    unit = TF32_UNIT if arithmetic == "tf32" else None
    if arithmetic == "f64" and not small:
        unit = 2.0**-50  # the truth is the very formulation to compare with, which then seems to have no error
    row = row_of(problem, NAME, DTYPE_NAMES.get(arithmetic))
    check_errors(ours, attend_plainly(problem), truth, problem, unit, row)


@pytest.fixture
def tf32(request):
    """Multiply float32 in TF32 if that is the test's arithmetic."""
    with precision(request.getfixturevalue("arithmetic")):
        yield


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", list(ARITHMETICS))
@pytest.mark.parametrize("rank", MAPS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_kernels_match_reference(cuda_on_cpu, rank, arithmetic, data):
    problem = data.draw(problems(DTYPE[arithmetic], rank))
    held = data.draw(st.sampled_from([TILES[arithmetic], TILES[arithmetic][:1]]))
    launcher = MachineLauncher(cuda_on_cpu, limits(arithmetic), order=data.draw(ORDERS))
    with most_tiles(held):
        check(problem, arithmetic, attend(problem, Kernels(launcher)))
    assert {launch.configuration.arithmetic for launch in launcher.launched} == {arithmetic}


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_a_part_gives_the_position_itself_its_share_of_all_lines(kernel):
    shares = [plans.plan(kernel, "f32", 1, (5,), 16, 64, H100, crossing=lines)[0].share for lines in (None, 2, 4)]
    assert shares == [0.0, -1.0, -2.0]


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", ["tf32"])
@pytest.mark.parametrize("which", ["out", "dv"])
def test_tf32_where_values_cancel(cuda_on_cpu, arithmetic, which):
    """TF32 rounds each value and weight in proportion to itself, however near to zero their sum is."""
    problem = random_problem(torch.float32, 1, (33,), 4, 1, energy=1e-3)
    cancelling = problem.tensors[2] if which == "out" else problem.dout
    cancelling -= cancelling.mean()
    results = attend(problem, Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic))))
    check(problem, arithmetic, results)
    place = {"out": 0, "dv": 4}[which]
    wrong = [x + 0.01 * (number == place) for number, x in enumerate(results)]
    with pytest.raises(AssertionError, match=which):
        check_errors(wrong, attend_plainly(problem), expected(problem), problem, TF32_UNIT)


@pytest.mark.slow
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", list(ARITHMETICS))
@pytest.mark.parametrize("rank", MAPS)
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_kernels_match_reference_sweep(cuda_on_cpu, rank, arithmetic, data):
    test_kernels_match_reference.hypothesis.inner_test(cuda_on_cpu, rank, arithmetic, data)


def plain_stages(q, k, v, weights):
    """Return what affinity, aggregate and aggregate_transposed give, by einsum."""
    out, transposed = torch.func.vjp(lambda x: plain_aggregate(weights, x), v)
    return plain_affinity(q, k), out, *transposed(v)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", STAGED)
@pytest.mark.parametrize("rank", MAPS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_stages_match_reference(cuda_on_cpu, rank, arithmetic, data):
    problem = data.draw(problems(DTYPE[arithmetic], rank))
    held = data.draw(st.sampled_from([TILES[arithmetic], TILES[arithmetic][:1]]))
    launcher = MachineLauncher(cuda_on_cpu, limits(arithmetic), order=data.draw(ORDERS))
    stages, (q, k, v) = Stages(launcher), problem.tensors
    weights = torch.randn(q.shape[0], criss_cross(q.shape[2:]), *q.shape[2:], dtype=energy_dtype(q.dtype))
    with most_tiles(held):
        ours = stages.affinity(q, k), stages.aggregate(weights, v), stages.aggregate_transposed(weights, v)
    truth = plain_stages(*(x.double() for x in (q, k, v, weights)))
    # The factors of a product are rounded to the unit if memory does not hold them exactly, and the sum once more.
    # In float64 the truth is rounded as often.
    unit = {"tf32": TF32_UNIT, "f64": 2.0**-50}.get(arithmetic, torch.finfo(q.dtype).eps)
    bounds = plain_stages(*(x.double().abs() for x in (q, k, v, weights)))
    units = {}
    for name, a, b, size in zip(("affinity", "aggregate", "transposed"), ours, truth, bounds, strict=True):
        assert a.shape == b.shape
        error, bound = (a.double() - b).abs(), 4 * unit * size + torch.finfo(q.dtype).tiny
        # The bound alone must hold, without an allowance for einsum's own error.
        units[name] = in_units(error.numpy(), 0.0, bound.numpy(), VALUE_LIMIT)
    STAGES.record(row_of(problem, NAME, DTYPE_NAMES.get(arithmetic)), units)
    assert max(units.values()) <= VALUE_LIMIT, units


# Whole blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("arithmetic", "sizes"),
    [
        pytest.param(name, sizes, marks=[pytest.mark.slow] if name in ("tf32", "f64") and sizes != SEGMENTED else [])
        for name in ("bf16", "tf32", "f32", "f64")
        for sizes in LONG_LINES
    ],
)
def test_long_lines(cuda_on_cpu, arithmetic, sizes):
    """Lines with several tiles for each warp, and lines in several segments, with 40 channels of q and k."""
    problem = random_problem(DTYPE[arithmetic], 1, sizes, 40, 72, seed=sizes[1])
    check(problem, arithmetic, attend(problem, Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic)))))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("depth", MANY_CHANNELS)
def test_many_channels_of_queries(cuda_on_cpu, arithmetic, depth):
    problem = random_problem(DTYPE[arithmetic], 1, (5, 6), depth, 24)
    check(problem, arithmetic, attend(problem, Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic)))))


@pytest.mark.parametrize("order", ["forward", "reverse", 1, 2])
def test_order_of_blocks_makes_no_difference(cuda_on_cpu, order):
    """Blocks take their work by ticket, so any block may come first; results are the same to the bit."""
    problem = random_problem(torch.bfloat16, 3, (20, 18), 16, 72)
    first = attend(problem, Kernels(MachineLauncher(cuda_on_cpu)))
    again = attend(problem, Kernels(MachineLauncher(cuda_on_cpu, block_order=order, order=order)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_lag_makes_no_difference(cuda_on_cpu, monkeypatch, batch, lag):
    """Every phase of every image is computed, after the ones before it, however the images are staggered."""
    problem = random_problem(torch.bfloat16, batch, (20, 18), 16, 24)
    usual = attend(problem, Kernels(MachineLauncher(cuda_on_cpu)))
    monkeypatch.setattr(plans, "plan", functools.partial(plans.plan.__wrapped__, lag=lag))
    launcher = MachineLauncher(cuda_on_cpu, block_order=3)
    assert all(torch.equal(a, b) for a, b in zip(attend(problem, Kernels(launcher)), usual, strict=True))
    assert [launch.blocks for launch in launcher.launched] == [(batch + lag) * 38] * 2


def test_every_ticket_is_an_item_unless_images_are_staggered():
    for sizes, segments, cuts, passes in (((97, 97), 1, 4, 1), ((300, 300), 2, 1, 2)):
        (launch,) = plans.plan("forward", "bf16", 1, sizes, 64, 512, H100)
        assert (launch.cuts, launch.passes) == (cuts, passes)
        assert launch.blocks == 2 * sizes[0] * segments**2 * cuts * passes


@pytest.mark.parametrize("sizes", [(20, 18), (3, 5, 20), (40, 3)])
def test_cuts_of_the_channels_make_no_difference(cuda_on_cpu, sizes):
    """Each item forms the weights anew, and lse of the earlier phases is still there when the last one reads it."""
    problem = random_problem(torch.bfloat16, 2, sizes, 16, 4 * 64)
    with most_tiles((1, 2)):
        results = [
            Kernels(MachineLauncher(cuda_on_cpu, order=cuts), cuts=cuts).forward(*problem.tensors, problem.scale)
            for cuts in (1, 2, 3, 4)
        ]
    assert all(torch.equal(a, b) for again in results for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("arithmetic", ["bf16", "f16"])
@pytest.mark.parametrize("sizes", [(20, 18), (2, 3, 20), (40, 3)])
def test_additions_in_the_cache(cuda_on_cpu, arithmetic, sizes):
    """The same results, each addition rounded; lse has launches of its own, and every run gives the same bits."""
    problem = random_problem(DTYPE[arithmetic], 2, sizes, 16, 136)
    with most_tiles((1, 2)):
        launchers = [MachineLauncher(cuda_on_cpu, order=order, block_order=order) for order in ("forward", 1)]
        results = [attend(problem, Kernels(launcher, adds=True)) for launcher in launchers]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(launch.configuration.adds for launch in launchers[0].launched)
    check(problem, arithmetic, results[0])


def test_additions_in_the_cache_are_refused_where_there_are_none():
    for kernel, arithmetic, gpu in (("forward", "tf32", H100), ("backward", "bf16", H100._replace(capability=(8, 9)))):
        with pytest.raises(ValueError, match=f"plan: adds must be False for {kernel} in {arithmetic} on"):
            plans.plan(kernel, arithmetic, 1, (5, 5), 16, 64, gpu, adds=True)


def test_a_call_with_few_lines_cuts_its_channels():
    """As many items as blocks at once, of at least one chunk each."""
    for images, channels, cuts in ((1, 512, 4), (2, 512, 2), (4, 512, 1), (1, 128, 2), (1, 64, 1)):
        (launch,) = plans.plan("forward", "bf16", images, (97, 97), 64, channels, H100)
        assert launch.cuts == cuts
    for images in (1, 2, 8):
        assert plans.plan("backward", "bf16", images, (97, 97), 64, 512, H100)[0].cuts == 1


def test_parts_without_a_chunk_are_refused():
    assert plans.plan("forward", "bf16", 1, (5, 5), 16, 128, H100, cuts=2)[0].cuts == 2
    for parts in ({"cuts": 3}, {"cuts": 2, "passes": 2}):
        with pytest.raises(ValueError, match="plan: every part of the channels must have a chunk, got"):
            plans.plan("forward", "bf16", 1, (5, 5), 16, 128, H100, **parts)


def test_too_many_images_are_refused():
    with pytest.raises(ValueError, match=r"plan: a call must have fewer than 2\^26 images, got 67108864; split"):
        plans.plan("backward", "bf16", 2**26, (1, 1), 16, 16, H100)


def test_arrays_of_64_gib_are_refused():
    with pytest.raises(ValueError, match="plan: an array must have fewer than 64 GiB, got 8 images of"):
        plans.plan("forward", "bf16", 8, (4096, 1024), 64, 1024, H100)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", list(ARITHMETICS))
@pytest.mark.parametrize("scale", [0.0, 1e-60, -1e-60, -3.0])
def test_scales_of_any_size_and_sign(cuda_on_cpu, arithmetic, scale):
    problem = random_problem(DTYPE[arithmetic], 1, (5, 17), 8, 8, scale=scale)
    check(problem, arithmetic, attend(problem, Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic)))))


@pytest.mark.parametrize("scale", [1e-45, -1e-45, 1e45])
def test_scales_beyond_float32_in_float64(cuda_on_cpu, scale):
    problem = random_problem(torch.float64, 1, (5, 17), 8, 8, scale=scale)
    q, k = (x * abs(scale) ** -0.5 for x in problem.tensors[:2])
    problem = problem._replace(tensors=(q, k, problem.tensors[2]))
    out, lse = Kernels(MachineLauncher(cuda_on_cpu, limits("f64"))).forward(*problem.tensors, scale)
    truth = expected(problem)
    torch.testing.assert_close(out, truth[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, truth[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_and_infinity_stay_on_their_lines(cuda_on_cpu, which, bad):
    """A NaN or infinity reaches the positions that attend to it, as in the reference, and no others."""
    problem = random_problem(torch.float32, 1, (4, 19), 8, 8)
    problem.tensors[which][0, 2, 1, 17] = bad
    out, lse = Kernels(MachineLauncher(cuda_on_cpu)).forward(*problem.tensors, 1.0)
    truth = expected(problem)
    for a, b in ((out, truth[0]), (lse, truth[1])):
        torch.testing.assert_close(a.double(), b, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arithmetic", ["bf16", "f32", "f64"])
def test_parts_of_the_lines_sum_to_one_whatever_the_energies(cuda_on_cpu, arithmetic):
    """Equal values come out unchanged: lse may be rounded in proportion to the energies, but the parts may not."""
    problem = random_problem(DTYPE[arithmetic], 1, (9, 13), 8, 8, energy=2000.0)
    values = torch.full_like(problem.tensors[2], 1.5)
    out, lse = Kernels(MachineLauncher(cuda_on_cpu, limits(arithmetic))).forward(*problem.tensors[:2], values, 1.0)
    assert float(lse.max()) > 1000
    unit = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, values, rtol=6 * unit, atol=0.0)


def test_no_weight_at_all_is_nan_and_minus_infinity(cuda_on_cpu):
    q, k, v = (torch.ones(1, n, 3, 4) for n in (4, 4, 8))
    k[...] = -float("inf")
    out, lse = Kernels(MachineLauncher(cuda_on_cpu)).forward(q, k, v, 1.0)
    assert bool(out.isnan().all())
    assert bool((lse == -float("inf")).all())


# Traffic --------------------------------------------------------------------------------------------------------------


def minimum_bytes(kernel, problem):
    """Return the bytes that the phases of a kernel must read and write: their lines, and earlier phases' results."""
    q, _, v = problem.tensors
    depth, channels = (x.shape[1] * x.element_size() for x in (q, v))
    positions, phases, number = problem.dlse.numel(), q.ndim - 2, problem.dlse.element_size()
    if kernel == "forward":
        result = channels + number
        return positions * (phases * (2 * depth + channels) + (phases - 1) * result), positions * phases * result
    result, inputs = 2 * depth + channels, 2 * depth + 2 * channels + number
    return (
        positions * (phases * inputs + channels + number + (phases - 1) * (result + number)),
        positions * (phases * result + number),
    )


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32"])
def test_hot_kernels_move_no_byte_twice_and_meet_no_bank_conflict(cuda_on_cpu, arithmetic):
    """97x97 with 64 channels of q and k, as in CCNet, but only 64 channels of v, whose chunks all cost the same."""
    problem = random_problem(DTYPE[arithmetic], 1, (97, 97), 64, 64)
    launcher = MachineLauncher(cuda_on_cpu, count=True, check_races=False)
    attend(problem, Kernels(launcher, cuts=1))  # each of several cuts reads q and k
    assert [launch.configuration.tiles for launch in launcher.launched] == [7, 7]
    for launch, counts in zip(launcher.launched, launcher.counts, strict=True):
        read, written = minimum_bytes(launch.configuration.kernel, problem)
        assert read <= counts.bytes_read <= 1.1 * read
        assert counts.bytes_written == written
        for kind in ("matrix_loads", "loads", "stores", "copies"):
            found = getattr(counts, kind)
            assert found.wavefronts > 0
            # The 64-byte rows of TF32's backward are placed for matrix loads: 32-bit loads and stores meet in pairs.
            assert found.conflicts <= (found.wavefronts // 2 if launch.configuration.chunk_units == 4 else 0), kind


# AddressSanitizer -----------------------------------------------------------------------------------------------------

SANITIZED = """
import torch
from ccgpu.bridges import torch_gemm
from ccgpu.bridges.cupy_cuda.attention import Kernels
from ccgpu.bridges.cupy_cuda.stages import Stages
from tests.cuda_on_cpu import device
from tests.cuda_on_cpu.launcher import MachineLauncher
from tests.kernels.cuda.test_kernels import attend, random_problem

launcher = MachineLauncher(device, sanitize=True)
for sizes in ((5, 14), (2, 3, 7)):
    problem = random_problem(torch.bfloat16, 2, sizes, 9, 70)
    attend(problem, Kernels(launcher))
q, k, v = problem.tensors
stages = Stages(launcher)
energies = stages.affinity(q, k)
stages.aggregate(energies, v)
stages.aggregate_transposed(energies, v)
print(len(launcher.counts), "launches")
"""


def test_kernels_under_address_sanitizer(cuda_on_cpu):
    runtime = cuda_on_cpu.sanitizer_runtime()
    if runtime is None:
        pytest.skip("g++ has no libasan here")
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "launches" in result.stdout
