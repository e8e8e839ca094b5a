"""The tables of the CPU's suite, in Markdown: `python -m benchmarks.cpu_tables`, and into the pages with --write.

They are of the newest whole run of `python -m benchmarks.cca --suite --record` in benchmarks/results/cca_cpu.csv.
--write puts each of them into the pages that have it, between the comments `<!-- measured: NAME -->` and
`<!-- end of NAME -->`. `tests/benchmarks/test_cpu_tables.py` checks that the pages hold what is printed here.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import results_file
from benchmarks.candidates import BATCHED, EAGER_BMM, EAGER_EINSUM, OURS
from benchmarks.cases import CPU_DTYPES, LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
RECORD = results_file.FOLDER / "cca_cpu.csv"
STEPS = ("forward", "forward+backward")
MEMORY_ORDER = LAYOUTS[::-1]  # channels_last first: what the kernels use in place
DTYPES = (*CPU_DTYPES, "float64")
LETTERS = {BATCHED: "b", EAGER_EINSUM: "e", EAGER_BMM: "a"}
SHOWN_FIRST = ("1x16x16", "1x32x32", "1x97x97", "1x256x256", "1x1x1000")  # the maps of README's table
COMPILE = "compile"  # what the records call the compilation of a dtype's kernels, beside the steps
HOT = ("1x97x97", "float32")
NONE = "-"
Row = Mapping[str, str]


def is_whole(row: Row) -> bool:
    """Tell whether a row is of a run of the suite that left nothing out."""
    words = shlex.split(row["command"] or "")
    return "--suite" in words and not {"--dtype", "--only", "--without"} & {*words}


class Run:
    """A run of the suite: its rows by shape, dtype, layout, name and step."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.found = {(r.get("shape", ""), r["dtype"], r.get("layout", ""), r["name"], r["pass"]): r for r in rows}

    def shapes(self, dtype: str) -> list[str]:
        """Return the shapes that were measured in a dtype, from few positions to many."""
        shapes = {row["shape"] for row in self.rows if row["dtype"] == dtype and row.get("layout")}
        return sorted(shapes, key=lambda shape: (min(_sizes(shape)) == 1, len(_sizes(shape)), _sizes(shape)))

    def ms(self, shape: str, dtype: str, layout: str, name: str, step: str) -> float | None:
        """Return a median in ms, or None where there is none."""
        row = self.found.get((shape, dtype, layout, name, step))
        return float(row["median_ms"]) if row and row.get("median_ms") else None

    def best_peer(self, shape: str, dtype: str, layout: str, step: str) -> tuple[float, str] | None:
        """Return the least median of the peers in this dtype and layout, and whose it is; None without any."""
        names = {row["name"] for row in self.rows if not row["name"].startswith(OURS)}
        times = [(ms, name) for name in sorted(names) if (ms := self.ms(shape, dtype, layout, name, step)) is not None]
        return min(times, default=None)

    def share(self, shape: str, dtype: str, layout: str, step: str) -> float | None:
        """Return the time of `ccgpu.cca` divided by the best peer's, or None where either is missing."""
        ours, best = self.ms(shape, dtype, layout, OURS, step), self.best_peer(shape, dtype, layout, step)
        return None if ours is None or best is None else ours / best[0]

    def floor(self, shape: str, dtype: str, step: str) -> float | None:
        """Return the floor in ms that the machine's rates of copies and of large products give."""
        for (*case, _, _, measured), row in self.found.items():
            if case == [shape, dtype] and measured == step and row.get("floor_ms"):
                return float(row["floor_ms"])
        return None


def newest(rows: Sequence[Row]) -> Run | None:
    """Return the newest whole run of the suite, or None where there is none.

    The last rows of a run are those of the compilation, so a run without them was ended before.
    """
    whole = [row for row in rows if is_whole(row)]
    last = max((row["date"] for row in whole if row["pass"] == COMPILE), default=None)
    return None if last is None else Run([row for row in whole if row["date"] == last])


def _sizes(shape: str) -> list[int]:
    return [int(n) for n in shape.split("x")[1:]]


def _map(shape: str) -> str:
    return shape.partition("x")[2]


def number(value: float | None) -> str:
    """Return a time in ms with three digits."""
    if value is None:
        return NONE
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def _pair(cells: Iterable[str]) -> str:
    return " / ".join(cells)


