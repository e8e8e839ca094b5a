"""`ccgpu.decomposed`: standard operators inside, the ops outside, whoever traces and in whatever thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import ccgpu
from ccgpu import decomposition
from tests.ccgpu.exports.cases import FUNCTIONS, SCALE, Call, check, draw


class _Ops(TorchDispatchMode):
    """Collects the namespaces of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def is_decomposed(function: Callable[..., Any] = ccgpu.cca) -> bool:
    """Return whether a call of a function runs no op of this package; it must run one otherwise."""
    with _Ops() as ops:
        function(*draw("cca", 1, (3, 4)))
    return "ccgpu" not in ops.namespaces


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FUNCTIONS),
    batch=st.integers(0, 2),
    sizes=st.lists(st.sampled_from([1, 2, 3, 5, 7]), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_decomposed_values_are_the_definitions(
    name: str, batch: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    inputs = draw(name, batch, sizes, dtype)
    with ccgpu.decomposed():
        check(Call(name)(*inputs), name, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_decomposed_gradients_are_the_ops(name: str) -> None:
    inputs = [x.requires_grad_() for x in draw(name, 2, (3, 5), torch.float64)]
    expected = torch.autograd.grad(sum(x.sin().sum() for x in Call(name)(*inputs)), inputs)
    with ccgpu.decomposed():
        found = torch.autograd.grad(sum(x.sin().sum() for x in Call(name)(*inputs)), inputs)
    torch.testing.assert_close(found, expected)


def test_decomposed_lowers_under_autocast() -> None:
    q, k, v = draw("cca", 1, (3, 4))
    with ccgpu.decomposed(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ccgpu.cca(q, k, v).dtype == torch.bfloat16
        assert ccgpu.affinity(q, k).dtype == torch.float32


def test_decomposed_keeps_errors() -> None:
    q, k, v = draw("cca", 1, (3, 4))
    with ccgpu.decomposed():
        with pytest.raises(ValueError, match="cca: k must have q's shape"):
            ccgpu.cca(q, k[..., 1:], v)
        with pytest.raises(ValueError, match="backend"):
            ccgpu.cca(q, k, v, backend="none such")


def test_decomposed_nests_and_ends_with_an_exception() -> None:
    assert not is_decomposed()
    context = ccgpu.decomposed()
    with context:
        with context, ccgpu.decomposed():
            assert is_decomposed()
        assert is_decomposed()
        with pytest.raises(KeyError), ccgpu.decomposed():
            raise KeyError
        assert is_decomposed()
    assert not is_decomposed()


def test_decomposed_decorates() -> None:
    @ccgpu.decomposed()
    def attend(q: Tensor, k: Tensor, v: Tensor, depth: int = 2) -> Tensor:
        """Calls itself, so that one decorator is entered twice."""
        return attend(q, k, v, depth - 1) if depth else ccgpu.cca(q, k, v)

    assert is_decomposed(attend)
    assert not is_decomposed()


def test_decomposed_belongs_to_a_thread() -> None:
    found = []
    with ccgpu.decomposed():
        thread = threading.Thread(target=lambda: found.append(is_decomposed()))
        thread.start()
        thread.join()
    assert found == [False]


def test_decomposed_belongs_to_a_task() -> None:
    async def inside(entered: asyncio.Event, end: asyncio.Event) -> bool:
        with ccgpu.decomposed():
            entered.set()
            await end.wait()
            return is_decomposed()

    async def outside(entered: asyncio.Event, end: asyncio.Event) -> bool:
        await entered.wait()
        try:
            return is_decomposed()
        finally:
            end.set()

    async def both() -> list[bool]:
        events = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(inside(*events), outside(*events))

    assert asyncio.run(both()) == [True, False]


def test_compiled_functions_are_compiled_again_inside() -> None:
    graphs: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append({str(node.target) for node in graph.graph.nodes if "ccgpu" in str(node.target)})
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(Call("cca with lse"), backend=backend, fullgraph=True)
    inputs = draw("cca", 1, (3, 4))
    for inside in (False, True, False, True):  # the last two find what the first two compiled
        if inside:
            with ccgpu.decomposed():
                check(compiled(*inputs), "cca with lse", inputs)
        else:
            check(compiled(*inputs), "cca with lse", inputs)
    assert graphs == [{"ccgpu.cca_forward"}, set()]


def test_decomposed_may_be_entered_in_compiled_code() -> None:
    """torch.compile breaks the graph there; the values are right, and the context ends."""

    @ccgpu.decomposed()
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ccgpu.cca(q, k, v, scale=SCALE)

    torch.compiler.reset()
    inputs = draw("cca", 1, (3, 4))
    check([torch.compile(attend, backend="eager")(*inputs)], "cca", inputs)
    assert not is_decomposed()


def test_make_fx_sees_standard_operators() -> None:
    inputs = draw("cca with lse", 2, (5, 7))
    with ccgpu.decomposed():
        traced = make_fx(Call("cca with lse"), tracing_mode="symbolic")(*inputs)
    assert {node.target.namespace for node in traced.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    check(traced(*inputs), "cca with lse", inputs)


def test_fake_tensors_have_the_ops_strides_at_dynamic_sizes() -> None:
    """FakeTensor would take the registered decomposition, whose results have other strides."""
    q, k, v = (x.contiguous(memory_format=torch.channels_last) for x in draw("cca", 2, (5, 7)))
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(Call("cca"), (q, k, v), dynamic_shapes=(({0: dynamic, 2: dynamic, 3: dynamic},) * 3,))
    (node,) = (node for node in program.graph.nodes if node.target is torch.ops.ccgpu.cca_forward.default)
    out = node.meta["val"][0]
    assert out.is_contiguous(memory_format=torch.channels_last)
    (result,) = program.module()(q[:1], k[:1], v[:1])
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_decompositions_is_a_new_table_each_time() -> None:
    ccgpu.decompositions().clear()
    assert len(ccgpu.decompositions()) == 3


@pytest.mark.parametrize("number", [0.7, -1 / 3, 0.0, 1e-20, 12345.678e10])
def test_numbers_in_decompositions_are_exact(number: float) -> None:
    assert decomposition.as_tensor(number, torch.device("cpu")).item() == number
