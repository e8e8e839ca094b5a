"""AOTInductor packages of RCCA: values at the traced size and, with dynamic sizes, at others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import ccgpu
from ccgpu.models.attention import RCCA


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
@pytest.mark.parametrize("dynamic", [False, True])
def test_package_gives_the_modules_values(dynamic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = RCCA(16, gamma=1.0).eval()
    shapes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),) if dynamic else None
    with ccgpu.decomposed(), torch.no_grad():
        program = torch.export.export(net, (torch.randn(2, 16, 12, 17),), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    run = torch._inductor.aoti_load_package(package)
    others = [(2, 13, 17), (1, 40, 33), (3, 5, 9), (1, 64, 64), (1, 1, 9), (1, 9, 1)] if dynamic else []
    for batch, height, width in [(2, 12, 17), *others]:
        x = torch.randn(batch, 16, height, width)
        with torch.no_grad():
            torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-4)
