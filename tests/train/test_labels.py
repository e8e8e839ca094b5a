import numpy as np
import pytest

from ccgpu.train.labels import (
    CLASS_COLOURS,
    CLASS_NAMES,
    ID_TO_TRAIN_ID,
    IGNORE,
    LABEL_IDS,
    LABELS,
    TRAIN_ID_TO_ID,
)


def test_labels_equal_the_published_table() -> None:
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    ours = [(row.name, row.id, row.train_id, row.category, row.ignored, row.colour) for row in LABELS]
    assert ours == [(row.name, row.id, row.trainId, row.category, row.ignoreInEval, row.color) for row in official]


def test_lookups_are_what_the_table_says() -> None:
    for value in range(256):
        rows = [row for row in LABELS if row.id == value]
        expected = rows[0].train_id if rows and not rows[0].ignored else IGNORE
        assert ID_TO_TRAIN_ID[value] == expected
        rows = [row for row in LABELS if row.train_id == value and not row.ignored]
        assert TRAIN_ID_TO_ID[value] == (rows[0].id if rows else 0)


def test_lookups_invert_each_other_on_the_classes() -> None:
    classes = np.arange(19)
    assert np.array_equal(ID_TO_TRAIN_ID[TRAIN_ID_TO_ID[classes]], classes)
    assert ID_TO_TRAIN_ID.dtype == TRAIN_ID_TO_ID.dtype == np.uint8


def test_class_names_and_colours_are_in_the_order_of_the_train_ids() -> None:
    assert CLASS_NAMES[0] == "road"
    assert CLASS_NAMES[13] == "car"
    assert CLASS_NAMES[18] == "bicycle"
    assert CLASS_COLOURS.shape == (19, 3)
    assert CLASS_COLOURS[13].tolist() == [0, 0, 142]
    assert len(set(CLASS_NAMES)) == len({tuple(colour) for colour in CLASS_COLOURS.tolist()}) == 19


def test_tables_cannot_be_changed_by_a_reader() -> None:
    for table in (CLASS_COLOURS, ID_TO_TRAIN_ID, LABEL_IDS, TRAIN_ID_TO_ID):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1
