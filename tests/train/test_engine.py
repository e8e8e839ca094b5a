from typing import Any

import pytest
import torch
from torch import nn

from ccgpu.models.precision import AMP_DTYPES, Precision
from ccgpu.models.prediction import NonFiniteScores, Prediction
from ccgpu.train import engine
from ccgpu.train.engine import evaluate, train
from ccgpu.train.loss.criterion import Criterion
from ccgpu.train.optimisation.schedules import Schedule, poly
from ccgpu.train.optimisation.update import Update

CPU = Precision(torch.device("cpu"))


def sample(image: torch.Tensor, label: torch.Tensor, names: tuple[str, ...] = ("a",), first: int = 0) -> dict[str, Any]:
    """Return a batch of one sample, as torch's collation makes it."""
    return {"image": image, "label": label, "names": [(name,) for name in names], "first": torch.tensor([first])}


def test_evaluate_counts_by_label_and_prediction() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    for (y, x), prediction in {(0, 0): 0, (0, 1): 2, (1, 0): 1, (1, 1): 2}.items():
        logits[0, prediction, y, x] = 1
    samples = [
        sample(logits, torch.tensor([[[0, 0], [1, 255]]])),
        sample(logits, torch.tensor([[[2, 2], [1, 1]]]), ("b",)),
    ]
    net = nn.Sequential(nn.Dropout(0.9)).train()
    seen = {}
    confusion = evaluate(net, samples, num_classes=3, precision=CPU, predict=Prediction(), seen=seen.__setitem__)
    assert confusion.matrix.tolist() == [[1, 0, 1], [0, 2, 1], [1, 0, 1]]
    assert not net.training
    assert {name: classes.tolist() for name, classes in seen.items()} == {name: [[0, 2], [1, 2]] for name in "ab"}


def test_evaluate_counts_the_frames_of_a_clip_from_its_first_on() -> None:
    logits = torch.zeros(1, 2, 3, 1, 2)
    logits[0, 1] = torch.tensor([1.0, -1.0])  # class 1 left, class 0 right, in each of three frames
    label = torch.tensor([[[[1, 1]], [[0, 0]], [[1, 255]]]])
    seen = {}
    clip = sample(logits, label, ("a", "b", "c"), first=1)
    confusion = evaluate(
        nn.Identity(), [clip], num_classes=2, precision=CPU, predict=Prediction(), seen=seen.__setitem__
    )
    assert confusion.matrix.tolist() == [[1, 1], [0, 1]]
    assert {name: classes.tolist() for name, classes in seen.items()} == {"b": [[1, 0]], "c": [[1, 0]]}


def test_evaluate_stops_when_asked() -> None:
    samples = [sample(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).long())]
    with pytest.raises(engine.Interrupted):
        evaluate(nn.Identity(), samples, num_classes=2, precision=CPU, predict=Prediction(), interrupted=lambda: True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evaluate_refuses_scores_that_are_not_finite_and_names_the_image(value: float) -> None:
    logits = torch.zeros(1, 2, 3, 1, 2)
    label = torch.zeros(1, 3, 1, 2).long()
    good, bad = logits.clone(), logits.clone()
    bad[0, 1, 2, 0, 1] = value
    samples = [sample(good, label, ("a", "b", "c")), sample(bad, label, ("d", "e", "f"))]
    seen: dict[str, torch.Tensor] = {}
    with pytest.raises(NonFiniteScores, match=r"scores of d e f must be finite, got NaN or infinity; .*--amp bf16"):
        evaluate(nn.Identity(), samples, num_classes=2, precision=CPU, predict=Prediction(), seen=seen.__setitem__)
    assert list(seen) == ["a", "b", "c"]


def steps_of(net: nn.Module, batches: list[dict[str, Any]], lr: float = 0.5, **options: Any) -> list[engine.Step]:
    optimiser = torch.optim.SGD(net.parameters(), lr=123.0, momentum=0.9, weight_decay=0.01)
    return list(train(update_of(net, optimiser, poly(lr, 4)), batches, **options))


def update_of(
    net: nn.Module, optimiser: torch.optim.Optimizer, schedule: Schedule = lambda _: 0.1, precision: Precision = CPU
) -> Update:
    return Update(net, optimiser, precision.scaler(), precision, schedule, Criterion())


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
        assert step.parts["main"] == step.loss
        assert not step.interrupted
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
    for _ in train(update_of(net, optimiser), [batch_of(0), batch_of(1)]):
        net.eval()
    assert modes == [True, True]


def test_train_stops_at_a_loss_that_is_not_finite_with_the_weights_before_it() -> None:
    net = nn.Conv2d(3, 2, 1)
    bad = batch_of(1)
    bad["image"][0, 0, 0, 0] = float("nan")
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    steps = train(update_of(net, optimiser), [batch_of(0), bad])
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
    assert set(AMP_DTYPES) == {"off", "bf16", "fp16"}
    losses = []
    for amp in ("off", "bf16"):
        torch.manual_seed(0)
        net, precision = nn.Conv2d(3, 2, 1), Precision(torch.device("cpu"), amp, channels_last=True)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        steps = train(update_of(net, optimiser, precision=precision), [batch_of(s) for s in range(3)])
        losses.append([step.loss for step in steps])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
