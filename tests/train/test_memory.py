"""Bytes that forward saves, on modules where they are known; tests/benchmarks/test_measure.py has more peaks."""

import pytest
import torch
from torch import Tensor, nn

from ccgpu.train.memory import Enter, counted_peak, peak_bytes, peak_bytes_of_parts, saved_bytes, saved_bytes_of_parts


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


def test_peaks_of_parts_are_what_is_held_while_they_run() -> None:
    def call(enter: Enter) -> None:
        enter("first")
        x = torch.ones(100_000)
        enter("second")
        y = x + 1
        del x, y
        enter("third")
        torch.ones(300_000)
        enter("first")
        torch.ones(10)

    peaks = peak_bytes_of_parts(call, torch.device("cpu"))
    for part, expected in (("first", 400_000), ("second", 800_000), ("third", 1_200_000)):
        assert expected <= peaks[part] < expected + 100_000


def test_saved_bytes_belong_to_the_part_that_saves_first() -> None:
    x = torch.randn(10, 100, requires_grad=True)

    def call(enter: Enter) -> None:
        enter("first")
        y = x.exp()
        enter("second")
        y.view(-1).sin().cos()

    assert saved_bytes_of_parts(call, nn.Identity()) == {"first": x.nbytes, "second": x.nbytes}


def test_counted_peak_is_what_exists_at_once() -> None:
    def call(device: str) -> None:
        x = torch.ones(1000, 100, device=device)
        y = x + 1
        z = y.view(-1)[:10]  # keeps y
        del x, y
        (z.sum() + torch.ones(1000, 150, device=device)).sum()

    # x and y; then y, and the two of 1.5 times its size
    assert counted_peak(lambda: call("meta")) == pytest.approx(4 * 100_000 * (1 + 1.5 + 1.5), abs=100)
