"""What a case will cost, beside what it then costs."""

from __future__ import annotations

import pytest
import torch

from ccgpu.train.measurement.contexts import CANDIDATES, Candidate, flops, prepared, training_step
from ccgpu.train.measurement.estimates import Rates, available_bytes, count, predict, product_rate, rates
from ccgpu.train.measurement.timing import Clock
from ccgpu.train.memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
SMALL, LARGE = (1, 64, 17, 17), (1, 64, 33, 41)
# Attention has its memory in tensors that torch can count. Convolutions take a workspace as well, and so does the
# batched product of the materialised form.
COUNTED = ("RCCA R=1", "RCCA R=2", "RCCA R=3", "RCCA R=2, recompute", "non-local, sdpa")


def peak_mb(candidate: Candidate, shape: tuple[int, ...]) -> float:
    step = training_step(*prepared(candidate.build, shape, CPU))
    step()
    return peak_bytes(step, CPU)[0] / 1e6


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_memory_of_a_map_is_predicted_from_a_smaller_one(candidate: Candidate) -> None:
    small, large = (count(candidate.build, shape, CPU) for shape in (SMALL, LARGE))
    measured = {"peak_mb": peak_mb(candidate, SMALL), "forward_ms": 3.0, "forward_backward_ms": 12.0}
    by = rates(small, measured)
    predicted, found = predict(large, by), peak_mb(candidate, LARGE)
    # The map has 4.7 times as many positions; gradients of parameters do not grow, N x N matrices grow by 22.
    assert found > 2 * measured["peak_mb"]
    # Too much rather than too little: a part of a convolution's workspace does not grow with the map.
    assert 0.95 * found <= predicted["peak_mb"] <= 1.35 * found
    assert large.peak_mb <= found * 1.001
    if candidate.name in COUNTED:
        assert large.peak_mb == pytest.approx(found, rel=0.05)
    assert predicted["forward_ms"] == pytest.approx(3.0 * large.gflops / small.gflops)
    assert predicted["forward_backward_ms"] == pytest.approx(12.0 * large.both_gflops / small.both_gflops)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_what_follows_from_shapes_is_exact(candidate: Candidate) -> None:
    counts = count(candidate.build, SMALL, CPU)
    module, x = prepared(candidate.build, SMALL, CPU)
    assert counts.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert counts.saved_mb == saved_bytes(module, x) / 1e6
    assert counts.gflops == flops(candidate.build, SMALL) / 1e9
    # Each product of forward has two in backward; recompute has forward twice.
    passes = 4 if "recompute" in candidate.name else 3
    assert counts.both_gflops == pytest.approx(passes * counts.gflops, rel=0.1)


def test_a_case_that_no_machine_holds_is_counted() -> None:
    (candidate,) = (c for c in CANDIDATES if c.name == "non-local, materialised")
    counts = count(candidate.build, (1, 512, 1024, 1024), CPU)
    matrix = 4 * 1024**4 / 1e6  # N x N float32
    assert counts.saved_mb == pytest.approx(matrix, rel=0.01)
    assert 2 * matrix < counts.peak_mb < 5 * matrix


def test_without_a_smaller_map_the_rate_is_that_of_a_matrix_product() -> None:
    by = product_rate(Clock(CPU))
    assert by.peak == 1
    assert by.forward == by.both > 0
    counts = count(CANDIDATES[0].build, SMALL, CPU)
    assert predict(counts, Rates(1.0, 2.0, 3.0))["forward_backward_ms"] == 3.0 * counts.both_gflops


def test_available_memory_is_that_of_a_machine() -> None:
    assert 1e8 < available_bytes(CPU) < 1e14
