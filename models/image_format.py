"""`ImageFormat`: how a network's images are read, as 8-bit RGB or with all their channels and values as stored."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from ccgpu.models import image_files, stored_values
from ccgpu.models.image_files import DECODE_ERRORS, EXIF, MAX_PIXELS, BadImage, check_regular, pillows_limit
from ccgpu.models.stored_values import DTYPES, MOST_CHANNELS, TooLarge, Unreadable, as_kept, pillow_values, read_stored

Pixels: TypeAlias = Image.Image | np.ndarray
"""A decoded image: a Pillow image of mode RGB, or values (H, W, C) of one of `stored_values.DTYPES`."""
_SHARES = (1, 99)  # percentiles of a channel that are drawn black and white
_SAMPLED = 1024  # rows and columns of the grid of pixels of which the percentiles are taken
_STRIP = 256  # rows that are drawn at once, which bounds memory


@dataclass(frozen=True)
class ImageFormat:
    """How the images of a network are read.

    Attributes:
        channels: channels of the network's input, 1 to `MOST_CHANNELS`; 3 unless raw.
        raw: False: any image becomes 8-bit RGB, as `models.image_files.open_image` says. True: all channels and values
            are taken as they are stored, as `models.stored_values.read_stored` says, and an image of other channels or
            another dtype is refused.
        dtype: of the values as stored: "uint8", "uint16", or "float32" for all others; "uint8" unless raw.

    Raises:
        ValueError: channels or dtype is none of these.

    Examples:
        >>> import numpy as np
        >>> from ccgpu.models.image_format import ImageFormat
        >>> infrared = ImageFormat(4, raw=True, dtype="uint16")
        >>> pixels = infrared.convert(np.zeros((20, 30, 4), np.uint16))
        >>> infrared.display(pixels).shape
        (20, 30, 3)
    """

    channels: int = 3
    raw: bool = False
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        if isinstance(self.channels, bool) or not isinstance(self.channels, int):
            raise TypeError(f"ImageFormat: channels must be an int, got {self.channels!r}; pass their number.")
        if not 1 <= self.channels <= MOST_CHANNELS or self.dtype not in DTYPES:
            raise ValueError(
                f"ImageFormat: channels must be from 1 to {MOST_CHANNELS} and dtype one of {DTYPES}, got "
                f"{self.channels} and {self.dtype!r}; pass those of the images."
            )
        if not self.raw and (self.channels != 3 or self.dtype != "uint8"):
            raise ValueError(
                f"ImageFormat: channels must be 3 and dtype 'uint8' for raw=False, got {self.channels} and "
                f"{self.dtype!r}; pass raw=True for images that are read as they are stored."
            )

    def __str__(self) -> str:
        """Return the format in words, such as "4 channels of uint16"."""
        if not self.raw:
            return "8-bit RGB"
        return f"{self.channels} channel{'s'[: self.channels > 1]} of {self.dtype}"

    def as_plain(self) -> dict[str, Any]:
        """Return the format as values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> ImageFormat:
        """Return the format with these plain values: the inverse of `as_plain`.

        Raises:
            TypeError, ValueError: the values are no format.
        """
        return cls(**values)

    def open(
        self,
        path: Path,
        *,
        exif: str = "upright",
        value_range: tuple[float, float] | None = None,
        max_pixels: int = MAX_PIXELS,
        check: bool = False,
    ) -> Pixels:
        """Return a decoded image file: of mode RGB, or for raw its values (H, W, channels) of `dtype`.

        Args:
            path: a regular file.
            exif: "upright" turns the image by its EXIF orientation; "stored" leaves the pixels where they are stored.
            value_range: the values that become 0 and 255 in images of more than 8 bits, as for
                `models.image_files.open_image`; None for raw.
            max_pixels: largest number of pixels, 1 or more.
            check: whether damage that Pillow does not see is looked for, as by `models.image_files.open_image`.

        Raises:
            FileNotFoundError: there is no such file.
            BadImage: the image cannot be decoded, is too large, or for raw has other channels, another dtype, or
                values that are NaN or infinite. The message names the file.
            ModuleNotFoundError: the packages that read the file are not installed.
            ValueError: exif or value_range is out of its range, or value_range is given for raw.
        """
        if exif not in EXIF:
            raise ValueError(f"ImageFormat.open: exif must be one of {EXIF}, got {exif!r}.")
        pixels, orientation = self.open_stored(path, value_range=value_range, max_pixels=max_pixels, check=check)
        return pixels if exif == "stored" else upright(pixels, orientation)

    def open_stored(
        self,
        path: Path,
        *,
        value_range: tuple[float, float] | None = None,
        max_pixels: int = MAX_PIXELS,
        check: bool = False,
    ) -> tuple[Pixels, int]:
        """Return an image as it is stored, and its EXIF orientation, 1..8; arguments and errors are those of `open`."""
        if not self.raw:
            decoded = image_files.decode_file(path, value_range=value_range, max_pixels=max_pixels, check=check)
            return image_files.as_rgb(path, decoded, value_range), decoded.orientation
        if value_range is not None:
            self.check_range(value_range)
        check_regular(path)
        try:
            with path.open("rb") as opened, pillows_limit(max_pixels):
                content = opened.read() if check else None
                file = opened if content is None else io.BytesIO(content)
                pixels, orientation = read_stored(file, max_pixels, content)
        except TooLarge as error:
            raise BadImage(image_files.too_large(path, error.size, max_pixels)) from error
        except Unreadable as error:
            raise BadImage(
                f"read_image: image must have values that can be read exactly, got {path}: {error}; convert it to a "
                "PNG or TIFF file."
            ) from error
        except DECODE_ERRORS as error:
            raise BadImage(
                f"read_image: path must be a whole image, got {path}, which does not decode ({error}); copy or convert "
                "it again."
            ) from error
        return self._checked(pixels, str(path)), orientation

    def convert(
        self, image: Image.Image | np.ndarray | torch.Tensor, value_range: tuple[float, float] | None = None
    ) -> Pixels:
        """Return an image in memory as `open` returns one from a file, or refuse it.

        Args:
            image: for 8-bit RGB, a Pillow image of any mode of 8 bits, uint8 (H, W, 3) or (H, W), or a tensor uint8
                (3, H, W), (1, H, W) or (H, W), red, green, blue. For raw, a Pillow image, or (H, W, channels) of
                `dtype`, (H, W) too for one channel, or a tensor (channels, H, W), channels first.
            value_range: the values that become 0 and 255, for Pillow images of more than 8 bits, and for arrays and
                tensors of numbers that are not uint8, which are refused without it. None for raw.

        Raises:
            TypeError: it is none of these types.
            ValueError: it is empty, or has other channels, another dtype, NaN or infinity.
        """
        if value_range is not None:
            self.check_range(value_range)
        if isinstance(image, Image.Image):
            if not image.width or not image.height:
                raise ValueError(f"ImageFormat: image must have a pixel or more, got {image.width}x{image.height}.")
            if not self.raw:
                return image_files.rgb("the image", image, value_range)
            return self._checked(pillow_values(image), "the image")
        shape = tuple(getattr(image, "shape", ()))
        if isinstance(image, torch.Tensor):
            if image.layout != torch.strided or image.is_quantized or image.is_meta:
                kind = "meta" if image.is_meta else "quantised" if image.is_quantized else "sparse"
                raise TypeError(f"ImageFormat: image must be a dense tensor of values, got a {kind} one; convert it.")
            values = image.detach().cpu()
            values = values.float() if values.dtype == torch.bfloat16 else values
            image = values.numpy() if values.ndim != 3 else np.moveaxis(values.numpy(), 0, -1)
        elif not isinstance(image, np.ndarray):
            raise TypeError(
                f"ImageFormat: image must be a Pillow image, an array or a tensor, got {type(image).__name__}; pass "
                "one of these."
            )
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or not image.size:
            raise ValueError(
                f"ImageFormat: image must be (H, W, C), or a tensor (C, H, W), of a pixel or more, got shape "
                f"{shape}; pass one image without a batch axis."
            )
        if image.dtype.kind not in "iuf":
            raise ValueError(
                f"ImageFormat: image must be of whole numbers or floats, got {image.dtype}; convert it, such as by "
                "astype(numpy.uint8)."
            )
        if self.raw:
            if image.shape[-1] != self.channels and (image.shape[-1], self.channels) != (3, 1):  # 3 may be equal greys
                raise ValueError(
                    f"ImageFormat: image must have {self}, got {image.shape[-1]} channels in the shape {shape}; pass "
                    f"an array (H, W, {self.channels}) or a tensor ({self.channels}, H, W), or use a network for such "
                    "images."
                )
            return self._checked(as_kept(image), "the image")
        if value_range is not None and image.dtype != np.uint8:
            image = image_files.to_bytes(image, value_range)
        if image.dtype != np.uint8:
            raise ValueError(
                f"ImageFormat: image must be uint8, values in 0..255, got {image.dtype}, whose range is not known; "
                "name it with value_range=(low, high), or convert the image."
            )
        if image.shape[-1] not in (1, 3):
            raise ValueError(
                "ImageFormat: image must be of 3 channels, red, green, blue, or 1 of grey, got "
                f"{image.shape[-1]} in the shape {shape}; pass an array (H, W, 3) or a tensor (3, H, W)."
            )
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))))

    def check_range(self, value_range: tuple[float, float]) -> None:
        """Raise ValueError unless a range of values, (low, high), can be applied to images of this format."""
        image_files.check_range(value_range)
        if self.raw:
            raise ValueError(
                f"ImageFormat: value_range must be None for images of {self}, got {value_range}; their values are "
                "taken as they are stored: leave --value-range out."
            )

    def _checked(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Return raw pixels (H, W, C), from grey saved as RGB one of the equal channels, if they fit the format.

        Raises:
            BadImage: they do not.
        """
        found = pixels.shape[-1]
        if self.channels == 1 and found == 3 and _is_grey(pixels):
            pixels = np.ascontiguousarray(pixels[..., :1])
        if pixels.shape[-1] != self.channels or pixels.dtype != self.dtype:
            raise BadImage(
                f"read_image: image must have {self}, as those that the network was trained on, got {name} with "
                f"{found} channel{'s'[: found > 1]} of {pixels.dtype}; convert it, or use a network for such images."
            )
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise BadImage(
                f"read_image: image must have finite values, got NaN or infinity in {name}; replace these values."
            )
        return pixels

    def display(self, pixels: Pixels) -> np.ndarray:
        """Return an image as it is shown to people: uint8 (H, W, 3).

        8-bit RGB stays as it is. Of raw images the first three channels are red, green and blue; where there are fewer,
        the first is grey. Values of uint8 are shown as they are. Others are stretched, each channel by itself: its 1st
        percentile becomes 0, its 99th 255; the percentiles are those of a grid of at most 1024 x 1024 pixels. A channel
        of one value alone is shown as 0.

        Args:
            pixels: from `open` or `convert`, or (H, W, channels) of floating point in units of the stored values.
        """
        if isinstance(pixels, Image.Image):
            return np.asarray(pixels)
        if pixels.shape[-1] < 3:
            pixels = pixels[..., :1]
        pixels = pixels[..., :3]
        if pixels.dtype == np.uint8:
            return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        shown = np.empty((*pixels.shape[:2], 3), np.uint8)
        steps = tuple(slice(None, None, -(-side // _SAMPLED)) for side in pixels.shape[:2])
        for channel in range(3):
            values = pixels[..., min(channel, pixels.shape[-1] - 1)]
            low, high = (0.0, 255.0) if self.dtype == "uint8" else np.percentile(values[steps], _SHARES)
            scale = 255 / (high - low) if high > low else 0.0
            for top in range(0, len(values), _STRIP):
                strip = (values[top : top + _STRIP].astype(np.float32) - np.float32(low)) * np.float32(scale)
                shown[top : top + _STRIP, :, channel] = np.rint(strip).clip(0, 255)
        return shown


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Return a stored image turned by its EXIF orientation, 1..8."""
    if isinstance(pixels, Image.Image):
        return image_files.upright(pixels, orientation)
    return stored_values.upright(pixels, orientation)


def size_of(pixels: Pixels) -> tuple[int, int]:
    """Return the (height, width) of a decoded image in pixels."""
    if isinstance(pixels, Image.Image):
        return pixels.height, pixels.width
    return pixels.shape[0], pixels.shape[1]


def _is_grey(pixels: np.ndarray) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
