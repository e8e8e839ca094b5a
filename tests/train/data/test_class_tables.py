"""The class tables of the datasets, against the published ones and the real label files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.models.labels import IGNORE, Labels
from ccgpu.train import ade20k, camvid, lip, voc
from ccgpu.train.data.cityscapes_labels import CITYSCAPES, LABELS

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


TABLES = {
    **{"cityscapes": CITYSCAPES, "ade20k": ade20k.LABELS, "voc": voc.LABELS, "lip": lip.LABELS},
    "camvid": camvid.LABELS,
}


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
    # Two classes share one colour: roads and skyscrapers.
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
