"""docs/results.md says what the records under docs/results say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


def results_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_table", DOCS / "results_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = [
    *("cpu_table", "cpu_classes_table"),
    *("contexts_table", "classes_table", "cost_table", "sweep_table", "foresight", "network_table"),
    *("half_precision_table", "far_context_table", "of_squares_table"),
]


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_those_of_the_records(table: str) -> None:
    assert getattr(results_table(), table)() in (DOCS / "results.md").read_text()


def test_spread_is_the_mean_and_the_ends() -> None:
    spread = results_table().spread
    assert spread([0.5]) == "50.0"
    assert spread([0.5, 0.6, 0.4]) == "50.0 (40.0 to 60.0)"


def test_slope_is_the_exponent_of_the_measured_cases_on_large_maps() -> None:
    def case(side: int, peak: float, predicted: list[str]) -> dict[str, object]:
        return {"features": [1, 8, side, side], "peak_mb": peak, "predicted": predicted}

    cases = [
        case(10, 9e9, []),
        *(case(side, 3.0 * side**3, []) for side in (80, 100, 150)),
        case(500, 1.0, ["peak_mb"]),
    ]
    assert results_table().slope(cases, "peak_mb") == pytest.approx(1.5)
