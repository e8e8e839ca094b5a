"""Attention recomputed in backward: equal results, and only the inputs of the loops are saved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ccgpu.models.attention import RCCA, GatedAttention
from ccgpu.models.context import FORMS, NonLocal
from tests.models.problems import features, gradients, make, saved_for_backward


@pytest.mark.parametrize(("dims", "recurrence"), [(1, 1), (2, 2), (3, 3)])
def test_recomputing_saves_the_inputs_of_the_loops_alone(dims: int, recurrence: int) -> None:
    module, x = make(RCCA, 8, recurrence, dims=dims), features(dims).requires_grad_()
    plain, expected = len(saved_for_backward(module, x)), module(x)
    wanted = gradients(expected, x, module)
    inputs = [x, *(make(RCCA, 8, loops, dims=dims)(x) for loops in range(1, recurrence))]
    module.recompute = True
    tensors = saved_for_backward(module, x)
    assert len(tensors) == recurrence < plain
    for tensor, its_input in zip(tensors, inputs, strict=True):
        assert torch.equal(tensor, its_input)
        assert tensor.untyped_storage().nbytes() == x.nbytes
    out = module(x)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients(out, x, module), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_recomputing_non_local_attention_saves_its_input_alone(form: str) -> None:
    results = []
    for recompute in (False, True):
        module, x = make(NonLocal, 8, form=form, recompute=recompute), features(2).requires_grad_()
        assert (len(saved_for_backward(module, x)) == 1) == recompute
        out = module(x)
        results.append([out, *gradients(out, x, module)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [RCCA, NonLocal])
def test_recomputing_has_second_derivatives(kind: type[GatedAttention]) -> None:
    results = []
    for recompute in (False, True):
        module, x = make(kind, 4, recompute=recompute), features(2, channels=4).requires_grad_()
        inputs = [x, *module.parameters()]
        first = torch.autograd.grad(module(x).square().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert results[1][0].abs().max() > 0.1


def test_recomputing_gives_the_same_under_autocast() -> None:
    """Backward runs outside of autocast, and recomputes under it."""
    results = []
    for recompute in (False, True):
        module, x = make(RCCA, 8, 2, recompute=recompute).float(), features(2).float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = module(x)
        results.append([out, *gradients(out, x, module)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_compiled_recomputing_saves_the_inputs_of_the_loops_alone() -> None:
    module, x = make(RCCA, 8, 2, recompute=True), features(2).requires_grad_()
    # This backend separates forward from backward, and so decides what is saved, but generates no code.
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert sum(tensor.nbytes for tensor in saved_for_backward(compiled, x)) == 2 * x.nbytes
    ours, theirs = compiled(x), module(x)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, x, module), gradients(theirs, x, module), strict=True):
        torch.testing.assert_close(a, b)


def test_recomputing_under_ddp_gives_the_same_gradients(tmp_path: Any) -> None:
    module, plain, x = make(RCCA, 8, 2, recompute=True), make(RCCA, 8, 2), features(2)
    expected = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(module)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
