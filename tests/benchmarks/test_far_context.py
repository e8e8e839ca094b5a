"""The sweep over context modules: what a run measures, that a stopped sweep goes on, and how attention is judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.far_context.__main__ import main
from benchmarks.far_context.runs import DISTANCES, OFFSETS, Scenes, evaluate, settings_of, train
from benchmarks.far_context.search import IMAGES, attention_of, farthest_pixel, region_of, search
from ccgpu.models.ccnet import CCNet
from ccgpu.train.far_context import DATASET
from ccgpu.train.runs.setup import build_network
from ccgpu.train.scenes.discs import CLASSES, draw_scene

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"iterations": 2, "scenes": (6, 4), "batch": 2}


@pytest.mark.parametrize("variant", ["one-square", "clips"])
def test_a_sweep_records_each_run_once_and_goes_on(variant: str, tmp_path: Path) -> None:
    record = tmp_path / "folder" / "runs.jsonl"
    flags = ["--iterations", "2", "--scenes", "18", "6", "--record", str(record), "--variants", variant]
    assert main([*flags, "--seeds", "0", "--contexts", "none"]) == 0
    assert main([*flags, "--seeds", "0", "1", "--contexts", "none", "rcca-r2"]) == 0
    assert main([*flags, "--seeds", "0", "1", "--contexts", "none", "rcca-r2"]) == 0
    found = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(run["seed"], run["context"]) for run in found] == [
        (0, "none"),
        (0, "rcca-r2"),
        (1, "none"),
        (1, "rcca-r2"),
    ]
    for run in found:
        pixels, right = np.array(run["pixels"]), np.array(run["right"])
        assert pixels.shape == right.shape == (len(OFFSETS), len(DISTANCES))
        assert (right <= pixels).all()
        assert pixels.tolist() == found[0]["pixels"]  # all runs are evaluated on the same images
        assert run["accuracy"] == right.sum() / pixels.sum()
        assert run["step_cpu_ms"] > 0
        assert run["peak_mb"] > run["saved_mb"] / 2 > 0
        assert (run["attention"] is None) is (run["context"] == "none")
    assert found[0]["loss"] != found[2]["loss"]


def test_accuracy_is_counted_by_distance_and_by_criss_cross() -> None:
    """A network that always says class 1 is right on the discs of class 1, wherever they are."""
    settings = settings_of("own-square", "none", 0, **SMALL)
    scenes = Scenes.draw(settings).evaluate

    class Constant(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(images), 5, *images.shape[2:])
            logits[:, 1] = 1
            return logits

    found = evaluate(Constant(), settings, scenes)
    pixels = np.zeros((len(OFFSETS), len(DISTANCES)), int)
    right = pixels.copy()
    for scene in scenes:
        _, rows, columns = scene.offsets()
        for y, x in zip(*np.nonzero(scene.labels[0]), strict=True):
            offset, distance = min(rows[0, y, x], columns[0, y, x]), np.hypot(rows[0, y, x], columns[0, y, x])
            place = sum(offset >= low for low in OFFSETS) - 1, sum(distance >= low for low in DISTANCES) - 1
            pixels[place] += 1
            right[place] += scene.labels[0, y, x] == 1
    assert found["pixels"] == pixels.tolist()
    assert found["right"] == right.tolist()
    assert pixels[:, 0].sum() < pixels.sum()


def test_seeds_change_the_training_images_and_not_those_of_the_evaluation() -> None:
    first, again, other = (Scenes.draw(settings_of("one-square", "none", seed, **SMALL)) for seed in (0, 0, 1))
    for one, two in zip(first.train, again.train, strict=True):
        assert (one.pixels == two.pixels).all()
    assert all((one.pixels != two.pixels).any() for one, two in zip(first.train, other.train, strict=True))
    assert all((one.pixels == two.pixels).all() for one, two in zip(first.evaluate, other.evaluate, strict=True))
    assert all((one.pixels != two.pixels).any() for one in first.train for two in first.evaluate)


def test_a_network_for_clips_starts_from_one_for_images() -> None:
    images = settings_of("one-square", "rcca-r3", 0, **SMALL)
    clips = settings_of("clips", "rcca-r3", 0, **{**SMALL, "lr": 1e-9})
    start = train(images, Scenes.draw(images))[0]
    with torch.no_grad():
        start.head.cca.value_conv.weight += 1
    found, _ = train(clips, Scenes.draw(clips), start.state_dict())
    assert found.dims == 3
    for one, other in zip(start.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other.reshape(one.shape), one, rtol=0, atol=1e-6)


def test_rcca_starts_from_non_local_attention() -> None:
    first = settings_of("own-square", "nonlocal", 0, **SMALL)
    after = settings_of("own-square-after", "rcca-r2", 0, **{**SMALL, "lr": 1e-9})
    start = train(first, Scenes.draw(first))[0]
    found, _ = train(after, Scenes.draw(after), start.state_dict())
    assert found.head.cca is not None
    for one, other in zip(start.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "context"), [("one-square", "nonlocal"), ("clips", "nonlocal"), ("clips", "rcca-r3")]
)
def test_attention_of_a_pixel_is_a_distribution_over_all_positions(variant: str, context: str) -> None:
    settings = settings_of(variant, context, 0)
    net = build_network(settings, DATASET, torch.device("cpu"), pretrained=False).eval()
    frames = settings.clip
    image = torch.randn(1, 3, 64, 80) if frames == 1 else torch.randn(1, 3, frames, 64, 80)
    weights = attention_of(net, image, (20, 30) if frames == 1 else (1, 20, 30))
    assert weights is not None
    assert weights.shape == (frames, 8, 10)
    assert weights.min() > 0
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)


def test_non_local_attention_of_a_pixel_is_what_the_module_mixes_with() -> None:
    """Values that are 1 at one position and 0 elsewhere arrive with the weight of that position."""
    settings = settings_of("one-square", "nonlocal", 0)
    net = build_network(settings, DATASET, torch.device("cpu"), pretrained=False).eval()
    image = torch.randn(1, 3, 64, 80)
    weights = attention_of(net, image, (20, 30))
    module = net.head.context
    assert isinstance(module, torch.nn.Module)
    with torch.no_grad():
        features = net.head.conva(net.backbone(image)[1])
        q, k = module.query_conv(features), module.key_conv(features)  # type: ignore[operator]
        one_hot = torch.zeros(1, 1, 8, 10)
        one_hot[..., 3, 7] = 1
        mixed = module.mix(q, k, one_hot)  # type: ignore[operator]
    y, x = net.position_of((20, 30), (64, 80), (8, 10))
    assert weights is not None
    assert float(weights[0, 3, 7]) == pytest.approx(float(mixed[0, 0, y, x]), abs=1e-6)


def test_search_counts_the_images_whose_largest_weight_is_on_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of("own-square", "rcca-r2", 0, **SMALL)
    scenes = Scenes.draw(settings).evaluate
    regions = [region_of(scene, farthest_pixel(scene), (1, 16, 16)) for scene in scenes]
    given = iter(regions)
    monkeypatch.setattr(
        "benchmarks.far_context.search.attention_of",
        lambda net, image, pixel: torch.from_numpy(next(given).astype(np.float32)),
    )
    net = CCNet("local", 5, head_channels=8).eval()
    assert search(net, settings, scenes)["found"] == len(scenes) <= IMAGES  # type: ignore[index]
    given = iter([~region for region in regions])
    found = search(net, settings, scenes)
    assert found is not None
    assert (found["found"], found["mass"]) == (0, pytest.approx(0))
    wanted = {name: [0, 0] for name, _ in CLASSES}
    for scene in scenes:
        wanted[CLASSES[scene.labels[farthest_pixel(scene)] - 1][0]][0] += 1
    assert found["of_classes"] == wanted
    assert 0 < found["region"] < 0.15


def test_the_farthest_pixel_and_the_region_of_its_square() -> None:
    for seed in range(5):
        scene = draw_scene((128, 128), np.random.default_rng(seed), markers=4)
        pixel = farthest_pixel(scene)
        _, rows, columns = scene.offsets()
        nearer = np.minimum(rows, columns)
        assert nearer[pixel] == nearer.max()
        square = scene.squares[scene.owners[pixel]]
        region = region_of(scene, pixel, (1, 16, 16))
        for y, x in zip(*np.nonzero(region[0]), strict=True):  # pixels 8 y - 7 ... 8 y + 7, and one position more
            assert square.top - 8 - 8 <= 8 * y <= square.top + square.side + 8 + 8
            assert square.left - 8 - 8 <= 8 * x <= square.left + square.side + 8 + 8
        assert region[0, (square.top + square.side // 2) // 8, (square.left + square.side // 2) // 8]


def test_the_page_says_what_a_square_at_random_gives() -> None:
    """Where each disc has its own square, the share of pixels whose class a square of their image at random has."""
    pixels, right = np.zeros(5), np.zeros(5)
    settings = settings_of("own-square", "none", 0, scenes=(1, 200))
    for scene in Scenes.draw(settings).evaluate:
        number, classes = len(scene.squares), np.array([square.label for square in scene.squares])
        found = scene.labels[scene.owners >= 0]
        pixels[number] += found.size
        right[number] += sum((found == label).sum() for label in classes) / number
    two, three, four = (f"{100 * share:.0f}" for share in right[2:] / pixels[2:])
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"a square of the image at random gives {two}, {three} and {four} %" in " ".join(page.split())
