"""The format of a dataset's images, decided by its files; their mean and std, measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ccgpu.models.image_format import ImageFormat
from ccgpu.train.data.channels import channels_of
from ccgpu.train.data.checking import check_pairs, files_of
from ccgpu.train.data.facts import Facts, facts_of
from ccgpu.train.data.reading import Reading
from ccgpu.train.data.values import Values, mean_and_std
from tests.train.dataset_files import TABLE, write_pair


def drawn(seed: int, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    generator = np.random.default_rng(seed)
    channels = np.arange(1, shape[-1] + 1)
    pixels = generator.gamma(2.0, 10.0 * channels, size=shape) * (1 if dtype is np.uint8 else 100)
    return pixels.clip(0, 255 if dtype is np.uint8 else 65535).astype(dtype)


def write(path: Path, pixels: np.ndarray) -> Path:
    """Write an image as PNG, or as TIFF where Pillow has no PNG of its kind."""
    if path.suffix == ".png":
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
    else:
        one = pixels.shape[-1] == 1
        tifffile.imwrite(
            path, pixels[..., 0] if one else pixels, photometric="minisblack", planarconfig=None if one else "contig"
        )
    return path


def facts(*paths: Path) -> dict[Path, Facts]:
    return {path: facts_of(path, is_label=False) for path in paths}


@pytest.mark.parametrize(
    ("channels", "dtype", "suffix"),
    [
        (1, np.uint8, ".png"),
        (1, np.uint16, ".png"),
        (1, np.float32, ".tif"),
        (2, np.uint8, ".tif"),
        (3, np.uint16, ".tif"),
        (4, np.uint8, ".tif"),
        (5, np.uint16, ".tif"),
        (7, np.float32, ".tif"),
    ],
)
def test_images_of_one_kind_are_read_as_stored(tmp_path: Path, channels: int, dtype: type, suffix: str) -> None:
    pixels = [drawn(seed, (20 + seed, 30, channels), dtype) for seed in range(3)]
    found = facts(*(write(tmp_path / f"{index}{suffix}", image) for index, image in enumerate(pixels)))
    chosen = channels_of(found)
    assert chosen.images == ImageFormat(channels, raw=True, dtype=np.dtype(dtype).name)
    flat = np.concatenate([image.reshape(-1, channels) for image in pixels]).astype(np.float64)
    np.testing.assert_allclose(chosen.mean, flat.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(chosen.std, flat.std(axis=0), rtol=1e-9)
    assert str(chosen.images) in chosen.text
    for (path, entry), image in zip(found.items(), pixels, strict=True):
        assert entry.values is not None
        assert entry.values.lowest == tuple(image.min(axis=(0, 1)))
        assert entry.values.highest == tuple(image.max(axis=(0, 1)))
        assert entry.size == (30, image.shape[0])
        assert Facts.from_plain(entry.as_plain()) == entry
        assert np.array_equal(chosen.images.open(path), image)


def test_rgb_and_grey_of_8_bits_are_rgb(tmp_path: Path) -> None:
    found = facts(
        write(tmp_path / "grey.png", drawn(0, (5, 6, 1), np.uint8)),
        write(tmp_path / "colour.png", drawn(1, (5, 6, 3), np.uint8)),
    )
    chosen = channels_of(found)
    assert (chosen.images, chosen.mean, chosen.std) == (ImageFormat(), None, None)
    assert chosen.text == "8-bit RGB, 1 of 2 from grey"


def test_grey_with_transparent_pixels_is_rgb(tmp_path: Path) -> None:
    pixels = drawn(0, (5, 6, 2), np.uint8)
    Image.fromarray(pixels, "LA").save(tmp_path / "a.png")
    assert channels_of(facts(tmp_path / "a.png")).images == ImageFormat()


def test_a_range_of_values_reads_all_as_rgb(tmp_path: Path) -> None:
    found = facts(write(tmp_path / "a.png", drawn(0, (5, 6, 1), np.uint16)))
    chosen = channels_of(found, (0.0, 4095.0))
    assert chosen.images == ImageFormat()
    assert "0 to 4095" in chosen.text


def test_different_kinds_are_one_error_with_examples(tmp_path: Path) -> None:
    found = facts(
        write(tmp_path / "a.tif", drawn(0, (5, 6, 4), np.uint16)),
        write(tmp_path / "b.tif", drawn(1, (5, 6, 4), np.uint16)),
        write(tmp_path / "c.tif", drawn(2, (5, 6, 5), np.uint16)),
        write(tmp_path / "d.png", drawn(3, (5, 6, 3), np.uint8)),
    )
    with pytest.raises(ValueError, match="got 3 kinds in 4 images; convert or remove those that differ:") as error:
        channels_of(found)
    text = str(error.value)
    assert f"2 with 4 channels of uint16: {tmp_path / 'a.tif'}, {tmp_path / 'b.tif'}" in text
    assert f"1 with 5 channels of uint16: {tmp_path / 'c.tif'}" in text
    assert f"1 with 8-bit RGB: {tmp_path / 'd.png'}" in text


def test_depths_that_differ_may_be_read_by_their_range(tmp_path: Path) -> None:
    found = facts(
        write(tmp_path / "a.png", drawn(0, (5, 6, 1), np.uint16)),
        write(tmp_path / "b.png", drawn(1, (5, 6, 3), np.uint8)),
    )
    with pytest.raises(ValueError, match="--value-range LOW HIGH reads all of them as 8-bit RGB"):
        channels_of(found)


def test_broken_values_do_not_count_and_a_constant_channel_has_std_1() -> None:
    pixels = np.full((4, 5, 2), 7.25, np.float32)
    pixels[0, 0, 1], pixels[1, 1, 1], pixels[2, 2, 1] = np.nan, np.inf, 9.25
    values = Values.of(pixels)
    assert (values.broken, values.counts) == (2, (20, 18))
    mean, std = mean_and_std([values])
    finite = pixels[..., 1][np.isfinite(pixels[..., 1])].astype(np.float64)
    np.testing.assert_allclose((mean, std), ((7.25, finite.mean()), (1.0, finite.std())))


def test_an_image_without_a_finite_value_has_mean_0() -> None:
    values = Values.of(np.full((2, 2, 1), np.nan, np.float32))
    assert (values.lowest, values.highest, mean_and_std([values])) == ((0.0,), (0.0,), ((0.0,), (1.0,)))


def test_sums_of_16_bits_are_exact() -> None:
    values = Values.of(np.full((300, 400, 1), 65535, np.uint16))
    assert values.squares == (65535**2 * 120_000,)
    assert mean_and_std([values] * 50) == ((65535.0,), (1.0,))


def test_files_that_need_tifffile_say_so_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five = write(tmp_path / "five.tif", drawn(0, (5, 6, 5), np.uint16))
    four = tmp_path / "four.tif"  # which Pillow opens, as RGB
    tifffile.imwrite(four, drawn(0, (5, 6, 4), np.uint8), photometric="rgb", extrasamples=["unspecified"])
    one = write(tmp_path / "one.tif", drawn(1, (5, 6, 1), np.uint16))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert channels_of(facts(one)).images == ImageFormat(1, raw=True, dtype="uint16")  # by Pillow
    assert 'pip install "ccgpu[tiff]"' in (facts(five)[five].problem or "")
    with pytest.raises(ValueError, match=r"tifffile and imagecodecs must be installed.*ccgpu\[tiff\].*four\.tif"):
        channels_of(facts(four))
    with pytest.raises(ModuleNotFoundError, match="tifffile and imagecodecs must be installed"):
        ImageFormat(5, raw=True, dtype="uint16").open(five)


def test_pages_that_are_taken_for_an_image_are_told(tmp_path: Path) -> None:
    """tifffile writes an array (H, W, C) as H pages unless it is told what the axes are."""
    pair = write_pair(tmp_path, size=(8, 6))
    tifffile.imwrite(tmp_path / "images" / "a.tif", drawn(0, (8, 6, 5), np.uint16), photometric="minisblack")
    pages = dataclasses.replace(pair, image=tmp_path / "images" / "a.tif")
    found = {file: facts_of(file[0], is_label=file[1]) for file in files_of([pages])}
    with pytest.raises(ValueError, match="the first of 8 images in its file"):
        check_pairs([pages], found, TABLE, Reading(images=ImageFormat(1, raw=True, dtype="uint16")))
