"""People's own image files of every common kind, and files that are no images."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from ccgpu.models import image_files
from ccgpu.models.image_files import BadImage, open_image, read_image


@pytest.fixture
def pixels() -> np.ndarray:
    """Return an image of 20 x 30 pixels that is smooth enough for JPEG."""
    rows, columns = np.mgrid[:20, :30]
    return np.stack([rows * 10, columns * 8, 255 - rows * 5], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "bmp", "ppm", "jp2"])
def test_every_format_is_read(ending: str, pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    options = {"lossless": True} if ending == "webp" else {"quality": 98} if ending == "jpg" else {}
    Image.fromarray(pixels).save(path, **options)
    found = read_image(path)
    assert found.dtype == np.uint8
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).max() <= (12 if ending == "jpg" else 0)


def test_ending_does_not_matter(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), pixels)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode: str, pixels: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(pixels).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    assert np.abs(read_image(path).astype(int) - np.asarray(image.convert("RGB"))).max() <= 1


def test_sixteen_bits_of_grey_keep_the_high_byte(tmp_path: Path) -> None:
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    Image.fromarray(values).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert np.array_equal(found, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_unknown_ranges_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 5), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 5), 1 << 20, np.int32)).save(tmp_path / "int.tif")
    for name in ("float.tif", "int.tif"):
        with pytest.raises(BadImage, match="8 or 16 bits"):
            read_image(tmp_path / name)


def test_transparent_pixels_show_white(pixels: np.ndarray, tmp_path: Path) -> None:
    alpha = np.zeros((20, 30), np.uint8)
    alpha[:, 10:20], alpha[:, 20:] = 128, 255
    Image.fromarray(np.dstack([pixels, alpha])).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert (found[:, :10] == 255).all()
    assert np.array_equal(found[:, 20:], pixels[:, 20:])
    half = pixels[:, 10:20] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(found[:, 10:20] - half).max() <= 1
    palette = Image.fromarray(pixels).convert("P")
    palette.save(tmp_path / "p.png", transparency=int(np.asarray(palette)[0, 0]))
    assert (read_image(tmp_path / "p.png")[0, 0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, pixels: np.ndarray, tmp_path: Path) -> None:
    """The eight cases of the EXIF standard, each with the image as it is stored."""
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_truncated_files_are_named(kind: str, share: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(noise).save(whole, format=kind)
    path = tmp_path / "cut.png"
    path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
    with pytest.raises(BadImage, match=r"cut\.png"):
        read_image(path)


def test_a_kind_of_tiff_that_is_not_read_is_not_called_damaged(tmp_path: Path) -> None:
    path, file = tmp_path / "a.tif", io.BytesIO()
    Image.fromarray(np.zeros((2, 3), dtype=np.float32)).save(file, "TIFF")
    bits = b"\x02\x01\x03\x00\x01\x00\x00\x00"  # BitsPerSample
    path.write_bytes(file.getvalue().replace(bits + b"\x20", bits + b"\x40"))  # 64-bit floats
    with pytest.raises(BadImage, match="a TIFF file of channels or values that do not become 8-bit RGB"):
        read_image(path)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damage_anywhere_in_an_avif_file_is_no_other_error(pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    Image.fromarray(pixels).save(path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read_image(path)
        except BadImage as error:
            refused += str(path) in str(error)
    assert refused > 10


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    for name in ("notes.txt", "page.eps"):
        with pytest.raises(BadImage, match=name):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises((BadImage, OSError)):
        read_image(tmp_path)


def test_images_of_impossible_size_are_refused(tmp_path: Path) -> None:
    """A PNG whose header promises 60000 x 60000 pixels."""
    small = io.BytesIO()
    Image.new("L", (1, 1)).save(small, format="PNG")
    content = bytearray(small.getvalue())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(BadImage, match="bomb"):
        read_image(tmp_path / "bomb.png")


def test_the_range_of_values_becomes_bytes(tmp_path: Path) -> None:
    values = np.array([[0, 100, 1000, 4095, 65535]] * 3, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values.astype(np.int32) - 100).save(tmp_path / "a.tif")
    Image.fromarray(np.array([[-1.0, 0.0, 0.25, 1.0, np.nan]] * 3, dtype=np.float32)).save(tmp_path / "f.tif")
    for name, value_range, expected in (
        ("a.png", (100.0, 4095.0), [0, 0, 57, 255, 255]),  # 900 / 3995 * 255 = 57.4
        ("a.tif", (0.0, 3995.0), [0, 0, 57, 255, 255]),
        ("f.tif", (-1.0, 1.0), [0, 128, 159, 255, 0]),  # 127.5 is rounded to even, 159.375
    ):
        found = read_image(tmp_path / name, value_range=value_range)
        assert found.tolist() == [[[value] * 3 for value in expected]] * 3, name
    for bad in ((1.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="value_range must be"):
            read_image(tmp_path / "a.png", value_range=bad)


def deep_png(path: Path, values: np.ndarray) -> None:
    """Write 16-bit colours (H, W, 3) or (H, W, 4) as a PNG, which Pillow cannot."""
    height, width, channels = values.shape
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)
    kind = {3: b"\x10\x02", 4: b"\x10\x06"}[channels]
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + kind + bytes(3)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    path.write_bytes(content)


def test_floats_that_pillow_decodes_wrongly_are_refused(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    tifffile.imwrite(tmp_path / "plain.tif", values, byteorder=">")
    assert read_image(tmp_path / "plain.tif", value_range=(0, 1)).max() == 255
    tifffile.imwrite(tmp_path / "packed.tif", values, byteorder=">", compression="zlib")
    with pytest.raises(BadImage, match=r"big-endian TIFF of compressed floats.*packed\.tif"):
        read_image(tmp_path / "packed.tif", value_range=(0, 1))


def test_the_range_of_values_is_applied_to_16_bits_of_colour(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (5, 7, 3))
    deep_png(tmp_path / "a.png", values)
    assert read_image(tmp_path / "a.png").max() == 15
    found = read_image(tmp_path / "a.png", value_range=(100.0, 4095.0))
    expected = np.clip(np.rint((values - 100) / 3995 * 255), 0, 255)
    assert np.array_equal(found, expected)
    alpha = np.full((5, 7, 1), 65535)
    alpha[0] = 0
    deep_png(tmp_path / "b.png", np.concatenate([values, alpha], axis=2))
    found = read_image(tmp_path / "b.png", value_range=(100.0, 4095.0))
    assert np.array_equal(found[1:], expected[1:])
    assert (found[0] == 255).all()


def test_the_range_of_values_leaves_8_bits_alone_and_refuses_what_is_cut_to_8(
    pixels: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", value_range=(0.0, 4095.0)), pixels)
    # A TIFF of 1 x 1 pixel with three channels of 16 bits, without compression.
    tags = ((256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 134), (262, 3, 1, 2), (273, 4, 1, 140), (277, 3, 1, 3))
    tags = (*tags, (278, 3, 1, 1), (279, 4, 1, 6), (284, 3, 1, 1))
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    content = content.ljust(134, b"\0") + struct.pack("<6H", 16, 16, 16, 0x1234, 0x5678, 0x9ABC)
    (tmp_path / "deep.tif").write_bytes(content)
    assert read_image(tmp_path / "deep.tif").tolist() == [[[0x12, 0x56, 0x9A]]]
    with pytest.raises(BadImage, match=r"must be grey or a PNG for --value-range, got .*deep\.tif"):
        read_image(tmp_path / "deep.tif", value_range=(0.0, 255.0))


@pytest.mark.parametrize("ending", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_pixels_are_left_where_they_are(
    orientation: int, ending: str, pixels: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 98} if ending == "jpg" else {}))
    found = read_image(path, exif="stored")
    assert found.shape == pixels.shape
    assert np.abs(found.astype(int) - pixels).max() <= (12 if ending == "jpg" else 0)
    assert read_image(path).shape == (pixels.shape if orientation < 5 else (30, 20, 3))
    with pytest.raises(ValueError, match="exif must be one of"):
        read_image(path, exif="sideways")


def test_exif_data_that_cannot_be_read_says_nothing(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=b"Exif\x00\x00no such data")
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)


def test_the_largest_size_can_be_raised_and_lowered(
    pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(BadImage, match=r"at most 599 pixels, got 30x20 = 600 in .*a\.png; .*--max-pixels"):
        read_image(tmp_path / "a.png", max_pixels=599)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(image_files, "MAX_PIXELS", 200)
    for ending in ("png", "tif", "gif", "webp", "jpg"):  # Pillow's own limit does not matter, whatever the format
        Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
        assert read_image(tmp_path / f"a.{ending}", max_pixels=600).shape == pixels.shape
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(BadImage, match=r"bomb|at most 200 pixels"):
        read_image(tmp_path / "a.webp", max_pixels=200)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for path, kind in (
        (tmp_path / "pipe.png", "named pipe"),
        (tmp_path / "folder.png", "folder"),
        (Path(os.devnull), "device"),
    ):
        with pytest.raises(BadImage, match=f"must be a regular file, got the {kind} {path}"):
            read_image(path)


def test_damage_that_pillow_does_not_see_is_found_when_asked(pixels: np.ndarray, tmp_path: Path) -> None:
    """Pillow fills the rest of a JPEG file with grey, and compares no checksums of a PNG file's pixels."""
    whole, cut, changed = tmp_path / "whole.jpg", tmp_path / "cut.jpg", tmp_path / "changed.png"
    Image.fromarray(pixels).save(whole)
    content = whole.read_bytes()
    cut.write_bytes(content[:-30] + b"\xff\xd9")
    Image.fromarray(pixels).save(changed)
    damaged = bytearray(changed.read_bytes())
    damaged[-13] ^= 1  # of the checksum of the pixels, in front of the closing chunk
    changed.write_bytes(damaged)
    assert np.array_equal(open_image(whole, check=True), read_image(whole))
    for path, problem in ((cut, "missing before its end marker"), (changed, "checksum of a chunk 'IDAT' is wrong")):
        assert open_image(path).size == (30, 20)
        with pytest.raises(BadImage, match=rf"got {path}, which does not decode \(.*{problem}\); copy"):
            open_image(path, check=True)


def test_tiff_files_of_other_channels_are_not_called_damaged(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    for name, pixels, photometric in (
        ("channels.tif", np.zeros((4, 5, 5), np.uint16), "minisblack"),
        ("floats.tif", np.zeros((4, 5, 3), np.float32), "rgb"),
    ):
        tifffile.imwrite(tmp_path / name, pixels, photometric=photometric, planarconfig="contig")
        with pytest.raises(BadImage, match=rf"{name}, a TIFF file of channels or values .* use a network for such"):
            open_image(tmp_path / name)
