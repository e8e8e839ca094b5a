"""What forward keeps, counted on modules whose needs are known; peaks: tests/benchmarks/test_measure.py."""

import torch
from torch import Tensor, nn

from ccgpu.train.memory import peak_bytes, saved_bytes


class Chain(nn.Module):
    """exp keeps its result, sin its argument; both are the same memory here, and so is the view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp().view(-1).sin()


def test_memory_is_counted_once() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(Chain(), x) == x.nbytes


def test_input_is_counted_where_it_is_kept_and_parameters_are_not() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(nn.Linear(100, 7), x) == x.nbytes
    assert saved_bytes(nn.Sequential(nn.Linear(100, 7), nn.Linear(7, 3)), x) == x.nbytes + 10 * 7 * 4
    assert saved_bytes(nn.Flatten(), x) == 0


def test_a_norm_on_running_statistics_keeps_its_input_and_not_its_buffers() -> None:
    norm, x = nn.BatchNorm2d(100).eval(), torch.randn(2, 100, 3, 3, requires_grad=True)
    assert saved_bytes(norm, x) == x.nbytes


def test_a_view_keeps_the_whole_of_its_memory() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    assert saved_bytes(nn.Linear(50, 7), x[:, :50]) == x.nbytes


def test_counting_works_where_gradients_are_off() -> None:
    x = torch.randn(10, 100, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(Chain(), x) == x.nbytes


def test_peak_comes_with_the_result() -> None:
    x = torch.ones(100_000)
    peak, total = peak_bytes(lambda: (x + 1).sum(), torch.device("cpu"))
    assert total.item() == 200_000
    assert x.nbytes <= peak < 1.2 * x.nbytes
