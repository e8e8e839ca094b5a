"""Published layouts: random files of each, the networks rendered here in plain torch from the files' own names.

The renderings know nothing of ccgpu: they take the entries of the file as its authors' code does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.published import AUTHORS_MEAN

State = dict[str, Tensor]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
CLASSES, HEAD, AUXILIARY = 7, 24, 16  # head channels: the published 512 and 256 are only more of the same


# Files


class Drawn:
    """Entries with drawn values under the names of one layout."""

    def __init__(self, counters: bool) -> None:
        self.state: State = {}
        self.counters = counters  # num_batches_tracked: not in the authors' files
        self.generator = torch.Generator().manual_seed(3)

    def convolution(self, name: str, out: int, into: int, size: int, *, bias: bool = False) -> None:
        fan = into * size**2
        self.state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=self.generator) * (1.5 / fan) ** 0.5
        if bias:
            self.state[f"{name}.bias"] = torch.randn(out, generator=self.generator) * 0.1

    def norm(self, name: str, channels: int) -> None:
        uniform = torch.rand(3, channels, generator=self.generator)
        sign = torch.where(torch.rand(channels, generator=self.generator) < 0.3, -1.0, 1.0)
        self.state[f"{name}.weight"] = (uniform[0] * 0.5 + 0.75) * sign
        self.state[f"{name}.bias"] = torch.randn(channels, generator=self.generator) * 0.1
        self.state[f"{name}.running_mean"] = uniform[1] - 0.5
        self.state[f"{name}.running_var"] = uniform[2] + 0.5
        if self.counters:
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    def stages(self, prefix: str, depth: int, channels: int) -> None:
        for layer, (width, count) in enumerate(zip((64, 128, 256, 512), BLOCKS[depth], strict=True), 1):
            for i in range(count):
                block = f"{prefix}layer{layer}.{i}"
                for j, (out, into, size) in enumerate(
                    [(width, channels, 1), (width, width, 3), (4 * width, width, 1)], 1
                ):
                    self.convolution(f"{block}.conv{j}", out, into, size)
                    self.norm(f"{block}.bn{j}", out)
                # As trained networks have it, so that a hundred blocks do not overflow.
                self.state[f"{block}.bn3.weight"] *= 0.2
                if i == 0:
                    self.convolution(f"{block}.downsample.0", 4 * width, channels, 1)
                    self.norm(f"{block}.downsample.1", 4 * width)
                channels = 4 * width

    def attention(self, name: str, gamma: str, shape: tuple[int, ...]) -> None:
        for part, out in (("query", HEAD // 8), ("key", HEAD // 8), ("value", HEAD)):
            self.convolution(f"{name}.{part}_conv", out, HEAD, 1, bias=True)
        self.state[f"{name}.{gamma}"] = torch.full(shape, 0.8)


def authors_file(depth: int) -> State:
    drawn = Drawn(counters=False)
    for i, (out, into) in enumerate([(64, 3), (64, 64), (128, 64)], 1):
        drawn.convolution(f"conv{i}", out, into, 3)
        drawn.norm(f"bn{i}", out)
    drawn.state["conv1.weight"] /= 60  # their pictures are not divided by anything
    drawn.stages("", depth, 128)
    drawn.convolution("head.conva.0", HEAD, 2048, 3)
    drawn.norm("head.conva.1", HEAD)
    drawn.attention("head.cca", "gamma", (1,))
    drawn.convolution("head.convb.0", HEAD, HEAD, 3)
    drawn.norm("head.convb.1", HEAD)
    drawn.convolution("head.bottleneck.0", HEAD, 2048 + HEAD, 3)
    drawn.norm("head.bottleneck.1", HEAD)
    drawn.convolution("head.bottleneck.3", CLASSES, HEAD, 1, bias=True)
    drawn.convolution("dsn.0", HEAD, 1024, 3, bias=True)
    drawn.norm("dsn.1", HEAD)
    drawn.convolution("dsn.3", CLASSES, HEAD, 1, bias=True)
    return drawn.state


def mmsegmentation_file(depth: int) -> State:
    drawn = Drawn(counters=True)
    for i, (out, into) in zip((0, 3, 6), [(32, 3), (32, 32), (64, 32)], strict=True):
        drawn.convolution(f"backbone.stem.{i}", out, into, 3)
        drawn.norm(f"backbone.stem.{i + 1}", out)
    drawn.stages("backbone.", depth, 64)
    for i, into in enumerate([2048, HEAD]):
        drawn.convolution(f"decode_head.convs.{i}.conv", HEAD, into, 3)
        drawn.norm(f"decode_head.convs.{i}.bn", HEAD)
    drawn.attention("decode_head.cca", "gamma.scale", ())
    drawn.convolution("decode_head.conv_cat.conv", HEAD, 2048 + HEAD, 3)
    drawn.norm("decode_head.conv_cat.bn", HEAD)
    drawn.convolution("decode_head.conv_seg", CLASSES, HEAD, 1, bias=True)
    drawn.convolution("auxiliary_head.convs.0.conv", AUXILIARY, 1024, 3)
    drawn.norm("auxiliary_head.convs.0.bn", AUXILIARY)
    drawn.convolution("auxiliary_head.conv_seg", CLASSES, AUXILIARY, 1, bias=True)
    return drawn.state


def config_text(align_corners: bool, recurrence: int) -> str:
    """What mmsegmentation's checkpoints keep of their config: Python text."""
    return f"""norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='ResNetV1c', depth=50, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1), contract_dilation=True),
    decode_head=dict(
        type='CCHead', in_channels=2048, in_index=3, channels=512, recurrence={recurrence}, dropout_ratio=0.1,
        num_classes=19, norm_cfg=dict(type='SyncBN'), align_corners={align_corners},
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', align_corners={align_corners}))
"""


