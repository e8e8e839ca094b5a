"""`Prediction`: windows, scales, flipped images and averages, on networks with known results and on CCNet."""

import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ccgpu.models.ccnet import CCNet
from ccgpu.models.prediction import Prediction, window_starts

Size = tuple[int, int]


@pytest.mark.parametrize(
    ("size", "window", "stride", "starts"),
    [
        (1024, 769, 513, [0, 255]),
        (2048, 769, 513, [0, 513, 1026, 1279]),
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 4, [0]),
        (3, 4, 2, [0]),
        (5, 4, 1, [0, 1]),
        (9, 3, 3, [0, 3, 6]),
    ],
)
def test_window_starts_table(size: int, window: int, stride: int, starts: list[int]) -> None:
    assert window_starts(size, window, stride) == starts


@pytest.mark.parametrize("size", range(1, 15))
@pytest.mark.parametrize("window", [1, 3, 4])
def test_window_starts_cover_every_pixel_within_the_border(size: int, window: int) -> None:
    for stride in range(1, window + 1):
        starts = window_starts(size, window, stride)
        assert len(set(starts)) == len(starts)
        covered = {pixel for start in starts for pixel in range(start, start + window)}
        assert covered == set(range(max(size, window)))


@pytest.mark.parametrize(("window", "stride"), [(4, 5), (4, 0), (0, 0)])
def test_window_starts_refuse_gaps(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride must be in 1..window, got stride {stride} for window {window}"):
        window_starts(10, window, stride)


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_one_scale_of_1_without_flip_is_the_network_bit_for_bit(mode: str) -> None:
    images = torch.randn(2, 3, 9, 13)
    net = nn.Conv2d(3, 5, 3, padding=1)
    prediction = Prediction(mode, window=(9, 13), stride=(4, 4))
    assert torch.equal(prediction(net, images), net(images))
    assert not prediction(net, images).requires_grad
    for base in ({"short_side": 9}, {"fit": (9, 20)}, {"fit": (30, 13)}):
        assert torch.equal(Prediction(**base)(net, images), net(images))


def test_the_sum_is_not_written_into_what_the_network_returned() -> None:
    images = torch.randn(1, 3, 6, 8)
    before = images.clone()
    for scales in ((1.0,), (1.0, 1.0)):
        prediction = Prediction(scales=scales, flip=True)
        torch.testing.assert_close(prediction(nn.Identity(), images), images)
        assert torch.equal(images, before)


class Places(nn.Module):
    """Logits: class 0 is the column of a pixel, class 1 its row, class 2 the image's first channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        columns = torch.arange(width, dtype=images.dtype).expand(len(images), 1, height, width)
        rows = torch.arange(height, dtype=images.dtype)[:, None].expand(len(images), 1, height, width)
        return torch.cat([columns, rows, images[:, :1]], dim=1)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_flip_flips_the_width_not_the_height_and_flips_back(average: str) -> None:
    images = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    got = Prediction(flip=True, average=average)(Places(), images)
    plain = Places()(images)
    other = plain.clone()
    other[:, 0] = 7 - plain[:, 0]
    if average == "probabilities":
        plain, other = plain.softmax(dim=1), other.softmax(dim=1)
    torch.testing.assert_close(got, (plain + other) / 2)


def test_flip_changes_nothing_for_a_network_that_commutes_with_flipped_images() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 7, 10, dtype=torch.float64)
    net = nn.Conv2d(3, 4, 3, padding=1).double()
    uneven = Prediction(flip=True)(net, images)
    torch.testing.assert_close(uneven, (net(images) + net(images.flip(3)).flip(3)).detach() / 2)
    assert (uneven - net(images)).abs().max() > 0.1
    with torch.no_grad():
        net.weight += net.weight.flip(3)
    torch.testing.assert_close(Prediction(flip=True)(net, images), net(images).detach())


def test_flip_exchanges_left_and_right_classes_back() -> None:
    """Class 0 is channel 0 of a pixel; classes 1 and 2 are channel 1 of its left and of its right neighbour."""

    def net(images: torch.Tensor) -> torch.Tensor:
        right = nn.functional.pad(images[:, 1], (1, 0))[..., :-1]
        left = nn.functional.pad(images[:, 1], (0, 1))[..., 1:]
        return torch.stack([images[:, 0], right, left], dim=1)

    images = torch.randn(1, 3, 4, 6)
    torch.testing.assert_close(Prediction(flip=True, flip_pairs=((2, 1),))(net, images), net(images))
    assert (Prediction(flip=True)(net, images) - net(images)).abs().max() > 0.1
    assert torch.equal(Prediction(flip_pairs=((2, 1),))(net, images), net(images))
    with pytest.raises(IndexError):
        Prediction(flip=True, flip_pairs=((2, 3),))(net, images)


def numbered(images: torch.Tensor, number: int, classes: int = 3) -> torch.Tensor:
    """Logits of a call by its number: `number` for class 0, else 0."""
    logits = torch.zeros(len(images), classes, *images.shape[2:], dtype=torch.float64)
    logits[:, 0] = number
    return logits


@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_passes_have_equal_weights_and_are_a_mean(average: str) -> None:
    calls = []

    def net(images: torch.Tensor) -> torch.Tensor:
        calls.append(images.shape[2:])
        return numbered(images, 2 ** len(calls))

    prediction = Prediction(scales=(0.5, 1.0, 1.75), flip=True, average=average)
    got = prediction(net, torch.randn(1, 3, 7, 9))
    assert calls == [(4, 5)] * 2 + [(7, 9)] * 2 + [(12, 16)] * 2
    numbers = [2.0**number for number in range(1, 7)]
    if average == "logits":
        expected = [sum(numbers) / 6, 0.0]
    else:
        first = sum(math.exp(number) / (math.exp(number) + 2) for number in numbers) / 6
        expected = [first, (1 - first) / 2]
    for index, value in enumerate(expected):
        torch.testing.assert_close(got[:, index], torch.full((1, 7, 9), value, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_probabilities_sum_to_1(mode: str) -> None:
    images = torch.randn(2, 3, 11, 7)
    net = nn.Conv2d(3, 6, 3, padding=1)
    options: dict[str, Any] = {"window": (5, 4), "stride": (3, 3), "scales": (0.5, 1.0, 1.5), "flip": True}
    got = Prediction(mode, average="probabilities", **options)(net, images)
    torch.testing.assert_close(got.sum(dim=1), torch.ones(2, 11, 7))
    assert got.min() > 0


class WindowMean(nn.Module):
    """Logits that depend on the whole window, so that windows differ where they overlap."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + images.mean(dim=(-2, -1), keepdim=True)


@pytest.mark.parametrize("frames", [(), (2,)])
def test_sliding_averages_over_the_windows_that_hold_a_pixel(frames: tuple[int, ...]) -> None:
    images = torch.randn(1, 2, *frames, 7, 6, dtype=torch.float64)
    got = Prediction("sliding", window=(4, 5), stride=(3, 2))(WindowMean(), images)
    assert got.shape == images.shape
    for y in range(7):
        for x in range(6):
            seen = [
                images[..., y, x] + images[..., top : top + 4, left : left + 5].mean(dim=(-2, -1))
                for top in (0, 3)
                for left in (0, 1)
                if top <= y < top + 4 and left <= x < left + 5
            ]
            torch.testing.assert_close(got[..., y, x], torch.stack(seen).mean(dim=0))


@pytest.mark.parametrize("frames", [(), (3,)])
def test_sliding_pads_small_images_with_zero_and_cuts_back(frames: tuple[int, ...]) -> None:
    images = torch.randn(1, 2, *frames, 3, 9, dtype=torch.float64)
    got = Prediction("sliding", window=(5, 9), stride=(5, 9))(WindowMean(), images)
    torch.testing.assert_close(got, images + images.sum(dim=(-2, -1), keepdim=True) / 45)


class Sizes(nn.Module):
    """Records the sizes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Size] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(images.shape[-2:]))
        return images


@pytest.mark.parametrize(
    ("options", "size", "seen"),
    [
        ({"scales": (0.75, 1.25)}, (31, 45), [(23, 34), (39, 56)]),
        ({"short_side": 300}, (400, 600), [(300, 450)]),
        ({"short_side": 300}, (512, 341), [(450, 300)]),
        ({"short_side": 30, "scales": (0.5, 2.0)}, (40, 61), [(15, 23), (60, 92)]),
        # mmsegmentation's scales (2048, 512) and (2048, 1024): within both sides, whichever is the nearer limit.
        ({"short_side": 512, "long_side": 2048}, (100, 150), [(512, 768)]),
        ({"short_side": 512, "long_side": 2048}, (1000, 250), [(2048, 512)]),
        ({"short_side": 512, "long_side": 2048}, (100, 500), [(410, 2048)]),
        ({"short_side": 512, "long_side": 2048}, (500, 100), [(2048, 410)]),
        ({"short_side": 1024, "long_side": 2048}, (1024, 2048), [(1024, 2048)]),
        ({"short_side": 1025, "long_side": 2049}, (1024, 2048), [(1025, 2049)]),
        ({"short_side": 20, "long_side": 20, "scales": (0.5, 1.5)}, (10, 40), [(3, 10), (8, 30)]),
        ({"fit": (473, 473)}, (100, 75), [(473, 355)]),
        ({"fit": (473, 473)}, (75, 100), [(355, 473)]),
        ({"fit": (60, 90)}, (100, 100), [(60, 60)]),
        ({"fit": (90, 60), "scales": (0.5,)}, (100, 100), [(30, 30)]),
        ({"scales": (0.01,)}, (3, 80), [(1, 1)]),
        ({"fit": (10, 10)}, (2, 400), [(1, 10)]),
        # 1.5 * 5 is rounded, not 1.5 * (5 / 77) * 77, which is less.
        ({"short_side": 5, "scales": (1.5,)}, (77, 154), [(8, 15)]),
        ({"short_side": 5, "scales": (1.5,)}, (154, 77), [(15, 8)]),
        # Windows keep their size, so that a larger scale has more of them.
        ({"mode": "sliding", "window": (20, 30), "stride": (20, 30), "scales": (1.0, 2.0)}, (20, 30), [(20, 30)] * 5),
        ({"mode": "sliding", "window": (20, 20), "stride": (9, 9), "fit": (20, 20)}, (50, 30), [(20, 20)]),
    ],
)
def test_the_network_sees_these_sizes(options: dict[str, Any], size: Size, seen: list[Size]) -> None:
    net = Sizes()
    images = torch.rand(1, 3, *size)
    assert Prediction(**options)(net, images).shape == images.shape
    assert net.seen == seen


def test_shrunk_images_are_smoothed_as_in_training_and_enlarged_ones_are_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float()
    for size in ((13, 18), (62, 91), (40, 20)):
        net = Images()
        Prediction(fit=size)(net, images)
        height, width = net.seen.shape[2:]
        assert height == size[0] or width == size[1]
        pillow = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
        assert np.abs(net.seen[0].numpy().transpose(1, 2, 0) - pillow).max() < 1.01  # Pillow rounds after each axis


class Images(nn.Module):
    """Stores its last input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return images


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75, 1.25, 1.5, 2.0])
def test_a_ramp_stays_in_place_at_every_scale(scale: float) -> None:
    """Scores that equal the image stay at their pixels: resizing back is the inverse of resizing the image."""
    columns = torch.arange(80, dtype=torch.float64)
    rows = torch.arange(56, dtype=torch.float64)[:, None]
    images = torch.stack([columns.expand(56, 80), rows.expand(56, 80)])[None]
    inside = (..., slice(8, -8), slice(8, -8))  # at the edges nothing is extrapolated
    got = Prediction(scales=(scale,))(nn.Identity(), images)
    torch.testing.assert_close(got[inside], images[inside], rtol=0, atol=0.02)
    net = Images()
    Prediction(scales=(scale,))(net, images)
    corners = nn.functional.interpolate(net.seen, (56, 80), mode="bilinear", align_corners=True)
    assert (corners - images)[inside].abs().max() > 0.05, "aligned corners would move it"


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("options", [{}, {"window": (24, 40), "stride": (16, 24), "mode": "sliding"}])
def test_the_class_of_a_pixel_stays_the_same_over_scales_and_flipped_images(
    average: str, options: dict[str, Any]
) -> None:
    blocks = torch.randint(0, 3, (4, 5), generator=torch.Generator().manual_seed(1))
    classes = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
    images = nn.functional.one_hot(classes, 3).permute(2, 0, 1)[None].float()
    prediction = Prediction(scales=(0.5, 0.75, 1.0, 1.25, 2.0), flip=True, average=average, **options)
    found = prediction(nn.Identity(), images).argmax(dim=1)[0]
    away = (torch.arange(16) >= 3) & (torch.arange(16) < 13)  # 3 pixels or more from the blocks' borders
    middle = away.repeat(4)[:, None] & away.repeat(5)
    assert torch.equal(found[middle], classes[middle])
    assert (found == classes).double().mean() > 0.9


