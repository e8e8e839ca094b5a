"""The best of a run's evaluations, and for how many there was no better one."""

from __future__ import annotations

import pytest

from ccgpu.train.runs.scores import Scores


@pytest.mark.parametrize(
    ("values", "best", "since"),
    [
        ([], None, 0),
        ([None, None], None, 2),
        ([0.2, 0.5, 0.4], (2, 0.5), 1),
        ([0.5, 0.5], (1, 0.5), 1),  # of two equal ones the first
        ([None, 0.0, None], (2, 0.0), 1),
        ([0.1, 0.2, 0.3], (3, 0.3), 0),
    ],
)
def test_the_best_is_the_first_of_the_highest(
    values: list[float | None], best: tuple[int, float] | None, since: int
) -> None:
    scores = Scores([*enumerate(values, start=1)])
    assert scores.best() == best
    assert scores.since_best() == since
    added = Scores()
    assert [added.add(*pair) for pair in scores.values] == [
        value is not None and all(other is None or other < value for other in values[:index])
        for index, value in enumerate(values)
    ]
    assert added == scores


def test_records_of_trained_networks_count() -> None:
    records = [
        {"kind": "evaluation", "iteration": 0, "miou": 0.9, "pixel_accuracy": 0.1},
        {"kind": "training", "iteration": 1},
        {"kind": "evaluation", "iteration": 2, "miou": None, "pixel_accuracy": 0.2},
        {"kind": "evaluation", "iteration": 4, "miou": 0.4, "pixel_accuracy": 0.1},
    ]
    assert Scores.of(records, "miou").values == [(2, None), (4, 0.4)]
    assert Scores.of(records, "pixel_accuracy").best() == (2, 0.2)


def test_a_run_stalls_after_evaluations_without_a_better_score() -> None:
    scores = Scores([(2, 0.5), (4, 0.5), (6, 0.4)])
    assert [scores.stalled_at(6, patience) for patience in (0, 1, 2, 3)] == [False, True, True, False]
    assert not scores.stalled_at(7, 1)  # amid two evaluations nothing is decided
    assert not Scores().stalled_at(0, 1)
