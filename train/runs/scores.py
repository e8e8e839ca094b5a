"""The first score of a run's evaluations: which one is the best, and for how many there was no better one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Scores:
    """The scores of a run's evaluations, in the order of its steps.

    The untrained network, which --baselines evaluates, is not among them. A score is None where no class occurs, and
    such an evaluation is never the best; of two equal ones the first is.

    Attributes:
        values: (iteration, score in 0..1 or None) of each evaluation.
    """

    values: list[tuple[int, float | None]] = field(default_factory=list)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], name: str) -> Scores:
        """Return the scores in records of `records.evaluation_record`; `name` is a key of `metrics.SCORES`."""
        evaluations = (record for record in records if record["kind"] == "evaluation" and record["iteration"] > 0)
        return cls([(record["iteration"], record[name]) for record in evaluations])

    def add(self, iteration: int, score: float | None) -> bool:
        """Add an evaluation; return whether it is the best so far."""
        self.values.append((iteration, score))
        best = self.best()
        return best is not None and best[0] == iteration

    def best(self) -> tuple[int, float] | None:
        """Return (iteration, score) of the best evaluation; None where no evaluation has a score."""
        found: tuple[int, float] | None = None
        for iteration, score in self.values:
            if score is not None and (found is None or score > found[1]):
                found = iteration, score
        return found

    def since_best(self) -> int:
        """Return the number of evaluations after the best one; all of them where there is none."""
        best = self.best()
        return sum(1 for iteration, _ in self.values if best is None or iteration > best[0])

    def stalled_at(self, iteration: int, patience: int) -> bool:
        """Return whether the evaluation after `iteration` steps is the last of `patience` ones without a better score.

        Args:
            iteration: steps done; without an evaluation right after them nothing is decided.
            patience: number of evaluations; 0: never.
        """
        evaluated = bool(self.values) and self.values[-1][0] == iteration
        return 0 < patience <= self.since_best() and evaluated
