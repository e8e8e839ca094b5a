"""--init: training starts from a trained network of any layout, on other classes, channels and folders."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ccgpu.models import checkpoint
from ccgpu.models.backbones import build_backbone
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint import Checkpoint
from ccgpu.models.classifier import CLASSIFIERS
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.models.published import AUTHORS_MEAN
from ccgpu.train import camvid, command, evaluate, folder, predict
from ccgpu.train.dataset import Dataset
from ccgpu.train.runs import checkpoints, records
from ccgpu.train.runs.initial import Initial, normalised_as, read_initial
from ccgpu.train.runs.settings.training import Settings
from ccgpu.train.runs.setup import build_network, build_optimisation
from tests.models.published_files import CLASSES, HEAD, authors_file, config_text, mmsegmentation_file, saved
from tests.train import training
from tests.train.folders import write_folder
from tests.train.training import told

CPU = torch.device("cpu")
OLD, NEW = ("sky", "road", "tree"), ("road", "building", "Sky")
IDS = np.arange(3, dtype=np.uint8)
ROWS = (1, None, 0)  # for each of NEW the place in OLD
TINY = [
    *("--crop", "33", "--batch", "2", "--iterations", "2", "--save-every", "1", "--workers", "0", "--device", "cpu"),
    *("--no-tensorboard", "--lr", "1e-3", "--eval-every", "0"),
]
NO_STEP = ("--lr", "1e-30", "--iterations", "1")  # a step that changes no weight of float32


def train(data: Path, out: Path, *flags: str) -> int:
    return folder.main([*TINY, "--data", str(data), "--out", str(out), *flags])


def labels(*names: str) -> dict[str, Any]:
    return {"names": list(names), "colours": Labels.numbered(len(names)).colours.tolist()}


def dataset_of(*names: str, **changes: Any) -> Dataset:
    own = Labels(names, Labels.numbered(len(names)).colours, tuple(range(len(names))))
    return dataclasses.replace(camvid.DATASET, labels=own, **changes)


def start(path: Path, dataset: Dataset, **flags: Any) -> tuple[CCNet, Initial]:
    """Return the network that a run with these flags starts with."""
    initial = read_initial(str(path), flags)
    torch.manual_seed(0)
    settings = Settings(**{"ccl": False, "init": str(path), **initial.settings, **flags})
    assert settings.problems() == []
    return build_network(settings, normalised_as(dataset, initial), CPU, pretrained=True, initial=initial), initial


def assert_kept(net: CCNet, found: Checkpoint, rows: tuple[int | None, ...]) -> None:
    """Compare all weights with the file's: rows of both classifiers by their sources, all others to the bit."""
    state = net.state_dict()
    for name, value in found.weights.items():
        if name.rpartition(".")[0] not in CLASSIFIERS:
            assert torch.equal(state[name].squeeze(), value.squeeze()), name  # 1x1x1 kernels for clips
            continue
        for row, source in zip(state[name], rows, strict=True):
            old = [torch.equal(row, other) for other in value]
            assert old == [index == source for index in range(len(value))]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images and masks, and a run on it with the classes of OLD."""
    root = tmp_path_factory.mktemp("first")
    data = write_folder(root / "data", 4, values=IDS)
    small = ("--backbone", "resnet18", "--head-channels", "8", "--stem", "v1c")
    heads = ("--activation", "relu", "--gamma", "0.5", "--normalisation", "authors")
    assert train(data, root / "run", *small, *heads, "--classes", *OLD) == 0
    return data, root / "run"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ccgpu with a small network for the classes of OLD."""
    return write_network(tmp_path_factory.mktemp("small") / "small.safetensors")


def write_network(path: Path, names: tuple[str, ...] | None = OLD, **options: Any) -> Path:
    torch.manual_seed(3)
    net = CCNet(num_classes=len(OLD), **{"backbone": "resnet18", "head_channels": 8, "gamma": 0.5, **options})
    images = options.get("in_channels", 3)
    form = ImageFormat() if images == 3 else ImageFormat(images, raw=True, dtype="uint16")
    checkpoint.write(path, Checkpoint(net.config, net.state_dict(), names and labels(*names), images=form))
    return path


