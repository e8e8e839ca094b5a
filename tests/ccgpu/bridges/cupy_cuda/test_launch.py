"""The launcher on a fake GPU: what is compiled when, and what reaches the device."""

import logging
import math
import random
import re
import struct
import threading

import pytest
import torch

from ccgpu.bridges.cupy_cuda import attention
from ccgpu.bridges.cupy_cuda import launch as module
from ccgpu.kernels import compilation
from ccgpu.kernels.cuda import configurations, plans
from ccgpu.kernels.cuda.plans import Pointers
from ccgpu.layouts import NAMES

LIMITS = configurations.Limits((9, 0), 227 * 1024, 132, 50 * 2**20)


class Memory:
    """A fake CUDA tensor with what the launcher reads of one: device, shape and address."""

    def __init__(self, address, index=0, shape=()):
        self.device, self.shape, self._address = torch.device("cuda", index), shape, address

    def data_ptr(self):
        return self._address

    def element_size(self):
        return 4


def plan(kernel="forward", sizes=(97, 97), dtype=torch.bfloat16, images=4, depth=64, channels=512):
    return attention.plan(kernel, dtype, images, sizes, depth, channels, LIMITS)


def launch(launcher, launches, index=0, scale=1.0, tensors=None, counters=0x7000):
    tensors = {"q": Memory(0x1000)} if tensors is None else tensors
    launcher.launch(launches, tensors, Memory(counters, index, (len(launches), launches[0].counters)), scale)


def test_what_reaches_the_device(gpu, launcher):
    launches = plan()
    tensors = {"q": Memory(0x10), "k": Memory(0x20), "v": Memory(0x30), "out": Memory(0x40), "lse": Memory(0x50)}
    launch(launcher, launches, scale=0.25, tensors=tensors, counters=0x60)
    (run,) = gpu.runs
    configuration = launches[0].configuration
    assert (run.name, run.device, run.stream) == (configuration.entry, 0, 0)
    assert run.grid == (launches[0].blocks,)
    assert run.block == (configuration.threads,)
    assert run.shared_bytes == configuration.shared_bytes
    # The struct `Arguments` of cuda/schedule.cuh: thirteen addresses and the counters', the scale, the same times
    # log2 e and the share of a line, both again in 32 bits. lse is its own scratch, as the channels are not cut.
    head = struct.unpack_from("<14Q3d2f", run.arguments)
    assert head[:15] == (0x10, 0x20, 0x30, 0x40, 0x50, 0x50, *[0] * 7, 0x60, 0.25)
    assert head[15:] == pytest.approx((0.25 / math.log(2), -1.0, 0.25 / math.log(2), -1.0))
    images, positions, depth, channels = struct.unpack_from("<4i", run.arguments, 18 * 8)
    assert (images, positions, depth, channels) == (4, 97 * 97, 64, 512)


