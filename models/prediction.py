"""From a network to class scores of a whole image: sliding windows, several scales and flipped images, averaged.

`Prediction` is the evaluation that papers report (multi-scale and flip). One image of any size, in bounded memory:
`models/tiles.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ccgpu.models.network_input import resize

Network = Callable[[Tensor], Tensor]
MULTI_SCALE = (0.75, 1.0, 1.25)  # Huang et al., TPAMI 2020, section 4.2
MODES, AVERAGES = ("whole", "sliding"), ("logits", "probabilities")
# Beyond these, a mistyped number asks for more memory than there is, or leaves nothing of an image.
SCALES = (0.01, 20.0)
SIZES = ("short_side", "long_side", "fit")
LARGEST_SIDE = 32768  # pixels


@dataclass(frozen=True)
class Prediction:
    """Class scores at the size of the images, averaged over n passes of the network.

        scores = 1/n sum over scales s and, with flip, m in (plain, flipped):
                 full(m(logits(m(image resized to round(s * base)))))             average "logits"
                 softmax(full(m(logits(m(image resized to round(s * base))))))    average "probabilities"

    round takes halves up; m flips an image along the width and is its own inverse. base is the image's size, or the
    size that short_side and long_side, or fit, give, with the image's aspect ratio:

        base = size * min(short_side / min(size), long_side / max(size))

    `full` resizes logits to the image's size. Images and logits that already have the right size are not resampled: at
    the single scale 1, without flip, the logits are the network's, bit for bit.

    Logits and images are both resized bilinearly with aligned edges (align_corners=False), so that resizing the logits
    back is the inverse of resizing the image and a score stays on its pixel. (CCNet's own upsampling has
    align_corners=True: its feature positions lie on pixels 0, 8, 16, ..., which is another grid.) Images that are
    shrunk are smoothed (antialias), as in training; logits are not.

    sliding: logits[y, x] = mean over the windows that contain (y, x) of the window's logits there

    Windows of one pass are always averaged as logits, whatever `average` is. The last window of each axis ends at the
    border. An image smaller than a window is padded at the bottom and right with 0, the mean colour after
    normalisation, and the logits are cropped back. Window and stride are in pixels of the resized image and the same
    at every scale, as in the authors' code.

    Memory: the sum over the passes, the current pass, and the network's own for one window.

    Attributes:
        mode: "whole" or "sliding"; the paper's results are for "sliding".
        window: (height, width) in pixels, for sliding; the paper's is (769, 769). Ignored for whole.
        stride: step (down, right) in pixels, 1 .. window, for sliding; the authors' is (513, 513). Ignored for whole.
        scales: factors of the base size, in `SCALES`; CCNet's multi-scale evaluation has (0.75, 1.0, 1.25) and
            flip.
        flip: whether each scale is also predicted flipped.
        average: average of "logits", as in the authors' code, or of "probabilities", as in mmsegmentation.
        short_side: the shorter side of the base size in pixels, 1 or more.
        long_side: with short_side: the longer side is at most this, short_side or more pixels; a longer image has a
            base size of this longer side instead. mmsegmentation's scale (2048, 512), which keeps the ratio, is
            long_side 2048 and short_side 512.
        fit: (height, width) in pixels; the base size is the largest that fits into it. It excludes short_side and
            long_side.
        flip_pairs: pairs of classes that flipping an image exchanges, such as left and right arm: their scores are
            exchanged back after flipping.

    Raises:
        ValueError: an attribute is out of its range.

    Source: the authors' evaluate.py (windows, scales and averaged logits), without two of its oddities: it flips
        flipped scores back along the height, and does not resize scores of other scales; mmsegmentation's test-time
        augmentation.

    Examples:
        >>> import torch
        >>> from ccgpu.models.prediction import Prediction
        >>> images = torch.rand(1, 3, 9, 13)
        >>> net = torch.nn.Conv2d(3, 5, 1)
        >>> torch.equal(Prediction()(net, images), net(images))
        True
        >>> prediction = Prediction("sliding", window=(6, 6), stride=(4, 4), scales=(0.75, 1.25), flip=True)
        >>> prediction(net, images).shape
        torch.Size([1, 5, 9, 13])
    """

    mode: str = "whole"
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: str = "logits"
    short_side: int | None = None
    long_side: int | None = None
    fit: tuple[int, int] | None = None
    flip_pairs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, value, choices in (("mode", self.mode, MODES), ("average", self.average, AVERAGES)):
            if value not in choices:
                raise ValueError(f"Prediction: {name} must be one of {choices}, got {value!r}; pass one of these.")
        if self.mode == "sliding":
            if self.window is None or self.stride is None:
                raise ValueError(
                    f"Prediction: window and stride must be given for mode sliding, got {self.window} and "
                    f"{self.stride}; give both as (height, width) in pixels."
                )
            for window, stride in zip(self.window, self.stride, strict=True):
                if window > LARGEST_SIDE:
                    raise ValueError(
                        f"Prediction: window must be at most {LARGEST_SIDE} pixels a side, got {self.window}; a "
                        "smaller image is padded to it."
                    )
                window_starts(window, window, stride)
        if not isinstance(self.flip, bool):
            raise ValueError(f"Prediction: flip must be True or False, got {self.flip!r}; pass one of these.")
        numbers = all(isinstance(scale, Real) for scale in self.scales)
        if not self.scales or not numbers or not all(SCALES[0] <= scale <= SCALES[1] for scale in self.scales):
            raise ValueError(
                f"Prediction: scales must be one or more numbers from {SCALES[0]} to {SCALES[1]}, got {self.scales}; "
                "(1.0,) is the base size."
            )
        sides = [side for side in (self.short_side, self.long_side, *(self.fit or ())) if side is not None]
        whole = all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
        if not whole or not all(1 <= side <= LARGEST_SIDE for side in sides):
            raise ValueError(
                f"Prediction: short_side, long_side and fit must be from 1 to {LARGEST_SIDE} pixels, got "
                f"{self.short_side!r}, {self.long_side!r} and {self.fit}; choose another size."
            )
        if problem := size_problem(self.short_side, self.long_side, self.fit, ("short_side", "long_side", "fit")):
            raise ValueError(f"Prediction: {problem}.")
        exchanged = [index for pair in self.flip_pairs for index in pair]
        if len(set(exchanged)) != 2 * len(self.flip_pairs):
            raise ValueError(
                f"Prediction: flip_pairs must be pairs of different classes, got {self.flip_pairs}; "
                "name each class once."
            )

    def preparation(self) -> dict[str, Any]:
        """Return how the network's own evaluation predicts, as plain values for its file.

        These are mode, and short_side, long_side, fit, flip_pairs, for sliding windows also window and stride, each if
        it is set. Scales, flip and average belong to one evaluation and are left out.
        """
        sliding = {"window": self.window, "stride": self.stride} if self.mode == "sliding" else {}
        size = {"short_side": self.short_side, "long_side": self.long_side, "fit": self.fit}
        pairs = [list(pair) for pair in self.flip_pairs]
        values = {"mode": self.mode, **sliding, **size, "flip_pairs": pairs}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value}

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> Prediction:
        """Return the prediction with these plain values: the inverse of `preparation`.

        Raises:
            TypeError, ValueError: the values are not such.
        """
        if not {*stored} <= {"mode", "window", "stride", *SIZES, "flip_pairs"}:
            raise ValueError(f"Prediction: values must be those of preparation, got {[*stored]}; leave others out.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        return cls(**values)

    @classmethod
    def of_images(cls, stored: Mapping[str, Any]) -> Prediction:
        """Return how people's own images are predicted: whole, at the size and with the flip pairs of a file.

        Args:
            stored: from `preparation`.
        """
        return cls.from_plain({name: value for name, value in stored.items() if name in (*SIZES, "flip_pairs")})

    def resized(
        self, short_side: int | None = None, long_side: int | None = None, fit: Sequence[int] | None = None
    ) -> Prediction:
        """Return this prediction at another size; what is None stays, unless what is given excludes it.

        Raises:
            ValueError: the sizes are out of their range or do not fit each other.
        """
        if fit is not None:
            return dataclasses.replace(self, short_side=short_side, long_side=long_side, fit=(fit[0], fit[1]))
        given = {"short_side": short_side, "long_side": long_side}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self, **changes, fit=None) if changes else self

    @torch.no_grad()
    def __call__(self, net: Network, images: Tensor) -> Tensor:
        """Return the scores of images or clips of any size.

        Args:
            net: in eval mode, images (B, 3, h, w) or clips (B, 3, T, h, w) -> logits of the same size with the
                classes instead of the channels.
            images: (B, 3, H, W) or (B, 3, T, H, W), normalised.

        Returns:
            (B, classes, H, W) or (B, classes, T, H, W), float32 or wider, on the images' device: logits, or
            probabilities, which sum to 1 over the classes; not differentiable.

        Raises:
            IndexError: `flip_pairs` names a class that the logits do not have.
        """
        size = images.shape[-2:]
        base = self._base_size(*size)
        total: Tensor | None = None
        for scale in self.scales:
            seen = resize(images, [_pixels(scale * side) for side in base], antialias=True)
            for flipped in (False, True) if self.flip else (False,):
                scores = self._pass(net, seen, size, flipped)
                # Copied, because the network may still use the tensor that it returned.
                total = scores.clone() if total is None else total.add_(scores)
                del scores  # the next pass needs the memory
        assert total is not None  # there is at least one scale
        return total.div_(len(self.scales) * (1 + self.flip))

    def seen_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size (height, width) at which the network sees an image at scale 1."""
        rows, columns = (_pixels(side) for side in self._base_size(height, width))
        return rows, columns

    def _pass(self, net: Network, seen: Tensor, size: Sequence[int], flipped: bool) -> Tensor:
        """Return the scores at `size` of the resized image `seen`, predicted plain or flipped."""
        if flipped:
            logits = self._exchange(self._logits(net, seen.flip(-1)).flip(-1))
        else:
            logits = self._logits(net, seen)
        full = resize(logits, size)
        return full.softmax(dim=1) if self.average == "probabilities" else full

    def _base_size(self, height: int, width: int) -> tuple[float, float]:
        ratios = [(1, 1)]
        if self.short_side is not None:
            ratios = [(self.short_side, min(height, width))]
            ratios += [] if self.long_side is None else [(self.long_side, max(height, width))]
        if self.fit is not None:
            ratios = [*zip(self.fit, (height, width), strict=True)]
        new, old = min(ratios, key=lambda sides: sides[0] / sides[1])
        # Multiplying before dividing makes the requested side exact, so that s * base is rounded as in the formula.
        return height * new / old, width * new / old

    def _logits(self, net: Network, images: Tensor) -> Tensor:
        """Return the logits of one pass at the size of `images`, float32 or wider."""
        if self.mode == "whole":
            logits = net(images)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        assert self.window is not None  # __post_init__ has checked it
        assert self.stride is not None
        return _sliding_logits(net, images, self.window, self.stride)

    def _exchange(self, scores: Tensor) -> Tensor:
        """Return the scores with the two classes of each pair of `flip_pairs` exchanged."""
        if not self.flip_pairs:
            return scores
        order = list(range(scores.shape[1]))
        for one, other in self.flip_pairs:
            order[one], order[other] = other, one
        return scores[:, order]


