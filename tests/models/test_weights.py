"""Atomic writes: a file is the former one or the new one, whatever happens in between."""

from pathlib import Path
from typing import BinaryIO

import pytest

from ccgpu.models.weights import write_atomically, write_partial


@pytest.mark.parametrize("content", ["größer", "größer".encode(), lambda file: file.write("größer".encode())])
def test_write_atomically_takes_text_bytes_and_functions(content: object, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("former")
    write_atomically(path, content)  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == "größer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
def test_write_atomically_leaves_the_former_file_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("former")

    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(path, fails)
    assert path.read_text() == "former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_write_partial_leaves_the_file_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("former")
    partial = write_partial(path, b"new")
    assert (path.read_text(), partial.read_text(), partial.parent) == ("former", "new", tmp_path)
