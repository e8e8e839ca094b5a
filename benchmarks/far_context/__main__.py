"""Compare context modules where the class of a pixel stands far away: `python -m benchmarks.far_context`.

Each run trains the network of `ccgpu train far_context` with another context module, variant of the dataset and seed,
on scenes that are drawn in memory, and evaluates it on 200 images or frames of clips that are the same for all runs. A
finished run is one line of the record; runs that are in the record already are left out, so that the sweep can be
stopped and started again. Limit it by --seeds, --contexts and --variants.

accuracy   share of the pixels of discs that get their class; a disc has one of four, so that guessing gives 0.25
far        the same for pixels whose square no convolution of the network reaches, on and off the square's criss-cross
found      images of 100 in which the farthest disc's pixel attends most to its square
step       the processor's time of a training step, the median
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.far_context.runs import (
    CONTEXTS,
    CPU,
    DISTANCES,
    OFFSETS,
    VARIANTS,
    Scenes,
    evaluate,
    settings_of,
    train,
)
from benchmarks.far_context.search import search
from ccgpu.train.far_context import DATASET
from ccgpu.train.runs import records
from ccgpu.train.runs.settings.training import Settings, check_settings

RECORD = Path(__file__).resolve().parents[2] / "docs" / "results" / "far-context" / "runs.jsonl"
# Clips need attention along T: the others see each frame by itself, where there is no square. RCCA alone has the
# parameters of non-local attention.
LEFT_OUT = {("clips", "psp"), ("clips", "aspp")}
LEFT_OUT |= {("own-square-after", context) for context in CONTEXTS if not context.startswith("rcca")}
_SAVED = (
    *("iterations", "batch", "scenes", "scenes_size", "head_channels", "lr", "optimiser", "channels_last"),
    *("markers", "clip"),
)


def saved(settings: Settings) -> dict[str, Any]:
    """Return the settings that a record names, as JSON has them."""
    values = {name: getattr(settings, name) for name in _SAVED}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def started(first: Settings | None, context: str | None) -> dict[str, Any]:
    """Return what a record says of the network that a run starts from, of another context module where one is named."""
    return {} if first is None else {"first": saved(first) | ({} if context is None else {"context": context})}


def run(settings: Settings, scenes: Scenes, start: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """Train and evaluate, and return what is recorded; training starts from the weights `start`."""
    net, cost = train(settings, scenes, start)
    return {**evaluate(net, settings, scenes.evaluate), **cost, "attention": search(net, settings, scenes.evaluate)}


def line(record: dict[str, Any]) -> str:
    """Return a run's line of the table."""
    pixels, right = (np.asarray(record[name]) for name in ("pixels", "right"))
    far = np.asarray(DISTANCES) >= OFFSETS[-1] + 8  # the first range that begins beyond the convolutions' reach
    shares = [right[row, far].sum() / max(pixels[row, far].sum(), 1) for row in (0, len(OFFSETS) - 1)]
    found = record["attention"]
    cells = [
        f"{record['variant']:<16} {record['context']:<9} {record['seed']:>4} {record['accuracy']:>9.3f}",
        f"{shares[0]:>7.3f} {shares[1]:>8.3f}",
        f"{'' if found is None else found['found']:>6} {record['step_cpu_ms']:>6.0f} ms {record['peak_mb']:>7.1f} MB",
    ]
    return " ".join(cells)


def read_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(prog="far_context", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="of the dataset (default: all)")
    add("--contexts", nargs="+", choices=CONTEXTS, default=[*CONTEXTS], help="context modules (default: all)")
    add("--seeds", nargs="+", type=int, default=[*range(5)], metavar="N", help="(default: 0 1 2 3 4)")
    add("--iterations", type=int, metavar="N", help="steps (default: those of the variant)")
    scenes = DATASET.recipe["scenes"]
    add("--scenes", type=int, nargs=2, default=scenes, metavar=("TRAIN", "VAL"), help="images (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="of the processor (default: %(default)s)")
    add("--record", type=Path, default=RECORD, metavar="FILE", help="of the finished runs (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 finished, 2 wrong flags, 130 stopped."""
    flags = read_flags(argv)
    steps = {} if flags.iterations is None else {"iterations": flags.iterations}
    changes: dict[str, Any] = {"scenes": tuple(flags.scenes), **steps}
    try:
        check_settings(settings_of("one-square", "none", flags.seeds[0], **changes), DATASET, 1, CPU)
        done = [
            (known["variant"], known["context"], known["seed"], known["settings"])
            for known in records.read_records(flags.record)
        ]
    except ValueError as error:
        print(f"far_context: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(flags.threads)
    circumstances = records.circumstances(CPU)  # of the code that runs, whatever is changed meanwhile
    flags.record.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'variant':<16} {'context':<9} seed  accuracy  far on  far off  found    step    peak", flush=True)
    try:
        for variant, seed in itertools.product(flags.variants, flags.seeds):
            scenes: Scenes | None = None
            trained: Settings | None = None  # of the network that runs start from; several contexts may share it
            start: Mapping[str, Tensor] | None = None
            for context in flags.contexts:
                settings = settings_of(variant, context, seed, **changes)
                _, _, before, other = VARIANTS[variant]
                first = None if before is None else settings_of(before, other or context, seed, **changes)
                key = (variant, context, seed, saved(settings) | started(first, other))
                if key in done or (variant, context) in LEFT_OUT:
                    continue
                if first is not None and first != trained:
                    trained, start = first, train(first, Scenes.draw(first))[0].state_dict()
                scenes = Scenes.draw(settings) if scenes is None else scenes
                record = {
                    **dict(zip(("variant", "context", "seed", "settings"), key, strict=True)),
                    **run(settings, scenes, start),
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    **circumstances,
                }
                records.append_record(flags.record, record)
                print(line(record), flush=True)
    except KeyboardInterrupt:
        print("far_context: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
