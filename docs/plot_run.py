"""Draw the curves of runs: `python -m docs.plot_run RUN/metrics.jsonl ... OUT.svg` (needs matplotlib).

One run has a line for each of its losses and scores, several have one each: the main head's loss, and mIoU.
"""

import json
import sys
from pathlib import Path

from docs.drawing import plt, save

LOSSES = {"loss": "loss", "main": "main", "auxiliary": "auxiliary"}
SCORES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}


def main(*paths: str) -> None:
    """Draw two plots over the iterations, the training loss and the scores of the evaluations; the last path is OUT."""
    *sources, target = map(Path, paths)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for source in sources:
        records = [json.loads(line) for line in source.read_text().splitlines()]
        for ax, kind, names, factor, mark in (
            (left, "training", LOSSES if len(sources) == 1 else {"main": source.parent.name}, 1, "-"),
            (right, "evaluation", SCORES if len(sources) == 1 else {"miou": source.parent.name}, 100, "o-"),
        ):
            found = [record for record in records if record["kind"] == kind]
            for name, label in names.items():
                values = [factor * record[name] for record in found]
                ax.plot([record["iteration"] for record in found], values, mark, label=label)
    left.set(xlabel="iteration", ylabel="cross-entropy, nats", ylim=(0, None))
    left.legend()
    ylabel = "%" if len(sources) == 1 else "mIoU, %"
    right.set(xlabel="iteration", ylabel=ylabel, xlim=(0, None), ylim=(0, 100))
    right.legend()
    save(figure, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
