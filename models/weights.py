"""Reading files of weights without running code, comparing weights with a network, and atomic writes of any file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn

from ccgpu.models.foreign_objects import ZIP, load_without

# The key of a safetensors file's metadata that holds the digest of the rest of the file.
DIGEST = "ccgpu.sha256"
_COLOURS = 3
_ATTENTIONS = ("head.cca.", "head.context.")  # entries of a CCNet's criss-cross or non-local attention


def read_content(
    function: str, path: str | os.PathLike[str], *, accepts: Callable[[Any], bool] | None = None
) -> tuple[Any, dict[str, str]]:
    """Return the content of a file, on the CPU, and the metadata of a safetensors file ({} for a file of `torch.save`).

    Only tensors and plain values are unpickled, so a file cannot run code. The kind of file is recognised by its first
    bytes, not by its name.

    Args:
        function: what messages begin with.
        path: the file.
        accepts: whether the content of a file is taken that holds objects of other programs; each of these is a
            `ccgpu.models.foreign_objects.Foreign` in it. None: no such file is taken.

    Raises:
        FileNotFoundError: there is no file at path. (Any other OSError from opening it is passed on.)
        ValueError: the file is damaged, or of another kind.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{function}: path must be a file, got {os.fspath(path)!r}, where there is none; "
            "fetch the weights and pass their path."
        )
    with open(path, "rb") as file:
        start = file.read(9)
        file.seek(0)
        try:
            # A safetensors file begins with the length of its header, 8 bytes, and the header's brace.
            if start[8:] == b"{":
                return _read_safetensors(file)
            try:
                return load_pickled(file), {}
            except pickle.UnpicklingError as error:
                if accepts is None:
                    raise
                return _accepted(file, accepts, error), {}
        # torch.load raises almost any exception for a truncated or damaged file: ten kinds were seen, from RuntimeError
        # and UnpicklingError to OSError, struct.error, UnicodeDecodeError and AssertionError.
        except Exception as error:
            if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+) was not", str(error))):
                raise ValueError(
                    f"{function}: {os.fspath(path)!r} must be a file of weights, got one that cannot be read as one "
                    f"without running code: it holds a {found[1]} beside its weights; if you trust the file, load it "
                    "with torch.load(path, weights_only=False) and save its 'state_dict' and 'meta' alone."
                ) from error
            raise ValueError(
                f"{function}: {os.fspath(path)!r} must be a file of weights written by torch.save or safetensors, "
                f"got a file that cannot be read as one ({type(error).__name__} while reading); "
                "it is damaged, cut short or holds more than tensors: fetch it again."
            ) from error


def _accepted(file: BinaryIO, accepts: Callable[[Any], bool], error: pickle.UnpicklingError) -> Any:
    """Return the content of a file without the objects for which `error` refused it; raise that if it is not taken."""
    try:
        content = load_without(file)
    except Exception:
        raise error from None
    if not accepts(content):
        raise error
    return content


