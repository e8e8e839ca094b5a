"""docs/results.md says what the records under docs/results say."""

import importlib.util
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).resolve().parents[1] / "docs"


def results_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_table", DOCS / "results_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_costs_is_that_of_the_records() -> None:
    assert results_table().cost_table() in (DOCS / "results.md").read_text()
