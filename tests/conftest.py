import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def cuda_on_cpu() -> ModuleType:
    """The module tests/cuda_on_cpu/device.py: compiles CUDA sources for this CPU and launches them."""
    name = "cuda_on_cpu_device"
    if name not in sys.modules:
        path = Path(__file__).resolve().parent / "cuda_on_cpu" / "device.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    module = sys.modules[name]
    try:
        module.compiler()
    except module.NoCompiler as reason:
        pytest.skip(str(reason))
    return module
