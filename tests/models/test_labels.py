"""`Labels`: lookups both ways, and tables that do not fit."""

from typing import Any

import numpy as np
import pytest

from ccgpu.models.labels import IGNORE, Labels, class_differences, codes_of
from ccgpu.train.data.ade20k_labels import LABELS as ADE20K


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
        ({"ids": (7,)}, "ids and void must be different values in 0..65535, 2 of them ids"),
        ({"ids": (7, 9)}, r"got \(7, 9\) and \(9, 0\)"),
        ({"ids": (7, 65536)}, "in 0..65535"),
        ({"ids": (7, 1 << 24), "coding": "colours"}, "in 0..16777215"),
        ({"coding": "names"}, "coding must be one of"),
        ({"colours": np.zeros((3, 3), np.uint8)}, r"colours must be uint8 \(2, 3\), got uint8 \(3, 3\)"),
        ({"colours": np.zeros((2, 3))}, "got float64"),
    ],
)
def test_labels_refuse_a_table_that_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some_labels(**changes)


def test_labels_above_255_are_16_bit_ids() -> None:
    labels = some_labels(ids=(7, 4000))
    assert labels.to_train.shape == (65536,)
    assert (labels.to_train[4000], labels.to_train[256], labels.to_train[9]) == (1, IGNORE, IGNORE)
    assert labels.to_file.dtype == labels.known.dtype == np.uint16
    assert [int(labels.to_file[value]) for value in (0, 1, 2)] == [7, 4000, 9]


def test_colours_are_ids_of_24_bits_and_rgb_in_files() -> None:
    labels = some_labels(ids=(0xFF0001, 0x00FF02), void=(0,), coding="colours")
    assert labels.to_train.shape == (1 << 24,)
    assert (labels.to_train[0xFF0001], labels.to_train[0x00FF02], labels.to_train[1]) == (0, 1, IGNORE)
    assert labels.to_file.dtype == np.uint8
    assert labels.to_file[[0, 1, 255]].tolist() == [[255, 0, 1], [0, 255, 2], [0, 0, 0]]
    assert codes_of(labels.to_file[:2]).tolist() == [*labels.ids]
    assert labels.show(labels.known) == "#000000, #00ff02, #ff0001"
    same = Labels.from_plain(labels.as_plain())
    assert (same.ids, same.void, same.coding) == (labels.ids, labels.void, "colours")
    assert Labels.from_plain(some_labels().as_plain()).coding == "ids"


def test_class_differences_show_colours_and_another_coding() -> None:
    colours = some_labels(ids=(0xFF0000, 0x0000FF), void=(), coding="colours")
    moved = some_labels(ids=(0xFF0000, 0x00FF00), void=(), coding="colours")
    assert class_differences(colours.as_plain(), colours, exact=True) == ""
    expected = "other label colours (class 1: 'b' (#0000ff) -> 'b' (#00ff00))"
    assert class_differences(colours.as_plain(), moved, exact=True) == expected
    expected = "label files of colours (#0000ff, #ff0000) instead of ids (3, 7)"
    assert class_differences(some_labels().as_plain(), colours, exact=True) == expected
    assert class_differences(some_labels().as_plain(), colours, exact=False) == ""


SAVED = {"names": ["background", "pond"], "ids": [0, 1], "void": [255]}


def now(names: tuple[str, ...], ids: tuple[int, ...], void: tuple[int, ...] = (255,)) -> Labels:
    return Labels(names, np.zeros((len(names), 3), np.uint8), ids, void)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (now(("background", "pond"), (0, 1)), ""),
        (
            now(("pond", "background"), (1, 0)),
            "the same names in another order (class 0: 'background' (id 0) -> 'pond' (id 1); "
            "class 1: 'pond' (id 1) -> 'background' (id 0))",
        ),
        (
            now(("background", "pond"), (1, 0)),
            "other label ids (class 0: 'background' (id 0) -> 'background' (id 1); "
            "class 1: 'pond' (id 1) -> 'pond' (id 0))",
        ),
        (now(("background", "lake"), (0, 1)), "other names (class 1: 'pond' (id 1) -> 'lake' (id 1))"),
        (now(("background", "Pond"), (0, 1)), "another spelling (class 1: 'pond' (id 1) -> 'Pond' (id 1))"),
        (now(("background", "pond"), (0, 1), ()), "the void ids [] instead of [255]"),
        (now(("background",), (0,)), "1 classes instead of 2 (class 1: 'pond' (id 1) -> none)"),
    ],
)
def test_class_differences_show_both_lists_where_they_differ(labels: Labels, told: str) -> None:
    assert class_differences(SAVED, labels, exact=True) == told


def test_class_differences_shows_ten_of_many() -> None:
    saved = {"names": [f"a{i}" for i in range(30)]}
    labels = now(tuple(f"b{i}" for i in range(30)), tuple(range(30)))
    found = class_differences(saved, labels, exact=True)
    assert found.endswith("class 9: 'a9' -> 'b9'; and 20 more)")


def test_class_differences_takes_other_spellings_and_ids_of_another_dataset() -> None:
    def differ(*names: str) -> bool:
        labels = now(("screen", "screen door", "bed", "television"), (4, 5, 6, 7))
        return bool(class_differences({"names": names, "ids": [0, 1, 2, 3]}, labels, exact=False))

    assert not differ("screen", "screen door", "bed ", "television receiver")
    assert not differ("SCREEN", "screen-door", "bed", "Television")
    assert differ("screen door", "screen", "bed", "television")
    assert differ("screen", "screen door", "television", "bed")
    assert differ("screen", "screen door", "bed", "radio")
    assert differ("screen", "screen door", "bed")


def test_mmsegmentations_spellings_are_those_of_our_datasets() -> None:
    spelled = {"bed": "bed ", "television": "television receiver"}
    names = [spelled.get(name, name) for name in ADE20K.names]
    assert class_differences({"names": names}, ADE20K, exact=False) == ""
    for first, second in ((0, 1), (7, 89), (58, 130), (82, 136)):
        swapped = names.copy()
        swapped[first], swapped[second] = names[second], names[first]
        found = class_differences({"names": swapped}, ADE20K, exact=False)
        assert f"class {first}: {names[second]!r} -> {ADE20K.names[first]!r}" in found
