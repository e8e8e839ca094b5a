from pathlib import Path

import numpy as np
import pytest
import torch

from ccgpu.models.labels import Labels
from ccgpu.train.data.pairs import find_by_name
from ccgpu.train.dataset import Dataset, check_classes, find_dataset

LABELS = Labels(tuple("abcdef"), np.zeros((6, 3), np.uint8), tuple(range(6)))


def dataset(flip_pairs: tuple[tuple[int, int], ...] = (), scores: tuple[str, ...] = ("miou",)) -> Dataset:
    return Dataset(
        name="letters",
        labels=LABELS,
        layout="a folder with SPLIT/NAME.png",
        find_pairs=lambda root, split, labelled: find_by_name("find_pairs", root / split, None),
        write_synthetic=lambda root, splits, size, seed: Path(root),
        recipe={},
        presets={},
        source="nobody's",
        scores=scores,
        flip_pairs=flip_pairs,
    )


def test_exchange_maps_the_classes_of_a_flipped_image() -> None:
    exchange = dataset(((1, 2), (5, 3))).exchange
    assert exchange.dtype == np.uint8
    assert exchange.tolist() == [0, 2, 1, 5, 4, 3, *range(6, 256)]
    assert (exchange[exchange] == np.arange(256)).all()
    logits = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert logits[:, exchange[:6].tolist()].flatten().tolist() == [0, 2, 1, 5, 4, 3]
    assert dataset().exchange.tolist() == list(range(256))


@pytest.mark.parametrize("flip_pairs", [((1, 1),), ((1, 2), (2, 3)), ((0, 6),), ((-1, 2),)])
def test_dataset_refuses_flip_pairs_that_are_no_exchange(flip_pairs: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"Dataset: flip_pairs must be pairs of different train ids in 0\.\.5, got"):
        dataset(flip_pairs)


@pytest.mark.parametrize("scores", [(), ("miou", "f1")])
def test_dataset_refuses_unknown_scores(scores: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"Dataset: scores must be one or more of .*mean_accuracy"):
        dataset(scores=scores)


def test_find_dataset_refuses_another_number_of_classes_than_the_networks() -> None:
    assert find_dataset("camvid").name == find_dataset("ccgpu.train.camvid", 11).name == "camvid"
    with pytest.raises(
        ValueError, match="--dataset must have the network's 19 classes, got camvid with 11; name another"
    ):
        find_dataset("camvid", 19)


def test_check_classes_names_where_the_classes_are_from() -> None:
    check_classes(LABELS, 6, "the file's classes")
    with pytest.raises(ValueError, match="the network's 5 classes, got the file's classes with 6; name another"):
        check_classes(LABELS, 5, "the file's classes")
