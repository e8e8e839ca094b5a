"""Networks out of `ccgpu.cca` and torch: the attention modules, dilated ResNets, CCNet."""

from ccgpu.models.attention import RCCA, CrissCrossAttention, attention_map
from ccgpu.models.ccnet import AuxiliaryHead, CCHead, CCNet
from ccgpu.models.resnet import ResNet, load_imagenet

__all__ = [
    "RCCA",
    "AuxiliaryHead",
    "CCHead",
    "CCNet",
    "CrissCrossAttention",
    "ResNet",
    "attention_map",
    "load_imagenet",
]
