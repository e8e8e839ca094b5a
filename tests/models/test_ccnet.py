"""CCNet: parameters, outputs, modes, clips, attention maps. gamma is 0 only where a test says so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import attention_map
from ccgpu.models.ccnet import CCNet
from ccgpu.models.context import CONTEXTS
from ccgpu.models.heads import as_frames
from tests.models.problems import clips, network, random_images

# Layout


def convolution(in_channels: int, out_channels: int, size: int, *, bias: bool = False) -> int:
    return in_channels * out_channels * size**2 + bias * out_channels


def head_parameters(layer3: int, layer4: int, channels: int, classes: int, recurrence: int) -> int:
    """Return the parameters of both heads by the paper's description; attention has biases and gamma."""
    norm = 2 * channels
    attention = (
        2 * convolution(channels, channels // 8, 1, bias=True) + convolution(channels, channels, 1, bias=True) + 1
    )
    head = convolution(layer4, channels, 3) + convolution(channels, channels, 3)
    head += convolution(layer4 + channels, channels, 3) + convolution(channels, classes, 1, bias=True) + 3 * norm
    auxiliary = convolution(layer3, channels, 3, bias=True) + norm + convolution(channels, classes, 1, bias=True)
    return head + auxiliary + (attention if recurrence > 0 else 0)


@pytest.mark.parametrize("recurrence", [0, 2])
def test_parameter_count_of_the_papers_network(recurrence: int) -> None:
    with torch.device("meta"):
        net = CCNet("resnet101", 19, recurrence=recurrence)
    # torchvision's ResNet-101 without its classifier; the deep stem has three convolutions for one, and
    # layer1 has 128 input channels instead of 64 in two of its 1x1 convolutions.
    backbone = 44_549_160 - 2049 * 1000 - convolution(3, 64, 7)
    backbone += convolution(3, 64, 3) + convolution(64, 64, 3) + convolution(64, 128, 3) + 2 * (64 + 128)
    backbone += convolution(64, 64, 1) + convolution(64, 256, 1)
    expected = backbone + head_parameters(1024, 2048, 512, 19, recurrence)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected


def test_state_dict_has_the_authors_entries() -> None:
    """Apart from the backbone's prefix, the auxiliary head's name and the batch counters, which theirs lack."""
    with torch.device("meta"):
        names = [name for name in CCNet("resnet101", 19).state_dict() if not name.endswith("num_batches_tracked")]
    theirs = {name.removeprefix("backbone.").replace("auxiliary_head.", "dsn.") for name in names}
    assert len(theirs) == 562
    norm = ("weight", "bias", "running_mean", "running_var")
    expected = {"head.cca.gamma", "head.conva.0.weight", "head.convb.0.weight", "head.bottleneck.0.weight"}
    expected |= {"dsn.0.weight", "dsn.0.bias"}
    expected |= {
        f"{part}.1.{entry}" for part in ("head.conva", "head.convb", "head.bottleneck", "dsn") for entry in norm
    }
    expected |= {f"{part}.3.{entry}" for part in ("head.bottleneck", "dsn") for entry in ("weight", "bias")}
    expected |= {f"head.cca.{part}_conv.{entry}" for part in ("query", "key", "value") for entry in ("weight", "bias")}
    assert {name for name in theirs if name.startswith(("head.", "dsn."))} == expected


def test_norms_and_dropouts_are_plain_so_that_they_can_be_swapped() -> None:
    net = network(dropout=0.3)
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    dropouts = [module for module in net.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    assert {type(module) for module in norms} == {nn.BatchNorm2d}
    assert [(type(module), module.p) for module in dropouts] == [(nn.Dropout2d, 0.3)] * 2
    swapped = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)).eval()
    assert swapped.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(swapped(random_images()), net.eval()(random_images()))


# What is computed


