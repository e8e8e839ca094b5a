"""Reading an image and its label file; each problem names its file."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.image_files import BadImage
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import Reading, read_pair
from tests.train.dataset_files import TABLE, TO_TRAIN, png, rows_of_4_bits, write_pair


def test_read_pair_returns_rgb_and_train_ids(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, size=(30, 40))
    image, label = read_pair(pair, TABLE)
    assert image.dtype == label.dtype == np.uint8
    assert np.array_equal(image, np.asarray(Image.open(pair.image)))
    assert pair.label is not None
    ids = np.asarray(Image.open(pair.label))
    assert set(np.unique(ids)) == set(TO_TRAIN)
    assert label.tolist() == [[TO_TRAIN[value] for value in row] for row in ids.tolist()]


def test_read_pair_without_label_ignores_every_pixel(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    image, label = read_pair(Pair(pair.image, None, "a"), TABLE)
    assert np.array_equal(image, read_pair(pair, TABLE)[0])
    assert label.dtype == np.uint8
    assert label.tolist() == [[255] * 8] * 6


def test_read_pair_turns_every_kind_of_image_into_rgb(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    grey = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    expected = np.stack([grey] * 3, axis=2)
    alpha = np.random.default_rng(1).integers(0, 256, (6, 8, 1), dtype=np.uint8)
    for image in (Image.fromarray(grey), Image.fromarray(grey.astype(np.uint16) * 256 + 200)):
        image.save(pair.image)
        assert np.array_equal(read_pair(pair, TABLE)[0], expected), image.mode
    opaque = np.full_like(alpha, 255)
    on_white = expected * (alpha / 255.0) + 255 - alpha
    for mask, shown in ((opaque, expected), (alpha, on_white)):
        for pixels in (np.concatenate([expected, mask], axis=2), np.concatenate([grey[..., None], mask], axis=2)):
            Image.fromarray(pixels).save(pair.image)
            assert np.abs(read_pair(pair, TABLE)[0] - shown).max() <= (0 if mask is opaque else 1)
    Image.fromarray(grey > 127).save(pair.image)
    assert np.array_equal(read_pair(pair, TABLE)[0], (expected > 127) * np.uint8(255))
    palette = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).convert("P")
    palette.putpalette([value for index in range(256) for value in (index, 2 * index % 256, 5)])
    palette.save(pair.image)
    index = np.arange(48).reshape(6, 8)
    assert np.array_equal(read_pair(pair, TABLE)[0], np.stack([index, 2 * index, np.full((6, 8), 5)], axis=2))
    deep = np.random.default_rng(2).integers(0, 256, (6, 8, 3, 2), dtype=np.uint8)
    png(pair.image, (6, 8), 16, 2, b"".join(b"\x00" + row.tobytes() for row in deep))
    assert np.array_equal(read_pair(pair, TABLE)[0], deep[..., 0])


def test_read_pair_reads_jpeg_images_of_every_kind(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, suffix=".jpg")
    colours = np.broadcast_to(np.array([200, 100, 50], np.uint8), (6, 8, 3))
    Image.fromarray(np.ascontiguousarray(colours)).save(pair.image, quality=95)
    assert np.abs(read_pair(pair, TABLE)[0].astype(int) - colours).max() <= 3
    Image.new("L", (8, 6), 90).save(pair.image)
    assert (read_pair(pair, TABLE)[0] == 90).all()
    Image.new("CMYK", (8, 6), (255, 0, 255, 0)).save(pair.image, quality=95)
    green = read_pair(pair, TABLE)[0]
    assert (green[..., 1] > 250).all()
    assert (green[..., [0, 2]] < 5).all()


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an upright image as it is stored with an EXIF orientation, after the EXIF standard's eight cases."""
    axes = (1, 0, 2)[: pixels.ndim]
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(axes),
        6: pixels.transpose(axes)[::-1],
        7: pixels.transpose(axes)[::-1, ::-1],
        8: pixels.transpose(axes)[:, ::-1],
    }[orientation]


def save_with_orientation(pixels: np.ndarray, path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif)