def test_a_folder_starts_from_a_run_on_other_classes(
    first: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = first
    assert train(data, tmp_path / "run", "--init", str(run), "--classes", *NEW, *NO_STEP) == 0
    out = capsys.readouterr().out
    assert f"starting from {run}: a CCNet of ccgpu\nkept classes: road, Sky\nnew classes: building\n" in out
    for line in ("--backbone", "--head-channels", "--gamma"):  # of the folder's recipe, which gives way
        assert f"  {line} " not in out
    content, old = (checkpoints.read_checkpoint(path / "last.pt") for path in (tmp_path / "run", run))
    settings = {**old["settings"], "init": str(run), "gamma": content["settings"]["gamma"]}
    for name in ("backbone", "stem", "activation", "head_channels", "auxiliary_channels", "init", "imagenet"):
        assert content["settings"][name] == settings[name] or (name, settings[name]) == ("auxiliary_channels", None)
    assert content["settings"]["gamma"] == pytest.approx(0.5, abs=0.01)
    net, found = CCNet.from_checkpoint(tmp_path / "run"), checkpoint.read(run)
    trained = {name for name, _ in net.named_parameters()}  # running means have seen a batch
    kept = dataclasses.replace(found, weights={k: v for k, v in found.weights.items() if k in trained})
    assert_kept(net, kept, ROWS)
    assert (net.backbone.mean, net.backbone.std) == (AUTHORS_MEAN, (1.0, 1.0, 1.0))
    record = tmp_path / "scores.jsonl"
    assert evaluate.main(["--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--record", str(record)]) == 0
    trained_on = records.read_records(tmp_path / "run" / "metrics.jsonl")[-1]
    assert records.read_records(record)[0]["matrix"] == trained_on["matrix"]
    image = str(next((data / "images").iterdir()))
    masks = ["--checkpoint", str(tmp_path / "run"), "--out", str(tmp_path / "masks"), "--device", "cpu", image]
    assert predict.main(masks) == 0


def test_a_run_goes_on_exactly_after_its_first_network_is_gone(first: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = first
    shutil.copytree(run, tmp_path / "old")
    flags = ("--classes", *NEW, "--init", str(tmp_path / "old"))
    assert train(data, tmp_path / "whole", *flags) == 0
    shutil.rmtree(tmp_path / "old")
    resume = ("--resume", str(tmp_path / "whole" / "previous.pt"))
    assert folder.main(["--data", str(data), "--out", str(tmp_path / "rest"), *resume, "--device", "cpu"]) == 0
    one, other = (checkpoints.read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "rest"))
    assert one["iteration"] == other["iteration"] == 2
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert other["settings"]["init"] == str(tmp_path / "old")


def test_the_averaged_weights_of_a_run_start_another(first: tuple[Path, Path], tmp_path: Path) -> None:
    data, run = first
    assert train(data, tmp_path / "run", "--init", str(run), "--classes", *OLD, "--ema", "0.5", "--lr", "1") == 0
    content = checkpoints.read_checkpoint(tmp_path / "run" / "last.pt")
    initial = read_initial(str(tmp_path / "run"), {})
    average = content["average"]
    assert average is not None
    assert all(torch.equal(value, average[name]) for name, value in initial.found.weights.items())
    assert not torch.equal(average["backbone.conv1.weight"], content["model"]["backbone.conv1.weight"])


def begin_anew(out: Path) -> None:
    """Leave in a run's folder what it holds before its first checkpoint."""
    for name in ("last.pt", "best.pt", "results.txt"):
        (out / name).unlink()


def test_a_run_without_a_checkpoint_begins_anew_with_its_flags(
    first: tuple[Path, Path], small: Path, tmp_path: Path
) -> None:
    data, run = first
    out = tmp_path / "run"
    assert train(data, out, "--init", str(run), "--recurrence", "1", "--classes", *NEW, *NO_STEP) == 0
    begin_anew(out)
    again = ["--data", str(data), "--resume", "--out", str(out), "--device", "cpu"]
    assert folder.main(again) == 0
    settings = checkpoints.read_checkpoint(out / "last.pt")["settings"]
    assert (settings["recurrence"], settings["stem"], settings["init"]) == (1, "v1c", str(run))
    begin_anew(out)
    assert folder.main([*again, "--init", str(small)]) == 0
    settings = checkpoints.read_checkpoint(out / "last.pt")["settings"]
    assert (settings["recurrence"], settings["stem"], settings["init"]) == (2, "deep", str(small))


def published(layout: str, folder: Path) -> tuple[Path, tuple[str, ...] | None]:
    """Return a file in a layout, and the names of its classes."""
    names = ("road", "sidewalk", "building", "wall", "fence", "pole", "sky")
    if layout == "authors":
        return saved({f"module.{name}": value for name, value in authors_file(50).items()}, folder), None
    if layout == "mmsegmentation 0.x":
        meta: dict[str, Any] = {
            "config": config_text(True, 2),
            "CLASSES": names,
            "PALETTE": [[i] * 3 for i in range(7)],
        }
    else:
        meta = {"cfg": config_text(True, 2), "dataset_meta": {"classes": names, "palette": [[i] * 3 for i in range(7)]}}
    return saved({"state_dict": mmsegmentation_file(50), "meta": meta}, folder), names


@pytest.mark.parametrize("layout", ["authors", "mmsegmentation 0.x", "mmsegmentation 1.x"])
def test_published_networks_start_a_run(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, names = published(layout, tmp_path)
    new = ("sky", "river", "road")
    net, initial = start(path, dataset_of(*new))
    found, out = checkpoint.read(path), capsys.readouterr().out
    assert_kept(net, found, (None,) * 3 if names is None else (6, None, 0))
    state = net.state_dict()
    assert not state["auxiliary_head.0.bias"].any() or layout == "authors"
    if layout == "authors":
        assert f"note: the file does not name its {CLASSES} classes, and here are 3: all are new" in out
        assert (net.backbone.mean, net.backbone.std) == (AUTHORS_MEAN, (1.0, 1.0, 1.0))
        expected = {"normalisation": "authors", "stem": "deep", "activation": "leaky_relu", "auxiliary_channels": HEAD}
    else:
        assert "kept classes: sky, road\nnew classes: river\n" in out
        assert net.backbone.std == (58.395, 57.12, 57.375)
        expected = {"halved_dilation": True, "ceil_mode": False, "activation": "relu", "auxiliary_channels": 16}
    assert {name: initial.settings[name] for name in expected} == expected
    # The network computes what the file's does, for the rows that are kept.
    images = torch.randn(1, 3, 33, 41, generator=torch.Generator().manual_seed(1))
    theirs = checkpoint.build(found)
    if names is not None:
        torch.testing.assert_close(net.eval()(images)[:, [0, 2]], theirs(images)[:, [6, 0]])
    elif layout == "authors":
        features = [network.backbone(images)[1] for network in (net.eval(), theirs)]
        torch.testing.assert_close(*features)


def test_a_file_without_names_keeps_as_many_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_network(tmp_path / "net.pt", None)
    net, initial = start(path, dataset_of(*NEW))
    assert_kept(net, initial.found, (0, 1, 2))
    assert "note: the file does not name its 3 classes, as many as here: all are kept, in this order" in (
        capsys.readouterr().out
    )


def test_loops_dropout_loss_and_clips_may_change(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"recurrence": 3, "dropout": 0.3, "ccl": True, "clip": 2, "recompute": True}
    net, initial = start(small, dataset_of(*NEW), **changes)
    assert_kept(net, initial.found, ROWS)
    assert "new: the embedding of --ccl" in capsys.readouterr().out
    config = {name: net.config[name] for name in ("recurrence", "dropout", "embedding", "dims", "recompute")}
    assert config == {"recurrence": 3, "dropout": 0.3, "embedding": 16, "dims": 3, "recompute": True}


@pytest.mark.parametrize(
    ("there", "here", "note"),
    [
        (
            {"context": "nonlocal"},
            {"context": "rcca"},
            "criss-cross attention begins with the weights of the file's non-local",
        ),
        ({"context": "nonlocal"}, {"context": "rcca", "recurrence": 3, "clip": 2}, "criss-cross attention begins"),
        (
            {"recurrence": 3},
            {"context": "nonlocal"},
            "non-local attention begins with the weights of the file's criss-cross",
        ),
    ],
    ids=str,
)
def test_criss_cross_and_non_local_attention_start_from_each_other(
    there: dict[str, Any], here: dict[str, Any], note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_network(tmp_path / "net.pt", **there)
    net, initial = start(path, dataset_of(*NEW), **here)
    assert f"note: {note}" in capsys.readouterr().out
    assert net.config["context"] == here["context"]
    theirs, ours = "head.cca.", "head.context."
    if here["context"] == "rcca":
        theirs, ours = ours, theirs
        assert net.head.cca.recurrence == here.get("recurrence", 2)
    state, old = net.state_dict(), initial.found.weights
    names = {name.removeprefix(ours) for name in state if name.startswith(ours)}
    assert names == {name.removeprefix(theirs) for name in old if name.startswith(theirs)}
    assert "query_conv.weight" in names
    for name in names:
        assert torch.equal(state[ours + name].squeeze(), old[theirs + name].squeeze())


def test_no_loop_has_no_attention_to_start_from(tmp_path: Path) -> None:
    path = write_network(tmp_path / "net.pt", context="nonlocal")
    with pytest.raises(ValueError, match="entries that do not fit"):
        start(path, dataset_of(*NEW), context="rcca", recurrence=0)


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "efficientnet-lite0"},
        {"context": "nonlocal", "auxiliary_channels": 6},
        {"context": "psp", "stem": "7x7"},
        {"context": "none", "halved_dilation": True, "ceil_mode": False},
        {"recurrence": 0, "align_corners": False},
        {"dims": 3, "recurrence": 1},
    ],
    ids=str,
)
def test_every_network_starts_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    path = write_network(tmp_path / "net.pt", **options)
    net, initial = start(path, dataset_of(*NEW))
    assert_kept(net, initial.found, ROWS)
    options = {**options, "dims": 2}
    assert {name: net.config[name] for name in options} == options


