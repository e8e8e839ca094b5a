"""The dtypes of the op: one table, by name, for every library that has types of its own for them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np


class Dtype(NamedTuple):
    """What the library knows of a dtype of q, k and v."""

    energies: str  # dtype of energies, of lse and of all sums
    in_numpy: bool  # NumPy, and so Numba, has it without another package


DTYPES = {
    "float32": Dtype("float32", True),
    "bfloat16": Dtype("float32", False),
    "float16": Dtype("float32", True),
    "float64": Dtype("float64", True),
}
NUMPY_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.in_numpy)


@functools.cache  # NumPy takes microseconds to name a dtype
def energy_dtype(dtype: Any) -> np.dtype[Any]:
    """Return NumPy's dtype of energies, of lse and of all sums for arrays of `dtype`."""
    return np.dtype(DTYPES[np.dtype(dtype).name].energies)
