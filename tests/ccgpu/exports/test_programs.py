"""torch.export and torch.jit.trace: programs that run at any size, and where this package is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ccgpu
from tests.ccgpu.exports.cases import (
    ALL,
    FUNCTIONS,
    TRACED,
    Call,
    check,
    draw,
    dynamic_shapes,
    other_sizes,
    run_without_ccgpu,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
slow = pytest.mark.slow


def exported(name: str, axes: int, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    traced = draw(name, 2, TRACED[axes], dtype)
    return torch.export.export(Call(name), traced, dynamic_shapes=dynamic_shapes(name, traced))


def namespaces(program: torch.export.ExportedProgram) -> set[str]:
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_traced_function_holds_at_any_size(name: str, axes: int) -> None:
    with ccgpu.decomposed():
        traced = torch.jit.trace(Call(name), draw(name, 2, TRACED[axes]), check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert {kind.partition("::")[0] for kind in kinds} <= {"aten", "prim"}
    for batch, sizes in other_sizes(TRACED[axes]):
        inputs = draw(name, batch, sizes)
        check(traced(*inputs), name, inputs)


def test_trace_of_the_op_runs_the_kernels() -> None:
    traced = torch.jit.trace(Call("cca"), draw("cca", 2, (5, 7)), check_trace=False)
    assert "ccgpu::cca_forward" in {node.kind() for node in traced.inlined_graph.nodes()}
    inputs = draw("cca", 1, (6, 9))
    check(traced(*inputs), "cca", inputs)


def test_tracing_does_not_warn_of_the_checks(recwarn: pytest.WarningsRecorder) -> None:
    for name in FUNCTIONS:
        torch.jit.trace(Call(name), draw(name, 2, (5, 7)), check_trace=False)
    assert not [warning for warning in recwarn if issubclass(warning.category, torch.jit.TracerWarning)]


def test_tracing_keeps_the_checks() -> None:
    q, k, v = draw("cca", 1, (3, 4))
    with pytest.raises(ValueError, match="cca: k must have q's shape"):
        torch.jit.trace(Call("cca"), (q, k[..., 1:], v))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param(name, axes, marks=() if (name, axes) in {("cca with lse", 2), ("aggregate", 2)} else slow)
        for name in ("cca with lse", "affinity", "aggregate")
        for axes in TRACED
    ],
)
def test_exported_program_holds_at_any_size(name: str, axes: int) -> None:
    with ccgpu.decomposed():
        program = exported(name, axes)
    assert namespaces(program) == {"aten"}
    run = program.module()
    for batch, sizes in other_sizes(TRACED[axes]):
        inputs = draw(name, batch, sizes)
        # torch.export takes dynamic sizes to be 2 or more, and so the H + W - 1 weights to be 3 or more.
        if name == "aggregate" and axes > 1 and inputs[0].shape[1] <= axes:
            with pytest.raises(AssertionError, match="Guard failed: inputs_0"):
                run(*inputs)
        else:
            check(run(*inputs), name, inputs)


def test_decompositions_of_an_exported_program() -> None:
    program = exported(ALL, 2)
    assert "ccgpu" in namespaces(program)
    table = {**torch.export.default_decompositions(), **ccgpu.decompositions()}
    decomposed = program.run_decompositions(table)
    assert namespaces(decomposed) == {"aten"}
    inputs = draw(ALL, 1, (6, 9))
    check(decomposed.module()(*inputs), ALL, inputs)
    check(program.module()(*inputs), ALL, inputs)


def test_functions_in_torchscript_are_refused_by_torch() -> None:
    """Its compiler knows no keyword-only arguments; modules of this package say what to do instead."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ccgpu.cca(q, k, v)

    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(attend)


@slow
def test_saved_programs_run_without_this_package(tmp_path: Path) -> None:
    names = ("cca with lse", "aggregate")
    with ccgpu.decomposed():
        for name in names:
            torch.export.save(exported(name, 2), tmp_path / f"{name}.pt2")
            torch.jit.trace(Call(name), draw(name, 2, TRACED[2]), check_trace=False).save(tmp_path / f"{name}.pt")
    for name in names:
        for index, (batch, sizes) in enumerate(other_sizes(TRACED[2])[:2]):
            inputs = draw(name, batch, sizes)
            torch.save((inputs, Call(name)(*inputs)), tmp_path / f"{name} {index}.data")
    run_without_ccgpu(
        f"""
import torch
for name in {names}:
    for run in (torch.export.load(f"{{name}}.pt2").module(), torch.jit.load(f"{{name}}.pt")):
        for index in range(2):
            inputs, expected = torch.load(f"{{name}} {{index}}.data")
            torch.testing.assert_close(run(*inputs), expected, rtol=1e-4, atol=1e-4)
""",
        tmp_path,
    )
