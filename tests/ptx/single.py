"""Executes a few lines of PTX: every thread reads an element of each input, and writes one of each output."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx import machine
from tests.ptx.memory import Buffer
from tests.ptx.parse import BITS, parse
from tests.ptx.registers import DTYPES

LETTERS = "abcefg"
HEAD = """.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 128 .b8 memory[];
{variables}
.visible .entry tested({parameters})
{{
.reg .pred %p<4>;
.reg .b32 %thread, %t<8>;
.reg .b64 %start, %offset, %address, %global, %w<8>;
{registers}
mov.u32 %thread, %tid.x;
"""


def _array(values: Any, kind: str) -> np.ndarray:
    """Return values as an array of a type; negative integers wrap around, bit patterns are taken as they are."""
    dtype = DTYPES["u8" if kind == "pred" else kind]
    if dtype.kind in "iu":
        bits = [int(v) % 2 ** (8 * dtype.itemsize) for v in values]
        return np.array(bits, f"u{dtype.itemsize}").view(dtype)
    return np.array(values, dtype)


def execute(
    body: str,
    inputs: Sequence[tuple[str, Any]] = (),
    outputs: Sequence[str] = (),
    threads: int = 32,
    shared_bytes: int = 0,
    blocks: int = 1,
    memory: Sequence[tuple[str, np.ndarray, bool]] = (),
    variables: str = "",
    **options: Any,
) -> list[np.ndarray]:
    """Run `body` and return the outputs.

    Args:
        body: PTX. Inputs are in %a, %b, %c, %e, %f, %g, outputs in %d0, %d1 ...; %p0 to %p3, %t0 to %t7 (32 bits) and
            %w0 to %w7 (64 bits) are free, %thread is the thread; `memory` is dynamic shared memory.
        inputs: (type, values), a value for each thread, or fewer, which are repeated.
        outputs: types.
        threads, blocks: of a block, and of the grid.
        shared_bytes: dynamic shared memory.
        memory: (name, array, writable) of further global memory; its address is the parameter of that name.
        variables: declarations before the kernel.
        options: of `machine.run`.
    """
    arrays = [np.resize(_array(values, kind), threads) for kind, values in inputs]
    results = [np.zeros(threads, DTYPES["u8" if kind == "pred" else kind]) for kind in outputs]
    names = [*LETTERS[: len(arrays)], *(f"d{i}" for i in range(len(results)))]
    kinds = [*(kind for kind, _ in inputs), *outputs]
    text = HEAD.format(
        variables=variables,
        parameters=", ".join(f".param .u64 {n}" for n in [*(f"of_{name}" for name in names), *(m[0] for m in memory)]),
        registers="\n".join(f".reg .b{max(16, BITS[k])} %{n};" for n, k in zip(names, kinds, strict=True)),
    )

    def access(name: str, kind: str) -> str:
        size = max(1, BITS[kind] // 8)
        return (
            f"ld.param.u64 %start, [of_{name}];\ncvta.to.global.u64 %global, %start;\n"
            f"mul.wide.u32 %offset, %thread, {size};\nadd.s64 %address, %global, %offset;\n"
        )

    for name, kind in zip(names[: len(arrays)], kinds, strict=False):
        text += access(name, kind) + f"ld.global.b{BITS[kind]} %{name}, [%address];\n"
    text += body + "\n"
    for name, kind in zip(names[len(arrays) :], outputs, strict=True):
        text += access(name, kind) + f"st.global.b{max(8, BITS[kind])} [%address], %{name};\n"
    held = [*arrays, *results]
    buffers = [Buffer(n, x.view(np.uint8), n.startswith("d")) for n, x in zip(names, held, strict=True)]
    buffers += [Buffer(n, x.reshape(-1).view(np.uint8), writable) for n, x, writable in memory]
    addresses = [x.ctypes.data for x in [*held, *(m[1] for m in memory)]]
    machine.run(
        *(parse(text + "ret;\n}\n")["tested"], (blocks, 1, 1), (threads, 1, 1)),
        *(struct.pack(f"{len(addresses)}Q", *addresses), buffers, shared_bytes),
        **options,
    )
    return results
