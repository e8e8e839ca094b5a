"""What `ccgpu.dispatch` and the backends agree on: a call, a backend's functions, and how it says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """A call as backends see it when they are asked whether they can run it."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    depth: int = 64  # channels of q and k; 0 in the stages, which take any number
    channels: int = 512  # channels of v, or of a stage's map
    sizes: tuple[int, ...] = (97, 97)
    images: int = 1
    whole: bool = True  # False: the lines are a part of each criss-cross, see `Bridge`


class Bridge(Protocol):
    """A backend: a module with these six functions; `ccgpu.cca`, `affinity` and `aggregate` give their formulas.

    Inputs are checked tensors on one device, of any strides. A result like x has the dtype and memory format of x.

    `crossing` lets forward and backward compute a part of a criss-cross: the map's lines alone, of the `crossing` lines
    that go through a position. The position itself counts 1 / crossing on each of them, so that it counts once in all
    of them together; None: the map has all lines. In backward out and lse are then those of the whole criss-cross.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, /, crossing: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return out (B, C, *S) like v, and lse (B, *S), contiguous, in the dtype of energies."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor,
        scale: float,
        /,
        crossing: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv like q, k, v, given the gradients of out and lse."""

    def affinity(self, q: Tensor, k: Tensor, /) -> Tensor:
        """Return the energies q_u . k_i (B, K, *S), as `layouts.empty_energies` allocates them."""

    def aggregate(self, weights: Tensor, v: Tensor, /) -> Tensor:
        """Return each position's sum of v over its criss-cross, weighted (B, C, *S), like v."""

    def aggregate_transposed(self, weights: Tensor, x: Tensor, /) -> Tensor:
        """Return the transpose of `aggregate` applied to x (B, C, *S), like x."""

    def why_not(self, call: Call, /) -> str | None:
        """Return why the backend cannot run a call, as a clause such as "CuPy is not installed"; None: it can."""


def install_command() -> str:
    """Return the command that installs CuPy and numba-cuda for this torch's CUDA."""
    major = (torch.version.cuda or "12").split(".")[0]
    return f'pip install "ccgpu[cuda{major}]"'


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def device_reason(device: torch.device, cache: dict[int, str | None], find: Callable[[int], str | None]) -> str | None:
    """Return why a CUDA device is unavailable to a backend; None: it is usable.

    Args:
        device: a CUDA device; without an index, the current one.
        cache: the backend's earlier answers by device index, to which this one is added.
        find: function from a device index to the answer, called if the cache has none.
    """
    index = device.index
    if index is None or index not in cache:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        index = torch.cuda.current_device() if index is None else index
        if index not in cache:
            cache[index] = find(index)
    return cache[index]
