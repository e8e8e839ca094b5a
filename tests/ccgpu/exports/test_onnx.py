"""`torch.onnx.export` of the public functions, by both exporters, without any argument for this package."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccgpu
from tests.ccgpu.exports.cases import FUNCTIONS, TRACED, Call, check, draw, dynamic_axes, other_sizes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Run = Callable[..., list[Tensor]]


def session(model: Any) -> Run:
    """Return a function that runs a model in onnxruntime, after a look at its operators."""
    assert {entry.domain for entry in model.opset_import} == {""}
    assert model.opset_import[0].version >= 18
    assert not model.functions
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in runtime.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in runtime.run(None, arrays)]

    return run


def by_torch_export(module: nn.Module, inputs: Sequence[Tensor], axes: list[list[int]], **options: Any) -> Run:
    """Export with `dynamo=True`."""
    shapes = tuple(dict.fromkeys(of_input, torch.export.Dim.DYNAMIC) for of_input in axes)
    if isinstance(module, Call):  # whose inputs are one argument, *inputs
        shapes = (shapes,)  # type: ignore[assignment]
    program = torch.onnx.export(module, tuple(inputs), dynamo=True, verbose=False, dynamic_shapes=shapes, **options)
    return session(program.model_proto)


def by_torchscript(module: nn.Module, inputs: Sequence[Tensor], axes: list[list[int]], **options: Any) -> Run:
    """Export with `dynamo=False`."""
    names = [f"x{index}" for index in range(len(inputs))]
    file = io.BytesIO()
    torch.onnx.export(
        module,
        tuple(inputs),
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes=dict(zip(names, axes, strict=True)),
        **({"opset_version": 18} | options),  # the default of this exporter is 17 before torch 2.9
    )
    return session(onnx.load_from_string(file.getvalue()))


EXPORTERS = [by_torch_export, by_torchscript]
slow = pytest.mark.slow


def every_case() -> list[Any]:
    """Return exporter, function, number of axes and dtype; those of the slow exporter are few unless slow tests run."""
    few = {("cca with lse", 2), ("affinity", 2), ("aggregate", 3)}
    cases = []
    for exporter in EXPORTERS:
        for name in FUNCTIONS:
            for axes in TRACED:
                for dtype in (torch.float32, torch.float16, torch.float64):
                    quick = exporter is by_torchscript or ((name, axes) in few and dtype == torch.float32)
                    quick = quick and (dtype == torch.float32 or axes == 2)
                    cases.append(pytest.param(exporter, name, axes, dtype, marks=() if quick else slow))
    return cases


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("exporter", "name", "axes", "dtype"), every_case())
def test_onnx_model_is_the_function_at_any_size(exporter: Any, name: str, axes: int, dtype: torch.dtype) -> None:
    sizes = TRACED[axes]
    traced = draw(name, 2, sizes, dtype)
    run = exporter(Call(name), traced, dynamic_axes(name, traced))
    # The exporter of torch.export rounds the scale 0.7 to float32, an error of 2e-8.
    least = 1e-6 if exporter is by_torch_export and name.startswith("cca") else 1e-12
    for batch, other in [(2, sizes), *other_sizes(sizes)]:
        inputs = draw(name, batch, other, dtype)
        check(run(*inputs), name, inputs, least)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("exporter", "opset"),
    [(by_torch_export, 18), pytest.param(by_torch_export, 20, marks=slow), (by_torchscript, 18), (by_torchscript, 20)],
)
def test_onnx_opsets(exporter: Any, opset: int) -> None:
    """Also large energies, a key that nobody may attend to (-inf), and a larger map."""
    traced = draw("cca with lse", 2, (5, 7))
    run = exporter(Call("cca with lse"), traced, dynamic_axes("cca with lse", traced), opset_version=opset)
    q, k, v = draw("cca with lse", 1, (11, 40))
    k = k.clone()
    k[0, :, 4, 3] = -math.inf
    inputs = 1e3 * q.abs(), k, v
    out, lse = run(*inputs)
    assert lse.abs().max() > 1e3
    assert out.isfinite().all()
    expected = Call("cca with lse", "reference")(*inputs)
    # Energies of thousands have a unit of the last place of 2^-13, and weights that relative error.
    torch.testing.assert_close([out, lse], [*expected], rtol=5e-4, atol=5e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("exporter", [pytest.param(by_torch_export, marks=slow), by_torchscript])
def test_onnx_computes_bfloat16_in_float32(exporter: Any) -> None:
    """onnxruntime has no bfloat16 arrays in Python and few operators for CPUs; the ones here are conversions."""

    class Bfloat16(Call):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.float() for x in super().forward(*(x.bfloat16() for x in inputs)))

    traced = draw("cca with lse", 2, (5, 7))
    run = exporter(Bfloat16("cca with lse"), traced, dynamic_axes("cca with lse", traced))
    inputs = draw("cca with lse", 1, (6, 9))
    out, lse = run(*inputs)
    check([out.bfloat16(), lse], "cca with lse", [x.bfloat16() for x in inputs])


@pytest.mark.parametrize("form", ["op", pytest.param("decomposed", marks=slow)])
def test_onnx_of_an_exported_program(form: str) -> None:
    """A program with the op in it is decomposed by the exporter as well."""
    traced = draw("cca", 2, (5, 7))
    shapes = (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in dynamic_axes("cca", traced)),)
    with ccgpu.decomposed() if form == "decomposed" else contextlib.nullcontext():
        program = torch.export.export(Call("cca"), traced, dynamic_shapes=shapes)
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("ccgpu.cca_forward.default" in targets) == (form == "op")
    run = session(torch.onnx.export(program, dynamo=True, verbose=False).model_proto)
    inputs = draw("cca", 1, (6, 9))
    check(run(*inputs), "cca", inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_export_leaves_no_trace_behind() -> None:
    """After an export by the TorchScript exporter, calls run the op again."""
    by_torchscript(Call("cca"), draw("cca", 1, (2, 3)), [[0], [0], [0]])
    traced = torch.jit.trace(Call("cca"), draw("cca", 1, (2, 3)), check_trace=False)
    assert "ccgpu::cca_forward" in {node.kind() for node in traced.inlined_graph.nodes()}
