"""PNG files written strip by strip: what Pillow reads back, and the memory that they take."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from ccgpu.models import png_files
from ccgpu.models.png_files import check_chunks, strips, write_png


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (37, 53)])
def test_pillow_reads_back_what_was_written(
    size: tuple[int, int], channels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png_files, "STRIP", 160)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, *channels), dtype=np.uint8)
    file = io.BytesIO()
    write_png(file, *size, (pixels[rows] for rows in strips(*size)))
    found = Image.open(file)
    assert found.mode == ("RGB" if channels else "L")
    assert np.array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("colours", [1, 7, 256])
def test_pillow_reads_back_a_palette(colours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_files, "STRIP", 160)
    generator = np.random.default_rng(0)
    values = generator.integers(0, colours, (37, 53), dtype=np.uint8)
    palette = generator.integers(0, 256, (colours, 3), dtype=np.uint8)
    file = io.BytesIO()
    write_png(file, 37, 53, (values[rows] for rows in strips(37, 53)), palette)
    found = Image.open(file)
    assert found.mode == "P"
    assert np.array_equal(np.asarray(found), values)
    assert np.array_equal(np.asarray(found.convert("RGB")), palette[values])
    check_chunks(file.getvalue())


@pytest.mark.parametrize(
    ("shape", "palette", "message"),
    [
        ((2, 3), np.zeros((1, 3), np.uint8), r"rows must be \(h, 3\) of 0\.\.0 for a palette, got values up to 1"),
        ((2, 3, 3), np.zeros((9, 3), np.uint8), r"for a palette, got values up to 1 in \(2, 3, 3\)"),
        ((2, 3), np.zeros((0, 3), np.uint8), r"palette must be uint8 \(n, 3\) with n in 1\.\.256, got uint8 \(0, 3\)"),
        ((2, 3), np.zeros((257, 3), np.uint8), r"palette must be"),
        ((2, 3), np.zeros((4, 3)), r"palette must be uint8"),
    ],
)
def test_values_and_palettes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], palette: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_png(io.BytesIO(), 2, 3, [np.ones(shape, np.uint8)], palette)


def test_strips_hold_every_row_once() -> None:
    for height, width in ((1, 1), (5, 3 * png_files.STRIP), (3000, 4000)):
        rows = [row for part in strips(height, width) for row in range(height)[part]]
        assert rows == list(range(height))
    assert len(list(strips(3000, 4000))) > 10


def test_memory_is_that_of_strips() -> None:
    height, width = 4000, 5000

    def rows() -> Iterator[np.ndarray]:
        for part in strips(height, width):
            yield np.zeros((part.stop - part.start, width, 3), np.uint8)

    file = io.BytesIO()
    tracemalloc.start()
    write_png(file, height, width, rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < height * width
    assert Image.open(file).size == (width, height)


@pytest.mark.parametrize(
    "strip",
    [np.zeros((2, 3), np.int64), np.zeros((2, 4), np.uint8), np.zeros((2, 3, 4), np.uint8), np.zeros((1, 3), "u1")],
)
def test_strips_that_do_not_fit_are_refused(strip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="write_png: rows must be"):
        write_png(io.BytesIO(), 2, 3, [strip])


def test_strips_are_all_grey_or_all_coloured() -> None:
    with pytest.raises(ValueError, match="write_png: rows must be"):
        write_png(io.BytesIO(), 4, 3, [np.zeros((2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8)])
