"""Draw the runs of docs/results/far-context: `python -m docs.plot_far_context` (needs matplotlib)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.far_context.runs import DISTANCES, EVALUATE, EVALUATED_SEED, OFFSETS, settings_of
from benchmarks.far_context.search import STRIDE, farthest_pixel
from ccgpu.train.scenes.discs import draw_scene
from docs.drawing import plt, save
from docs.results_table import AFTER, BEFORE, CONTEXTS, RESULTS, VARIANTS, far_context_runs

TARGET = RESULTS / "far-context"
CHANCE = 0.25
COLOURS = {context: f"C{place}" for place, context in enumerate(CONTEXTS)}
LEAST = 500  # pixels of all runs' images below which a range of distances says little


def draw_accuracy() -> None:
    """Draw the accuracy of every run: a row for each context module, a dot for each seed, a panel for each variant.

    Runs that start from the weights of non-local attention are hollow dots in the panel of their dataset.
    """
    runs = far_context_runs()
    variants = [*dict.fromkeys(variant for variant, _ in runs if variant != AFTER)]
    shown = [context for context in CONTEXTS if any(key[1] == context for key in runs)]
    figure, axes = plt.subplots(
        1, len(variants), figsize=(3.6 * len(variants) + 1, 2.6), layout="constrained", sharey=True, squeeze=False
    )
    for ax, variant in zip(axes[0], variants, strict=True):
        for place, context in enumerate(shown):
            scores = [100 * run["accuracy"] for run in runs.get((variant, context), [])]
            if scores:
                ax.plot([statistics.fmean(scores)], [place], "|", color=COLOURS[context], markersize=18)
                ax.plot(scores, [place] * len(scores), "o", color=COLOURS[context], markersize=4, alpha=0.7)
            after = [100 * run["accuracy"] for run in runs.get((AFTER, context), []) if variant == BEFORE]
            ax.plot(after, [place] * len(after), "o", color=COLOURS[context], markersize=5, markerfacecolor="none")
        ax.axvline(100 * CHANCE, color="#888888", linestyle=":", linewidth=1)
        ax.set(xlabel="accuracy on discs, %", xlim=(0, 100), yticks=range(len(shown)))
        ax.set_yticklabels([CONTEXTS[context] for context in shown])
        ax.set_title(VARIANTS[variant], fontsize=9, loc="left")
        ax.grid(axis="x", alpha=0.4)
    axes[0, 0].invert_yaxis()
    save(figure, TARGET / "accuracy.svg")


def draw_distance(ax: Axes, runs: dict[str, list[dict[str, Any]]], row: int) -> None:
    """Draw the accuracy over the distance to the square, mean and range of the seeds, for a range of `OFFSETS`."""
    for context, found in runs.items():
        pixels, right = (np.array([run[name][row] for run in found]) for name in ("pixels", "right"))
        known = pixels.min(0) >= LEAST
        middles = (np.asarray(DISTANCES) + (DISTANCES[1] - DISTANCES[0]) / 2)[known]
        shares = 100 * right[:, known] / pixels[:, known]
        ax.fill_between(middles, shares.min(0), shares.max(0), color=COLOURS[context], alpha=0.2, linewidth=0)
        ax.plot(middles, shares.mean(0), "o-", color=COLOURS[context], label=CONTEXTS[context], markersize=3)
    ax.axhline(100 * CHANCE, color="#888888", linestyle=":", linewidth=1)
    ax.set(xlabel="distance to the square, pixels", ylim=(0, 100), xlim=(0, None))
    ax.grid(alpha=0.3)


def draw_distances() -> None:
    """Draw the accuracy by distance of the first variant, on the square's criss-cross and far from it."""
    runs = {context: found for (variant, context), found in far_context_runs().items() if variant == "one-square"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained", sharey=True)
    draw_distance(left, runs, 0)
    draw_distance(right, runs, len(OFFSETS) - 1)
    left.set_title("on the square's criss-cross", fontsize=9, loc="left")
    right.set_title(f"{OFFSETS[-1]} pixels or more from its criss-cross", fontsize=9, loc="left")
    left.set_ylabel("accuracy on discs, %")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    save(figure, TARGET / "distance.svg")


def draw_maps(variant: str, contexts: Sequence[str], target: str) -> None:
    """Draw the first image or clip of the evaluation, a pixel of a disc in it, and what the pixel attends to.

    A row for each frame, a column for each context module. The maps are those of the first seed.
    """
    runs = far_context_runs()
    found = {context: runs[variant, context][0] for context in contexts if (variant, context) in runs}
    settings = settings_of(variant, "none", 0)
    rng = np.random.default_rng((EVALUATED_SEED, EVALUATE, 0))
    scene = draw_scene(settings.scenes_size, rng, markers=settings.markers, frames=settings.clip)
    frame, y, x = farthest_pixel(scene)
    figure, axes = plt.subplots(
        *(settings.clip, len(found) + 1),
        figsize=(2.4 * (len(found) + 1), 2.4 * settings.clip + 0.2),
        layout="constrained",
        squeeze=False,
    )
    axes[0, 0].set_title(f"{'an image' if settings.clip == 1 else 'a clip'}, a pixel of a disc", fontsize=9, loc="left")
    for ax, pixels in zip(axes[:, 0], scene.pixels, strict=True):
        ax.imshow(pixels, interpolation="none")
    for column, (context, run) in zip(axes.T[1:], found.items(), strict=True):
        count, images = run["attention"]["found"], run["attention"]["images"]
        column[0].set_title(f"{CONTEXTS[context]}: finds {count} of {images}", fontsize=9, loc="left")
        weights = np.array(run["attention"]["example"])
        for ax, pixels, values in zip(column, scene.pixels, weights / weights.max(), strict=True):
            # Blended here, an image needs half the bytes that two on top of each other need.
            colours = plt.get_cmap("inferno")(values)[..., :3].repeat(STRIDE, 0).repeat(STRIDE, 1)
            ax.imshow(0.7 * colours + 0.3 * pixels / 255, interpolation="none")
    for ax in axes[frame]:
        ax.plot([x], [y], "x", color="#00e5ff", markersize=7)
    for ax in axes.flat:
        ax.axis("off")
    save(figure, TARGET / target)


def main() -> None:
    """Draw all plots."""
    draw_accuracy()
    draw_distances()
    draw_maps("one-square", ("rcca-r1", "rcca-r2", "nonlocal"), "attention.svg")
    draw_maps("clips", ("rcca-r1", "rcca-r2", "rcca-r3"), "attention-clips.svg")


if __name__ == "__main__":
    main()
