"""`torch.onnx.export` of the public functions, by both exporters, without any argument for this package."""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ccgpu
from tests.ccgpu.exports.cases import ALL, TRACED, Call, check, draw, dynamic_axes, dynamic_shapes, other_sizes

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


def by_torch_export(call: Call, inputs: tuple[Tensor, ...], **options: Any) -> Run:
    """Export with `dynamo=True`."""
    shapes = dynamic_shapes(call.name, inputs)
    program = torch.onnx.export(call, inputs, dynamo=True, verbose=False, dynamic_shapes=shapes, **options)
    return session(program.model_proto)


def by_torchscript(call: Call, inputs: tuple[Tensor, ...], **options: Any) -> Run:
    """Export with `dynamo=False`."""
    names = [f"x{index}" for index in range(len(inputs))]
    axes = dict(zip(names, dynamic_axes(call.name, inputs), strict=True))
    file = io.BytesIO()
    options = {"opset_version": 18} | options  # the default of this exporter is 17 before torch 2.9
    torch.onnx.export(call, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes, **options)
    return session(onnx.load_from_string(file.getvalue()))


slow = pytest.mark.slow
FUNCTION_CASES = [
    # Every number of axes and every dtype once by each exporter. That of torch.export takes seconds for a model.
    *((by_torch_export, axes, torch.float32, () if axes == 2 else slow) for axes in TRACED),
    *((by_torch_export, 2, dtype, slow) for dtype in (torch.float16, torch.float64)),
    *((by_torchscript, axes, torch.float32, ()) for axes in TRACED),
    *((by_torchscript, 2, dtype, ()) for dtype in (torch.float16, torch.float64)),
]


@functools.cache
def functions(exporter: Any, axes: int, dtype: torch.dtype, **options: Any) -> Run:
    """Return the model of all functions for maps of so many axes."""
    return exporter(Call(ALL), draw(ALL, 2, TRACED[axes], dtype), **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("exporter", "axes", "dtype"), [pytest.param(*c[:3], marks=c[3]) for c in FUNCTION_CASES])
def test_onnx_model_is_the_functions_at_any_size(exporter: Any, axes: int, dtype: torch.dtype) -> None:
    sizes = TRACED[axes]
    for batch, other in [(2, sizes), *other_sizes(sizes)]:
        inputs = draw(ALL, batch, other, dtype)
        check(functions(exporter, axes, dtype)(*inputs), ALL, inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("exporter", "options"),
    [
        (by_torch_export, {}),
        pytest.param(by_torch_export, {"opset_version": 20}, marks=slow),
        (by_torchscript, {}),
        (by_torchscript, {"opset_version": 20}),
    ],
)
def test_onnx_of_large_energies(exporter: Any, options: dict[str, int]) -> None:
    """Also a key that nobody may attend to (-inf), and a larger map."""
    q, k, v, weights = draw(ALL, 1, (11, 40))
    k = k.clone()
    k[0, :, 4, 3] = -math.inf
    inputs = 1e3 * q.abs(), k, v, weights
    found = functions(exporter, 2, torch.float32, **options)(*inputs)
    out, lse, *_ = found
    assert lse.abs().max() > 1e3
    assert out.isfinite().all()
    # Energies of thousands have a unit of the last place of 2^-13, and weights that relative error.
    torch.testing.assert_close(found, [*Call(ALL, "reference")(*inputs)], rtol=5e-4, atol=5e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("exporter", [pytest.param(by_torch_export, marks=slow), by_torchscript])
def test_onnx_computes_bfloat16_in_float32(exporter: Any) -> None:
    """onnxruntime has no bfloat16 arrays in Python and few operators for CPUs; the ones here are conversions."""

    class Bfloat16(Call):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(x.float() for x in super().forward(*(x.bfloat16() for x in inputs)))

    run = exporter(Bfloat16(ALL), draw(ALL, 2, (5, 7)))
    inputs = draw(ALL, 1, (6, 9))
    out, lse, energies, sums = run(*inputs)
    check([out.bfloat16(), lse, energies, sums.bfloat16()], ALL, [x.bfloat16() for x in inputs])


@slow
@pytest.mark.parametrize("form", ["op", "decomposed"])
def test_onnx_of_an_exported_program(form: str) -> None:
    """A program with the op in it is decomposed by the exporter as well."""
    traced = draw("cca", 2, (5, 7))
    with ccgpu.decomposed() if form == "decomposed" else contextlib.nullcontext():
        program = torch.export.export(Call("cca"), traced, dynamic_shapes=dynamic_shapes("cca", traced))
    targets = {str(node.target) for node in program.graph.nodes}
    assert ("ccgpu.cca_forward.default" in targets) == (form == "op")
    run = session(torch.onnx.export(program, dynamo=True, verbose=False).model_proto)
    inputs = draw("cca", 1, (6, 9))
    check(run(*inputs), "cca", inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_export_leaves_no_trace_behind() -> None:
    """After an export by the TorchScript exporter, calls run the op again."""
    by_torchscript(Call("cca"), draw("cca", 1, (2, 3)))
    traced = torch.jit.trace(Call("cca"), draw("cca", 1, (2, 3)), check_trace=False)
    assert "ccgpu::cca_forward" in {node.kind() for node in traced.inlined_graph.nodes()}
