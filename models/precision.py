"""In which precision and on which device a network computes (`Precision`)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def amp_problems(amp: str, device: torch.device) -> list[str]:
    """Return a line if a device should not compute in the dtype of --amp; an empty list otherwise."""
    if amp == "fp16" and device.type == "cpu":  # CPUs convert float16 to float32 and back around each multiplication
        return ["--amp fp16 needs a CUDA device, got the CPU; use --amp bf16 or off"]
    return []


@dataclass(frozen=True)
class Precision:
    """Device, autocast dtype and memory format of a run.

    Attributes:
        device: the network's device.
        amp: "off" (float32), "bf16" or "fp16" under autocast; fp16 needs a gradient scaler.
        channels_last: whether images are in NHWC memory format; the network must be converted too.
    """

    device: torch.device
    amp: str = "off"
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp], enabled=self.amp != "off")

    def scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler of a run; it does nothing unless amp is "fp16"."""
        return torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """Return a batch of images or clips on the device, in the memory format."""
        nhwc = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
        order = nhwc if self.channels_last else torch.preserve_format
        return images.to(self.device, non_blocking=True, memory_format=order)
