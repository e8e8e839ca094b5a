"""A program for test_numba_cpu.py: cca in the workers of a data loader, in a process that has run it before.

    python -m tests.ccgpu.bridges.data_loading fork|spawn

Prints "same" if every result has the same bits as the parent's.
"""

import sys

import torch
from torch.utils.data import DataLoader, Dataset

import ccgpu
from ccgpu.kernels.numba_cpu import schedule

THREADS = 3


def attend(index):
    """Return cca and its gradients for the inputs of an index, on several threads even if they are small."""
    schedule.SMALL = 0
    torch.set_num_threads(THREADS)  # workers begin with one
    generator = torch.Generator().manual_seed(index)
    q, k, v = (torch.randn(1, c, 9 + index, 11, generator=generator).requires_grad_() for c in (8, 8, 16))
    out = ccgpu.cca(q, k, v, backend="numba_cpu")
    return torch.cat([x.detach().flatten() for x in (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))])


class Attended(Dataset):
    """The results of `attend`."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return attend(index)


def main():
    dataset = Attended()
    ours = [attend(index) for index in range(len(dataset))]
    number = {"fork": 2, "spawn": 1}[sys.argv[1]]  # a spawned worker imports torch first
    options = {"batch_size": None, "num_workers": number, "persistent_workers": True}
    loader = DataLoader(dataset, multiprocessing_context=sys.argv[1], **options)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(ours, loader, strict=True))
    assert all(torch.equal(a, attend(index)) for index, a in enumerate(ours))  # here again, after the workers
    print("same")


if __name__ == "__main__":
    main()
