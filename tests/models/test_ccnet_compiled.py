"""CCNet through torch.export and torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ccgpu.models.ccnet import Outputs
from tests.models.problems import clips, network, random_images
from tests.train.narrow import NARROW


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": NARROW},
        {"backbone": NARROW, "dims": 3},
        pytest.param({"backbone": "efficientnet-lite0", "dims": 3}, marks=pytest.mark.slow),
    ],
)
def test_an_exported_network_takes_images_of_any_size(options: dict[str, Any]) -> None:
    net = network(**options).eval()
    clip = options.get("dims") == 3
    images = clips(3) if clip else random_images()
    axes = {axis: torch.export.Dim.AUTO for axis in range(images.ndim) if axis != 1}
    exported = torch.export.export(net, (images,), dynamic_shapes=(axes,)).module()
    for height, width in ((33, 49), (64, 40), (9, 18)):
        for other in (clips(2, height, width), clips(4, height, width)[:1]):
            other = other if clip else other[:, :, 0]
            torch.testing.assert_close(exported(other), net(other), rtol=1e-4, atol=1e-4)


def test_a_network_in_train_mode_is_one_graph() -> None:
    net, images = network(dims=3, embedding=4, dropout=0.0, recompute=True), clips()
    # The test is about fullgraph; what other backends make of the graph depends on torch alone.
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="eager")
    ours, theirs = compiled(images), net(images)
    assert type(ours) is Outputs
    torch.testing.assert_close(tuple(ours), tuple(theirs))
    sum(output.square().mean() for output in ours).backward()
    assert [name for name, parameter in compiled.named_parameters() if parameter.grad is None] == []
