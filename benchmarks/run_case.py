"""Measure one case: compare all candidates with float64, then time them; each gets a row with results or a reason."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.candidates import EAGER_BMM, OURS, Candidate, Function
from benchmarks.cases import STEPS, Case, Inputs, precision
from benchmarks.measure import Clock, Step, Timing, host_time, interleaved, temporaries
from benchmarks.patience import Patience

BASELINE = (EAGER_BMM, "NCHW")
# The relative error, in the 2-norm over a whole tensor, above which a candidate disagrees: several times the error of
# the formulation in plain PyTorch in that dtype.
AGREEMENT = {"float64": 1e-10, "float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 6e-2}
SET_BYTES = 2**33  # most bytes of all sets of inputs together
COMPILE_SECONDS = 60.0  # a compiled candidate is skipped if less time than this is left
Row = dict[str, object]


class Sets(NamedTuple):
    """Several sets of inputs in one layout: as plain tensors, as leaves of a graph, and the gradients of out."""

    tensors: list[Inputs]
    leaves: list[Inputs]
    douts: list[Tensor]


def number_of_sets(case: Case, device: torch.device) -> int:
    """Return how many sets of inputs are needed so that none is still in the L2 cache when it is used again."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2, min(-(-3 * cache // case.input_bytes), SET_BYTES // (2 * case.input_bytes)))


def make_sets(case: Case, device: torch.device, layout: str, number: int) -> Sets:
    """Return the sets of inputs; set i has the same values in every layout."""
    pairs = [case.inputs(seed, device, layout) for seed in range(number)]
    leaves = [tuple(x.detach().requires_grad_() for x in tensors) for tensors, _ in pairs]
    return Sets([tensors for tensors, _ in pairs], leaves, [dout for _, dout in pairs])  # type: ignore[arg-type]


def steps_of(function: Function, sets: Sets) -> dict[str, Step]:
    """Return as steps: forward without a graph, backward with its forward untimed, and both."""
    count = len(sets.tensors)

    def forward(number: int) -> tuple[Tensor, Inputs, Tensor]:
        leaves = sets.leaves[number % count]
        return function(*leaves), leaves, sets.douts[number % count]

    def backward(state: tuple[Tensor, Inputs, Tensor]) -> tuple[Tensor, ...]:
        out, leaves, dout = state
        return torch.autograd.grad(out, leaves, dout)

    def both(number: int) -> tuple[Tensor, ...]:
        out, leaves, dout = forward(number)
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    return {
        "forward": Step(lambda number: sets.tensors[number % count], lambda tensors: function(*tensors)),
        "backward": Step(forward, backward),
        "forward+backward": Step(lambda number: number, both),
    }


