"""Print the tables of docs/results.md that are computed from records: `python docs/results_table.py`.

Each folder docs/results/camvid-contexts/NAME-sSEED is one run, with the metrics.jsonl that the command wrote; so is
each folder docs/results/camvid-cpu/NAME, with scales.jsonl, the evaluation with several scales and flipped images. Each
line of docs/results/cost-cpu.jsonl is the cost of one context module; docs/results/cost has other sizes and whole
networks.
Each line of docs/results/far-context/runs.jsonl is one run of `python -m benchmarks.far_context`.
`tests/test_results.py` checks that docs/results.md contains the tables printed here.
"""

import json
import math
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
# Folder name of the runs of `--preset cpu` -> their name in the tables.
CPU_RUNS = {"none": "no context", "rcca-r2": "RCCA, R = 2"}
# Modules of the table and the plot over map sizes -> their names there.
SWEPT = {
    "RCCA R=2": "RCCA, R = 2",
    "non-local, materialised": "non-local, materialised",
    "non-local, sdpa": "non-local, sdpa",
    "PSP": "PSP",
    "ASPP": "ASPP",
}
LEAST_POSITIONS = 4000  # of the maps that a slope is fitted to: on smaller ones what does not grow is most of it
# Rows of the table of whole networks: key of the record, what it is, its unit.
NETWORK_ROWS = (
    ("training_ms", "training step, time", "ms"),
    ("training_gflops", "training step, operations", "GFLOPs"),
    ("saved_mb", "saved for backward", "MB"),
    ("states_mb", "weights, gradients, momentum", "MB"),
    ("prediction_ms", "prediction, time", "ms"),
)
PARTS = ("backbone", "head", "attention", "auxiliary head", "output", "optimiser")
# The far-context variant whose networks start from those of another variant with non-local attention, and that variant.
AFTER, BEFORE = "own-square-after", "own-square"
# Variants and context modules of far-context runs, in the tables' order.
VARIANTS = {
    "one-square": "one square",
    BEFORE: "up to four squares, each disc has its own",
    AFTER: "the same, from the weights of non-local attention",
    "clips": "clips, the square in the other frame",
}
CONTEXTS = {
    "none": "no context",
    "rcca-r1": "RCCA, R = 1",
    "rcca-r2": "RCCA, R = 2",
    "rcca-r3": "RCCA, R = 3",
    "nonlocal": "non-local",
    "psp": "PSP",
    "aspp": "ASPP",
}
FAR = 3  # range of distances, of 16 pixels each, from which on no convolution reaches the square


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
    return iou_table({title: runs for title, runs in found.items() if runs})


