"""ccgpu export: exported files give the network's logits at any size, without this package."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ccgpu.models.backbones import build_backbone
from ccgpu.train import camvid, export
from tests.train.networks import write_network

SIZES = [(1, 33, 49), (3, 64, 57), (1, 130, 97)]


def run(*arguments: Any) -> int:
    return export.main([str(argument) for argument in arguments])


def random_images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {"align_corners": False},
        *(pytest.param(more, marks=pytest.mark.slow) for more in ({}, {"context": "nonlocal"}, {"recurrence": 0})),
    ],
)
def test_onnx_model_gives_the_logits_at_any_size(options: dict[str, Any], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = write_network(tmp_path / "net.pt", **options)
    target = tmp_path / "net.onnx"
    assert run("--checkpoint", tmp_path / "net.pt", "--to", "onnx", "--out", target) == 0
    model = onnx.load(target)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert model.opset_import[0].version >= 18
    kinds = {node.op_type for node in model.graph.node}
    assert "EyeLike" not in kinds
    assert "Softmax" in kinds or "ReduceLogSumExp" in kinds or options.get("recurrence") == 0
    axes = [axis.dim_param or axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    axes = [axis.dim_param or axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 11, "height", "width"]
    told = json.loads({entry.key: entry.value for entry in model.metadata_props}["ccgpu"])
    assert told["classes"] == list(camvid.LABELS.names)
    assert told["mean"] == pytest.approx(net.backbone.mean)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    for size in SIZES:
        images = random_images(*size)
        with torch.no_grad():
            assert_same(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), net(images))


def test_torch_program_of_pixels_runs_without_this_package(tmp_path: Path) -> None:
    net = write_network(tmp_path / "net.pt", mean=(10, 20, 30), std=(40, 50, 60))
    arguments = ("--checkpoint", tmp_path / "net.pt", "--to", "torch-export", "--pixels")
    assert run(*arguments, "--out", tmp_path / "net.pt2") == 0
    mean, std = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([40.0, 50, 60]).view(3, 1, 1)
    for index, (batch, height, width) in enumerate(SIZES):
        pixels = torch.randint(256, (batch, 3, height, width), generator=torch.Generator().manual_seed(index)).float()
        with torch.no_grad():
            torch.save((pixels, net((pixels - mean) / std)), tmp_path / f"{index}.pt")
    program = """
import json, sys, torch
sys.modules["ccgpu"] = None
files = {"ccgpu.json": ""}
net = torch.export.load("net.pt2", extra_files=files).module()
assert json.loads(files["ccgpu.json"])["output"] == "class logits (B, classes, H, W)"
for index in range(3):
    images, expected = torch.load(f"{index}.pt")
    with torch.no_grad():
        torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
"""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_export_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path / "net.pt")
    target = tmp_path / "net.pt2"
    target.write_text("the former one")

    def write(module: torch.nn.Module, path: Path, information: dict[str, Any]) -> torch.nn.Module:
        path.write_text("exported")
        wrong = copy.deepcopy(module)
        torch.nn.init.zeros_(wrong.head.cca.gamma)  # as if there were no attention
        return wrong

    monkeypatch.setitem(export.WRITERS, "torch-export", write)
    given = ("--checkpoint", tmp_path / "net.pt", "--to", "torch-export", "--out", target)
    assert run(*given) == 2
    assert "--out must be new, got existing results" in capsys.readouterr().err
    assert run(*given, "--overwrite") == 1
    assert "logits differ" in capsys.readouterr().err
    assert target.read_text() == "the former one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pt", "net.pt2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_no_agreement(value: float) -> None:
    bad = torch.nn.Conv2d(3, 2, 1)
    torch.nn.init.constant_(bad.bias, value)
    good = torch.nn.Conv2d(3, 2, 1)
    assert export.compare(good, good, 3) == 0
    with pytest.raises(
        export.Mismatch, match="the network's logits must be finite, got NaN or infinity for images of 97"
    ):
        export.compare(bad, bad, 3)
    with pytest.raises(export.Mismatch, match="the exported network's logits must be finite"):
        export.compare(good, bad, 3)


def test_a_network_that_overflows_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path / "net.pt", std=(1e-38, 1e-38, 1e-38))

    def write(module: torch.nn.Module, path: Path, information: dict[str, Any]) -> torch.nn.Module:
        path.write_text("exported")
        return module

    monkeypatch.setitem(export.WRITERS, "torch-export", write)
    arguments = ("--checkpoint", tmp_path / "net.pt", "--to", "torch-export", "--pixels")
    assert run(*arguments, "--out", tmp_path / "net.pt2") == 1
    assert "must be finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_the_checkpoint_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_network(tmp_path / "net.pt")
    (tmp_path / "net.pt").rename(tmp_path / "net.pt2")
    before = (tmp_path / "net.pt2").read_bytes()
    given = ("--checkpoint", tmp_path / "net.pt2", "--to", "torch-export", "--out", tmp_path / "net.pt2")
    assert run(*given, "--overwrite") == 2
    assert "--out must not replace what the command reads" in capsys.readouterr().err
    assert (tmp_path / "net.pt2").read_bytes() == before


def test_ctrl_c_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "read_network", interrupted)
    assert run("--checkpoint", "net.pt", "--to", "torch-export", "--out", tmp_path / "net.pt2") == 130
    assert capsys.readouterr().err == "export: stopped\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NET", "--to", "onnx", "--out", "net.pt2"], "--out must end in .onnx"),
        (["NET", "--to", "torch-export", "--out", "nowhere/net.pt2"], "folder that exists"),
        (["nowhere.pt", "--to", "torch-export", "--out", "a.pt2"], "nowhere.pt"),
        (["BACKBONE", "--to", "torch-export", "--out", "a.pt2"], "backbone alone"),
        (["CLIPS", "--to", "torch-export", "--out", "a.pt2"], "for clips"),
    ],
)
def test_errors_are_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"{name}.pt" for name in ("NET", "BACKBONE", "CLIPS")}
    write_network(files["NET"])
    write_network(files["CLIPS"], dims=3)
    torch.save(build_backbone("resnet18", stem="7x7").state_dict(), files["BACKBONE"])
    source, *rest = arguments
    rest[-1] = str(tmp_path / rest[-1])
    assert run("--checkpoint", files.get(source, source), *rest) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pt2"))