# Renderings


def convolve(state: State, x: Tensor, name: str, *, stride: int = 1, dilation: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2 * dilation
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride=stride, padding=padding, dilation=dilation)


def batch_norm(state: State, x: Tensor, name: str) -> Tensor:
    weight, bias, mean, variance = (state[f"{name}.{e}"] for e in ("weight", "bias", "running_mean", "running_var"))
    return F.batch_norm(x, mean, variance, weight, bias, eps=1e-5)


def inplace_abn(state: State, x: Tensor, name: str) -> Tensor:
    """InPlaceABN in eval mode, without its activation: (x - mean) / sqrt(var + eps) * (|weight| + eps) + bias."""
    column = (1, -1, 1, 1)
    weight, bias, mean, variance = (
        state[f"{name}.{entry}"].view(column) for entry in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * (weight.abs() + 1e-5) + bias


Norm = Callable[[State, Tensor, str], Tensor]


def stages(state: State, x: Tensor, prefix: str, norm: Norm, *, halved: bool) -> list[Tensor]:
    outputs = []
    for layer, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], 1):
        count = len(
            {name.split(".")[prefix.count(".") + 1] for name in state if name.startswith(f"{prefix}layer{layer}.")}
        )
        for i in range(count):
            block = f"{prefix}layer{layer}.{i}"
            step = stride if i == 0 else 1
            rate = max(dilation // 2, 1) if halved and i == 0 else dilation
            out = norm(state, convolve(state, x, f"{block}.conv1"), f"{block}.bn1").relu()
            out = norm(state, convolve(state, out, f"{block}.conv2", stride=step, dilation=rate), f"{block}.bn2").relu()
            out = norm(state, convolve(state, out, f"{block}.conv3"), f"{block}.bn3")
            if i == 0:
                x = norm(state, convolve(state, x, f"{block}.downsample.0", stride=step), f"{block}.downsample.1")
            x = (out + x).relu()
        outputs.append(x)
    return outputs


def criss_cross(state: State, x: Tensor, name: str, gamma: Tensor) -> Tensor:
    """One loop, position by position: softmax over the row and the column, the position itself once."""
    q, k, v = (convolve(state, x, f"{name}.{part}_conv") for part in ("query", "key", "value"))
    out = torch.empty_like(v)
    height, width = x.shape[2:]
    for i in range(height):
        for j in range(width):
            seen = [(i, b) for b in range(width)] + [(a, j) for a in range(height) if a != i]
            rows, columns = (list(axis) for axis in zip(*seen, strict=True))
            energy = torch.einsum("bc,bcn->bn", q[:, :, i, j], k[:, :, rows, columns])
            out[:, :, i, j] = torch.einsum("bn,bcn->bc", energy.softmax(1), v[:, :, rows, columns])
    return gamma * out + x


def upsampled(logits: Tensor, images: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=align_corners)


def authors_network(state: State, pictures: Tensor, recurrence: int = 2) -> tuple[Tensor, Tensor]:
    """Logits and auxiliary logits of pictures (B, 3, H, W), red, green, blue in 0..255."""
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(1, 3, 1, 1)
    x = pictures.flip(1) - mean  # blue, green, red
    x = inplace_abn(state, convolve(state, x, "conv1", stride=2), "bn1").relu()
    x = inplace_abn(state, convolve(state, x, "conv2"), "bn2").relu()
    x = inplace_abn(state, convolve(state, x, "conv3"), "bn3").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
    *_, layer3, x = stages(state, x, "", inplace_abn, halved=False)

    def leaky(x: Tensor, name: str, norm: str) -> Tensor:
        return F.leaky_relu(inplace_abn(state, convolve(state, x, name), norm), 0.01)

    attended = leaky(x, "head.conva.0", "head.conva.1")
    for _ in range(recurrence):
        attended = criss_cross(state, attended, "head.cca", state["head.cca.gamma"])
    attended = leaky(attended, "head.convb.0", "head.convb.1")
    joined = leaky(torch.cat([x, attended], 1), "head.bottleneck.0", "head.bottleneck.1")
    logits = convolve(state, joined, "head.bottleneck.3")
    auxiliary = convolve(state, leaky(layer3, "dsn.0", "dsn.1"), "dsn.3")
    return upsampled(logits, pictures, True), upsampled(auxiliary, pictures, True)


def mmsegmentation_network(
    state: State, pictures: Tensor, *, align_corners: bool, recurrence: int = 2
) -> tuple[Tensor, Tensor]:
    """Logits and auxiliary logits of pictures (B, 3, H, W), red, green, blue in 0..255."""
    mean = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1)
    x = (pictures - mean) / std
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = convolve(state, x, f"backbone.stem.{i}", stride=stride)
        x = batch_norm(state, x, f"backbone.stem.{i + 1}").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    *_, layer3, x = stages(state, x, "backbone.", batch_norm, halved=True)

    def module(x: Tensor, name: str) -> Tensor:
        return batch_norm(state, convolve(state, x, f"{name}.conv"), f"{name}.bn").relu()

    attended = module(x, "decode_head.convs.0")
    for _ in range(recurrence):
        attended = criss_cross(state, attended, "decode_head.cca", state["decode_head.cca.gamma.scale"])
    attended = module(attended, "decode_head.convs.1")
    logits = convolve(state, module(torch.cat([x, attended], 1), "decode_head.conv_cat"), "decode_head.conv_seg")
    auxiliary = convolve(state, module(layer3, "auxiliary_head.convs.0"), "auxiliary_head.conv_seg")
    return upsampled(logits, pictures, align_corners), upsampled(auxiliary, pictures, align_corners)


