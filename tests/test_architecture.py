"""The arrows of ARCHITECTURE.md: train -> models -> ccgpu -> kernels, and kernels never sees torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "ccgpu", "models", "train"]  # each may import itself and those before it


def layer_of(module):
    """Return the layer that an imported module belongs to, or None for others' packages."""
    parts = module.split(".")
    if parts[0] == "ccgpu":
        return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "ccgpu"
    return None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(own) + 1]
    for module in imports(path):
        layer = layer_of(module)
        assert layer is None or layer in allowed, f"{path} imports {module}"
        assert module.split(".")[0] not in {"kernels", "models", "train"}, f"{path}: write ccgpu.{module}"
        if own == "kernels":
            assert module.split(".")[0] != "torch", f"{path} imports torch"


def test_architecture_names_every_file():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    missing = [str(p.relative_to(ROOT)) for p in files() if p.name not in text and p.name != "__init__.py"]
    assert not missing, f"ARCHITECTURE.md does not say what these are for: {missing}"


def test_files_stay_small():
    """House rule: below about 400 lines a file."""
    long = {str(p.relative_to(ROOT)): n for p in files() if (n := len(p.read_text().splitlines())) > 420}
    assert not long
