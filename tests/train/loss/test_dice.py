"""The soft Dice loss: hand-made numbers, a plain rendering, gradients, batches in which classes or labels lack."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.train.loss.dice import dice_loss
from tests.train.loss.pixel_cases import dice_loop, random_case


def test_numbers_by_hand() -> None:
    # p = 3/4 and 1/4 at each of two labelled pixels; one is of class 0, the other of class 1.
    logits = torch.tensor([math.log(3.0), 0.0, -1e9], dtype=torch.float64).reshape(1, 3, 1).expand(1, 3, 3)
    label = torch.tensor([[0, 1, 255]])
    # Class 0: (2 * 3/4 + 1) / (3/2 + 1 + 1), class 1: (2 * 1/4 + 1) / (1/2 + 1 + 1); class 2 does not occur.
    assert dice_loss(logits, label).item() == pytest.approx(1 - (2.5 / 3.5 + 1.5 / 2.5) / 2, rel=1e-12)
    perfect = torch.tensor([[[80.0, -80.0], [-80.0, 80.0]]])
    assert dice_loss(perfect, torch.tensor([[0, 1]])).item() == pytest.approx(0, abs=1e-6)
    # Everything is the other class: (0 + 1) / (1 + 1 + 1) for each.
    assert dice_loss(perfect, torch.tensor([[1, 0]])).item() == pytest.approx(2 / 3, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    size=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    ignored=st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    classes=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_it_equals_a_plain_rendering(size: tuple[int, ...], ignored: float, classes: int, seed: int) -> None:
    logits, label = random_case(seed, ignored=ignored, size=size)
    label = label.where(label == 255, label % classes)
    logits.requires_grad_()
    loss = dice_loss(logits, label)
    assert loss.item() == pytest.approx(dice_loop(logits.detach(), label), rel=1e-11, abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kept", [5, 2, 1])
def test_gradients_are_those_of_finite_differences(kept: int) -> None:
    logits, label = random_case(2, size=(2, 3))
    label = label.where(label == 255, label % kept)
    assert torch.autograd.gradcheck(lambda scores: dice_loss(scores, label), logits.requires_grad_())


def test_without_a_labelled_pixel_loss_and_gradients_are_zero() -> None:
    logits, label = random_case(3)
    loss = dice_loss(logits.requires_grad_(), torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_pixels_change_nothing() -> None:
    logits, label = random_case(4)
    other = torch.where((label == 255)[:, None], -7 * logits + 3, logits)
    assert torch.equal(dice_loss(logits, label), dice_loss(other, label))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, label = random_case(5, size=(16, 16))
    half = logits.to(dtype)
    loss = dice_loss(half, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dice_loop(half.double(), label), rel=1e-5)


def test_logits_of_another_size_are_refused() -> None:
    logits, label = random_case(6)
    with pytest.raises(ValueError, match="dice_loss: label must have the shape"):
        dice_loss(logits[..., :3], label)
