"""Every test of this folder needs a CUDA device: marked gpu, and skipped with the reason where there is none."""

from pathlib import Path

import pytest
import torch

import ccgpu
from tests.gpu.device import BACKENDS

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """The name of each backend that runs CUDA tensors; one that cannot run here is skipped with its reason."""
    status = next(b for b in ccgpu.backends("cuda") if b.name == request.param)
    if not status.available:
        pytest.skip(f"{status.name}: {status.reason}")
    return status.name


@pytest.fixture(scope="session")
def kernels():
    """The backend of the CUDA kernels, for what is said of them alone."""
    status = next((b for b in ccgpu.backends("cuda") if b.name == "cupy"), None)
    assert status is not None, "ccgpu has no backend cupy"
    if not status.available:
        pytest.skip(f"cupy: {status.reason}")
    return status.name
