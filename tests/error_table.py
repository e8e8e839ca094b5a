"""A table of the largest errors in the tests of values, by backend, dtype and rank, printed when the tests end.

Errors are in units. A unit is einsum's own error on the same example (0 if the test allows for none) plus the test's
floor for rounding divided by the limit, so that `units <= limit` means `error <= limit * einsum's error + floor`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

VALUE_LIMIT, GRADIENT_LIMIT = 2, 3


def in_units(error, plain_error, floor, limit) -> float:
    """Return the largest of error / (plain_error + floor / limit), numbers or arrays; infinity if one is NaN."""
    with np.errstate(invalid="ignore"):
        units = float(np.max(error / (plain_error + floor / limit), initial=0.0))
    return math.inf if math.isnan(units) else units


class Row(NamedTuple):
    """The key of a table's line; `dtype` names the arithmetic of products instead if that differs, as TF32 does."""

    backend: str
    dtype: str
    rank: int


class ErrorTable:
    """The largest errors of each row, in units, and the number of examples that they are taken from.

    `limits` has the columns' names, and the limits of their numbers.
    """

    def __init__(self, title: str, limits: Mapping[str, float]) -> None:
        self.title, self.limits = title, dict(limits)
        self._examples: dict[Row, int] = {}
        self._largest: dict[Row, dict[str, float]] = {}

    def record(self, row: Row, units: Mapping[str, float], examples: int = 1) -> None:
        """Add examples to a row, passed or failed, with their largest errors in some columns."""
        assert units.keys() <= self.limits.keys()
        self._examples[row] = self._examples.get(row, 0) + examples
        largest = self._largest.setdefault(row, {})
        for column, number in units.items():
            largest[column] = max(largest.get(column, 0.0), number)

    def contents(self) -> list[tuple]:
        """Return the table as plain lists, for `merge` in another process."""
        return [(*row, examples, self._largest[row]) for row, examples in self._examples.items()]

    def merge(self, contents: Iterable[tuple]) -> None:
        """Add another process's table, as `contents` returns it."""
        for backend, dtype, rank, examples, units in contents:
            self.record(Row(backend, dtype, rank), units, examples)

    def lines(self) -> list[str]:
        """Return the lines of the table, none if nothing was recorded; numbers above their limit end in "!"."""
        if not self._examples:
            return []
        texts = [("backend", "dtype", "rank", "examples", *self.limits)]
        for row in sorted(self._examples):
            cells = (self._cell(row, column) for column in self.limits)
            texts.append((row.backend, row.dtype, str(row.rank), str(self._examples[row]), *cells))
        widths = [max(len(cell) for cell in column) for column in zip(*texts, strict=True)]
        return [
            self.title,
            *(
                "  ".join(
                    cell.ljust(width) if place < 2 else cell.rjust(width)
                    for place, (cell, width) in enumerate(zip(text, widths, strict=True))
                ).rstrip()
                for text in texts
            ),
        ]

    def _cell(self, row: Row, column: str) -> str:
        number = self._largest[row].get(column)
        if number is None:
            return "-"
        # Rounded up, so that 2.001 does not look like a 2.
        text = f"{math.ceil(100 * number) / 100:.2f}" if number < 1000 else f"{number:.0e}"
        return f"{text}!" if number > self.limits[column] else text


CCA = ErrorTable(
    "cca",
    {"out": VALUE_LIMIT, "lse": VALUE_LIMIT, "dq": GRADIENT_LIMIT, "dk": GRADIENT_LIMIT, "dv": GRADIENT_LIMIT},
)
STAGES = ErrorTable(
    "stages of cca (d: the larger error of the two gradients)",
    {
        column: limit
        for stage in ("affinity", "aggregate", "transposed")
        for column, limit in ((stage, VALUE_LIMIT), (f"d {stage}", GRADIENT_LIMIT))
    },
)
TABLES = (CCA, STAGES)
HEADING = (
    "errors against the reference, in units of einsum's own error "
    f"(limits: {VALUE_LIMIT} values, {GRADIENT_LIMIT} gradients)"
)
UNIT = "A unit: einsum's error on the same example + the test's floor for rounding / the limit. !: failed."


def report() -> list[str]:
    """Return the lines of all tables after one that explains the unit; none if nothing was recorded."""
    texts = [table.lines() for table in TABLES]
    return [UNIT, *(line for text in texts for line in text)] if any(texts) else []
