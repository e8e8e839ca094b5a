"""Files of weights: damage is found when they are read; written, a file is the former one or the new one."""

import io
import os
import random
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors.torch
import torch

from ccgpu.models.resnet import ResNet, load_imagenet
from ccgpu.models.weights import read_content, safetensors_bytes, write_atomically, write_partial


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


def test_nothing_is_left_where_renaming_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "a.txt", "new")
    assert not list(tmp_path.iterdir())


WEIGHTS = {
    "conv.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7, dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "none": torch.zeros(0, 2),
}


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def equal(one: Any, other: Any) -> bool:
    """Return whether two contents are the same values of the same types."""
    if torch.is_tensor(one):
        return torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    return bool(one == other)


FILES = {
    "pt": pickled({"ccgpu": {"format": 3, "notes": ["a", "b"]}, "state_dict": WEIGHTS}),
    "safetensors": safetensors_bytes(WEIGHTS, {"ccgpu": '{"format": 3}'}),
    "backbone": safetensors_bytes(WEIGHTS, {}),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_bit_is_found_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    """Bits at 250 random places of each kind of file, and those of the first and the last 24 bytes."""
    path, content, draw = tmp_path / "file", FILES[kind], random.Random(5)
    path.write_bytes(content)
    whole = read_content("read", path)
    bits = [*range(8 * 24), *(8 * len(content) - 1 - i for i in range(8 * 24))]
    found = 0
    for bit in [*bits, *(draw.randrange(8 * len(content)) for _ in range(250))]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            read = read_content("read", path)
        except ValueError:
            found += 1
        else:
            assert equal(read[0], whole[0]), bit
            assert read[1] == whole[1] or kind == "backbone", bit
    assert found > 200


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    """Those of other programs, of torch before 1.6, and of torch where its checksums are switched off."""
    path = tmp_path / "file"
    path.write_bytes(safetensors.torch.save(WEIGHTS, {"format": "pt"}))
    assert read_content("read", path)[1] == {"format": "pt"}
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert equal(read_content("read", path)[0], WEIGHTS)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(read_content("read", path)[0], WEIGHTS)


def test_a_digest_that_was_removed_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(safetensors.torch.save(WEIGHTS, {"ccgpu": "{}"}))
    with pytest.raises(ValueError, match="cannot be read as one"):
        read_content("read", path)


def test_imagenet_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = ResNet(18, stem="7x7").state_dict()
    state["layer1.0.conv1.weight"][0, 0] = float("nan")
    state["bn1.running_var"][3] = -1
    torch.save(state, tmp_path / "resnet18.pth")
    net = ResNet(18, stem="7x7")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    message = r"bn1\.running_var has negative variances; layer1\.0\.conv1\.weight has 9 of 36864 values NaN"
    with pytest.raises(ValueError, match=message):
        load_imagenet(net, tmp_path / "resnet18.pth")
    assert equal(before, dict(net.state_dict()))
