"""The loss of the pixels: hand-made numbers, a plain loop, torch's own mean, gradients, the edges."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.train.loss.cross_entropy import PixelLoss
from tests.train.loss.pixel_cases import cross_entropy_loop, pixel_loss_loop, random_case

WEIGHTS = (0.5, 0.0, 2.0, 1.0, 3.25)
# Options of `PixelLoss` for five classes, and what `pixel_loss_loop` calls them.
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"class_weights": WEIGHTS}, {"weights": WEIGHTS}),
    ({"label_smoothing": 0.15}, {"smoothing": 0.15}),
    ({"class_weights": WEIGHTS, "label_smoothing": 0.4}, {"weights": WEIGHTS, "smoothing": 0.4}),
    ({"focal": 2.0}, {"focal": 2.0}),
    ({"focal": 0.5, "class_weights": WEIGHTS}, {"focal": 0.5, "weights": WEIGHTS}),
    ({"average": "all"}, {"average": "all"}),
    ({"average": "all", "class_weights": WEIGHTS}, {"average": "all", "weights": WEIGHTS}),
]


@pytest.mark.parametrize("size", [(3, 4), (7,), (2, 3, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_equals_a_plain_loop(seed: int, size: tuple[int, ...]) -> None:
    logits, label = random_case(seed, size=size)
    assert PixelLoss()(logits, label).item() == pytest.approx(cross_entropy_loop(logits, label), rel=1e-12)


def test_cross_entropy_gradient_is_that_of_the_mean() -> None:
    logits, label = random_case(3)
    logits.requires_grad_()
    PixelLoss()(logits, label).backward()
    valid = label != 255
    expected = torch.softmax(logits.detach(), dim=1)
    one_hot = F.one_hot(torch.where(valid, label, 0), 5).permute(0, 3, 1, 2)
    expected = (expected - one_hot) * valid[:, None] / valid.sum()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


def test_numbers_by_hand() -> None:
    # Two classes, p = 3/4 and 1/4 for the first; pixels of class 0, 1, and an ignored one.
    logits = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).reshape(1, 2, 1).expand(1, 2, 3)
    label = torch.tensor([[0, 1, 255]])
    sure, unsure = -math.log(3 / 4), -math.log(1 / 4)
    for options, expected in (
        ({}, (sure + unsure) / 2),
        ({"average": "all"}, (sure + unsure) / 3),
        ({"class_weights": (1.0, 4.0)}, (sure + 4 * unsure) / 5),
        ({"class_weights": (1.0, 4.0), "average": "all"}, (sure + 4 * unsure) / 6),
        ({"class_weights": (0.0, 4.0)}, unsure),
        ({"label_smoothing": 0.2}, (sure + unsure) / 2),  # of each 0.9 + 0.1
        ({"label_smoothing": 0.2, "class_weights": (1.0, 4.0)}, (sure + 4 * unsure) / 5),
        ({"focal": 2.0}, (sure / 16 + unsure * 9 / 16) / 2),
        ({"focal": 0.0}, (sure + unsure) / 2),
        ({"focal": 1.0, "class_weights": (2.0, 1.0)}, (2 * sure / 4 + unsure * 3 / 4) / 3),
    ):
        assert PixelLoss(**options)(logits, label).item() == pytest.approx(expected, rel=1e-12), options


@pytest.mark.parametrize(("ours", "plain"), OPTIONS)
@settings(max_examples=15, deadline=None)
@given(
    size=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_every_form_equals_a_plain_loop(
    ours: dict[str, Any], plain: dict[str, Any], size: tuple[int, ...], ignored: float, seed: int
) -> None:
    logits, label = random_case(seed, ignored=ignored, size=size)
    logits.requires_grad_()
    loss = PixelLoss(**ours)(logits, label)
    assert loss.item() == pytest.approx(pixel_loss_loop(logits.detach(), label, **plain), rel=1e-11, abs=1e-14)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("ours", "plain"), OPTIONS)
def test_gradients_are_those_of_finite_differences(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    logits, label = random_case(1, size=(2, 3))
    assert torch.autograd.gradcheck(lambda scores: PixelLoss(**ours)(scores, label), logits.requires_grad_())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_mean_is_torchs(weights: tuple[float, ...] | None, smoothing: float) -> None:
    logits, label = random_case(5)
    expected = F.cross_entropy(
        logits,
        label,
        None if weights is None else torch.tensor(weights).double(),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    got = PixelLoss(class_weights=weights, label_smoothing=smoothing)(logits, label)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_the_mean_over_all_pixels_is_mmsegmentations() -> None:
    """Its losses are computed pixel by pixel; 1.x divides by the weights of all pixels, and needs one for each."""
    logits, label = random_case(6)
    each = F.cross_entropy(logits, label, ignore_index=255, reduction="none")
    assert PixelLoss(average="all")(logits, label).item() == pytest.approx(each.mean().item(), rel=1e-12)
    whole = label.where(label != 255, 3)
    weights = torch.tensor(WEIGHTS).double()
    weighted = F.cross_entropy(logits, whole, weights, reduction="none").sum() / weights[whole].sum()
    got = PixelLoss(average="all", class_weights=WEIGHTS)(logits, whole)
    assert got.item() == pytest.approx(weighted.item(), rel=1e-12)


@pytest.mark.parametrize(("ours", "plain"), [({}, {}), *OPTIONS])
def test_without_a_pixel_that_counts_loss_and_gradients_are_zero(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    logits, label = random_case(4)
    logits.requires_grad_()
    unweighted = "class_weights" not in ours or ours.get("average") == "all"
    for target in [torch.full_like(label, 255), *([] if unweighted else [torch.ones_like(label)])]:  # 1 has weight 0
        logits.grad = None
        loss = PixelLoss(**ours)(logits, target)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("focal", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_focal_factor_of_sure_pixels_has_finite_gradients(focal: float, dtype: torch.dtype) -> None:
    gaps = torch.tensor([0.0, 1e-3, 5.0, 20.0, 80.0, 200.0, 1e4, -1e4], dtype=dtype)
    logits = torch.stack([gaps, -gaps])[None].requires_grad_()
    loss = PixelLoss(focal=focal)(logits, torch.zeros(1, len(gaps)).long())
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(logits.grad).all()
    # Pixels that are all but sure teach nothing; the wrong one teaches what it does in cross-entropy.
    assert (logits.grad[0, :, 5:7].abs() < 1e-30).all()
    assert logits.grad[0, 0, 7].item() == pytest.approx(-1 / len(gaps))


def test_the_focal_factor_of_nearly_sure_pixels_does_not_cancel() -> None:
    gap = torch.tensor([[[12.0], [0.0]]])
    doubt = 1 / (1 + math.exp(12.0))
    expected = doubt**2 * math.log1p(math.exp(-12.0))
    assert PixelLoss(focal=2.0)(gap, torch.zeros(1, 1).long()).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ours", "plain"), [({}, {}), *OPTIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(ours: dict[str, Any], plain: dict[str, Any], dtype: torch.dtype) -> None:
    logits, label = random_case(5)
    half = logits.to(dtype)
    loss = PixelLoss(**ours)(half, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pixel_loss_loop(half.double(), label, **plain), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"class_weights": WEIGHTS}, {"average": "all"}])
def test_losses_of_pieces_add_up_to_the_loss_of_the_batch(options: dict[str, Any]) -> None:
    logits, label = random_case(7)
    loss = PixelLoss(**options)
    divisor = loss.divisor(label)
    assert divisor.dtype == torch.float64
    pieces = [loss(logits[i : i + 1], label[i : i + 1], divisor) for i in range(2)]
    torch.testing.assert_close(sum(pieces), loss(logits, label), rtol=1e-12, atol=0)


def test_logits_of_another_size_are_refused() -> None:
    logits, label = random_case(6)
    with pytest.raises(ValueError, match=r"PixelLoss: label must have the shape.*got \(2, 3, 4\) for \(2, 5, 3, 3\)"):
        PixelLoss()(logits[..., :3], label)
    with pytest.raises(ValueError, match="a weight for each of the 5 classes of logits, got 2; pass 5"):
        PixelLoss(class_weights=(1.0, 2.0))(logits, label)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": (1.0, -0.5)}, r"class_weights must be finite numbers .* got \(1.0, -0.5\)"),
        ({"class_weights": (1.0, math.nan)}, "class_weights must be"),
        ({"class_weights": (1.0, math.inf)}, "class_weights must be"),
        ({"class_weights": (0.0, 0.0)}, "class_weights must be"),
        ({"label_smoothing": 1.0}, "label_smoothing must be 0 or more and below 1, got 1.0"),
        ({"label_smoothing": math.nan}, "label_smoothing must be"),
        ({"focal": -1.0}, "focal must be an exponent of 0 or more, got -1.0"),
        ({"focal": math.inf}, "focal must be"),
        ({"focal": 2.0, "label_smoothing": 0.1}, "label_smoothing must be 0 with focal, got 0.1"),
        ({"average": "valid"}, r"average must be one of \('labelled', 'all'\), got 'valid'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PixelLoss: .*{message}|PixelLoss: {message}"):
        PixelLoss(**options)
