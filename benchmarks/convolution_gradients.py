"""Which gradients of convolutions torch computes wrongly on this CPU: `python -m benchmarks.convolution_gradients`.

The relative errors (Frobenius norm) of a convolution's output and of its gradients for map and weight, against float64.
Rows vary one property at a time; then come random calls in bfloat16, of which none may be wrong that
`ccgpu.models.convolution_gradients.right_gradients` leaves in bfloat16. The record is written anew.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cpu_record
from ccgpu.models.convolution_gradients import right_gradients

LIMITS = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4}  # far from rounding errors, and from 1
RANDOM_CALLS, SEED = 1000, 0
FUNCTIONS = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}


@dataclass(frozen=True)
class Case:
    """A call of a convolution; extents hold for all axes or are one for each; padding None: half the kernel's reach."""

    function: str = "conv2d"
    channels: int = 64
    out_channels: int = 64
    groups: int = 64
    kernel: int | tuple[int, ...] = 3
    dilation: int | tuple[int, ...] = 2
    stride: int = 1
    padding: tuple[int, ...] | None = None
    batch: int = 2
    size: tuple[int, ...] = (23, 30)
    dtype: str = "bfloat16"
    channels_last: tuple[bool, bool, bool] = (True, True, True)  # map, weight, gradient of the output


def cases() -> Iterator[Case]:
    """Yield the calls of the rows."""
    grouped = [Case(), Case(groups=8), Case(groups=1), Case(channels=24, out_channels=24, groups=1)]
    for case in grouped:
        for map_last in (False, True):
            for weight_last in (False, True):
                yield replace(case, channels_last=(map_last, weight_last, map_last))
        yield from (replace(case, dilation=dilation) for dilation in (1, 3, 4, 8, (1, 2), (2, 1)))
        yield from (replace(case, kernel=kernel) for kernel in (1, 5, 7, (1, 3), (3, 1)))
        yield from (replace(case, stride=stride, dilation=dilation) for stride in (2, 3) for dilation in (1, 2))
        yield from (replace(case, padding=(padding, padding)) for padding in (0, 1, 3))
        yield from (replace(case, size=size) for size in ((5, 30), (8, 8), (23, 1), (60, 80)))
        for dtype in ("float16", "float32"):
            for last in (False, True):
                for dilation in (1, 2):
                    yield replace(case, dtype=dtype, channels_last=(last, last, last), dilation=dilation)
    yield from (Case(groups=groups) for groups in (2, 4, 16, 32))
    yield from (Case(channels=n, out_channels=n, groups=1) for n in (3, 8, 15, 16, 17, 20, 32, 33, 40, 48))
    yield from (Case(channels=n, out_channels=n, groups=2) for n in (12, 32, 40, 64, 96))
    for groups in (64, 8, 1):
        for dilation in (1, 2):
            volume = Case("conv3d", groups=groups, dilation=dilation, size=(5, 12, 15))
            yield Case("conv1d", groups=groups, dilation=dilation, size=(60,), channels_last=(False, False, False))
            yield volume
            yield replace(volume, function="conv_transpose3d")
            yield Case("conv_transpose2d", groups=groups, dilation=dilation)
            yield Case("conv_transpose2d", groups=groups, dilation=dilation, stride=2)


def random_cases(number: int, seed: int) -> Iterator[Case]:
    """Yield calls of random properties in bfloat16."""
    chosen = random.Random(seed)
    for _ in range(number):
        groups, inputs = chosen.choice((1, 1, 2, 3, 4, 8, 16)), chosen.choice((1, 2, 3, 8, 12, 16, 20, 24, 32, 40, 48))
        kernel = chosen.choice((1, 3, 3, 5, 7, (1, 3), (3, 1)))
        case = Case(
            function=chosen.choice(("conv2d", "conv2d", "conv2d", "conv_transpose2d")),
            channels=groups * inputs,
            out_channels=groups * chosen.choice((1, 2, 8, 16, 24, inputs)),
            groups=groups,
            kernel=kernel,
            dilation=chosen.choice((1, 2, 2, 3, 4, 6, (2, 1), (1, 2))),
            stride=chosen.choice((1, 1, 1, 2)),
            batch=chosen.choice((1, 2, 5)),
            size=(chosen.randint(13, 33), chosen.randint(13, 40)),
            channels_last=(chosen.random() < 0.8, chosen.random() < 0.8, chosen.random() < 0.8),
        )
        reach = padding_of(case)
        # Torch errs most where output and input are equally large. The kernel must fit into the padded map.
        less = tuple(chosen.randint(0, most) for most in reach)
        fits = all(n + 2 * p >= 2 * r + 1 for n, p, r in zip(case.size, less, reach, strict=True))
        yield replace(case, padding=less if fits and chosen.random() < 0.3 else None)


