from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ccgpu.train import engine
from ccgpu.train.datasets import EvaluationSet, StreamSampler, TrainStream, find_pairs
from ccgpu.train.engine import Precision, evaluate, poly, predict_logits, train, window_starts
from ccgpu.train.transforms import EvaluationTransform, Normalise, TrainTransform

CPU = Precision(torch.device("cpu"))


@pytest.mark.parametrize(
    ("size", "crop", "stride", "starts"),
    [
        (1024, 769, 513, [0, 255]),
        (2048, 769, 513, [0, 513, 1026, 1279]),
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 4, [0]),
        (3, 4, 2, [0]),
        (5, 4, 1, [0, 1]),
        (9, 3, 3, [0, 3, 6]),
    ],
)
def test_window_starts_table(size: int, crop: int, stride: int, starts: list[int]) -> None:
    assert window_starts(size, crop, stride) == starts


@pytest.mark.parametrize("size", range(1, 15))
@pytest.mark.parametrize("crop", [1, 3, 4])
def test_window_starts_cover_every_pixel_within_the_border(size: int, crop: int) -> None:
    for stride in range(1, crop + 1):
        starts = window_starts(size, crop, stride)
        assert len(set(starts)) == len(starts)
        covered = {pixel for start in starts for pixel in range(start, start + crop)}
        assert covered == set(range(max(size, crop)))