def test_frames_of_a_clip_are_neither_mixed_nor_turned() -> None:
    clips = torch.randn(1, 3, 5, 8, 8)
    torch.testing.assert_close(Prediction(flip=True)(nn.Identity(), clips), clips)
    sizes = Sizes()
    Prediction(scales=(0.5,))(sizes, clips)
    assert sizes.seen == [(4, 4)]


@pytest.mark.parametrize("mode", ["whole", "sliding"])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_scores_are_float32_or_wider(mode: str, dtype: torch.dtype, expected: torch.dtype) -> None:
    def net(images: torch.Tensor) -> torch.Tensor:
        return images.to(dtype)

    images = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    prediction = Prediction(mode, (4, 4), (3, 3), scales=(0.8, 1.0))
    got = prediction(net, images)
    assert got.dtype == expected
    # Rounded once by the network, not again by each sum.
    torch.testing.assert_close(got.double(), prediction(nn.Identity(), images), rtol=0, atol=0.02)


def test_the_logits_of_a_pass_are_freed_before_the_next_one_runs() -> None:
    alive: list[int] = []
    outputs: list[weakref.ref] = []

    def net(images: torch.Tensor) -> torch.Tensor:
        alive.append(sum(output() is not None for output in outputs))
        logits = images * 2
        outputs.append(weakref.ref(logits))
        return logits

    images = torch.randn(1, 3, 9, 9)
    Prediction(scales=(1.0, 1.0, 0.5), flip=True)(net, images)
    assert alive == [0] * 6
    alive.clear()
    Prediction("sliding", (3, 3), (1, 1), scales=(1.0, 1.2))(net, images)
    assert len(alive) == 49 + 81
    assert max(alive) <= 1, "at most the window before"


