"""ResNet against a functional reference implementation, and load_imagenet on files that the tests write."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.resnet import ResNet, load_imagenet

BLOCKS = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}


def layout(depth: int, stem: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of torchvision's (7x7) and the MIT (deep) state dicts, by their definition."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, out_channels: int, in_channels: int, size: int) -> None:
        shapes[f"{name}.weight"] = (out_channels, in_channels, size, size)

    def norm(name: str, channels: int) -> None:
        for entry in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{entry}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    stems = {"7x7": [(64, 3, 7)], "deep": [(64, 3, 3), (64, 64, 3), (128, 64, 3)]}
    for i, (out_channels, in_channels, size) in enumerate(stems[stem], 1):
        convolution(f"conv{i}", out_channels, in_channels, size)
        norm(f"bn{i}", out_channels)
    channels = stems[stem][-1][0]
    for layer, (width, count) in enumerate(zip([64, 128, 256, 512], BLOCKS[depth], strict=True), 1):
        expanded = width if depth == 18 else 4 * width
        for i in range(count):
            block = f"layer{layer}.{i}"
            sizes = [(width, channels, 3), (width, width, 3)]
            if depth > 18:
                sizes = [(width, channels, 1), (width, width, 3), (expanded, width, 1)]
            for j, (out_channels, in_channels, size) in enumerate(sizes, 1):
                convolution(f"{block}.conv{j}", out_channels, in_channels, size)
                norm(f"{block}.bn{j}", out_channels)
            if i == 0 and (layer > 1 or channels != expanded):
                convolution(f"{block}.downsample.0", expanded, channels, 1)
                norm(f"{block}.downsample.1", expanded)
            channels = expanded
    return shapes


def random_state(depth: int, stem: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Return an ImageNet file's entries with random values, without num_batches_tracked, as in old files."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in layout(depth, stem).items():
        if name.endswith(("running_var", ".bn1.weight", ".bn2.weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        elif not name.endswith("num_batches_tracked"):
            state[name] = torch.randn(shape, generator=generator) / max(torch.Size(shape[1:]).numel(), 4) ** 0.5
    channels = 512 if depth == 18 else 2048
    state["fc.weight"] = torch.randn(1000, channels, generator=generator)
    state["fc.bias"] = torch.randn(1000, generator=generator)
    return state


def reference(state: dict[str, Tensor], images: Tensor, depth: int, stem: str) -> tuple[Tensor, Tensor]:
    """Return layer3 and layer4 of the dilated ResNet in eval mode, output stride 8, computed from a state dict."""

    def convolve(x: Tensor, convolution: str, norm: str, **options: Any) -> Tensor:
        size = state[f"{convolution}.weight"].shape[-1]
        options["padding"] = (size // 2) * options.get("dilation", 1)
        x = F.conv2d(x, state[f"{convolution}.weight"], **options)
        mean, variance, weight, bias = (
            state[f"{norm}.{entry}"] for entry in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias)

    x = convolve(images, "conv1", "bn1", stride=2).relu()
    if stem == "deep":
        x = convolve(convolve(x, "conv2", "bn2").relu(), "conv3", "bn3").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
    outputs = []
    for layer, (stride, dilation) in enumerate([(1, 1), (2, 1), (1, 2), (1, 4)], 1):
        for i in range(BLOCKS[depth][layer - 1]):
            block = f"layer{layer}.{i}"
            step = stride if i == 0 else 1
            first = {"stride": step, "dilation": dilation} if depth == 18 else {}
            out = convolve(x, f"{block}.conv1", f"{block}.bn1", **first).relu()
            second = {"dilation": dilation, "stride": 1 if depth == 18 else step}
            out = convolve(out, f"{block}.conv2", f"{block}.bn2", **second)
            if depth > 18:
                out = convolve(out.relu(), f"{block}.conv3", f"{block}.bn3")
            if f"{block}.downsample.0.weight" in state:
                x = convolve(x, f"{block}.downsample.0", f"{block}.downsample.1", stride=step)
            x = (out + x).relu()
        outputs.append(x)
    return outputs[2], outputs[3]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imagenet") / "resnet18.pth"
    torch.save(random_state(18, "7x7"), path)
    return path


# The network


@pytest.mark.parametrize("stem", ["7x7", "deep"])
@pytest.mark.parametrize("depth", [18, 50, 101])
def test_state_dict_has_the_names_and_shapes_of_the_imagenet_files(depth: int, stem: str) -> None:
    with torch.device("meta"):
        state = ResNet(depth, stem=stem).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == layout(depth, stem)


@pytest.mark.parametrize(("depth", "total"), [(18, 11_689_512), (50, 25_557_032), (101, 44_549_160)])
def test_parameter_count_is_torchvisions(depth: int, total: int) -> None:
    """The published counts include the classifier, which a backbone does not have: 1000 classes and their bias."""
    with torch.device("meta"):
        resnet = ResNet(depth, stem="7x7")
    classifier = (resnet.channels[1] + 1) * 1000
    assert sum(parameter.numel() for parameter in resnet.parameters()) + classifier == total


@pytest.mark.parametrize(("depth", "stem"), [(18, "7x7"), (18, "deep"), (50, "7x7"), (101, "deep")])
def test_features_equal_the_reference(depth: int, stem: str, tmp_path: Path) -> None:
    state = random_state(depth, stem)
    torch.save(state, tmp_path / "weights.pth")
    resnet = ResNet(depth, stem=stem).eval()
    load_imagenet(resnet, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 41, 25, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs, expected = resnet(images), reference(state, images, depth, stem)
    for ours, theirs, channels in zip(outputs, expected, resnet.channels, strict=True):
        assert ours.shape[1] == channels
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("stem", ["7x7", "deep"])
@pytest.mark.parametrize(("size", "expected"), [((769, 769), (97, 97)), ((1024, 2048), (129, 257))])
def test_map_size_is_the_papers(stem: str, size: tuple[int, int], expected: tuple[int, int]) -> None:
    with torch.device("meta"):
        layer3, layer4 = ResNet(101, stem=stem)(torch.empty(1, 3, *size))
    assert layer3.shape == (1, 1024, *expected)
    assert layer4.shape == (1, 2048, *expected)


def test_map_size_follows_its_formula_for_every_extent() -> None:
    with torch.device("meta"):
        resnet = ResNet(18)
        for extent in range(1, 18):  # every remainder of 8, twice
            layer3, layer4 = resnet(torch.empty(2, 3, extent, 64))
            assert layer3.shape[2:] == layer4.shape[2:] == ((extent + 1) // 8 + 1, 9)


@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations", "extent"),
    [
        (8, [1, 2, 1, 1], [1, 1, 2, 4], 9),
        (16, [1, 2, 2, 1], [1, 1, 1, 2], 5),
        (32, [1, 2, 2, 2], [1, 1, 1, 1], 3),
    ],
)
@pytest.mark.parametrize("depth", [18, 50])
def test_strides_and_dilations(
    depth: int, output_stride: int, strides: list[int], dilations: list[int], extent: int
) -> None:
    with torch.device("meta"):
        resnet = ResNet(depth, output_stride=output_stride)
        assert resnet(torch.empty(1, 3, 65, 65))[1].shape[2:] == (extent, extent)
    stages = [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    for stage, stride, dilation in zip(stages, strides, dilations, strict=True):
        three = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert {m.dilation for m in three} == {(dilation, dilation)}
        assert [m.stride[0] for m in three] == [stride] + [1] * (len(three) - 1)


def test_weights_start_from_he_normal() -> None:
    torch.manual_seed(0)
    resnet = ResNet(18)
    for module in (resnet.conv3, resnet.layer2[0].downsample[0], resnet.layer4[1].conv2):
        fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    resnet = ResNet(18)
    sum(output.square().mean() for output in resnet(torch.randn(2, 3, 33, 33))).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in resnet.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 34}, r"depth must be one of \(18, 50, 101\), got 34"),
        ({"depth": 18, "stem": "5x5"}, r"stem must be one of \('deep', '7x7', 'v1c'\), got '5x5'"),
        ({"depth": 18, "output_stride": 4}, r"output_stride must be one of \(8, 16, 32\), got 4"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**arguments)


# ImageNet files


@pytest.mark.parametrize(("depth", "stem"), [(18, "7x7"), (50, "deep")])
@pytest.mark.parametrize("counters", [False, True])
def test_load_imagenet_copies_every_entry(depth: int, stem: str, counters: bool, tmp_path: Path) -> None:
    state = random_state(depth, stem)
    if counters:
        names = [name for name in layout(depth, stem) if name.endswith("num_batches_tracked")]
        state.update({name: torch.tensor(7) for name in names})
    torch.save(state, tmp_path / "weights.pth")
    resnet = ResNet(depth, stem=stem)
    load_imagenet(resnet, str(tmp_path / "weights.pth"))
    for name, value in resnet.state_dict().items():
        expected = state[name] if name in state else torch.tensor(0)
        assert torch.equal(value, expected), name


def test_load_imagenet_reads_files_of_old_torch(tmp_path: Path) -> None:
    state = random_state(18, "7x7")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    resnet = ResNet(18, stem="7x7")
    load_imagenet(resnet, tmp_path / "old.pth")
    assert torch.equal(resnet.conv1.weight, state["conv1.weight"])


def refuse(resnet: ResNet, path: Path, *messages: str) -> None:
    """load_imagenet names the path and all messages in one ValueError, and resnet stays as it is."""
    before = {name: value.clone() for name, value in resnet.state_dict().items()}
    with pytest.raises(ValueError, match="load_imagenet: ") as caught:
        load_imagenet(resnet, path)
    for message in (str(path), *messages):
        assert message in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())


def test_load_imagenet_lists_all_differences_and_loads_nothing(tmp_path: Path) -> None:
    state = random_state(18, "7x7")
    del state["layer4.1.bn2.running_mean"]
    state["layer2.0.conv1.weight"] = torch.zeros(128, 64, 1, 1)
    state["layer9.weight"] = torch.zeros(3)
    state["bn1.bias"] = torch.zeros(64, dtype=torch.int64)
    torch.save(state, tmp_path / "odd.pth")
    refuse(
        ResNet(18, stem="7x7"),
        tmp_path / "odd.pth",
        "got 4 that do not",
        "missing: layer4.1.bn2.running_mean (512,)",
        "misshapen: layer2.0.conv1.weight must be (128, 64, 3, 3), got (128, 64, 1, 1)",
        "surplus: layer9.weight (3,)",
        "wrong kind: bn1.bias must be like torch.float32, got torch.int64",
    )


def test_load_imagenet_tells_stems_and_depths_apart(small_file: Path, tmp_path: Path) -> None:
    refuse(ResNet(18), small_file, "a ResNet-18 with a deep stem, got a ResNet-18 with a 7x7 stem")
    with torch.device("meta"):
        network = ResNet(50, stem="7x7")
    with pytest.raises(ValueError, match="a ResNet-50 with a 7x7 stem, got a ResNet-18 with a 7x7 stem"):
        load_imagenet(network, small_file)
    torch.save({name: torch.zeros(shape) for name, shape in layout(50, "deep").items()}, tmp_path / "fifty.pth")
    refuse(ResNet(18), tmp_path / "fifty.pth", "a ResNet-18 with a deep stem, got a ResNet-50 with a deep stem")


class Malice:
    """A pickle of this would run a command on loading."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
