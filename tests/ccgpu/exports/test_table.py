"""The table of routes in docs/export.md: which tests stand behind its cells."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs/export.md"
ONNX, PROGRAMS = "ccgpu.exports.test_onnx", "ccgpu.exports.test_programs"
NETWORKS, PACKAGES, COMMAND = "models.test_exports", "models.test_aotinductor", "train.test_export"
FUNCTIONS_IN_ONNX = f"{ONNX}.test_onnx_model_is_the_functions_at_any_size"  # looks at the model's operators, too
WITHOUT_CCGPU = f"{NETWORKS}.test_traced_and_exported_networks_run_without_this_package"
# By route, from left to right: the tests of a cell, "" for an empty one; for a no the test of what happens instead.
TESTS = {
    "torch.onnx.export": (
        FUNCTIONS_IN_ONNX,
        f"{NETWORKS}.test_onnx_of_networks {COMMAND}.test_onnx_model_gives_the_logits_at_any_size",
        FUNCTIONS_IN_ONNX,
        FUNCTIONS_IN_ONNX,
    ),
    "torch.onnx.export(dynamo=False)": (
        FUNCTIONS_IN_ONNX,
        f"{NETWORKS}.test_onnx_of_networks",
        FUNCTIONS_IN_ONNX,
        FUNCTIONS_IN_ONNX,
    ),
    "torch.export": (
        f"{PROGRAMS}.test_exported_program_holds_at_any_size",
        f"{WITHOUT_CCGPU} {COMMAND}.test_torch_program_of_pixels_runs_without_this_package",
        f"{PROGRAMS}.test_exported_program_holds_at_any_size",
        WITHOUT_CCGPU,
    ),
    "torch.jit.trace": (
        f"{PROGRAMS}.test_traced_function_holds_at_any_size",
        WITHOUT_CCGPU,
        f"{PROGRAMS}.test_traced_function_holds_at_any_size",
        WITHOUT_CCGPU,
    ),
    "torch.jit.script": (
        f"{PROGRAMS}.test_functions_in_torchscript_are_refused_by_torch",
        f"{NETWORKS}.test_script_is_refused_with_what_to_use",
        "",
        "",
    ),
    "torch.fx.symbolic_trace": (
        f"{NETWORKS}.test_symbolic_trace_records_the_functions",
        f"{NETWORKS}.test_symbolic_trace_of_ccnet",
        f"{NETWORKS}.test_symbolic_trace_of_attention",
        f"{NETWORKS}.test_symbolic_trace_records_the_functions",
    ),
    "AOTInductor": (
        f"{PACKAGES}.test_package_of_functions_holds_at_any_size",
        f"{PACKAGES}.test_package_of_a_network_with_the_op_holds_at_any_size",
        f"{PACKAGES}.test_package_of_functions_holds_at_any_size",
        f"{PACKAGES}.test_package_of_standard_operators_runs_without_this_package",
    ),
}


def rows() -> dict[str, list[str]]:
    """Return the table's cells by route."""
    table = PAGE.read_text().partition("| route |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[2:]:
        route, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found[re.sub(r"[`\[\]]|\(#.*\)", "", route)] = cells
    return found


def test_every_cell_has_its_test() -> None:
    table = rows()
    assert table.keys() == TESTS.keys()
    for route, cells in table.items():
        assert [bool(cell) for cell in cells] == [bool(names) for names in TESTS[route]], route


@pytest.mark.parametrize(
    "name", sorted({name for cells in TESTS.values() for names in cells for name in names.split()})
)
def test_the_tests_are_there(name: str) -> None:
    module, _, test = name.rpartition(".")
    assert callable(getattr(importlib.import_module(f"tests.{module}"), test))