@pytest.mark.parametrize("size", [(6, 8), (7, 7)], ids=["oblong", "square"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_read_pair_matches_image_and_label_as_exif_says(
    tmp_path: Path, orientation: int, size: tuple[int, int], suffix: str
) -> None:
    pair = write_pair(tmp_path, size=size, suffix=suffix)
    assert pair.label is not None
    upright, label = read_pair(pair, TABLE)
    ids = np.asarray(Image.open(pair.label))
    stored, stored_ids = turned(upright, orientation), turned(ids, orientation)

    # A label file drawn on the upright image.
    save_with_orientation(stored, pair.image, orientation)
    found = read_pair(pair, TABLE, Reading("upright"))
    assert np.array_equal(found[0], upright)
    assert np.array_equal(found[1], label)
    assert np.array_equal(read_pair(Pair(pair.image, None, "a"), TABLE)[0], upright)
    assert np.array_equal(read_pair(Pair(pair.image, None, "a"), TABLE, Reading("stored"))[0], stored)
    if orientation > 1:
        with pytest.raises(BadImage, match=rf"got {orientation} in .*images/a{suffix}, .*labels/a\.png has none"):
            read_pair(pair, TABLE)

    # One drawn on the pixels as they are stored.
    Image.fromarray(np.ascontiguousarray(stored_ids)).save(pair.label)
    found = read_pair(pair, TABLE, Reading("stored"))
    assert np.array_equal(found[0], stored)
    assert np.array_equal(found[1], TABLE.to_train[stored_ids])

    # One with the orientation of its image.
    save_with_orientation(stored_ids, pair.label, orientation)
    for exif in (None, "upright"):
        found = read_pair(pair, TABLE, Reading(exif))
        assert np.array_equal(found[0], upright)
        assert np.array_equal(found[1], label)
    assert np.array_equal(read_pair(pair, TABLE, Reading("stored"))[0], stored)


def test_read_pair_compares_sizes_after_turning(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    save_with_orientation(np.zeros((6, 8, 3), np.uint8), pair.image, 6)
    with pytest.raises(BadImage, match="image's size 6x8, got 8x6 in"):
        read_pair(pair, TABLE, Reading("upright"))
    assert read_pair(pair, TABLE, Reading("stored"))[0].shape == (6, 8, 3)


def test_read_pair_maps_the_range_of_values(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    values = np.linspace(0, 4095, 48).astype(np.uint16).reshape(6, 8)
    Image.fromarray(values).save(pair.image)
    assert read_pair(pair, TABLE)[0].max() == 15
    found = read_pair(pair, TABLE, Reading(value_range=(0.0, 4095.0)))[0]
    assert np.array_equal(found[..., 1], np.rint(values / 4095 * 255).astype(np.uint8))


def test_read_pair_takes_the_index_of_a_palette_label(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    label = Image.fromarray(np.full((6, 8), 9, dtype=np.uint8)).convert("P")
    label.putpalette([255 - index // 3 % 256 for index in range(768)])
    label.save(pair.label)
    assert (read_pair(pair, TABLE)[1] == 1).all()
    ids = np.random.default_rng(0).choice(np.array([7, 9, 3, 0, 8]), (6, 8))
    png(pair.label, (6, 8), 4, 3, rows_of_4_bits(ids), palette=bytes(range(30)))
    assert np.array_equal(read_pair(pair, TABLE)[1], np.vectorize(TO_TRAIN.get)(ids))


@pytest.mark.parametrize("value", [1, 10, 100, 254])
def test_read_pair_names_a_label_outside_the_table(tmp_path: Path, value: int) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    ids = np.full((6, 8), 7, dtype=np.uint8)
    ids[2, 3] = value
    Image.fromarray(ids).save(pair.label)
    expected = f"label must hold the ids 0, 3, 7..9, 255, got {value} in {pair.label}; take the files of ids."
    with pytest.raises(BadImage, match=re.escape(expected)):
        read_pair(pair, TABLE)


def test_read_pair_names_a_file_that_is_wrong(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    Image.new("L", (6, 8)).save(pair.label)
    with pytest.raises(BadImage, match=r"image's size 8x6, got 6x8 in .*labels/a\.png"):
        read_pair(pair, TABLE)
    pair.label.unlink()
    with pytest.raises(FileNotFoundError, match=r"got no file .*labels/a\.png"):
        read_pair(pair, TABLE)
    png(pair.label, (6, 8), 8, 0, b"")
    with pytest.raises(BadImage, match=r"got .*labels/a\.png, which does not decode"):
        read_pair(pair, TABLE)
    Image.new("L", (8, 6)).save(pair.label)
    pair.image.write_text("no image")
    with pytest.raises(BadImage, match=r"whole image, got .*images/a\.png, .*not a file of"):
        read_pair(pair, TABLE)
    pair.image.unlink()
    os.mkfifo(pair.image)
    with pytest.raises(BadImage, match=r"regular file, got the named pipe .*images/a\.png"):
        read_pair(pair, TABLE)


def test_read_pair_names_the_file_wherever_it_is_damaged(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    whole = pair.image.read_bytes()
    end_of_pixels = len(whole) - 12 - 8  # what is missing after the last pixel does not matter to the decoder
    for length in range(0, end_of_pixels, 3):
        pair.image.write_bytes(whole[:length])
        with pytest.raises(BadImage, match=r"got .*images/a\.png, which does not decode"):
            read_pair(pair, TABLE)
    refused = 0
    for position in range(len(whole)):
        pair.image.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read_pair(pair, TABLE)
        except BadImage as error:
            refused += "/a.png" in str(error)
    assert refused > 0.8 * len(whole)  # any other exception fails; a changed checksum of IEND may pass
