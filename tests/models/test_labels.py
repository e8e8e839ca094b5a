from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.labels import IGNORE, Labels
from ccgpu.train import ade20k, camvid, lip
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
TABLES = {"cityscapes": CITYSCAPES, "ade20k": ade20k.LABELS, "lip": lip.LABELS, "camvid": camvid.LABELS}


def some_labels(**changes: Any) -> Labels:
    values = {"names": ("a", "b"), "colours": np.array([[1, 2, 3], [4, 5, 6]], np.uint8), "ids": (7, 3), "void": (9, 0)}
    return Labels(**{**values, **changes})


def test_labels_look_up_both_ways() -> None:
    labels = some_labels()
    assert labels.num_classes == 2
    assert labels.known.tolist() == [0, 3, 7, 9]
    assert {value: int(labels.to_train[value]) for value in (7, 3, 9, 0, 8, 255)} == {
        **{7: 0, 3: 1},
        **dict.fromkeys((9, 0, 8, 255), IGNORE),
    }
    assert [int(labels.to_file[value]) for value in (0, 1, 2, 255)] == [7, 3, 9, 9]
    assert some_labels(void=()).to_file[2:].tolist() == [0] * 254


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("a", "a")}, "names must be 1..255 different names"),
        ({"names": (), "ids": (), "colours": np.zeros((0, 3), np.uint8)}, "names must be"),
        ({"ids": (7,)}, "ids and void must be different values in 0..255, 2 of them ids"),
        ({"ids": (7, 9)}, r"got \(7, 9\) and \(9, 0\)"),
        ({"ids": (7, 256)}, "in 0..255"),
        ({"colours": np.zeros((3, 3), np.uint8)}, r"colours must be uint8 \(2, 3\), got uint8 \(3, 3\)"),
        ({"colours": np.zeros((2, 3))}, "got float64"),
    ],
)
def test_labels_refuse_a_table_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some_labels(**changes)


@pytest.mark.parametrize("labels", TABLES.values(), ids=TABLES)
def test_tables_invert_each_other_and_cannot_be_changed(labels: Labels) -> None:
    classes = np.arange(labels.num_classes)
    assert np.array_equal(labels.to_train[labels.to_file[classes]], classes)
    assert set(labels.known[labels.to_train[labels.known] == IGNORE].tolist()) == set(labels.void)
    for table in (labels.colours, labels.to_train, labels.to_file, labels.known):
        assert table.dtype == np.uint8
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1


def test_cityscapes_equals_the_published_table() -> None:
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    ours = [(row.name, row.id, row.train_id, row.category, row.ignored, row.colour) for row in LABELS]
    assert ours == [(row.name, row.id, row.trainId, row.category, row.ignoreInEval, row.color) for row in official]


def test_cityscapes_lookups_are_what_its_rows_say() -> None:
    for value in range(256):
        rows = [row for row in LABELS if row.id == value]
        assert CITYSCAPES.to_train[value] == (rows[0].train_id if rows and not rows[0].ignored else IGNORE)
        rows = [row for row in LABELS if row.train_id == value and not row.ignored]
        assert CITYSCAPES.to_file[value] == (rows[0].id if rows else 0)
    assert CITYSCAPES.known.tolist() == [*range(34)]
    assert (CITYSCAPES.names[0], CITYSCAPES.names[13], CITYSCAPES.names[18]) == ("road", "car", "bicycle")
    assert CITYSCAPES.colours[13].tolist() == [0, 0, 142]
    assert len({tuple(colour) for colour in CITYSCAPES.colours.tolist()}) == 19


def test_ade20k_has_the_names_that_come_with_the_data() -> None:
    rows = SHARED / "samples/ade20k/ADEChallengeData2016/objectInfo150.txt"
    if not rows.is_file():
        pytest.skip(f"the real samples are not here: {rows}")
    fields = [line.split("\t") for line in rows.read_text().splitlines()[1:]]
    assert [int(row[0]) for row in fields] == list(ade20k.LABELS.ids)
    assert [row[-1].partition(",")[0].strip() for row in fields] == list(ade20k.LABELS.names)
    colours = ade20k.LABELS.colours
    assert colours[[0, 1, 2, 20, 149]].tolist() == [
        *([120, 120, 120], [180, 120, 120], [6, 230, 230], [0, 102, 200], [92, 0, 255])
    ]
    # Of all colours only that of roads is there twice, for skyscrapers too.
    assert len({tuple(colour) for colour in colours.tolist()}) == 149
    assert colours[6].tolist() == colours[48].tolist()


def test_camvid_has_the_colours_of_the_real_label_files() -> None:
    file = SHARED / "camvid/trainannot/0001TP_006690.png"
    if not file.is_file():
        pytest.skip(f"the real dataset is not here: {file}")
    palette = np.array(Image.open(file).getpalette(), np.uint8).reshape(-1, 3)
    assert np.array_equal(palette[:11], camvid.LABELS.colours)


def test_lip_flips_the_classes_of_left_and_right() -> None:
    names = lip.LABELS.names
    pairs = {(name, name.replace("left", "right")) for name in names if name.startswith("left")}
    assert {(names[left], names[right]) for left, right in lip.DATASET.flip_pairs} == pairs
    assert len(pairs) == 3
    exchanged = lip.DATASET.exchange
    assert [names[exchanged[value]] for value in (13, 14, 15, 18)] == ["face", "right-arm", "left-arm", "right-shoe"]
    assert len({tuple(colour) for colour in lip.LABELS.colours.tolist()}) == 20
