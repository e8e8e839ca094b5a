"""Criss-cross attention in mmcv's spelling: the module behind mmsegmentation's `CCHead`, and checkpoints for it.

mmcv's `CrissCrossAttention` has gamma in a submodule: its entry is `gamma.scale`, of shape (), where ours (and the
authors') is `gamma`, of shape (1,). All other entries are the same. Ours load theirs as they are; this module is for
the other direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ccgpu.models.attention import CrissCrossAttention

_GAMMA, _SCALE = "gamma", "gamma.scale"  # our name, mmcv's
_BESIDE = "query_conv.weight"  # the entry beside gamma by which an attention module is recognised


def to_mmcv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in mmcv's spelling: the gamma of each attention module, (1,), as `gamma.scale`, ().

        PREFIX.gamma  ->  PREFIX.gamma.scale    where there is a PREFIX.query_conv.weight

    All other entries keep names and values (no tensor is copied), and so does the order. A state dict that is in mmcv's
    spelling already comes back as it is.

    Args:
        state: names -> tensors, of a module, or of a whole network with any number of `CrissCrossAttention` and `RCCA`
            modules. mmcv's module is for images and has C // 8 channels in its queries: dims=2 and reduction=8.

    Raises:
        TypeError: state is no state dict, but a module, for example, or a file that holds one as "state_dict".
        ValueError: a gamma beside a query convolution is not of shape (1,).

    Examples:
        >>> from ccgpu.models.attention import RCCA
        >>> from ccgpu.models.mmcv_attention import to_mmcv
        >>> state = to_mmcv(RCCA(16).state_dict())
        >>> [(name, tuple(value.shape)) for name, value in state.items()][:2]
        [('gamma.scale', ()), ('query_conv.weight', (2, 16, 1, 1))]
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"to_mmcv: state must be a state dict, got {type(state).__name__}; pass what its state_dict() returns."
        )
    nested = [name for name, value in state.items() if isinstance(value, Mapping)]
    if nested:
        raise TypeError(
            f"to_mmcv: state must be a state dict, got a mapping with another one at {nested[0]!r}; pass that one."
        )
    beside = {name.removesuffix(_BESIDE) for name in state if name == _BESIDE or name.endswith(f".{_BESIDE}")}
    translated = {}
    for name, value in state.items():
        prefix = name.removesuffix(_GAMMA)
        if name != f"{prefix}{_GAMMA}" or prefix not in beside:
            translated[name] = value
            continue
        if tuple(value.shape) != (1,):
            raise ValueError(
                f"to_mmcv: {name} must be of shape (1,), got {tuple(value.shape)}; pass the state dict of a network "
                "with attention modules of ccgpu."
            )
        translated[f"{prefix}{_SCALE}"] = value.reshape(())
    return translated


class MMCVCrissCrossAttention(CrissCrossAttention):
    """`CrissCrossAttention` for mmcv's place: its state dict is in mmcv's spelling.

    Networks of mmsegmentation that are built with it write checkpoints which mmsegmentation with mmcv's own module
    loads, strictly, and the other way round; like all attention modules here it loads both spellings. FSDP and
    `torch.distributed.checkpoint` look for an attribute of each entry's name and find no `gamma.scale`: train with
    `CrissCrossAttention` there, and translate its state dict with `to_mmcv`.

    Args:
        in_channels: C, channels of x and of the output; 8 or more, because mmcv's module has C // 8 channels in its
            queries.

    Shapes, formula and errors: as in `CrissCrossAttention`.

    Raises:
        ValueError: in_channels is below 8.

    Examples:
        >>> from ccgpu.models.mmcv_attention import MMCVCrissCrossAttention
        >>> MMCVCrissCrossAttention(16).state_dict()["gamma.scale"]
        tensor(0.)
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels)
        if in_channels < 8:
            raise ValueError(
                f"MMCVCrissCrossAttention: in_channels must be 8 or more, got {in_channels}; use CrissCrossAttention, "
                "which has no counterpart in mmcv for so few channels."
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}{_SCALE}"] = destination.pop(f"{prefix}{_GAMMA}").reshape(())
