"""A run: a context module on a variant of the dataset, trained and evaluated by the parts of the training command."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ccgpu.models.ccnet import CCNet
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import Precision
from ccgpu.models.weights import for_context, for_dims
from ccgpu.train import engine
from ccgpu.train.far_context import DATASET, for_settings
from ccgpu.train.memory import peak_bytes, saved_bytes
from ccgpu.train.optimisation.update import Update
from ccgpu.train.runs.settings.training import Settings
from ccgpu.train.runs.setup import build_network, build_optimisation
from ccgpu.train.scenes.discs import Scene, draw_scene

CPU = torch.device("cpu")
DISTANCES = tuple(range(0, 160, 16))
"""Lower ends, in pixels, of the ranges of the distance between a disc's pixel and its square."""
OFFSETS = (0, 1, 16, 40)
"""Lower ends, in pixels, of the ranges of the distance to the square's criss-cross, the smaller one of the distances
along height and width. From 40 on, no convolution of the network reaches from the pixel to the criss-cross."""
TRAIN, EVALUATE = 0, 1  # the second number of a scene's seed
EVALUATED_SEED = 12345  # of the scenes that all runs are evaluated on


class Context(NamedTuple):
    """A context module: the values of --context and --recurrence, and its name in tables."""

    context: str
    recurrence: int | None
    title: str


CONTEXTS = {
    "none": Context("none", None, "no context"),
    "rcca-r1": Context("rcca", 1, "RCCA, R = 1"),
    "rcca-r2": Context("rcca", 2, "RCCA, R = 2"),
    "rcca-r3": Context("rcca", 3, "RCCA, R = 3"),
    "nonlocal": Context("nonlocal", None, "non-local"),
    "psp": Context("psp", None, "PSP"),
    "aspp": Context("aspp", None, "ASPP"),
}


class Variant(NamedTuple):
    """A variant of the dataset.

    Attributes:
        settings: by name, those that differ from the recipe.
        title: its name in tables.
        first: the variant that a network is trained on before, as with --init; None: it starts from random weights.
        first_context: the context module of that network; None: the same.
    """

    settings: dict[str, int]
    title: str
    first: str | None = None
    first_context: str | None = None


VARIANTS = {
    "one-square": Variant({}, "one square"),
    "own-square": Variant({"markers": 4, "iterations": 1600}, "up to four squares, each disc has its own"),
    # From random weights RCCA has not learnt to match discs with squares in 6000 steps; its parameters are those of
    # non-local attention.
    "own-square-after": Variant(
        {"markers": 4, "iterations": 1600},
        "the same, from the weights of non-local attention",
        "own-square",
        "nonlocal",
    ),
    # From random weights RCCA with R = 3 had not learnt in 1500 steps to look into the other frame.
    "clips": Variant({"clip": 2, "iterations": 1000}, "clips, the square in the other frame", "one-square"),
}


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The scenes of runs with one variant and seed: to train on, and to evaluate on."""

    train: Sequence[Scene]
    evaluate: Sequence[Scene]

    @classmethod
    def draw(cls, settings: Settings) -> Scenes:
        """Draw the scenes of --scenes images; those to evaluate on do not depend on the seed."""
        numbers = [-(-number // settings.clip) for number in settings.scenes]
        kinds = ((settings.seed, TRAIN), (EVALUATED_SEED, EVALUATE))
        train, evaluate = (
            [
                draw_scene(
                    settings.scenes_size,
                    np.random.default_rng((*kind, index)),
                    markers=settings.markers,
                    frames=settings.clip,
                )
                for index in range(number)
            ]
            for kind, number in zip(kinds, numbers, strict=True)
        )
        return cls(train, evaluate)


def settings_of(variant: str, context: str, seed: int, **changes: Any) -> Settings:
    """Return the settings of `ccgpu train far_context` for a run: the recipe, and what its flags change."""
    chosen = CONTEXTS[context]
    own = {"context": chosen.context, "recurrence": chosen.recurrence, "seed": seed}
    given = Settings(**{**DATASET.recipe, **own, **VARIANTS[variant].settings, **changes})
    return Settings(**{**for_settings(given).recipe, **own, **VARIANTS[variant].settings, **changes})


def as_batch(scenes: Sequence[Scene], settings: Settings, flipped: Sequence[bool] = ()) -> dict[str, torch.Tensor]:
    """Return scenes as "image" and "label", some of them flipped along their width; with T for clips alone."""
    normalise = Normalise(*_statistics())
    images, labels = [], []
    for index, scene in enumerate(scenes):
        pixels, classes = (scene.pixels, scene.labels) if settings.clip > 1 else (scene.pixels[0], scene.labels[0])
        image, label = normalise(pixels), torch.from_numpy(classes.astype(np.int64))
        turned = index < len(flipped) and flipped[index]
        images.append(image.flip(-1) if turned else image)
        labels.append(label.flip(-1) if turned else label)
    return {"image": torch.stack(images), "label": torch.stack(labels)}


def _statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    with torch.device("meta"):
        backbone = CCNet(str(DATASET.recipe["backbone"]), 1, head_channels=1).backbone
    return tuple(backbone.mean), tuple(backbone.std)


def batches(scenes: Scenes, settings: Settings, seconds: list[float]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a batch for each iteration, in shuffled epochs; note the processor's time between two of them.

    The time is the process's own, so that neither the drawing of batches nor other programs count.
    """
    generator = np.random.default_rng(settings.seed)
    order: list[int] = []
    for _ in range(settings.iterations):
        if len(order) < settings.batch:
            order += generator.permutation(len(scenes.train)).tolist()
        chosen, order = order[: settings.batch], order[settings.batch :]
        flipped = (generator.random(settings.batch) < 0.5).tolist()
        batch = as_batch([scenes.train[index] for index in chosen], settings, flipped)
        start = time.process_time()
        yield batch
        seconds.append(time.process_time() - start)