def padding_of(case: Case) -> tuple[int, ...]:
    """Return the padding of a call on each axis."""
    if case.padding is not None:
        return case.padding
    axes = len(case.size)
    kernel, dilation = (v if isinstance(v, tuple) else (v,) * axes for v in (case.kernel, case.dilation))
    return tuple(k // 2 * d for k, d in zip(kernel, dilation, strict=True))


def errors(
    case: Case, context: Callable[[Tensor], AbstractContextManager[object]] = lambda x: nullcontext()
) -> dict[str, float]:
    """Return the relative errors of the output and of the gradients for map and weight; the call is in `context`."""
    generator = torch.Generator().manual_seed(SEED)
    axes, dtype = len(case.size), getattr(torch, case.dtype)
    kernel = case.kernel if isinstance(case.kernel, tuple) else (case.kernel,) * axes
    first, second = case.out_channels, case.channels
    if case.function.startswith("conv_transpose"):
        first, second = second, first

    def rounded(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).double()

    x = rounded(case.batch, case.channels, *case.size)
    weight = rounded(first, second // case.groups, *kernel)
    how: dict[str, Any] = {
        "stride": case.stride,
        "padding": padding_of(case),
        "dilation": case.dilation,
        "groups": case.groups,
    }
    function = FUNCTIONS[case.function]
    grad = rounded(*function(x, weight, **how).shape)
    last = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}[axes]

    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        inner_x, inner_weight, inner_grad = tensors
        inputs = (inner_x.requires_grad_(), inner_weight.requires_grad_())
        with context(inner_x):
            out = function(*inputs, **how)
        return (out.detach(), *torch.autograd.grad(out, inputs, inner_grad))

    exact = results(*(t.clone() for t in (x, weight, grad)))
    ours = results(
        *(
            t.to(dtype).to(memory_format=last if flag else torch.contiguous_format)
            for t, flag in zip((x, weight, grad), case.channels_last, strict=True)
        )
    )
    return {
        name: float((own.double() - true).norm() / true.norm())
        for name, own, true in zip(("out", "x", "weight"), ours, exact, strict=True)
    }


def is_wrong(case: Case, found: dict[str, float]) -> bool:
    """Return whether an error is more than rounding in the case's dtype explains; NaN is."""
    return not all(value < LIMITS[getattr(torch, case.dtype)] for value in found.values())


def row(case: Case) -> dict[str, Any]:
    """Return the record of a call."""
    found = errors(case)
    # JSON has no infinity and no NaN.
    shown = {f"error_{k}": float(f"{v:.2g}") if math.isfinite(v) else str(v) for k, v in found.items()}
    return {"kind": "gradient", **asdict(case), "padding": padding_of(case), **shown, "wrong": is_wrong(case, found)}


def random_row(number: int, seed: int) -> dict[str, Any]:
    """Return the record of random calls: how many torch computes wrongly, alone and in `right_gradients`."""
    chosen = [*random_cases(number, seed)]
    wrong = [case for case in chosen if is_wrong(case, errors(case))]
    still = [case for case in chosen if is_wrong(case, errors(case, right_gradients))]
    return {
        "kind": "random",
        "calls": number,
        "seed": seed,
        "wrong": len(wrong),
        "wrong_in_right_gradients": len(still),
        "examples": [asdict(case) for case in still[:5]],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 if a random call is wrong in `right_gradients`."""
    parser = argparse.ArgumentParser(prog="convolution_gradients", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the rows to this file of JSON lines")
    parser.add_argument("--random", type=int, default=RANDOM_CALLS, help="number of random calls (%(default)s)")
    parser.add_argument("--rows", type=int, help="measure the first rows alone")
    flags = parser.parse_args(argv)
    rows = [row(case) for case in dict.fromkeys([*cases()][: flags.rows])]
    for found in rows:
        print("WRONG" if found["wrong"] else "right", *(f"{k}={v}" for k, v in found.items() if k != "kind"))
    total = random_row(flags.random, SEED)
    print(
        f"{total['calls']} random calls: {total['wrong']} wrong, {total['wrong_in_right_gradients']} in right_gradients"
    )
    if flags.record is not None:
        features = {
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
        }
        cpu_record.write(flags.record, "convolution_gradients", (*rows, total), **features)
    return 1 if total["wrong_in_right_gradients"] else 0


if __name__ == "__main__":
    sys.exit(main())
