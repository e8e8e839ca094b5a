"""Samples and their order: functions of seed and position, whatever the workers and processes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ccgpu.models.image_files import BadImage
from ccgpu.models.labels import Labels
from ccgpu.train.data.clips import evaluation_clips, training_clips
from ccgpu.train.data.pairs import Pair
from ccgpu.train.data.reading import read_pair
from ccgpu.train.data.samples import EvaluationSet, StreamSampler, TrainStream, evaluation_indices, read_clip
from ccgpu.train.data.transforms import EvaluationTransform, TrainTransform

TABLE = Labels(tuple("abcdef"), np.zeros((6, 3), np.uint8), ids=(1, 2, 3, 4, 5, 6), void=(0, 255))


def write_pair(root: Path, name: str, size: tuple[int, int] = (24, 32), seed: int = 0) -> Pair:
    """Write an image and a label map whose neighbouring pixels differ, so that any augmentation has an effect."""
    generator = np.random.default_rng(seed)
    image, label = root / f"{name}.png", root / f"{name}_label.png"
    Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image)
    Image.fromarray(generator.integers(0, 7, size, dtype=np.uint8)).save(label)
    return Pair(image, label, name)


def frame_of(name: str) -> tuple[str, int]:
    sequence, _, number = name.partition("_")
    return sequence, int(number)


def video_of(root: Path, length: int, size: tuple[int, int] = (24, 32)) -> list[Pair]:
    return [write_pair(root, f"drive_{index:03d}", size, seed=index) for index in range(length)]


def stream_of(root: Path, images: int, length: int, seed: int = 0) -> TrainStream:
    clips = [(write_pair(root, f"image_{index}", seed=index),) for index in range(images)]
    return TrainStream(clips, TABLE, TrainTransform((8, 8)), seed, length)


def test_read_clip_stacks_frames_in_the_order_of_the_clip(tmp_path: Path) -> None:
    pairs = video_of(tmp_path, 3)
    images, labels = read_clip((pairs[2], pairs[0]), TABLE, video=True)
    assert images.shape == (2, 24, 32, 3)
    for index, pair in enumerate((pairs[2], pairs[0])):
        expected = read_pair(pair, TABLE)
        assert np.array_equal(images[index], expected[0])
        assert np.array_equal(labels[index], expected[1])
    image, label = read_clip((pairs[1],), TABLE, video=False)
    assert np.array_equal(image, read_pair(pairs[1], TABLE)[0])
    assert np.array_equal(label, read_pair(pairs[1], TABLE)[1])
    assert read_clip((pairs[1],), TABLE, video=True)[0].shape == (1, 24, 32, 3)


def test_read_clip_names_frames_of_different_sizes(tmp_path: Path) -> None:
    clip = (*video_of(tmp_path, 2), write_pair(tmp_path, "drive_other", (24, 30)))
    expected = r"one size, got 32x24 in .*drive_000\.png and 30x24 in .*drive_other\.png; resize one"
    with pytest.raises(BadImage, match=expected):
        read_clip(clip, TABLE, video=True)
    with pytest.raises(ValueError, match="clip must be one image, got 3 frames; pass video=True"):
        read_clip(clip, TABLE, video=False)


def test_train_stream_shows_every_image_once_an_epoch_in_changing_orders(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 7, 28)
    names = [stream[position]["names"] for position in range(28)]
    epochs = [tuple(names[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 7
    assert len(set(epochs)) == 4
    other = stream_of(tmp_path, 7, 28, seed=1)
    assert names != [(other.clip_at(position)[0].name,) for position in range(28)]
    assert names == [(stream.clip_at(position)[0].name,) for position in range(28)]


def test_train_stream_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 3, 30)
    direct = [stream[position] for position in range(30)]
    again = pickle.loads(pickle.dumps(stream_of(tmp_path, 3, 30)))
    for position in reversed(range(30)):
        sample = again[position]
        assert sample["names"] == direct[position]["names"]
        assert torch.equal(sample["image"], direct[position]["image"])
        assert torch.equal(sample["label"], direct[position]["label"])
    expected = stream.transform(*read_pair(stream.clip_at(11)[0], TABLE), np.random.default_rng((0, 11)))
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
    with pytest.raises(ValueError, match="clips must be 1 or more, got 0"):
        TrainStream([], TABLE, stream.transform, 0, 4)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        TrainStream(stream.clips, TABLE, stream.transform, -1, 4)
    with pytest.raises(ValueError, match="length must be 0 or more, got -2"):
        TrainStream(stream.clips, TABLE, stream.transform, 0, -2)


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
    pairs = [write_pair(tmp_path, f"image_{index}", (6, 8 + index), seed=index) for index in range(4)]
    samples = EvaluationSet(evaluation_clips(pairs, 1, None), TABLE, EvaluationTransform())
    assert len(samples) == 4
    for index, pair in enumerate(pairs):
        assert samples[index].keys() == {"image", "label", "names", "first"}
        assert (samples[index]["names"], samples[index]["first"]) == ((pair.name,), 0)
        assert samples[index]["image"].shape == (3, 6, 8 + index)
        assert np.array_equal(samples[index]["label"].numpy(), read_pair(pair, TABLE)[1])


def test_clips_are_samples_with_an_axis_of_time(tmp_path: Path) -> None:
    pairs = video_of(tmp_path, 7)
    clips = training_clips(pairs, 5, frame_of)
    stream = TrainStream(clips, TABLE, TrainTransform((8, 10)), seed=1, length=6, video=True)
    for position in range(6):
        sample = stream[position]
        assert sample["image"].shape == (3, 5, 8, 10)
        assert sample["label"].shape == (5, 8, 10)
        assert sample["names"] == tuple(pair.name for pair in stream.clip_at(position))
        for frame, pair in enumerate(stream.clip_at(position)):
            alone = stream.transform(*read_pair(pair, TABLE), np.random.default_rng((1, position)))
            assert torch.equal(sample["image"][:, frame], alone[0])
            assert torch.equal(sample["label"][frame], alone[1])
    assert {stream.clip_at(position) for position in range(3)} == set(clips)


def test_evaluation_counts_every_frame_once_through_a_loader(tmp_path: Path) -> None:
    pairs = video_of(tmp_path, 8, (6, 8))
    samples = EvaluationSet(evaluation_clips(pairs, 5, frame_of), TABLE, EvaluationTransform(), video=True)
    counted: list[str] = []
    for batch in DataLoader(samples, batch_size=1):
        first, names = int(batch["first"][0]), [name for (name,) in batch["names"]]
        assert batch["image"].shape == (1, 3, len(names), 6, 8)
        assert batch["label"].shape == (1, len(names), 6, 8)
        counted += names[first:]
    assert counted == [pair.name for pair in pairs]


@pytest.mark.parametrize(("length", "frames"), [(5, 3), (5, 1), (2, 2)])
def test_a_clip_keeps_its_axis_of_time_however_short(tmp_path: Path, length: int, frames: int) -> None:
    clips = evaluation_clips(video_of(tmp_path, frames), length, frame_of)
    sample = EvaluationSet(clips, TABLE, EvaluationTransform(), video=True)[0]
    assert sample["image"].shape == (3, frames, 24, 32)
    assert sample["label"].shape == (frames, 24, 32)


def test_images_without_labels_can_be_read(tmp_path: Path) -> None:
    pair = Pair(write_pair(tmp_path, "a").image, None, "a")
    sample = EvaluationSet([((pair,), 0)], TABLE, EvaluationTransform())[0]
    assert (sample["label"] == 255).all()
    assert sample["image"].shape == (3, 24, 32)


def test_spawned_workers_give_the_same_batches(tmp_path: Path) -> None:
    clips = training_clips(video_of(tmp_path, 6), 2, frame_of)
    stream = TrainStream(clips, TABLE, TrainTransform((8, 8)), 0, 12, video=True)
    loaders = [
        DataLoader(stream, batch_sampler=StreamSampler(0, 3, 4)),
        DataLoader(stream, batch_sampler=StreamSampler(0, 3, 4), num_workers=1, multiprocessing_context="spawn"),
    ]
    for here, spawned in zip(*loaders, strict=True):
        assert here["names"] == spawned["names"]
        assert torch.equal(here["image"], spawned["image"])
        assert torch.equal(here["label"], spawned["label"])
        assert here["image"].shape == (4, 3, 2, 8, 8)
