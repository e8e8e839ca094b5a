"""Draw the curves of a run's metrics.jsonl: `python -m docs.plot_run RUN/metrics.jsonl OUT.svg` (needs matplotlib)."""

import json
import sys
from pathlib import Path

from docs.drawing import plt, save


def main(source: str, target: str) -> None:
    """Draw two plots over the iterations: the training loss, and mIoU with pixel accuracy."""
    records = [json.loads(line) for line in Path(source).read_text().splitlines()]
    training = [r for r in records if r["kind"] == "training"]
    evaluation = [r for r in records if r["kind"] == "evaluation"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name in ("loss", "main", "auxiliary"):
        left.plot([r["iteration"] for r in training], [r[name] for r in training], label=name)
    left.set(xlabel="iteration", ylabel="cross-entropy, nats", ylim=(0, None))
    left.legend()
    for name, label in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy")):
        right.plot([r["iteration"] for r in evaluation], [100 * r[name] for r in evaluation], "o-", label=label)
    right.set(xlabel="iteration", ylabel="%", xlim=(0, None), ylim=(0, 100))
    right.legend()
    save(figure, Path(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
