"""Parts of a network that training leaves as they are: the backbone, or the batch norms."""

from __future__ import annotations

from torch import nn

FREEZE = ("backbone", "norms")


def freeze(kind: str | None, backbone: nn.Module, trained: nn.Module) -> tuple[nn.Module, ...]:
    """Take a part of a network from the training, and return the modules that must be kept in eval mode.

    Frozen parameters have no `requires_grad`: the optimiser of `build_optimiser` and `DistributedDataParallel` leave
    them out, and a frozen backbone saves nothing for backward. In eval mode batch norms neither use nor change the
    statistics of the batch, and nothing is dropped.

    Args:
        kind: "backbone": the backbone stays as it is, weights and statistics. "norms": statistics, scale and shift of
            the batch norms in `trained` stay. None: everything is trained.
        backbone: the network's backbone.
        trained: the part of the network that came with weights, whose batch norms are worth keeping.

    Raises:
        ValueError: there is no such kind, or `trained` has no batch norms.
    """
    if kind is None:
        return ()
    if kind == "backbone":
        frozen: tuple[nn.Module, ...] = (backbone,)
    elif kind == "norms":
        frozen = tuple(m for m in trained.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if not frozen:
            raise ValueError("--freeze norms needs a network with batch norms, got one without; leave it out.")
    else:
        raise ValueError(f"freeze: kind must be one of {', '.join(FREEZE)} or None, got {kind!r}.")
    for module in frozen:
        module.requires_grad_(False)
        module.eval()
    return frozen
