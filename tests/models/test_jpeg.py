"""JPEG files that were cut and end like whole ones: whole files of every kind pass, cut ones are found."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ccgpu.models import jpeg

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid" / "val"
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "restart each row": {"restart_marker_rows": 1},
    "restart each 5 blocks": {"restart_marker_blocks": 5},
    "4:4:4": {"subsampling": 0},
    "best": {"quality": 100, "subsampling": 0},
    "coarse": {"quality": 10},
}


def is_cut(content: bytes) -> bool:
    return jpeg.is_cut(content, Image.open(io.BytesIO(content)))


def encode(mode: str, options: dict[str, Any], size: tuple[int, int] = (61, 83)) -> bytes:
    """Return a JPEG file of smooth colours and noise, which give codes of all lengths."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([rows * 3, columns * 2, rows + columns], axis=-1) + generator.integers(0, 40, (*size, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def cut(content: bytes, share: float) -> bytes:
    """Return a file without the last `share` of its coded pixels, with the end marker."""
    begin = content.index(b"\xff\xda") + 14
    return content[: begin + int((1 - share) * (len(content) - 2 - begin))] + b"\xff\xd9"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_files_pass_and_cut_ones_are_found(mode: str, kind: str) -> None:
    whole = encode(mode, KINDS[kind])
    assert not is_cut(whole)
    assert not is_cut(whole + b"camera " * 100)
    # The cuts of a progressive file are in its last, largest scans, so that no cut is between two scans.
    shares = (0.02, 0.05) if kind == "progressive" else (0.01, 0.1, 0.37, 0.5, 0.73, 0.95)
    for share in shares:
        shorter = cut(whole, share)
        Image.open(io.BytesIO(shorter)).load()  # Pillow reads it without a word
        same = np.array_equal(*(np.asarray(Image.open(io.BytesIO(file))) for file in (whole, shorter)))
        assert is_cut(shorter) or same, share


def test_a_thumbnail_is_not_taken_for_the_image() -> None:
    whole, thumbnail = encode("RGB", {}), encode("RGB", {}, (16, 16))
    segment = b"\xff\xe1" + (2 + len(thumbnail)).to_bytes(2, "big") + thumbnail
    assert not is_cut(whole[:2] + segment + whole[2:])
    assert is_cut(whole[:2] + segment + cut(whole[:2] + whole[2:], 0.5)[2:])


def test_a_second_image_after_the_first_does_not_matter() -> None:
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(encode("RGB", {}))) for _ in range(2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    assert not is_cut(file.getvalue())


@pytest.mark.skipif(not REAL.exists(), reason="the CamVid images are not beside this repository")
def test_real_files() -> None:
    for path in sorted(REAL.glob("*.jpg"))[::12]:
        whole = path.read_bytes()
        assert not is_cut(whole), path
        for share in (0.001, 0.03, 0.5, 0.9):
            assert is_cut(cut(whole, share)), (path, share)