@pytest.fixture(scope="module")
def ccnet() -> CCNet:
    torch.manual_seed(0)
    net = CCNet("resnet18", 5, head_channels=16).eval()
    gammas = [parameter for name, parameter in net.named_parameters() if name.endswith("gamma")]
    assert gammas
    for gamma in gammas:
        nn.init.constant_(gamma, 0.7)
    return net


@pytest.mark.parametrize("options", [{}, {"mode": "sliding", "window": (48, 48), "stride": (24, 32)}])
def test_ccnet_at_several_scales_and_flipped_commutes_with_flipped_images(
    ccnet: CCNet, options: dict[str, Any]
) -> None:
    images = torch.randn(1, 3, 49, 80)  # windows start at 0 and 32, so a flipped image has them in the same places
    prediction = Prediction(flip=True, **options)
    got = prediction(ccnet, images)
    assert got.shape == (1, 5, 49, 80)
    torch.testing.assert_close(prediction(ccnet, images.flip(3)), got.flip(3), rtol=1e-4, atol=1e-4)
    plain = Prediction(**options)(ccnet, images)
    assert (got - plain).abs().max() > 1e-3
    several = Prediction(flip=True, scales=(0.75, 1.0, 1.25), **options)(ccnet, images)
    assert several.isfinite().all()
    assert (several - got).abs().max() > 1e-3


