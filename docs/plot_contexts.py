"""Draw the runs of docs/results/camvid-contexts: `python -m docs.plot_contexts` (needs matplotlib)."""

import statistics

from docs.drawing import plt, save
from docs.results_table import CONFIGURATIONS, RESULTS, last_evaluations, runs_of

TARGET = RESULTS / "camvid-contexts" / "curves.svg"


def main() -> None:
    """Draw the main head's training loss (mean over the seeds) and each seed's mIoU on the test images."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    titles = []
    for name, (title, _) in CONFIGURATIONS.items():
        evaluations = last_evaluations(name)
        if not evaluations:
            continue
        runs = [[record for record in run if record["kind"] == "training"] for run in runs_of(name)]
        losses = [statistics.fmean(step["main"] for step in steps) for steps in zip(*runs, strict=True)]
        left.plot([r["iteration"] for r in runs[0]], losses, label=title, linewidth=1)
        place = len(titles)
        right.plot([100 * run["miou"] for run in evaluations], [place] * len(evaluations), "o", color=f"C{place}")
        titles.append(title)
    left.set(xlabel="iteration", ylabel="cross-entropy of the main head, nats", ylim=(0, None))
    left.set_title("colours as on the right", fontsize=9)
    right.set(xlabel="mIoU %, test", yticks=range(len(titles)), yticklabels=titles)
    right.invert_yaxis()
    right.grid(axis="x", alpha=0.4)
    save(figure, TARGET)


if __name__ == "__main__":
    main()
