import copy
from typing import Any

import pytest
import torch
from torch import nn

from ccgpu.train.optimisation.optimisers import build_optimiser, set_learning_rate, state_problems


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def network() -> Net:
    torch.manual_seed(0)
    return Net().double()


def compute_gradients(net: nn.Module) -> None:
    """Give the parameters the gradient of the same loss at each call."""
    net.zero_grad()
    generator = torch.Generator().manual_seed(3)
    net(torch.randn(5, 4, generator=generator, dtype=torch.float64)).square().sum().backward()


def step(net: nn.Module, optimiser: torch.optim.Optimizer, lr: float) -> None:
    compute_gradients(net)
    set_learning_rate(optimiser, lr)
    optimiser.step()


RATES = (0.02, 0.01, 0.005)


@pytest.mark.parametrize("head_lr", [1.0, 10.0])
def test_sgd_takes_the_steps_of_its_formula(head_lr: float) -> None:
    net, reference = network(), network()
    optimiser = build_optimiser(net, net.backbone, "sgd", lr=9.0, momentum=0.8, weight_decay=0.1, head_lr=head_lr)
    velocity = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for lr in RATES:
        step(net, optimiser, lr)
        compute_gradients(reference)
        with torch.no_grad():
            for name, p in reference.named_parameters():
                assert p.grad is not None
                velocity[name] = 0.8 * velocity[name] + p.grad + 0.1 * p
                p -= lr * (head_lr if name.startswith("head") else 1.0) * velocity[name]
    for (name, value), expected in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("head_lr", [1.0, 10.0])
def test_adamw_takes_the_steps_of_its_formula(head_lr: float) -> None:
    net, reference = network(), network()
    optimiser = build_optimiser(net, net.backbone, "adamw", lr=9.0, momentum=0.8, weight_decay=0.1, head_lr=head_lr)
    mean = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    square = copy.deepcopy(mean)
    for number, lr in enumerate(RATES, 1):
        step(net, optimiser, lr)
        compute_gradients(reference)
        with torch.no_grad():
            for name, p in reference.named_parameters():
                assert p.grad is not None
                rate = lr * (head_lr if name.startswith("head") else 1.0)
                mean[name] = 0.8 * mean[name] + 0.2 * p.grad
                square[name] = 0.999 * square[name] + 0.001 * p.grad**2
                change = (mean[name] / (1 - 0.8**number)) / ((square[name] / (1 - 0.999**number)).sqrt() + 1e-8)
                p -= rate * 0.1 * p + rate * change
    for (name, value), expected in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_parameters_that_are_not_trained_are_left_out() -> None:
    net = network()
    net.backbone.requires_grad_(False)
    optimiser = build_optimiser(net, net.backbone, "sgd", lr=0.1, momentum=0.9, weight_decay=0.1, head_lr=3.0)
    assert [len(group["params"]) for group in optimiser.param_groups] == [2]
    before = copy.deepcopy(net.state_dict())
    step(net, optimiser, 0.1)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.3)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="must have parameters to train"):
        build_optimiser(net, net.backbone, "sgd", lr=0.1, momentum=0.9, weight_decay=0.1)


def test_an_unknown_optimiser_is_told() -> None:
    net = network()
    with pytest.raises(ValueError, match="name must be one of sgd, adamw, got 'adam'"):
        build_optimiser(net, net.backbone, "adam", lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((), None, "no state of the parameters"),
        ((0,), None, "another state for parameter 0"),
        ((0, "exp_avg"), None, "another state for parameter 0"),
        ((1, "exp_avg"), torch.zeros(2), "another state for parameter 1"),
        ((1, "exp_avg_sq"), torch.zeros(3).to_sparse(), "another state for parameter 1"),
        ((2, "step"), torch.zeros(1), "another state for parameter 2"),
        ((2, "step"), 3, "another state for parameter 2"),
        ((1, "exp_avg"), torch.tensor([0, float("nan"), 0]), "NaN or infinity in the exp_avg of parameter 1"),
        ((1, "exp_avg_sq"), torch.tensor([0, float("inf"), 0]), "NaN or infinity in the exp_avg_sq of parameter 1"),
        ((1, "exp_avg_sq"), torch.tensor([0, -1.0, 0]), "negative values in the exp_avg_sq of parameter 1"),
        ((3, "step"), torch.tensor(-1.0), "negative values in the step of parameter 3"),
    ],
)
def test_a_state_of_adamw_that_does_not_fit_is_told(path: tuple[Any, ...], value: Any, message: str) -> None:
    net = network()
    optimiser = build_optimiser(net, net.backbone, "adamw", lr=0.01, momentum=0.9, weight_decay=0.1)
    step(net, optimiser, 0.01)
    saved = copy.deepcopy(optimiser.state_dict())
    assert state_problems(optimiser, saved) == []
    inner, keys = saved, ("state", *path)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    assert state_problems(optimiser, saved) == [message]


def test_a_state_of_sgd_is_none_of_adamw() -> None:
    net = network()
    sgd = build_optimiser(net, net.backbone, "sgd", lr=0.01, momentum=0.9, weight_decay=0.1)
    adamw = build_optimiser(net, net.backbone, "adamw", lr=0.01, momentum=0.9, weight_decay=0.1)
    step(net, sgd, 0.01)
    assert len(state_problems(adamw, sgd.state_dict())) == 4
