"""Tables of classes that people write, in every spelling; what is wrong in one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccgpu.models.labels import Labels
from ccgpu.train.data.folder.class_table import Row, find_table, read_table, table_difference, table_text

ROWS = (Row("water", 1, 0x1E50A0), Row("reed", 2, 0x5A8228), Row("unclear", 255, 0x000000, void=True))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "name,id,colour,void\nwater,1,#1e50a0,no\nreed,2,#5A8228,\nunclear,255,#000000,yes\n",
        'Name,ID,Color\nwater,1,"30,80,160"\nreed,2,"90, 130, 40"\n',
        "name;id;r;g;b;ignore\r\nwater;1;30;80;160;0\r\nreed;2;90;130;40;0\r\n\r\nunclear;255;0;0;0;1\r\n",
        "\ufeffclass\tvalue\trgb\tnotes\nwater\t1\t30 80 160\tx\nreed\t2\t90 130 40\ty\n",
        "id, name, hex\n1, water, 1e50a0\n2, reed, 5a8228\n",
        "Pixel Value, Class Name, Color RGB\n1, water, 1e50a0\n2, reed, 5a8228\n",
    ],
)
def test_csv_is_read_in_every_spelling(text: str, tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "classes.csv", text))
    assert table.rows == ROWS[: len(table.rows)]
    assert len(table.rows) == (3 if "unclear" in text else 2)
    assert table.has_ids
    assert table.has_colours


@pytest.mark.parametrize(
    "content",
    [
        [{"name": "water", "id": 1, "color": [30, 80, 160]}, {"name": "reed", "id": 2, "colour": "#5a8228"}],
        {
            "classes": [
                {"class": "water", "value": 1, "rgb": "30,80,160"},
                {"name": "reed", "id": "2", "r": 90, "g": 130, "b": 40},
            ]
        },
    ],
)
def test_json_is_read(content: Any, tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "classes.json", json.dumps(content))).rows == ROWS[:2]


def test_names_alone(tmp_path: Path) -> None:
    expected = (Row("water"), Row("tall reed"))
    assert read_table(write(tmp_path / "a.txt", "water\n\n tall reed \r\n")).rows == expected
    assert read_table(write(tmp_path / "a.json", '["water", "tall reed"]')).rows == expected
    found = find_table(tmp_path, ["water", "tall reed"])
    assert found is not None
    assert (found.rows, found.source) == (expected, "--classes")


@pytest.mark.parametrize("text", ["1: water\n2: tall reed\n", "2,tall reed\n1,water\n", "water,1\ntall reed,2\n"])
def test_names_with_ids_in_a_text_file(text: str, tmp_path: Path) -> None:
    rows = read_table(write(tmp_path / "a.txt", text)).rows
    assert {*rows} == {Row("water", 1), Row("tall reed", 2)}


@pytest.mark.parametrize("content", ['{"1": "water", "2": "tall reed"}', '{"water": 1, "tall reed": 2}'])
def test_one_object_of_ids_and_names(content: str, tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.json", content)).rows == (Row("water", 1), Row("tall reed", 2))


def test_lists_of_annotation_tools(tmp_path: Path) -> None:
    text = "# label:color_rgb:parts:actions\nwater:30,80,160::\nreed:90,130,40:leaf,stem:\n"
    assert read_table(write(tmp_path / "labelmap.txt", text)).rows == (
        Row("water", colour=0x1E50A0),
        Row("reed", colour=0x5A8228),
    )
    found = find_table(tmp_path, ())
    assert found is not None
    assert found.source == str(tmp_path / "labelmap.txt")
    (tmp_path / "robo/Train").mkdir(parents=True)
    write(tmp_path / "robo/Train/_classes.csv", "Pixel Value, Class\n0, water\n1, reed\n")
    found = find_table(tmp_path / "robo", ())
    assert found is not None
    assert found.rows == (Row("water", 0), Row("reed", 1))
    text = "# LabelMe\n__ignore__\n_background_\nreed\n"
    assert read_table(write(tmp_path / "a.txt", text)).rows == (Row("_background_"), Row("reed"))


def test_a_table_is_found_in_the_folder_or_named(tmp_path: Path) -> None:
    assert find_table(tmp_path, ()) is None
    write(tmp_path / "classes.txt", "a\nb\n")
    found = find_table(tmp_path, None)
    assert found is not None
    assert found.source == str(tmp_path / "classes.txt")
    (tmp_path / "classes.txt").rename(tmp_path / "Classes.TXT")
    assert find_table(tmp_path, None) is not None
    (tmp_path / "Classes.TXT").rename(tmp_path / "classes.txt")
    named = find_table(tmp_path, [str(write(tmp_path / "other.csv", "name\nc\n"))])
    assert named is not None
    assert named.rows == (Row("c"),)
    write(tmp_path / "classes.json", '["a"]')
    with pytest.raises(ValueError, match=r"got classes\.json and classes\.txt; name one with --classes"):
        find_table(tmp_path, ())
    with pytest.raises(FileNotFoundError):
        find_table(tmp_path, ["missing.csv"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "water,1\nreed,2\n", "a first line without a column name: water, 1"),
        ("a.csv", "name,id,value\na,1,1\n", "two columns for id"),
        ("a.csv", "name,id\na,1,2\n", "3 columns in line 2, but 2 in the first"),
        ("a.csv", "name,trainId\na,1\nb,0\n", "'trainId', which is no column that is known; name the ids id"),
        ("a.csv", ",name\n1,a\n0,b\n", "'', which is no column"),
        ("a.json", '[{"name": "a", "trainId": 1}]', "'trainId', which is no column that is known"),
        ("a.json", '{"a": [1]}', "no list of classes"),
        ("a.txt", "name,id\na,1\n", "'name,id', the first line of a .csv file"),
        ("a.json", "[1]", "class 1, 1, which is no name and no object"),
        ("a.json", "[", "must be a table of classes in UTF-8, got"),
        ("a.txt", b"\xff\xfe", "must be a table of classes in UTF-8"),
        ("a.txt", "", "no classes"),
        ("a.csv", "name,void\na,yes\n", "no classes"),
        ("a.csv", "", "no classes"),
        ("a.yaml", "a", r"must be a \.txt, \.csv or \.json file"),
        ("a.csv", "name,id\na,1\nb,\n", "1 ids for 2 classes"),
        ("a.csv", "name,colour\na,#ff0000\nb,#ff0000\n", "the colour #ff0000 twice"),
    ],
)
def test_a_table_that_cannot_be_used_is_told(name: str, content: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        read_table(write(tmp_path / name, content))


def test_all_problems_of_a_table_are_one_error(tmp_path: Path) -> None:
    text = "name,id,colour,void\nwater,1,#12345,no\n,2,,\nreed,70000,,\nmud,x,,\nmoss,5,,perhaps\nsky,3,,\nsky,3,,\n"
    with pytest.raises(ValueError, match="got 7 problems; correct it") as caught:
        read_table(write(tmp_path / "classes.csv", text))
    for told in (
        "line 2: the colour '#12345' of water, which is neither",
        "line 3: no name",
        "line 4: the id '70000' of reed",
        "line 5: the id 'x' of mud",
        "line 6: void 'perhaps' of moss",
        "the name 'sky' twice",
        "the id 3 twice",
    ):
        assert f"  {told}" in str(caught.value)


def test_a_written_table_is_read_again(tmp_path: Path) -> None:
    rows = (*ROWS, Row('a "b", c', 7))
    assert read_table(write(tmp_path / "classes.csv", table_text(rows))).rows == rows


def test_a_table_is_compared_with_the_classes_of_a_run(tmp_path: Path) -> None:
    colours = np.array([[30, 80, 160], [90, 130, 40]], np.uint8)
    of_ids = Labels(("water", "reed"), colours, (1, 2), (255,))
    of_colours = Labels(("water", "reed"), colours, (0x1E50A0, 0x5A8228), (), coding="colours")
    table = read_table(write(tmp_path / "a.csv", table_text(ROWS)))
    assert table_difference(table, of_ids) == table_difference(table, of_colours) == ""
    names = read_table(write(tmp_path / "a.txt", "reed\nwater\n"))
    assert table_difference(names, of_ids) == "2 classes (reed, water) instead of 2 classes (water, reed)"
    moved = read_table(write(tmp_path / "b.csv", table_text((Row("water", 2, 1), Row("reed", 1, 2)))))
    assert table_difference(moved, of_ids) == "2 classes (water 2, reed 1) instead of 2 classes (water 1, reed 2)"
    assert "water #000001, reed #000002" in table_difference(moved, of_colours)
