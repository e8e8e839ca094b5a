"""The functions of the CPU kernels one by one, against NumPy and exact arithmetic, with guards around each result."""

import decimal
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from ccgpu.kernels.numba_cpu import cache, gradients, schedule, sharing, tickets, vectors
from ccgpu.kernels.numba_cpu.lines import group_at, position_of
from ccgpu.kernels.numba_cpu.matrices import NEAR, copy, multiply, transpose
from ccgpu.kernels.numba_cpu.vectors import VECTOR_BYTES
from tests.kernels.numba_cpu.problems import address

DTYPES = [np.float32, np.float64]
GUARD = -12345.0
compiled, nogil = njit(error_model="numpy"), njit(error_model="numpy", nogil=True)


@compiled
def exponentials(like, address, size, offset):
    return vectors.exponentials(like, address, size, offset)


@compiled
def maximum(like, address, size):
    return vectors.maximum(like, address, size)


@compiled
def fill_padding(like, address, count, value):
    vectors.fill_padding(like, address, count, value)


@compiled
def dot(like, a, b, size):
    return vectors.dot(like, a, b, size)


@compiled
def subtract_and_multiply(like, x, factors, size, offset):
    vectors.subtract_and_multiply(like, x, factors, size, offset)


@compiled
def transposed(like, source, source_row, rows, columns, target, target_row):
    transpose(like, like, source, source_row, rows, columns, target, target_row)


@compiled
def product(like, rows, columns, depth, a, b, c, alpha, beta):
    """Call `multiply`; each tuple holds the address and the strides of an argument."""
    multiply(like, rows, columns, depth, a[0], a[1], a[2], b[0], b[1], c[0], c[1], alpha[0], alpha[1], beta[0], beta[1])


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request):
    cache.prepare(request.param, request.param)
    return request.param


