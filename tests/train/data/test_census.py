"""The census of the classes: counted by hand, warnings of what is missing, refusals of what teaches nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census, census_table, census_warnings, check_census, check_number
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.masks import Counts


def labels(ids: tuple[int, ...] = (1, 2, 3), void: tuple[int, ...] = (0, 255)) -> Labels:
    names = ("water", "reed", "sky")[: len(ids)]
    return Labels(names, np.zeros((len(ids), 3), dtype=np.uint8), ids, void)


def census(*files: dict[int, int], purpose: str = "training") -> Census:
    """Return the census of files that hold these numbers of pixels of these values."""
    return Census.of(purpose, [Facts(mask=Counts("grey8", file, len(file))) for file in files], "ids")


def test_table_counts_pixels_and_files() -> None:
    training = census({1: 30, 2: 10}, {1: 20, 0: 30, 255: 10})
    evaluation = census({3: 3, 0: 1}, purpose="evaluation")
    lines = [line.split() for line in census_table([training, evaluation], labels()).splitlines()]
    assert lines == [
        ["class", "training", "%", "files", "evaluation", "%", "files"],
        ["water", "50.00", "2", "0.00", "0"],
        ["reed", "10.00", "1", "0.00", "0"],
        ["sky", "0.00", "0", "75.00", "1"],
        ["void", "40.00", "25.00"],
    ]


def test_the_columns_of_the_table_stand_below_their_heads() -> None:
    head, *rows = census_table([census({1: 1, 0: 1}), census({2: 1})], labels()).splitlines()
    percents = [match.end() for match in re.finditer("%", head)]
    assert all([match.end() for match in re.finditer(r"\d+\.\d\d", row)] == percents for row in rows)


def test_classes_that_no_file_holds_are_warned_of() -> None:
    found = census({1: 30, 2: 10}, {1: 1})
    assert census_warnings(found, labels()) == ["warning: no label file for training holds sky (1 of 3 classes)"]
    check_census(found, labels())
    assert census_warnings(census({1: 1, 2: 1, 3: 1}), labels()) == []
    many = Labels(tuple(map(str, range(14))), np.zeros((14, 3), np.uint8), tuple(range(14)))
    assert (
        "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more (12 of 14 classes)" in census_warnings(census({12: 1, 13: 1}), many)[0]
    )


def test_one_class_alone_is_refused_for_training_and_warned_of_for_evaluation() -> None:
    with pytest.raises(
        ValueError,
        match=r"for training must hold 2 classes or more, .* 'reed' alone; .*values 0, 2, declared are the ids 1\.\.3",
    ):
        check_census(census({2: 10, 0: 3}), labels())
    found = census({2: 10}, purpose="evaluation")
    check_census(found, labels())
    assert census_warnings(found, labels())[1].startswith(
        "warning: all labelled pixels for evaluation are reed; the files hold the values 2, declared"
    )


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_no_labelled_pixel_is_refused(purpose: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"label files for {purpose} must hold pixels of the classes, got none; the files hold the values 0, 255",
    ):
        check_census(census({0: 5, 255: 1}, purpose=purpose), labels())
    assert census_warnings(census({0: 5}), labels()) == []


def test_images_without_labels_can_be_predicted() -> None:
    with pytest.raises(ValueError, match=r"ccgpu evaluate predicts such images with --unlabelled\.$"):
        check_census(census({0: 5}, purpose="evaluation"), labels())


def test_masks_of_0_and_255_are_explained() -> None:
    pond = labels(ids=(0, 1), void=(255,))
    with pytest.raises(
        ValueError, match="in masks of 0 and 255 the 255 is a class: declare it as the id of one, and not as void"
    ):
        check_census(census({0: 5, 255: 5}), pond)
    with pytest.raises(ValueError, match="alone") as caught:
        check_census(census({0: 5}), pond)
    assert "the 255 is a class" not in str(caught.value)
    check_census(census({0: 5, 255: 5}), labels(ids=(0, 255), void=()))


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"labels must have 2 classes or more, got 'water' alone; .*background"):
        check_number(labels(ids=(1,)))
    check_number(labels())
