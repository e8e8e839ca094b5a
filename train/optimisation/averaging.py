"""The exponential moving average (EMA) of a network's weights over the steps of its training."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

N = TypeVar("N", bound=nn.Module)


class Average(Generic[N]):
    """A copy of a network that holds the average of its weights.

        average <- d * average + (1 - d) * weights    after each step,    d = min(decay, (1 + i) / (10 + i))

    i is the number of the step, counted from 0. The smaller d of the first steps lets the average forget the initial
    weights, which it would else still hold at the end of a short run; it is the d of TensorFlow's
    `ExponentialMovingAverage(decay, i)`. Floating buffers, such as the statistics of batch norms, are averaged too;
    others are copied.

    Args:
        net: the network before its first step; its own weights are what the average starts from.
        decay: between 0 and 1, for example 0.999.
        compiled: whether `net` is compiled, which a copy does not take over.

    Attributes:
        net: the copy, in eval mode and without gradients.
    """

    def __init__(self, net: N, decay: float, *, compiled: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"Average: decay must be between 0 and 1, got {decay}; 0.999 is usual.")
        self.decay = decay
        self.net: N = copy.deepcopy(net).requires_grad_(False).eval()
        if compiled:
            self.net.compile()

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Take the weights of `net` into the average after step number `step`, counted from 0."""
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values(), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)([own for own, _ in floating], [new for _, new in floating], None)
        for own, new in pairs:
            if not own.is_floating_point():
                own.copy_(new)