def lanes(dtype):
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def whole_vectors(values, dtype):
    """Return the values, repeated until they fill whole vectors."""
    values = np.asarray(values, dtype)
    return np.resize(values, -(-values.size // lanes(dtype)) * lanes(dtype))


# Vectors --------------------------------------------------------------------------------------------------------------


def exponentials_of(x, offset=0.0):
    """Return exp(x - offset), as `exponentials` writes it, and the sum that it returns."""
    like, y = x.dtype.type(0), np.concatenate([[GUARD], x, [GUARD]]).astype(x.dtype)
    row_sum = exponentials(like, address(y) + x.itemsize, x.nbytes, x.dtype.type(offset))
    assert y[0] == y[-1] == GUARD
    return y[1:-1], row_sum


def test_exponentials_to_a_unit_in_the_last_place(dtype):
    generator, lowest = np.random.default_rng(0), np.log(np.finfo(dtype).tiny)
    spread = np.linspace(0.99999 * lowest, 80, 1000), generator.uniform(-1, 1, 500), generator.uniform(-20, 0, 500)
    near_halves = (np.arange(-100, 100) + 0.5) * np.log(2.0) * (1 + 1e-7)  # where the rounding of x / ln 2 turns
    x = whole_vectors(np.concatenate([*spread, near_halves, [0.0, -0.0, 1e-30, -1e-30]]), dtype)
    ours, _ = exponentials_of(x)
    with decimal.localcontext(decimal.Context(prec=40, Emin=-9999, Emax=9999)):
        for argument, result in zip(x, ours, strict=True):
            truth = decimal.Decimal(float(argument)).exp()
            unit = decimal.Decimal(float(np.spacing(dtype(truth))))
            assert abs(decimal.Decimal(float(result)) - truth) < unit, argument


def test_exponentials_of_differences_and_their_sum(dtype):
    x = whole_vectors(np.random.default_rng(1).uniform(-30, 10, 8 * lanes(dtype)), dtype)
    offset = dtype(10.3)
    ours, row_sum = exponentials_of(x, offset)
    epsilon = np.finfo(dtype).eps
    exactly = x.astype(np.longdouble) - np.longdouble(offset)  # the difference is not rounded
    np.testing.assert_allclose(ours, np.exp(exactly), rtol=1.01 * epsilon)
    np.testing.assert_allclose(row_sum, ours.astype(np.float64).sum(), rtol=20 * epsilon)


def test_exponentials_at_the_ends(dtype):
    lowest = np.log(np.finfo(dtype).tiny)
    below = [-np.inf, 1.001 * lowest, lowest - 1, 2 * lowest, -1e30, np.finfo(dtype).min]
    x = whole_vectors([*below, np.nan, 0.999 * lowest], dtype)
    ours, row_sum = exponentials_of(x)
    np.testing.assert_array_equal(ours[:6], 0)
    assert np.isnan(ours[6])
    assert ours[7] > 0
    assert np.isnan(row_sum)
    zeros, none = exponentials_of(whole_vectors(below, dtype))
    assert none == 0
    assert not zeros.any()
    assert np.isnan(exponentials_of(whole_vectors([1.0], dtype), np.nan)[0]).all()


@pytest.mark.parametrize("vectors", [1, 2, 5])
def test_maximum(dtype, vectors):
    generator = np.random.default_rng(vectors)
    for place in range(vectors * lanes(dtype)):
        x = generator.uniform(-9, -8, vectors * lanes(dtype)).astype(dtype)
        x[place] = -7
        assert maximum(dtype(0), address(x), x.nbytes) == -7
        x[place] = np.inf
        assert maximum(dtype(0), address(x), x.nbytes) == np.inf
    x[:] = -np.inf
    assert maximum(dtype(0), address(x), x.nbytes) == -np.inf


@pytest.mark.parametrize("value", [-np.inf, 3.0])
def test_fill_padding(dtype, value):
    for count in range(1, 2 * lanes(dtype) + 2):
        size = -(-count // lanes(dtype)) * lanes(dtype)
        x = np.random.default_rng(count).standard_normal(size + 2).astype(dtype)
        x[[0, -1]] = GUARD
        expected = x.copy()
        expected[1 + count : 1 + size] = value
        fill_padding(dtype(0), address(x) + x.itemsize, count, dtype(value))
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("vectors", [1, 2, 7])
def test_dot(dtype, vectors):
    a, b = np.random.default_rng(vectors).integers(-50, 50, (2, vectors * lanes(dtype))).astype(dtype)
    assert dot(dtype(0), address(a), address(b), a.nbytes) == (a.astype(int) * b.astype(int)).sum()


def test_add_dot_of_any_number_of_channels(dtype):
    generator = np.random.default_rng(0)
    for channels in range(1, 4 * lanes(dtype)):
        a, b = generator.integers(-50, 50, (2, channels)).astype(dtype)
        sums = np.array([GUARD, 7, GUARD], dtype)
        gradients.add_dot(dtype(0), address(sums) + sums.itemsize, address(a), address(b), channels)
        np.testing.assert_array_equal(sums, [GUARD, 7 + (a.astype(int) * b.astype(int)).sum(), GUARD])


def test_subtract_and_multiply(dtype):
    x, factors = np.random.default_rng(0).standard_normal((2, 3 * lanes(dtype))).astype(dtype)
    y, offset = np.concatenate([[GUARD], x, [GUARD]]).astype(dtype), dtype(0.3)
    subtract_and_multiply(dtype(0), address(y) + x.itemsize, address(factors), x.nbytes, offset)
    np.testing.assert_array_equal(y, np.concatenate([[GUARD], factors * (x - offset), [GUARD]]).astype(dtype))


# Matrices -------------------------------------------------------------------------------------------------------------


def test_transpose_of_every_rectangle(dtype):
    """The rows of source and target have gaps between them, and their addresses are not aligned to vectors."""
    like, size, most = dtype(0), np.dtype(dtype).itemsize, 35
    source = np.arange(1.0, (most + 1) * (most + 4) + 1, dtype=dtype).reshape(most + 1, most + 4)
    for rows, columns in itertools.product(range(1, most + 1), repeat=2):
        target = np.full((columns + 2, rows + 3), GUARD, dtype)
        wanted = target.copy()
        wanted[1:-1, 1:-2] = source[1 : rows + 1, 3 : columns + 3].T
        here, there = address(source[1:, 3:]), address(target[1:, 1:])
        transposed(like, here, source.strides[0], rows, columns, there, target.strides[0])
        np.testing.assert_array_equal(target, wanted, f"{rows} x {columns}")
    assert size * most > 2 * VECTOR_BYTES  # several whole tiles, and parts of tiles


def test_transpose_of_rows_in_reverse(dtype):
    source = np.arange(20 * 23, dtype=dtype).reshape(20, 23)[::-1]
    target = np.full((23, 20), GUARD, dtype)
    transposed(dtype(0), address(source), source.strides[0], 20, 23, address(target), target.strides[0])
    np.testing.assert_array_equal(target, source.T)


def test_copy_of_any_number(dtype):
    for count in range(4 * lanes(dtype)):
        source = np.arange(1, count + 3, dtype=dtype)
        target = np.full(count + 4, GUARD, dtype)
        wanted = target.copy()
        wanted[2 : 2 + count] = source[1 : 1 + count]
        copy(dtype(0), dtype(0), address(source) + source.itemsize, count, address(target) + 2 * source.itemsize)
        np.testing.assert_array_equal(target, wanted)


def check_product(dtype, rows, vectors, depth, flipped, alphas, betas, generator):
    """Multiply integers, so that nothing is rounded, and compare all memory around the result too."""
    columns = vectors * lanes(dtype)
    a = generator.integers(-9, 10, (depth, rows + 1) if flipped else (rows, depth + 2)).astype(dtype)
    left = a.T[:rows] if flipped else a[:, :depth]
    b = generator.integers(-9, 10, (depth, columns + 3)).astype(dtype)
    c = generator.integers(-9, 10, (rows + 2, columns + 5)).astype(dtype)
    alpha, beta = (generator.integers(-3, 4, rows).astype(dtype) for _ in "ab")
    if alphas == "one":
        alpha[:] = alpha[0]
    if betas == "one":
        beta[:] = beta[0]
    if betas == "none":
        c[1:-1, 2 : 2 + columns] = np.nan
        beta[:] = 0
    wanted = c.copy()
    before = 0 if betas == "none" else beta[:, None] * c[1:-1, 2 : 2 + columns]
    wanted[1:-1, 2 : 2 + columns] = alpha[:, None] * (left @ b[:, 1 : 1 + columns]) + before
    step = {"one": 0, "each": c.itemsize, "none": 0}
    product(
        dtype(0),
        rows,
        columns * c.itemsize,
        depth,
        (address(left), *left.strides),
        (address(b[:, 1:]), b.strides[0]),
        (address(c[1:, 2:]), c.strides[0]),
        (address(alpha), step[alphas]),
        (0 if betas == "none" else address(beta), step[betas]),
    )
    np.testing.assert_array_equal(c, wanted, f"{rows} x {vectors} vectors x {depth}, {flipped}, {alphas}, {betas}")


def test_multiply_of_every_size(dtype):
    """Every size gets the next kind of A, alpha and beta, so that each size of tile gets all kinds."""
    generator = np.random.default_rng(0)
    kinds = itertools.cycle(itertools.product([False, True], ["one", "each"], ["none", "one", "each"]))
    sizes = itertools.product(
        range(1, 31), range(1, 10), range(1, 20)
    )  # an odd number of depths, so that sizes and kinds do not repeat in step
    for size, kind in zip(sizes, kinds, strict=False):
        check_product(dtype, *size, *kind, generator)


@pytest.mark.parametrize("rows", [1, 7, 13])
@pytest.mark.parametrize("more", [0, 1])
def test_multiply_of_a_right_matrix_for_either_order_of_tiles(dtype, rows, more):
    vectors = 9
    depth = NEAR // (vectors * VECTOR_BYTES) + more
    for kind in itertools.product([False, True], ["one", "each"], ["none", "one", "each"]):
        check_product(dtype, rows, vectors, depth, *kind, np.random.default_rng(rows))


def test_multiply_without_whole_numbers(dtype):
    """Terms are added one by one, so the error is at most `depth` roundings of the sum of magnitudes."""
    generator = np.random.default_rng(0)
    rows, columns, depth = 31, 3 * lanes(dtype), 200
    a, b = (generator.standard_normal(shape).astype(dtype) for shape in ((rows, depth), (depth, columns)))
    c, one = np.full((rows, columns), np.nan, dtype), np.ones(1, dtype)
    size = c.itemsize
    arguments = (address(a), *a.strides), (address(b), b.strides[0]), (address(c), c.strides[0]), (address(one), 0)
    product(dtype(0), rows, columns * size, depth, *arguments, (0, 0))
    wide = [x.astype(np.longdouble) for x in (a, b)]
    bound = depth * np.finfo(dtype).eps * (abs(wide[0]) @ abs(wide[1]))
    assert (abs(c - wide[0] @ wide[1]) <= bound).all()


# Groups and tickets ---------------------------------------------------------------------------------------------------

SIZES = st.one_of(
    st.lists(st.integers(1, 60), min_size=1, max_size=2), st.lists(st.integers(1, 20), min_size=3, max_size=3)
).map(tuple)


@given(
    SIZES,
    st.integers(1, 5),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 2**22),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_groups_share_out_every_position_once(sizes, images, itemsize, gathers, threads, sheet_bytes, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "SHEET_BYTES", sheet_bytes)
        axes = schedule.plan_axes(sizes, images, itemsize, gathers, threads, whole)
    assert [axis.length for axis in axes] == [sizes[-1], *(n for n in sizes[:-1] if n > 1)]
    assert [axis.first for axis in axes] == [True] + [False] * (len(axes) - 1)
    assert [axis.last for axis in axes] == [False] * (len(axes) - 1) + [True]
    for axis in axes:
        assert axis.crossing == len(axes)
        assert axis.length * axis.inner * axis.outer == np.prod(sizes)
        assert 1 <= axis.queries <= axis.length
        assert axis.parts == 1 or not whole
        groups = [group_at.py_func(axis, n) for n in range(axis.outer * axis.groups * axis.parts)]
        assert {group.image for group in groups} == {0}
        assert min(group.lines for group in groups) >= 1
        assert max(group.lines for group in groups) <= axis.lines
        assert min(group.length for group in groups) >= 1
        positions = [
            position_of.py_func(axis, 0, g, m, i) for g in groups for m in range(g.lines) for i in range(g.length)
        ]
        assert sorted(positions) == list(range(np.prod(sizes)))
        following = group_at(axis, axis.outer * axis.groups * axis.parts)
        assert (following.image, following.position, following.first) == (1, 0, 0)


AXIS = schedule.plan_axes((3, 4), 1, 4, False, 1, True)[0]
TASK = sharing.whole_lines(AXIS)


@nogil
def do_all(phases, counters, done, early):
    """Count each group that this thread takes; mark groups that began before an earlier phase was done as early."""
    for axis, _, begin, end in tickets.tickets(phases, counters):
        early[begin] = axis.length != 4
        for phase in phases:
            if phase[19] <= begin < phase[20]:
                for group in range(phase[19]):
                    early[begin] = early[begin] or done[group] == 0
        for group in range(begin, end):
            done[group] += 1


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 20), st.integers(1, 10))
@settings(deadline=None)
def test_tickets_cover_the_groups_of_each_phase(counts, threads, parts):
    starts = np.cumsum([0, *counts])
    ranges = itertools.pairwise(starts)
    phases = tickets.numbers_of([tickets.phase_of(AXIS, TASK, *groups, threads, parts) for groups in ranges])
    counters = tickets.new_counters(len(counts))
    done, early = np.zeros(starts[-1] + 1, np.int64), np.zeros(starts[-1] + 1, np.bool_)
    for _ in range(2):  # a thread that comes when all is done finds no ticket and returns
        do_all(phases, counters.ctypes.data, done, early)
        np.testing.assert_array_equal(done[:-1], 1)
        assert not early.any()


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4))
@settings(deadline=None)
def test_a_thread_without_counters_does_all_alone(counts):
    starts = np.cumsum([0, *counts])
    phases = tickets.numbers_of([tickets.phase_of(AXIS, TASK, *groups, 1, 1) for groups in itertools.pairwise(starts)])
    done, early = np.zeros(starts[-1] + 1, np.int64), np.zeros(starts[-1] + 1, np.bool_)
    do_all(phases, 0, done, early)
    np.testing.assert_array_equal(done[:-1], 1)
    assert not early[:-1].any()


@pytest.mark.timeout(120)
def test_threads_take_each_ticket_once_and_wait_between_phases():
    starts = range(0, 6001, 600)
    phases = tickets.numbers_of([tickets.phase_of(AXIS, TASK, *groups, 4, 50) for groups in itertools.pairwise(starts)])
    for _ in range(20):
        counters = tickets.new_counters(len(phases))
        done, early = np.zeros(6000, np.int64), np.zeros(6000, np.bool_)
        threads = [threading.Thread(target=do_all, args=(phases, counters.ctypes.data, done, early)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(done, 1)
        assert not early.any()
