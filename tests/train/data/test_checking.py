"""The check of all files of a dataset: whole files of every kind pass, every problem is found and named."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.image_files import BadImage
from ccgpu.models.labels import Labels
from ccgpu.train.data.checking import check_pairs, files_of, notes
from ccgpu.train.data.facts import facts_of
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.data.reading import Reading, read_pair
from tests.train.dataset_files import TABLE, check, png, rows_of_4_bits, write_pair

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def test_check_pairs_accepts_whole_files_of_every_kind(tmp_path: Path) -> None:
    png_pairs = [write_pair(tmp_path, f"{index}") for index in range(3)]
    Image.open(png_pairs[0].image).convert("L").save(png_pairs[0].image)
    Image.open(png_pairs[1].label).convert("P").save(png_pairs[1].label)
    assert png_pairs[2].label is not None
    png(png_pairs[2].label, (6, 8), 4, 3, rows_of_4_bits(np.full((6, 8), 7)), palette=bytes(30))
    with png_pairs[2].image.open("ab") as file:
        file.write(b"something behind the closing chunk")
    jpeg_pairs = [write_pair(tmp_path, f"j{index}", suffix=".jpg") for index in range(5)]
    for pair, mode in zip(jpeg_pairs[1:3], ("L", "CMYK"), strict=True):
        Image.open(pair.image).convert(mode).save(pair.image)
    Image.open(jpeg_pairs[2].image).save(jpeg_pairs[2].image, progressive=True)
    for pair, more in zip(jpeg_pairs[3:], (b"\0" * 100, b"camera " * 20_000), strict=True):
        with pair.image.open("ab") as file:
            file.write(more)
    check(png_pairs + jpeg_pairs)
    check([Pair(png_pairs[0].image, None, "a")])
    check([])
    for pair in png_pairs + jpeg_pairs:
        assert read_pair(pair, TABLE)[0].shape == (6, 8, 3)


def test_check_pairs_finds_every_problem_and_names_the_files(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, f"{index:02d}", suffix=".jpg" if index in (9, 10) else ".png") for index in range(16)]
    labels = [pair.label for pair in pairs if pair.label]
    pairs[0].image.write_bytes(b"")
    pairs[1].image.write_bytes(pairs[1].image.read_bytes()[:-5])
    labels[2].write_bytes(labels[2].read_bytes()[:20])
    pairs[3].image.write_bytes(b"<html>not found</html>")
    labels[4].unlink()
    Image.new("L", (9, 6)).save(labels[5])
    Image.new("RGB", (8, 6), (9, 9, 8)).save(labels[6])
    Image.fromarray(np.full((6, 8), 256, dtype=np.uint16)).save(labels[7])
    png(labels[8], (6, 8), 4, 0, rows_of_4_bits(np.full((6, 8), 6)))
    pairs[9].image.write_bytes(pairs[9].image.read_bytes()[:-2])
    Image.new("RGB", (8, 7)).save(pairs[10].image)
    Image.new("L", (8, 6)).save(labels[11], format="JPEG")
    pairs[12].image.unlink()
    os.mkfifo(pairs[12].image)
    os.mkfifo(labels[13].with_name("x"))
    labels[13].unlink()
    labels[13].symlink_to("x")
    labels[14].unlink()
    labels[14].mkdir()
    Image.fromarray(np.resize(np.array([1, 2, 3, 7], dtype=np.uint8), (6, 8))).save(labels[15])
    expected = {
        pairs[0].image: "empty file",
        pairs[1].image: "truncated or damaged PNG file",
        labels[2]: "truncated or damaged PNG file",
        pairs[3].image: "no image file of PNG, JPEG",
        labels[4]: "No such file or directory",
        labels[5]: "9x6 pixels, but the image has 8x6",
        labels[6]: "a mask of colours, not one of ids, which are 0, 3, 7..9, 255",
        labels[7]: "holds the values 256, but the ids are 0, 3, 7..9, 255",
        labels[8]: "holds the values 6, but the ids are 0, 3, 7..9, 255",
        pairs[9].image: "truncated or damaged JPEG file",
        labels[10]: "8x6 pixels, but the image has 8x7",
        labels[11]: "a JPEG file, which changes values where it compresses; a mask is an opaque, lossless PNG, BMP",
        pairs[12].image: "named pipe, not a regular file",
        labels[13]: "named pipe, not a regular file",
        labels[14]: "folder, not a regular file",
        labels[15]: "holds the values 1, 2, but the ids are 0, 3, 7..9, 255",
    }
    for some in (pairs[:9], pairs[9:]):
        with pytest.raises(ValueError, match=rf"got \d problems? in {len(some)} pairs") as caught:
            check(some)
        listed, hint = str(caught.value).splitlines()[1:-1], str(caught.value).splitlines()[-1]
        named = [
            (str(path), problem) for path, problem in expected.items() if any(path in (p.image, p.label) for p in some)
        ]
        assert len(listed) == len(named)
        for line, (path, problem) in zip(listed, named, strict=True):
            assert line.startswith(f"  {path}: {problem}")
        assert hint == "label files: take the files of ids."


def test_check_pairs_lists_ten_problems_and_counts_the_rest(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, f"{index:02d}") for index in range(12)]
    for pair in pairs:
        pair.image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)got 12 problems in 12 pairs.*\.\.\. and 2 more") as caught:
        check(pairs)
    assert str(caught.value).count("empty file") == 10


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_check_pairs_finds_a_cut_at_any_byte(tmp_path: Path, suffix: str) -> None:
    pair = write_pair(tmp_path, "a", suffix=suffix)
    whole = pair.image.read_bytes()
    for length in range(len(whole)):
        pair.image.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"a\{suffix}: (truncated|empty|no image)"):
            check([pair])


def test_check_pairs_is_not_deceived_by_the_end_of_a_small_image_in_the_header(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", suffix=".jpg")
    whole = pair.image.read_bytes()
    assert whole.endswith(b"\xff\xd9")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(whole)) + whole
    pair.image.write_bytes(whole[:2] + thumbnail + whole[2:])
    check([pair])
    pair.image.write_bytes(whole[:2] + thumbnail + whole[2:-2])
    with pytest.raises(ValueError, match="truncated"):
        check([pair])


def test_check_pairs_and_read_pair_refuse_images_of_impossible_size(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    png(pair.image, (100_000, 100_000), 8, 0, b"")
    with pytest.raises(
        ValueError, match=r"a\.png: 100000x100000 pixels, more than 178956970; allow more with --max-pixels"
    ):
        check([pair])
    with pytest.raises(BadImage, match=r"at most 178956970 pixels, got 100000x100000 = .*--max-pixels"):
        read_pair(pair, TABLE)


@pytest.mark.skipif(not (DATA / "camvid").exists(), reason="the CamVid images are not beside this repository")
def test_real_camvid_is_found_checked_and_read() -> None:
    table = Labels(tuple("abcdefghijk"), np.zeros((11, 3), np.uint8), tuple(range(11)), (11,))
    root = DATA / "camvid"
    for split, number in (("train", 367), ("val", 101), ("test", 233)):
        pairs = find_by_name("find_pairs", root / split, root / f"{split}annot")
        assert [pair.name for pair in pairs] == sorted((root / f"{split}.txt").read_text().split())
        assert len(pairs) == number
        check(pairs[::5], table)
        for pair in pairs[::50]:
            image, label = read_pair(pair, table)
            assert image.shape == (360, 480, 3)
            assert 40 < image.mean() < 200
            assert image.std() > 20
            assert {0, 1, 3} <= set(np.unique(label).tolist()) <= {*range(11), 255}


@pytest.mark.skipif(not (DATA / "samples").exists(), reason="the sample images are not beside this repository")
def test_real_ade20k_and_lip_images_are_found_checked_and_read() -> None:
    ade, lip = DATA / "samples/ade20k/ADEChallengeData2016", DATA / "samples/lip"
    for images, labels, classes, void, number in (
        (ade / "images/training", ade / "annotations/training", range(1, 151), (0,), 3),
        (ade / "images/validation", ade / "annotations/validation", range(1, 151), (0,), 3),
        (lip / "train_images", lip / "train_segmentations", range(20), (), 1),
        (lip / "val_images", lip / "val_segmentations", range(20), (), 1),
    ):
        pairs = find_by_name("find_pairs", images, labels)
        assert len(pairs) == number
        table = Labels(tuple(map(str, classes)), np.zeros((len(classes), 3), np.uint8), tuple(classes), void)
        check(pairs, table)
        for pair in pairs:
            image, label = read_pair(pair, table)
            assert image.shape == (*label.shape, 3)
            assert len(np.unique(label)) > 3
            assert set(np.unique(label).tolist()) <= {*range(len(classes)), 255}


def test_check_pairs_compares_orientations_of_whole_files_alone(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (8, 6)).save(pair.image, exif=exif)
    pair.label.unlink()
    with pytest.raises(ValueError, match="got 1 problem") as caught:
        check([pair])
    assert "EXIF" not in str(caught.value)
    check([Pair(pair.image, None, "a")])


def test_check_pairs_compares_the_frames_of_a_clip(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, f"{index}", (6, 8) if index < 3 else (8, 6)) for index in range(4)]
    facts = {file: facts_of(file[0], is_label=file[1]) for file in files_of(pairs)}
    clips = [tuple(pairs[:2]), tuple(pairs[1:]), tuple(pairs[1:])]
    check_pairs(pairs, facts, TABLE, Reading(), clips[:1])
    with pytest.raises(ValueError, match="got 1 problem in 4 pairs") as caught:
        check_pairs(pairs, facts, TABLE, Reading(), clips)
    line = f"{pairs[3].image}: 6x8 pixels, but {pairs[1].image}, of the same clip, has 8x6"
    assert str(caught.value).splitlines()[1:] == [f"  {line}"]


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    pair.image.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(
        ValueError, match=r"a\.png: a pointer of Git LFS instead of the file; fetch it with: git lfs pull"
    ):
        check([pair])


def test_channels_that_are_not_read_are_told_and_alpha_is_none_of_them(tmp_path: Path) -> None:
    pair, pixels = write_pair(tmp_path), np.zeros((6, 8, 4), dtype=np.uint8)
    for mode, told in (("RGBX", 1), ("RGBA", 0), ("CMYK", 0)):
        Image.frombytes(mode, (8, 6), pixels.tobytes()).save(pair.image, "TIFF")
        lines = notes({pair.image: facts_of(pair.image, is_label=False)}, None)
        expected = (
            f"note: 1 images have further channels, such as near infrared, which are not read, such as {pair.image}"
        )
        assert lines.count(expected) == told
