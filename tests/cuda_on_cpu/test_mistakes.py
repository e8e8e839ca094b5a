"""Every mistake that a GPU lets pass, or shows only sometimes, is caught by the machine: one wrong kernel for each."""

import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("mistakes.cu").read_text()
ENTRIES = re.findall(r"^KERNEL\((\w+)\)", SOURCE, re.MULTILINE)
ORDERS = ["forward", "reverse", 3]

RIGHT = ["barrier_kept", "warp_barrier_kept", "copy_kept", "handed_over"]
SHARED = "of shared memory, which thread .* no barrier orders the two"
COPYING = "of shared memory, which thread .* began to copy at .* no copy_wait has finished it"
HANDED = r"reads byte .* of out, which block \(0, 0, 0\) wrote at .* no announcement waited for orders the two"
RACES = {
    "barrier_removed": SHARED,
    "second_barrier_removed": SHARED,
    "read_by_many_then_written": SHARED,
    "written_after_one_read": r"writes byte 0 of shared memory, which thread \(1, 0, 0\) read at",
    "written_after_reads_of_the_warp": r"writes byte 0 of shared memory, which thread .* read \(and others\) at",
    "written_after_reads_of_two_warps": "(reads|writes) byte 0 of shared memory, which thread",
    "warp_barrier_across_warps": SHARED,
    "warp_barrier_of_a_part": SHARED,
    "shuffle_as_barrier": SHARED,
    "matrix_load_before_barrier": SHARED,
    "one_word_two_writers": "writes byte .* of shared memory, which thread .* wrote at .* no barrier orders the two",
    "copy_not_waited_for": COPYING,
    "copy_wait_of_a_newer_group": COPYING,
    "copy_not_committed": COPYING,
    "copy_read_without_barrier": "of shared memory, which thread .* (no barrier|no copy_wait)",
    "copy_into_what_others_read": "of shared memory, which thread .* (no barrier|no copy_wait)",
    "not_waited_for": HANDED,
    "no_barrier_before_announce": HANDED,
    "no_barrier_after_wait": HANDED,
    "not_announced": HANDED,
    "waited_for_too_few": HANDED,
    "two_blocks_one_element": r"writes byte .* of out, which block \(0, 0, 0\) wrote at .* no announcement",
    "two_threads_one_element": "writes byte .* of out, which thread .* wrote at .* no barrier orders the two",
    "element_read_before_barrier": "of out, which thread .* no barrier orders the two",
}
OTHERS = {
    "divergent_barrier": "__syncthreads, while other threads of the block wait in another one",
    "barrier_not_reached": "__syncthreads is (never|not) reached by",
    "barrier_after_others_left": "__syncthreads is (never|not) reached by",
    "lane_missing_in_shuffle": "lane.* 7 waits in __syncthreads|__shfl_xor_sync is never reached by lanes 0x00000080",
    "lanes_in_different_shuffles": "__shfl_xor_sync with mask 0xffffffff, while lanes",
    "lane_not_in_its_mask": "lane (16|31|..) is not in its mask 0x0000ffff",
    "shuffle_from_outside_the_mask": "shuffle reads lane 20",
    "shuffle_from_a_lane_that_left": "shuffle reads lane 3",
    "multiply_with_half_a_warp": "matrix_multiply needs all 32 lanes",
    "lane_leaves_while_others_multiply": "matrix_multiply needs all 32 lanes",
    "load_beyond_shared": "out of bounds: load_shared of 4 bytes at offset 2048 of 2048",
    "store_before_shared": "out of bounds: store_shared of 4 bytes at offset -4 of 2048",
    "half_beyond_shared": "out of bounds: load_shared of 16 bytes at offset 2040",
    "copy_beyond_shared": "out of bounds: copy_async of 16 bytes at offset 2048",
    "matrix_load_beyond_shared": "out of bounds: load_matrices_transposed of 16 bytes at offset 2048",
    "plain_store_beyond_shared": "out of bounds: a plain write at offset 2064 of 2048",
    "plain_store_before_shared": "out of bounds: a plain write at offset -16 of 2048",
    "load_beyond_global": "out of bounds: load_global of 4 bytes at offset 1024 of buffer 'in' of 1024",
    "load_before_global": "out of bounds: load_global of 4 bytes at offset -4 of buffer 'in' of 1024",
    "load_of_null": "out of bounds: load_global of 4 bytes at address",
    "store_beyond_global": "out of bounds: store_global of 16 bytes at offset 1016 of buffer 'out'",
    "copy_beyond_global": "out of bounds: copy_async of 16 bytes at offset 1024 of buffer 'in'",
    "store_to_read_only": "store_global of 4 bytes to buffer 'in', which is read-only",
    "counter_in_read_only": "take of 4 bytes to buffer 'in', which is read-only",
    "misaligned_shared": "misaligned: load_shared of 8 bytes at offset 4",
    "misaligned_copy": "misaligned: copy_async of 16 bytes at offset 24",
    "misaligned_source": "misaligned: copy_async of 16 bytes at offset 8 of buffer 'in'",
    "misaligned_matrix": "misaligned: load_matrices of 16 bytes",
    "misaligned_global": "misaligned: store_global of 16 bytes at offset 8 of buffer 'out'",
    "wait_for_a_later_block": "wait_until waits for a block that has not run: the counter is 0 and must reach 1",
}


