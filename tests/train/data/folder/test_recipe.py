"""The recipe that follows from a folder's images: valid settings, within their bounds, told one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ccgpu.train.data.folder.recipe import recipe_of
from ccgpu.train.runs.flags import is_value
from ccgpu.train.runs.settings.training import Settings


def recipe(number: int = 20, size: tuple[int, int] = (640, 480), **changes: Any) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {"on_cpu": False, "cores": 8, "has_weights": True, "given": {}}
    return recipe_of([size] * number, **{**values, **changes})


@pytest.mark.parametrize("number", [1, 20, 100_000])
@pytest.mark.parametrize("size", [(1, 1), (100, 60), (9000, 300)])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_values_are_settings(number: int, size: tuple[int, int], on_cpu: bool) -> None:
    values, _ = recipe(number, size, on_cpu=on_cpu)
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    assert all(is_value(fields[name], value) for name, value in values.items())
    assert Settings(**values).eval_every >= 1
    assert all(side % 8 == 0 and 32 <= side <= 512 for side in values["crop"])
    assert 150 <= values["iterations"] <= 40_000


def test_the_crop_is_the_image_where_it_is_small() -> None:
    assert recipe(size=(100, 60))[0]["crop"] == (64, 104)
    assert recipe(size=(4000, 300))[0]["crop"] == (304, 512)
    assert recipe(size=(4000, 300), on_cpu=True)[0]["crop"] == (192, 192)


def test_each_image_is_seen_so_often() -> None:
    assert recipe(1000)[0]["iterations"] == 100 * 1000 // 8
    assert recipe(1000, on_cpu=True)[0]["iterations"] == 40 * 1000 // 4


def test_flags_take_part_and_are_not_told() -> None:
    values, lines = recipe(given={"backbone": "resnet18", "batch": 2, "crop": (64, 64)})
    assert values["imagenet"] is None  # the package has no weights of that backbone
    assert values["iterations"] == 100 * 20 // 2
    told = {line.split()[0] for line in lines}
    assert told.isdisjoint({"--backbone", "--batch", "--crop"})
    assert {"--iterations", "--gamma", "--head-channels"} <= told
    assert recipe(given={"init": "net.pt", "backbone": "efficientnet-lite0"})[0]["imagenet"] is None
    values, lines = recipe(given={"context": "psp"})
    assert "gamma" not in values
    assert not [line for line in lines if line.startswith("--gamma")]
    assert recipe(has_weights=False)[0]["backbone"] == "resnet18"
    assert "ccgpu[weights]" in recipe(has_weights=False)[1][0]
