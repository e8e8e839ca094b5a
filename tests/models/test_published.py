"""Published layouts: from random files in each, CCNet computes the logits of the published network in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ccgpu.models import checkpoint, published
from ccgpu.models.ccnet import CCNet
from ccgpu.models.published import AUTHORS_MEAN
from tests.models.published_files import (
    CLASSES,
    HEAD,
    RandomEntries,
    State,
    authors_file,
    config_text,
    saved,
    without,
)
from tests.models.published_networks import authors_network, mmsegmentation_network, upsampled

# Comparison


def unnormalised_images(height: int = 44, width: int = 61) -> Tensor:
    """Return random images in 0..255, of a size for which rounding in the max-pool matters: 44 -> 22 -> 11 or 12."""
    return torch.randint(256, (2, 3, height, width), generator=torch.Generator().manual_seed(7)).float()


def normalised(net: CCNet, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    return (images - mean) / std


def auxiliary_logits(net: CCNet, images: Tensor) -> Tensor:
    assert net.auxiliary_head is not None
    return upsampled(net.auxiliary_head(net.backbone(images)[0]), images, net.align_corners)


@torch.no_grad()
def assert_same_logits(net: CCNet, batch: Tensor, logits: Tensor, auxiliary: Tensor) -> None:
    """Compare to 1e-4 of the largest logit, having checked that the expected logits differ from each other."""
    assert logits.std() > 0.1
    images = normalised(net, batch)
    torch.testing.assert_close(net(images), logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    torch.testing.assert_close(
        auxiliary_logits(net, images), auxiliary, rtol=0, atol=1e-4 * auxiliary.abs().max().item()
    )


@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_file_gives_the_authors_logits(authors: State, prefix: str, tmp_path: Path) -> None:
    path = saved({prefix + name: value for name, value in authors.items()}, tmp_path)
    net = CCNet.from_checkpoint(path)
    assert not net.training
    images = unnormalised_images()
    assert_same_logits(net, images, *authors_network(authors, images))
    assert net.backbone.mean == AUTHORS_MEAN


def test_authors_file_of_depth_101_and_other_loops(tmp_path: Path) -> None:
    state = authors_file(101)
    assert len(state) == 562, "the entries of the published R-101 files"
    images = unnormalised_images(33, 24)
    net = CCNet.from_checkpoint(saved(state, tmp_path), recurrence=1)
    assert_same_logits(net, images, *authors_network(state, images, recurrence=1))


@pytest.mark.parametrize("align_corners", [False, True])
def test_mmsegmentation_file_gives_its_logits(mmsegmentation: State, align_corners: bool, tmp_path: Path) -> None:
    meta = {
        "config": config_text(align_corners, 3),
        "CLASSES": ("a", "b"),
        "PALETTE": [[1, 2, 3], [4, 5, 6]],
        "epoch": 1,
    }
    path = saved({"meta": meta, "state_dict": mmsegmentation}, tmp_path)
    net = CCNet.from_checkpoint(path)
    assert net.head.cca is not None
    assert net.head.cca.recurrence == 3
    images = unnormalised_images()
    expected = mmsegmentation_network(mmsegmentation, images, align_corners=align_corners, recurrence=3)
    assert_same_logits(net, images, *expected)
    assert checkpoint.read(path).labels == {"names": ["a", "b"], "colours": [[1, 2, 3], [4, 5, 6]]}


def test_meta_data_of_mmsegmentation_1_are_read_too(mmsegmentation: State, tmp_path: Path) -> None:
    data = {"classes": ("a", "b"), "palette": [[1, 2, 3], [4, 5, 6]]}
    meta = {"cfg": config_text(True, 3), "dataset_meta": data, "epoch": 1}
    found = checkpoint.read(saved({"meta": meta, "state_dict": mmsegmentation}, tmp_path))
    assert (found.network["align_corners"], found.network["recurrence"], found.notes) == (True, 3, ())
    assert found.labels == {"names": ["a", "b"], "colours": [[1, 2, 3], [4, 5, 6]]}


@pytest.mark.parametrize("palette", [None, [[1, 2, 3]]])
def test_names_without_their_colours_are_kept(mmsegmentation: State, palette: Any, tmp_path: Path) -> None:
    """The names are what is compared with a dataset's."""
    meta = {"cfg": config_text(True, 3), "dataset_meta": {"classes": ("a", "b"), "palette": palette}}
    found = checkpoint.read(saved({"meta": meta, "state_dict": mmsegmentation}, tmp_path))
    assert found.labels == {"names": ["a", "b"], "colours": [[128, 0, 0], [0, 128, 0]]}