def aligned(values):
    """A copy of 1024 bytes that begins at a multiple of 16 and has 64 bytes of its own on both sides."""
    memory = np.zeros(1024 + 256, np.uint8)
    start = 64 + -(memory.ctypes.data + 64) % 16
    view = memory[start : start + 1024].view(np.float32)
    view[:] = values
    return view


def launch(library, entry, **options):
    given, out, counters = aligned(np.arange(256)), aligned(np.nan), np.zeros(2, np.int32)
    arguments = struct.pack("PPP", given.ctypes.data, out.ctypes.data, counters.ctypes.data)
    buffers = [("in", given, False), ("out", out, True), ("counters", counters, True)]
    library.launch(entry, 2, 64, arguments, 2048, buffers, **options)
    return out


@pytest.fixture(scope="module")
def library(cuda_on_cpu):
    return cuda_on_cpu.compile(SOURCE, ENTRIES)


def test_every_kernel_is_launched():
    assert sorted([*RIGHT, *RACES, *OTHERS]) == sorted(ENTRIES)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("entry", RIGHT)
def test_right_kernels_pass(library, entry, order):
    out = launch(library, entry, order=order).reshape(2, 128)
    assert np.isfinite(out).sum() == 128


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("entry", RACES)
def test_races_are_caught_in_every_order(cuda_on_cpu, library, entry, order):
    with pytest.raises(cuda_on_cpu.DeviceError, match=f"{entry}: race: .*{RACES[entry]}"):
        launch(library, entry, order=order)


def test_a_write_sees_the_reads_of_every_warp(cuda_on_cpu, library):
    """In this order the writer's own warp reads first, then the other warp, and the write comes last."""
    with pytest.raises(cuda_on_cpu.DeviceError, match=r"writes byte 0 of shared memory, .* read \(and others\) at"):
        launch(library, "written_after_reads_of_two_warps", order=1)


@pytest.mark.parametrize("check_races", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("entry", OTHERS)
def test_mistakes_are_caught_in_every_order(cuda_on_cpu, library, entry, order, check_races):
    with pytest.raises(cuda_on_cpu.DeviceError, match=OTHERS[entry]):
        launch(library, entry, order=order, check_races=check_races)


@pytest.mark.parametrize("entry", ["barrier_removed", "copy_not_waited_for", "copy_not_committed"])
def test_without_the_race_check_some_order_shows_nan(library, entry):
    assert any(np.isnan(launch(library, entry, order=order, check_races=False)[:128]).any() for order in ORDERS)


def test_a_failure_says_where_and_who(cuda_on_cpu, library):
    with pytest.raises(cuda_on_cpu.DeviceError) as error:
        launch(library, "plain_store_beyond_shared")
    assert "block (0, 0, 0)" in str(error.value)
    with pytest.raises(cuda_on_cpu.DeviceError) as error:
        launch(library, "load_beyond_shared", order="reverse", block_order="reverse")
    number = next(n for n, line in enumerate(SOURCE.splitlines(), 1) if "load_beyond_shared" in line)
    assert f", at kernels.cu:{number}, block (1, 0, 0), thread (63, 0, 0)" in str(error.value)
    assert f"\n  kernels.cu:{number}: KERNEL(load_beyond_shared)" in str(error.value)


def test_a_launch_after_a_failure_works(cuda_on_cpu, library):
    for entry in ("lane_missing_in_shuffle", "copy_not_waited_for"):
        with pytest.raises(cuda_on_cpu.DeviceError):
            launch(library, entry)
        assert not np.isnan(launch(library, "copy_kept")[:128]).any()


def test_requests_are_checked(cuda_on_cpu, library):
    with pytest.raises(cuda_on_cpu.DeviceError, match="takes 24 bytes of arguments, got 8"):
        library.launch("barrier_kept", 1, 64, bytes(8))
    for block in (0, 1025, (32, 32, 2)):
        with pytest.raises(cuda_on_cpu.DeviceError, match=r"a block has 1 \.\.\. 1024 threads"):
            library.launch("barrier_kept", 1, block, bytes(24))
    with pytest.raises(cuda_on_cpu.DeviceError, match="at most 232448 bytes of shared memory, got 232449"):
        library.launch("barrier_kept", 1, 64, bytes(24), 232449)
    with pytest.raises(ValueError, match="'x' must be contiguous"):
        library.launch("barrier_kept", 1, 64, bytes(24), buffers=[("x", np.zeros((4, 4))[:, ::2], True)])
    constant = np.zeros(4)
    constant.flags.writeable = False
    with pytest.raises(ValueError, match="'x' must be a writable array"):
        library.launch("barrier_kept", 1, 64, bytes(24), buffers=[("x", constant, True)])
    with pytest.raises(ValueError, match="'forward', 'reverse' or a seed, got 'backward'"):
        library.launch("barrier_kept", 1, 64, bytes(24), order="backward")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("__shared__ float x[32];", "STATIC_SHARED_MEMORY_IS_NOT_MODELLED"),
        ("float x = INFINITY;", "INFINITY"),
        ("load_shared<char>(shared_memory());", "an access has 4, 8 or 16 bytes"),
        ("no such thing", "kernels.cu:2"),
    ],
)
def test_compile_errors(cuda_on_cpu, body, error):
    source = f'#include "primitives.cuh"\nextern "C" __global__ void wrong(const __grid_constant__ int a) {{ {body} }}'
    with pytest.raises(cuda_on_cpu.DeviceError, match=error):
        cuda_on_cpu.compile(source, ["wrong"])