@pytest.mark.parametrize("align_corners", [True, False])
def test_logits_are_upsampled_head_outputs(align_corners: bool) -> None:
    net, images = network(align_corners=align_corners, dropout=0.0), random_images()

    def upsample(logits: Tensor) -> Tensor:
        return F.interpolate(logits, size=(33, 49), mode="bilinear", align_corners=align_corners)

    # Two copies, because a pass in train mode changes the running statistics.
    parts = copy.deepcopy(net)
    outputs = net(images)
    layer3, layer4 = parts.backbone(images)
    torch.testing.assert_close(outputs.logits, upsample(parts.head(layer4)[0]))
    torch.testing.assert_close(outputs.auxiliary, upsample(parts.auxiliary_head(layer3)))
    net.eval()
    coarse = net.head(net.backbone(images)[1])[0]
    torch.testing.assert_close(net(images), upsample(coarse))
    # 33 and 49 are 8 n + 1: with corners aligned every eighth pixel is a position of the feature map.
    same = torch.allclose(net(images)[..., ::8, ::8], coarse, atol=1e-5)
    assert same == align_corners


def test_train_mode_without_auxiliary_head_gives_logits_alone() -> None:
    net = network(auxiliary=False)
    assert net.auxiliary_head is None
    assert not any(name.startswith("auxiliary_head") for name in net.state_dict())
    outputs = net(random_images())
    assert outputs.logits.shape == (2, 5, 33, 49)
    assert outputs.auxiliary is None


@pytest.mark.parametrize("size", [(33, 49), (40, 31), (64, 64), (1, 9)])
def test_logits_have_the_size_of_any_image(size: tuple[int, int]) -> None:
    outputs = network(3)(random_images(*size))
    for logits in (outputs.logits, outputs.auxiliary):
        assert logits.shape == (2, 3, *size)
        assert logits.isfinite().all()


def test_gradients_reach_every_parameter() -> None:
    net = network(recurrence=2)
    logits, auxiliary, _ = net(random_images())
    labels = torch.randint(5, (2, 33, 49), generator=torch.Generator().manual_seed(3))
    (F.cross_entropy(logits, labels) + F.cross_entropy(auxiliary, labels)).backward()
    # A bias before a norm, and a shift of all energies of a query, have no effect: their gradients are 0.
    idle = {"auxiliary_head.0.bias", "head.cca.key_conv.bias"}
    silent = {name for name, parameter in net.named_parameters() if not parameter.grad.abs().max() > 1e-7}
    assert silent <= idle


