"""The learning rate of every step is that of the published training."""

from __future__ import annotations

import pytest

from tests.train.recipes.published import TRAININGS, Training


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_every_learning_rate_is_the_published_one(training: Training) -> None:
    settings = training.settings()
    assert (settings.iterations, settings.batch) == (training.steps, training.batch)
    schedule = settings.learning_rates()
    ours = [schedule(step) for step in range(training.steps)]
    assert ours == pytest.approx(training.rates(training.steps), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_runs_of_another_length_follow_the_same_rule(steps: int) -> None:
    for training in TRAININGS[:2]:
        schedule = training.settings(iterations=steps).learning_rates()
        assert [schedule(step) for step in range(steps)] == pytest.approx(training.rates(steps), rel=1e-12)
