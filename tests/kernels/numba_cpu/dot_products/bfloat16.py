"""bfloat16 numbers in NumPy arrays of int16: their bits, and sizes filled up."""

import numpy as np


def bits(x):
    """Return the bits of x rounded to bfloat16, to nearest even."""
    words = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return rounded.astype(np.uint16).view(np.int16)


def values(x):
    """Return bfloat16 numbers as float32."""
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def up(n, multiple):
    """Return n rounded up to a multiple."""
    return -(-n // multiple) * multiple
