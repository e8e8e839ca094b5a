"""The dtypes that the op takes: one table, by name, which every library's types and the kernels are looked up in."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np


class Dtype(NamedTuple):
    """Properties of a dtype of q, k and v."""

    energies: str  # dtype of energies, of lse and of all sums
    in_numpy: bool  # NumPy, and so Numba, has it without another package
    cuda: str  # its short name in the CUDA kernels


DTYPES = {
    "float32": Dtype("float32", True, "f32"),
    "bfloat16": Dtype("float32", False, "bf16"),
    "float16": Dtype("float32", True, "f16"),
    "float64": Dtype("float64", True, "f64"),
}
NUMPY_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.in_numpy)


@functools.cache  # NumPy takes microseconds to name a dtype
def energy_dtype(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's dtype of energies, of lse and of all sums for arrays of `dtype`."""
    return np.dtype(DTYPES[np.dtype(dtype).name].energies)
