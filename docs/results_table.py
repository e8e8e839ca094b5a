"""Print the tables of docs/results.md that are computed from records: `python docs/results_table.py`.

Each folder docs/results/camvid-contexts/NAME-sSEED is one run, with the metrics.jsonl that the command wrote. Each line
of docs/results/cost-cpu.jsonl is the cost of one context module. `tests/test_results.py` checks that docs/results.md
contains the tables printed here.
"""

import json
import statistics
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# Folder name of the runs -> their name in the tables, and their module's name in cost-cpu.jsonl.
CONFIGURATIONS = {
    "none": ("no context", None),
    "rcca-r1": ("RCCA, R = 1", "RCCA R=1"),
    "rcca-r2": ("RCCA, R = 2", "RCCA R=2"),
    "rcca-r2-closed": ("RCCA, R = 2, gamma from 0", "RCCA R=2"),
    "rcca-r2-ccl": ("RCCA, R = 2, with the category consistent loss", "RCCA R=2"),
    "nonlocal": ("non-local", "non-local, sdpa"),
    "rcca-t5": ("3D RCCA, R = 3, clips of 5", None),  # cost-cpu.jsonl holds images alone, no clips
}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def runs_of(name: str) -> list[list[dict[str, Any]]]:
    """Return the records of the runs of a configuration, one list for each seed."""
    folders = sorted((RESULTS / "camvid-contexts").glob(f"{name}-s[0-9]"))
    return [lines_of(folder / "metrics.jsonl") for folder in folders]


def last_evaluations(name: str) -> list[dict[str, Any]]:
    """Return the last evaluation of each seed's run."""
    return [run[-1] for run in runs_of(name)]


def spread(values: list[float]) -> str:
    """Return "mean (minimum to maximum)" in percent, or the mean alone where there is one value."""
    percents = [100 * value for value in values]
    mean = f"{statistics.fmean(percents):.1f}"
    return mean if len(percents) == 1 else f"{mean} ({min(percents):.1f} to {max(percents):.1f})"


def contexts_table() -> str:
    """Return the table of the context modules on CamVid's test images."""
    costs = {line["module"]: line for line in lines_of(RESULTS / "cost-cpu.jsonl")}
    rows = [
        "| context | seeds | mIoU % | global accuracy % | mean accuracy % | parameters | GFLOPs | saved MB | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (title, module) in CONFIGURATIONS.items():
        runs = last_evaluations(name)
        if not runs:
            continue
        scores = [spread([run[score] for run in runs]) for score in ("miou", "pixel_accuracy", "mean_accuracy")]
        cost = ["", "", "", ""]
        if module is not None:
            line = costs[module]
            cost = [f"{line['parameters']:,}", *(f"{line[key]:.1f}" for key in ("gflops", "saved_mb", "peak_mb"))]
        rows.append(f"| {' | '.join([title, str(len(runs)), *scores, *cost])} |")
    return "\n".join(rows)


def classes_table() -> str:
    """Return each class's IoU on CamVid's test images, the mean over the seeds."""
    found = {title: last_evaluations(name) for name, (title, _) in CONFIGURATIONS.items()}
    found = {title: runs for title, runs in found.items() if runs}
    names = list(next(iter(found.values()))[0]["iou"])
    rows = [f"| class | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        means = [100 * statistics.fmean(run["iou"][name] for run in runs) for runs in found.values()]
        rows.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(rows)


def cost_table() -> str:
    """Return the table of each module's cost at the paper's size."""
    rows = [
        "| module | parameters | GFLOPs | saved MB | peak MB | forward ms | forward + backward ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines_of(RESULTS / "cost-cpu.jsonl"):
        numbers = [f"{line['parameters']:,}"]
        numbers += [f"{line[key]:.1f}" for key in ("gflops", "saved_mb", "peak_mb")]
        numbers += [f"{line[key]:,.0f}" for key in ("forward_ms", "forward_backward_ms")]
        rows.append(f"| {' | '.join([line['module'], *numbers])} |")
    return "\n".join(rows)


def half_precision_table() -> str:
    """Return the table of the share of pixels that keep their class in half precision."""
    rows = ["| network | images | bfloat16 % | float16 % |", "|---|---|---|---|"]
    (line,) = lines_of(RESULTS / "half-precision-demo.jsonl")  # its "pictures" are images; records keep their spelling
    shares = [f"{100 * line['kept'][amp]:.2f}" for amp in ("bf16", "fp16")]
    rows.append(f"| {' | '.join(['`make demo`, synthetic val', str(line['pictures']), *shares])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(contexts_table(), classes_table(), cost_table(), half_precision_table(), sep="\n\n")
