"""The losses of the presets are those of the published code, on the same logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccgpu.models.ccnet import Outputs
from tests.train.recipes import authors
from tests.train.recipes.published import TRAININGS, Training


def case(images: int = 2, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Both heads' logits, smooth as upsampled ones are, and labels with different shares of ignored pixels."""
    generator = torch.Generator().manual_seed(images)
    coarse = torch.randn(2, images, 5, 6, 8, generator=generator, dtype=torch.float64) * sharpness
    logits, auxiliary = (F.interpolate(x, (41, 57), mode="bilinear", align_corners=True) for x in coarse)
    label = logits.argmax(1)
    drawn = torch.randint(5, label.shape, generator=generator)
    label = torch.where(torch.rand(label.shape, generator=generator) < 0.4, drawn, label)
    for index in range(images):
        label[index, : 5 * index + 2] = 255
    return logits, auxiliary, label


def compared(training: Training, expected: Tensor, ours: Tensor, logits: tuple[Tensor, ...]) -> None:
    """Compare two losses of the same logits, and their gradients."""
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12), str(training)
    for mine, theirs in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("training", TRAININGS, ids=str)
def test_losses_equal_the_published_ones(training: Training) -> None:
    logits, auxiliary, label = case()
    logits.requires_grad_()
    auxiliary.requires_grad_()
    ours = training.settings().criterion(None)(Outputs(logits, auxiliary), label).total
    compared(training, training.loss(logits, auxiliary, label), ours, (logits, auxiliary))


@pytest.mark.parametrize("kept", [0, 640, 64 * 30, 10**6])
def test_the_authors_hard_pixels_of_one_process_are_ours(kept: int) -> None:
    logits, auxiliary, label = case()
    logits.requires_grad_()
    auxiliary.requires_grad_()
    criterion = TRAININGS[0].settings(ohem=(0.7, float(kept))).criterion(None)
    expected = authors.ohem_loss(logits, auxiliary, label, 0.7, kept)
    compared(TRAININGS[0], expected, criterion(Outputs(logits, auxiliary), label).total, (logits, auxiliary))


def test_four_processes_that_keep_100000_pixels_each_are_ours_with_400000() -> None:
    """Where the threshold 0.7 keeps enough pixels in each process, it is the limit of all of them, and so ours."""
    logits, auxiliary, label = case(8, sharpness=1.0)
    kept = 64 * 10
    criterion = TRAININGS[0].settings(ohem=(0.7, 4.0 * kept)).criterion(None)
    main = criterion(Outputs(logits, auxiliary), label).parts["main"].item()
    means, counts = [], []
    for share in range(0, 8, 2):
        own = slice(share, share + 2)
        hard = authors.hard_label(logits[own], label[own], 0.7, kept)
        assert 64 * 10 < int((hard != 255).sum()) < int((label[own] != 255).sum())
        means.append(F.cross_entropy(logits[own], hard, ignore_index=255).item())
        counts.append(int((hard != 255).sum()))
    # Ours is the mean over the hard pixels of all processes; theirs the mean of the processes' means.
    weighted = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    assert main == pytest.approx(weighted, rel=1e-12)
    assert main == pytest.approx(sum(means) / 4, rel=0.05)
