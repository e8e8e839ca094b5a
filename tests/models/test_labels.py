"""`Labels`: lookups both ways, and tables that do not fit."""

from typing import Any

import numpy as np
import pytest

from ccgpu.models.labels import IGNORE, Labels


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
