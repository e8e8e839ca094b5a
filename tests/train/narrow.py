"""A backbone for tests of commands: ResNet-18 with half of its blocks and a quarter of their channels, named `narrow`.

A checkpoint of a run is then 3 MB instead of 90. The name is known in the process of the tests, and in one that
`python -m tests.train.narrow` starts, which is the command `ccgpu` otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ccgpu.models import backbones, ccnet, resnet
from ccgpu.train.__main__ import main as ccgpu
from ccgpu.train.runs.settings import network

NARROW = "narrow"
BLOCKS = (1, 1, 1, 1)
WIDTHS = (16, 32, 64, 128)


def build(name: str, *, stem: str | None = None, **options: Any) -> backbones.Backbone:
    """Do what `build_backbone` does, which knows no `narrow`."""
    if name != NARROW:
        return backbones.build_backbone(name, stem=stem, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet._BLOCKS, 18, BLOCKS)
        patch.setattr(resnet, "_WIDTHS", WIDTHS)
        return backbones.build_backbone("resnet18", stem=stem, **options)


@pytest.fixture(autouse=True, scope="session")
def narrow_backbone() -> Iterator[None]:
    """Let networks and flags take the name."""
    with pytest.MonkeyPatch.context() as patch:
        teach(patch)
        yield


def teach(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ccnet, "build_backbone", build)
    patch.setattr(network, "RESNETS", (*network.RESNETS, NARROW))


if __name__ == "__main__":
    teach(pytest.MonkeyPatch())
    sys.exit(ccgpu())