def load_pickled(file: BinaryIO) -> Any:
    """Return the content of an open file of `torch.save`, on the CPU; only tensors and plain values are unpickled.

    torch does not look at the checksums that it writes, so they are compared first: any change of a byte of a record
    is found. Records without one (`torch.serialization.set_crc32_options(False)`) and files of torch before 1.6 are
    taken as they are.

    Raises:
        zipfile.BadZipFile: the file is damaged; torch.load adds some ten kinds of errors of its own.
    """
    start = file.read(4)
    file.seek(0)
    if start == ZIP:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.CRC == 0:
                    continue
                with archive.open(record) as content:
                    while content.read(2**20):  # reading to the end raises if the checksum differs
                        pass
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = file.read()  # as bytes, because safetensors opens no path that is not in UTF-8
    tensors = dict(sorted(safetensors.torch.load(content).items()))  # it returns them in any order
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = dict(header.get("__metadata__") or {})
    digest = metadata.pop(DIGEST, None)
    # Files of other programs have no digest. Ours all do, so that one without it has lost it.
    if digest != _digest(tensors, metadata) and (digest is not None or "ccgpu" in metadata):
        raise ValueError("the digest of weights and header differs")
    return tensors, metadata


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of tensors and metadata, with a digest of both that `read_content` compares.

    safetensors has no checksum of its own, and a changed bit of a weight is a valid weight.
    """
    # safetensors takes only contiguous tensors that do not share memory.
    own = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    return safetensors.torch.save(own, metadata={**metadata, DIGEST: _digest(own, metadata)})


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors, and of metadata, each in the order of names."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(json.dumps([name, str(value.dtype), [*value.shape]]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: after a kill or an error, path is the former file or the new one, never a part of it.

    Args:
        path: the file to write or to replace.
        content: text (written as UTF-8), bytes, or a function that writes to the open file.

    Raises:
        OSError: the file cannot be written; the former one stays.
    """
    rename_partial(write_partial(path, content), path)


def write_partial(path: Path, content: str | bytes | Callable[[BinaryIO], object]) -> Path:
    """Write content to a partial file beside path, synchronise it to the disk and return its path, ready for renaming.

    Arguments and errors are as in `write_atomically`. An error removes the partial file; a killed process leaves it.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return partial


def rename_partial(partial: Path, path: Path) -> None:
    """Rename a partial file to `path`, atomically; an error removes it, and the former file stays."""
    try:
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_path(path: Path) -> Path:
    """Return the path of the partial file that `write_partial` writes for `path`."""
    return path.with_name(path.name + ".partial")


def is_dense(value: Any) -> bool:
    """Return whether a value is a tensor whose values can be read and compared: not sparse, quantised or on "meta"."""
    return torch.is_tensor(value) and value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def check_tensors(function: str, path: str | os.PathLike[str], content: Any) -> dict[str, Tensor]:
    """Return the content of a file as a state dict.

    Raises:
        ValueError: the content is empty or anything but a mapping of names to tensors; the message begins with
            `function`.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{function}: {os.fspath(path)!r} must hold a state dict, got a {type(content).__name__}; "
            "save module.state_dict()."
        )
    strangers = [str(name) for name, value in content.items() if not isinstance(name, str) or not is_dense(value)]
    if strangers or not content:
        raise ValueError(
            f"{function}: {os.fspath(path)!r} must map names to tensors and nothing else, got "
            f"{'an empty dict' if not content else 'other entries: ' + ', '.join(strangers[:8])}; "
            "save the state dict alone (a training checkpoint often keeps it under 'state_dict' or 'model')."
        )
    return dict(content)


