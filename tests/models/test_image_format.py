"""Images of any number of channels and depth: read as they are stored, converted, shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from ccgpu.models.image_files import BadImage, read_image
from ccgpu.models.image_format import ImageFormat, size_of

DTYPES = (np.uint8, np.uint16, np.float32)


def drawn(dtype: type, *shape: int) -> np.ndarray:
    """Return an image of random values over the whole range of 8 or 16 bits."""
    highest = 200 if dtype is np.uint8 else 50_000
    return (np.random.default_rng(sum(shape)).random(shape) * highest).astype(dtype)


def raw(pixels: np.ndarray) -> ImageFormat:
    """Return the raw format of pixels (H, W, C)."""
    return ImageFormat(pixels.shape[-1], raw=True, dtype=pixels.dtype.name)


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays.arrays(
            dtype,
            st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7)),
            elements={"allow_nan": False, "allow_infinity": False} if dtype is np.float32 else None,
        )
    ),
    planar=st.booleans(),
    compression=st.sampled_from([None, "lzw", "deflate", "packbits", "zstd"]),
    byteorder=st.sampled_from("<>"),
    bigtiff=st.booleans(),
    tiled=st.booleans(),
)
def test_tiff_files_of_all_kinds_are_read_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    pixels: np.ndarray,
    planar: bool,
    compression: str | None,
    byteorder: str,
    bigtiff: bool,
    tiled: bool,
) -> None:
    path = tmp_path_factory.mktemp("tiff") / "image.tif"
    channels = pixels.shape[-1]
    stored = np.moveaxis(pixels, -1, 0) if planar else pixels
    tifffile.imwrite(
        path,
        pixels[..., 0] if channels == 1 else stored,
        photometric="minisblack",
        planarconfig=None if channels == 1 else "separate" if planar else "contig",
        compression=compression,
        byteorder=byteorder,
        bigtiff=bigtiff,
        tile=(16, 16) if tiled else None,
        metadata=None,
    )
    found = raw(pixels).open(path)
    assert isinstance(found, np.ndarray)
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_files_are_read_exactly(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    import imagecodecs

    pixels = drawn(dtype, *shape)
    (tmp_path / "image.png").write_bytes(imagecodecs.png_encode(pixels))
    expected = pixels.reshape(9, 7, -1)
    assert np.array_equal(raw(expected).open(tmp_path / "image.png"), expected)


def test_alpha_is_no_channel_and_other_extra_samples_are(tmp_path: Path) -> None:
    pixels = drawn(np.uint16, 5, 6, 4)
    for extra, kept in (("unassalpha", 3), ("unspecified", 4)):
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[extra])
        assert np.array_equal(raw(pixels[..., :kept]).open(tmp_path / "a.tif"), pixels[..., :kept])


@pytest.mark.parametrize("dtype", [np.int16, np.float64, np.int32])
def test_other_numbers_become_float32(tmp_path: Path, dtype: type) -> None:
    pixels = drawn(np.uint16, 5, 6, 2).astype(dtype) - 300
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    found = ImageFormat(2, raw=True, dtype="float32").open(tmp_path / "a.tif")
    assert np.array_equal(found, pixels.astype(np.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_raw_images_as_rgb(tmp_path: Path, orientation: int) -> None:
    pixels = drawn(np.uint8, 4, 7, 3)
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=[tag])
    for exif in ("upright", "stored"):
        expected = read_image(tmp_path / "a.tif", exif=exif)
        assert np.array_equal(raw(pixels).open(tmp_path / "a.tif", exif=exif), expected)
    assert np.array_equal(raw(pixels).open(tmp_path / "a.tif", exif="stored"), pixels)


def test_grey_saved_as_rgb_is_one_channel_and_colours_are_refused(tmp_path: Path) -> None:
    grey = drawn(np.uint8, 5, 6, 1)
    Image.fromarray(np.repeat(grey, 3, axis=-1)).save(tmp_path / "grey.png")
    one = ImageFormat(1, raw=True)
    assert np.array_equal(one.open(tmp_path / "grey.png"), grey)
    Image.fromarray(drawn(np.uint8, 5, 6, 3)).save(tmp_path / "colour.png")
    with pytest.raises(BadImage, match=r"must have 1 channel of uint8.*colour.png with 3 channels of uint8"):
        one.open(tmp_path / "colour.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 5}, "must have 5 channels of uint16.*with 4 channels of uint16"),
        ({"dtype": "uint8"}, "must have 4 channels of uint8.*with 4 channels of uint16"),
    ],
)
def test_other_channels_and_depths_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    pixels = drawn(np.uint16, 5, 6, 4)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    wanted = ImageFormat(**{"channels": 4, "raw": True, "dtype": "uint16", **change})  # type: ignore[arg-type]
    with pytest.raises(BadImage, match=message):
        wanted.open(tmp_path / "a.tif")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    pixels = np.zeros((5, 6, 2), np.float32)
    pixels[2, 3, 1] = value
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImage, match="finite"):
        raw(pixels).open(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_truncated_files_are_refused(tmp_path: Path, compression: str | None) -> None:
    pixels = drawn(np.uint16, 64, 64, 4)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", compression=compression)
    content = path.read_bytes()
    for share in (0.05, 0.5, 0.99):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(BadImage, match=r"a whole image.*a.tif"):
            raw(pixels).open(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    pixels = drawn(np.uint16, 64, 64, 4)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    with pytest.raises(BadImage, match=r"at most 4095 pixels, got 64x64.*allow more with --max-pixels"):
        raw(pixels).open(tmp_path / "a.tif", max_pixels=4095)


def test_a_range_of_values_is_refused_for_raw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="value_range must be None"):
        ImageFormat(2, raw=True).open(tmp_path / "a.tif", value_range=(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_arrays_and_tensors_are_taken_as_files_are(dtype: type, channels: int) -> None:
    pixels = drawn(dtype, 5, 6, channels)
    images = raw(pixels)
    assert np.array_equal(images.convert(pixels), pixels)
    tensor = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))
    assert np.array_equal(images.convert(tensor), pixels)
    assert size_of(images.convert(pixels)) == (5, 6)
    with pytest.raises(ValueError, match=f"must have {channels} channel"):
        images.convert(drawn(dtype, 5, 6, channels + 1))


def test_rgb_takes_bytes_and_refuses_what_has_no_known_range() -> None:
    images = ImageFormat()
    grey = drawn(np.uint8, 5, 6)
    assert np.array_equal(images.convert(grey), np.repeat(grey[..., None], 3, axis=-1))
    assert np.array_equal(images.convert(Image.fromarray(grey)), images.convert(grey))
    colours = drawn(np.uint8, 5, 6, 3)
    assert np.array_equal(images.convert(colours), colours)
    assert np.array_equal(images.convert(torch.from_numpy(colours).permute(2, 0, 1)), colours)
    for other in (colours / 255, colours.astype(np.uint16), colours[..., :2], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="ImageFormat: image must be"):
            images.convert(other)
    with pytest.raises(TypeError, match="got str"):
        images.convert("photo.jpg")  # type: ignore[arg-type]


def test_display_stretches_between_percentiles() -> None:
    ramp = np.linspace(1000, 3000, 101).astype(np.uint16)
    pixels = np.repeat(ramp[None, :, None], 2, axis=-1)
    shown = raw(pixels).display(pixels)
    assert shown.shape == (1, 101, 3)
    expected = np.rint(np.clip((ramp.astype(float) - 1020) / 1960, 0, 1) * 255)
    assert np.abs(shown[0, :, 0] - expected).max() <= 1
    assert np.array_equal(shown[..., 0], shown[..., 2])  # two channels: the first as grey
    assert not raw(pixels).display(np.full_like(pixels, 7)).any()  # one value alone


def test_display_shows_bytes_as_they_are() -> None:
    pixels = drawn(np.uint8, 300, 6, 4)
    assert np.array_equal(raw(pixels).display(pixels), pixels[..., :3])
    assert np.array_equal(raw(pixels).display(pixels.astype(np.float32)), pixels[..., :3])
    assert np.array_equal(ImageFormat().display(Image.fromarray(pixels[..., :3])), pixels[..., :3])


@pytest.mark.parametrize(
    "arguments",
    [{"channels": 0}, {"channels": 4}, {"dtype": "uint16"}, {"channels": 2, "raw": True, "dtype": "int64"}],
)
def test_formats_that_cannot_be_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="ImageFormat"):
        ImageFormat(**arguments)  # type: ignore[arg-type]


def test_plain_values_give_the_format_back() -> None:
    images = ImageFormat(5, raw=True, dtype="uint16")
    assert ImageFormat.from_plain(images.as_plain()) == images
