"""INPUT arguments of a command line, resolved to files with unique output names."""

from __future__ import annotations

import os
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
    return [(entry.path.name, entry.name) for entry in find_inputs([str(argument) for argument in given])[0]]


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
    assert [entry.is_video for entry in find_inputs([str(folder / "b" / "*")])[0]] == [False, True]


def test_names_differ_and_files_count_once(folder: Path) -> None:
    assert found(folder / "a" / "1.jpg", folder / "b" / "1.png", folder / "a" / "1.jpg", folder / "b") == [
        ("1.jpg", "1"),
        ("1.png", "1-2"),
        ("video.mp4", "video"),
    ]


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "holiday [1].jpg").touch()
    assert found(tmp_path / "holiday [1].jpg") == [("holiday [1].jpg", "holiday [1]")]


@pytest.mark.parametrize("argument", ["", "*", "*/*"])
def test_what_cannot_be_read_is_an_input_to_be_named(argument: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos" if argument != "*/*" else tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "phone.HEIC").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    names = [name for name, _ in found(tmp_path / "photos" / argument)]
    assert names == ["gone.png", "itself.png", "phone.HEIC", "pipe.png"]
    assert found(folder / "gone.png") == [("gone.png", "gone")]


@pytest.mark.parametrize("argument", ["nowhere.jpg", "*.nothing", "empty"])
def test_arguments_that_give_no_file_are_named(argument: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="there is none"):
        find_inputs([str(tmp_path / argument)])


def test_an_empty_argument_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell gives it for "$PHOTOS" where the variable is not set."""
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="got '', where there is none"):
        find_inputs([""])


@pytest.mark.parametrize("argument", ["", "*/*", "**/*", "a/*/../*"])
def test_results_inside_of_a_folder_are_no_inputs(argument: str, folder: Path) -> None:
    out = folder / "a" / "out"
    touched = [out / "masks" / "1.png", out / "sheet.jpg"]
    for path in touched:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for given in (str(folder / argument), str(folder / "a")):
        inputs, left_out = find_inputs([given], out)
        assert inputs
        assert not [entry for entry in inputs if out in entry.path.resolve().parents]
        assert {path.resolve() for path in left_out} <= set(touched)
    assert left_out
    assert find_inputs([str(folder / "a")])[1] == []
    # Named by itself a result is an input.
    inputs, left_out = find_inputs([str(touched[0])], out)
    assert (len(inputs), left_out) == (1, [])
    # A folder of inputs that lies in the folder of results holds no results.
    inputs, left_out = find_inputs([str(folder / "a" / "deep")], folder / "a")
    assert (len(inputs), left_out) == (1, [])


def test_the_folder_of_results_is_no_folder_of_inputs(folder: Path) -> None:
    with pytest.raises(ValueError, match="--out must be another folder than the inputs'"):
        find_inputs([str(folder / "a")], folder / "b" / ".." / "a")


def test_the_frames_of_a_video_have_a_folder_of_their_own(tmp_path: Path) -> None:
    for name in ("Walk.mp4", "walk/000000.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert found(tmp_path) == [("Walk.mp4", "Walk-2"), ("000000.jpg", "walk/000000")]
