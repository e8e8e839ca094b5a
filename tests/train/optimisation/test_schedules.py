import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccgpu.train.optimisation.schedules import (
    SCHEDULES,
    build_schedule,
    constant,
    cosine,
    mmseg_poly,
    poly,
    warmed_up,
)


def test_poly_table() -> None:
    schedule = poly(0.01, 100)
    assert schedule(0) == 0.01
    assert schedule(50) == pytest.approx(0.01 * 0.5358867312681466)
    assert schedule(99) == pytest.approx(0.01 * 0.01**0.9)


def test_schedules_of_four_steps_by_hand() -> None:
    tables: dict[str, tuple[Callable[[int], float], list[float]]] = {
        "poly": (poly(0.9, 4, 2.0, 0.1), [0.9, 0.1 + 0.8 * 0.5625, 0.1 + 0.8 * 0.25, 0.1 + 0.8 * 0.0625]),
        "mmseg-poly": (mmseg_poly(0.9, 4, 2.0, 0.1), [0.9, 0.1 + 0.8 * 4 / 9, 0.1 + 0.8 / 9, 0.1]),
        "cosine": (cosine(0.9, 4, 0.1), [0.9, 0.5 + 0.4 * math.sqrt(0.5), 0.5, 0.5 - 0.4 * math.sqrt(0.5)]),
        "constant": (constant(0.9), [0.9] * 4),
    }
    assert set(tables) == set(SCHEDULES)
    for name, (schedule, expected) in tables.items():
        values = [schedule(i) for i in range(4)]
        assert values == pytest.approx(expected, rel=1e-12)
        lowest = 0.1 if name != "constant" else 0.0
        built = build_schedule(name, 0.9, 4, power=2.0, min_lr=lowest)
        assert [built(i) for i in range(4)] == values
        warm = build_schedule(name, 0.9, 4, power=2.0, min_lr=lowest, warmup_steps=3)
        assert [warm(i) for i in range(4)] == pytest.approx(
            [expected[0] / 3, expected[1] * 2 / 3, expected[2], expected[3]], rel=1e-12
        )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_single_step_has_the_learning_rate(name: str) -> None:
    assert build_schedule(name, 0.3, 1)(0) == 0.3
    assert build_schedule(name, 0.3, 1, warmup_steps=1)(0) == 0.3


@pytest.mark.parametrize("steps", [2, 7, 40])
def test_schedules_are_those_of_torch(steps: int) -> None:
    """torch's poly ends at 0 after its total_iters, N of ours and N - 1 of mmsegmentation's."""
    ours_and_torchs = [
        (poly(0.2, steps, 0.7), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, steps, 0.7)),
        (mmseg_poly(0.2, steps, 0.7), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, steps - 1, 0.7)),
        (cosine(0.2, steps, 0.01), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps, 0.01)),
    ]
    for ours, build in ours_and_torchs:
        optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
        scheduler = build(optimiser)
        for iteration in range(steps):
            assert ours(iteration) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
            optimiser.step()
            scheduler.step()


@given(
    name=st.sampled_from(SCHEDULES),
    iterations=st.integers(1, 300),
    lr=st.floats(1e-6, 10),
    share=st.floats(0, 1),
    power=st.floats(0, 10),
)
def test_schedules_fall_from_lr_and_stay_above_min_lr(
    name: str, iterations: int, lr: float, share: float, power: float
) -> None:
    lowest = share * lr
    schedule = build_schedule(name, lr, iterations, power=power, min_lr=lowest)
    values = [schedule(i) for i in range(iterations)]
    assert values[0] == pytest.approx(lr, rel=1e-12)
    tolerance = 1e-12 * lr
    assert all(later <= earlier + tolerance for earlier, later in itertools.pairwise(values))
    assert min(values) >= lowest - tolerance


def test_warm_up_rises_evenly_and_then_leaves_the_schedule_as_it_is() -> None:
    schedule = warmed_up(constant(0.8), 4)
    assert [schedule(i) for i in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_an_unknown_schedule_is_told() -> None:
    with pytest.raises(ValueError, match="name must be one of poly, mmseg-poly, cosine, constant, got 'step'"):
        build_schedule("step", 0.1, 3)