def test_an_embedding_goes_without_its_loss_and_stays_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_network(tmp_path / "net.pt", embedding=16, auxiliary=False)
    net, _ = start(path, dataset_of(*OLD))
    assert net.head.embedding is None
    assert "left out: the embedding of --ccl\nnew: the auxiliary head\n" in capsys.readouterr().out
    net, initial = start(path, dataset_of(*OLD), ccl=True)
    assert_kept(net, initial.found, (0, 1, 2))
    assert "the embedding" not in capsys.readouterr().out


def test_frozen_norms_are_all_that_the_file_holds(small: Path, tmp_path: Path) -> None:
    net, initial = start(small, dataset_of(*NEW), freeze="norms")
    norms = {name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name.partition(".")[0] for name in norms} == {"backbone", "head", "auxiliary_head"}
    settings = Settings(**{"ccl": False, **initial.settings, "init": str(small), "freeze": "norms"})
    frozen, optimiser, average = build_optimisation(settings, net)
    assert len(frozen) == len(norms)
    assert average is None
    left_out = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert left_out == {f"{name}.{entry}" for name in norms for entry in ("weight", "bias")}
    trained = sum(len(group["params"]) for group in optimiser.param_groups)
    assert trained == len(list(net.parameters())) - len(left_out)
    path = write_network(tmp_path / "net.pt", auxiliary=False)
    with pytest.raises(ValueError, match=r"--freeze norms must come with .* got --init .*net.pt without the aux"):
        start(path, dataset_of(*OLD), freeze="norms")
    start(path, dataset_of(*OLD), freeze="backbone")


