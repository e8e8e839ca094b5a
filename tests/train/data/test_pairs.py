"""Images and label files of a dataset: found by name, checked without decoding, read; each problem names its file."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ccgpu.models.image_files import BadImage
from ccgpu.models.labels import Labels
from ccgpu.train.data.pairs import Pair, check_pairs, find_by_name, read_pair

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
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


def test_find_by_name_lists_images_of_every_suffix_by_name(tmp_path: Path) -> None:
    names = (("b", ".JPG"), ("a", ".jpeg"), ("c.d_e", ".png"), ("B", ".jpg"))
    pairs = [write_pair(tmp_path, name, suffix=suffix) for name, suffix in names]
    for stray in ("images/._b.jpg", "images/Thumbs.db", "labels/.hidden.png", "labels/b.txt", "images/notes.tif"):
        (tmp_path / stray).touch()
    expected = sorted(pairs, key=lambda pair: pair.name)
    assert find(tmp_path) == expected
    assert find(tmp_path, labelled=False) == [Pair(pair.image, None, pair.name) for pair in expected]


def test_find_by_name_joins_subfolders_and_long_suffixes(tmp_path: Path) -> None:
    for file in (
        "left/train/ulm/ulm_1_left.png",
        "left/train/aachen/aachen_2_left.png",
        "left/train/aachen/aachen_1_right.png",
        "left/train/ulm_3_left.png",
        "fine/train/ulm/ulm_1_ids.png",
        "fine/train/ulm/ulm_1_color.png",
        "fine/train/aachen/aachen_2_ids.png",
        "left/train/.trash/ulm_4_left.png",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    images, labels = tmp_path / "left/train", tmp_path / "fine/train"
    assert find_by_name("f", images, labels, ("_left.png",), "_ids.png", depth=1) == [
        Pair(images / "aachen/aachen_2_left.png", labels / "aachen/aachen_2_ids.png", "aachen_2"),
        Pair(images / "ulm/ulm_1_left.png", labels / "ulm/ulm_1_ids.png", "ulm_1"),
    ]
    (labels / "ulm/ulm_1_ids.png").rename(labels / "aachen/ulm_1_ids.png")
    with pytest.raises(FileNotFoundError, match="got 2 of 3 without"):
        find_by_name("f", images, labels, ("_left.png",), "_ids.png", depth=1)


def test_find_by_name_says_which_folder_is_missing_and_which_there_are(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for folder, missing in ((tmp_path, "data"), (root, "images"), (root, "labels")):
        with pytest.raises(FileNotFoundError, match=f"find_pairs: .* got no folder '{missing}' in {folder};"):
            find(root)
        (root if folder == tmp_path else root / missing).mkdir()
    (root / ".cache").mkdir()
    with pytest.raises(FileNotFoundError, match=r"got no folder 'test' in .*Folders there:\n  images\n  labels$"):
        find_by_name("find_pairs", root / "test", None)
    for labels in (root / "labels", None):
        with pytest.raises(FileNotFoundError, match=r"split must hold images, got none named \*\(.jpg\|"):
            find_by_name("find_pairs", root / "images", labels)
    with pytest.raises(FileNotFoundError, match=rf"got none .* in {root}/images/\*;"):
        find_by_name("find_pairs", root / "images", None, depth=1)


def test_find_by_name_names_files_without_partner(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, f"{index:02d}") for index in range(15)]
    assert pairs[0].label is not None
    pairs[0].label.unlink()
    pairs[1].image.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        find(tmp_path)
    message = str(caught.value)
    assert "got 2 of 15 without" in message
    assert f"{pairs[0].image} has no label file" in message
    assert f"{pairs[1].label} has no image" in message
    assert len(find(tmp_path, labelled=False)) == 14
    for pair in pairs[2:13]:
        pair.image.unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)got 13 of 15 without.*\.\.\. and 3 more"):
        find(tmp_path)


def test_find_by_name_refuses_two_files_of_one_name(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", suffix=".jpg")
    write_pair(tmp_path, "a", suffix=".png")
    with pytest.raises(ValueError, match=r"images must have different names, got 1 names twice.*\n.*a.jpg and a.png"):
        find(tmp_path)
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "labels/a.PNG").touch()
    with pytest.raises(ValueError, match="label files must have different names"):
        find(tmp_path)
    assert find(tmp_path, labelled=False) == [Pair(pair.image, None, "a")]


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
    check_pairs(png_pairs + jpeg_pairs)
    check_pairs([Pair(png_pairs[0].image, None, "a")])
    check_pairs([])
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
    Image.new("RGB", (8, 6)).save(labels[6])
    png(labels[7], (6, 8), 16, 0, bytes(6 * 17))
    png(labels[8], (6, 8), 4, 0, rows_of_4_bits(np.full((6, 8), 7)))
    pairs[9].image.write_bytes(pairs[9].image.read_bytes()[:-2])
    Image.new("RGB", (8, 7)).save(pairs[10].image)
    Image.new("L", (8, 6)).save(labels[11], format="JPEG")
    Image.new("RGB", (8, 6)).save(pairs[12].image, format="BMP")
    Image.new("RGB", (8, 6)).save(pairs[13].image, format="TIFF")
    labels[14].unlink()
    labels[14].mkdir()
    expected = {
        pairs[0].image: "empty file",
        pairs[1].image: "truncated PNG file",
        labels[2]: "truncated or damaged PNG file",
        pairs[3].image: "neither a PNG nor a JPEG file",
        labels[4]: "No such file or directory",
        labels[5]: "9x6 pixels, but the image has 8x6",
        labels[6]: "not a PNG of 8-bit grey or a palette",
        labels[7]: "not a PNG of 8-bit grey or a palette",
        labels[8]: "not a PNG of 8-bit grey or a palette",
        pairs[9].image: "truncated JPEG file",
        labels[10]: "8x6 pixels, but the image has 8x7",
        labels[11]: "not a PNG of 8-bit grey or a palette",
        pairs[12].image: "neither a PNG nor a JPEG file",
        pairs[13].image: "neither a PNG nor a JPEG file",
        labels[14]: "Is a directory",
    }
    found: dict[str, str] = {}
    for some in (pairs[:9], pairs[9:]):
        with pytest.raises(ValueError, match=rf"got \d problems in {len(some)} pairs") as caught:
            check_pairs(some)
        found |= dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])
    assert found == {str(path): problem for path, problem in expected.items()}


def test_check_pairs_lists_ten_problems_and_counts_the_rest(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, f"{index:02d}") for index in range(12)]
    for pair in pairs:
        pair.image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)got 12 problems in 12 pairs.*\.\.\. and 2 more") as caught:
        check_pairs(pairs)
    assert str(caught.value).count("empty file") == 10


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_check_pairs_finds_a_cut_at_any_byte(tmp_path: Path, suffix: str) -> None:
    pair = write_pair(tmp_path, "a", suffix=suffix)
    whole = pair.image.read_bytes()
    for length in range(len(whole)):
        pair.image.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"a\{suffix}: (truncated|empty|neither)"):
            check_pairs([pair])


def test_check_pairs_is_not_deceived_by_the_end_of_a_small_image_in_the_header(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", suffix=".jpg")
    whole = pair.image.read_bytes()
    assert whole.endswith(b"\xff\xd9")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(whole)) + whole
    pair.image.write_bytes(whole[:2] + thumbnail + whole[2:])
    check_pairs([pair])
    pair.image.write_bytes(whole[:2] + thumbnail + whole[2:-2])
    with pytest.raises(ValueError, match="truncated JPEG file"):
        check_pairs([pair])


def test_check_pairs_and_read_pair_refuse_images_of_impossible_size(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    png(pair.image, (100_000, 100_000), 8, 0, b"")
    with pytest.raises(ValueError, match=r"a\.png: .*exceeds limit"):
        check_pairs([pair])
    with pytest.raises(BadImage, match="exceeds limit"):
        read_pair(pair, TABLE)


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
    for image in (
        Image.fromarray(grey),
        Image.fromarray(np.concatenate([expected, alpha], axis=2)),
        Image.fromarray(np.concatenate([grey[..., None], alpha], axis=2)),
        Image.fromarray(grey.astype(np.uint16) * 256 + 200),
    ):
        image.save(pair.image)
        assert np.array_equal(read_pair(pair, TABLE)[0], expected), image.mode
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


def test_read_pair_leaves_pixels_where_they_are_stored(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    pixels = read_pair(pair, TABLE)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter turn
    Image.fromarray(pixels).save(pair.image, exif=exif)
    assert ImageOps.exif_transpose(Image.open(pair.image)).size == (6, 8)
    assert np.array_equal(read_pair(pair, TABLE)[0], pixels)


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
    expected = f"label must hold the ids 0, 3, 7..9, 255, got [{value}] in {pair.label}; take the files of ids."
    with pytest.raises(BadImage, match=re.escape(expected)):
        read_pair(pair, TABLE)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("RGB", r"got mode RGB in .*a\.png; take the files of ids"),
        ("1", "got mode 1 in"),
        ("LA", "got mode LA in"),
        ("I;16", "got mode I;16 in"),
    ],
)
def test_read_pair_refuses_labels_of_other_modes(tmp_path: Path, mode: str, message: str) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    Image.new(mode, (8, 6)).save(pair.label)
    with pytest.raises(BadImage, match=message):
        read_pair(pair, TABLE)


def test_read_pair_refuses_labels_whose_values_are_brightnesses(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    png(pair.label, (6, 8), 4, 0, rows_of_4_bits(np.zeros((6, 8), dtype=np.uint8)))  # as ids: 0, which is known
    with pytest.raises(BadImage, match="label must be a PNG of 8-bit grey or a palette"):
        read_pair(pair, TABLE)
    Image.new("L", (8, 6), 7).save(pair.label, format="JPEG")
    with pytest.raises(BadImage, match=r"whole PNG image, got .*a\.png"):
        read_pair(pair, TABLE)


def test_read_pair_names_a_file_that_is_wrong(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    assert pair.label is not None
    Image.new("L", (6, 8)).save(pair.label)
    with pytest.raises(BadImage, match=r"image's size 8x6, got 6x8 in .*labels/a\.png"):
        read_pair(pair, TABLE)
    pair.label.unlink()
    with pytest.raises(FileNotFoundError, match=r"got no .*labels/a\.png"):
        read_pair(pair, TABLE)
    png(pair.label, (6, 8), 8, 0, b"")
    with pytest.raises(BadImage, match=r"got .*labels/a\.png, which does not decode"):
        read_pair(pair, TABLE)
    Image.new("RGB", (8, 6)).save(pair.image, format="BMP")
    with pytest.raises(BadImage, match=r"whole PNG or JPEG image, got .*images/a\.png"):
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


@pytest.mark.skipif(not (DATA / "camvid").exists(), reason="the CamVid images are not beside this repository")
def test_real_camvid_is_found_checked_and_read() -> None:
    table = Labels(tuple("abcdefghijk"), np.zeros((11, 3), np.uint8), tuple(range(11)), (11,))
    root = DATA / "camvid"
    for split, number in (("train", 367), ("val", 101), ("test", 233)):
        pairs = find_by_name("find_pairs", root / split, root / f"{split}annot")
        assert [pair.name for pair in pairs] == sorted((root / f"{split}.txt").read_text().split())
        assert len(pairs) == number
        check_pairs(pairs)
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
        check_pairs(pairs)
        table = Labels(tuple(map(str, classes)), np.zeros((len(classes), 3), np.uint8), tuple(classes), void)
        for pair in pairs:
            image, label = read_pair(pair, table)
            assert image.shape == (*label.shape, 3)
            assert len(np.unique(label)) > 3
            assert set(np.unique(label).tolist()) <= {*range(len(classes)), 255}
