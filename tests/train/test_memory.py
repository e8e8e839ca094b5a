"""Bytes that forward saves, on modules where they are known; tests/benchmarks/test_measure.py has more peaks."""

import torch
from torch import Tensor, nn

from ccgpu.train.memory import peak_bytes, saved_bytes


class Chain(nn.Module):
    """exp saves its result and sin its argument; here both are one storage, which the view shares."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp().view(-1).sin()


def test_a_storage_counts_once() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(Chain(), x) == x.nbytes


def test_input_counts_where_it_is_saved_and_parameters_do_not() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(nn.Linear(100, 7), x) == x.nbytes
    assert saved_bytes(nn.Sequential(nn.Linear(100, 7), nn.Linear(7, 3)), x) == x.nbytes + 10 * 7 * 4
    assert saved_bytes(nn.Flatten(), x) == 0


def test_a_norm_on_running_statistics_saves_its_input_and_not_its_buffers() -> None:
    norm, x = nn.BatchNorm2d(100).eval(), torch.randn(2, 100, 3, 3, requires_grad=True)
    assert saved_bytes(norm, x) == x.nbytes


def test_a_view_saves_its_whole_storage() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(nn.Linear(50, 7), x[:, :50]) == x.nbytes


def test_counting_works_where_gradients_are_off() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(Chain(), x) == x.nbytes


def test_peak_is_returned_with_the_result() -> None:
    x = torch.ones(100_000)
    peak, total = peak_bytes(lambda: (x + 1).sum(), torch.device("cpu"))
    assert total.item() == 200_000
    assert x.nbytes <= peak < 1.2 * x.nbytes
