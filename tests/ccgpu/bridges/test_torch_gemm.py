"""Temporaries of the backend `cpu`: bounded for any size of the map, and small compared with all its energies."""

import torch

import ccgpu
from benchmarks.measure import peak_bytes
from ccgpu.bridges.torch_gemm import lines


def results(*tensors):
    return sum(x.nbytes for x in tensors)


def test_energies_of_a_large_map_are_never_in_memory_at_once():
    q, v = torch.randn(1, 4, 320, 300), torch.randn(1, 4, 320, 300)
    energies = 320 * 300 * (320 + 300) * 4
    assert energies > 3 * lines.CPU_LIMITS.cache
    temporaries = peak_bytes(lambda: ccgpu.cca(q, q, v)) - results(v)
    assert temporaries < energies / 10
    q.requires_grad_()
    temporaries = peak_bytes(lambda: torch.autograd.grad(ccgpu.cca(q, q, v).sum(), q)) - results(v, q, q, v)
    assert temporaries < energies / 10


def test_energies_of_a_long_line_are_never_in_memory_at_once():
    q = torch.randn(1, 4, 6000)
    assert peak_bytes(lambda: ccgpu.cca(q, q, q)) < 6000 * 6000 * 4 / 10