def test_ccnet_under_autocast(ccnet: CCNet) -> None:
    images = torch.randn(1, 3, 33, 47)
    prediction = Prediction("sliding", (32, 32), (24, 24), (0.75, 1.25), True, "probabilities")
    exact = prediction(ccnet, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = prediction(ccnet, images.contiguous(memory_format=torch.channels_last))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tiles"}, r"Prediction: mode must be one of \('whole', 'sliding'\), got 'tiles'"),
        ({"average": "sum"}, r"Prediction: average must be one of \('logits', 'probabilities'\), got 'sum'"),
        ({"mode": "sliding"}, "Prediction: window and stride must be given for mode sliding, got None and None"),
        ({"mode": "sliding", "window": (4, 4)}, r"got \(4, 4\) and None"),
        ({"mode": "sliding", "stride": (4, 4)}, r"got None and \(4, 4\)"),
        (
            {"mode": "sliding", "window": (4, 4), "stride": (4, 5)},
            r"stride must be in 1\.\.window, got stride 5 for window 4",
        ),
        (
            {"mode": "sliding", "window": (4, 4), "stride": (0, 4)},
            r"stride must be in 1\.\.window, got stride 0 for window 4",
        ),
        ({"scales": ()}, r"Prediction: scales must be one or more numbers from 0.01 to 20.0, got \(\)"),
        ({"scales": (1.0, 0.0)}, r"got \(1\.0, 0\.0\)"),
        ({"scales": (-1.0,)}, r"got \(-1\.0,\)"),
        ({"scales": (math.nan,)}, r"got \(nan,\)"),
        ({"scales": (math.inf,)}, r"got \(inf,\)"),
        ({"short_side": 300, "fit": (4, 4)}, r"short_side and fit must not both be given, got 300 and \(4, 4\)"),
        ({"long_side": 300, "fit": (4, 4)}, r"long_side and fit must not both be given, got 300 and \(4, 4\)"),
        ({"long_side": 300}, "long_side must come with short_side, got 300 alone; give both, or fit"),
        ({"short_side": 300, "long_side": 299}, "long_side must be short_side or more, got 299 for 300"),
        ({"short_side": 0}, "short_side, long_side and fit must be from 1 to 32768 pixels, got 0, None and None"),
        ({"fit": (5, 0)}, r"must be from 1 to 32768 pixels, got None, None and \(5, 0\)"),
        ({"short_side": 5, "long_side": 10**6}, r"must be from 1 to 32768 pixels, got 5, 1000000 and None"),
        ({"short_side": 5, "long_side": 9.5}, r"must be from 1 to 32768 pixels, got 5, 9.5 and None"),
        ({"flip_pairs": ((1, 1),)}, r"flip_pairs must be pairs of different classes, got \(\(1, 1\),\)"),
        ({"flip_pairs": ((1, 2), (2, 3))}, r"got \(\(1, 2\), \(2, 3\)\); name each class once"),
    ],
)
def test_prediction_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prediction(**options)
