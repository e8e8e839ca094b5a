"""What a training step keeps for backward, for the flags that save memory: `python -m benchmarks.step_memory`.

CCNet with ResNet-50 and R = 2 on the CPU; four images of 193x193. Weights are not counted (`ccgpu.train.memory`), but
the copies are that autocast makes of them. The bytes follow from shapes and dtypes: they are the same on every machine,
and on a GPU as far as its operations keep the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ccgpu.models.ccnet import CCNet
from ccgpu.models.precision import Precision
from ccgpu.train.memory import saved_bytes
from ccgpu.train.optimisation.freezing import freeze
from ccgpu.train.runs import records

BACKBONE, IMAGES, SIDE = "resnet50", 4, 193


@dataclass(frozen=True)
class Case:
    """Settings of a step, as their flags name them."""

    flags: str
    accumulate: int = 1
    amp: str = "off"
    freeze: str | None = None
    recompute: bool = False


CASES = (
    Case("none"),
    Case("--accumulate 2", accumulate=2),
    Case("--accumulate 4", accumulate=4),
    Case("--amp bf16", amp="bf16"),
    Case("--freeze backbone", freeze="backbone"),
    Case("--freeze norms", freeze="norms"),
    Case("--recompute", recompute=True),
)


def mebibytes(case: Case, backbone: str = BACKBONE, side: int = SIDE) -> float:
    """Return the MiB that the forward of a step, or of its pieces one at a time, keeps for backward."""
    net = CCNet(backbone, recompute=case.recompute).train()
    for module in freeze(case.freeze, net.backbone, net):
        module.eval()
    with Precision(torch.device("cpu"), case.amp).autocast():
        return saved_bytes(net, torch.zeros(IMAGES // case.accumulate, 3, side, side)) / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="step_memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the figures to this file of JSON lines")
    parser.add_argument("--backbone", default=BACKBONE, help="of the network (%(default)s)")
    parser.add_argument("--side", type=int, default=SIDE, metavar="N", help="of the square images (%(default)s)")
    flags = parser.parse_args(argv)
    figures = {}
    for case in CASES:
        figures[case.flags] = round(mebibytes(case, flags.backbone, flags.side), 1)
        print(f"{figures[case.flags]:9.1f} MiB  {case.flags}")
    if flags.record is not None:
        shape = {"backbone": flags.backbone, "images": IMAGES, "side": flags.side}
        record = {"kind": "step memory", "mebibytes": figures, **shape}
        records.append_record(flags.record, {**record, **records.circumstances(torch.device("cpu"))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
