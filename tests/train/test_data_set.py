from pathlib import Path

import numpy as np
import pytest
import torch

from ccgpu.train.data_set import DataSet
from ccgpu.train.labels import Labels
from ccgpu.train.pairs import find_by_name

LABELS = Labels(tuple("abcdef"), np.zeros((6, 3), np.uint8), tuple(range(6)))


def data_set(mirrored: tuple[tuple[int, int], ...] = (), scores: tuple[str, ...] = ("miou",)) -> DataSet:
    return DataSet(
        name="letters",
        labels=LABELS,
        layout="a folder with SPLIT/NAME.png",
        find_pairs=lambda root, split, labelled: find_by_name("find_pairs", root / split, None),
        draw=lambda root, splits, size, seed: Path(root),
        recipe={},
        demo={},
        source="nobody's",
        scores=scores,
        mirrored=mirrored,
    )


def test_exchange_names_the_classes_of_a_mirror_image() -> None:
    exchange = data_set(((1, 2), (5, 3))).exchange
    assert exchange.dtype == np.uint8
    assert exchange.tolist() == [0, 2, 1, 5, 4, 3, *range(6, 256)]
    assert (exchange[exchange] == np.arange(256)).all()
    logits = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert logits[:, exchange[:6].tolist()].flatten().tolist() == [0, 2, 1, 5, 4, 3]
    assert data_set().exchange.tolist() == list(range(256))


@pytest.mark.parametrize("mirrored", [((1, 1),), ((1, 2), (2, 3)), ((0, 6),), ((-1, 2),)])
def test_data_set_refuses_classes_that_cannot_be_exchanged(mirrored: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"DataSet: mirrored must be pairs of different train ids in 0\.\.5, got"):
        data_set(mirrored)


@pytest.mark.parametrize("scores", [(), ("miou", "f1")])
def test_data_set_refuses_scores_that_nobody_computes(scores: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"DataSet: scores must be one or more of .*mean_accuracy"):
        data_set(scores=scores)