def broken_weights(state: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each entry that no trained network has: NaN or infinity, or a negative running variance."""
    problems = []
    for name, value in state.items():
        if not value.is_floating_point():
            continue
        wrong = int((~torch.isfinite(value)).sum())
        if wrong:
            problems.append(f"{name} has {wrong} of {value.numel()} values NaN or infinite")
        elif name.endswith("running_var") and bool((value < 0).any()):
            problems.append(f"{name} has negative variances")
    return problems


def check_weights(function: str, path: str | os.PathLike[str], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a file's weights are broken (`broken_weights`); the message begins with `function`."""
    problems = broken_weights(state)
    if problems:
        raise ValueError(
            f"{function}: {os.fspath(path)!r} must hold finite weights, got {listed(problems)}; training diverged, or "
            "the file is damaged: use an earlier checkpoint, or fetch the file again."
        )


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Return problems as one text: the first ones, then how many more there are."""
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file of ImageNet weights, on the CPU; errors as in `read_content` and `check_tensors`."""
    return check_tensors("load_imagenet", path, read_content("load_imagenet", path)[0])


def fill(
    network: nn.Module,
    loaded: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    wanted: str,
    in_channels: int = _COLOURS,
) -> None:
    """Copy the entries of a file into a network, all of them or none.

    Counters `num_batches_tracked` that the file lacks, as old files do, keep their value. All other entries must fit
    exactly; this is checked before the first weight is copied, so that an error leaves the network unchanged.

    Args:
        network: the network to fill.
        loaded: the file's entries by name.
        path: the file, for messages.
        wanted: description of the network, for messages.
        in_channels: channels of the network's images; the first convolution is `adapted` to others than three.

    Raises:
        ValueError: entries are missing, surplus or of another shape or kind; all of these entries are listed. Or
            weights are not finite.
    """
    expected = network.state_dict()
    loaded = for_channels(loaded, expected, in_channels)
    problems = differences(loaded, expected)
    if problems:
        raise ValueError(
            f"load_imagenet: {os.fspath(path)!r} must fit the {wanted} entry by entry, "
            f"got {len(problems)} that do not (nothing was loaded):\n  "
            + "\n  ".join(problems)
            + "\npass a file for this network."
        )
    check_weights("load_imagenet", path, loaded)
    network.load_state_dict({**expected, **loaded})


def adapted(weight: Tensor, wanted: Tensor, in_channels: int) -> Tensor:
    """Return a weight trained on RGB for images of C channels, where it is that of the first convolution.

        weight[:, c] = (red + green + blue) / C,    c = 1 .. C

    So an image of C equal channels gives the features of the same values as red, green and blue, and the scale of the
    activations stays.

    Args:
        weight: of any layer; that of a convolution with 3 input channels is adapted where `wanted` has `in_channels`.
        wanted: the network's own weight of that layer.
        in_channels: C; 3: nothing is adapted.
    """
    if in_channels == _COLOURS or weight.ndim != 4 or weight.shape[1] != _COLOURS:
        return weight
    if tuple(wanted.shape) != (weight.shape[0], in_channels, *weight.shape[2:]):
        return weight
    return (weight.sum(dim=1, keepdim=True) / in_channels).repeat(1, in_channels, 1, 1)


def for_channels(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor], in_channels: int) -> dict[str, Tensor]:
    """Return a state dict with its first convolution `adapted` to images of `in_channels`."""
    return {
        name: adapted(value, expected[name], in_channels) if name in expected else value
        for name, value in loaded.items()
    }


def for_dims(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with 1x1 kernels as 1x1x1 ones, or the reverse, where a network for clips differs in them."""
    return {
        name: value.reshape(expected[name].shape)
        if name in expected and value.ndim != expected[name].ndim and value.numel() == expected[name].numel()
        else value
        for name, value in loaded.items()
    }


def for_context(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of a CCNet with the attention's entries under their names in the expected one.

    Criss-cross and non-local attention have the same parameters; those of any other context module stay as they are.
    """
    for theirs, ours in (_ATTENTIONS, _ATTENTIONS[::-1]):
        if f"{theirs}query_conv.weight" in loaded and f"{ours}query_conv.weight" in expected:
            return {
                ours + name.removeprefix(theirs) if name.startswith(theirs) else name: value
                for name, value in loaded.items()
            }
    return dict(loaded)


def differences(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each entry of `loaded` or `expected` that is missing, surplus, or of another shape or kind.

    A missing counter `num_batches_tracked` is no difference.
    """
    problems = [
        f"missing: {name} {tuple(value.shape)}"
        for name, value in expected.items()
        if name not in loaded and not name.endswith(".num_batches_tracked")
    ]
    problems += [f"surplus: {name} {tuple(loaded[name].shape)}" for name in loaded if name not in expected]
    for name, value in expected.items():
        if name not in loaded:
            continue
        if loaded[name].shape != value.shape:
            problems.append(f"misshapen: {name} must be {tuple(value.shape)}, got {tuple(loaded[name].shape)}")
        elif loaded[name].is_floating_point() != value.is_floating_point():
            problems.append(f"wrong kind: {name} must be like {value.dtype}, got {loaded[name].dtype}")
    return problems
