import torch

from ccgpu.train.metrics import ConfusionMatrix
from ccgpu.train.runs.training_run import one_class_baseline


def test_one_class_baseline_has_the_iou_of_a_constant_answer() -> None:
    confusion = ConfusionMatrix(3)
    confusion.matrix += torch.tensor([[3, 1, 0], [0, 4, 0], [0, 1, 1]])
    expected = ConfusionMatrix(3)
    label = torch.tensor([0] * 4 + [1] * 4 + [2] * 2)
    expected.update(torch.zeros_like(label), label)
    assert torch.equal(one_class_baseline(confusion).matrix, expected.matrix)
    assert one_class_baseline(confusion).iou().tolist() == [0.4, 0.0, 0.0]
