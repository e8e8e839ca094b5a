"""Entry points of torch.hub: `torch.hub.load(REPOSITORY, NAME, ..., source="local")`, or a GitHub repository's name.

    ccnet, rcca, criss_cross_attention: new modules
    segmenter: a trained network from a file, as a function from images to masks

Nothing has to be installed but the `dependencies`. torch.hub puts the repository's folder first on Python's path while
it loads; its packages are imported as ccgpu, ccgpu.models and so on, never as `models` or `train`, so packages of the
caller with such names stay the caller's.
"""

import typing as _typing

if _typing.TYPE_CHECKING:
    from ccgpu.models.attention import RCCA, CrissCrossAttention
    from ccgpu.models.ccnet import CCNet
    from ccgpu.models.segmenter import Segmenter

dependencies = ["torch", "numpy", "numba", "PIL", "safetensors", "filelock"]

# torch.hub lists every callable of this module as an entry point, so classes are imported inside of the functions.


def ccnet(backbone: str = "resnet101", num_classes: int = 19, **arguments: _typing.Any) -> "CCNet":
    """Return a new `ccgpu.models.ccnet.CCNet`: a backbone at 1/8 of the images' size and the criss-cross head.

    Args:
        backbone: "resnet18", "resnet50", "resnet101", "efficientnet-lite0", "efficientnet-lite2", "local", "timm:NAME".
        num_classes: classes, 1 or more.
        arguments: the others of `CCNet` by name, such as recurrence=2 and head_channels=512.

    Shape: images (B, 3, H, W), normalised by `net.backbone.mean` and `.std` (for values in 0..255), to logits (B,
    num_classes, H, W) in eval mode.

    Example:
        net = torch.hub.load(path, "ccnet", "resnet50", num_classes=19, source="local").eval()
    """
    from ccgpu.models.ccnet import CCNet

    return CCNet(backbone, num_classes, **arguments)


def rcca(in_channels: int, recurrence: int = 2, **arguments: _typing.Any) -> "RCCA":
    """Return a new `ccgpu.models.attention.RCCA`: criss-cross attention applied several times with the same weights.

    Args:
        in_channels: C, channels of the features, 1 or more.
        recurrence: R, 0 or more; 2 reach every position of an image, 3 of a clip.
        arguments: the others of `RCCA` by name, such as dims=3 and gamma=1.0.

    Shape: (B, C, H, W) to the same.

    Example:
        attention = torch.hub.load(path, "rcca", 512, recurrence=2, source="local")
    """
    from ccgpu.models.attention import RCCA

    return RCCA(in_channels, recurrence, **arguments)


def criss_cross_attention(in_channels: int, **arguments: _typing.Any) -> "CrissCrossAttention":
    """Return a new `ccgpu.models.attention.CrissCrossAttention`: one loop, x + gamma * attention(x).

    Args:
        in_channels: C, channels of the features, 1 or more.
        arguments: the others of `CrissCrossAttention` by name, such as reduction=8.

    Shape: (B, C, H, W) to the same.

    Example:
        attention = torch.hub.load(path, "criss_cross_attention", 512, source="local")
    """
    from ccgpu.models.attention import CrissCrossAttention

    return CrissCrossAttention(in_channels, **arguments)


def segmenter(path: str, **arguments: _typing.Any) -> "Segmenter":
    """Return a `ccgpu.models.segmenter.Segmenter` of a trained network.

    Args:
        path: a run's folder, a file of `ccgpu convert`, or a published checkpoint of the authors or of mmsegmentation.
        arguments: the others of `Segmenter.load` by name, such as device="cpu".

    Example:
        net = torch.hub.load(path, "segmenter", "ccnet.safetensors", source="local")
        net.predict("photos/street.jpg").save("mask.png")
    """
    from ccgpu.models.segmenter import Segmenter

    return Segmenter.load(path, **arguments)
