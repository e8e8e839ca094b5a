"""Classes from the values of masks, with and without a table; what cannot be classes is refused with both lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from ccgpu.models.labels import Labels
from ccgpu.train.data.folder.class_table import ClassTable, Row
from ccgpu.train.data.folder.classes import find_classes, template
from ccgpu.train.data.masks import MOST_VALUES, Counts


def grey(*values: int, kind: str = "grey8") -> Counts:
    return Counts(kind, dict.fromkeys(values, 10), len(values))


def colours(*values: int) -> Counts:
    return Counts("colours", dict.fromkeys(values, 10), len(values))


def palette(table: Mapping[int, int]) -> Counts:
    return Counts("palette", dict.fromkeys(table, 10), len(table), dict(table))


def masks(*counts: Counts) -> dict[Path, Counts]:
    return {Path(f"m{index}.png"): found for index, found in enumerate(counts)}


def table(*rows: Row | str) -> ClassTable:
    return ClassTable(tuple(Row(row) if isinstance(row, str) else row for row in rows), "classes.csv")


def shown(labels: Labels) -> tuple[Sequence[str], Sequence[int], Sequence[int], str]:
    return labels.names, labels.ids, labels.void, labels.coding


@pytest.mark.parametrize(
    ("values", "ids", "void"),
    [
        ((0, 1, 2), (0, 1, 2), ()),
        ((1, 5, 900), (1, 5, 900), ()),
        ((0, 1, 2, 255), (0, 1, 2), (255,)),
        ((0, 255), (0, 255), ()),
        ((0, 127, 255), (0, 127, 255), ()),
        ((0, 85, 170, 255), (0, 85, 170, 255), ()),
        ((0, 100, 255), (0, 100), (255,)),
        ((1, 255), (1,), (255,)),
    ],
)
def test_values_without_a_table(values: tuple[int, ...], ids: tuple[int, ...], void: tuple[int, ...]) -> None:
    labels, said = find_classes(masks(grey(*values[:2]), grey(*values[1:], kind="grey16")), None)
    assert shown(labels) == (tuple(f"class {index}" for index in range(len(ids))), ids, void, "ids")
    told = "".join(said)
    assert ("255 is void" in told, "255 is a class" in told) == (255 in void, 255 in ids)


def test_255_alone_is_no_class() -> None:
    with pytest.raises(ValueError, match="got the value 255 alone, which is void"):
        find_classes(masks(grey(255)), None)


@pytest.mark.parametrize("rows", [None, table("ground", "road")])
def test_masks_of_0_and_1_beside_masks_of_0_and_255_are_refused(rows: ClassTable | None) -> None:
    mixed = masks(grey(0, 1), grey(0), grey(0, 255))
    with pytest.raises(ValueError, match=r"got 1 of 0 and 1, such as m0\.png, and 1 of 0 and 255, such as m2\.png"):
        find_classes(mixed, rows)
    declared = table(Row("ground", 0), Row("road", 1), Row("edge", 255, void=True))
    assert find_classes(mixed, declared)[0].void == (255,)
    assert find_classes(masks(grey(0, 1, 255), grey(0, 255), grey(0, 1)), None)[0].void == (255,)


@pytest.mark.parametrize("edges", [(1, 254), (9, 39, 48, 120, 177, 246)])
def test_soft_edges_between_0_and_255_are_refused(edges: tuple[int, ...]) -> None:
    softened = Counts("grey8", {0: 900, 255: 900, **dict.fromkeys(edges, 3)}, len(edges) + 2)
    with pytest.raises(ValueError, match=r"values up to 255, \d of which hold less than 2% .*soft edges"):
        find_classes(masks(softened), None)
    many = Counts("grey8", {255: 900, **dict.fromkeys(range(150), 3)}, 151)  # rare classes, and void pixels
    assert find_classes(masks(many), None)[0].void == (255,)


def test_palettes_that_a_program_renumbered_are_refused() -> None:
    mixed = masks(palette({0: 0, 1: 0xFF0000}), palette({0: 0xFF0000, 1: 0}))
    told = r"got 0 as #000000 in m0\.png and as #ff0000 in m1\.png\. If the colours"
    for rows in (None, table("ground", "road")):
        with pytest.raises(ValueError, match=told):
            find_classes(mixed, rows)
    rows = ClassTable(template(mixed, None), "written.csv")
    assert [(row.id, row.colour) for row in rows.rows] == [(None, 0), (None, 0xFF0000)]
    labels, _ = find_classes(mixed, rows)
    assert (labels.ids, labels.coding) == ((0, 0xFF0000), "colours")
    assert find_classes(mixed, table(Row("ground", 0), Row("road", 1)))[0].coding == "ids"


def test_colours_without_a_table_are_their_own_colours() -> None:
    labels, said = find_classes(masks(colours(0, 0xFF0000), colours(0x00FF00, 0)), None)
    assert shown(labels) == (("class 0", "class 1", "class 2"), (0, 0x00FF00, 0xFF0000), (), "colours")
    assert labels.colours.tolist() == [[0, 0, 0], [0, 255, 0], [255, 0, 0]]
    assert said == ()


def test_grey_pixels_in_files_of_colours_are_ids_where_all_files_are_so() -> None:
    assert find_classes(masks(colours(0, 0x010101), grey(2)), None)[0].ids == (0, 1, 2)
    # A file of black alone says nothing about the others.
    assert find_classes(masks(colours(0), colours(0xFF0000, 0)), None)[0].coding == "colours"


def test_the_palettes_colours_are_those_of_the_classes() -> None:
    labels, _ = find_classes(masks(palette({0: 0, 3: 0xFF0001}), palette({3: 0xFF0001, 9: 0x00FF00})), None)
    assert labels.ids == (0, 3, 9)
    assert labels.colours.tolist() == [[0, 0, 0], [255, 0, 1], [0, 255, 0]]
    one_colour, _ = find_classes(masks(palette({0: 0, 3: 0})), None)
    assert np.array_equal(one_colour.colours, Labels.numbered(2).colours)


@pytest.mark.parametrize(
    ("values", "ids", "void", "said"),
    [
        ((0, 2), (0, 1, 2), (), ""),
        ((0, 1, 255), (0, 1, 2), (255,), "255 is void"),
        ((3, 7, 20), (3, 7, 20), (), "3 is water, 7 is reed, 20 is sky"),
        ((0, 128, 255), (0, 128, 255), (), "0 is water, 128 is reed, 255 is sky"),
    ],
)
def test_names_are_given_by_place_or_in_order(
    values: tuple[int, ...], ids: tuple[int, ...], void: tuple[int, ...], said: str
) -> None:
    labels, told = find_classes(masks(grey(*values)), table("water", "reed", "sky"))
    assert shown(labels) == (("water", "reed", "sky"), ids, void, "ids")
    assert said in " ".join(told)


def test_names_that_fit_neither_way_are_refused_with_both_lists() -> None:
    with pytest.raises(
        ValueError, match=r"the 2 names of classes\.csv .* got water, reed for the values 1, 4, 9; "
    ) as e:
        find_classes(masks(grey(1, 4, 9)), table("water", "reed"))
    assert "  4: 33.33 % of the pixels, as in m0.png" in str(e.value)


def test_a_table_with_ids_declares_all_values() -> None:
    rows = table(Row("water", 1), Row("reed", 300), Row("unclear", 0, void=True))
    labels, said = find_classes(masks(grey(0, 1), grey(300, kind="grey16")), rows)
    assert shown(labels) == (("water", "reed"), (1, 300), (0,), "ids")
    assert said == ()
    labels, said = find_classes(masks(grey(1, 255)), rows)
    assert labels.void == (0, 255)
    assert "255, which is not in classes.csv, is void" in said[0]
    with pytest.raises(ValueError, match=r"the ids of classes\.csv, which are 0\.\.1, 300, got 1 others; ") as caught:
        find_classes(masks(grey(1, 7), grey(7)), rows)
    assert "  7: 66.67 % of the pixels, as in m0.png" in str(caught.value)


def test_a_table_of_colours_reads_palettes_and_grey_files_by_their_colours() -> None:
    rows = table(Row("water", None, 0xFF0000), Row("reed", None, 0x00FF00), Row("edge", None, 0xFFFFFF, void=True))
    labels, _ = find_classes(
        masks(palette({5: 0xFF0000, 1: 0x00FF00}), colours(0xFF0000), grey(1, kind="grey1"), grey(255)), rows
    )
    assert shown(labels) == (("water", "reed"), (0xFF0000, 0x00FF00), (0xFFFFFF,), "colours")
    with pytest.raises(ValueError, match=r"the colours of classes\.csv, .*got 1 others") as caught:
        find_classes(masks(grey(7)), rows)
    assert "#070707" in str(caught.value)
    with pytest.raises(ValueError, match="got 1 of 16-bit grey, such as m0"):
        find_classes(masks(grey(7, kind="grey16")), rows)


def test_a_table_of_ids_and_colours_serves_both_kinds_of_masks() -> None:
    rows = table(Row("water", 1, 0xFF0000), Row("reed", 2, 0x00FF00))
    assert find_classes(masks(grey(1, 2)), rows)[0].ids == (1, 2)
    labels, _ = find_classes(masks(colours(0xFF0000), palette({2: 0x00FF00})), rows)
    assert (labels.ids, labels.coding) == ((0xFF0000, 0x00FF00), "colours")


def test_names_alone_are_no_names_of_colours() -> None:
    with pytest.raises(
        ValueError, match=r"must have colours, because the masks are colours, got names alone"
    ) as caught:
        find_classes(masks(colours(0xFF0000, 0)), table("water", "reed"))
    assert "  #ff0000: 50.00 % of the pixels, as in m0.png" in str(caught.value)
    assert "--write-classes" in str(caught.value)


def test_kinds_that_are_mixed_are_counted() -> None:
    with pytest.raises(ValueError, match=r"got 2 of colours, such as m0\.png, and 1 of grey .*such as m2\.png"):
        find_classes(masks(colours(0xFF0000), colours(5), grey(1)), None)


def test_too_many_values_are_explained() -> None:
    with pytest.raises(ValueError, match=r"at most 64 colours, got 65; masks that were saved as JPEG"):
        find_classes(masks(colours(*range(1, 66))), None)
    with pytest.raises(ValueError, match=r"at most 254 classes, got 255 values; masks that were saved as JPEG"):
        find_classes(masks(grey(*range(256))), None)
    many = Counts("grey16", dict.fromkeys(range(3), 9), MOST_VALUES + 1)
    with pytest.raises(ValueError, match=rf"at most 254 classes, got {MOST_VALUES + 1}"):
        find_classes(masks(many), None)
    assert "warning: 100 values are taken for classes, 100 of" in find_classes(masks(grey(*range(100))), None)[1][0]
    soft = Counts("colours", {0: 1000, 0xFF0000: 1000, **dict.fromkeys(range(1, 10), 5)}, 11)
    assert "warning: 11 values are taken for classes, 9 of which" in find_classes(masks(soft), None)[1][0]
    assert find_classes(masks(colours(*range(20))), None)[1] == ()
    assert find_classes(masks(colours(*range(1, 65))), None)[0].num_classes == 64


def test_no_masks_are_no_classes() -> None:
    with pytest.raises(ValueError, match="got none that can be read"):
        find_classes({}, table("water", "reed"))


def test_the_template_has_a_row_for_each_class_or_value() -> None:
    rows = template(masks(grey(1, 2, 255)), None)
    assert [(row.name, row.id, row.void) for row in rows] == [
        ("class 0", 1, False),
        ("class 1", 2, False),
        ("void", 255, True),
    ]
    rows = template(masks(colours(0xFF0000, 5)), table("a"))
    assert [(row.name, row.id, row.colour) for row in rows] == [("class 0", None, 5), ("class 1", None, 0xFF0000)]
    assert len(template(masks(colours(*range(1, 400))), None)) == 254
