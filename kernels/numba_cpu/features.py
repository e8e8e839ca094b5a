"""The instructions that Numba compiles for, which need not be all that this CPU has.

NUMBA_CPU_NAME, NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX choose older ones, so that machine code can be shared with an
older machine. An intrinsic of LLVM for an instruction that it may not use ends the process, so everything that chooses
between instructions asks here.
"""

from __future__ import annotations

from numba import config
from numba.core.codegen import get_host_cpu_features


def compiled_for() -> frozenset[str]:
    """Return LLVM's names of the instruction sets that Numba compiles for, for example `avx512bf16`.

    Only those that are named count: what the CPU of NUMBA_CPU_NAME has besides NUMBA_CPU_FEATURES is left unused.
    """
    named = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    switches = [feature.strip() for feature in named.split(",")]  # "+name" or "-name"; the last one of a name holds
    last = {switch[1:]: switch[0] for switch in switches if switch[:1] in ("+", "-")}
    return frozenset(name for name, sign in last.items() if sign == "+")


FEATURES = compiled_for()
