import pytest
import torch

from ccgpu.models.ccnet import Outputs
from ccgpu.train.loss.criterion import AUXILIARY_WEIGHT, ConsistencyWeights, Criterion
from ccgpu.train.loss.cross_entropy import PixelLoss
from ccgpu.train.loss.hard_pixels import ohem_label
from tests.train.loss.consistency_reference import consistency_loop
from tests.train.loss.pixel_cases import cross_entropy_loop, dice_loop, pixel_loss_loop, random_case


def test_criterion_adds_the_weighted_auxiliary_loss() -> None:
    logits, label = random_case(7)
    other = random_case(8)[0]
    loss = Criterion()(Outputs(logits, other), label)
    main, auxiliary = cross_entropy_loop(logits, label), cross_entropy_loop(other, label)
    assert AUXILIARY_WEIGHT == 0.4
    assert loss.total.item() == pytest.approx(main + 0.4 * auxiliary, rel=1e-12)
    assert list(loss.parts) == ["main", "auxiliary"]
    assert loss.parts["main"].item() == pytest.approx(main, rel=1e-12)
    assert loss.parts["auxiliary"].item() == pytest.approx(auxiliary, rel=1e-12)
    assert Criterion(0.0)(Outputs(logits, other), label).total.item() == pytest.approx(main, rel=1e-12)


@pytest.mark.parametrize("wrapped", [False, True])
def test_criterion_without_auxiliary_head_is_the_main_loss(wrapped: bool) -> None:
    logits, label = random_case(9)
    loss = Criterion()(Outputs(logits) if wrapped else logits, label)
    expected = pytest.approx(cross_entropy_loop(logits, label), rel=1e-12)
    assert loss.total.item() == loss.parts["main"].item() == expected
    assert loss.parts["auxiliary"].item() == 0


@pytest.mark.parametrize("frames", [(), (3,)])
def test_criterion_adds_the_weighted_category_consistent_loss(frames: tuple[int, ...]) -> None:
    logits, label = random_case(10, size=(*frames, 9, 12))
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 4, *frames, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weights = ConsistencyWeights(2.0, 3.0, 5.0, delta_v=0.4, delta_d=1.0, form="quadratic")
    outputs = Outputs(logits.requires_grad_(), embedding=embedding)
    loss = Criterion(consistency=weights)(outputs, label)
    # Rows 0, 4, 8 and columns 0, 3 (2.75), 6 (5.5), 8 (8.25), 11 of the label.
    nearest = label[..., [0, 4, 8], :][..., [0, 3, 6, 8, 11]]
    terms = consistency_loop(embedding.detach().numpy(), nearest.numpy(), 0.4, 1.0, "quadratic")
    main = cross_entropy_loop(logits, label)
    assert list(loss.parts) == ["main", "auxiliary", "variance", "distance", "regularity"]
    assert [part.item() for part in loss.parts.values()] == pytest.approx([main, 0.0, *terms], rel=1e-12)
    assert min(terms) > 0.01
    expected = main + 2 * terms[0] + 3 * terms[1] + 5 * terms[2]
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)
    assert not any(part.requires_grad or part.ndim for part in loss.parts.values())
    loss.total.backward()
    assert embedding.grad is not None
    assert embedding.grad.any()


def test_consistency_weights_are_those_of_the_paper() -> None:
    assert ConsistencyWeights() == ConsistencyWeights(1.0, 1.0, 0.001, 0.5, 1.5, "piecewise")


def test_criterion_requires_an_embedding() -> None:
    logits, label = random_case(11)
    for outputs in (logits, Outputs(logits, logits)):
        with pytest.raises(ValueError, match=r"outputs must have an embedding.*CCNet\(\.\.\., embedding=16\)"):
            Criterion(consistency=ConsistencyWeights())(outputs, label)


def test_criterion_mines_hard_pixels_for_the_main_head_only() -> None:
    logits, label = random_case(12, size=(24, 17))
    other = random_case(13, size=(24, 17))[0]
    hard = ohem_label(logits, label, 0.3, 64 * 2)
    assert 0 < int((hard != 255).sum()) < int((label != 255).sum())
    ours = logits.clone().requires_grad_()
    loss = Criterion(ohem=(0.3, 64 * 2))(Outputs(ours, other), label)
    assert loss.parts["main"].item() == pytest.approx(cross_entropy_loop(logits, hard), rel=1e-12)
    assert loss.parts["auxiliary"].item() == pytest.approx(cross_entropy_loop(other, label), rel=1e-12)
    loss.total.backward()
    plain = logits.clone().requires_grad_()
    PixelLoss()(plain, hard).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-15)


def test_criterion_adds_the_weighted_dice_loss_of_the_main_head() -> None:
    logits, label = random_case(12)
    other = random_case(13)[0]
    loss = Criterion(dice_weight=0.7, ohem=(0.3, 0))(Outputs(logits, other), label)
    assert list(loss.parts) == ["main", "auxiliary", "dice"]
    dice = dice_loop(logits, label)  # of all labelled pixels, hard or not
    assert loss.parts["dice"].item() == pytest.approx(dice, rel=1e-12)
    rest = loss.parts["main"] + 0.4 * loss.parts["auxiliary"]
    assert loss.total.item() == pytest.approx(rest.item() + 0.7 * dice, rel=1e-12)


