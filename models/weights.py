"""Weights files of backbones: read with care, compared entry by entry, written only where everything fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU.

    Only tensors are unpickled (`weights_only=True`), so a file cannot run code.

    Raises:
        FileNotFoundError: there is no file at path (any other OSError of opening it passes through).
        ValueError: the file is damaged or no state dict; the message says what it is instead.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"load_imagenet: path must be a file, got {os.fspath(path)!r}, where there is none; "
            "download the ImageNet weights and pass where they lie."
        )
    with open(path, "rb") as file:
        try:
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
        # Cut short or with bytes changed, a file makes torch.load raise almost anything: measured were ten
        # kinds, from RuntimeError and UnpicklingError to OSError, struct.error, UnicodeDecodeError and
        # AssertionError.
        except Exception as error:
            raise ValueError(
                f"load_imagenet: {os.fspath(path)!r} must be a state dict written by torch.save, "
                f"got a file that cannot be read as one ({type(error).__name__} while reading); "
                "it is damaged, cut short or holds more than tensors: fetch it again."
            ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"load_imagenet: {os.fspath(path)!r} must hold a state dict, got a {type(content).__name__}; "
            "save module.state_dict()."
        )
    strangers = [
        str(name) for name, value in content.items() if not isinstance(name, str) or not torch.is_tensor(value)
    ]
    if strangers or not content:
        raise ValueError(
            f"load_imagenet: {os.fspath(path)!r} must map names to tensors and nothing else, got "
            f"{'an empty dict' if not content else 'other entries: ' + ', '.join(strangers[:8])}; "
            "save the state dict alone (a training checkpoint often keeps it under 'state_dict' or 'model')."
        )
    return dict(content)


def fill(network: nn.Module, loaded: Mapping[str, Tensor], path: str | os.PathLike[str], wanted: str) -> None:
    """Copy loaded, the entries of the file at path, into network, which messages call wanted.

    Absent `num_batches_tracked` counters, which old files do not have, keep their value. All else must fit
    exactly. Everything is checked before the first weight is written: after an error network is unchanged.

    Raises:
        ValueError: entries are missing, surplus or of another shape or kind; all of these entries are listed.
    """
    expected = network.state_dict()
    kept = {name: value for name, value in expected.items() if name.endswith(".num_batches_tracked")}
    loaded = {**kept, **loaded}
    problems = _differences(loaded, expected)
    if problems:
        raise ValueError(
            f"load_imagenet: {os.fspath(path)!r} must fit the {wanted} entry by entry, "
            f"got {len(problems)} that do not (nothing was loaded):\n  "
            + "\n  ".join(problems)
            + "\npass a file for this network."
        )
    network.load_state_dict(loaded)


def _differences(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """List what keeps loaded from filling expected, one line an entry."""
    problems = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in loaded]
    problems += [f"surplus: {name} {tuple(loaded[name].shape)}" for name in loaded if name not in expected]
    for name, value in expected.items():
        if name not in loaded:
            continue
        if loaded[name].shape != value.shape:
            problems.append(f"misshapen: {name} must be {tuple(value.shape)}, got {tuple(loaded[name].shape)}")
        elif loaded[name].is_floating_point() != value.is_floating_point():
            problems.append(f"wrong kind: {name} must be like {value.dtype}, got {loaded[name].dtype}")
    return problems
