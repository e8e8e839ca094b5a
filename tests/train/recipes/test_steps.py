"""Three steps of a preset's training give the weights of a loop written by hand around the published network."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ccgpu.models import published
from ccgpu.models.labels import Labels
from ccgpu.models.precision import Precision
from ccgpu.train import engine
from ccgpu.train.optimisation.update import Update
from ccgpu.train.runs.settings.loss import LossSettings
from ccgpu.train.runs.settings.network import NetworkSettings
from ccgpu.train.runs.settings.optimisation import OptimisationSettings
from ccgpu.train.runs.setup import build_network, build_optimisation
from tests.models.published_files import AUXILIARY, CLASSES, HEAD, State
from tests.train.recipes.published import TRAININGS, Training

STEPS = 3
LABELS = Labels(tuple("abcdefg"), np.arange(21, dtype=np.uint8).reshape(7, 3), tuple(range(CLASSES)), void=(255,))
# The networks of ADE20K and VOC differ from that of mmseg-512x1024 in the number of classes alone.
DIFFERENT = TRAININGS[:3]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Images in 0..255, red, green, blue, and their labels, in which the images have different shares of ignored.

    Of the size, the max-pool sees even numbers, which it rounds up or down.
    """
    generator = torch.Generator().manual_seed(1)
    drawn = []
    for _ in range(STEPS):
        images = torch.randint(256, (2, 3, 28, 44), generator=generator).double()
        label = torch.randint(CLASSES, (2, 28, 44), generator=generator)
        label[0, :6] = label[:, :, 33:] = 255
        drawn.append((images, label))
    return drawn


def trained_by_hand(training: Training, state: State) -> list[float]:
    """Take the steps in place, by SGD with momentum 0.9, and return their losses."""
    weights = [value for name, value in state.items() if value.is_floating_point() and "running" not in name]
    velocities = [torch.zeros_like(weight) for weight in weights]
    losses = []
    for rate, (images, label) in zip(training.rates(STEPS), batches(), strict=True):
        for weight in weights:
            weight.requires_grad_()
        loss = training.loss(*training.network(state, images), label)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        for weight, velocity, gradient in zip(weights, velocities, gradients, strict=True):
            weight.requires_grad_(False)
            velocity.mul_(0.9).add_(gradient + training.weight_decay * weight)
            weight.sub_(rate * velocity)
    return losses


@pytest.mark.parametrize("training", DIFFERENT, ids=str)
def test_steps_give_the_weights_of_the_published_loop(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCGPU_BACKEND", "torch")  # the others compile their kernels for float64 first
    changes: dict[str, Any] = {"backbone": "resnet50", "head_channels": HEAD, "dropout": 0.0}
    if training.settings().auxiliary_channels is not None:
        changes["auxiliary_channels"] = AUXILIARY
    settings = training.settings(iterations=STEPS, batch=2, **changes)
    dataset = dataclasses.replace(training.module.DATASET, labels=LABELS)
    state = {name: value.double() if value.is_floating_point() else value for name, value in training.state().items()}
    layout = published.recognise(state, {})
    assert layout is not None
    cpu = torch.device("cpu")
    net = build_network(settings, dataset, cpu, pretrained=False).double()
    weights, problems = published.translate(layout, state, net.state_dict())
    assert problems == []
    net.load_state_dict(net.state_dict() | weights)

    expected = trained_by_hand(training, state)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (net.backbone.mean, net.backbone.std))
    precision = Precision(cpu, settings.amp, settings.channels_last)
    _, optimiser, _ = build_optimisation(settings, net)
    rates, criterion = settings.learning_rates(), settings.criterion(None)
    update = Update(net, optimiser, precision.scaler(), precision, rates, criterion, settings.accumulate)
    steps = engine.train(update, [{"image": (images - mean) / std, "label": label} for images, label in batches()])
    assert [step.loss for step in steps] == pytest.approx(expected, rel=1e-10)

    # InPlaceABN's weights are trained as |weight| + 1e-5, whose weight decay leaves the 1e-5 out.
    close = 1e-9 if training.preset == "authors" else 1e-12
    trained = net.state_dict()
    wanted = {n: x for n, x in published.translate(layout, state, trained)[0].items() if x.is_floating_point()}
    torch.testing.assert_close({name: trained[name] for name in wanted}, wanted, rtol=close, atol=close)


def test_the_other_presets_train_the_same_network_with_the_same_loss_and_optimiser() -> None:
    reference = TRAININGS[1].settings()
    names = [
        field.name
        for group in (NetworkSettings, LossSettings, OptimisationSettings)
        for field in dataclasses.fields(group)
        if field.name not in ("iterations", "batch")
    ]
    for training in TRAININGS[3:]:
        settings = training.settings()
        assert {name: getattr(settings, name) for name in names} == {name: getattr(reference, name) for name in names}