def test_both_heads_have_the_loss_of_the_pixels() -> None:
    logits, label = random_case(12)
    other = random_case(13)[0]
    weights = (1.0, 2.0, 0.5, 0.0, 3.0)
    for ours, plain in (
        (PixelLoss(weights, focal=1.5), {"weights": weights, "focal": 1.5}),
        (PixelLoss(label_smoothing=0.2, average="all"), {"smoothing": 0.2, "average": "all"}),
    ):
        parts = Criterion(pixels=ours)(Outputs(logits, other), label).parts
        assert parts["main"].item() == pytest.approx(pixel_loss_loop(logits, label, **plain), rel=1e-12)
        assert parts["auxiliary"].item() == pytest.approx(pixel_loss_loop(other, label, **plain), rel=1e-12)


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5, 0.0, 3.0)])
def test_hard_pixels_are_averaged_over_their_number_or_over_all_pixels(weights: tuple[float, ...] | None) -> None:
    logits, label = random_case(12, size=(24, 17))
    hard = ohem_label(logits, label, 0.3, 64 * 2)
    for average, over in (("labelled", hard), ("all", label)):
        loss = Criterion(pixels=PixelLoss(weights, average=average), ohem=(0.3, 64 * 2))(logits, label)
        divisor = PixelLoss(weights, average=average).divisor(over)
        expected = pixel_loss_loop(logits, hard, weights) * PixelLoss(weights).divisor(hard) / divisor
        assert loss.parts["main"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    "pixels",
    [PixelLoss(), PixelLoss((1.0, 2.0, 0.5, 0.0, 3.0), 0.1), PixelLoss(focal=2.0), PixelLoss(average="all")],
)
def test_losses_of_unequal_pieces_add_up_to_the_batch(pixels: PixelLoss) -> None:
    logits, label = random_case(18, size=(6, 5))
    label[0, :5] = 255  # the pieces have unequal numbers of labelled pixels
    outputs = Outputs(logits.requires_grad_(), (-logits).detach().requires_grad_())
    criterion = Criterion(pixels=pixels)
    whole = criterion(outputs, label)
    expected = torch.autograd.grad(whole.total, outputs[:2])
    totals = criterion.totals(label, pieces=2)
    pieces = [
        criterion(Outputs(*(output[i : i + 1] for output in outputs[:2])), label[i : i + 1], totals) for i in range(2)
    ]
    gradients = torch.autograd.grad(pieces[0].total + pieces[1].total, outputs[:2])
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-15)
    for name, value in whole.parts.items():
        torch.testing.assert_close(pieces[0].parts[name] + pieces[1].parts[name], value, rtol=1e-12, atol=0)


def test_losses_that_need_all_pixels_are_the_mean_of_those_of_the_pieces() -> None:
    logits, label = random_case(19, size=(24, 17))
    embedding = random_case(20, size=(3, 3))[0]
    # What OHEM keeps is a number of the whole batch: each of two pieces keeps half of it.
    criterion, half = (
        Criterion(ohem=(0.1, kept), dice_weight=0.5, consistency=ConsistencyWeights()) for kept in (256, 128)
    )
    totals = criterion.totals(label, pieces=2)
    for i in range(2):
        outputs = Outputs(logits[i : i + 1], embedding=embedding[i : i + 1])
        piece, alone = criterion(outputs, label[i : i + 1], totals), half(outputs, label[i : i + 1])
        torch.testing.assert_close(2 * piece.total, alone.total, rtol=1e-12, atol=0)
        for name, value in alone.parts.items():
            torch.testing.assert_close(2 * piece.parts[name], value, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="Criterion: pieces must be 1 or more, got 0"):
        criterion.totals(label, pieces=0)


def test_criterion_of_half_precision_outputs_is_computed_in_float32() -> None:
    logits, label = random_case(14, size=(16, 16))
    embedding = random_case(15, size=(2, 2))[0].bfloat16()
    outputs = Outputs(logits.bfloat16(), logits.bfloat16(), embedding)
    loss = Criterion(ohem=(0.7, 64), consistency=ConsistencyWeights())(outputs, label)
    assert {part.dtype for part in (loss.total, *loss.parts.values())} == {torch.float32}
    exact = Outputs(*(output.double() for output in outputs))
    expected = Criterion(ohem=(0.7, 64), consistency=ConsistencyWeights())(exact, label)
    assert loss.total.item() == pytest.approx(expected.total.item(), rel=1e-5)


@pytest.mark.parametrize("pixels", [PixelLoss((1.0, 2.0, 0.5, 0.0, 3.0), 0.1), PixelLoss(focal=2.0, average="all")])
def test_criterion_compiles_into_one_graph(pixels: PixelLoss) -> None:
    logits, label = random_case(16, size=(24, 16))
    embedding = random_case(17, size=(3, 2))[0]
    criterion = Criterion(pixels=pixels, ohem=(0.3, 64 * 2), dice_weight=0.5, consistency=ConsistencyWeights())
    compiled = torch.compile(criterion.__call__, fullgraph=True, dynamic=False, backend="eager")
    gradients = []
    for compute in (compiled, criterion):
        outputs = Outputs(*(t.clone().requires_grad_() for t in (logits, -logits, embedding)))
        loss = compute(outputs, label)
        loss.total.backward()
        gradients.append([loss.total.detach(), *loss.parts.values(), *(t.grad for t in outputs)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
