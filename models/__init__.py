"""Networks out of `ccgpu.cca` and torch: the attention modules and what they are compared with, backbones, CCNet."""

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