@pytest.mark.parametrize(("crop", "stride"), [(4, 5), (4, 0), (0, 0)])
def test_window_starts_refuse_gaps(crop: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride must be in 1..crop, got stride {stride} for crop {crop}"):
        window_starts(10, crop, stride)


@pytest.mark.parametrize("size", [(5, 6), (9, 7), (10, 3), (2, 2), (1, 20), (13, 8)])
@pytest.mark.parametrize("stride", [(1, 1), (3, 2), (5, 4)])
def test_predict_logits_of_a_pointwise_network_is_the_same_whole_and_sliding(
    size: tuple[int, int], stride: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 4, 1).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    whole = predict_logits(net, images)
    sliding = predict_logits(net, images, mode="sliding", crop=(5, 4), stride=stride)
    assert sliding.shape == (2, 4, *size)
    assert whole.requires_grad is False
    torch.testing.assert_close(sliding, whole, rtol=1e-12, atol=1e-12)


class WindowMean(nn.Module):
    """Logits that depend on the whole window, so that averages over windows show."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + images.mean(dim=(2, 3), keepdim=True)


def test_predict_logits_sliding_averages_over_the_windows_that_hold_a_pixel() -> None:
    images = torch.randn(1, 2, 7, 6, dtype=torch.float64)
    got = predict_logits(WindowMean(), images, mode="sliding", crop=(4, 5), stride=(3, 2))
    for y in range(7):
        for x in range(6):
            seen = [
                images[0, :, y, x] + images[0, :, top : top + 4, left : left + 5].mean(dim=(1, 2))
                for top in (0, 3)
                for left in (0, 1)
                if top <= y < top + 4 and left <= x < left + 5
            ]
            torch.testing.assert_close(got[0, :, y, x], torch.stack(seen).mean(dim=0))


def test_predict_logits_pads_small_pictures_with_zero_and_cuts_back() -> None:
    images = torch.randn(1, 2, 3, 9, dtype=torch.float64)
    got = predict_logits(WindowMean(), images, mode="sliding", crop=(5, 9), stride=(5, 9))
    expected = images + images.sum(dim=(2, 3), keepdim=True) / 45
    torch.testing.assert_close(got, expected)


def test_predict_logits_errors() -> None:
    net, images = nn.Identity(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="mode must be whole, or sliding with crop and stride, got 'tiles'"):
        predict_logits(net, images, mode="tiles")
    with pytest.raises(ValueError, match="give all three"):
        predict_logits(net, images, mode="sliding", crop=(4, 4))
    with pytest.raises(ValueError, match=r"stride must be in 1\.\.crop, got stride 5 for crop 4"):
        predict_logits(net, images, mode="sliding", crop=(4, 4), stride=(5, 4))


def test_evaluate_counts_by_label_and_prediction() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    for (y, x), prediction in {(0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 2}.items():
        logits[0, prediction, y, x] = 1
    samples = [
        {"image": logits, "label": torch.tensor([[[0, 0], [1, 255]]])},
        {"image": logits, "label": torch.tensor([[[2, 2], [1, 1]]])},
    ]
    net = nn.Sequential(nn.Dropout(0.9)).train()
    confusion = evaluate(net, samples, num_classes=3, precision=CPU)
    assert confusion.matrix.tolist() == [[1, 0, 1], [0, 2, 1], [1, 0, 1]]
    assert not net.training


def test_evaluate_stops_when_asked() -> None:
    samples = [{"image": torch.zeros(1, 2, 2, 2), "label": torch.zeros(1, 2, 2).long()}]
    with pytest.raises(engine.Interrupted):
        evaluate(nn.Identity(), samples, num_classes=2, precision=CPU, interrupted=lambda: True)


def steps_of(net: nn.Module, batches: list[dict[str, Any]], lr: float = 0.5, **options: Any) -> list[engine.Step]:
    optimiser = torch.optim.SGD(net.parameters(), lr=123.0, momentum=0.9, weight_decay=0.01)
    schedule = poly(lr, 4)
    return list(
        train(
            net,
            batches,
            optimiser,
            CPU.scaler(),
            precision=CPU,
            schedule=schedule,
            auxiliary_weight=0.4,
            **options,
        )
    )


def batch_of(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, 4, 4, generator=generator)
    return {"image": image, "label": torch.randint(0, 2, (2, 4, 4), generator=generator)}


def test_train_takes_the_steps_of_sgd_with_momentum_decay_and_the_poly_schedule() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 1, bias=False)
    weight = net.weight.detach().clone().double()
    velocity = torch.zeros_like(weight)
    batches = [batch_of(seed) for seed in range(4)]
    steps = steps_of(net, batches)
    for iteration, (batch, step) in enumerate(zip(batches, steps, strict=True)):
        parameter = weight.clone().requires_grad_()
        logits = nn.functional.conv2d(batch["image"].double(), parameter)
        loss = nn.functional.cross_entropy(logits, batch["label"])
        loss.backward()
        lr = 0.5 * (1 - iteration / 4) ** 0.9
        assert step.iteration == iteration + 1
        assert step.lr == pytest.approx(lr, rel=1e-12)
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert (step.main, step.auxiliary, step.interrupted) == (step.loss, 0.0, False)
        assert parameter.grad is not None
        velocity = 0.9 * velocity + parameter.grad + 0.01 * weight
        weight = weight - lr * velocity
    torch.testing.assert_close(net.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_train_from_a_later_start_continues_the_schedule() -> None:
    steps = steps_of(nn.Conv2d(3, 2, 1), [batch_of(0), batch_of(1)], start=2)
    assert [step.iteration for step in steps] == [3, 4]
    assert steps[0].lr == pytest.approx(0.5 * 0.5**0.9)


def test_train_goes_back_to_train_mode_after_the_caller_evaluated() -> None:
    modes = []

    class Watch(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            return super().forward(input)

    net = Watch(3, 2, 1)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in train(
        net, [batch_of(0), batch_of(1)], optimiser, CPU.scaler(),
        precision=CPU, schedule=lambda _: 0.1, auxiliary_weight=0.4,
    ):  # fmt: skip
        net.eval()
    assert modes == [True, True]


def test_train_stops_at_a_loss_that_is_not_finite_with_the_weights_before_it() -> None:
    net = nn.Conv2d(3, 2, 1)
    bad = batch_of(1)
    bad["image"][0, 0, 0, 0] = float("nan")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    steps = train(
        net,
        [batch_of(0), bad],
        optimiser,
        CPU.scaler(),
        precision=CPU,
        schedule=lambda _: 0.1,
        auxiliary_weight=0.4,
    )
    next(steps)
    before = net.weight.detach().clone()
    with pytest.raises(engine.NonFiniteLoss, match=r"got nan in iteration 2 at lr 0\.1 .*lower --lr"):
        next(steps)
    assert torch.equal(net.weight, before)


def test_train_passes_on_that_it_was_interrupted() -> None:
    asked = iter([False, True])
    steps = steps_of(nn.Conv2d(3, 2, 1), [batch_of(0), batch_of(1)], interrupted=lambda: next(asked))
    assert [step.interrupted for step in steps] == [False, True]


def test_train_under_bf16_autocast_follows_float32() -> None:
    losses = []
    for amp in ("off", "bf16"):
        torch.manual_seed(0)
        net, precision = nn.Conv2d(3, 2, 1), Precision(torch.device("cpu"), amp, channels_last=True)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        steps = train(
            net, [batch_of(s) for s in range(3)], optimiser, precision.scaler(),
            precision=precision, schedule=lambda _: 0.1, auxiliary_weight=0.4,
        )  # fmt: skip
        losses.append([step.loss for step in steps])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_load_batches_is_the_same_with_a_worker_and_leaves_the_random_state_alone(tiny_data: Path) -> None:
    pairs = find_pairs(tiny_data, "train")
    stream = TrainStream(pairs, TrainTransform((24, 32), (0.75, 2.0), True, Normalise()), seed=3, length=40)
    before = torch.get_rng_state()
    seen = []
    for workers in (0, 1):
        order = StreamSampler(4, 7, 2)
        loader = engine.load_batches(stream, batches=order, workers=workers, device=torch.device("cpu"))
        seen.append(list(loader))
    assert torch.equal(torch.get_rng_state(), before)
    assert [batch["name"] for batch in seen[0]] == [batch["name"] for batch in seen[1]]
    for alone, worker, positions in zip(*seen, StreamSampler(4, 7, 2), strict=True):
        assert torch.equal(alone["image"], worker["image"])
        assert torch.equal(alone["label"], worker["label"])
        assert torch.equal(alone["image"][1], stream[positions[1]]["image"])


def test_load_batches_of_an_evaluation_set(tiny_data: Path) -> None:
    data = EvaluationSet(find_pairs(tiny_data, "val"), EvaluationTransform(Normalise()))
    loader = engine.load_batches(data, batches=[[0], [2]], workers=0, device=torch.device("cpu"))
    assert [batch["name"][0] for batch in loader] == [data[0]["name"], data[2]["name"]]


def test_poly_table() -> None:
    schedule = poly(0.01, 100)
    assert schedule(0) == 0.01
    assert schedule(50) == pytest.approx(0.01 * 0.5358867312681466)
    assert schedule(99) == pytest.approx(0.01 * 0.01**0.9)
