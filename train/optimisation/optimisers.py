"""Optimisers: SGD and AdamW over a network's backbone and the rest of it, and what their saved states may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ccgpu.models.weights import is_dense

OPTIMISERS = ("sgd", "adamw")
BETA2 = 0.999  # decay of AdamW's mean of squared gradients; torch's default
# Key of a parameter group: its learning rate is this factor times that of the schedule.
LR_FACTOR = "lr_factor"
_NEVER_NEGATIVE = ("step", "exp_avg_sq")


def build_optimiser(
    net: nn.Module,
    backbone: nn.Module,
    name: str,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    head_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """Return an optimiser of the trainable parameters of a network, in groups for the backbone and for the rest.

    Args:
        net: the network; parameters without `requires_grad` are left out.
        backbone: the part of `net` whose learning rate is that of the schedule.
        name: "sgd" or "adamw" (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019).
        lr: the learning rate at the start; `set_learning_rate` changes it.
        momentum: of SGD; beta1 of AdamW, whose beta2 is 0.999.
        weight_decay: added to the gradient by SGD, decoupled in AdamW.
        head_lr: factor of the learning rate of everything outside the backbone.

    Raises:
        ValueError: there is no such optimiser, or no parameter to train.
    """
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    own = set(backbone.parameters())
    parts = ((1.0, [p for p in trainable if p in own]), (head_lr, [p for p in trainable if p not in own]))
    groups = [{"params": params, LR_FACTOR: factor} for factor, params in parts if params]
    if not groups:
        raise ValueError("build_optimiser: net must have parameters to train, got none; freeze less of it.")
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, BETA2), weight_decay=weight_decay)
    raise ValueError(f"build_optimiser: name must be one of {', '.join(OPTIMISERS)}, got {name!r}.")


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group to lr times the group's factor, 1 where it has none."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group.get(LR_FACTOR, 1.0)


def state_problems(optimiser: torch.optim.Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """Return a line for each part of a saved state that does not fit an optimiser's parameters.

    torch itself compares the number of the parameters alone.

    Args:
        optimiser: of `build_optimiser`.
        saved: a state dict, of whatever content.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = saved.get("state")
    if not isinstance(state, Mapping):
        return ["no state of the parameters"]
    problems = []
    for index, values in state.items():
        known = isinstance(index, int) and 0 <= index < len(parameters) and isinstance(values, Mapping)
        wanted = _shapes(optimiser, parameters[index], values) if known else None
        if wanted is None or not all(_has(values.get(name), shape) for name, shape in wanted.items()):
            problems.append(f"another state for parameter {index}")
            continue
        for name in wanted:
            if not bool(torch.isfinite(values[name]).all()):
                problems.append(f"NaN or infinity in the {name} of parameter {index}")
            elif name in _NEVER_NEGATIVE and bool((values[name] < 0).any()):
                problems.append(f"negative values in the {name} of parameter {index}")
    return problems


def _shapes(
    optimiser: torch.optim.Optimizer, parameter: torch.Tensor, values: Mapping[str, Any]
) -> dict[str, torch.Size]:
    """Return the tensors that an optimiser keeps of a parameter, with their shapes."""
    if isinstance(optimiser, torch.optim.AdamW):
        return {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    # SGD without momentum keeps none.
    return {} if values.get("momentum_buffer") is None else {"momentum_buffer": parameter.shape}


def _has(value: Any, shape: torch.Size) -> bool:
    return is_dense(value) and value.shape == shape
