"""The shares of a network's parts: nothing is changed by the hooks, and every moment and byte belongs to one part."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch

from ccgpu.train.measurement import network
from ccgpu.train.measurement.network import PARTS, STATES, Network, count, flops, measure, step, training, watch
from ccgpu.train.measurement.timing import Clock, Stopwatch
from ccgpu.train.memory import peak_bytes_of_parts, saved_bytes

CPU = torch.device("cpu")
SMALL = Network("resnet18", "rcca", (2, 3, 33, 41), head_channels=8)


@pytest.mark.parametrize("context", ["rcca", "nonlocal", "psp"])
def test_parts_begin_in_their_order_in_both_passes(context: str) -> None:
    case = SMALL._replace(context=context)
    net, entered = case.build(CPU), []
    with watch(net, entered.append):
        step(training(net, CPU), case.batch(CPU), entered.append)
    order = [part for part, _ in groupby(entered)]
    forward = ["output", "backbone", "output", "head", "attention", "head", "output", "auxiliary head", "output"]
    backward = ["auxiliary head", "head", "attention", "head", "backbone"]
    assert order == [*forward, *backward, "optimiser"]


def test_hooks_do_not_change_the_step_and_leave_nothing_behind() -> None:
    nets = [SMALL.build(CPU), SMALL.build(CPU)]
    for net, watched in zip(nets, (False, True), strict=True):
        torch.manual_seed(1)  # of dropout
        update, batch = training(net, CPU), SMALL.batch(CPU)
        if watched:
            with watch(net, lambda part: None):
                step(update, batch, lambda part: None)
        else:
            step(update, batch, lambda part: None)
    plain, hooked = (net.state_dict() for net in nets)
    start = SMALL.build(CPU).state_dict()
    assert all(torch.equal(plain[name], hooked[name]) for name in plain)
    assert not torch.equal(start["head.cca.query_conv.weight"], hooked["head.cca.query_conv.weight"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in nets[1].modules())


def test_measured_parts_are_those_of_the_network() -> None:
    record = measure(SMALL, Clock(CPU), repeats=1)
    assert record["training_ms"].keys() == {*PARTS}
    assert record["prediction_ms"].keys() == {*PARTS} - {"auxiliary head", "optimiser"}
    for name in ("training_ms", "prediction_ms", "training_peak_mb", "prediction_peak_mb"):
        assert all(value > 0 for value in record[name].values())
    # When the optimiser runs, all gradients exist.
    assert record["training_peak_mb"]["optimiser"] * 1e6 >= 4 * sum(count(SMALL, CPU)["parameters"].values())
    assert max(record["training_peak_mb"].values()) > max(record["prediction_peak_mb"].values())


def test_counts_are_those_of_the_whole_network() -> None:
    found, net = count(SMALL, CPU), SMALL.build(CPU).train()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert sum(found["parameters"].values()) == parameters
    assert found["parameters"]["attention"] == sum(p.numel() for p in net.head.cca.parameters())
    assert sum(found["states_mb"].values()) == pytest.approx(STATES * 4 * parameters / 1e6)
    assert sum(found["saved_mb"].values()) == pytest.approx(saved_bytes(net, SMALL.batch(CPU)["image"]) / 1e6)


def test_attention_takes_its_own_flops() -> None:
    """Two loops, each with the convolutions and the two products of criss-cross attention; backward has them twice."""
    case = SMALL._replace(images=(1, 3, 65, 65), head_channels=64)
    prediction, step_of_training = flops(case, backward=False), flops(case, backward=True)
    n, length, c, d = 81, 9 + 9, 64, 8  # the op counts a position in its row and in its column
    loop = 2 * n * c * (2 * d + c) + 2 * n * length * (d + c)
    assert prediction["attention"] * 1e9 == pytest.approx(2 * loop)
    assert step_of_training["attention"] == pytest.approx(3 * prediction["attention"], rel=0.2)
    assert "auxiliary head" not in prediction
    assert step_of_training["auxiliary head"] > 0


def test_the_lower_bound_of_a_step_is_one() -> None:
    net, batch = SMALL.build(CPU), SMALL.batch(CPU)
    update = training(net, CPU)
    step(update, batch, lambda part: None)
    update.optimiser.zero_grad(set_to_none=True)
    peak = max(peak_bytes_of_parts(lambda enter: step(update, batch, enter), CPU).values())
    held = (STATES - 1) * 4 * sum(parameter.numel() for parameter in net.parameters())
    assert 0.5 * (peak + held) <= count(SMALL, CPU)["least_peak_mb"] * 1e6 <= 1.01 * (peak + held)


def test_stopwatch_adds_up_and_pauses() -> None:
    class Counting(Clock):
        times = iter([1.0, 2.0, 4.0, 8.0, 16.0])

        def now(self) -> float:
            return next(self.times)

    stopwatch = Stopwatch(Counting(CPU))
    for part in ("a", "b", "a", "a", None):
        stopwatch.enter(part)
    assert stopwatch.milliseconds == {"a": 1e3 * (1 + 4 + 8), "b": 2e3}


def test_classes_are_those_of_cityscapes() -> None:
    assert int(SMALL.batch(CPU)["label"].max()) == network.CLASSES - 1
