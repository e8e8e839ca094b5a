"""What a backend is asked to run, and why a library or a device that it needs is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Call(NamedTuple):
    """What a backend may look at before it agrees to run a call."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    depth: int = 64  # channels of q and k; 0 in the two stages, which take any number
    channels: int = 512  # of v
    sizes: tuple[int, ...] = (97, 97)
    images: int = 1


class Bridge(Protocol):
    """A backend: a module with these six functions; `ccgpu.cca`, `affinity` and `aggregate` give their formulas.

    Inputs are checked tensors on one device, of any strides. Results have the dtype and layout of the tensors named.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, /) -> tuple[Tensor, Tensor]:
        """Return out (B, C, *S) like v, and lse (B, *S), contiguous, in the dtype of energies."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, scale: float, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv like q, k, v, given the gradients of out and lse."""

    def affinity(self, q: Tensor, k: Tensor, /) -> Tensor:
        """Return the energies q_u . k_i (B, K, *S), as `layouts.empty_energies` allocates them."""

    def aggregate(self, weights: Tensor, v: Tensor, /) -> Tensor:
        """Return the sums of v_i by the weights of u (B, C, *S), like v."""

    def aggregate_transposed(self, weights: Tensor, x: Tensor, /) -> Tensor:
        """Return the sums of x_u by the weights that u gives i (B, C, *S), like x."""

    def why_not(self, call: Call, /) -> str | None:
        """Return why the backend cannot run a call, as the end of a sentence, or None where it can."""


def install_command() -> str:
    """Return the command that installs CuPy and numba-cuda for this torch's CUDA."""
    major = (torch.version.cuda or "12").split(".")[0]
    return f'pip install "ccgpu[cuda{major}]"'


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def device_reason(device: torch.device, cache: dict[int, str | None], find: Callable[[int], str | None]) -> str | None:
    """Return why a CUDA device is unavailable to a backend, or None where it is usable.

    Args:
        device: a CUDA device; without an index, the current one.
        cache: the backend's answers so far, by index of the device.
        find: index of a device -> the answer; called once for each.
    """
    index = device.index
    if index is None or index not in cache:
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        index = torch.cuda.current_device() if index is None else index
        if index not in cache:
            cache[index] = find(index)
    return cache[index]