def size_problem(short_side: int | None, long_side: int | None, fit: Sequence[int] | None, names: Sequence[str]) -> str:
    """Return why the three sizes of a `Prediction` do not fit each other; empty where they do.

    Args:
        short_side, long_side, fit: as in `Prediction`.
        names: how the message calls the three.
    """
    short, long, largest = names
    if fit is not None and not short_side is long_side is None:
        other = long if short_side is None else short
        value = long_side if short_side is None else short_side
        return f"{other} and {largest} must not both be given, got {value} and {tuple(fit)}; leave one out"
    if long_side is not None and short_side is None:
        return f"{long} must come with {short}, got {long_side} alone; give both, or {largest}"
    if long_side is not None and short_side is not None and long_side < short_side:
        return f"{long} must be {short} or more, got {long_side} for {short_side}; give both"
    return ""


def _pixels(side: float) -> int:
    """Return a side as whole pixels, halves up: (2049, 1025) makes 1025x2049 of 1024x2048, as in mmsegmentation."""
    return max(1, math.floor(side + 0.5))


class NonFiniteScores(RuntimeError):
    """The network returned NaN or infinite scores; the message says what to do."""


def require_finite(scores: Tensor, of: str) -> None:
    """Raise NonFiniteScores, naming `of`, if a score is NaN or infinite; this waits for the scores' device.

    It takes a fortieth of the time of their argmax (19 classes, 1024 x 2048, one core).
    """
    if scores.numel() and not torch.stack(torch.aminmax(scores)).isfinite().all():  # aminmax passes NaN on
        raise NonFiniteScores(
            f"the network's scores of {of} must be finite, got NaN or infinity; with --amp fp16, values above 65504 "
            "overflow: use --amp bf16 or off; otherwise its weights are damaged or diverged: use another checkpoint"
        )


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Return where windows start along an axis of `size` pixels: every `stride`, the last ends at the border.

    Raises:
        ValueError: window or stride below 1, or a stride above the window, which would leave gaps.
    """
    if window < 1 or not 1 <= stride <= window:
        raise ValueError(
            f"window_starts: stride must be in 1..window, got stride {stride} for window {window}; lower the stride."
        )
    last = max(size - window, 0)
    return [*range(0, last, stride), last]


def _sliding_logits(net: Network, images: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Return the logits of the images, averaged over all windows that contain a pixel."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, max(window[1] - width, 0), 0, max(window[0] - height, 0)))
    size = padded.shape[-2:]
    total: Tensor | None = None
    count = torch.zeros(size, device=images.device)
    for top in window_starts(size[0], window[0], stride[0]):
        for left in window_starts(size[1], window[1], stride[1]):
            here = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = net(padded[here])
            if total is None:
                wide = torch.promote_types(logits.dtype, torch.float32)
                total = torch.zeros(*logits.shape[:-2], *size, dtype=wide, device=images.device)
            total[here] += logits
            count[here] += 1
    assert total is not None  # window_starts is never empty
    return total.div_(count)[..., :height, :width]