def train(
    settings: Settings, scenes: Scenes, start: Mapping[str, torch.Tensor] | None = None
) -> tuple[CCNet, dict[str, Any]]:
    """Return a trained network in eval mode, with its loss, the time of its steps and the memory of one step.

    It starts from the weights `start`, which may be of a network for images where it is one for clips, and of one with
    non-local attention where it has RCCA.
    """
    torch.manual_seed(settings.seed)
    net = build_network(settings, DATASET, CPU, pretrained=False)
    if start is not None:
        own = net.state_dict()
        net.load_state_dict(for_dims(for_context(start, own), own))
    _, optimiser, _ = build_optimisation(settings, net)
    precision = Precision(CPU, settings.amp, settings.channels_last)
    update = Update(net, optimiser, precision.scaler(), precision, settings.learning_rates(), settings.criterion(None))
    seconds: list[float] = []
    losses = [step.loss for step in engine.train(update, batches(scenes, settings, seconds))]
    batch = as_batch(scenes.train[: settings.batch], settings)
    held, _ = peak_bytes(lambda: update.gradients(batch), CPU)
    saved = saved_bytes(net, batch["image"])
    optimiser.zero_grad(set_to_none=True)
    return net.eval(), {
        "loss": statistics.fmean(losses[-20:]),
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "step_cpu_ms": 1e3 * statistics.median(seconds),
        "saved_mb": saved / 1e6,
        "peak_mb": held / 1e6,
    }


@torch.no_grad()
def evaluate(net: CCNet, settings: Settings, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return the accuracy on the pixels of discs: of all, and by distance to the square and to its criss-cross.

    Returns:
        "accuracy" in 0..1; "pixels" and "right", numbers of pixels by `OFFSETS` and `DISTANCES`; "of_squares", the same
        two by the number of the image's squares.
    """
    of_squares: dict[str, list[int]] = {}
    counts = np.zeros((2, len(OFFSETS), len(DISTANCES)), np.int64)
    for start in range(0, len(scenes), settings.batch):
        chosen = scenes[start : start + settings.batch]
        predicted = net(as_batch(chosen, settings)["image"]).argmax(1).numpy()
        for classes, scene in zip(predicted, chosen, strict=True):
            on_disc = scene.owners >= 0
            right = (classes.reshape(scene.labels.shape) == scene.labels)[on_disc]
            seen = of_squares.setdefault(str(len(scene.squares)), [0, 0])
            seen[0] += right.size
            seen[1] += int(right.sum())
            _, rows, columns = scene.offsets()[:, on_disc]
            place = (
                np.digitize(np.minimum(rows, columns), OFFSETS) - 1,
                np.digitize(np.hypot(rows, columns), DISTANCES) - 1,
            )
            np.add.at(counts[0], place, 1)
            np.add.at(counts[1], place, right)
    pixels, hits = counts
    accuracy = float(hits.sum() / pixels.sum())
    return {
        **{"accuracy": accuracy, "pixels": pixels.tolist(), "right": hits.tolist()},
        "of_squares": dict(sorted(of_squares.items())),
    }
