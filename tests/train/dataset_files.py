"""Images and label files that tests of datasets write, and the check of such a dataset."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.models.labels import Labels
from ccgpu.train.data.checking import check_pairs, files_of
from ccgpu.train.data.facts import facts_of
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.data.reading import Reading

TABLE = Labels(
    names=("road", "car", "sky"),
    colours=np.array([[128, 64, 128], [0, 0, 142], [70, 130, 180]], dtype=np.uint8),
    ids=(7, 9, 3),
    void=(255, 0, 8),
    hint="take the files of ids",
)
# Label id -> train id, by hand.
TO_TRAIN = {7: 0, 9: 1, 3: 2, 255: 255, 0: 255, 8: 255}


def write_pair(root: Path, name: str = "a", size: tuple[int, int] = (6, 8), suffix: str = ".png") -> Pair:
    """Write an image of noise to images/ and a label map of the table's ids to labels/."""
    pair = Pair(root / "images" / f"{name}{suffix}", root / "labels" / f"{name}.png", name)
    generator = np.random.default_rng(len(name))
    image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    label = generator.choice(np.array([*TO_TRAIN], dtype=np.uint8), size)
    assert pair.label is not None
    for path, pixels in ((pair.image, image), (pair.label, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return pair


def find(root: Path, labelled: bool = True) -> list[Pair]:
    return find_by_name("find_pairs", root / "images", root / "labels" if labelled else None)


def png(path: Path, size: tuple[int, int], depth: int, colour_type: int, rows: bytes, *, palette: bytes = b"") -> None:
    """Write a PNG of a kind that Pillow cannot write; `rows` include the filter bytes; empty: a file without pixels."""
    height, width = size
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"IDAT", zlib.compress(rows))] if rows else []
    chunks += [(b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def rows_of_4_bits(values: np.ndarray) -> bytes:
    packed = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    return b"".join(b"\x00" + row.tobytes() for row in packed)


def check(pairs: Sequence[Pair], labels: Labels = TABLE, reading: Reading | None = None) -> None:
    """Decode all files of pairs and check them."""
    how = Reading() if reading is None else reading
    facts = {file: facts_of(file[0], is_label=file[1], max_pixels=how.max_pixels) for file in files_of(pairs)}
    check_pairs(pairs, facts, labels, how)
