"""Every kind of mask, read as ids and as colours: exactly what is stored; and files that cannot be masks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.image_files import BadImage
from ccgpu.models.labels import Labels, codes_of
from ccgpu.train.data.facts import Facts, facts_of
from ccgpu.train.data.masks import MOST_VALUES
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import Reading, read_pair
from ccgpu.train.data.submission import save_prediction
from tests.train.dataset_files import png, rows_of_4_bits

SIZE = (6, 8)
GENERATOR = np.random.default_rng(0)
SMALL = GENERATOR.integers(0, 4, SIZE).astype(np.uint8)  # in 2 bits
COLOURS = np.array([[10, 20, 30], [255, 0, 0], [0, 255, 0], [9, 9, 9]], dtype=np.uint8)


def rows(values: np.ndarray, bits: int) -> bytes:
    """Return a PNG's rows of values of fewer than 8 bits."""
    unpacked = np.unpackbits(values[..., None].astype(np.uint8), axis=-1)[..., 8 - bits :]
    return b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in unpacked)


def grey_png(bits: int) -> Callable[[Path], None]:
    return lambda path: png(path, SIZE, bits, 0, rows(SMALL % 2**bits, bits))


def palette_image(values: np.ndarray) -> Image.Image:
    image = Image.fromarray(values, mode="P")
    image.putpalette(COLOURS.tobytes())
    return image


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([COLOURS[SMALL], np.full(SIZE, 255, np.uint8)]))


SHADES = np.stack([SMALL] * 3, axis=-1)
ONE_BIT = (SMALL % 2).astype(bool)
# kind of file -> suffix, writer, the ids, and the colours that a viewer shows; None where it cannot be read so.
KINDS: dict[str, tuple[str, Callable[[Path], None], np.ndarray | None, np.ndarray | None]] = {
    "png 1 bit": (".png", grey_png(1), SMALL % 2, codes_of(SHADES % 2 * 255)),
    "png 2 bits": (".png", grey_png(2), SMALL, codes_of(SHADES * 85)),
    "png 4 bits": (
        ".png",
        lambda path: png(path, SIZE, 4, 0, rows_of_4_bits(SMALL * 5)),
        SMALL * 5,
        codes_of(SHADES * 85),
    ),
    "png grey": (".png", lambda path: Image.fromarray(SMALL * 60).save(path), SMALL * 60, codes_of(SHADES * 60)),
    "png 16 bits": (
        ".png",
        lambda path: Image.fromarray(SMALL.astype(np.uint16) * 20000).save(path),
        SMALL.astype(np.uint16) * 20000,
        None,
    ),
    "png opaque grey with alpha": (
        ".png",
        lambda path: Image.fromarray(np.dstack([SMALL, np.full(SIZE, 255, np.uint8)]), mode="LA").save(path),
        SMALL,
        codes_of(SHADES),
    ),
    "png palette": (".png", lambda path: palette_image(SMALL).save(path), SMALL, codes_of(COLOURS[SMALL])),
    "png palette of 2 bits": (
        ".png",
        lambda path: palette_image(SMALL).save(path, bits=2),
        SMALL,
        codes_of(COLOURS[SMALL]),
    ),
    "png colours": (".png", lambda path: Image.fromarray(COLOURS[SMALL]).save(path), None, codes_of(COLOURS[SMALL])),
    "png colours all grey": (
        ".png",
        lambda path: Image.fromarray(SHADES * 7).save(path),
        SMALL * 7,
        codes_of(SHADES * 7),
    ),
    "png opaque alpha": (".png", lambda path: rgba().save(path), None, codes_of(COLOURS[SMALL])),
    "bmp grey": (".bmp", lambda path: Image.fromarray(SMALL).save(path), SMALL, codes_of(SHADES)),
    "bmp 1 bit": (".bmp", lambda path: Image.fromarray(ONE_BIT).save(path), SMALL % 2, codes_of(SHADES % 2 * 255)),
    "bmp colours": (".BMP", lambda path: Image.fromarray(COLOURS[SMALL]).save(path), None, codes_of(COLOURS[SMALL])),
    "tiff grey": (
        ".tif",
        lambda path: Image.fromarray(SMALL).save(path, compression="tiff_lzw"),
        SMALL,
        codes_of(SHADES),
    ),
    "tiff 16 bits": (
        ".tiff",
        lambda path: Image.fromarray(SMALL.astype(np.uint16) + 300).save(path),
        SMALL + np.uint16(300),
        None,
    ),
    "tiff colours": (".tif", lambda path: Image.fromarray(COLOURS[SMALL]).save(path), None, codes_of(COLOURS[SMALL])),
    "tiff 1 bit": (".tif", lambda path: Image.fromarray(ONE_BIT).save(path), SMALL % 2, codes_of(SHADES % 2 * 255)),
    "gif": (".gif", lambda path: palette_image(SMALL).save(path), None, codes_of(COLOURS[SMALL])),
}


def pair_of(tmp_path: Path, suffix: str = ".png") -> Pair:
    image = tmp_path / "image.png"
    Image.new("RGB", SIZE[::-1]).save(image)
    return Pair(image, tmp_path / f"mask{suffix}", "image")


def labels_of(values: np.ndarray, coding: str) -> tuple[Labels, list[int]]:
    found = np.unique(values).tolist()
    names = tuple(map(str, found))
    return Labels(names, np.zeros((len(found), 3), np.uint8), tuple(found), (), coding=coding), found


