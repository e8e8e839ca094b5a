"""Draw docs/results/cost/sweep.jsonl, cost over map size: `python -m docs.plot_cost` (needs matplotlib)."""

from typing import Any

from docs.drawing import plt, save
from docs.results_table import RESULTS, SWEPT, positions, slope, sweep

TARGET = RESULTS / "cost" / "sweep.svg"
KEYS = {"peak_mb": "peak of forward and backward, MB", "forward_backward_ms": "forward and backward, ms"}


def main() -> None:
    """Draw memory and time of each module over the number of positions; hollow and dashed where predicted."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for ax, (key, title) in zip(axes, KEYS.items(), strict=True):
        for place, (module, name) in enumerate(SWEPT.items()):
            cases = sweep()[module]
            measured = [case for case in cases if key not in case["predicted"]]
            predicted = [case for case in cases if key in case["predicted"]]
            colour, label = f"C{place}", f"{name}: slope {slope(cases, key):.2f}"
            ax.plot(*line(measured, key), "o-", color=colour, label=label, markersize=4, linewidth=1.2)
            if predicted:
                ax.plot(*line([*measured[-1:], *predicted], key), "--", color=colour, linewidth=1)
                ax.plot(*line(predicted, key), "o", color=colour, markerfacecolor="white", markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="positions", ylabel=title)
        ax.grid(alpha=0.4)
        ax.legend(fontsize=8)
    axes[0].set_title("hollow and dashed: predicted; slopes of what was measured", fontsize=9)
    save(figure, TARGET)


def line(cases: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the positions of cases and one of their numbers."""
    return [positions(case) for case in cases], [case[key] for case in cases]


if __name__ == "__main__":
    main()