def test_new_classes_are_drawn_as_the_flags_say(small: Path) -> None:
    names = (*OLD, *(f"other {index}" for index in range(60)))
    deviations = {}
    for init in ("torch", "mmsegmentation"):
        net, _ = start(small, dataset_of(*names), head_init=init)
        rows: Tensor = net.state_dict()["head.bottleneck.3.weight"][3:]
        deviations[init] = float(rows.std())
    assert deviations["mmsegmentation"] == pytest.approx(0.01, rel=0.2)
    assert deviations["torch"] == pytest.approx((1 / 8 / 3) ** 0.5, rel=0.2)  # uniform in +-1/sqrt(8)


def test_images_of_other_channels_adapt_a_network_of_rgb(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    infrared = {"images": ImageFormat(4, raw=True, dtype="uint16"), "mean": (9.0,) * 4, "std": (2.0,) * 4}
    net, initial = start(small, dataset_of(*NEW, **infrared))
    red_green_blue = initial.found.weights["backbone.conv1.weight"]
    expected = red_green_blue.sum(1, keepdim=True).expand(-1, 4, -1, -1) / 4
    torch.testing.assert_close(net.state_dict()["backbone.conv1.weight"], expected)
    assert net.backbone.mean == (9.0,) * 4
    assert "note: the network was trained on RGB; each of the 4 channels begins with" in capsys.readouterr().out


def test_a_network_of_other_channels_is_refused(tmp_path: Path) -> None:
    path = write_network(tmp_path / "net.pt", in_channels=5, mean=[1.0] * 5, std=[1.0] * 5)
    with pytest.raises(
        ValueError, match=r"--init must hold a network for images of 3 channels or for RGB, got .* for 5"
    ):
        start(path, dataset_of(*NEW))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--head-channels", "16"), "got --head-channels 16 (--head-channels 8 there); leave"),
        (
            ("--stem", "7x7", "--backbone", "resnet50"),
            "got --backbone resnet50 (--backbone resnet18 there), --stem 7x7",
        ),
        (("--no-align-corners",), "got --no-align-corners (--align-corners there)"),
        (("--context", "psp"), "got --context psp (--context rcca there)"),
        (("--recurrence", "0"), "got --recurrence 0 (--recurrence 2 there)"),
        (("--gamma", "1"), "got --gamma 1 (--gamma 0.5 there)"),
        (("--imagenet", "package"), "--init and --imagenet exclude each other"),
    ],
)
def test_flags_that_contradict_the_network_are_refused(
    flags: tuple[str, ...], message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--init", str(small), "--device", "cpu", "--out", str(tmp_path / "run"), *flags]
    assert camvid.main([*run, "--scenes", "2", "1", "--scenes-size", "64", "64"]) == 2
    assert message in told(capsys, "train")
    assert not (tmp_path / "run").exists()


def test_an_assumed_alignment_may_be_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved({"state_dict": mmsegmentation_file(50)}, tmp_path)
    net, _ = start(path, dataset_of(*NEW), align_corners=True)
    assert net.align_corners
    out = capsys.readouterr().out
    assert "note: the file has no config: R = 2 loops were taken" in out
    assert "align_corners" not in out


@pytest.mark.parametrize("kind", ["a backbone", "a network for --imagenet", "nothing", "no network"])
def test_files_of_another_kind_are_refused(
    kind: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.pth"
    if kind == "a backbone":
        torch.save(build_backbone("resnet18", stem="7x7").state_dict(), path)
        flags, message = ("--init", str(path)), f"got {path} with a backbone alone; use --imagenet."
    elif kind == "a network for --imagenet":
        flags = ("--imagenet", str(small), "--backbone", "resnet18")
        message = f"--imagenet must hold a backbone alone, got {small} with a whole network; use --init."
    elif kind == "nothing":
        flags, message = ("--init", str(path)), "must be a file"
    else:
        path.write_bytes(b"no weights")
        flags, message = ("--init", str(path)), "must be a file of weights"
    data = write_folder(tmp_path / "data", 4, values=IDS)
    assert train(data, tmp_path / "run", *flags, "--head-channels", "8") == 2
    assert message in told(capsys, "train")
    assert not (tmp_path / "run").exists()


def test_the_run_folder_is_named_by_the_network(tmp_path: Path) -> None:
    for path, name in (("nets/r50.pth", "r50"), ("runs/first", "first"), ("runs/first/last.pt", "first")):
        settings = Settings(init=str(tmp_path / path))
        assert command.default_out(settings, camvid.DATASET) == Path("runs") / f"camvid-from-{name}"
    settings = Settings(init=str(tmp_path / "r50.pth"), preset="demo")
    assert command.default_out(settings, camvid.DATASET) == Path("runs") / "camvid-demo-from-r50"


def test_a_demo_starts_from_a_network(small: Path, tmp_path: Path) -> None:
    flags = training.TINY[training.TINY.index("--crop") :]
    run = ["--preset", "demo", *flags, "--init", str(small), "--iterations", "1", "--no-baselines"]
    assert camvid.main([*run, "--batch", "2", "--out", str(tmp_path / "run")]) == 0
    settings = checkpoints.read_checkpoint(tmp_path / "run" / "last.pt")["settings"]
    assert (settings["head_channels"], settings["backbone"], settings["clip"]) == (8, "resnet18", 3)