def counted(facts: Facts, coding: str) -> dict[int, int] | None:
    assert facts.mask is not None
    return facts.mask.read_as(coding)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_as_ids_and_as_colours(name: str, tmp_path: Path) -> None:
    suffix, write, ids, colours = KINDS[name]
    pair = pair_of(tmp_path, suffix)
    assert pair.label is not None
    write(pair.label)
    facts = facts_of(pair.label, is_label=True)
    assert (facts.problem, facts.wrong_kind) == (None, None)
    assert Facts.from_plain(facts.as_plain()) == facts
    for coding, expected in (("ids", ids), ("colours", colours)):
        if expected is None:
            if name != "gif":  # Pillow may renumber a GIF's colours when it writes it
                assert counted(facts, coding) is None
                with pytest.raises(BadImage, match=f"must be a mask of {coding}, got an image of"):
                    read_pair(pair, labels_of(np.arange(2), coding)[0])
            continue
        labels, found = labels_of(expected, coding)
        values, numbers = np.unique(expected, return_counts=True)
        assert counted(facts, coding) == dict(zip(values.tolist(), numbers.tolist(), strict=True))
        classes = read_pair(pair, labels)[1]
        assert np.array_equal(np.array(found)[classes], expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("mode", ["P", "I;16", "RGB"])
def test_masks_are_turned_as_their_images(mode: str, suffix: str, tmp_path: Path) -> None:
    pair = pair_of(tmp_path, suffix)
    assert pair.label is not None
    deep = SMALL.astype(np.uint16) * 1000
    mask = {"P": palette_image(SMALL), "I;16": Image.fromarray(deep), "RGB": Image.fromarray(COLOURS[SMALL])}[mode]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(pair.image, exif=exif)
    mask.save(pair.label, exif=exif)
    stored = {"P": SMALL, "I;16": deep, "RGB": codes_of(COLOURS[SMALL])}[mode]
    labels, found = labels_of(stored, "colours" if mode == "RGB" else "ids")
    assert np.array_equal(np.array(found)[read_pair(pair, labels, Reading("stored"))[1]], stored)
    assert np.array_equal(np.array(found)[read_pair(pair, labels, Reading("upright"))[1]], stored.T[:, ::-1])


def jpeg_tiff() -> bytes:
    file = io.BytesIO()
    Image.fromarray(COLOURS[SMALL]).save(file, "TIFF", compression="jpeg")
    return file.getvalue()


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


HALF = np.full(SIZE, 255, np.uint8)
HALF[0, 0] = 100


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (encoded(Image.fromarray(SMALL), "JPEG"), "a JPEG file, which changes values where it compresses"),
        (encoded(Image.fromarray(COLOURS[SMALL]), "WEBP"), "a WEBP file, which changes values where it compresses"),
        (jpeg_tiff(), "a TIFF file compressed as JPEG, which changes values"),
        (encoded(Image.fromarray(np.dstack([COLOURS[SMALL], HALF])), "PNG"), "an image with transparent pixels"),
        (encoded(Image.fromarray(np.dstack([SMALL, HALF]), mode="LA"), "PNG"), "an image with transparent pixels"),
        (encoded(Image.fromarray(SMALL.astype(np.float32)), "TIFF"), "a TIFF of values of 32 bits"),
        (encoded(Image.new("CMYK", SIZE[::-1]), "TIFF"), "a TIFF of CMYK"),
    ],
)
def test_files_that_are_no_masks_are_told(content: bytes, told: str, tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    assert pair.label is not None
    pair.label.write_bytes(content)
    facts = facts_of(pair.label, is_label=True)
    assert facts.problem is None
    assert facts.wrong_kind is not None
    assert facts.wrong_kind.startswith(told)
    assert facts.mask is None
    with pytest.raises(BadImage, match=told):
        read_pair(pair, labels_of(SMALL, "ids")[0])


def test_16_bits_of_each_colour_are_no_mask(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    deep = np.zeros((*SIZE, 3, 2), dtype=np.uint8)
    png(path, SIZE, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep))
    assert facts_of(path, is_label=True).wrong_kind == "a PNG of 16-bit colours"


def test_so_many_values_are_counted_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    values = np.arange(60 * 70, dtype=np.uint16).reshape(60, 70)
    values[:2] = 4199
    for image in (
        Image.fromarray(values),
        Image.fromarray(np.dstack([values >> 8, values & 255, values & 1]).astype(np.uint8)),
    ):
        image.save(path)
        mask = facts_of(path, is_label=True).mask
        assert mask is not None
        assert (mask.different, len(mask.pixels)) == (60 * 70 - 2 * 70, MOST_VALUES)
        assert max(mask.pixels.values()) == 141
        assert mask.read_as("ids") is not None or mask.kind == "colours"


@pytest.mark.parametrize("coding", ["ids", "colours"])
@pytest.mark.parametrize("most", [255, 65535])
def test_saved_predictions_are_masks_of_the_dataset(coding: str, most: int, tmp_path: Path) -> None:
    labels = Labels(("a", "b", "c"), COLOURS[:3], (7, most, 3), (0,), coding=coding)
    pair = pair_of(tmp_path)
    classes = GENERATOR.integers(0, 3, SIZE)
    path = save_prediction(tmp_path, "mask", classes, labels)
    assert path == pair.label
    assert np.array_equal(read_pair(pair, labels)[1], classes)
    assert Image.open(path).mode == ("RGB" if coding == "colours" else "L" if most == 255 else "I;16")


@pytest.mark.parametrize("value", [6, 300])
def test_a_value_that_is_no_id_is_told(value: int, tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    Image.fromarray(np.full(SIZE, value, np.uint16)).save(pair.label)
    labels = Labels(("a", "b"), COLOURS[:2], (5, 255))
    with pytest.raises(BadImage, match=rf"must hold the ids 5, 255, got {value} in"):
        read_pair(pair, labels)
