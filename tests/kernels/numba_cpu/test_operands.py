"""Operands: memory described by address, shape, strides and dtype, as words and as maps."""

import numpy as np
import pytest
import torch

from ccgpu.kernels.numba_cpu.operands import Operand, channels_last, flat, itemsize, operand_of, words_of
from tests.kernels.numba_cpu.problems import LAYOUTS

NATIVE = [name for name in LAYOUTS if name != "big-endian"]
COPIED = {"in reverse", "Fortran", "records", "channels between axes", "images last"}
COPIED |= {"channels last in reverse", "misaligned", "misaligned channels last"}


def values(shape=(2, 3, 5, 7), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def read(layout, shape, size):
    """Return the words of `size` bytes that a map addresses, as (images, channels, positions)."""
    images, channels, positions = shape[0], shape[1], int(np.prod(shape[2:]))
    strides = (layout.image, layout.channel, layout.position)
    words = {2: "float16", 4: "float32", 8: "float64"}[size]
    return words_of(Operand(layout.address, (images, channels, positions), strides, words))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", NATIVE)
def test_words_of_every_layout(name, dtype):
    x = LAYOUTS[name](values(dtype=dtype))
    words = words_of(operand_of(x))
    assert words.strides == x.strides
    assert words.tobytes() == x.tobytes()


def test_words_of_bfloat16():
    x = torch.randn(2, 3, 5, 7).to(torch.bfloat16).movedim(1, -1).contiguous().movedim(-1, 1)
    operand = Operand(x.data_ptr(), tuple(x.shape), tuple(2 * n for n in x.stride()), "bfloat16")
    assert itemsize(operand) == 2
    np.testing.assert_array_equal(words_of(operand), x.view(torch.int16).numpy().view(np.uint16))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (1, 4, 6), (3, 2, 2, 3, 4), (2, 1, 5, 1), (1, 3, 1, 4)])
@pytest.mark.parametrize("name", NATIVE)
def test_map_has_the_words_of_the_operand(name, shape):
    x = LAYOUTS[name](values(shape))
    operand = operand_of(x)
    if flat(operand) is None:
        x = channels_last(words_of(operand))
        operand = operand._replace(address=x.ctypes.data, strides=x.strides)
    layout = flat(operand)
    assert layout.address == operand.address
    np.testing.assert_array_equal(read(layout, shape, 4), words_of(operand).reshape(*shape[:2], -1))


@pytest.mark.parametrize("name", NATIVE)
def test_maps_in_which_layouts_are_used_in_place(name):
    assert (flat(operand_of(LAYOUTS[name](values()))) is None) == (name in COPIED)


def test_empty_operands():
    x = np.empty((0, 3, 4, 5), np.float32)
    assert words_of(operand_of(x)).shape == x.shape
