"""Drawing results: input, truth and prediction side by side, contact sheets, attention maps over an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ccgpu.models.colouring import colour_mask, ignore_colour
from ccgpu.models.fonts import font_and_texts
from ccgpu.models.labels import IGNORE
from ccgpu.models.legend import Entry, draw_legend, text_size, with_legend

GAP = 4  # pixels between two images
# Colours of attention from low, where the overlay is transparent, to high: red, orange, pale yellow (RGB 0..255).
HEAT = np.array([[60, 0, 40], [190, 10, 30], [250, 130, 20], [255, 250, 170]], dtype=np.float64)
MARK = (0, 255, 255)  # RGB of the ring around the chosen pixel
HEAT_OPACITY = 0.8  # of the overlay where attention is highest; it is 0 where there is none


def side_by_side(
    image: np.ndarray,
    truth: torch.Tensor | np.ndarray,
    prediction: torch.Tensor | np.ndarray,
    colours: np.ndarray,
    names: Sequence[str],
) -> Image.Image:
    """Return input, truth and prediction in one row, with captions, above a legend of the classes in the two.

    Args:
        image: uint8 (H, W, 3), RGB.
        truth: (H, W), 0 .. K - 1, or 255 for pixels that are not scored.
        prediction: (H, W), 0 .. K - 1.
        colours: uint8 (K, 3), RGB.
        names: K names.

    Returns:
        An RGB image, 3 W + 8 pixels wide or, where the legend of a small image needs more, wider.

    Raises:
        ValueError: the sizes differ, or a value is no class.
    """
    panels = [image, colour_mask(truth, colours), colour_mask(prediction, colours)]
    if len({panel.shape for panel in panels}) != 1:
        raise ValueError(
            f"side_by_side: truth and prediction must have the image's size {image.shape[:2]}, got "
            f"{tuple(truth.shape)} and {tuple(prediction.shape)}; resize the logits first."
        )
    height, width = image.shape[:2]
    wide = 3 * width + 2 * GAP
    size = text_size(height, wide)
    top = caption_height(size)
    sheet = Image.new("RGB", (wide, height + top), "white")
    draw = ImageDraw.Draw(sheet)
    font, captions = font_and_texts(("image", "mask", "prediction"), size)
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = index * (width + GAP)
        draw.text((left + 2, 2), caption, fill="black", font=font)
        sheet.paste(Image.fromarray(panel), (left, top))
    pixels = np.bincount(np.concatenate([np.ravel(truth), np.ravel(prediction)]), minlength=IGNORE + 1)
    shown = [index for index in np.argsort(-pixels[:IGNORE], kind="stable") if pixels[index]]  # the largest first
    entries: list[Entry] = [(names[index], colours[index].tolist()) for index in shown]
    if pixels[IGNORE]:
        entries.append(("not scored", ignore_colour(colours)))
    return with_legend(sheet, draw_legend(entries, wide, size))


def caption_height(size: int) -> int:
    """Return the height of a caption above an image whose text has this size, both in pixels."""
    return round(1.45 * size)


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return a copy of an image, shrunk to at most side x side pixels; smaller ones keep their size."""
    share = min(1.0, side / max(image.size))
    size = (max(1, round(share * image.width)), max(1, round(share * image.height)))
    # Reduced by whole numbers first, which takes the time and memory of the small image.
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def contact_sheet(cells: Sequence[tuple[str, Image.Image]], legend: Sequence[Entry], columns: int) -> Image.Image:
    """Return images with captions in rows of `columns`, above a legend of classes.

    Args:
        cells: (caption, RGB image) of each cell, one or more.
        legend: (name, RGB colour) of each class; may be empty.
        columns: 1 or more.

    Returns:
        An RGB image; each cell is as large as the largest image.
    """
    wide = max(image.width for _, image in cells)
    columns = min(columns, len(cells))
    width = columns * (wide + GAP) + GAP
    rows = -(-len(cells) // columns)
    size = text_size(0, 2 * wide)  # small enough for the captions of single cells
    top = caption_height(size)
    high = max(image.height for _, image in cells) + top
    font, captions = font_and_texts([caption for caption, _ in cells], size)
    sheet = Image.new("RGB", (width, rows * (high + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, (_, image)) in enumerate(zip(captions, cells, strict=True)):
        left, above = GAP + index % columns * (wide + GAP), GAP + index // columns * (high + GAP)
        while font.getlength(caption) > wide and len(caption) > 1:
            caption = "\u2026" + caption[2:] if caption.startswith("\u2026") else "\u2026" + caption[1:]
        draw.text((left, above + 2), caption, fill="black", font=font)
        sheet.paste(image, (left, above + top))
    return with_legend(sheet, draw_legend(legend, width, size)) if legend else sheet


def attention_overlay(
    image: np.ndarray, attention: torch.Tensor, at: tuple[int, int], *, align_corners: bool
) -> Image.Image:
    """Return an image with the attention map of a pixel over it, brighter for higher weights, and a ring at the pixel.

    The map is divided by its maximum and drawn as its square root, so that low weights remain visible.

    Args:
        image: uint8 (H, W, 3), RGB.
        attention: (h, w) of any size, weights of 0 or more; enlarged bilinearly.
        at: the pixel (y, x) of the image whose attention map it is.
        align_corners: where the map's positions lie on the image, as in the network (`CCNet.align_corners`).

    Returns:
        An RGB image of the input's size.

    Raises:
        ValueError: the pixel is outside of the image, or the map has another rank.
    """
    height, width = image.shape[:2]
    if attention.ndim != 2:
        raise ValueError(
            f"attention_overlay: attention must be (h, w), got {tuple(attention.shape)}; pass one image's map."
        )
    if not (0 <= at[0] < height and 0 <= at[1] < width):
        raise ValueError(
            f"attention_overlay: at must be a pixel (y, x) of {height} x {width}, got {at}; choose one inside."
        )
    enlarged = F.interpolate(
        attention.detach().cpu().double()[None, None], (height, width), mode="bilinear", align_corners=align_corners
    )[0, 0]
    strength = (enlarged / enlarged.max().clamp(min=torch.finfo(torch.float64).tiny)).sqrt().numpy()
    steps = np.linspace(0, 1, len(HEAT))
    heat = np.stack([np.interp(strength, steps, HEAT[:, channel]) for channel in range(3)], axis=-1)
    opacity = HEAT_OPACITY * strength[..., None]
    overlay = Image.fromarray(np.rint(image * (1 - opacity) + heat * opacity).astype(np.uint8))
    radius = max(3, min(height, width) // 40)
    box = (at[1] - radius, at[0] - radius, at[1] + radius, at[0] + radius)
    ImageDraw.Draw(overlay).ellipse(box, outline=MARK, width=max(1, radius // 3))
    return overlay
