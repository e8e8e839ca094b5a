"""Networks as the flags describe them: each argument of `CCNet`, the authors' images, initial weights of the heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ccgpu.models.ccnet import CCNet
from ccgpu.models.heads import AuxiliaryHead, CCHead
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.models.normalisation import Normalise
from ccgpu.train import camvid
from ccgpu.train.dataset import Dataset
from ccgpu.train.runs.settings.training import Settings, check_settings
from ccgpu.train.runs.setup import build_network
from tests.models.test_input_statistics import images
from tests.models.test_resnet import random_state

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"backbone": "resnet18", "head_channels": 8}
INFRARED = Dataset(
    name="infrared",
    labels=Labels.numbered(2),
    layout="",
    find_pairs=lambda root, split, labelled: [],
    recipe={},
    source="",
    scores=("miou",),
    images=ImageFormat(4, raw=True, dtype="uint16"),
    mean=(100.0, 200.0, 300.0, 400.0),
    std=(10.0, 10.0, 10.0, 10.0),
)


def build(dataset: Dataset = camvid.DATASET, **changes: Any) -> CCNet:
    """Return the network of these settings, drawn after the seed 0."""
    torch.manual_seed(0)
    return build_network(Settings(**{**SMALL, **changes}), dataset, CPU, pretrained=True)


def test_without_flags_the_network_is_the_papers_from_the_same_random_numbers() -> None:
    torch.manual_seed(0)
    paper = CCNet("resnet18", 11, head_channels=8).state_dict()
    own = build().state_dict()
    assert own.keys() == paper.keys()
    assert all(torch.equal(own[name], paper[name]) for name in paper)


def test_every_flag_of_the_network_is_an_argument_of_it() -> None:
    given: dict[str, Any] = {
        "halved_dilation": True,
        "ceil_mode": False,
        "auxiliary_channels": 6,
        "activation": "relu",
        "align_corners": False,
        "stem": "v1c",
    }
    config = build(**given).config
    assert {name: config[name] for name in given} == given
    assert build(backbone="efficientnet-lite0").config["ceil_mode"] is None


def test_the_authors_images_and_file_give_the_features_of_their_network(tmp_path: Path) -> None:
    state = random_state(18, "deep")
    torch.save(state, tmp_path / "resnet18.pth")
    net = build(normalisation="authors", imagenet=str(tmp_path / "resnet18.pth"))
    image = torch.randint(256, (33, 41, 3), generator=torch.Generator().manual_seed(1)).float()
    # Their code: blue first, minus the mean, undivided, into the file's own first convolution.
    theirs = (image - torch.tensor([122.67891434, 116.66876762, 104.00698793])).flip(-1).permute(2, 0, 1)[None]
    expected = F.conv2d(theirs, state["conv1.weight"], stride=2, padding=1)
    ours = Normalise(net.backbone.mean, net.backbone.std)(image.numpy())[None]
    torch.testing.assert_close(net.backbone.conv1(ours), expected, rtol=1e-4, atol=1e-3)
    plain = build(imagenet=str(tmp_path / "resnet18.pth"))
    assert torch.equal(plain.backbone.conv1.weight, state["conv1.weight"])
    assert plain.backbone.std == (58.395, 57.12, 57.375)


@pytest.mark.parametrize("deviation", [1.0, 58.0])
@pytest.mark.parametrize("normalisation", ["imagenet", "authors"])
def test_a_file_for_images_of_another_scale_is_warned_of(
    deviation: float, normalisation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_state(18, "deep")
    state["bn1.running_var"] = F.conv2d(images(deviation), state["conv1.weight"]).var(dim=(0, 2, 3))
    torch.save(state, tmp_path / "resnet18.pth")
    build(normalisation=normalisation, imagenet=str(tmp_path / "resnet18.pth"))
    fits = (deviation == 1.0) == (normalisation == "imagenet")
    other = "authors" if normalisation == "imagenet" else "imagenet"
    warned = f"gives {58 if normalisation == 'authors' else 1}: is the file one for --normalisation {other}?"
    assert (warned in capsys.readouterr().out) == (not fits)


@pytest.mark.parametrize(
    ("dataset", "changes", "message"),
    [
        (
            camvid.DATASET,
            {"backbone": "efficientnet-lite0", "halved_dilation": True, "ceil_mode": False, "stem": "7x7"},
            "--stem, --halved-dilation, --no-ceil-mode must be left out for --backbone efficientnet-lite0",
        ),
        (
            camvid.DATASET,
            {"backbone": "timm:resnet18", "normalisation": "authors"},
            "--normalisation authors must be left out for --backbone timm:resnet18",
        ),
        (INFRARED, {"normalisation": "authors"}, "--normalisation must be imagenet for infrared"),
    ],
)
def test_flags_that_do_not_fit_are_refused(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(Settings(**{**SMALL, "data": "somewhere", **changes}), dataset, 1, CPU)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_heads_as_mmsegmentation_initialises_them(activation: str, slope: float) -> None:
    wide: dict[str, Any] = {"head_channels": 64, "activation": activation}
    net, plain = build(**wide, head_init="mmsegmentation"), build(**wide)
    own, torchs = net.state_dict(), plain.state_dict()
    drawn = {"head.conva.0", "head.convb.0", "head.bottleneck.0", "auxiliary_head.0"}
    classifiers = {"head.bottleneck.3", "auxiliary_head.3"}
    for name, value in own.items():
        layer, _, kind = name.rpartition(".")
        if layer in drawn | classifiers and kind == "bias":
            assert not value.any()
        elif layer in drawn:  # fan_out: 64 channels of 3x3 positions
            expected = (2 / ((1 + slope**2) * 64 * 9)) ** 0.5
            assert float(value.std()) == pytest.approx(expected, rel=0.02)
            assert abs(float(value.mean())) < expected / 20
        elif layer in classifiers:
            assert float(value.std()) == pytest.approx(0.01, rel=0.1)
        else:  # the backbone, the norms, q, k, v and gamma
            assert torch.equal(value, torchs[name]), name


@pytest.mark.parametrize("context", ["psp", "aspp", "nonlocal"])
def test_heads_of_every_context_are_initialised(context: str) -> None:
    net = build(context=context, head_init="mmsegmentation", head_channels=32)
    assert isinstance(net.auxiliary_head, AuxiliaryHead)
    assert isinstance(net.head, CCHead)
    for head in (net.head, net.auxiliary_head):
        for module in head.modules():
            if isinstance(module, torch.nn.Sequential) and isinstance(module[0], torch.nn.Conv2d):
                weight = module[0].weight
                fan_out = weight.shape[0] * weight[0, 0].numel()
                assert float(weight.detach().std()) == pytest.approx((2 / (1.0001 * fan_out)) ** 0.5, rel=0.15)
