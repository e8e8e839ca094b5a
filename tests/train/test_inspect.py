"""`ccgpu inspect`: what a folder would be taken for, every problem of it, a contact sheet, a table to fill in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ccgpu.train import inspect
from ccgpu.train.data.folder.class_table import read_table
from tests.train.folders import COLOURS, write_folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_folder_is_reported_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "ponds", 15)
    assert inspect.main([str(data)]) == 0
    text = capsys.readouterr().out
    for line in (
        "images: 15 of 56x40 pixels, 8-bit RGB",
        "split: 12 to train on, 3 to evaluate on",
        "masks: read as colours; 15 of colours",
        "masks over 8 of 15 images: inspect-ponds.jpg",
        f"no problems; train on it with: ccgpu train {data}",
    ):
        assert line in text
    assert "--crop" not in text
    sheet = np.asarray(Image.open("inspect-ponds.jpg"))
    for colour in COLOURS:  # of the legend
        assert (np.abs(sheet.astype(int) - colour).max(axis=-1) < 12).sum() > 50
    # Another look leaves the first sheet.
    before = Path("inspect-ponds.jpg").read_bytes()
    assert inspect.main([str(data)]) == 0
    assert "inspect-ponds-2.jpg" in capsys.readouterr().out
    assert Path("inspect-ponds.jpg").read_bytes() == before


def test_void_is_drawn_in_a_colour_of_its_own_and_named(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "ponds", 5, values=np.array([0, 1, 255], dtype=np.uint8))
    (data / "classes.csv").write_text("name,id,colour,void\nmud,0,#000000,no\nreed,1,#c81e1e,no\nunclear,255,,yes\n")
    assert inspect.main([str(data)]) == 0
    legend = np.asarray(Image.open("inspect-ponds.jpg"))[-20:].astype(int)
    for colour in ((0, 0, 0), (200, 30, 30), (224, 224, 192)):
        assert (np.abs(legend - colour).max(axis=-1) < 12).sum() > 50


def test_the_command_to_train_with_has_the_flags_that_decide_what_the_folder_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "my ponds", images="photos", values=np.arange(3, dtype=np.uint8))
    flags = ["--classes", "mud", "tall reed", "water", "--val-share", "0.5", "--images", "photos", "--exif", "stored"]
    assert inspect.main([str(data), *flags]) == 0
    rest = "--classes mud 'tall reed' water --val-share 0.5 --images photos --exif stored\n"
    assert f"train on it with: ccgpu train '{data}' {rest}" in capsys.readouterr().out


def test_a_damaged_folder_is_told_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "ponds", 20)
    for index in range(12):
        path = data / f"images/p{index:02d}.jpg"
        path.write_bytes(path.read_bytes()[:-100])
    (data / "masks/p13.png").rename(data / "masks/q13.png")
    Image.new("L", (9, 9), 3).save(data / "masks/p14.png")
    Image.new("L", (56, 40), 4).save(data / "images/p15.png")
    assert inspect.main([str(data), "--write-classes", "classes.csv"]) == 1
    text = capsys.readouterr().out
    assert text.count(": truncated") == 12
    for line in (
        "images must have different names, got 1 names twice",
        "p13.jpg has no label file",
        "q13.png has no image",
        "p14.png: 9x9 pixels, but the image has 56x40",
        "such as",
        "and 1 of grey or with a palette",
    ):
        assert line in text, line
    assert not Path("inspect-ponds.jpg").exists()  # the classes are not known
    assert "train on it" not in text


def test_the_table_that_is_written_names_the_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "ponds", 6)
    assert inspect.main([str(data), "--write-classes", "classes.csv", "--out", "sheet.jpg"]) == 0
    text = Path("classes.csv").read_text()
    assert [row.colour for row in read_table(Path("classes.csv")).rows] == [0x000000, 0x1EA03C, 0xC81E1E]
    Path("classes.csv").write_text(
        text.replace("class 0", "mud").replace("class 1", "reed").replace("class 2", "water")
    )
    capsys.readouterr()
    assert inspect.main([str(data), "--classes", "classes.csv"]) == 0
    assert "water  #c81e1e" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "sheet.png"], "--out must end in .jpg, got sheet.png"),
        (["--out", "there.jpg"], "--out must be new, got existing results: there.jpg"),
        (["--out", "{data}/images/p00.jpg", "--overwrite"], "which is an input"),
        (["--write-classes", "a.txt"], "--write-classes must end in .csv"),
        (["--classes", "c.csv", "--write-classes", "c.csv", "--overwrite"], "which is an input"),
        (["--val-share", "0"], "--val-share must be between 0 and 1"),
        (["--masks", "colours"], "got images alone"),
    ],
)
def test_flags_that_cannot_be_used_are_told(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_folder(tmp_path / "ponds", 2)
    Path("there.jpg").touch()
    Path("c.csv").write_text("name,colour\na,#000000\nb,#c81e1e\nc,#1ea03c\n")
    before = (data / "images/p00.jpg").read_bytes()
    assert inspect.main([str(data), *(word.replace("{data}", str(data)) for word in flags)]) == 2
    assert message in capsys.readouterr().err
    assert (data / "images/p00.jpg").read_bytes() == before


def test_masks_of_one_class_cannot_be_learned_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_folder(tmp_path / "ponds", 3, values=np.zeros(3, dtype=np.uint8))
    assert inspect.main([str(data)]) == 1
    assert "labels must have 2 classes or more, got 'class 0' alone" in capsys.readouterr().out


def test_a_folder_with_the_name_of_a_dataset_is_not_taken_for_the_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(Path("camvid"), 6)
    assert inspect.main(["camvid"]) == 0
    assert "train on it with: ccgpu train ./camvid\n" in capsys.readouterr().out