def iou_table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return each class's IoU, the mean over each column's evaluations."""
    names = list(next(iter(found.values()))[0]["iou"])
    rows = [f"| class | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        means = [100 * statistics.fmean(run["iou"][name] for run in runs) for runs in found.values()]
        rows.append(f"| {name} | {' | '.join(f'{mean:.1f}' for mean in means)} |")
    return "\n".join(rows)


def cpu_evaluations(name: str) -> list[dict[str, Any]]:
    """Return the last evaluations of a run of `--preset cpu`: as in training, and with scales and flipped images."""
    folder = RESULTS / "camvid-cpu" / name
    return [lines_of(folder / file)[-1] for file in ("metrics.jsonl", "scales.jsonl")]


def cpu_table() -> str:
    """Return the scores of `--preset cpu` on CamVid's test images."""
    scores = ("miou", "pixel_accuracy", "mean_accuracy")
    rows = [
        "| CamVid, test | mIoU % | with scales and flip | global accuracy % | with scales and flip | mean accuracy % |"
        " with scales and flip |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in CPU_RUNS.items():
        found = [f"{100 * run[score]:.1f}" for score in scores for run in cpu_evaluations(name)]
        rows.append(f"| {title} | {' | '.join(found)} |")
    return "\n".join(rows)


def cpu_classes_table() -> str:
    """Return each class's IoU of `--preset cpu` on CamVid's test images, at one scale."""
    return iou_table({title: cpu_evaluations(name)[:1] for name, title in CPU_RUNS.items()})


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


def sweep() -> dict[str, list[dict[str, Any]]]:
    """Return the records of each module over map sizes, from the smallest map to the largest."""
    found: dict[str, list[dict[str, Any]]] = {module: [] for module in SWEPT}
    for record in lines_of(RESULTS / "cost" / "sweep.jsonl"):
        if record["module"] in found:
            found[record["module"]].append(record)
    return {module: sorted(cases, key=positions) for module, cases in found.items()}


def positions(record: dict[str, Any]) -> int:
    """Return the number of positions of a record's map."""
    height, width = record["features"][2:]
    return int(height * width)


def slope(cases: list[dict[str, Any]], key: str) -> float:
    """Return the exponent a of  number = c positions^a, fitted to the logarithms of measured cases alone."""
    fitted = [case for case in cases if not case["predicted"] and positions(case) >= LEAST_POSITIONS]
    x, y = [math.log(positions(case)) for case in fitted], [math.log(case[key]) for case in fitted]
    return statistics.linear_regression(x, y).slope


def sweep_table() -> str:
    """Return the table of peak memory and time over map sizes, with the slopes."""
    modules = sweep()
    rows = [f"| map | positions | {' | '.join(SWEPT.values())} |", "|---" * (len(SWEPT) + 2) + "|"]
    for cases in zip(*modules.values(), strict=True):
        height, width = cases[0]["features"][2:]
        cells = [_cell(case) for case in cases]
        rows.append(f"| {height}x{width} | {height * width:,} | {' | '.join(cells)} |")
    keys = ("peak_mb", "forward_backward_ms", "gflops")
    slopes = [", ".join(f"{slope(cases, key):.2f}" for key in keys) for cases in modules.values()]
    return "\n".join([*rows, f"| slopes |  | {' | '.join(slopes)} |"])


def _cell(case: dict[str, Any]) -> str:
    """Return a case's peak and time, both with a ~ where they are predicted."""
    sign = "~" if case["predicted"] else ""
    return f"{sign}{case['peak_mb']:,.0f} MB, {sign}{case['forward_backward_ms']:,.0f} ms"


def foresight() -> str:
    """Return how far the predictions were from what was measured then, on all maps but the smallest."""
    off: dict[str, list[float]] = {"peak_mb": [], "forward_backward_ms": []}
    for cases in sweep().values():
        for case in cases[1:]:
            for key, ratios in off.items() if not case["predicted"] else ():
                ratios.append(case["foreseen"][key] / case[key])
    memory, times = off.values()
    return (
        f"Of {len(memory)} measured cases memory had been predicted as {min(memory):.2f} to {max(memory):.2f} of what "
        f"it turned out to be, time as {min(times):.2f} to {max(times):.2f}."
    )


def network_table() -> str:
    """Return the table of the parts' shares of whole networks."""
    rows = [f"| network | image | what | all parts | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 4) + "|"]
    for record in lines_of(RESULTS / "cost" / "network.jsonl"):
        height, width = record["image"]
        name = [f"{record['backbone']}, {record['context']}", f"{height}x{width}"]
        for key, what, unit in NETWORK_ROWS:
            if key not in record:  # the step was not run
                continue
            total = sum(record[key].values())
            shares = [f"{100 * record[key][part] / total:.1f} %" if part in record[key] else "" for part in PARTS]
            rows.append(f"| {' | '.join([*name, what, f'{total:,.0f} {unit}', *shares])} |")
            name = ["", ""]
        for kind in ("training", "prediction"):
            peaks = record.get(f"{kind}_peak_mb", {})  # they do not add up
            if peaks:
                cells = [f"{peaks[part]:,.0f} MB" if part in peaks else "" for part in PARTS]
                rows.append(f"| {' | '.join(['', '', f'{kind}, peak', f'{max(peaks.values()):,.0f} MB', *cells])} |")
    return "\n".join(rows)


def half_precision_table() -> str:
    """Return the table of the share of pixels that keep their class in half precision."""
    rows = ["| network | images | bfloat16 % | float16 % |", "|---|---|---|---|"]
    (line,) = lines_of(RESULTS / "half-precision-demo.jsonl")  # its "pictures" are images; records keep their spelling
    shares = [f"{100 * line['kept'][amp]:.2f}" for amp in ("bf16", "fp16")]
    rows.append(f"| {' | '.join(['`make demo`, synthetic val', str(line['pictures']), *shares])} |")
    return "\n".join(rows)


def far_context_runs() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the runs of each variant and context module on the far-context dataset, in the tables' order.

    Of a variant's runs those count that have the settings of its last one in the record.
    """
    lines = lines_of(RESULTS / "far-context" / "runs.jsonl")
    settings = {run["variant"]: run["settings"] for run in lines}
    lines = [run for run in lines if run["settings"] == settings[run["variant"]]]
    found = {
        (variant, context): [run for run in lines if (run["variant"], run["context"]) == (variant, context)]
        for variant in VARIANTS
        for context in CONTEXTS
    }
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in found.items() if runs}


def far_accuracy(run: dict[str, Any], offset: int) -> float:
    """Return the accuracy on far discs in a range of the distance to the criss-cross: 0 on it, -1 the farthest."""
    return sum(run["right"][offset][FAR:]) / sum(run["pixels"][offset][FAR:])


def far_context_table() -> str:
    """Return the table of the context modules on each variant of the far-context dataset."""
    rows = [
        "| context | seeds | accuracy % | far, on the criss-cross % | far, off it % | finds the square | step ms |"
        " saved MB | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    runs, named = far_context_runs(), ""
    for (variant, context), found in runs.items():
        if variant != named:
            rows.append(f"| **{VARIANTS[variant]}** |" + "  |" * 8)
            named = variant
        scores = [spread([run["accuracy"] for run in found])]
        scores += [f"{100 * statistics.fmean(far_accuracy(run, offset) for run in found):.1f}" for offset in (0, -1)]
        maps = [run["attention"] for run in found if run["attention"] is not None]
        shown = f"{statistics.fmean(100 * one['found'] / one['images'] for one in maps):.0f} %" if maps else ""
        cost = [f"{statistics.median(run['step_cpu_ms'] for run in found):.0f}"]
        cost += [f"{statistics.median(run[key] for run in found):.1f}" for key in ("saved_mb", "peak_mb")]
        rows.append(f"| {' | '.join([CONTEXTS[context], str(len(found)), *scores, shown, *cost])} |")
    return "\n".join(rows)


def of_squares_table() -> str:
    """Return the table of the accuracy by the number of squares of an image, where each disc has its own square."""
    runs = {
        CONTEXTS[context] + (", from non-local attention" if variant == AFTER else ""): found
        for (variant, context), found in far_context_runs().items()
        if variant in (BEFORE, AFTER)
    }
    numbers = sorted({number for found in runs.values() for run in found for number in run["of_squares"]})
    heads = [f"{number} square{'' if number == '1' else 's'} %" for number in numbers]
    rows = [f"| context | seeds | {' | '.join(heads)} |", "|---" * (len(numbers) + 2) + "|"]
    for title, found in runs.items():
        shares = [spread([run["of_squares"][n][1] / run["of_squares"][n][0] for run in found]) for n in numbers]
        rows.append(f"| {' | '.join([title, str(len(found)), *shares])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    tables = [cpu_table, cpu_classes_table, contexts_table, classes_table, cost_table, sweep_table, foresight]
    tables += [network_table, half_precision_table, far_context_table, of_squares_table]
    print(*(table() for table in tables), sep="\n\n")
