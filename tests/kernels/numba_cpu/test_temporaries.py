"""How much memory the CPU kernels compute in."""

import tracemalloc

import pytest
import torch

from ccgpu.kernels.numba_cpu import calls, scratch
from tests.kernels.numba_cpu.problems import DTYPES, LAYOUTS, arrays_of, problem_of

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "float16"])


# Temporaries ----------------------------------------------------------------------------------------------------------


def temporaries(call):
    """Return the peak bytes that a call holds beyond its results, none of them kept from earlier calls."""
    scratch.give_back(scratch.Block(0))
    tracemalloc.start()
    try:
        results = call()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - sum(x.nbytes for x in results)


@pytest.mark.parametrize(("order", "limit"), [("channels last", 4e6), ("contiguous", 16e6)])
def test_temporaries_are_small(order, limit):
    problem = problem_of((97, 97), torch.float32, batch=1, d=64, c=512)
    q, k, v, dout, dlse = (LAYOUTS[order](x) for x in arrays_of(problem))
    out, lse = calls.forward(q, k, v, threads=1)  # so that nothing is compiled or loaded during the measurement
    calls.backward(dout, q, k, v, out, lse, dlse, threads=1)
    assert temporaries(lambda: calls.forward(q, k, v, threads=1)) < limit
    assert temporaries(lambda: calls.backward(dout, q, k, v, out, lse, dlse, threads=1)) < limit


def test_energies_of_a_long_line_are_never_held_together():
    q, k, v, dout, dlse = arrays_of(problem_of((6000,), torch.float32, batch=1, d=4, c=4))
    out, lse = calls.forward(q, k, v, threads=1)
    all_energies = 6000 * 6000 * 4
    assert temporaries(lambda: calls.forward(q, k, v, threads=1)) < all_energies / 8
    assert temporaries(lambda: calls.backward(dout, q, k, v, out, lse, dlse, threads=1)) < all_energies / 8
