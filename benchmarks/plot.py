"""Plot recorded results and print them as a table: `python -m benchmarks.plot benchmarks/results/cca_X.csv`.

Writes cca_X.svg beside the CSV: time and memory against the size of the map. Prints a table of one shape in Markdown.
If a measurement has several rows, the last one counts; of several layouts, the fastest.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import results_file
from benchmarks.cases import STEPS

Row = Mapping[str, str]
# The colours of Okabe and Ito, told apart with any colour vision, and markers for print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = "osD^vP*X"
OURS = "ccgpu"


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the last row of every measurement; rows of older files, which name no layout, are left out.

    An implementation that could not run has one row without a step; it and rows with a step replace each other.
    """
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row.get("layout"):
            measured = found.setdefault(tuple(row[n] for n in ("name", "layout", "shape", "D", "C", "dtype")), {})
            if not row["pass"]:
                measured.clear()
            measured.pop("", None)
            measured[row["pass"]] = row
    return [row for measured in found.values() for row in measured.values()]


def fastest(rows: Iterable[Row]) -> dict[str, Row]:
    """Return for every implementation its row with the least time; rows without a time are left out."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.get("median_ms"):
            name = row["name"]
            if name not in best or float(row["median_ms"]) < float(best[name]["median_ms"]):
                best[name] = row
    return best


def positions(shape: str) -> int:
    """Return the positions of a map, from a record's shape: 8x97x97 has 9409 an image."""
    return math.prod(int(n) for n in shape.split("x")[1:])


def table(rows: Sequence[Row], shape: str, dtype: str) -> str:
    """Return a Markdown table: times of each step, also as multiples of ours, temporaries, share of a copy's speed."""
    here = [r for r in latest(rows) if r["shape"] == shape and r["dtype"] == dtype]
    best = {step: fastest(r for r in here if r["pass"] == step) for step in STEPS}
    if not any(best.values()):
        return f"No times for {shape} in {dtype}."
    names = list(dict.fromkeys(row["name"] for row in here if not row["pass"].startswith("host")))
    reasons = {row["name"]: row["reason"] for row in here if row.get("reason")}
    mine = {
        step: min((float(r["median_ms"]) for n, r in best[step].items() if is_ours(n)), default=0) for step in STEPS
    }
    lines = [
        f"{here[0]['device']}, {shape}, D = {here[0]['D']}, C = {here[0]['C']}, {dtype}; ms (times ours)",
        "",
        "| | forward | backward | both | temporaries MB, forward | backward | share of a copy's speed, forward "
        "| backward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        label = f"**{name}**" if is_ours(name) else name
        if not any(name in best[step] for step in STEPS):
            lines.append(f"| {label} | {reasons.get(name, '')} | | | | | | |")
            continue
        cells = [label]
        for step in STEPS:
            row = best[step].get(name)
            times = f" ({float(row['median_ms']) / mine[step]:.2f}x)" if row and mine[step] else ""
            cells.append(f"{float(row['median_ms']):.3f}{times}" if row else reasons.get(name, ""))
        for column in ("temporaries_mb", "share_of_copy"):
            for step in STEPS[:2]:
                row = best[step].get(name)
                cells.append(row[column] if row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_ours(name: str) -> bool:
    """Tell whether a row's name is one of this library's backends."""
    return name.split()[0] == OURS


def plot(rows: Sequence[Row], target: Path, dtype: str, batch: int = 1, step: str = "forward+backward") -> int:
    """Draw time and temporaries of two-dimensional maps against their positions; return the number of lines drawn."""
    # Imported here, because the table does not need it.
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    wanted = [
        r
        for r in latest(rows)
        if r["dtype"] == dtype and r["pass"] == step and r["shape"].split("x")[0] == str(batch) and len(_axes(r)) == 2
    ]
    shapes = sorted({r["shape"] for r in wanted}, key=positions)
    best = {shape: fastest(r for r in wanted if r["shape"] == shape) for shape in shapes}
    names = sorted({name for found in best.values() for name in found}, key=lambda n: (not is_ours(n), n))
    with plt.rc_context({"svg.hashsalt": "ccgpu", "svg.fonttype": "none", "font.size": 9}):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for panel, column, label in zip(
            panels, ("median_ms", "temporaries_mb"), (f"{step}, ms", "temporaries, MB"), strict=True
        ):
            for number, name in enumerate(names):
                points = [(positions(s), float(best[s][name][column])) for s in shapes if name in best[s]]
                panel.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    linewidth=2.2 if is_ours(name) else 1.2,
                    label=name,
                )
            panel.set(xscale="log", yscale="log", xlabel="positions of the map", ylabel=label)
            panel.set_xticks([positions(s) for s in shapes], ["x".join(s.split("x")[1:]) for s in shapes])
            panel.minorticks_off()
            panel.grid(alpha=0.3, linewidth=0.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        if wanted:
            figure.suptitle(f"{wanted[0]['device']}, B = {batch}, D = {wanted[0]['D']}, C = {wanted[0]['C']}, {dtype}")
        # Without a date in the file, the same rows give the same file.
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=150)
        plt.close(figure)
    return len(names)


def _axes(row: Row) -> list[str]:
    return row["shape"].split("x")[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and print; return the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("csv", type=Path, nargs="*", help="by default every file in benchmarks/results")
    flags.add_argument("--dtype", default="bfloat16")
    flags.add_argument("--batch", type=int, default=1, help="of the plot")
    flags.add_argument("--shape", default="8x97x97", help="of the table")
    flags.add_argument("--format", choices=("svg", "png"), default="svg")
    arguments = flags.parse_args(argv)
    missing = [str(path) for path in arguments.csv if not path.exists()]
    if missing:
        flags.error(f"csv must name files that exist, got {', '.join(missing)}; measure with python -m benchmarks.cca")
    plotted = 0
    for path in arguments.csv or sorted(results_file.FOLDER.glob("cca_*.csv")):
        rows = results_file.read(path)
        here = [r for r in latest(rows) if r["dtype"] == arguments.dtype]
        if not here:
            print(f"{path.name}: no rows in {arguments.dtype}")
            continue
        target = path.with_suffix(f".{arguments.format}")
        lines = plot(rows, target, arguments.dtype, arguments.batch)
        plotted += lines
        print(f"{target.name}: {lines} lines\n\n{table(rows, arguments.shape, arguments.dtype)}\n")
    return 0 if plotted else 1


if __name__ == "__main__":
    sys.exit(main())
