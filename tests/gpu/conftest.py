"""Every test of this folder needs a CUDA device: it is marked gpu, and skipped with the reason if there is none."""

from pathlib import Path

import pytest
import torch

from tests.gpu.device import ARITHMETICS, BACKENDS, why_not

HERE = Path(__file__).resolve().parent
# What the others rest on comes first, what takes longest last.
ORDER = ("primitives", "values", "order", "torch", "cost", "sanitizer")


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
    yield  # pytest groups the tests by their backend here
    if all(item.path.parent == HERE for item in items):
        items.sort(key=place)


def place(item):
    """Return the place of a test's file in ORDER."""
    return ORDER.index(item.path.stem.removeprefix("test_"))


def pytest_runtest_setup(item):
    """Skip a test whose parameters name a dtype or an arithmetic that the backend does not have."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "backend" not in parameters or not torch.cuda.is_available():
        return
    backend, name = parameters["backend"], parameters.get("name")
    if backend == "numba_cuda" and name == "tf32":
        pytest.skip("numba_cuda: it computes float32 in float32, whether or not torch allows TF32")
    reason = why_not(
        backend, ARITHMETICS[name].dtype if name in ARITHMETICS else parameters.get("dtype", torch.float32)
    )
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """The name of each backend for CUDA tensors; a test whose dtype it cannot run is skipped above."""
    return request.param


@pytest.fixture(scope="session")
def half(backend):
    """The 16-bit dtype in which a backend is tested if either will do: bfloat16 if it has it, otherwise float16."""
    return torch.float16 if why_not(backend, torch.bfloat16) else torch.bfloat16


@pytest.fixture(scope="session")
def kernels():
    """The name of the backend with the CUDA kernels, for tests of these kernels alone."""
    reason = why_not("cupy")
    if reason is not None:
        pytest.skip(reason)
    return "cupy"
