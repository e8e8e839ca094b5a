"""torchvision where its compiled operators do not load, as beside another build of torch than it was compiled for."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The boxes (N, 4) that overlap no better one by more than the threshold (intersection over union), best first."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    remaining, kept = scores.argsort(descending=True, stable=True), []
    while len(remaining):
        best, others = remaining[0], remaining[1:]
        kept.append(best)
        corners = torch.maximum(boxes[best, :2], boxes[others, :2]), torch.minimum(boxes[best, 2:], boxes[others, 2:])
        shared = (corners[1] - corners[0]).clamp(min=0).prod(1)
        remaining = others[shared / (areas[best] + areas[others] - shared) <= threshold]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.int64)


def import_torchvision() -> ModuleType:
    """Return torchvision, with the `nms` above where it has no compiled one; skip the test where it is missing.

    The import of a torchvision without its compiled operators ends where it describes `nms` and `qnms` to torch, which
    do not exist then.
    """
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        torch.library.impl("torchvision::nms", "CompositeExplicitAutograd", nms)
        import torchvision
    if not torchvision.extension._has_ops():
        # It asks for all of its operators before it calls nms. Its roi_align in torch is compiled at the first call,
        # which takes half a minute: here it runs as it is.
        torchvision.ops.boxes._assert_has_ops = lambda: None
        pooling = sys.modules["torchvision.ops.roi_align"]
        pooling._roi_align = getattr(pooling._roi_align, "__wrapped__", pooling._roi_align)
    return torchvision
