"""Print the table of docs/results.md that comes from records of a command: `python docs/results_table.py`.

The cost of each module is a line of docs/results/cost-cpu.jsonl; `tests/test_results.py` holds docs/results.md to
what this prints.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cost_table() -> str:
    """Return what the modules cost at the paper's size, beside the paper's numbers."""
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


if __name__ == "__main__":
    print(cost_table())
