"""The tests of tests/cuda_on_cpu/test_primitives.py on a GPU: its instructions do what their CPU models do.

There each CPU model of a function of kernels/cuda/primitives.cuh is compared with its definition; here the GPU's
instructions are, by the same tests and kernels. Properties that only the model has (orders of threads, NaN in fresh
shared memory) are left out.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ccgpu.bridges.cupy_cuda.launch import compiler_options
from ccgpu.kernels.cuda.configurations import FOLDER

MODELS = Path(__file__).resolve().parents[1] / "cuda_on_cpu" / "test_primitives.py"
INCLUDE = '#include "primitives.cuh"'


def load_tests():
    """Return the module of the models' tests, imported by its path."""
    spec = importlib.util.spec_from_file_location("tests_of_the_models", MODELS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load_tests()

test_multiply_is_the_product = models.test_multiply_is_the_product
test_multiply_carries_infinities_and_nan = models.test_multiply_carries_infinities_and_nan
test_matrix_loads = models.test_matrix_loads
test_quotients_and_numbers_above_zero = models.test_quotients_and_numbers_above_zero
test_uniform_number_is_that_of_the_first_lane = models.test_uniform_number_is_that_of_the_first_lane
test_unpack_every_pattern = models.test_unpack_every_pattern
test_pack_f16_rounds_to_nearest_even = models.test_pack_f16_rounds_to_nearest_even
test_pack_bf16_rounds_to_nearest_even = models.test_pack_bf16_rounds_to_nearest_even
test_pack_undoes_unpack = models.test_pack_undoes_unpack
test_tf32_rounds_to_nearest_ties_away = models.test_tf32_rounds_to_nearest_ties_away
test_hide_changes_nothing = models.test_hide_changes_nothing
test_blocks_wait_for_earlier_blocks = models.test_blocks_wait_for_earlier_blocks


def test_matrix_stores_are_the_reverse_of_loads(library):
    import cupy

    if int(cupy.cuda.Device().compute_capability) < 90:
        pytest.skip("GPUs before Hopper have no matrix stores")
    models.test_matrix_stores_are_the_reverse_of_loads(library)


def test_copies_arrive_and_invalid_ones_are_zeros(library):
    models.test_copies_arrive_and_invalid_ones_are_zeros(library, "forward")


@pytest.mark.parametrize("warps", [1, 3, 32])
def test_sum_of_a_block(library, warps):
    models.test_sum_of_a_block(library, "forward", warps)


@pytest.mark.parametrize("threads", [32, 48, 16])
def test_shuffles_of_parts_of_a_warp(library, threads):
    models.test_shuffles_of_parts_of_a_warp(library, "forward", threads)


class DeviceLibrary:
    """Kernels on the GPU, with the interface of `device.Library`: arrays are copied to the GPU and back."""

    def __init__(self, source, options):
        import cupy

        self._cupy = cupy
        self._module = cupy.RawModule(code=source, options=options, backend="nvrtc")

    def launch(self, entry, grid, block, arguments, shared_bytes=0, buffers=(), order="forward"):
        """Run one kernel; addresses of buffers in the arguments are replaced by those of their copies on the GPU."""
        copies = [self._cupy.asarray(array.reshape(-1).view(np.uint8)) for _, array, _ in buffers]
        packed = bytearray(arguments)
        for at in range(0, len(packed) - 7, 8):
            address = int.from_bytes(packed[at : at + 8], "little")
            for (_, array, _), copy in zip(buffers, copies, strict=True):
                if array.ctypes.data <= address < array.ctypes.data + array.nbytes:
                    there = copy.data.ptr + address - array.ctypes.data
                    packed[at : at + 8] = there.to_bytes(8, "little")
        function = self._module.get_function(entry)
        # An array of one element is passed by value; a void element can be a struct of any size.
        struct = np.ndarray((), f"V{len(packed)}", bytes(packed))
        function((grid,), (block,), (struct,), shared_mem=shared_bytes)
        self._cupy.cuda.get_current_stream().synchronize()
        for (_, array, writable), copy in zip(buffers, copies, strict=True):
            if writable:
                array.reshape(-1).view(np.uint8)[:] = copy.get()


@pytest.fixture(scope="module")
def library(kernels):
    return DeviceLibrary(
        models.SOURCE.replace(INCLUDE, (FOLDER / "primitives.cuh").read_text(encoding="utf-8")), compiler_options()
    )


def test_powers_and_logarithms(library):
    """The approximate float instructions are good to 2 units in the last place, the double ones to one."""
    models.check_powers_and_logarithms(library, 2.0**-22, 4e-16, atol=2.0**-22)


def test_every_kernel_of_the_models_is_tried():
    """A primitive that gets a kernel there must get a test here, or a reason among these."""
    of_the_model_alone = {"indices", "turns", "uninitialised"}
    tried = {
        *("multiply_f16", "multiply_bf16", "multiply_tf32", "load_rows", "load_columns", "copy", "pack_f16"),
        *("pack_bf16", "unpack_f16", "unpack_bf16", "round_to_tf32", "powers_float", "powers_double", "hidden"),
        *("chain", "sum_block", "shuffles", "store_rows", "quotients_float", "quotients_double", "uniform_numbers"),
    }
    assert tried | of_the_model_alone == set(models.ENTRIES)
