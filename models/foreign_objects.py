"""Files of `torch.save` with objects of other programs beside the weights: read without running anything of them.

mmengine, for example, stores its logs (`HistoryBuffer`, NumPy arrays) in a checkpoint. A pickle names classes and
functions, and asks to call them; here each of these names stands for `Foreign`, which can be built, called and filled
and does nothing, but for the few names of which tensors and dictionaries are made.
"""

from __future__ import annotations

import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch import Tensor

ZIP = b"PK\x03\x04"
"""The first bytes of a zip file, by which torch tells its files from those of torch before 1.6."""


class Foreign:
    """An object of another program, in its place: whatever a file asks of it does nothing.

    Attributes:
        path: the name that the file has for its class or function, such as "mmengine.logging.HistoryBuffer".
    """

    __slots__ = ()
    path = ""

    def __new__(cls, *_: Any, **__: Any) -> Foreign:
        """Return an empty object."""
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> Foreign:
        """Return the object: for files that call what a call gave."""
        return self

    def __setstate__(self, _: Any) -> None:
        """Take no state."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Take no item of a dictionary."""

    def append(self, _: Any) -> None:
        """Take no item of a list."""

    def extend(self, _: Any) -> None:
        """Take no items of a list."""

    def add(self, _: Any) -> None:
        """Take no item of a set."""

    def __repr__(self) -> str:
        return f"<{self.path}, not read>"


class _Function:
    """A function of ours in the place of one that a file names; unlike a Python function it takes no attributes."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, _: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Return a tensor without gradient and hooks; torch checks that it lies inside of its storage."""
    found: Tensor = torch._utils._rebuild_tensor_v2(storage, offset, size, stride, False, OrderedDict())
    return found


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _Function(lambda *_: {}),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(lambda data, *_: data),
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds nothing but `_KNOWN`; torch adds the types of its storages."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        known = _KNOWN.get((module, name))
        return type("Foreign", (Foreign,), {"__slots__": (), "path": f"{module}.{name}"}) if known is None else known


def unpickle(file: BinaryIO, **options: Any) -> Any:
    """Return the content of a pickle without tensors; options are those of `pickle.Unpickler`."""
    return _Unpickler(file, **options).load()


# What torch.load needs of a module like pickle.
_PICKLE = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler, load=unpickle)


def load_without(file: BinaryIO) -> Any:
    """Return the content of an open file of `torch.save`, on the CPU, with `Foreign` in the place of strange objects.

    Raises:
        pickle.UnpicklingError: a TorchScript program, or a file of torch before 0.1.10.
        Exception: almost any, for a damaged file.
    """
    file.seek(0)
    if file.read(4) == ZIP:
        file.seek(0)
        # torch would hand these to torch.jit.load, which runs the program's own __setstate__.
        if any(name.endswith("constants.pkl") for name in torch._C.PyTorchFileReader(file).get_all_records()):
            raise pickle.UnpicklingError("a TorchScript program")
    else:
        file.seek(0)
        if tarfile.is_tarfile(file):  # torch would unpack its members, links among them, to the disk
            raise pickle.UnpicklingError("a tar file")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
