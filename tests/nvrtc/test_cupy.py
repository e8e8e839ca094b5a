"""The launcher and the prepared kernels on the real CuPy, on a machine without a GPU.

CuPy imports there, compiles for an architecture that is given, fills its cache, packs the arguments of a launch, and
fails at the first call that needs a device.
"""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ccgpu
from benchmarks import nvrtc
from benchmarks.first_gpu_run import kernels
from benchmarks.first_gpu_run.kernels import Job, machine_code, seeded
from benchmarks.registers import CUPY_OPTIONS, GPUS
from ccgpu.bridges.cupy_cuda import device, launch
from ccgpu.kernels.cuda import configurations, plans

if importlib.util.find_spec("cupy") is None:
    pytest.skip("needs CuPy: pip install -e '.[test-cuda]'", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("what CuPy does without a device; tests/gpu tries it with one", allow_module_level=True)
try:
    nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(600)]
GPU = "sm_90"
CALLS = [
    (kernel, arithmetic) for kernel in ("forward", "backward", "aggregate") for arithmetic in ("bf16", "tf32", "f64")
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """CuPy's cache on disk, in a folder of these tests."""
    folder = tmp_path_factory.mktemp("kernel_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUPY_CACHE_DIR", str(folder))
        importlib.import_module("cupy")
        compiler = importlib.import_module("cupy.cuda.compiler")
        patch.setattr(compiler, "_kernel_cache_backend", compiler._DiskKernelCacheBackend())
        # It asks the current device for its architecture, even where one is given.
        patch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{arch}", "cubin"))
        yield folder


def configuration(kernel, arithmetic):
    return plans.plan(kernel, arithmetic, 1, (20, 30), 64, 64, GPUS[GPU])[0].configuration


def compile_module(configuration, defines=()):
    """Compile what the launcher hands to CuPy, for the architecture GPU; it fails when the module is loaded."""
    import cupy

    given = {"code": configurations.source(configuration), "options": launch.compiler_options(defines)}
    module = cupy.RawModule(**given, backend="nvrtc")
    core = importlib.import_module("cupy._core.core")
    with pytest.raises(RuntimeError, match=r"cudaError|CUDA_ERROR"):
        core.compile_with_cache(
            module.code, module.options, arch=GPU[3:], prepend_cupy_headers=False, backend=module.backend
        )


def entries(cache):
    """Return the machine code in CuPy's cache by its file; each file begins with the code's checksum."""
    found = {path: path.read_bytes() for path in cache.glob("*.cubin")}
    for data in found.values():
        assert data[:40].decode() == hashlib.sha1(data[40:]).hexdigest()
    return {path: data[40:] for path, data in found.items()}


@pytest.mark.parametrize(("kernel", "arithmetic"), CALLS)
def test_cupy_compiles_the_kernels_as_the_table_of_registers_does(cache, kernel, arithmetic):
    before, chosen = set(entries(cache)), configuration(kernel, arithmetic)
    compile_module(chosen)
    (path,) = set(entries(cache)) - before
    ours = nvrtc.compile_source(
        configurations.source(chosen), GPU, (*configurations.OPTIONS, *CUPY_OPTIONS), chosen.entry
    )
    assert instructions(entries(cache)[path]) == instructions(ours.code)
    assert chosen.entry.encode() in ours.code


def instructions(cubin):
    """Return the machine instructions and constants of an ELF file: its sections .text and .nv.constant, by name."""
    word = lambda at, size: int.from_bytes(cubin[at : at + size], "little")  # noqa: E731
    table, size, count, names = word(0x28, 8), word(0x3A, 2), word(0x3C, 2), word(0x3E, 2)
    assert cubin[:5] == b"\x7fELF\x02"
    header = lambda number: table + size * number  # noqa: E731
    strings = word(header(names) + 0x18, 8)
    found = {}
    for number in range(count):
        at = header(number)
        name = cubin[strings + word(at, 4) :].split(b"\0", 1)[0].decode()
        if name.startswith((".text", ".nv.constant")):
            found[name] = cubin[word(at + 0x18, 8) :][: word(at + 0x20, 8)]
    assert any(name.startswith(".text") for name in found)
    return found


def test_another_macro_is_another_kernel(cache):
    before, chosen = set(entries(cache)), configuration("forward", "f16")
    compile_module(chosen)
    compile_module(chosen)
    assert len(set(entries(cache)) - before) == 1
    compile_module(chosen, kernels.BOUNDED)
    assert len(set(entries(cache)) - before) == 2


def test_prepared_machine_code_gets_cupys_name(cache, monkeypatch):
    """The name depends on where CuPy and CUDA are installed, so only the machine that runs the kernel knows it."""
    from cupy.cuda import compiler

    monkeypatch.setattr(compiler, "_compile_using_nvrtc_no_warning", None)  # nothing may compile
    chosen, before = configuration("affinity", "bf16"), set(entries(cache))
    code = machine_code(Job(GPU, (), chosen))
    assert seeded(code, lambda: compile_module(chosen)) == "prepared"
    (path,) = set(entries(cache)) - before
    assert entries(cache)[path] == code
    assert seeded(None, lambda: compile_module(chosen)) == "cached"
    compile_module(chosen)  # as any process does


def test_what_is_not_prepared_is_compiled(cache):
    chosen = configuration("affinity", "f32")
    assert seeded(None, lambda: compile_module(chosen)) == "compiled"
    assert seeded(None, lambda: compile_module(chosen)) == "cached"


def test_prepared_file_has_the_kernels_of_the_source(tmp_path, monkeypatch):
    todo = [Job(GPU, defines, configuration("affinity", "bf16")) for defines in (kernels.SHIPPED, kernels.BOUNDED)]
    path, errors = kernels.prepare(tmp_path, GPU, todo, workers=1)
    assert path == kernels.archive(tmp_path, GPU)
    assert not errors
    found = dict(kernels.prepared(todo, path))
    assert [found[job] for job in todo] == [machine_code(job) for job in todo]
    assert len({job.name for job in todo}) == 2
    monkeypatch.setattr(kernels, "source", lambda configuration: "another source")
    assert set(dict(kernels.prepared(todo, path)).values()) == {None}
    assert set(dict(kernels.prepared(todo, tmp_path / "none")).values()) == {None}


def test_a_kernel_that_does_not_compile_is_left_out(tmp_path):
    good = Job(GPU, (), configuration("affinity", "bf16"))
    bad = good._replace(configuration=good.configuration._replace(kernel="no_such_kernel"))
    path, (error,) = kernels.prepare(tmp_path, GPU, [bad, good], workers=1)
    assert "must compile for sm_90, got" in error
    assert [code is None for _, code in kernels.prepared([bad, good], path)] == [True, False]


def test_arguments_of_a_launch_are_packed(cache):
    """CuPy packs the arguments, then wants a device. What it cannot pass it refuses before."""
    from cupy.cuda.function import Function

    kernel = Function.__new__(Function)
    struct = np.ndarray((), launch.STRUCT, bytes(plans.ARGUMENT_BYTES))
    assert struct.nbytes == plans.ARGUMENT_BYTES
    for arguments, error, match in (
        ((struct,), RuntimeError, "cudaError"),
        ((np.zeros(2, launch.STRUCT),), TypeError, "size one can be passed by value"),
        ((bytes(struct),), TypeError, "Unsupported type"),
    ):
        with pytest.raises(error, match=match):
            kernel((1,), (32,), arguments, shared_mem=64, stream=launch._Stream(0))
    with pytest.raises(AttributeError, match="ptr"):
        kernel((1,), (32,), (struct,), shared_mem=64, stream=object())


def test_attributes_of_the_launcher_are_cupys(cache):
    """The stand-in for CuPy in `make test` would take any name."""
    import cupy

    for name in ("max_dynamic_shared_size_bytes", "preferred_shared_memory_carveout"):
        attribute = getattr(cupy.RawKernel, name)
        assert hasattr(type(attribute), "__set__")
        kernel = cupy.RawKernel("", "f")
        with pytest.raises(RuntimeError, match="cudaError"):  # it reaches the driver
            setattr(kernel, name, 1)
        with pytest.raises(AttributeError):
            setattr(kernel, name + "_", 1)
    # `Device.attributes` has the runtime's attributes, without their prefix.
    for name in ("MaxSharedMemoryPerBlockOptin", "MultiProcessorCount", "L2CacheSize"):
        assert hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")


def test_a_launcher_without_a_device_says_so(cache):
    chosen = configuration("forward", "bf16")
    with pytest.raises(RuntimeError, match=rf"cca: kernel {chosen.entry} must compile for sm_90, got CUDARuntimeError"):
        launch._compile(chosen, GPU, configurations.OPTIONS)


def test_a_source_with_an_error_gives_cupys_exception(cache):
    """The launcher tells it from errors of the driver by its class."""
    import cupy

    assert not issubclass(cupy.cuda.compiler.CompileException, RuntimeError)
    core = importlib.import_module("cupy._core.core")
    with pytest.raises(cupy.cuda.compiler.CompileException, match="error"):
        core.compile_with_cache("int f(", (), arch="90", prepend_cupy_headers=False, backend="nvrtc")


def test_reasons_without_a_device(cache, monkeypatch):
    assert next(b for b in ccgpu.backends("cuda") if b.name == "cupy").reason == "torch sees no CUDA device"
    assert device._find_reason(0).startswith("CuPy sees no CUDA device (cudaErrorInsufficientDriver: ")
    cupy = importlib.import_module("cupy")
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    assert device._find_reason(0) is None  # it has found its compiler
    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", raise_not_found)
    reason = device._find_reason(0)
    assert f"CuPy finds no NVRTC, the compiler of CUDA {cupy.cuda.runtime.runtimeGetVersion() // 1000} (" in reason


def raise_not_found():
    """Raise what CuPy raises where it finds no NVRTC."""
    from cuda.pathfinder import DynamicLibNotFoundError

    raise DynamicLibNotFoundError('Failure finding "libnvrtc.so.13"')


def test_importing_ccgpu_imports_no_cupy():
    code = "import sys, ccgpu, ccgpu.warmup; assert not {'cupy', 'cupy_backends'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
