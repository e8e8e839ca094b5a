"""Crossings of host memory leave it where it is; arrays/ has those of devices, behind `ccgpu.cca`."""

import numpy as np
import pytest
import torch

from ccgpu import interchange


def address_of(x):
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return np.asarray(x).ctypes.data


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3), ()])
def test_crossings_of_host_memory_do_not_copy(shape):
    tensor, array = torch.randn(shape), np.random.default_rng(0).standard_normal(shape)
    read_only = array.copy() if shape else np.array(1.0)
    read_only.flags.writeable = False
    crossings = [(interchange.numpy_view, tensor), (interchange.from_numpy, array), (interchange.from_any_numpy, array)]
    for cross, x in [*crossings, (interchange.from_any_numpy, read_only), (interchange.from_exporter, array)]:
        crossed = cross(x)
        assert address_of(crossed) == address_of(x) or 0 in shape
        assert tuple(crossed.shape) == shape
        np.testing.assert_array_equal(np.asarray(crossed), np.asarray(x))
    assert interchange.address(tensor) == tensor.data_ptr()


def test_tensor_that_requires_a_gradient_has_a_numpy_view():
    x = torch.zeros(2, requires_grad=True)
    assert interchange.numpy_view(x).ctypes.data == x.data_ptr()
