"""PNG files: written strip by strip, in memory that does not grow with the image; their checksums compared.

Pillow holds 4 bytes for each pixel of an RGB image and encodes it whole; a class map of 100 million pixels would take
400 MB once more for its colours.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

STRIP = 1 << 20  # pixels that a strip holds at least, unless the image has fewer
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # channels -> PNG's number for grey and for RGB
_PALETTE = 3
# Each byte is stored as its difference from the one above: label maps become mostly zeros, which compress well.
_UP = 2


def strips(height: int, width: int) -> Iterator[slice]:
    """Yield the rows of an image in slices of about `STRIP` pixels, from the top."""
    step = max(1, STRIP // max(1, width))
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def write_png(
    file: BinaryIO, height: int, width: int, rows: Iterable[np.ndarray], palette: np.ndarray | None = None
) -> None:
    """Write a PNG of 8 bits: grey or RGB, or with a palette; or a grey one of 16 bits.

    Args:
        file: open for writing.
        height, width: of the image, 1 or more.
        rows: strips of the image from the top, uint8 or uint16 (h, width) for a grey image or uint8 (h, width, 3) for
            RGB.
        palette: RGB colours of the values 0, 1, ..., uint8 (n, 3), n in 1..256; then the strips are uint8 (h, width).

    Raises:
        OSError: the file cannot be written.
        ValueError: the strips have another dtype, are not all of one kind, not `height` rows of `width` pixels, or have
            a value that is not in the palette.

    Examples:
        >>> import io
        >>> import numpy as np
        >>> file = io.BytesIO()
        >>> write_png(file, 4, 6, (np.full((2, 6), value, np.uint8) for value in (0, 255)))
        >>> file.getvalue()[1:4]
        b'PNG'
    """
    if palette is not None and (palette.dtype != np.uint8 or palette.shape != (min(max(len(palette), 1), 256), 3)):
        raise ValueError(
            f"write_png: palette must be uint8 (n, 3) with n in 1..256, got {palette.dtype} {palette.shape}."
        )
    encoder = zlib.compressobj()
    above: np.ndarray | None = None
    written = 0
    for strip in rows:
        channels = strip.shape[2] if strip.ndim == 3 else 1
        deep = strip.dtype == np.uint16 and channels == 1
        stored = strip.astype(">u2").view(np.uint8) if deep else strip
        flat = stored.reshape(len(strip), -1)
        is_other = above is not None and len(above) != flat.shape[1]
        is_known = (deep or strip.dtype == np.uint8) and channels in _COLOUR_TYPES
        if not is_known or strip.shape[1] != width or is_other:
            found = f"{strip.dtype} {strip.shape}"
            raise ValueError(
                f"write_png: rows must be uint8, all (h, {width}) or all (h, {width}, 3), or all uint16 (h, {width}), "
                f"got {found}."
            )
        if palette is not None and (channels != 1 or deep or strip.max(initial=0) >= len(palette)):
            found = f"values up to {strip.max(initial=0)} in {strip.shape}"
            raise ValueError(
                f"write_png: rows must be (h, {width}) of 0..{len(palette) - 1} for a palette, got {found}."
            )
        if above is None:
            colour_type = _COLOUR_TYPES[channels] if palette is None else _PALETTE
            file.write(_SIGNATURE)
            file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16 if deep else 8, colour_type, 0, 0, 0)))
            if palette is not None:
                file.write(_chunk(b"PLTE", palette.tobytes()))
            above = np.zeros_like(flat[0])
        filtered = np.empty((len(flat), 1 + flat.shape[1]), dtype=np.uint8)
        filtered[:, 0] = _UP
        np.subtract(flat[0], above, out=filtered[0, 1:])
        np.subtract(flat[1:], flat[:-1], out=filtered[1:, 1:])
        above = flat[-1].copy()
        _write_data(file, encoder.compress(filtered.data))
        written += len(strip)
    if written != height:
        raise ValueError(f"write_png: rows must be {height} in all, got {written}.")
    _write_data(file, encoder.flush())
    file.write(_chunk(b"IEND", b""))


def check_chunks(content: bytes) -> None:
    """Raise ValueError unless all chunks of a PNG file, up to the closing one, have their checksums.

    Pillow compares none of those of the pixels when it decodes, and not that of the closing chunk when it verifies.
    """
    position, kind = 8, b""  # after the signature
    while kind != b"IEND":
        length, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        end = position + 8 + length
        if end + 4 > len(content):
            raise ValueError("its closing chunk is missing")
        if zlib.crc32(memoryview(content)[position + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError(f"the checksum of a chunk {kind.decode('latin-1')!r} is wrong")
        position = end + 4


def _write_data(file: BinaryIO, compressed: bytes) -> None:
    if compressed:  # the encoder keeps what it gets until it has enough
        file.write(_chunk(b"IDAT", compressed))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
