"""INPUT arguments of a command line, resolved to files with unique output names."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccgpu.train.data.inputs import find_inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "a/1.jpg",
        "a/2.PNG",
        "a/notes.txt",
        "a/.hidden.jpg",
        "a/.cache/3.jpg",
        "a/deep/1.jpg",
        "b/1.png",
        "b/video.mp4",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def found(*given: object) -> list[tuple[str, str]]:
    return [(entry.path.name, entry.name) for entry in find_inputs([str(argument) for argument in given])]


def test_folders_keep_their_subfolders_and_leave_out_what_is_hidden_or_no_image(folder: Path) -> None:
    assert found(folder / "a") == [("1.jpg", "1"), ("2.PNG", "2"), ("1.jpg", "deep/1")]
    assert found(folder) == [
        ("1.jpg", "a/1"),
        ("2.PNG", "a/2"),
        ("1.jpg", "a/deep/1"),
        ("1.png", "b/1"),
        ("video.mp4", "b/video"),
    ]


def test_files_are_taken_whatever_their_ending(folder: Path) -> None:
    assert found(folder / "a" / "notes.txt", folder / "a" / ".hidden.jpg") == [
        ("notes.txt", "notes"),
        (".hidden.jpg", ".hidden"),
    ]


def test_patterns_are_expanded(folder: Path) -> None:
    assert found(folder / "*" / "1.*") == [("1.jpg", "1"), ("1.png", "1-2")]
    assert found(folder / "**" / "1.jpg") == [("1.jpg", "1"), ("1.jpg", "1-2")]
    assert [entry.is_video for entry in find_inputs([str(folder / "b" / "*")])] == [False, True]


def test_names_differ_and_files_count_once(folder: Path) -> None:
    assert found(folder / "a" / "1.jpg", folder / "b" / "1.png", folder / "a" / "1.jpg", folder / "b") == [
        ("1.jpg", "1"),
        ("1.png", "1-2"),
        ("video.mp4", "video"),
    ]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "holiday [1].jpg").touch()
    assert found(tmp_path / "holiday [1].jpg") == [("holiday [1].jpg", "holiday [1]")]


@pytest.mark.parametrize("argument", ["nowhere.jpg", "*.nothing", "empty"])
def test_arguments_that_give_no_file_are_named(argument: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is none"):
        find_inputs([str(tmp_path / argument)])
