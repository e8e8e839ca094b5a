"""CCNet and its parts: criss-cross attention as modules, the other context modules, backbones and heads.

Networks are built from `ccgpu.cca` and torch alone; `train` builds on them and is not needed to use one.
"""

from ccgpu.models.attention import RCCA, CrissCrossAttention, attention_map, attention_weights
from ccgpu.models.backbones import build_backbone, load_imagenet
from ccgpu.models.ccnet import CCNet, Outputs
from ccgpu.models.context import ASPP, NonLocal, PyramidPooling
from ccgpu.models.efficientnet import EfficientNetLite
from ccgpu.models.heads import AuxiliaryHead, CCHead
from ccgpu.models.resnet import ResNet

__all__ = [
    "ASPP",
    "RCCA",
    "AuxiliaryHead",
    "CCHead",
    "CCNet",
    "CrissCrossAttention",
    "EfficientNetLite",
    "NonLocal",
    "Outputs",
    "PyramidPooling",
    "ResNet",
    "attention_map",
    "attention_weights",
    "build_backbone",
    "load_imagenet",
]
