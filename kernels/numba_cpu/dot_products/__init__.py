"""Kernels in bfloat16 for CPUs with dot-product instructions: products of pairs of numbers, sums in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from ccgpu.kernels.numba_cpu.features import FEATURES

AVAILABLE = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16"} <= FEATURES


def used_for(kept: Any) -> bool:
    """Tell whether forward and backward run on these kernels: on maps of bfloat16, if Numba compiles for AVX-512 BF16.

    Args:
        kept: NumPy's type that stands for the dtype of the maps in memory; np.int16 is bfloat16, see conversions.py.
    """
    return AVAILABLE and kept is np.int16