def test_recurrence_zero_is_the_network_with_gamma_zero() -> None:
    without, with_attention = network(recurrence=0).eval(), network(gamma=0.0).eval()
    assert without.head.cca is None
    missing = without.load_state_dict(with_attention.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all(name.startswith("head.cca.") for name in missing.unexpected_keys)
    assert len(missing.unexpected_keys) == 7
    torch.testing.assert_close(without(random_images()), with_attention(random_images()), rtol=0, atol=0)
    nn.init.ones_(with_attention.head.cca.gamma)
    assert not torch.allclose(without(random_images()), with_attention(random_images()), atol=1e-3)


@pytest.mark.parametrize(("context", "module"), [("rcca", "cca"), ("nonlocal", "context")])
def test_gamma_is_initialised_to_the_argument_of_the_network(context: str, module: str) -> None:
    net = CCNet("resnet18", 5, head_channels=16, context=context, gamma=0.25)
    assert getattr(net.head, module).gamma.item() == 0.25


def test_state_dict_round_trip_gives_the_same_logits(tmp_path: Path) -> None:
    net = network()
    net(random_images())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    torch.manual_seed(9)
    other = CCNet("resnet18", 5, head_channels=16)
    other.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    assert torch.equal(other.eval()(random_images()), net.eval()(random_images()))


@pytest.mark.parametrize("dims", [2, 3])
def test_channels_last_equals_contiguous(dims: int) -> None:
    net, images = network(dims=dims).eval(), random_images() if dims == 2 else clips()
    expected = net(images)
    for parameter in net.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
    if dims == 3:  # the backbone gets the frames without a copy, in channels-last order
        frames = as_frames(images)
        assert frames.data_ptr() == images.data_ptr()
        assert frames.is_contiguous(memory_format=torch.channels_last)


# Context modules, embedding, clips


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_parameter_has_a_part_in_the_outputs(context: str, dims: int) -> None:
    """Distributed training needs a gradient of each parameter (find_unused_parameters=False)."""
    net = network(context=context, dims=dims, embedding=4)
    sum(output.square().mean() for output in net(random_images() if dims == 2 else clips())).backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_a_clip_of_one_frame_is_the_network_for_images() -> None:
    net = network(recurrence=3, dropout=0.0)
    for_clips = network(dims=3, dropout=0.0)
    assert for_clips.head.cca.recurrence == 3  # so that every position has information from every other
    for_clips.load_state_dict(net.state_dict())
    images = random_images()
    outputs, of_clips = net(images), for_clips(images[:, :, None])
    torch.testing.assert_close(of_clips.logits[:, :, 0], outputs.logits)
    torch.testing.assert_close(of_clips.auxiliary[:, :, 0], outputs.auxiliary)
    torch.testing.assert_close(for_clips.eval()(images[:, :, None])[:, :, 0], net.eval()(images))
    assert CCNet("resnet18", 5, head_channels=16).head.cca.recurrence == 2


def test_the_frames_of_a_clip_see_each_other_through_the_attention_alone() -> None:
    clip = clips(4)[:1]
    other = clip.clone()
    other[:, :, 3] += 1
    for context, gamma, together in (
        ("rcca", 0.6, True),
        ("rcca", 0.0, False),
        ("psp", 0.0, False),
        ("nonlocal", 0.6, True),
    ):
        net = network(dims=3, context=context, gamma=gamma, embedding=4).eval()
        before, after = net(clip), net(other)
        assert before.shape == (1, 5, 4, 33, 49)
        assert ((before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-4) == together
        assert net.train()(clip).embedding.shape == (1, 4, 4, 5, 7)


def test_attention_map_of_a_clip() -> None:
    net = network(dims=3, recurrence=1)
    clip = clips(4)[:1]
    row = net.attention_map(clip, (2, 16, 24))
    cross = torch.zeros(4, 5, 7, dtype=torch.bool)
    cross[:, 2, 3], cross[2, :, 3], cross[2, 2] = True, True, True
    assert torch.equal(row[0] > 0, cross)
    torch.testing.assert_close(row.sum(), torch.tensor(1.0))


# Attention maps


@pytest.mark.parametrize(
    ("align_corners", "at", "expected"),
    [
        (True, (0, 0), (0, 0)),
        (True, (64, 128), (8, 16)),
        (True, (3, 4), (0, 1)),
        (True, (35, 83), (4, 10)),
        (False, (0, 0), (0, 0)),
        (False, (64, 128), (8, 16)),
        (False, (7, 8), (1, 1)),
        (False, (35, 83), (4, 11)),
    ],
)
def test_attention_map_of_one_loop_is_the_criss_cross_of_the_nearest_position(
    align_corners: bool, at: tuple[int, int], expected: tuple[int, int]
) -> None:
    """65 x 129 pixels on 9 x 17 positions, 8 pixels apart, or 65 / 9 and 129 / 17 with edges aligned."""
    net = network(recurrence=1, align_corners=align_corners)
    row = net.attention_map(random_images(65, 129), at)
    cross = torch.zeros(9, 17, dtype=torch.bool)
    cross[expected[0]], cross[:, expected[1]] = True, True
    assert row.shape == (2, 9, 17)
    assert torch.equal(row > 0, cross.expand(2, -1, -1))


def test_attention_map_is_computed_by_the_heads_attention_in_eval_mode() -> None:
    net = network(recurrence=2).train()
    net.backbone.eval()
    modes = [module.training for module in net.modules()]
    statistics = net.head.conva[1].running_mean.clone()
    row = net.attention_map(random_images(), (16, 24))
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net.head.conva[1].running_mean, statistics)
    assert all(parameter.grad is None for parameter in net.parameters())
    net.eval()
    features = net.head.conva(net.backbone(random_images())[1])
    torch.testing.assert_close(row, attention_map(net.head.cca, features, (2, 3)))
    torch.testing.assert_close(row.sum((1, 2)), torch.ones(2))
    assert (row > 0).all()


def test_attention_map_works_in_inference_mode() -> None:
    net = network(recurrence=2)
    expected = net.attention_map(random_images(), (0, 0))
    with torch.inference_mode():
        torch.testing.assert_close(net.attention_map(random_images(), (0, 0)), expected)


# Errors


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: CCNet("resnet34"), ValueError, "must be one of .*'resnet101'.*got 'resnet34'"),
        (lambda: network(context="pool"), ValueError, "context must be one of .*'rcca'.*got 'pool'"),
        (lambda: network(dims=1), ValueError, "dims must be 2 or 3, got 1"),
        (lambda: network(embedding=-1), ValueError, "embedding must be 0 or more, got -1"),
        (
            lambda: network(dims=3)(random_images()),
            ValueError,
            r"\(B, 3, T, H, W\) for dims=3, got shape \(2, 3, 33, 49\)",
        ),
        (
            lambda: network(context="psp").attention_map(random_images(), (0, 0)),
            RuntimeError,
            "criss-cross attention, got none",
        ),
        (lambda: network()(random_images(0)), ValueError, r"must have a pixel or more, got shape \(2, 3, 0, 49\)"),
        (lambda: network(dims=3)(clips(0)), ValueError, r"must have a pixel or more, got shape \(2, 3, 0, 33, 49\)"),
        (lambda: network(0), ValueError, "num_classes must be 1 or more, got 0"),
        (lambda: network(2.0), TypeError, "num_classes must be an int, got float"),
        (lambda: CCNet("resnet18", align_corners="no"), TypeError, "align_corners must be a bool, got str"),
        (lambda: CCNet("resnet18", ceil_mode=1), TypeError, "ceil_mode must be a bool, got int"),
        (lambda: CCNet("resnet18", recompute=None), TypeError, "recompute must be a bool, got NoneType"),
        (lambda: network(recurrence=-1), ValueError, "recurrence must be 0 or more, got -1"),
        (lambda: network(head_channels=0), ValueError, "head_channels must be 1 or more"),
        (lambda: network(dropout=1.5), ValueError, "dropout must be from 0 to 1, got 1.5"),
        (lambda: network(stem="5x5"), ValueError, "stem must be one of"),
        (lambda: network()(torch.zeros(3, 33, 33)), ValueError, r"\(B, 3, H, W\) for dims=2, got shape \(3, 33, 33\)"),
        (
            lambda: network()(torch.zeros(1, 1, 33, 33)),
            ValueError,
            r"\(B, 3, H, W\) for dims=2, got shape \(1, 1, 33, 33\)",
        ),
        (
            lambda: network().attention_map(random_images(), (33, 0)),
            ValueError,
            r"inside of \(33, 49\), got \(33, 0\)",
        ),
        (lambda: network().attention_map(random_images(), (0, 0, 0)), ValueError, "must be a position"),
        (lambda: network().attention_map(random_images(), (0.5, 0)), TypeError, "at must be ints"),
        (
            lambda: network(recurrence=0).attention_map(random_images(), (0, 0)),
            RuntimeError,
            "criss-cross attention, got none",
        ),
    ],
)
def test_mistakes_are_named(build: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_under_autocast(dtype: torch.dtype) -> None:
    """In half precision several logits of a pixel would be rounded to the same maximum."""
    torch.manual_seed(0)
    net = CCNet("resnet18", 5, head_channels=16)
    images = torch.randn(2, 3, 33, 41)
    with torch.autocast("cpu", dtype=dtype):
        outputs = net(images)
        half = net.head.conva(torch.randn(1, 512, 4, 5))
    assert half.dtype == dtype
    assert outputs.logits.dtype == outputs.auxiliary.dtype == torch.float32
    rounded = outputs.logits.to(dtype).float()
    assert (outputs.logits != rounded).float().mean() > 0.5


def test_a_network_in_half_precision_stays_there() -> None:
    net = CCNet("resnet18", 5, head_channels=16).bfloat16().eval()
    assert net(torch.randn(1, 3, 33, 41).bfloat16()).dtype == torch.bfloat16


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
