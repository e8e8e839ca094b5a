"""What a network with criss-cross attention needs of mmcv and mmsegmentation, rendered in plain torch.

`openmmlab` makes packages `mmcv` and `mmseg` with modules, the names and the state dicts of theirs: mmcv's attention
(einsums, gamma in a `Scale`), mmsegmentation's registry, and its `CCHead`, which imports `mmcv.ops` where it can.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ATTENTION = """
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return self.scale * x


class CrissCrossAttention(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.query_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = Scale(0.0)

    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        height = x.shape[2]
        itself = torch.eye(height, dtype=torch.bool, device=x.device)[None, :, None]  # (1, H, 1, H)
        column = torch.einsum("bdyx,bdix->byxi", q, k).masked_fill(itself, float("-inf"))
        row = torch.einsum("bdyx,bdyj->byxj", q, k)
        weights = torch.cat([column, row], dim=-1).softmax(dim=-1)
        out = torch.einsum("bcix,byxi->bcyx", v, weights[..., :height])
        return self.gamma(out + torch.einsum("bcyj,byxj->bcyx", v, weights[..., height:])) + x
"""
REGISTRY = """
class Registry:
    def __init__(self):
        self.classes = {}

    def register_module(self):
        def register(cls):
            self.classes[cls.__name__] = cls
            return cls

        return register

    def build(self, cfg):
        cfg = dict(cfg)
        return self.classes[cfg.pop("type")](**cfg)


MODELS = Registry()
"""
CC_HEAD = """
import torch
from torch import nn

from mmseg.registry import MODELS

try:
    from mmcv.ops import CrissCrossAttention
except ModuleNotFoundError:
    CrissCrossAttention = None


def conv_module(into, out):
    layers = {"conv": nn.Conv2d(into, out, 3, padding=1, bias=False), "bn": nn.BatchNorm2d(out), "activate": nn.ReLU()}
    module = nn.Sequential()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


@MODELS.register_module()
class CCHead(nn.Module):
    def __init__(
        self, in_channels, channels, num_classes, recurrence=2, dropout_ratio=0.1, in_index=-1, norm_cfg=None
    ):
        if CrissCrossAttention is None:
            raise RuntimeError("Please install mmcv-full for CrissCrossAttention ops")
        assert norm_cfg == dict(type="BN"), "this rendering has batch norms"
        super().__init__()
        self.in_index, self.recurrence = in_index, recurrence
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.convs = nn.Sequential(conv_module(in_channels, channels), conv_module(channels, channels))
        self.conv_cat = conv_module(in_channels + channels, channels)
        self.cca = CrissCrossAttention(channels)

    def forward(self, inputs):
        x = inputs[self.in_index]
        output = self.convs[0](x)
        for _ in range(self.recurrence):
            output = self.cca(output)
        output = self.conv_cat(torch.cat([x, self.convs[1](output)], dim=1))
        return self.conv_seg(self.dropout(output))
"""
# With the compiled operators of a build for another machine, or with none, the import of mmcv.ops ends like this.
NO_OPERATORS = "raise ModuleNotFoundError(\"No module named 'mmcv._ext'\")"


def _imported() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("mmcv", "mmseg")}


@contextmanager
def openmmlab(folder: Path, *, operators: bool) -> Iterator[None]:
    """Write the packages and make them importable, instead of installed ones; afterwards nothing of them is left.

    Without operators the import of mmcv.ops fails as it does there.
    """
    files = {
        "mmcv/__init__.py": "",
        "mmcv/ops/__init__.py": "from .cc_attention import CrissCrossAttention" if operators else NO_OPERATORS,
        "mmcv/ops/cc_attention.py": ATTENTION,
        "mmseg/__init__.py": "",
        "mmseg/registry.py": REGISTRY,
        "mmseg/models/__init__.py": "from .decode_heads import *",
        "mmseg/models/decode_heads/__init__.py": "from .cc_head import CCHead",
        "mmseg/models/decode_heads/cc_head.py": CC_HEAD,
    }
    if not operators:  # as of version 1.2, other modules import it without asking whether it is there
        files["mmseg/models/__init__.py"] = "from mmcv.ops import point_sample\n" + files["mmseg/models/__init__.py"]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    installed = _imported()
    for name in installed:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(installed)
