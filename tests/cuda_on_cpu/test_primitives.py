"""Each model of a primitive against its definition in NumPy, and the machine itself: indices, turns, shuffles."""

import re
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("primitives_under_test.cu").read_text()
ENTRIES = re.findall(r'^extern "C" __global__ void (\w+)\(', SOURCE, re.MULTILINE)
ORDERS = ["forward", "reverse", 1, 2]


@pytest.fixture(scope="module")
def library(cuda_on_cpu):
    return cuda_on_cpu.compile(SOURCE, ENTRIES)


def run(library, entry, given, out, grid=1, block=32, number=0, **options):
    """Launch a kernel that reads `given` and writes `out`, an array or the shape of a float one."""
    if isinstance(out, tuple):
        out = np.full(out, np.nan, np.float32)
    given = np.ascontiguousarray(given)
    arguments = struct.pack("PPi4x", given.ctypes.data, out.ctypes.data, number)
    library.launch(entry, grid, block, arguments, buffers=[("in", given, False), ("out", out, True)], **options)
    return out


def elementwise(library, entry, given, out):
    """Launch one thread for each row of `given`."""
    return run(library, entry, given, out, grid=-(-len(given) // 256), block=256, number=len(given))


def bf16_bits(x):
    """Return the bits of the nearest bfloat16, ties to even, by comparing distances in float64."""
    x = np.asarray(x, np.float32)
    low = np.where(np.isnan(x), 0, x.view(np.uint32) >> 16)
    high = low + 1
    # Beyond the largest finite number, the next one counts as 2^128: rounding to infinity begins halfway to it.
    with np.errstate(invalid="ignore"):
        value = [(b.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for b in (low, high)]
    value = [np.where(np.isinf(v), np.copysign(2.0**128, v), v) for v in value]
    below, above = (np.abs(x.astype(np.float64) - v) for v in value)
    nearest = np.where((below < above) | ((below == above) & (low % 2 == 0)), low, high)
    return np.where(np.isnan(x), 0x7FFF, np.where(np.isinf(x), low, nearest)).astype(np.uint16)


@pytest.mark.parametrize(("entry", "inner"), [("multiply_f16", 16), ("multiply_bf16", 16), ("multiply_tf32", 8)])
def test_multiply_is_the_product(library, entry, inner):
    random = np.random.default_rng(inner)
    a, b, c = (random.integers(-9, 10, shape).astype(np.float32) for shape in ((16, inner), (inner, 8), (16, 8)))
    encode = {
        "multiply_f16": lambda x: x.astype(np.float16).view(np.uint16).astype(np.uint32),
        "multiply_bf16": lambda x: bf16_bits(x).astype(np.uint32),
        # The unit does not read the low 13 bits of a tf32 operand.
        "multiply_tf32": lambda x: x.view(np.uint32) | random.integers(0, 1 << 13, x.shape).astype(np.uint32),
    }[entry]
    words = np.concatenate([encode(a).ravel(), encode(b).ravel(), c.ravel().view(np.uint32)])
    assert np.array_equal(run(library, entry, words, (16, 8)), c + a @ b)


def test_multiply_carries_infinities_and_nan(library):
    a, b = np.ones((16, 8), np.float32), np.ones((8, 8), np.float32)
    a[3, 2], a[5, 1] = np.inf, np.nan
    words = np.concatenate([a.ravel(), b.ravel(), np.zeros(128, np.float32)])
    expected = np.full((16, 8), 8.0)
    expected[3], expected[5] = np.inf, np.nan
    np.testing.assert_array_equal(run(library, "multiply_tf32", words, (16, 8)), expected)


def test_matrix_loads(library):
    rows = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    straight = run(library, "load_rows", rows, np.zeros((32, 4, 2), np.uint16), shared_bytes=512)
    turned = run(library, "load_columns", rows, np.zeros((32, 4, 2), np.uint16), shared_bytes=512)
    for lane in range(32):
        group, within = lane // 4, 2 * (lane % 4)
        assert np.array_equal(straight[lane], rows[:, group, within : within + 2])
        assert np.array_equal(turned[lane], rows[:, within : within + 2, group])


def test_matrix_stores_are_the_reverse_of_loads(library):
    """Only Hopper and later GPUs have them."""
    rows = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    words = run(library, "load_rows", rows, np.zeros((32, 4, 2), np.uint16), shared_bytes=512)
    assert np.array_equal(run(library, "store_rows", words, np.zeros_like(rows), shared_bytes=512), rows)


@pytest.mark.parametrize(("entry", "dtype"), [("quotients_float", np.float32), ("quotients_double", np.float64)])
def test_quotients_and_numbers_above_zero(library, entry, dtype):
    x = np.array([1, -3, 7e-5, 2.5, np.inf, -np.inf, np.nan, 0, 4, -0.0, 9], dtype)
    found = elementwise(library, entry, x, np.full((len(x), 2), np.nan, dtype))
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(found[:, 0], x / np.roll(x, -1), rtol=2 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(found[:, 1], np.where(x > 0, 0, x))


def test_uniform_number_is_that_of_the_first_lane(library):
    given = np.arange(7, 71, dtype=np.int32)
    found = run(library, "uniform_numbers", given, np.zeros(64, np.int32), block=64)
    assert np.array_equal(found, np.repeat([7, 39], 32))


@pytest.mark.parametrize("order", ORDERS)
def test_copies_arrive_and_invalid_ones_are_zeros(library, order):
    given = np.arange(1, 1 + 32 * 3 * 4, dtype=np.float32).reshape(32, 3, 4)
    expected = given * (np.arange(32) % 2 == 0)[:, None, None]
    assert np.array_equal(run(library, "copy", given, (32, 3, 4), shared_bytes=48 * 32, order=order), expected)


def test_unpack_every_pattern(library):
    bits = np.arange(1 << 16, dtype=np.uint16)
    pairs = np.stack([bits, bits[::-1]], 1)
    f16 = elementwise(library, "unpack_f16", pairs, (1 << 16, 2))
    np.testing.assert_array_equal(f16, pairs.view(np.float16).astype(np.float32))
    assert np.array_equal(np.signbit(f16[:, 0]), bits >= 1 << 15)
    bf16 = elementwise(library, "unpack_bf16", pairs, (1 << 16, 2))
    assert np.array_equal(bf16.view(np.uint32), pairs.astype(np.uint32) << 16)


def around(values):
    """Return each number, the midpoint to the next one, and the neighbours of both in float32."""
    with np.errstate(all="ignore"):
        ends = values.astype(np.float64)
        halves = ((ends[:-1] + ends[1:]) / 2).astype(np.float32)
        points = np.concatenate([values, halves])
        up, down = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    special = np.array([np.inf, np.nan, 0, 1e-45, 65519.996, 65520, 65536, 3.4e38], np.float32)
    points = np.concatenate([points, up, down, special])
    return np.concatenate([points, -points])


def test_pack_f16_rounds_to_nearest_even(library):
    values = np.sort(np.arange(0x7C00, dtype=np.uint16).view(np.float16)).astype(np.float32)
    points = around(values)
    pairs = np.stack([points, points[::-1]], 1)
    packed = elementwise(library, "pack_f16", pairs, np.zeros(pairs.shape, np.uint16))
    with np.errstate(over="ignore"):
        expected = pairs.astype(np.float16).view(np.uint16)
    assert np.array_equal(packed, np.where(np.isnan(pairs), 0x7FFF, expected))


def test_pack_bf16_rounds_to_nearest_even(library):
    values = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32)
    points = around(values)
    pairs = np.stack([points, points[::-1]], 1)
    packed = elementwise(library, "pack_bf16", pairs, np.zeros(pairs.shape, np.uint16))
    assert np.array_equal(packed, bf16_bits(pairs))


def test_pack_undoes_unpack(library):
    bits = np.arange(1 << 16, dtype=np.uint16)
    for name, largest in (("f16", 0x7C00), ("bf16", 0x7F80)):
        numbers = bits[(bits & 0x7FFF) <= largest]
        wide = elementwise(library, f"unpack_{name}", np.stack([numbers, numbers], 1), (len(numbers), 2))
        assert np.array_equal(
            elementwise(library, f"pack_{name}", wide, np.zeros(wide.shape, np.uint16))[:, 1], numbers
        )


def test_tf32_rounds_to_nearest_ties_away(library):
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 60_000, dtype=np.uint64).astype(np.uint32)
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)
    ties = (bits[:5000, None] & 0xFFFFE000 | low).ravel()
    x = np.concatenate([bits, ties, np.array([0x7F800000, 0xFF800000, 0x7FC00001, 0x7F7FFFFF], np.uint32)])
    got = elementwise(library, "round_to_tf32", x, np.zeros(len(x), np.uint32)).view(np.float32)
    assert not np.any(got.view(np.uint32)[~np.isnan(got)] & 0x1FFF)
    x = x.view(np.float32)
    mantissa, exponent = np.frexp(np.where(np.isfinite(x), x, 0).astype(np.float64))
    step = np.ldexp(1.0, np.maximum(exponent, -125) - 11)  # between numbers of 11 significant bits
    with np.errstate(invalid="ignore"):
        nearest = np.copysign(np.floor(np.abs(mantissa) * np.ldexp(1.0, exponent) / step + 0.5) * step, x)
    expected = np.where(np.isfinite(x), np.where(np.abs(nearest) >= 2.0**128, np.copysign(np.inf, x), nearest), x)
    np.testing.assert_array_equal(got.astype(np.float64), expected)


def check_powers_and_logarithms(library, float_error, double_error, atol=0.0):
    """Compare both with NumPy's in float64 by relative errors; a float logarithm may also be off by `atol`."""
    x = np.array([0, 1, -1.5, 10.25, -125.9, -126.5, -149, 128, np.inf, -np.inf, np.nan, 1e-40, 0.1], np.float32)
    power, logarithm = elementwise(library, "powers_float", x, (len(x), 2)).T
    with np.errstate(all="ignore"):
        exact = np.exp2(x.astype(np.float64))
        exact[exact < 2.0**-126] = 0  # flushed
        exact[exact >= 2.0**128] = np.inf
        np.testing.assert_allclose(power, exact, rtol=float_error)
        np.testing.assert_allclose(logarithm, np.log2(x.astype(np.float64)), rtol=float_error, atol=atol)
        wide = x.astype(np.float64)
        power, logarithm = elementwise(library, "powers_double", wide, np.full((len(x), 2), np.nan)).T
        np.testing.assert_allclose(power, np.exp2(wide), rtol=double_error)
        np.testing.assert_allclose(logarithm, np.log2(wide), rtol=double_error)


def test_powers_and_logarithms(library):
    check_powers_and_logarithms(library, 2e-7, 1e-15)


def test_hide_changes_nothing(library):
    assert list(run(library, "hidden", np.zeros(1), np.zeros(2, np.int32), block=1)) == [7, 8]


@pytest.mark.parametrize("order", ORDERS)
def test_indices(library, order):
    out = run(
        *(library, "indices", np.zeros(1), np.full((2 * 3 * 2, 2 * 5 * 3, 4), -1, np.int32)),
        **{"grid": (2, 3, 2), "block": (2, 5, 3), "order": order, "block_order": order},
    )
    for block in range(12):
        for thread in range(30):
            t = thread % 2 + 10 * (thread // 2 % 5) + 100 * (thread // 10)
            b = block % 2 + 10 * (block // 2 % 3) + 100 * (block // 6)
            assert list(out[block, thread]) == [t, b, block, thread]


def turns(library, order, threads=70):
    out = run(library, "turns", np.zeros(1), np.zeros(1 + 2 * threads, np.int32), block=threads, order=order)
    return out[1:].reshape(threads, 2).T


def test_thread_orders(library):
    first, second = turns(library, "forward")
    assert np.array_equal(first, np.arange(70))
    assert np.array_equal(second, 70 + np.arange(70))
    first, second = turns(library, "reverse")
    assert np.array_equal(first, np.arange(70)[::-1])
    assert np.array_equal(second, 70 + np.arange(70)[::-1])
    seeds = [np.concatenate(turns(library, seed)) for seed in (1, 1, 2, 0)]
    assert np.array_equal(seeds[0], seeds[1])
    for one in seeds:
        assert np.array_equal(np.sort(one[:70]), np.arange(70))
        assert not np.array_equal(one[:70], np.arange(70))
        assert not np.array_equal(one[:70] + 70, one[70:])
        assert {thread // 32 for thread in np.argsort(one[:70])[:20]} == {0, 1, 2}  # no warp waits for another
    assert not np.array_equal(seeds[0], seeds[2])
    assert not np.array_equal(seeds[0], seeds[3])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warps", [1, 3, 32])
def test_sum_of_a_block(library, order, warps):
    given = np.random.default_rng(0).integers(-50, 50, (3, 32 * warps)).astype(np.float32)
    out = run(library, "sum_block", given, given.shape, grid=3, block=32 * warps, shared_bytes=4 * warps, order=order)
    assert np.array_equal(out, np.broadcast_to(given.sum(1, keepdims=True), given.shape))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 48, 16])
def test_shuffles_of_parts_of_a_warp(library, order, threads):
    given = np.random.default_rng(1).standard_normal(threads)
    out = run(library, "shuffles", given, np.full(threads, np.nan), block=threads, order=order)
    for i in range(threads):
        quarter = i % 32 // 8
        source = i // 8 * 8 + quarter + 1 if quarter % 2 == 0 else i ^ 3
        assert out[i] == given[source]


def test_blocks_wait_for_earlier_blocks(library):
    out = np.zeros(8, np.float32)
    run(library, "chain", np.zeros(1), out, grid=40)
    assert out[4] == 40
    assert out.view(np.int32)[0] == 40


def test_shared_memory_starts_as_nan_in_every_block(library):
    assert np.isnan(run(library, "uninitialised", np.zeros(1), (3,), grid=3, block=1, shared_bytes=16)).all()


def test_portable_switch_gives_the_same(cuda_on_cpu):
    library = cuda_on_cpu.compile(SOURCE, ["sum_block", "turns"], definitions=["CUDA_ON_CPU_UCONTEXT"])
    given = np.arange(128, dtype=np.float32)
    for order in ORDERS:
        out = run(library, "sum_block", given, given.shape, block=128, shared_bytes=16, order=order)
        assert (out == given.sum()).all()
    assert np.array_equal(turns(library, "reverse")[0], np.arange(70)[::-1])


def test_launches_from_several_python_threads(library):
    results = {}

    def work(name):
        given = np.full((50, 64), name, np.float32)
        results[name] = run(library, "sum_block", given, given.shape, grid=50, block=64, shared_bytes=8, order=name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((results[name] == 64 * name).all() for name in range(1, 5))
