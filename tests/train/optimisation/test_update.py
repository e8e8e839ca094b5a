"""Three steps of `Update` against loops of plain torch operations, in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccgpu.models.precision import Precision
from ccgpu.train.loss.criterion import Criterion
from ccgpu.train.optimisation.averaging import Average
from ccgpu.train.optimisation.update import Update

CPU = Precision(torch.device("cpu"))
LR = 0.3


def network(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Conv2d(4, 2, 1)
    ).double()


def batches() -> list[dict[str, torch.Tensor]]:
    """Return three batches of four images with other numbers of labelled pixels in each."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(3):
        label = torch.randint(0, 2, (4, 5, 5), generator=generator)
        for index in range(4):
            label[index, : index + number] = 255
        found.append({"image": torch.randn(4, 3, 7, 7, generator=generator, dtype=torch.float64), "label": label})
    return found


def update_of(net: nn.Module, scaler: torch.amp.GradScaler | None = None, **changes: Any) -> Update:
    optimiser = torch.optim.SGD(net.parameters(), lr=9.0, momentum=0.9)
    scaler = CPU.scaler() if scaler is None else scaler
    return Update(net, optimiser, scaler, CPU, lambda _: LR, Criterion(), **changes)


def three_steps(update: Update) -> list[float]:
    losses = []
    for iteration, batch in enumerate(batches()):
        assert update.begin(iteration) == LR
        losses.append(update.gradients(batch).total.item())
        update.apply(iteration)
    return losses


def plain_steps(net: nn.Module, pieces: int = 1, clip: float | None = None) -> list[float]:
    """Take the same steps by hand: the loss of the batch is the sum over its pieces, divided by its labelled pixels."""
    velocity = [torch.zeros_like(p) for p in net.parameters()]
    losses = []
    for batch in batches():
        loss = torch.zeros((), dtype=torch.float64)
        for piece in range(pieces):
            logits = net(batch["image"][piece::pieces])
            loss = loss + F.cross_entropy(logits, batch["label"][piece::pieces], ignore_index=255, reduction="sum")
        loss = loss / (batch["label"] != 255).sum()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).square().sum().sqrt().item()
        factor = 1.0 if clip is None or norm <= clip else clip / (norm + 1e-6)
        with torch.no_grad():
            for parameter, gradient, moving in zip(net.parameters(), gradients, velocity, strict=True):
                moving.mul_(0.9).add_(factor * gradient)
                parameter -= LR * moving
        losses.append(loss.item())
    return losses


def assert_equal_states(net: nn.Module, reference: nn.Module) -> None:
    for (name, value), expected in zip(net.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("norm", [False, True])
def test_pieces_of_a_batch_take_the_steps_of_a_plain_loop(pieces: int, norm: bool) -> None:
    net, reference = network(norm=norm), network(norm=norm)
    losses = three_steps(update_of(net, accumulate=pieces))
    assert losses == pytest.approx(plain_steps(reference, pieces), rel=1e-12)
    assert_equal_states(net, reference)


@pytest.mark.parametrize("pieces", [2, 4])
def test_without_batch_norm_pieces_change_nothing(pieces: int) -> None:
    whole, cut = network(), network()
    assert three_steps(update_of(cut, accumulate=pieces)) == pytest.approx(three_steps(update_of(whole)), rel=1e-12)
    assert_equal_states(cut, whole)


def test_a_piece_goes_through_the_network_at_a_time() -> None:
    net, seen = network(), []
    net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    update_of(net, accumulate=2).gradients(batches()[0])
    assert seen == [2, 2]
    with pytest.raises(ValueError, match="batch must hold a multiple of 3 samples, got 4"):
        update_of(net, accumulate=3).gradients(batches()[0])


@pytest.mark.parametrize(("clip", "cuts"), [(0.05, True), (1e6, False)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_long_gradient_is_scaled_to_the_norm(clip: float, cuts: bool, scaled: bool) -> None:
    """With a gradient scaler, as of fp16, it is the norm of the gradient before it was scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    net, reference, unclipped = network(), network(), network()
    three_steps(update_of(net, scaler, clip=clip, accumulate=2))
    plain_steps(reference, clip=clip)
    assert_equal_states(net, reference)
    plain_steps(unclipped)
    assert cuts != torch.allclose(unclipped[0].weight, reference[0].weight)


def test_a_step_whose_scaled_gradient_overflows_changes_no_weight() -> None:
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    update = update_of(net, scaler, clip=1.0)
    update.begin(0)
    update.gradients(batches()[0])
    assert net[0].weight.grad is not None
    net[0].weight.grad[0, 0, 0, 0] = torch.inf
    update.apply(0)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert scaler.get_scale() == 2.0**9


def test_frozen_modules_stay_in_eval_mode() -> None:
    net = network(norm=True)
    update = update_of(net, frozen=(net[1],))
    net.eval()
    update.begin(0)
    assert [module.training for module in net] == [True, False, True, True]


def test_the_average_follows_the_weights_after_each_step() -> None:
    net, reference = network(norm=True), network(norm=True)
    average = Average(net, 0.15)
    three_steps(update_of(net, average=average))
    expected = {name: value.clone() for name, value in reference.state_dict().items()}
    update = update_of(reference)
    for iteration, batch in enumerate(batches()):
        update.begin(iteration)
        update.gradients(batch)
        update.apply(iteration)
        keep = (0.1, 0.15, 0.15)[iteration]  # the smaller one of (1 + i) / (10 + i) and the decay
        for name, value in reference.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = keep * expected[name] + (1 - keep) * value if floating else value.clone()
    for name, value in average.net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    assert_equal_states(net, reference)