# Comparison


def photographs(height: int = 44, width: int = 61) -> Tensor:
    """Pictures of sizes at which rounding up and down in the max-pool differ: 44 -> 22 -> 11 or 12."""
    return torch.randint(256, (2, 3, height, width), generator=torch.Generator().manual_seed(7)).float()


def normalised(net: CCNet, pictures: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    return (pictures - mean) / std


def auxiliary_logits(net: CCNet, images: Tensor) -> Tensor:
    assert net.auxiliary_head is not None
    return upsampled(net.auxiliary_head(net.backbone(images)[0]), images, net.align_corners)


@torch.no_grad()
def assert_same_logits(net: CCNet, pictures: Tensor, logits: Tensor, auxiliary: Tensor) -> None:
    """Equal to 1e-4 of the logits' size, and not for want of anything to compare."""
    assert logits.std() > 0.1
    images = normalised(net, pictures)
    torch.testing.assert_close(net(images), logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    torch.testing.assert_close(
        auxiliary_logits(net, images), auxiliary, rtol=0, atol=1e-4 * auxiliary.abs().max().item()
    )


@pytest.fixture(scope="module")
def authors() -> State:
    return authors_file(50)


@pytest.fixture(scope="module")
def mmsegmentation() -> State:
    return mmsegmentation_file(50)


def saved(content: Any, folder: Path, name: str = "file.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_file_gives_the_authors_logits(authors: State, prefix: str, tmp_path: Path) -> None:
    path = saved({prefix + name: value for name, value in authors.items()}, tmp_path)
    net = CCNet.from_checkpoint(path)
    assert not net.training
    pictures = photographs()
    assert_same_logits(net, pictures, *authors_network(authors, pictures))
    assert net.backbone.mean == AUTHORS_MEAN


def test_authors_file_of_depth_101_and_other_loops(tmp_path: Path) -> None:
    state = authors_file(101)
    assert len(state) == 562, "the entries of the published R-101 files"
    pictures = photographs(33, 24)
    net = CCNet.from_checkpoint(saved(state, tmp_path), recurrence=1)
    assert_same_logits(net, pictures, *authors_network(state, pictures, recurrence=1))


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
    pictures = photographs()
    expected = mmsegmentation_network(mmsegmentation, pictures, align_corners=align_corners, recurrence=3)
    assert_same_logits(net, pictures, *expected)
    assert checkpoint.read(path).labels == {"names": ["a", "b"], "colours": [[1, 2, 3], [4, 5, 6]]}


def test_mmsegmentation_file_without_a_config_says_what_was_assumed(mmsegmentation: State, tmp_path: Path) -> None:
    path = saved({"state_dict": mmsegmentation}, tmp_path)
    found = checkpoint.read(path)
    assert any("align_corners=False" in note for note in found.notes)
    assert any("R = 2" in note for note in found.notes)
    pictures = photographs(24, 33)
    assert_same_logits(
        checkpoint.build(found), pictures, *mmsegmentation_network(mmsegmentation, pictures, align_corners=False)
    )
    chosen = CCNet.from_checkpoint(path, align_corners=True)
    assert_same_logits(chosen, pictures, *mmsegmentation_network(mmsegmentation, pictures, align_corners=True))


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("layout", ["authors", "mmsegmentation"])
def test_converted_file_is_the_same_network(
    layout: str, ending: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    state = request.getfixturevalue(layout)
    original = saved(state, tmp_path)
    target = tmp_path / f"converted{ending}"
    found = checkpoint.read(original)
    net = checkpoint.build(found)
    checkpoint.write(
        target,
        checkpoint.Checkpoint(net.config, net.state_dict(), {"names": ["x"]}, source=found.source, notes=found.notes),
    )
    again = checkpoint.read(target)
    assert (again.labels, again.source, again.notes) == ({"names": ["x"]}, found.source, found.notes)
    other = CCNet.from_checkpoint(target)
    assert other.config == net.config
    images = normalised(net, photographs(24, 33))
    with torch.no_grad():
        assert torch.equal(other(images), net(images))


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
        drawn = Drawn(counters=True)
        drawn.convolution("conv1", 64, 3, 7)
        drawn.norm("bn1", 64)
        drawn.stages("", 50, 64)
        inner = drawn.state
    state = {**inner, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    with pytest.warns(UserWarning, match="drawn anew"):
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


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


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
def test_entries_that_tell_the_network_may_be_missing_too(authors: State, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing was loaded|no such layout") as caught:
        CCNet.from_checkpoint(saved(without(authors, name), tmp_path))
    assert name in str(caught.value) or name == "conv1.weight"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight": torch.zeros(3)},
        {"state_dict": {"weight": torch.zeros(3)}},
        {"state_dict": 3},
        [torch.zeros(3)],
        {"ccgpu": {"format": 99}, "state_dict": {}},
        {"ccgpu": 3, "state_dict": {}},
        {"ccgpu": {"format": 1, "network": {"backbone": "vgg"}}, "state_dict": {"a": torch.zeros(1)}},
        {"ccgpu": {"format": 1, "network": {"wings": 2}}, "state_dict": {"a": torch.zeros(1)}},
        {"ccgpu": {"format": 1, "network": {"backbone": "resnet18"}}, "state_dict": {"a": torch.zeros(1)}},
        {"ccgpu": {"format": 1, "network": {"backbone": "resnet18"}}},
    ],
)
def test_other_files_are_refused_with_a_reason(content: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CCNet.from_checkpoint: .*file\.pth.* must"):
        CCNet.from_checkpoint(saved(content, tmp_path))


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_files_cut_short_are_refused(ending: str, share: float, tmp_path: Path) -> None:
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    path = tmp_path / f"net{ending}"
    checkpoint.write(path, checkpoint.Checkpoint(net.config, net.state_dict()))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cannot be read as one"):
        CCNet.from_checkpoint(path)


def test_files_run_no_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    with pytest.raises(ValueError, match="cannot be read as one"):
        CCNet.from_checkpoint(saved({"state_dict": {}, "meta": Payload()}, tmp_path))
    assert not (tmp_path / "ran").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CCNet.from_checkpoint(tmp_path / "nowhere.pth")


def test_incomplete_weights_are_not_written(tmp_path: Path) -> None:
    net = CCNet("resnet18", 2, head_channels=8, auxiliary=False)
    weights = without(net.state_dict(), "head.bottleneck.3.bias")
    with pytest.raises(ValueError, match=r"missing: head\.bottleneck\.3\.bias"):
        checkpoint.write(tmp_path / "net.pt", checkpoint.Checkpoint(net.config, weights))
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth"):
        checkpoint.write(tmp_path / "net.onnx", checkpoint.Checkpoint(net.config, net.state_dict()))
    assert not list(tmp_path.iterdir())


def test_config_builds_the_same_network() -> None:
    options: dict[str, Any] = {
        "context": "nonlocal",
        "head_channels": 8,
        "auxiliary_channels": 4,
        "halved_dilation": True,
        "mean": (1, 2, 3),
        "std": (4, 5, 6),
    }
    net = CCNet("resnet18", 3, backend="cpu", **options)
    other = CCNet(**json.loads(json.dumps(net.config)))
    assert other.config == net.config
    assert "backend" not in net.config
    assert other.backbone.mean == (1.0, 2.0, 3.0)
    assert str(other) == str(net)
    assert [m.dilation for m in other.modules() if isinstance(m, nn.Conv2d)] == [
        m.dilation for m in net.modules() if isinstance(m, nn.Conv2d)
    ]
