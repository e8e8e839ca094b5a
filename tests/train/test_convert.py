"""ccgpu convert: files of every layout become files that need no flags; errors leave OUT as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ccgpu.models import checkpoint
from ccgpu.models.backbones import build_backbone, load_imagenet
from ccgpu.models.ccnet import CCNet
from ccgpu.train import camvid, convert
from ccgpu.train.data.cityscapes_labels import CITYSCAPES
from ccgpu.train.runs import checkpoints
from tests.models import published_files, published_networks
from tests.models.test_published import assert_same_logits, unnormalised_images


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    meta = {
        "config": published_files.config_text(True, 2),
        "CLASSES": tuple("abcdefg"),
        "PALETTE": [[i, 0, 0] for i in range(7)],
    }
    mmsegmentation = {"meta": meta, "state_dict": published_files.mmsegmentation_file(50)}
    return {
        "authors": published_files.saved(published_files.authors_file(50), folder, "authors.pth"),
        "mmsegmentation": published_files.saved(mmsegmentation, folder, "mmsegmentation.pth"),
    }


def run(*arguments: Any) -> int:
    return convert.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("layout", ["authors", "mmsegmentation"])
def test_converted_file_gives_the_logits_of_the_original(
    layout: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files[layout], tmp_path / "out") == 0
    target = tmp_path / "out.safetensors"
    assert f"written: {target}" in capsys.readouterr().out
    images = unnormalised_images(33, 24)
    state = torch.load(files[layout], weights_only=True)
    if layout == "authors":
        expected = published_networks.authors_network(state, images)
    else:
        expected = published_networks.mmsegmentation_network(state["state_dict"], images, align_corners=True)
    assert_same_logits(CCNet.from_checkpoint(target), images, *expected)


def test_classes_come_from_the_file_or_from_their_number(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files["mmsegmentation"], tmp_path / "mm.pt") == 0
    assert checkpoint.read(tmp_path / "mm.pt").labels["names"] == list("abcdefg")
    assert run(files["authors"], tmp_path / "authors.pt") == 0
    assert checkpoint.read(tmp_path / "authors.pt").labels is None
    assert "--dataset gives them names" in capsys.readouterr().out
    net = CCNet("resnet18", 19, head_channels=8)
    nameless = tmp_path / "nameless.pt"
    checkpoint.write(nameless, checkpoint.Checkpoint(net.config, net.state_dict()))
    assert run(nameless, tmp_path / "named.pt") == 0
    assert "those of cityscapes were taken" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "named.pt").labels == CITYSCAPES.as_plain()
    assert run(nameless, tmp_path / "wrong.pt", "--dataset", "camvid") == 2
    assert "must have the network's 19 classes, got camvid with 11" in capsys.readouterr().err
    assert not (tmp_path / "wrong.pt").exists()


def test_classes_with_the_names_of_cityscapes_get_its_ids(tmp_path: Path) -> None:
    names = tuple(name.upper() for name in CITYSCAPES.names)
    labels = {"names": list(names), "colours": CITYSCAPES.colours.tolist()}
    net = CCNet("resnet18", 19, head_channels=8)
    checkpoint.write(tmp_path / "in.pt", checkpoint.Checkpoint(net.config, net.state_dict(), labels))
    assert run(tmp_path / "in.pt", tmp_path / "out.pt") == 0
    assert checkpoint.read(tmp_path / "out.pt").labels == CITYSCAPES.as_plain()


def test_flags_set_what_the_file_does_not_say(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(files["authors"], tmp_path / "out.pt", "--recurrence", "3") == 0
    assert "2 was taken" not in capsys.readouterr().out
    found = checkpoint.read(tmp_path / "out.pt")
    assert found.network["recurrence"] == 3
    assert not any("loops" in note for note in found.notes)
    state = torch.load(files["mmsegmentation"], weights_only=True)["state_dict"]
    bare = published_files.saved({"state_dict": state}, tmp_path, "bare.pth")
    assert run(bare, tmp_path / "bare.pt", "--align-corners") == 0
    assert "align_corners=False was taken" not in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "bare.pt").network["align_corners"] is True


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_resnet_becomes_a_file_for_imagenet(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", stem="7x7")
    state: dict[str, Tensor] = {
        **backbone.state_dict(),
        "fc.weight": torch.zeros(1000, 512),
        "fc.bias": torch.zeros(1000),
    }
    assert run(published_files.saved(state, tmp_path, "resnet18.pth"), tmp_path / f"out{ending}") == 0
    assert "for --imagenet" in capsys.readouterr().out
    other = build_backbone("resnet18", stem="7x7")
    load_imagenet(other, tmp_path / f"out{ending}")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in backbone.state_dict().items())


def test_existing_files_are_kept(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.pt"
    target.write_text("precious")
    assert run(files["authors"], target) == 2
    assert "OUT must be new, got existing results" in capsys.readouterr().err
    assert run(tmp_path / "nowhere.pth", target, "--overwrite") == 2
    assert target.read_text() == "precious"
    before = files["authors"].stat().st_size
    capsys.readouterr()
    assert run(files["authors"], files["authors"], "--overwrite") == 2
    assert "OUT must not replace what the command reads" in capsys.readouterr().err
    assert files["authors"].stat().st_size == before
    assert run(files["authors"], target, "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.pt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IN", "OUT.onnx"], "must end in .safetensors, .pt or .pth"),
        (["IN", "OUT.pt", "--recurrence", "-1"], "recurrence must be 0 or more"),
        (["IN", "OUT.pt", "--recurrence", "1000000"], "--recurrence must be at most 64, got 1000000"),
        (["IN", "OUT.pt", "--dataset", "nothing"], "--dataset must be a module"),
        (["IN", "nowhere/OUT.pt"], "nowhere"),
        (["nowhere.pth", "OUT.pt"], "there is none"),
    ],
)
def test_errors_are_told_in_one_line(
    arguments: list[str], message: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = arguments[:2]
    arguments[0] = str(files["authors"]) if source == "IN" else source
    assert run(arguments[0], tmp_path / target, *arguments[2:]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert not list(tmp_path.iterdir())


def test_ctrl_c_is_no_error(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "read", interrupted)
    assert run(files["authors"], tmp_path / "out.pt") == 130
    assert capsys.readouterr().err == "convert: stopped\n"


def test_a_runs_checkpoint_is_converted_with_its_weights_and_classes(trained: Path, tmp_path: Path) -> None:
    saved = checkpoints.read_checkpoint(trained / "last.pt")
    net = CCNet.from_checkpoint(trained / "last.pt")
    assert not net.training
    assert all(torch.equal(value, saved["model"][name]) for name, value in net.state_dict().items())
    assert run(trained / "last.pt", tmp_path / "net") == 0
    found = checkpoint.read(tmp_path / "net.safetensors")
    assert found.labels == camvid.LABELS.as_plain()
    images = torch.randn(1, 3, 33, 49)
    with torch.no_grad():
        assert torch.equal(checkpoint.build(found)(images), net(images))


def test_names_of_other_classes_than_the_network_has_are_refused(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in the file of a network that was trained on other classes, and still has the names of the first."""
    content = torch.load(files["mmsegmentation"], weights_only=True)
    content["meta"]["CLASSES"] = ("a", "b")
    source = published_files.saved(content, tmp_path, "other.pth")
    assert run(source, tmp_path / "out.pt") == 2
    assert "must have the network's 7 classes, got the file's classes with 2" in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()
