"""Photometric distortion of 8-bit RGB images: brightness, contrast, saturation and hue, as mmsegmentation has it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

BRIGHTNESS = 32.0  # largest value that is added or subtracted
FACTORS = (0.5, 1.5)  # of contrast and of saturation
HUES = (-18, 17)  # of OpenCV's 180 hues, steps of 2 degrees; mmsegmentation's randint(-18, 18) never gives 18
_PILLOWS_HUES = 255  # Pillow's hue is uint8, and 0 and 255 are both red


@dataclass(frozen=True)
class Distortion:
    """A photometric distortion; the default values change nothing.

    Attributes:
        brightness: added to each value, -32 to 32 of 255.
        contrast: each value is multiplied by it, 0.5 to 1.5.
        saturation: the saturation (HSV) is multiplied by it, 0.5 to 1.5.
        hue: added to the hue (HSV), in degrees: -36 to 34 in steps of 2.
        contrast_first: whether contrast comes before saturation and hue, and not after them.
    """

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    contrast_first: bool = True


def draw_distortion(generator: np.random.Generator) -> Distortion:
    """Return a random distortion: each of the four changes with probability 1/2, uniform in its range.

    Args:
        generator: gives nine random numbers, whatever they are.

    Source: PhotoMetricDistortion of mmsegmentation.
    """
    brightened, contrasted, saturated, turned, contrast_first = (bool(coin < 0.5) for coin in generator.random(5))
    brightness = generator.uniform(-BRIGHTNESS, BRIGHTNESS)
    contrast, saturation = generator.uniform(*FACTORS), generator.uniform(*FACTORS)
    hue = 2.0 * generator.integers(HUES[0], HUES[1] + 1)
    return Distortion(
        brightness if brightened else 0.0,
        contrast if contrasted else 1.0,
        saturation if saturated else 1.0,
        hue if turned else 0.0,
        contrast_first,
    )


def distort(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Return a distorted image or clip.

    Brightness comes first, then contrast (or last), saturation, hue. After each step values are clipped to 0..255 and
    truncated to whole numbers, as in mmsegmentation. Saturation and hue are changed in Pillow's HSV, whose hue and
    saturation are whole numbers, 255 hues of 1.4 degrees each: a value differs from the exact one by some units of 255.
    (OpenCV's HSV, which mmsegmentation uses, has 180 hues.)

    Args:
        image: uint8 (H, W, 3) or (T, H, W, 3), red, green, blue.
        distortion: what is changed, all frames alike.

    Returns:
        uint8, of the shape of the image.

    Raises:
        ValueError: the image is not 8-bit RGB.
    """
    if image.dtype != np.uint8 or image.shape[-1] != 3:
        raise ValueError(
            f"distort: image must be 8-bit RGB, uint8 (..., 3), got {image.dtype} {image.shape}; leave photometric "
            "distortion out for other images."
        )
    image = _linear(image, 1.0, distortion.brightness)
    if distortion.contrast_first:
        image = _linear(image, distortion.contrast, 0.0)
    image = _change_hsv(image, distortion.saturation, distortion.hue)
    return image if distortion.contrast_first else _linear(image, distortion.contrast, 0.0)


def _linear(values: np.ndarray, factor: float, summand: float) -> np.ndarray:
    """Return uint8 values multiplied and added to, clipped and truncated."""
    if factor == 1 and summand == 0:
        return values
    changed = values.astype(np.float32) * np.float32(factor) + np.float32(summand)
    return changed.clip(0, 255).astype(np.uint8)


def _change_hsv(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    if saturation == 1 and hue == 0:
        return image
    rows = image.reshape(-1, *image.shape[-2:])  # the frames of a clip below each other: each pixel is by itself
    hsv = np.array(Image.fromarray(rows).convert("HSV"))
    turned = hsv[..., 0].astype(np.int16) + round(hue * _PILLOWS_HUES / 360)
    hsv[..., 0] = turned % _PILLOWS_HUES
    hsv[..., 1] = _linear(hsv[..., 1], saturation, 0.0)
    return np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).reshape(image.shape)
