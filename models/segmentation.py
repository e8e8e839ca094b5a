"""What a network says of one image (`Segmentation`): its classes, and the pictures and files that show them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.models.colouring import blend, mask_tables
from ccgpu.models.image_format import ImageFormat, Pixels
from ccgpu.models.labels import Labels
from ccgpu.models.legend import draw_legend, occurring, text_size, with_legend
from ccgpu.models.png_files import strips, write_png
from ccgpu.models.weights import write_atomically

OPACITY = 0.55
_SHOWN = 5  # classes that a repr names


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The classes of one image, and the image.

    Attributes:
        classes: uint8 (H, W), the class of each pixel, 0 .. K - 1; an index of `names`.
        labels: names, colours and label ids of the classes.
        pixels: the image as the network takes it: a Pillow image of mode RGB, or values (H, W, C).
        source: the image's file; None for one that was given as array, tensor or Pillow image.
    """

    classes: np.ndarray
    labels: Labels
    pixels: Pixels
    source: Path | None = None
    _format: ImageFormat = field(default_factory=ImageFormat, repr=False)
    _probabilities: np.ndarray | None = field(default=None, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.labels.names

    @property
    def colours(self) -> np.ndarray:
        """RGB of the classes, uint8 (K, 3)."""
        return self.labels.colours

    @property
    def probabilities(self) -> np.ndarray:
        """Probability of each class at each pixel, float32 (K, H, W); the sum over the classes is 1.

        `classes` is the class with the highest one, up to their rounding.

        Raises:
            ValueError: they were not asked for.
        """
        if self._probabilities is None:
            raise ValueError(
                "Segmentation: probabilities must be asked for when the image is predicted, got none; pass "
                "probabilities=True to predict."
            )
        return self._probabilities

    @cached_property
    def image(self) -> Image.Image:
        """The image as it is shown, a Pillow image of mode RGB; see `ImageFormat.display`."""
        return (
            self.pixels if isinstance(self.pixels, Image.Image) else Image.fromarray(self._format.display(self.pixels))
        )

    def shares(self) -> dict[str, float]:
        """Return the share of each class in the image's pixels, by its name, in the order of the classes."""
        counts = self.counts() / self.classes.size
        return dict(zip(self.names, counts.tolist(), strict=True))

    def counts(self) -> np.ndarray:
        """Return how many pixels each class has, int64 (K,)."""
        counts = np.zeros(self.labels.num_classes, dtype=np.int64)
        for rows in strips(*self.classes.shape):  # bincount copies what it counts to 8 bytes a pixel
            counts += np.bincount(self.classes[rows].ravel(), minlength=len(counts))
        return counts

    def mask(self) -> Image.Image:
        """Return the classes as a Pillow image of mode P, in their colours.

        Its values are the label ids where these are at most 255, so that it can be a label file, else the numbers of
        the classes.
        """
        values, palette = mask_tables(self.labels)
        image = Image.fromarray(values[self.classes])
        image.putpalette(palette.tobytes())
        return image

    def overlay(self, opacity: float = OPACITY, *, legend: bool = False) -> Image.Image:
        """Return the colours of the classes over the image, a Pillow image of mode RGB.

        Args:
            opacity: 0 is the image, 1 the colours alone.
            legend: whether names and colours of the classes that occur are shown below it, on a larger canvas.

        Raises:
            ValueError: opacity is out of its range.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"Segmentation.overlay: opacity must be from 0 to 1, got {opacity}; choose one between.")
        image = self.image.copy()
        blend(image, self.classes, self.colours, opacity)
        return with_legend(image, self.legend()) if legend else image

    def legend(self) -> Image.Image:
        """Return names and colours of the classes that occur, the largest first, as an image as wide as this one."""
        height, width = self.classes.shape
        return draw_legend(occurring(self.labels, self.counts()), width, text_size(height, width))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `mask` as a PNG file, atomically; a file of the same name is replaced. Return its path.

        Raises:
            ValueError: the path has another ending than .png, or is the image's own.
            OSError: the file cannot be written, or its folder does not exist.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise ValueError(
                f"Segmentation.save: path must end in .png, got {str(path)!r}; other formats lose values or colours."
            )
        if self.source is not None and path.exists() and path.samefile(self.source):
            raise ValueError(
                f"Segmentation.save: path must be another file than the image, got {str(path)!r}; name another."
            )
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"Segmentation.save: path must be in a folder, got no {path.parent}; create it first."
            )
        height, width = self.classes.shape
        values, palette = mask_tables(self.labels)
        rows = (values[self.classes[part]] for part in strips(height, width))
        write_atomically(path, lambda file: write_png(file, height, width, rows, palette))
        return path

    def __repr__(self) -> str:
        height, width = self.classes.shape
        shares = sorted(self.shares().items(), key=lambda item: -item[1])
        occurring = [f"{name} {share:.1%}" for name, share in shares if share]
        more = [f"{len(occurring) - _SHOWN} more"] if len(occurring) > _SHOWN else []
        name = "" if self.source is None else f"{self.source}: "
        return f"Segmentation({name}{height} x {width} pixels: {', '.join(occurring[:_SHOWN] + more)})"
