import math

import pytest
import torch

from ccgpu.train.losses import AUXILIARY_WEIGHT, global_cross_entropy, segmentation_loss


def cross_entropy_loop(logits: torch.Tensor, label: torch.Tensor) -> float:
    total, count = 0.0, 0
    batch, _, height, width = logits.shape
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                true = int(label[b, y, x])
                if true == 255:
                    continue
                scores = logits[b, :, y, x].tolist()
                total += math.log(sum(math.exp(score) for score in scores)) - scores[true]
                count += 1
    return total / max(count, 1)


def random_case(seed: int, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64) * 3
    label = torch.randint(0, 5, (2, 3, 4), generator=generator)
    label[torch.rand(2, 3, 4, generator=generator) < ignored] = 255
    return logits, label


@pytest.mark.parametrize("seed", range(3))
def test_global_cross_entropy_equals_a_plain_loop(seed: int) -> None:
    logits, label = random_case(seed)
    assert global_cross_entropy(logits, label).item() == pytest.approx(cross_entropy_loop(logits, label), rel=1e-12)


def test_global_cross_entropy_gradient_is_that_of_the_mean() -> None:
    logits, label = random_case(3)
    logits.requires_grad_()
    global_cross_entropy(logits, label).backward()
    valid = label != 255
    expected = torch.softmax(logits.detach(), dim=1)
    one_hot = torch.nn.functional.one_hot(torch.where(valid, label, 0), 5).permute(0, 3, 1, 2)
    expected = (expected - one_hot) * valid[:, None] / valid.sum()
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)


def test_global_cross_entropy_without_valid_pixel_is_zero_with_zero_gradients() -> None:
    logits, label = random_case(4)
    logits.requires_grad_()
    loss = global_cross_entropy(logits, torch.full_like(label, 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_global_cross_entropy_of_half_precision_is_computed_in_float32() -> None:
    logits, label = random_case(5)
    half = logits.to(torch.bfloat16)
    loss = global_cross_entropy(half, label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cross_entropy_loop(half.double(), label), rel=1e-6)


def test_global_cross_entropy_refuses_logits_of_another_size() -> None:
    logits, label = random_case(6)
    with pytest.raises(ValueError, match=r"label must have the shape.*got \(2, 3, 4\) for \(2, 5, 3, 3\)"):
        global_cross_entropy(logits[..., :3], label)


def test_segmentation_loss_adds_the_weighted_auxiliary_loss() -> None:
    logits, label = random_case(7)
    other = random_case(8)[0]
    loss = segmentation_loss((logits, other), label)
    main, auxiliary = cross_entropy_loop(logits, label), cross_entropy_loop(other, label)
    assert AUXILIARY_WEIGHT == 0.4
    assert loss.total.item() == pytest.approx(main + 0.4 * auxiliary, rel=1e-12)
    assert loss.main.item() == pytest.approx(main, rel=1e-12)
    assert loss.auxiliary.item() == pytest.approx(auxiliary, rel=1e-12)
    assert segmentation_loss((logits, other), label, 0.0).total.item() == pytest.approx(main, rel=1e-12)


def test_segmentation_loss_without_auxiliary_head_is_the_main_loss() -> None:
    logits, label = random_case(9)
    loss = segmentation_loss(logits, label)
    assert loss.total.item() == loss.main.item() == pytest.approx(cross_entropy_loop(logits, label), rel=1e-12)
    assert loss.auxiliary.item() == 0
