"""The bridge and the Numba CUDA kernels in Numba's simulator: values, phases, layouts.

The kernels get small tiles and several threads, so that segments, partial tiles and several phases occur on small maps,
and a thread that runs ahead of a barrier matters.
"""

import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ccgpu
from ccgpu.bridges import numba_cuda
from ccgpu.kernels import dtypes, reference
from tests.ccgpu import stage_problems
from tests.ccgpu.problems import Problem, attend_plainly, check_errors, check_form, expected, layouts

if not numba_cuda.simulated():
    pytest.skip("needs Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1)", allow_module_level=True)

from ccgpu.kernels.numba_cuda import calls, launch
from ccgpu.kernels.numba_cuda.schedule import Phase, phases
from ccgpu.kernels.numba_cuda.tiles import Shape

SHAPES = [(4, 2, 2), (3, 1, 2), (4, 2, 4), (6, 3, 3), (2, 2, 2)]  # tile, side, chunk
SIZES = st.one_of(
    st.tuples(st.integers(1, 13)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
KINDS = [torch.float64, torch.float32, torch.float16]


@pytest.fixture
def small(monkeypatch):
    """Set small tiles; return a function that sets others."""

    def use(tile, side, chunk):
        shapes = {real: Shape(tile, side, chunk, real) for real in (np.float32, np.float64)}
        monkeypatch.setattr(launch, "SIMULATOR_SHAPES", shapes)

    use(4, 2, 2)
    return use


def random(generator, shape, dtype):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def problem_of(sizes, dtype, batch=1, depth=3, channels=5, scale=0.7, kinds=("contiguous",) * 3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (random(generator, (batch, n, *sizes), dtype) for n in (depth, depth, channels, channels))
    tensors = tuple(layouts(x, kind) for x, kind in zip((q, k, v), kinds, strict=True))
    dlse = random(generator, (batch, *sizes), numba_cuda.energy_dtype(dtype))
    return Problem(tensors, dout, dlse, scale, kinds)


def attend(problem):
    """Return out, lse, dq, dk, dv by the bridge."""
    (q, k, v), dout, dlse, scale = problem[:4]
    out, lse = numba_cuda.forward(q, k, v, scale)
    return (out, lse, *numba_cuda.backward(dout, q, k, v, out, lse, dlse, scale))


def check(problem):
    ours = attend(problem)
    check_errors(ours, attend_plainly(problem), expected(problem), problem)
    check_form(ours, problem)


# Values ---------------------------------------------------------------------------------------------------------------


@given(
    sizes=SIZES,
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(KINDS),
    batch=st.integers(0, 2),
    depth=st.integers(1, 5),
    channels=st.integers(1, 5),
    kinds=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "reversed", "sliced", "expanded"])] * 3),
    scale=st.sampled_from([1.0, -0.5]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=12, deadline=None)
def test_forward_and_backward(sizes, shape, dtype, batch, depth, channels, kinds, scale, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "SIMULATOR_SHAPES", {r: Shape(*shape, r) for r in (np.float32, np.float64)})
        check(problem_of(sizes, dtype, batch, depth, channels, scale, kinds, seed))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((13,), (4, 2, 2)),
        ((5, 4), (4, 2, 4)),
        ((4, 5), (4, 4, 4)),
        ((1, 7), (3, 1, 3)),
        ((7, 1), (6, 3, 3)),
        ((2, 3, 3), (2, 1, 1)),
    ],
)
def test_tiles_one_above_and_below_the_line(small, sizes, shape, dtype):
    small(*shape)
    check(problem_of(sizes, dtype, depth=3, channels=3))