def test_without_a_compiler(cuda_on_cpu, monkeypatch):
    monkeypatch.setattr(cuda_on_cpu.shutil, "which", lambda name: None)
    cuda_on_cpu.compiler.cache_clear()
    with pytest.raises(cuda_on_cpu.NoCompiler, match=r"g\+\+ must be on the PATH"):
        cuda_on_cpu.compiler()
    monkeypatch.undo()
    assert Path(cuda_on_cpu.compiler()).name == "g++"


def test_builds_side_by_side_leave_one_library(cuda_on_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_on_cpu, "CACHE", tmp_path)
    source = 'extern "C" __global__ void nothing(const __grid_constant__ int a) {}'
    with ThreadPoolExecutor(2) as pool:
        libraries = list(pool.map(lambda _: cuda_on_cpu.compile(source, ["nothing"]), range(2)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
    monkeypatch.setattr(cuda_on_cpu, "_build", None)
    for library in [*libraries, cuda_on_cpu.compile(source, ["nothing"])]:
        assert library.launch("nothing", 2, 33, bytes(4)).bytes_written == 0


OVERFLOW = """
#include "primitives.cuh"
struct Arguments { float *x; int n; };
extern "C" __global__ void fill(const __grid_constant__ Arguments a) {
  const u32 words = shared_address(shared_memory());
  store_shared(words + 4 * threadIdx.x, 1.0f);
  __syncthreads();
  if (threadIdx.x < a.n)
    a.x[threadIdx.x] = load_shared<float>(words + 4 * (63 - threadIdx.x)); // past the machine's checks
}
"""
SANITIZED = """
import importlib.util, struct, sys
import numpy as np
spec = importlib.util.spec_from_file_location("device", sys.argv[1])
device = importlib.util.module_from_spec(spec)
spec.loader.exec_module(device)
library = device.compile(sys.argv[2], ["fill"], sanitize=True)
x = np.zeros(40, np.float32)
library.launch("fill", 3, 64, struct.pack("Pi4x", x.ctypes.data, int(sys.argv[3])), 256, [("x", x, True)])
print("filled", int(x.sum()))
"""


def test_sanitizer_catches_a_plain_overflow(cuda_on_cpu):
    runtime = cuda_on_cpu.sanitizer_runtime()
    if runtime is None:
        pytest.skip("g++ has no AddressSanitizer library")
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}

    def fill(number):
        command = [sys.executable, "-c", SANITIZED, cuda_on_cpu.__file__, OVERFLOW, str(number)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    right, wrong = fill(40), fill(41)
    assert right.stdout == "filled 40\n", right.stderr
    assert wrong.returncode != 0
    assert re.search(r"heap-buffer-overflow[\s\S]*in fill .*kernels\.cu:9", wrong.stderr), wrong.stderr


def test_sanitized_library_needs_its_runtime(cuda_on_cpu):
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("this process has AddressSanitizer preloaded")
    with pytest.raises(cuda_on_cpu.DeviceError, match="libasan in LD_PRELOAD"):
        cuda_on_cpu.compile(OVERFLOW, ["fill"], sanitize=True)
