import pytest
import torch
from torch import nn

from ccgpu.train.optimisation.averaging import Average


def test_the_average_of_numbers_by_hand() -> None:
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(8.0)
    average = Average(net, 0.5)
    for step, value, expected in (
        (0, 1.0, 0.1 * 8 + 0.9 * 1),  # (1 + 0) / (10 + 0) = 0.1
        (2, 4.0, 0.25 * 1.7 + 0.75 * 4),  # 3 / 12
        (8, 0.0, 0.5 * 3.425),  # 9 / 18 = 0.5, the decay
        (1000, 1.0, 0.5 * 1.7125 + 0.5),  # no more than the decay
    ):
        with torch.no_grad():
            net.weight.fill_(value)
        average.update(net, step)
        assert average.net.weight.item() == pytest.approx(expected, rel=1e-6)
        assert net.weight.item() == value


def test_statistics_are_averaged_and_counters_copied() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2))
    average = Average(net, 0.9)
    net(torch.randn(3, 2, 4, 4) + 5)
    average.update(net, 8)
    own, new = average.net.state_dict(), net.state_dict()
    torch.testing.assert_close(own["0.running_mean"], 0.5 * new["0.running_mean"])
    torch.testing.assert_close(own["0.running_var"], 0.5 + 0.5 * new["0.running_var"])
    assert own["0.num_batches_tracked"] == 1


def test_the_copy_is_in_eval_mode_without_gradients_and_shares_no_memory() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    average = Average(net, 0.9)
    assert net.training
    assert not any(module.training for module in average.net.modules())
    assert not any(parameter.requires_grad for parameter in average.net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())
    addresses = {value.data_ptr() for value in net.state_dict().values()}
    assert not addresses & {value.data_ptr() for value in average.net.state_dict().values()}


def test_a_copy_is_compiled_where_the_network_is() -> None:
    net = nn.Linear(2, 2)
    net.compile()
    assert Average(net, 0.9).net._compiled_call_impl is None
    assert Average(net, 0.9, compiled=True).net._compiled_call_impl is not None


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_a_decay_out_of_range_is_told(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be between 0 and 1"):
        Average(nn.Linear(1, 1), decay)
