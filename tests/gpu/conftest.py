"""Every test of this folder needs a CUDA device: marked gpu, and skipped with the reason where there is none."""

from pathlib import Path

import pytest
import torch

from tests.gpu.device import ARITHMETICS, BACKENDS, why_not

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def pytest_runtest_setup(item):
    """Skip a test of a backend in a dtype or an arithmetic, by its parameters, that the backend does not have."""
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
    """The name of each backend for CUDA tensors; where it cannot run a test's dtype, the test is skipped above."""
    return request.param


@pytest.fixture(scope="session")
def half(backend):
    """The dtype of 16 bits that a backend is tested in where it is all the same which: bfloat16 if it has it."""
    return torch.float16 if why_not(backend, torch.bfloat16) else torch.bfloat16


@pytest.fixture(scope="session")
def kernels():
    """The backend of the CUDA kernels, for what is said of them alone."""
    reason = why_not("cupy")
    if reason is not None:
        pytest.skip(reason)
    return "cupy"
