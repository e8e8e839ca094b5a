"""`Prediction` against its definition in NumPy, in float64, for one image (3, H, W) or one frame at a time."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ccgpu.models.prediction import Prediction

Size = tuple[int, int]


def resizing_matrix(old: int, new: int, smooth: bool) -> np.ndarray:
    """Return weights (new, old): a triangle around the centre of the new pixel among the old, with aligned edges."""
    centres = (np.arange(new) + 0.5) * old / new
    reach = max(1.0, old / new) if smooth else 1.0
    weights = np.maximum(0, 1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / reach)
    return weights / weights.sum(axis=1, keepdims=True)


def resize(maps: np.ndarray, size: Size, smooth: bool) -> np.ndarray:
    if maps.shape[1:] == size:
        return maps
    down, right = (resizing_matrix(*sides, smooth) for sides in zip(maps.shape[1:], size, strict=True))
    return down @ maps @ right.T


def windows(net: Callable[[np.ndarray], np.ndarray], image: np.ndarray, window: Size, stride: Size) -> np.ndarray:
    height, width = image.shape[1:]
    padded = np.pad(image, [(0, 0), (0, max(window[0] - height, 0)), (0, max(window[1] - width, 0))])
    starts = [
        sorted({min(step * number, side - window) for number in range(side)})
        for side, window, step in zip(padded.shape[1:], window, stride, strict=True)
    ]
    seen: list[list[list[np.ndarray]]] = [[[] for _ in range(width)] for _ in range(height)]
    for top in starts[0]:
        for left in starts[1]:
            logits = net(padded[:, top : top + window[0], left : left + window[1]])
            for y in range(top, min(top + window[0], height)):
                for x in range(left, min(left + window[1], width)):
                    seen[y][x].append(logits[:, y - top, x - left])
    return np.array([[np.mean(cell, axis=0) for cell in row] for row in seen]).transpose(2, 0, 1)


def defined(net: Callable[[np.ndarray], np.ndarray], image: np.ndarray, prediction: Prediction) -> np.ndarray:
    height, width = image.shape[1:]
    base = np.array([height, width], dtype=np.float64)
    if prediction.short_side is not None:
        long_side = prediction.long_side or 10**9
        if prediction.short_side * max(height, width) <= long_side * min(height, width):
            base = base * prediction.short_side / min(height, width)
        else:
            base = base * long_side / max(height, width)
    if prediction.fit is not None:
        down, right = prediction.fit
        base = base * down / height if down * width <= right * height else base * right / width
    results = []
    for scale in prediction.scales:
        rows, columns = (max(1, int(side + 0.5)) for side in scale * base)
        small = resize(image, (rows, columns), smooth=True)
        for flipped in [False, True][: 1 + prediction.flip]:
            seen = small[:, :, ::-1] if flipped else small
            if prediction.window is not None and prediction.stride is not None:
                logits = windows(net, seen, prediction.window, prediction.stride)
            else:
                logits = net(seen)
            if flipped:
                logits = logits[:, :, ::-1]
            scores = resize(logits, (height, width), smooth=False)
            if prediction.average == "probabilities":
                powers = np.exp(scores - scores.max(axis=0))
                scores = powers / powers.sum(axis=0)
            results.append(scores)
    return np.mean(results, axis=0)


class Uneven(nn.Module):
    """Logits that depend on left and right, on top and bottom, and on the rest of the window."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=generator))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        columns = torch.linspace(0, 1, images.shape[-1], dtype=torch.float64)
        weight = self.weight.to(images.dtype)
        return nn.functional.conv2d(images, weight, padding=1) + images.mean() + columns.to(images.dtype)


def as_arrays(net: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: net(torch.from_numpy(image.copy())[None])[0].detach().numpy()


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    scales=st.lists(st.sampled_from([0.1, 0.5, 0.75, 1.0, 1.25, 1.7]), min_size=1, max_size=3),
    flip=st.booleans(),
    average=st.sampled_from(["logits", "probabilities"]),
    base=st.sampled_from([{}, {"short_side": 5}, {"short_side": 5, "long_side": 9}, {"fit": (7, 10)}]),
    sliding=st.sampled_from([None, ((4, 5), (3, 2)), ((5, 3), (5, 3)), ((20, 20), (7, 7))]),
    seed=st.integers(0, 1000),
)
def test_prediction_equals_its_definition(
    size: Size, scales: list[float], flip: bool, average: str, base: dict[str, Any], sliding: Any, seed: int
) -> None:
    net = Uneven()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    mode, window, stride = ("whole", None, None) if sliding is None else ("sliding", *sliding)
    prediction = Prediction(mode, window, stride, tuple(scales), flip, average, **base)
    # One image a batch, because `Uneven` takes the mean of its batch.
    for image in images:
        got = prediction(net, image[None])
        assert got.shape == (1, 4, *size)
        expected = defined(as_arrays(net), image.numpy(), prediction)
        torch.testing.assert_close(got[0], torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_windows_of_one_pass_are_averaged_as_logits_for_either_average() -> None:
    images = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    options: dict[str, Any] = {"mode": "sliding", "window": (5, 4), "stride": (2, 3)}
    logits = Prediction(**options)(Uneven(), images)
    probabilities = Prediction(**options, average="probabilities")(Uneven(), images)
    torch.testing.assert_close(probabilities, logits.softmax(dim=1))


class Framewise(nn.Module):
    """`Uneven` for clips: each frame by itself."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return torch.stack([Uneven()(frame) for frame in clips.unbind(2)], dim=2)


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("mode", ["whole", "sliding"])
def test_clips_are_predicted_as_their_frames_are(mode: str, average: str) -> None:
    clips = torch.randn(2, 3, 4, 9, 7, dtype=torch.float64)
    prediction = Prediction(mode, (5, 5), (3, 4), (0.75, 1.0, 1.5), True, average)
    got = prediction(Framewise(), clips)
    assert got.shape == (2, 4, 4, 9, 7)
    for index, frame in enumerate(clips.unbind(2)):
        torch.testing.assert_close(got[:, :, index], prediction(Uneven(), frame))