def _ratio(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def peers_table(run: Run, dtype: str) -> str:
    """Return the table of `ccgpu.cca` beside the best peer in a dtype."""
    heads = [dtype, "floor", *(f"{layout}: {x}" for layout in MEMORY_ORDER for x in ("ccgpu", "best peer", "share"))]
    rows = []
    for shape in run.shapes(dtype):
        cells = [_map(shape), _pair(number(run.floor(shape, dtype, step)) for step in STEPS)]
        for layout in MEMORY_ORDER:
            case = (shape, dtype, layout)
            cells.append(_pair(number(run.ms(*case, OURS, step)) for step in STEPS))
            cells.append(_pair(_named(run.best_peer(*case, step)) for step in STEPS))
            cells.append(_pair(_ratio(run.share(*case, step)) for step in STEPS))
        rows.append(cells)
    return _table(heads, rows)


def _named(best: tuple[float, str] | None) -> str:
    if best is None:
        return NONE
    ms, name = best
    eager, _, compiled = name.partition(", ")
    return f"{number(ms)} {LETTERS.get(eager, eager)}{'*' if compiled else ''}"


def peers_block(run: Run) -> str:
    """Return the tables of `ccgpu.cca` beside the best peer, for each dtype, and what their letters mean."""
    letters = ", ".join(f"{letter}: {name}" for name, letter in LETTERS.items())
    note = (
        f"Milliseconds, forward / forward + backward. {letters}; *: compiled, which was measured in the first case "
        f"only. {NONE}: every peer took more than ten times as long as ccgpu."
    )
    tables = [peers_table(run, dtype) for dtype in DTYPES if run.shapes(dtype)]
    return "\n\n".join([note, *tables])


def choice_block(run: Run) -> str:
    """Return the table of the time of `numba_cpu` divided by that of `cpu`."""
    columns = [(dtype, layout) for dtype in DTYPES if run.shapes(dtype) for layout in MEMORY_ORDER]
    shapes = dict.fromkeys(shape for dtype, _ in columns for shape in run.shapes(dtype))

    def ratio(case: tuple[str, str, str], step: str) -> float | None:
        kernels, products = (run.ms(*case, f"{OURS} {name}", step) for name in ("numba_cpu", "cpu"))
        return None if kernels is None or products is None else kernels / products

    rows = [
        [_map(shape), *(_pair(_ratio(ratio((shape, *column), step)) for step in STEPS) for column in columns)]
        for shape in shapes
    ]
    return _table(["map", *(", ".join(column) for column in columns)], rows)


def compile_block(run: Run) -> str:
    """Return the seconds that the kernels of each dtype take to compile."""
    times = {r["dtype"]: float(r["median_ms"]) / 1e3 for r in run.rows if r["pass"] == COMPILE}
    return _table(["kernels of", *times], [["seconds", *(f"{seconds:.1f}" for seconds in times.values())]])


def shares_block(run: Run) -> str:
    """Return README's table: the share of the best peer's time, for some maps."""
    heads = ["time; fastest in plain torch = 1", *(_map(shape) for shape in SHOWN_FIRST)]
    rows = []
    for dtype in CPU_DTYPES:
        for layout in MEMORY_ORDER:
            cases = [(shape, dtype, layout) for shape in SHOWN_FIRST]
            cells = [_pair(_ratio(run.share(*case, step)) for step in STEPS) for case in cases]
            rows.append([f"{dtype}, {layout}", *cells])
    return _table(heads, rows)


def formulations_block(run: Run) -> str:
    """Return the table of all formulations at 97x97 in float32, relative to the authors' on NCHW tensors."""
    base = [run.ms(*HOT, "NCHW", EAGER_BMM, step) for step in STEPS]
    rows = []
    for name in dict.fromkeys(row["name"] for row in run.rows):
        for layout in MEMORY_ORDER:
            times = [run.ms(*HOT, layout, name, step) for step in STEPS]
            ratios = [f"{ms / unit:.2f}" for ms, unit in zip(times, base, strict=True) if ms and unit]
            if len(ratios) == len(STEPS):
                found = [run.found[(*HOT, layout, name, step)] for step in STEPS]
                cells = [f"**{x}**" if name == OURS else x for x in (f"{name}, {layout}", *ratios)]
                rows.append([*cells, *(f"{float(row['temporaries_mb']):.1f}" for row in found)])
    return _table(["", *STEPS, *(f"temporaries MB, {step}" for step in STEPS)], rows)


BLOCKS: dict[str, Callable[[Run], str]] = {
    "peers": peers_block,
    "choice": choice_block,
    "compilation": compile_block,
    "shares": shares_block,
    "formulations": formulations_block,
}
PAGES = ("README.md", "docs/backends.md", "docs/results.md")
MARKED = re.compile(r"(<!-- measured: (\w+) -->\n\n)(.*?)(\n\n<!-- end of \2 -->)", re.DOTALL)


def report(rows: Sequence[Row]) -> str:
    """Return the tables of a run's rows, also of one that left something out."""
    run = Run(rows)
    return "\n\n".join([peers_block(run), choice_block(run)])


def source(run: Run, page: Path) -> str:
    """Return the sentence that names a run: when, where, of what, and how to repeat it, with a link to its record."""
    row = run.rows[0]
    link = Path(*[".."] * (len(page.relative_to(ROOT).parts) - 1), RECORD.relative_to(ROOT)).as_posix()
    date, _, time = row["date"].partition("T")
    return (
        f"One run of `{row['command']}` on {date}, {time[:5]} UTC: {row['device']}, torch {row['torch']}, commit "
        f"{row['commit'][:7]} ([record]({link}))."
    )


def written(text: str, run: Run, page: Path) -> str:
    """Return a page's text with the tables of a run between its comments."""

    def fresh(found: re.Match[str]) -> str:
        content = f"{BLOCKS[found[2]](run)}\n\n{source(run, page)}"
        return f"{found[1]}{content}{found[4]}"

    return MARKED.sub(fresh, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into the pages; return the exit status."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--write", action="store_true", help=f"write {', '.join(PAGES)}")
    arguments = flags.parse_args(argv)
    run = newest(results_file.read(RECORD))
    if run is None:
        print(f"{RECORD.name} has no whole run of the suite; measure with python -m benchmarks.cca --suite --record")
        return 1
    for name in PAGES if arguments.write else ():
        page = ROOT / name
        page.write_text(written(page.read_text(encoding="utf-8"), run, page), encoding="utf-8")
    if not arguments.write:
        print("\n\n".join(block(run) for block in BLOCKS.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
