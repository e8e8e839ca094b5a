"""What commands may write: no input is replaced, and no existing result unless the user says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ccgpu.train.runs.outputs import SHOWN, check_output_file, check_output_folder, check_outputs, check_outside


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("kept")
    return path


def test_new_files_and_empty_folders_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    source = touch(tmp_path / "in.png")
    check_outputs("--out", [tmp_path / "a.png", tmp_path / "frames"], [source], overwrite=False)
    check_output_file("--out", tmp_path / "a.png", [source], overwrite=False)


def test_existing_results_need_overwrite(tmp_path: Path) -> None:
    files = [touch(tmp_path / f"{index:02}.png") for index in range(SHOWN + 2)]
    with pytest.raises(ValueError, match=r"--out must be new, got .*00\.png.*09\.png and 2 more; .* add --overwrite"):
        check_outputs("--out", files, [], overwrite=False)
    check_outputs("--out", files, [], overwrite=True)
    touch(tmp_path / "frames" / "deep" / "000000.png")
    with pytest.raises(ValueError, match="frames"):
        check_outputs("--out", [tmp_path / "frames"], [], overwrite=False)
    os.symlink(tmp_path / "nowhere", tmp_path / "link.png")
    with pytest.raises(ValueError, match=r"link\.png"):
        check_output_file("--out", tmp_path / "link.png", [], overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["same", "dots", "symlink", "hard link", "folder"])
def test_an_input_is_never_replaced(kind: str, overwrite: bool, tmp_path: Path) -> None:
    source = touch(tmp_path / "frames" / "in.png")
    target = tmp_path / "out.png"
    if kind == "same":
        target = source
    elif kind == "dots":
        target = tmp_path / "frames" / ".." / "frames" / "in.png"
    elif kind == "symlink":
        target.symlink_to(source)
    elif kind == "hard link":
        os.link(source, target)
    else:
        target = tmp_path / "frames"
    with pytest.raises(ValueError, match=r"--out must not replace what the command reads, got .*in\.png"):
        check_outputs("--out", [target], [tmp_path / "other.png", source], overwrite=overwrite)


def test_a_file_needs_a_folder_and_a_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out must lie in a folder that exists, got .*; make .*nowhere first"):
        check_output_file("--out", tmp_path / "nowhere" / "a.png", [], overwrite=True)
    with pytest.raises(ValueError, match="--out must be a file, got the folder"):
        check_output_file("--out", tmp_path, [], overwrite=True)


def test_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    """Atomic writes rename a file onto the path: as root that would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((Path("/dev/null"), "the device"), (tmp_path / "pipe.png", "the named pipe")):
        with pytest.raises(ValueError, match=f"--out must be a regular file, got {kind} {path}"):
            check_output_file("--out", path, [], overwrite=True)


def test_a_folder_can_be_made_where_no_file_lies(tmp_path: Path) -> None:
    check_output_folder("--out", tmp_path)
    check_output_folder("--out", tmp_path / "new" / "deep")
    file = touch(tmp_path / "file")
    with pytest.raises(ValueError, match=r"--out must be a folder, got the file .*file; name another"):
        check_output_folder("--out", file)
    with pytest.raises(ValueError, match=r"--out must lie in folders, got .*file/deep/er, where .*file is a file"):
        check_output_folder("--out", file / "deep" / "er")
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with pytest.raises(ValueError, match="--out must be a folder"):
        check_output_folder("--out", tmp_path / "link")


@pytest.mark.parametrize("results", ["data", "data/val", "data/val/town", "link", "data/other/../val"])
def test_results_do_not_lie_beside_inputs(results: str, tmp_path: Path) -> None:
    source = touch(tmp_path / "data" / "val" / "town" / "a.png")
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "val")
    with pytest.raises(ValueError, match="--out must be another folder than the inputs', got"):
        check_outside("--out", tmp_path / results, [source])
    check_outside("--out", tmp_path / "data" / "other", [source])
    check_outside("--out", tmp_path / "data" / "val" / "town" / "new", [source])
