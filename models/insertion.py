"""Modules inserted into networks that are already built, whose checkpoints still load."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def insert_before(block: nn.Module, module: nn.Module, name: str = "rcca") -> None:
    """Let a block of a network compute block(module(x)) instead of block(x).

    The module becomes the child `name` of the block and runs in a forward pre-hook. No other module moves and no other
    key of the state dict changes, as they would if a `torch.nn.Sequential` got one more element. So

    - a strict `load_state_dict` takes checkpoints from before the insertion. They hold no entry of the module, whose
      weights then stay as they are; a checkpoint that holds some of its entries must hold all of them.
    - Checkpoints of the changed network have the module's weights under `name`, and load into a network with the same
      insertion.

    With an `RCCA` whose gamma is 0 (as it begins) the network first computes what it computed before, bit for bit.
    Build the optimiser after the insertion, so that it sees the new parameters, and move the module to the network's
    device and dtype.

    Args:
        block: a part of the network, such as `resnet.layer3[-1]`, that is called with x as its first positional
            argument.
        module: maps x to a tensor of the same shape, such as `RCCA(1024)`.
        name: the module's name in the block, one that the block does not use yet.

    Raises:
        TypeError: block or module is no `torch.nn.Module`, or name no string; later, where the block is called without
            x in front.
        ValueError: the block is a container such as `torch.nn.Sequential` (pass one of its elements); it has an
            attribute of this name, or the name is empty or has a dot.

    Source: the paper's experiment on COCO has the RCCA module right before the last residual block of res4 of
    Mask R-CNN's backbone, torchvision's `layer3`.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from ccgpu.models.attention import RCCA
        >>> from ccgpu.models.insertion import insert_before
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
        >>> images, pretrained = torch.randn(2, 3, 12, 10), net.state_dict()
        >>> before = net(images)
        >>> insert_before(net[-1], RCCA(16))
        >>> net.load_state_dict(pretrained)
        <All keys matched successfully>
        >>> torch.equal(net(images), before)  # gamma is 0
        True
        >>> list(net.state_dict())[:5]
        ['0.weight', '0.bias', '2.weight', '2.bias', '2.rcca.gamma']
    """
    for argument, value in (("block", block), ("module", module)):
        if not isinstance(value, nn.Module):
            raise TypeError(
                f"insert_before: {argument} must be a torch.nn.Module, got {type(value).__name__}; "
                "pass one like resnet.layer3[-1] and one like RCCA(1024)."
            )
    if not isinstance(name, str):
        raise TypeError(f"insert_before: name must be a string, got {type(name).__name__}; pass one like 'rcca'.")
    if not name or "." in name or hasattr(block, name):
        raise ValueError(
            f"insert_before: name must be one that {type(block).__name__} does not use yet, without a dot, "
            f"got {name!r}; name the module otherwise."
        )
    if isinstance(block, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            f"insert_before: block must be no container, which would run one more child as its element, got "
            f"{type(block).__name__}; pass the element in front of which the module comes, such as block[0]."
        )
    block.add_module(name, module)
    hook = _Inserted(name)
    block.register_forward_pre_hook(hook.run)
    block.register_load_state_dict_pre_hook(hook.keep)


class _Inserted:
    """The hooks of a block: methods of a class of this module, so that the network can be pickled and copied."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of the block with the module's output for the first."""
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                f"insert_before: {type(block).__name__} must be called with a tensor as its first positional argument, "
                f"got {type(args[0]).__name__ if args else 'none'}; insert before another block."
            )
        return (block.get_submodule(self.name)(args[0]), *args[1:])

    def keep(self, block: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Give a state dict that has no entry of the module those that the module has."""
        own = f"{prefix}{self.name}."
        if not any(key.startswith(own) for key in state_dict):
            state_dict.update(block.get_submodule(self.name).state_dict(prefix=own))