def test_loops_without_end_are_not_taken_from_a_config(mmsegmentation: State) -> None:
    for digits in ("1" * 10, "1" * 5000):  # int() takes up to 4300
        text = config_text(True, 3).replace("recurrence=3", f"recurrence={digits}")
        layout = published.recognise(mmsegmentation, {"config": text})
        assert layout is not None
        assert (layout.config["recurrence"], [*layout.notes]) == (2, ["recurrence"])


def test_mmsegmentation_file_without_a_config_says_what_was_assumed(mmsegmentation: State, tmp_path: Path) -> None:
    path = saved({"state_dict": mmsegmentation}, tmp_path)
    found = checkpoint.read(path)
    assert any("align_corners=False" in note for note in found.notes)
    assert any("R = 2" in note for note in found.notes)
    images = unnormalised_images(24, 33)
    assert_same_logits(
        checkpoint.build(found), images, *mmsegmentation_network(mmsegmentation, images, align_corners=False)
    )
    chosen = CCNet.from_checkpoint(path, align_corners=True)
    assert_same_logits(chosen, images, *mmsegmentation_network(mmsegmentation, images, align_corners=True))


@pytest.mark.parametrize("stem", ["7x7", "deep", "v1c"])
def test_resnet_file_fills_the_backbone(stem: str, tmp_path: Path, authors: State, mmsegmentation: State) -> None:
    if stem == "v1c":
        inner = {
            name.removeprefix("backbone."): v for name, v in mmsegmentation.items() if name.startswith("backbone.")
        }
    else:
        inner = {name: v.abs() if name.endswith("weight") and v.ndim == 1 else v for name, v in authors.items()}
        inner = {name: value for name, value in inner.items() if name.split(".")[0] not in ("head", "dsn")}
    if stem == "7x7":
        entries = RandomEntries(counters=True)
        entries.convolution("conv1", 64, 3, 7)
        entries.norm("bn1", 64)
        entries.stages("", 50, 64)
        inner = entries.state
    state = {**inner, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    with pytest.warns(UserWarning, match="randomly initialised"):
        net = CCNet.from_checkpoint(saved(state, tmp_path), num_classes=5, head_channels=16)
    assert net.backbone.stem == stem
    theirs = {name: v for name, v in net.backbone.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert len(theirs) == len({name for name in inner if not name.endswith("num_batches_tracked")})
    assert torch.equal(theirs["layer3.2.conv2.weight"], inner["layer3.2.conv2.weight"])
    first = "stem.0.weight" if stem == "v1c" else "conv1.weight"
    assert torch.equal(theirs["conv1.weight"], inner[first])
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 24, 33)).shape == (1, 5, 24, 33)


# Mistakes


def test_every_entry_that_does_not_fit_is_listed(mmsegmentation: State, tmp_path: Path) -> None:
    state = without(mmsegmentation, "decode_head.conv_cat.conv.weight")
    state["decode_head.extra.weight"] = torch.zeros(3)
    state["backbone.layer2.1.conv2.weight"] = torch.zeros(128, 128, 1, 1)
    state["decode_head.conv_seg.bias"] = torch.zeros(CLASSES, dtype=torch.int64)
    with pytest.raises(ValueError, match="taken for mmsegmentation's CCNet") as caught:
        CCNet.from_checkpoint(saved({"state_dict": state}, tmp_path))
    for line in (
        f"missing: decode_head.conv_cat.conv.weight ({HEAD}, {2048 + HEAD}, 3, 3)",
        "surplus: decode_head.extra.weight (3,)",
        "misshapen: backbone.layer2.1.conv2.weight must be (128, 128, 3, 3), got (128, 128, 1, 1)",
        "wrong kind: decode_head.conv_seg.bias must be like torch.float32, got torch.int64",
    ):
        assert line in str(caught.value)
    assert "got 4 that do not" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["head.conva.0.weight", "head.bottleneck.3.weight", "dsn.0.weight", "conv1.weight", "layer4.2.bn3.bias"]
)
def test_missing_entries_that_determine_the_network_are_named(authors: State, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing was loaded|no such layout") as caught:
        CCNet.from_checkpoint(saved(without(authors, name), tmp_path))
    assert name in str(caught.value) or name == "conv1.weight"