def test_struct_has_the_members_of_the_kernels(gpu, launcher):
    """The launch passes the members of `Arguments`, parsed from the source, in their order and size."""
    source = configurations.source(plan()[0].configuration)
    body = re.search(r"struct Arguments \{(.*?)\n\};", source, re.DOTALL).group(1)
    body = re.sub(r"//.*", "", body)
    names, size = [], 0
    for kind, members in re.findall(r"(const void|void|int|double|float|Axis) ([^;]+);", body):
        for member in members.split(","):
            count = int((re.search(r"\[(\d)\]", member) or [0, 1])[1])
            names.append(re.sub(r"[\s*\[\d\]]", "", member))
            size += 8 if "*" in member else count * {"int": 4, "float": 4, "double": 8, "Axis": 20}[kind]
    assert tuple(names[:13]) == Pointers._fields
    assert names[13:19] == ["counters", "scale", "scale_log", "share", "scale_log_", "share_"]
    launch(launcher, plan())
    assert len(gpu.runs[0].arguments) == -(-size // 8) * 8  # padded, as C++ pads a struct to its alignment


def test_launches_of_a_call_have_counters_of_their_own(gpu, launcher):
    launches = plan(sizes=(16, 200), images=3)
    assert len(launches) == 2
    launch(launcher, launches, counters=0x100)
    assert [struct.unpack_from("<Q", run.arguments, 13 * 8)[0] for run in gpu.runs] == [0x100, 0x100 + 4 * 128]
    assert [run.name for run in gpu.runs] == [x.configuration.entry for x in launches]


@pytest.mark.parametrize("kernel", configurations.KERNELS)
@pytest.mark.parametrize("dtype", list(NAMES))
def test_no_compilation_for_a_new_size(gpu, launcher, kernel, dtype):
    """Over 50 random sizes, one, two and three axes: at most a kernel for each class of line lengths."""
    rng = random.Random(0)
    calls = []
    for _ in range(50):
        axes = rng.randint(1, 3)
        sizes = tuple(rng.randint(1, 300 if axes < 3 else 100) for _ in range(axes))
        calls.append({"sizes": sizes, "images": rng.randint(1, 9), "channels": rng.randint(1, 600)})
    for call in calls:
        launch(launcher, plan(kernel, dtype=dtype, **call))
    names = [name for name, *_ in gpu.compiled]
    assert len(set(names)) == len(names) <= len(configurations.TILE_CLASSES)
    for call in calls:
        launch(launcher, plan(kernel, dtype=dtype, **(call | {"images": 10, "channels": 17})))
    assert len(gpu.compiled) == len(names)
    assert len(gpu.runs) >= 100


def test_other_depth_dtype_and_kernel_are_other_kernels(gpu, launcher):
    for changed in ({}, {"depth": 128}, {"dtype": torch.float16}, {"kernel": "backward"}):
        launch(launcher, plan(**changed))
    assert len({name for name, *_ in gpu.compiled}) == len(gpu.compiled) == 4


def test_source_is_complete_in_itself(gpu, launcher):
    """CuPy's cache depends on the source and the options, but not on included files."""
    for kernel in configurations.KERNELS:
        source = configurations.source(plan(kernel)[0].configuration)
        assert "#include" not in source
    launch(launcher, plan())
    assert gpu.compiled[0][2] == configurations.OPTIONS


def test_grid_is_one_dimensional_beyond_65535_blocks(gpu, launcher):
    launches = plan(sizes=(300, 300), images=200)
    launch(launcher, launches)
    assert launches[0].blocks > 65535
    assert gpu.runs[0].grid == (launches[0].blocks,)


def test_shared_memory_above_48_kb_is_asked_for(gpu, launcher):
    """The fake kernel refuses a launch with more than its attribute allows, as the driver does."""
    small, large = plan(sizes=(8,)), plan("backward")
    assert small[0].configuration.shared_bytes <= 48 * 1024 < large[0].configuration.shared_bytes
    launch(launcher, small)
    launch(launcher, large)
    kernels = list(launcher._kernels.values())
    assert kernels[0].function.max_dynamic_shared_size_bytes == 48 * 1024
    assert kernels[1].function.max_dynamic_shared_size_bytes == large[0].configuration.shared_bytes


def test_shared_memory_gets_all_that_l1_can_spare(gpu, launcher):
    """Otherwise the driver may split the two so that fewer blocks fit a multiprocessor than launch bounds count on."""
    launch(launcher, plan())
    (kernel,) = launcher._kernels.values()
    assert kernel.function.preferred_shared_memory_carveout == 100


def test_schedule_of_a_measurement_reaches_the_plan():
    class Recorder:
        launched = ()

        def limits(self, device):
            return LIMITS

        def launch(self, launches, tensors, counters, scale):
            self.launched = launches

    recorder, x = Recorder(), torch.zeros(3, 16, 5, 6).contiguous(memory_format=torch.channels_last)
    for lag in (0, 2):
        attention.Kernels(recorder, lag=lag).forward(x, x, x, 1.0)
        expected = plans.plan("forward", "f32", 3, (5, 6), 16, 16, LIMITS, lag=lag)
        assert recorder.launched == expected
    assert expected != plans.plan("forward", "f32", 3, (5, 6), 16, 16, LIMITS, lag=0)


def test_macros_of_the_kernels_reach_the_compiler(gpu, monkeypatch):
    monkeypatch.setattr(module, "_macros", lambda: frozenset({"CCGPU_A", "CCGPU_B"}))
    monkeypatch.setenv("CCGPU_CUDA_DEFINES", "CCGPU_A=1  CCGPU_B=-2")
    launch(module.CuPyLauncher(), plan())
    launch(module.CuPyLauncher(("CCGPU_B=3",)), plan())
    launch(module.CuPyLauncher(()), plan())
    given = [options[len(configurations.OPTIONS) :] for *_, options in gpu.compiled]
    assert given == [("-DCCGPU_A=1", "-DCCGPU_B=-2"), ("-DCCGPU_B=3",), ()]


@pytest.mark.parametrize("word", ["CCGPU_NO_SUCH=1", "CCGPU_A", "CCGPU_A=", "A=1;B"])
def test_a_macro_that_changes_nothing_is_refused(gpu, monkeypatch, word):
    monkeypatch.setattr(module, "_macros", lambda: frozenset({"CCGPU_A"}))
    with pytest.raises(ValueError, match=r"CCGPU_CUDA_DEFINES: a definition must be .*take one of CCGPU_A"):
        launch(module.CuPyLauncher((word,)), plan())
    assert not gpu.compiled


def test_every_launch_goes_to_the_current_stream(gpu, launcher):
    launches = plan()
    for pointer in (0, 0xABC0, 0xDEF0):
        gpu.streams[0] = pointer
        launch(launcher, launches)
    assert [run.stream for run in gpu.runs] == [0, 0xABC0, 0xDEF0]
    assert len(gpu.compiled) == 1


def test_second_device_has_its_own_kernels_and_stream(gpu, launcher):
    gpu.streams = {0: 0x10, 1: 0x20}
    for index in (1, 0, 1):
        launch(launcher, plan(), index)
    assert [(run.device, run.stream) for run in gpu.runs] == [(1, 0x20), (0, 0x10), (1, 0x20)]
    assert [device for _, device, _ in gpu.compiled] == [1, 0]
    assert gpu.current == 0


def test_concurrent_threads_compile_once(gpu, launcher):
    """Replicas on two devices, several threads each, all at their first call at once."""
    gpu.compile_seconds = 0.05
    threads, count = [], 8
    start = threading.Barrier(count)
    errors = []

    def work(index):
        try:
            start.wait()
            for _ in range(5):
                launch(launcher, plan(), index)
        except BaseException as error:
            errors.append(error)

    for number in range(count):
        threads.append(threading.Thread(target=work, args=(number % 2,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(device for _, device, _ in gpu.compiled) == [0, 1]
    assert len(gpu.runs) == 5 * count


def test_a_compilation_that_takes_long_is_logged_once(gpu, launcher, caplog, monkeypatch):
    monkeypatch.setattr(compilation, "PATIENCE", 0.02)
    with caplog.at_level(logging.INFO, "ccgpu"):
        launch(launcher, plan(), 1)  # at once, as from CuPy's cache
        assert not caplog.records
        gpu.compile_seconds = 0.5
        for _ in range(3):
            launch(launcher, plan())
    assert {(record.name, record.levelno) for record in caplog.records} == {("ccgpu", logging.INFO)}
    entry = plan()[0].configuration.entry
    what = f"CUDA kernel {entry} for sm_90, once for this machine; it is kept in CuPy's cache"
    assert caplog.records[0].getMessage() == f"ccgpu: compiling {what}"
    assert [record.getMessage()[:18] for record in caplog.records[1:]] == ["ccgpu: compiled in"]


def test_compile_errors_are_named(gpu, launcher):
    import cupy

    lines = [f"kernel.cu({n}): error: no such thing" for n in range(30)]
    gpu.compile_error = cupy.cuda.compiler.CompileException("\n".join(lines))
    entry = plan()[0].configuration.entry
    with pytest.raises(
        RuntimeError, match=rf"cca: kernel {entry} must compile for sm_90, got CompileEx.*; report"
    ) as caught:
        launch(launcher, plan())
    assert "(0): error" in str(caught.value)
    assert "(20): error" not in str(caught.value)
    assert caught.value.__cause__ is gpu.compile_error
    assert not gpu.runs
    gpu.compile_error = PermissionError("/home/nobody/.cupy")
    with pytest.raises(RuntimeError, match=r"got PermissionError; see that .* \(CUPY_CACHE_DIR\).*\n/home/nobody/"):
        launch(launcher, plan())
    gpu.compile_error = None  # a later call tries again
    launch(launcher, plan())
    assert len(gpu.runs) == 1


def test_a_graph_records_launches_and_not_compilations(gpu, launcher):
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=r"must be compiled before a CUDA graph is recorded, .*; call once before"):
        launch(launcher, plan())
    gpu.capturing = False
    launch(launcher, plan())
    gpu.capturing = True
    launch(launcher, plan())
    assert len(gpu.runs) == 2
    assert not gpu.syncs


def test_argument_struct_is_as_long_as_the_plan_says():
    assert len(plan()[0].arguments(Pointers(), 0, 1.0)) == plans.ARGUMENT_BYTES
