import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ccgpu.models.precision import Precision
from ccgpu.train.distributed import GlobalBatchNorm2d
from ccgpu.train.loss.criterion import Criterion
from ccgpu.train.optimisation.freezing import freeze
from ccgpu.train.optimisation.optimisers import build_optimiser
from ccgpu.train.optimisation.update import Update

CPU = Precision(torch.device("cpu"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), GlobalBatchNorm2d(4), nn.Dropout2d(0.5), nn.Tanh())
        self.head = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def network() -> Net:
    """Return a network whose norms have seen other images, as those of a file have."""
    torch.manual_seed(0)
    net = Net().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                assert value is not None
                value.data.uniform_(0.5, 1.5)
    return net


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64),
            "label": torch.randint(0, 3, (4, 4, 4), generator=generator),
        }
        for _ in range(3)
    ]


def trained(net: Net, kind: str | None, part: nn.Module) -> None:
    frozen = freeze(kind, net.backbone, part)
    optimiser = build_optimiser(net, net.backbone, "sgd", lr=0.2, momentum=0.9, weight_decay=0.01)
    update = Update(net, optimiser, CPU.scaler(), CPU, lambda _: 0.2, Criterion(), frozen=frozen)
    torch.manual_seed(5)
    for iteration, batch in enumerate(batches()):
        net.eval()  # as an evaluation between two steps leaves it
        update.begin(iteration)
        update.gradients(batch)
        update.apply(iteration)


def plain(net: Net, parameters: list[nn.Parameter], evaluating: list[nn.Module]) -> None:
    """Train some parameters by hand while some modules are in eval mode."""
    velocity = [torch.zeros_like(p) for p in parameters]
    torch.manual_seed(5)
    net.train()
    for module in evaluating:
        module.eval()
    for batch in batches():
        gradients = torch.autograd.grad(F.cross_entropy(net(batch["image"]), batch["label"]), parameters)
        with torch.no_grad():
            for parameter, gradient, moving in zip(parameters, gradients, velocity, strict=True):
                moving.mul_(0.9).add_(gradient + 0.01 * parameter)
                parameter -= 0.2 * moving


def changed(net: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}


def test_a_frozen_backbone_stays_as_it_is_and_the_head_learns_on_its_features() -> None:
    net, reference = network(), network()
    before = copy.deepcopy(net.state_dict())
    trained(net, "backbone", net.backbone)
    plain(reference, list(reference.head.parameters()), [reference.backbone])
    for (name, value), expected in zip(net.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)
    assert changed(net, before) == {name for name in before if name.startswith("head.")}
    assert not net.backbone(batches()[0]["image"]).requires_grad  # nothing is saved for backward


@pytest.mark.parametrize("everywhere", [False, True])
def test_frozen_norms_keep_statistics_scale_and_shift(everywhere: bool) -> None:
    net, reference = network(), network()
    before = copy.deepcopy(net.state_dict())
    trained(net, "norms", net if everywhere else net.backbone)
    norms = [reference.backbone[1], *([reference.head[1]] if everywhere else [])]
    kept = {p for norm in norms for p in norm.parameters()}
    plain(reference, [p for p in reference.parameters() if p not in kept], norms)
    for (name, value), expected in zip(net.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)
    frozen = {name for name in before if name.startswith(("backbone.1.", *(["head.1."] if everywhere else [])))}
    assert changed(net, before) == set(before) - frozen


def test_nothing_is_frozen_without_a_kind() -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    trained(net, None, net)
    assert changed(net, before) == set(before)


def test_all_kinds_of_batch_norm_are_found() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), GlobalBatchNorm2d(2), nn.SyncBatchNorm(2), nn.GroupNorm(1, 2))
    assert freeze("norms", net, net) == tuple(net[:3])


def test_what_cannot_be_frozen_is_told() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match="--freeze norms needs a network with batch norms, got one without"):
        freeze("norms", net, net)
    with pytest.raises(ValueError, match="kind must be one of backbone, norms or None, got 'all'"):
        freeze("all", net, net)
