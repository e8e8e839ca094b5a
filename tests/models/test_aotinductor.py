"""AOTInductor packages of functions, modules and networks.

Each compiles C++ for tens of seconds, so all tests are slow ones.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import exc

import ccgpu
from ccgpu.models.attention import RCCA
from tests.ccgpu.exports.cases import ALL, TRACED, Call, check, draw, dynamic_shapes, other_sizes, run_without_ccgpu
from tests.models.test_exports import DYNAMIC, assert_same, ccnet, random_images, rcca

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PAGE = Path(__file__).resolve().parents[2] / "docs/export.md"
SIZES = ((1, 40, 40), (3, 64, 57), (1, 97, 129))


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    from torch._inductor import config, cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        pytest.skip(str(error))
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # the calls of the kernels, which take no time
        yield


def program(net: nn.Module, *, op: bool, dynamic: bool = True) -> torch.export.ExportedProgram:
    """Export a network for images, with the op in it or with standard operators in its place."""
    axes = ({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},)
    with torch.no_grad(), contextlib.nullcontext() if op else ccgpu.decomposed():
        return torch.export.export(net, (random_images(2, 33, 49),), dynamic_shapes=axes if dynamic else None)


def package(exported: torch.export.ExportedProgram, folder: Path, **settings: Any) -> Any:
    """Compile a program to net.pt2 in a folder, and return what runs it."""
    path = str(folder / "net.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=settings or None)
    return torch._inductor.aoti_load_package(path)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("op", [True, False])
def test_package_of_functions_holds_at_any_size(op: bool, axes: int, tmp_path: Path) -> None:
    traced = draw(ALL, 2, TRACED[axes])
    with contextlib.nullcontext() if op else ccgpu.decomposed():
        exported = torch.export.export(Call(ALL), traced, dynamic_shapes=dynamic_shapes(ALL, traced))
    run = package(exported, tmp_path)
    for batch, sizes in other_sizes(TRACED[axes]):
        inputs = draw(ALL, batch, sizes)
        check(run(*inputs), ALL, inputs)


def test_package_of_a_network_with_the_op_holds_at_any_size(tmp_path: Path) -> None:
    net = ccnet()
    run = package(program(net, op=True), tmp_path)
    for size in SIZES:
        images = random_images(*size)
        with torch.no_grad():
            assert_same(run(images), net(images))


def test_package_of_standard_operators_runs_without_this_package(tmp_path: Path) -> None:
    net = ccnet()
    package(program(net, op=False), tmp_path, layout_optimization=False)
    with torch.no_grad():
        torch.save([(x, net(x)) for x in (random_images(*size) for size in SIZES)], tmp_path / "data")
    run_without_ccgpu(
        """
import torch
run = torch._inductor.aoti_load_package("net.pt2")
for images, expected in torch.load("data"):
    torch.testing.assert_close(run(images), expected, rtol=1e-4, atol=1e-4)
""",
        tmp_path,
    )


@pytest.mark.parametrize("build", [rcca, ccnet])
def test_package_of_one_size_needs_no_setting(build: Any, tmp_path: Path) -> None:
    net, images = build(), random_images(2, 33, 49)
    run = package(program(net, op=False, dynamic=False), tmp_path)
    with torch.no_grad():
        assert_same(run(images), net(images))


@pytest.mark.parametrize("index", [0, 1])
def test_examples_of_the_page_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are marked as text, since the tests of the pages run every block of code, and are not slow."""
    monkeypatch.chdir(tmp_path)
    section = PAGE.read_text().partition("## AOTInductor")[2].partition("\n## ")[0]
    blocks = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), RCCA(8, 1, gamma=1.0), nn.Conv2d(8, 4, 1)).eval()
    others = random_images(1, 100, 60)
    with torch.no_grad():
        expected = net(others)
    exported = {"with_op": program(net, op=True), "program": program(net, op=False)}
    exec(blocks[index], {"torch": torch, "others": others, "expected": expected, **exported})


class RowAttention(nn.Module):
    """Attention of plain torch, in which every position attends to its row, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).permute(0, 2, 3, 1)
        x = torch.softmax(x @ x.transpose(-1, -2), -1) @ x
        return self.last(x.permute(0, 3, 1, 2))


@pytest.mark.xfail(strict=True, raises=exc.InductorError, reason="torch 2.13 cannot compare the strides")
def test_torch_needs_no_setting_for_attention_between_convolutions(tmp_path: Path) -> None:
    """Once this passes, the setting `layout_optimization` of docs/export.md is needed no more."""
    package(program(RowAttention().eval(), op=True), tmp_path)
