import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ccgpu.train.datasets import (
    EvaluationSet,
    Pair,
    StreamSampler,
    TrainStream,
    check_pairs,
    evaluation_indices,
    find_pairs,
    read_pair,
)
from ccgpu.train.labels import ID_TO_TRAIN_ID
from ccgpu.train.transforms import EvaluationTransform, TrainTransform

CAMVID_TOOL = Path(__file__).resolve().parents[3] / "shared" / "tools" / "camvid_as_cityscapes.py"


def write_pair(root: Path, split: str, name: str, size: tuple[int, int] = (6, 8), value: int = 7) -> Pair:
    """A picture of one colour and a label of one id in the official layout."""
    city = name.split("_")[0]
    image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    label = root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"
    for path, pixels in ((image, np.full((*size, 3), value)), (label, np.full(size, value))):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return Pair(image, label, name)


def png(path: Path, width: int, height: int, depth: int, colour_type: int, rows: bytes) -> None:
    """Write a PNG of a kind that Pillow does not write."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )


def test_find_pairs_lists_a_split_by_city_and_name(tmp_path: Path) -> None:
    expected = [write_pair(tmp_path, "train", name) for name in ("aachen_000001_000019", "ulm_000000_000019")]
    write_pair(tmp_path, "val", "jena_000000_000019")
    (tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_color.png").touch()
    assert find_pairs(tmp_path, "train") == expected
    assert find_pairs(str(tmp_path), "train") == expected


def test_find_pairs_says_which_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root must be a folder, got .*nowhere"):
        find_pairs(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="got no leftImg8bit in"):
        find_pairs(tmp_path, "train")
    (tmp_path / "leftImg8bit/train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="got no gtFine in"):
        find_pairs(tmp_path, "train")
    (tmp_path / "gtFine/train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="split must hold pictures, got none in"):
        find_pairs(tmp_path, "train")
    (tmp_path / "leftImg8bit/val").mkdir()
    for split in ("test", ""):
        with pytest.raises(FileNotFoundError, match=f"got '{split}'; choose one of: train, val"):
            find_pairs(tmp_path, split)


def test_find_pairs_names_files_without_partner(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, "train", f"ulm_{index:06d}_000019") for index in range(15)]
    pairs[0].label.unlink()
    pairs[1].image.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        find_pairs(tmp_path, "train")
    message = str(caught.value)
    assert "got 2 of 15 without" in message
    assert f"{pairs[0].image} has no label file" in message
    assert f"{pairs[1].label} has no picture" in message
    for pair in pairs[2:13]:
        pair.image.unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)got 13 of 15 without.*\.\.\. and 3 more"):
        find_pairs(tmp_path, "train")


def test_check_pairs_accepts_whole_files_of_every_kind(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, "train", f"ulm_{index:06d}_000019") for index in range(4)]
    Image.open(pairs[1].image).convert("L").save(pairs[1].image)
    Image.open(pairs[2].label).convert("P").save(pairs[2].label)
    with pairs[3].image.open("ab") as file:
        file.write(b"something behind the closing chunk")
    check_pairs(pairs)
    check_pairs([])


def test_check_pairs_finds_every_problem_and_names_the_files(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, "train", f"ulm_{index:06d}_000019") for index in range(9)]
    pairs[0].image.write_bytes(b"")
    pairs[1].image.write_bytes(pairs[1].image.read_bytes()[:-5])
    pairs[2].label.write_bytes(pairs[2].label.read_bytes()[:20])
    pairs[3].image.write_bytes(b"<html>not found</html>")
    pairs[4].label.unlink()
    Image.new("L", (9, 6)).save(pairs[5].label)
    Image.new("RGB", (8, 6)).save(pairs[6].label)
    png(pairs[7].label, 8, 6, 16, 0, bytes(6 * 17))
    with pytest.raises(ValueError, match="got 8 problems in 9 pairs") as caught:
        check_pairs(pairs)
    message = str(caught.value)
    for path, problem in (
        (pairs[0].image, "empty file"),
        (pairs[1].image, "truncated PNG file"),
        (pairs[2].label, "truncated PNG file"),
        (pairs[3].image, "not a PNG file"),
        (pairs[4].label, "No such file or directory"),
        (pairs[5].label, "9x6 pixels, but the picture has 8x6"),
        (pairs[6].label, "not an 8-bit single-channel picture of label ids"),
        (pairs[7].label, "not an 8-bit single-channel picture of label ids"),
    ):
        assert f"{path}: {problem}" in message
    assert str(pairs[8].image) not in message


def test_check_pairs_lists_ten_problems_and_counts_the_rest(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, "train", f"ulm_{index:06d}_000019") for index in range(12)]
    for pair in pairs:
        pair.image.write_bytes(b"")
    with pytest.raises(ValueError, match=r"(?s)got 12 problems in 12 pairs.*\.\.\. and 2 more") as caught:
        check_pairs(pairs)
    assert str(caught.value).count("empty file") == 10


def test_check_pairs_finds_a_cut_at_any_byte(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    whole = pair.image.read_bytes()
    for length in range(len(whole)):
        pair.image.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"_leftImg8bit\.png: (truncated|empty|not a PNG)"):
            check_pairs([pair])


def test_read_pair_returns_rgb_and_train_ids(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    ids = np.random.default_rng(0).integers(0, 34, (6, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(pair.image)
    Image.fromarray(ids).save(pair.label)
    image, label = read_pair(pair)
    assert image.dtype == label.dtype == np.uint8
    assert np.array_equal(image, pixels)
    assert np.array_equal(label, ID_TO_TRAIN_ID[ids])


def test_read_pair_turns_every_kind_of_picture_into_rgb(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    grey = np.random.default_rng(0).integers(0, 256, (6, 8), dtype=np.uint8)
    expected = np.stack([grey] * 3, axis=2)
    alpha = np.random.default_rng(1).integers(0, 256, (6, 8, 1), dtype=np.uint8)
    for picture in (
        Image.fromarray(grey),
        Image.fromarray(np.concatenate([expected, alpha], axis=2)),
        Image.fromarray(np.concatenate([grey[..., None], alpha], axis=2)),
        Image.fromarray(grey.astype(np.uint16) * 256 + 200),
    ):
        picture.save(pair.image)
        assert np.array_equal(read_pair(pair)[0], expected), picture.mode
    palette = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8), mode=None).convert("P")
    palette.putpalette([value for index in range(256) for value in (index, 2 * index % 256, 5)])
    palette.save(pair.image)
    index = np.arange(48).reshape(6, 8)
    assert np.array_equal(read_pair(pair)[0], np.stack([index, 2 * index, np.full((6, 8), 5)], axis=2))
    deep = np.random.default_rng(2).integers(0, 256, (6, 8, 3, 2), dtype=np.uint8)
    png(pair.image, 8, 6, 16, 2, b"".join(b"\x00" + row.tobytes() for row in deep))
    assert np.array_equal(read_pair(pair)[0], deep[..., 0])


def test_read_pair_takes_the_index_of_a_palette_label(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    label = Image.fromarray(np.full((6, 8), 26, dtype=np.uint8)).convert("P")
    label.putpalette([255 - index // 3 % 256 for index in range(768)])
    label.save(pair.label)
    assert (read_pair(pair)[1] == 13).all()


@pytest.mark.parametrize("value", [34, 100, 255])
def test_read_pair_names_a_label_outside_the_table(tmp_path: Path, value: int) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    ids = np.full((6, 8), 7, dtype=np.uint8)
    ids[2, 3] = value
    Image.fromarray(ids).save(pair.label)
    with pytest.raises(ValueError, match=rf"label ids 0\.\.33, got \[{value}\] in .*ulm_000000_000019_gtFine"):
        read_pair(pair)


def test_read_pair_names_a_file_that_is_wrong_or_damaged(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    Image.new("RGB", (8, 6)).save(pair.label)
    with pytest.raises(ValueError, match=r"got mode RGB in .*labelIds.png; use the"):
        read_pair(pair)
    Image.new("L", (6, 8)).save(pair.label)
    with pytest.raises(ValueError, match=r"picture's size 8x6, got 6x8 in .*labelIds.png"):
        read_pair(pair)
    pair.label.unlink()
    with pytest.raises(FileNotFoundError, match=r"got no .*labelIds.png"):
        read_pair(pair)


def test_read_pair_names_the_file_wherever_it_is_damaged(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "train", "ulm_000000_000019")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(pair.image)
    whole = pair.image.read_bytes()
    end_of_pixels = len(whole) - 12 - 8  # what is missing after the last pixel does not matter to the decoder
    for length in range(0, end_of_pixels, 3):
        pair.image.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"got .*ulm_000000_000019_leftImg8bit\.png, which does not decode"):
            read_pair(pair)
    refused = 0
    for position in range(len(whole)):
        pair.image.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            read_pair(pair)
        except ValueError as error:
            refused += "ulm_000000_000019" in str(error)
    assert refused > 0.8 * len(whole)  # any other exception fails; a changed checksum of IEND may pass


def stream_of(tmp_path: Path, pictures: int, length: int, seed: int = 0) -> TrainStream:
    """Stream of pictures and labels in which every pixel differs, so that any augmentation shows."""
    pairs = [write_pair(tmp_path, "train", f"ulm_{index:06d}_000019") for index in range(pictures)]
    for index, pair in enumerate(pairs):
        generator = np.random.default_rng(index)
        Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(pair.image)
        Image.fromarray(generator.integers(7, 34, (24, 32), dtype=np.uint8)).save(pair.label)
    return TrainStream(pairs, TrainTransform((8, 8)), seed, length)


def test_train_stream_shows_every_picture_once_an_epoch_in_changing_orders(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 7, 28)
    names = [stream[position]["name"] for position in range(28)]
    epochs = [tuple(names[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 7
    assert len(set(epochs)) == 4
    other = stream_of(tmp_path, 7, 28, seed=1)
    assert names != [other.pair_at(position).name for position in range(28)]
    assert names == [stream.pair_at(position).name for position in range(28)]


def test_train_stream_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 3, 30)
    direct = [stream[position] for position in range(30)]
    again = pickle.loads(pickle.dumps(stream_of(tmp_path, 3, 30)))
    for position in reversed(range(30)):
        sample = again[position]
        assert sample["name"] == direct[position]["name"]
        assert torch.equal(sample["image"], direct[position]["image"])
        assert torch.equal(sample["label"], direct[position]["label"])
    expected = stream.transform(*read_pair(stream.pair_at(11)), np.random.default_rng((0, 11)))
    assert torch.equal(direct[11]["image"], expected[0])
    assert torch.equal(direct[11]["label"], expected[1])
    assert len({sample["image"].numpy().tobytes() for sample in direct}) == 30  # no augmentation comes twice
    reseeded = stream_of(tmp_path, 3, 30, seed=1)
    same = [torch.equal(reseeded[position]["image"], direct[position]["image"]) for position in range(30)]
    assert not any(same)


def test_train_stream_refuses_bad_arguments(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 2, 4)
    for position in (-1, 4):
        with pytest.raises(IndexError, match=rf"position must be in 0\.\.3, got {position}"):
            stream[position]
    with pytest.raises(ValueError, match="pairs must be 1 or more, got 0"):
        TrainStream([], stream.transform, 0, 4)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        TrainStream(stream.pairs, stream.transform, -1, 4)
    with pytest.raises(ValueError, match="length must be 0 or more, got -2"):
        TrainStream(stream.pairs, stream.transform, 0, -2)


def test_stream_sampler_deals_the_global_batch_to_the_processes() -> None:
    assert list(StreamSampler(0, 3, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert list(StreamSampler(1, 3, 4, 0, 2)) == [[4, 5], [8, 9]]
    assert list(StreamSampler(1, 3, 4, 1, 2)) == [[6, 7], [10, 11]]
    assert len(StreamSampler(1, 3, 4, 1, 2)) == 2
    assert list(StreamSampler(3, 3, 4)) == []


def test_stream_sampler_resumes_by_starting_later() -> None:
    whole = list(StreamSampler(0, 9, 6, 2, 3))
    assert list(StreamSampler(4, 9, 6, 2, 3)) == whole[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 6, 0, 4), r"batch_size must be a positive multiple of world_size \(4\), got 6"),
        ((0, 1, 0), r"batch_size must be a positive multiple of world_size \(1\), got 0"),
        ((2, 1, 4), r"start must be in 0..stop \(1\), got 2"),
        ((-1, 1, 4), r"start must be in 0..stop \(1\), got -1"),
        ((0, 1, 4, 2, 2), "rank must be in 0..world_size-1 .*got 2"),
    ],
)
def test_stream_sampler_refuses_bad_arguments(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamSampler(*arguments)


def test_evaluation_indices_take_each_sample_once() -> None:
    parts = [list(evaluation_indices(10, rank, 4)) for rank in range(4)]
    assert sorted(index for part in parts for index in part) == list(range(10))
    assert parts[1] == [1, 5, 9]
    assert list(evaluation_indices(1, 1, 2)) == []
    with pytest.raises(ValueError, match="rank must be in"):
        evaluation_indices(4, -1, 2)
    with pytest.raises(ValueError, match="length must be 0 or more, got -1"):
        evaluation_indices(-1)


def test_evaluation_set_reads_in_order_at_full_size(tmp_path: Path) -> None:
    pairs = [write_pair(tmp_path, "val", f"ulm_{index:06d}_000019", (6, 8 + index), 7 + index) for index in range(4)]
    samples = EvaluationSet(pairs, EvaluationTransform())
    assert len(samples) == 4
    for index, pair in enumerate(pairs):
        assert samples[index]["name"] == pair.name
        assert samples[index]["image"].shape == (3, 6, 8 + index)
        assert (samples[index]["label"] == int(ID_TO_TRAIN_ID[7 + index])).all()


def test_spawned_workers_give_the_same_batches(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 5, 12)
    loaders = [
        DataLoader(stream, batch_sampler=StreamSampler(0, 3, 4)),
        DataLoader(stream, batch_sampler=StreamSampler(0, 3, 4), num_workers=2, multiprocessing_context="spawn"),
    ]
    for here, spawned in zip(*loaders, strict=True):
        assert here["name"] == spawned["name"]
        assert torch.equal(here["image"], spawned["image"])
        assert torch.equal(here["label"], spawned["label"])
        assert here["image"].shape == (4, 3, 8, 8)


@pytest.mark.skipif(not CAMVID_TOOL.exists(), reason="the CamVid pictures are not beside this repository")
def test_real_pictures_go_through(tmp_path: Path) -> None:
    command = [sys.executable, str(CAMVID_TOOL), str(tmp_path / "camvid"), "--limit", "3"]
    subprocess.run(command, check=True, capture_output=True)
    for split in ("train", "val", "test"):
        pairs = find_pairs(tmp_path / "camvid", split)
        check_pairs(pairs)
        assert len(pairs) == 3
        for pair in pairs:
            image, label = read_pair(pair)
            assert image.shape == (360, 480, 3)
            assert 40 < image.mean() < 200
            assert image.std() > 20
            present = set(np.unique(label).tolist())
            assert {0, 2} <= present <= {0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 18, 255}