def test_load_imagenet_runs_no_code(zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "code.pth", tmp_path / "ran"
    if zipped:
        torch.save({"conv1.weight": Malice(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Malice(marker)))
    refuse(ResNet(18), path, "cannot be read")
    assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_load_imagenet_refuses_files_cut_short(legacy: bool, tmp_path: Path) -> None:
    whole = tmp_path / "whole.pth"
    torch.save({"conv1.weight": torch.randn(64, 3, 7, 7)}, whole, _use_new_zipfile_serialization=not legacy)
    content, cut = whole.read_bytes(), tmp_path / "cut.pth"
    resnet = ResNet(18)
    for length in [0, 1, 2, 3, 10, 20, 40, 80, 160, 320, 640, len(content) // 2, len(content) - 30]:
        cut.write_bytes(content[:length])
        refuse(resnet, cut, "cannot be read")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(3)], "must hold a state dict, got a list"),
        ({}, "got an empty dict"),
        (
            {"state_dict": {"conv1.weight": torch.zeros(3)}, "epoch": 3},
            "got other entries: state_dict, epoch",
        ),
        ({"a": torch.zeros(3)}, "surplus: a (3,)"),
    ],
)
def test_load_imagenet_refuses_other_content(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    refuse(ResNet(18), tmp_path / "other.pth", message)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04 no zip"]
)
def test_load_imagenet_refuses_files_that_are_no_pickle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(content)
    refuse(ResNet(18), tmp_path / "page.pth", "cannot be read")


def test_load_imagenet_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_imagenet(ResNet(18), tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        load_imagenet(ResNet(18), tmp_path)