@given(sizes=SIZES, shape=st.sampled_from(SHAPES), dtype=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
@settings(max_examples=10, deadline=None)
def test_stages(sizes, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (random(generator, (2, n, *sizes), dtype) for n in (3, 3, 4))
    weights = random(generator, (2, stage_problems.criss_cross(sizes), *sizes), dtype)
    arrays = [x.double().numpy() for x in (q, k, v, weights)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "SIMULATOR_SHAPES", {r: Shape(*shape, r) for r in (np.float32, np.float64)})
        energies = numba_cuda.affinity(q, k)
        out, transposed = (f(weights, v) for f in (numba_cuda.aggregate, numba_cuda.aggregate_transposed))
    assert energies.movedim(1, -1).is_contiguous()
    truths = (
        reference.affinity(*arrays[:2]),
        reference.aggregate(*arrays[:1:-1]),
        reference.aggregate_transposed(*arrays[:1:-1]),
    )
    for ours, truth in zip((energies, out, transposed), truths, strict=True):
        unit = torch.finfo(ours.dtype).eps
        np.testing.assert_allclose(
            ours.double().numpy(), truth, rtol=2 * unit, atol=40 * torch.finfo(energies.dtype).eps
        )


def test_float16_of_a_long_line_is_rounded_once(small):
    """A line of 40 has 10 segments: 10 roundings of out would exceed one unit in the last place."""
    problem = problem_of((40,), torch.float16, depth=2, channels=2)
    (q, k, v), scale = problem.tensors, problem.scale
    out, lse = numba_cuda.forward(q, k, v, scale)
    truth, truth_lse = reference.forward(*(x.double().numpy() for x in (q, k, v)), scale)
    np.testing.assert_array_max_ulp(out.numpy(), truth.astype(np.float16), 1)
    np.testing.assert_allclose(lse.numpy(), truth_lse, rtol=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_non_finite_inputs_behave_as_the_reference(small, which, value):
    problem = problem_of((4, 5), torch.float64, batch=2, depth=1, channels=2)
    dict(zip("qkv", problem.tensors, strict=True))[which][1, 0, 2, 2] = value
    ours, truths = attend(problem), expected(problem)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, truths, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12, equal_nan=True, err_msg=name)
        assert torch.isfinite(a[0]).all(), name  # the other image is untouched


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_queries_without_a_weight(small):
    """If all energies of a query are -inf, lse is -inf and out NaN; else its energies of -inf have no weight."""
    q, v = torch.ones(1, 1, 9, dtype=torch.float64), torch.arange(9.0, dtype=torch.float64).view(1, 1, 9)
    for finite in ([], [0], [8], [3, 4]):
        k = torch.full((1, 1, 9), -math.inf, dtype=torch.float64)
        k[..., finite] = 1.0
        out, lse = numba_cuda.forward(q, k, v, 1.0)
        truth, truth_lse = reference.forward(q.numpy(), k.numpy(), v.numpy(), 1.0)
        np.testing.assert_allclose(out.numpy(), truth, equal_nan=True)
        np.testing.assert_allclose(lse.numpy(), truth_lse)


@pytest.mark.parametrize("sizes", [(3, 4), (1, 5), (5, 1), (2, 2, 3)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_value_is_not_multiplied_by_a_masked_weight(small, sizes):
    """Each line gives the centre an equal share; masking it on all lines but one would give 0 * inf = NaN."""
    generator = torch.Generator().manual_seed(0)
    v = random(generator, (1, 2, *sizes), torch.float64)
    weights = random(generator, (1, stage_problems.criss_cross(sizes), *sizes), torch.float64).abs() + 0.1
    v[(0, 0, *(n // 2 for n in sizes))] = math.inf
    for name in ("aggregate", "aggregate_transposed"):
        ours, truth = getattr(numba_cuda, name)(weights, v), getattr(reference, name)(weights.numpy(), v.numpy())
        assert not np.isnan(truth).any()
        np.testing.assert_allclose(ours.numpy(), truth, rtol=1e-12)


def test_same_bits_twice(small):
    problem = problem_of((5, 6), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(attend(problem), attend(problem), strict=True))


@pytest.mark.parametrize("dtype", KINDS)
def test_behind_the_op(dtype):
    """The backend by its name, with autograd and both stages, in the simulator's default tiles."""
    problem = problem_of((3, 9), dtype)
    tensors = [x.requires_grad_() for x in problem.tensors]
    out, lse = ccgpu.cca(*tensors, scale=problem.scale, return_lse=True, backend="numba_cuda")
    ours = (out, lse, *torch.autograd.grad((out, lse), tensors, (problem.dout, problem.dlse)))
    check_errors(ours, attend_plainly(problem), expected(problem), problem)
    q, k, v = (x.detach() for x in tensors)
    weights = ccgpu.affinity(problem.scale * q, k, backend="numba_cuda").softmax(1)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        ccgpu.aggregate(weights, v, backend="numba_cuda"), out.detach(), rtol=8 * unit, atol=8 * unit
    )


# Phases ---------------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), tile=st.integers(1, 9), whole=st.booleans()
)
def test_phases_pair_all_segments_once_and_write_each_row_once(sizes, tile, whole):
    steps = phases(sizes, tile, whole)
    assert [step.first for step in steps] == [1] + [0] * (len(steps) - 1)
    assert [step.last for step in steps] == [0] * (len(steps) - 1) + [1]
    pairs = {}
    for step in steps:
        starts = [j * step.span for j in range(step.segments)]
        lengths = [min(step.span, step.length - start) for start in starts]
        assert all(0 < n <= tile for n in lengths)
        assert sum(lengths) == step.length
        keys = [(j + step.shift) % step.segments for j in range(step.segments)]
        assert sorted(keys) == list(range(step.segments))
        axis = pairs.setdefault((step.slot, step.inner, step.length), set())
        assert not axis & set(zip(range(step.segments), keys, strict=True))
        axis |= set(zip(range(step.segments), keys, strict=True))
        assert step.blocks(3) == 3 * math.prod(sizes) // step.length * step.segments
    assert [len(x) for x in pairs.values()] == [math.ceil(length / tile) ** 2 for _, _, length in pairs]
    lengths = [length for _, _, length in pairs]
    if whole:
        assert lengths == [n for n in sizes[:-1] if n > 1] + [sizes[-1]]
    else:
        assert lengths == ([n for n in sizes if n > 1] or [1])


def test_a_phase_is_a_launch(small, monkeypatch):
    """Each phase is a launch of its kernel, and nothing else is launched."""
    launches = []

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, place):
            return lambda *arguments: launches.append(
                (self.name, place, next(x for x in arguments if isinstance(x, Phase)))
            )

    for name in ("forward", "backward", "affinity", "aggregate"):
        monkeypatch.setattr(launch, f"{name}_kernel", lambda *shape, name=name: Kernel(name))
    small(4, 2, 2)
    q = torch.randn(2, 3, 9, 1, 5)
    out, lse = numba_cuda.forward(q, q, q, 1.0)
    numba_cuda.backward(q, q, q, q, out, lse, lse, 1.0)
    weights = numba_cuda.affinity(q, q)
    numba_cuda.aggregate(weights, q)
    for name in ("forward", "backward", "affinity", "aggregate"):
        steps = phases((9, 1, 5), 4)
        assert [step for kernel, _, step in launches if kernel == name] == list(steps)
        assert len(steps) == 3 + 2
        assert {place[1] for kernel, place, _ in launches} == {(2, 2)}
        assert [place[0] for kernel, place, _ in launches if kernel == name] == [2 * 5 * 3] * 3 + [2 * 9 * 2] * 2


def test_no_images_launch_nothing(monkeypatch):
    for name in ("forward", "backward", "affinity", "aggregate"):
        monkeypatch.setattr(launch, f"{name}_kernel", lambda *shape: pytest.fail("launched"))
    q = torch.randn(0, 3, 4, 5)
    out, lse = numba_cuda.forward(q, q, q, 1.0)
    results = (out, *numba_cuda.backward(q, q, q, q, out, lse, lse, 1.0))
    assert [x.shape for x in results] == [q.shape] * 4
    weights = numba_cuda.affinity(q, q)
    assert weights.shape == (0, 8, 4, 5)
    assert numba_cuda.aggregate(weights, q).shape == q.shape
    q = np.zeros((0, 3, 4, 5))
    out, lse = calls.forward(q, q, q)
    assert (out.shape, lse.shape) == (q.shape, (0, 4, 5))
    assert [x.shape for x in calls.backward(q, q, q, q, out, lse)] == [q.shape] * 3


# Arrays ---------------------------------------------------------------------------------------------------------------


def array_of(x, layout):
    """Return x in another layout."""
    if layout == "channels_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    if layout == "fortran":
        return np.asfortranarray(x)
    if layout == "backwards":
        return np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1]
    if layout == "sliced":
        wide = np.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), np.nan, x.dtype)
        wide[:, ::2] = x
        return wide[:, ::2]
    return x


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "fortran", "backwards", "sliced"])
@pytest.mark.parametrize(("sizes", "dtype"), [((5,), np.float16), ((3, 4), np.float32), ((2, 2, 3), np.float64)])
def test_arrays_of_any_layout(small, sizes, dtype, layout):
    generator = np.random.default_rng(1)
    q, k, v, dout = (array_of(generator.standard_normal((2, n, *sizes)).astype(dtype), layout) for n in (2, 2, 3, 3))
    wide = dtypes.energy_dtype(dtype).type
    dlse = array_of(generator.standard_normal((2, 1, *sizes)).astype(wide), layout)[:, 0]
    before = [x.copy() for x in (q, k, v, dout, dlse)]
    out, lse = calls.forward(q, launch.as_device_array(k), v, 0.5)
    gradients = calls.backward(dout, q, k, v, out, lse, dlse, 0.5)
    truths = reference.forward(q, k, v, 0.5)
    truths += reference.backward(dout, q, k, v, *truths, dlse, 0.5)
    for ours, truth, kind in zip((out, lse, *gradients), truths, (dtype, wide, dtype, dtype, dtype), strict=True):
        array = ours.copy_to_host()
        assert array.dtype == kind
        unit = 8 * np.finfo(kind).eps
        np.testing.assert_allclose(array.astype(np.float64), truth, rtol=unit, atol=unit)
    assert np.moveaxis(out._ary, 1, -1).flags.c_contiguous
    for x, y in zip((q, k, v, dout, dlse), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_missing_gradient_of_lse_is_zero(small):
    q = np.random.default_rng(2).standard_normal((1, 2, 3, 4))
    out, lse = calls.forward(q, q, q)
    zeros = np.zeros(lse.shape)
    given_, left_out = (calls.backward(q, q, q, q, out, lse, *rest) for rest in ([zeros], []))
    for a, b in zip(given_, left_out, strict=True):
        np.testing.assert_array_equal(a.copy_to_host(), b.copy_to_host())


def test_channels_last_arrays_and_tensors_are_not_copied(small, monkeypatch):
    addresses = []

    def record(q, k, v, out, lse, *rest, **options):
        addresses.extend(x._ary.ctypes.data for x in (q, k, v, out, lse))

    monkeypatch.setattr(launch, "launch_forward", record)
    q, k, v = (array_of(np.zeros((2, n, 3, 4), np.float32), "channels_last") for n in (2, 2, 3))
    out, lse = calls.forward(q, k, v)
    assert addresses == [x.ctypes.data for x in (q, k, v, out._ary, lse._ary)]
    addresses.clear()
    q, k, v = (layouts(torch.zeros(2, n, 3, 4), "channels_last") for n in (2, 2, 3))
    out, lse = numba_cuda.forward(q, k, v, 1.0)
    assert addresses == [x.data_ptr() for x in (q, k, v, out, lse)]


@pytest.mark.parametrize("dtype", KINDS)
def test_everything_is_written(small, monkeypatch, dtype):
    """No result keeps a NaN of its uninitialised memory."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(math.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(math.nan))
    problem = problem_of((5, 3), dtype)
    q, k, v = problem.tensors
    weights = numba_cuda.affinity(q, k)
    stages = (weights, numba_cuda.aggregate(weights, v), numba_cuda.aggregate_transposed(weights, v))
    for x in (*attend(problem), *stages):
        assert torch.isfinite(x).all()


def test_streams():
    """The default stream and a Numba stream are returned unchanged."""
    assert launch.stream_of(0) == 0
    stream = object()
    assert launch.stream_of(stream) is stream


@pytest.mark.parametrize(
    ("named", "stream", "waits"),
    [(0x40, 0x40, False), (0x40, 0x50, True), (0x40, 0, True), (None, 0x40, False), (None, 0, False)],
)
def test_the_host_waits_for_other_streams_only(monkeypatch, named, stream, waits):
    """Launches follow earlier work on their own stream; an array that names another one makes the host wait."""
    waited = []
    monkeypatch.setattr(launch, "SIMULATED", False)
    monkeypatch.setattr(launch, "cuda", types.SimpleNamespace(as_cuda_array=lambda x, sync: waited.append(sync)))
    array = types.SimpleNamespace(__cuda_array_interface__={} if named is None else {"stream": named})
    launch.as_device_array(array, stream)
    launch.as_device_array(types.SimpleNamespace(__cuda_array_interface__={"stream": None}), stream)
    assert waited == [waits, False]


def test_arrays_are_taken_for_the_stream_of_the_launches(small, monkeypatch):
    original, streams = launch.as_device_array, []
    monkeypatch.setattr(launch, "as_device_array", lambda x, stream=None: streams.append(stream) or original(x))
    q = np.zeros((1, 2, 3, 4))
    out, lse = calls.forward(q, q, q, stream=0x40)
    calls.backward(q, q, q, q, out, lse, lse, stream=0x50)
    assert streams == [0x40] * 3 + [0x50] * 7