def truth(case: Case, sets: Sets) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv of the first set by the einsum formulation in float64."""
    wide = tuple(x.detach().double().requires_grad_() for x in sets.tensors[0])
    out = peers.einsum(*wide)
    return (out.detach(), *torch.autograd.grad(out, wide, sets.douts[0].double()))


def relative_errors(results: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Return, for each step, the largest relative error of its results."""
    errors = [
        float((a.double() - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(results, expected, strict=True)
    ]
    return {"forward": errors[0], "backward": max(errors[1:]), "forward+backward": max(errors)}


def reason(error: Exception) -> str:
    """Return an exception as one line of text."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def release(clock: Clock) -> None:
    """Free memory after a candidate that may have taken all of it."""
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()


class Measurement:
    """The measurement of a case: the admitted candidates, and the rows so far."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        deadline: float,
        say: Callable[[str], None],
        patience: Patience | None = None,
    ) -> None:
        self.case, self.clock, self.deadline, self.say = case, Clock(device), deadline, say
        self.patience, self.flops = patience, case.flops()
        self.ours = float("inf")  # seconds of forward and backward of our fastest backend, if there is a patience
        self.sets: dict[str, Sets] = {}
        self.steps: dict[tuple[str, str], dict[str, Step]] = {}
        self.errors: dict[tuple[str, str], dict[str, float]] = {}
        self.rows: list[Row] = []
        self.failed: list[str] = []  # our backends that raised, and candidates that disagreed
        number = number_of_sets(case, device)
        self.common: Row = {"input_sets": number}
        self._expected: tuple[Tensor, ...] = ()

    def _sets(self, layout: str) -> Sets:
        if layout not in self.sets:
            count = int(str(self.common["input_sets"]))
            self.sets[layout] = make_sets(self.case, self.clock.device, layout, count)
        return self.sets[layout]

    def left(self) -> float:
        """Return the seconds left."""
        return self.deadline - time.monotonic()

    def out(self, name: str, layout: str, why: str, step: str = "") -> None:
        """Add a row with the reason why there is no measurement."""
        self.say(f"  {name}, {layout}: {why}")
        self.rows.append({"name": name, "layout": layout, "pass": step, "reason": why})

    def fail(self, name: str, layout: str, step: str, error: Exception, *, serious: bool) -> None:
        """Add a row with an exception; if it is `serious`, the whole measurement has failed."""
        self.out(name, layout, reason(error), step)
        if serious:
            self.failed.append(f"{self.case}: {name}, {layout}: {reason(error)}")

    def admit(self, candidate: Candidate, layout: str) -> None:
        """Make a candidate and compare its results with float64; a failure gives a row."""
        key = (candidate.name, layout)
        if candidate.why_not is not None:
            self.out(*key, candidate.why_not)
            return
        if self.left() < (COMPILE_SECONDS if candidate.compiled else 0.0):
            self.out(*key, f"no time: {max(0.0, self.left()):.0f} s were left")
            return
        slow = self._slow(candidate, layout)
        if slow is not None:
            self.out(*key, slow)
            return
        sets = self._sets(layout)
        try:
            steps = steps_of(candidate.make(), sets)
            start = time.perf_counter()
            results = steps["forward+backward"].run(0)
            seconds = time.perf_counter() - start
            assert isinstance(results, tuple)
            if candidate.same_function:
                self._expected = self._expected or truth(self.case, sets)
                errors = relative_errors(results, self._expected)
                worst = errors["forward+backward"]
                if not worst <= AGREEMENT[self.case.dtype]:
                    raise ArithmeticError(f"disagrees with float64: relative error {worst:.2g}")
                self.errors[key] = errors
            del results
            seconds = self._warm(candidate, layout, seconds, steps["forward+backward"])
            slow = self._slow(candidate, layout, seconds)
            if slow is None:
                self.steps[key] = steps
            else:
                self.out(*key, slow)
            if candidate.is_ours:
                self.ours = min(self.ours, seconds)
        except Exception as error:  # any exception of a peer is the reason in its row
            self.fail(*key, "", error, serious=candidate.is_ours or isinstance(error, ArithmeticError))
        release(self.clock)

    def _warm(self, candidate: Candidate, layout: str, seconds: float, both: Step) -> float:
        """Return the seconds of forward and backward, after a first run of `seconds` that may have prepared kernels."""
        if self.patience is None or candidate.compiled:
            return seconds
        key = (candidate.name, layout, self.case.dtype)
        if candidate.is_ours or self.patience.unsure(key, seconds, self.ours):
            return min(seconds, self.clock.host(both, 1))
        return seconds

    def _slow(self, candidate: Candidate, layout: str, seconds: float | None = None) -> str | None:
        """Return why a peer is too slow, after its first run if it took `seconds`; None where it is not, or unknown."""
        if self.patience is None or candidate.is_ours or candidate.compiled:
            return None
        key, flops = (candidate.name, layout, self.case.dtype), self.flops["forward+backward"]
        if seconds is None:
            return self.patience.why_not(key, flops, self.ours)
        return self.patience.after(key, flops, seconds, self.ours)

    def run(self, turns: int, share: float, rates: dict[str, float], timed: Sequence[str] = STEPS) -> None:
        """Time all admitted candidates in turns, step by step, and measure their memory."""
        minimum, flops = self.case.minimum_bytes(), self.flops
        self._expected = ()
        release(self.clock)
        for number, step in enumerate(timed):
            chosen = {"\t".join(key): steps[step] for key, steps in self.steps.items()}
            fair = max(0.0, self.left()) / max(1, len(chosen) * (len(timed) - number))
            ran_before = not self.clock.on_gpu  # on a CPU admission has run all of the code that this step runs
            times = interleaved(chosen, turns, self.clock, min(share, fair), ran_before)
            floor = max(minimum[step] / rates["copy"], flops[step] / rates["matrix"])
            base = times.get("\t".join(BASELINE))
            for text, timing in times.items():
                name, layout = text.split("\t")
                try:
                    if isinstance(timing, Exception):
                        raise timing
                    extra = temporaries(chosen[text], self.clock)
                except Exception as error:  # as above
                    self.fail(name, layout, step, error, serious=name.startswith(OURS))
                    continue
                row: Row = {"name": name, "layout": layout, "pass": step, "reason": "", **milliseconds(timing)}
                if isinstance(base, Timing):
                    row["ratio"] = round(timing.median / base.median, 3)
                row["temporaries_mb"] = round(extra / 1e6, 2)
                lost = self.errors.get((name, layout), {}).get(step)
                row["error"] = "" if lost is None else f"{lost:.2g}"
                row["minimum_mb"] = round(minimum[step] / 1e6, 2)
                row["gflop"] = round(flops[step] / 1e9, 3)
                row["achieved_gb_s"] = round(minimum[step] / timing.median / 1e9, 1)
                row["share_of_copy"] = round(minimum[step] / timing.median / rates["copy"], 3)
                row["floor_ms"] = round(floor * 1e3, 4)
                self.rows.append(row)
        self.rows = [{**self.common, **row} for row in self.rows]


def milliseconds(timing: Timing) -> dict[str, Any]:
    """Return a timing as columns."""
    names = ("median_ms", "low_ms", "high_ms")
    return {**{n: round(s * 1e3, 4) for n, s in zip(names, timing[:3], strict=True)}, "turns": timing.turns}


def measure_case(
    case: Case,
    candidates: Sequence[Candidate],
    device: torch.device,
    rates: dict[str, float],
    *,
    turns: int = 30,
    share: float = 1.0,
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
    timed: Sequence[str] = STEPS,
    patience: Patience | None = None,
) -> tuple[list[Row], list[str]]:
    """Measure a case; return its rows, and the failures: our backends that raised, candidates that disagreed.

    Args:
        case: shape and dtype.
        candidates: what is measured, this library's backends first.
        device: where.
        rates: bytes/s of a copy and FLOP/s of a product (`benchmarks.cca.rates_of`), for the floors.
        turns: how often each step is timed, at most.
        share: seconds for each step of each candidate.
        deadline: when everything must be over, on the clock `time.monotonic`.
        say: takes a line about each candidate that is not measured.
        timed: the steps that are timed, of STEPS.
        patience: which peers are too slow to be timed; None: all of them are timed.
    """
    # Dynamo is reset for each case, because it stops compiling a function after a few shapes.
    torch._dynamo.reset()
    with precision(case.dtype):
        measurement = Measurement(case, device, deadline, say, patience)
        for candidate in candidates:
            for layout in candidate.layouts:
                measurement.admit(candidate, layout)
        measurement.run(turns, share, rates, timed)
        release(measurement.clock)
    return measurement.rows, measurement.failed


def measure_host(case: Case, candidates: Sequence[Candidate], device: torch.device) -> list[Row]:
    """Return the time of each candidate's Python call alone on a small map, without waiting for the device."""
    clock = Clock(device)
    sets = make_sets(case, device, "channels_last", 2)
    rows: list[Row] = []
    with precision(case.dtype):
        for candidate in candidates:
            if candidate.why_not is not None or candidate.compiled:
                continue
            for step in ("forward", "forward+backward"):
                row: Row = {"name": candidate.name, "layout": "channels_last", "pass": f"host, {step}"}
                try:
                    row |= milliseconds(host_time(steps_of(candidate.make(), sets)[step], clock))
                except Exception as error:  # as above
                    row["reason"] = reason(error)
                rows.append(row)
    return rows
