import textwrap

import pytest
import torch
from torch import nn

from ccgpu.models.precision import AMP_DTYPES
from ccgpu.train import distributed
from ccgpu.train.distributed import GlobalBatchNorm2d, GlobalDropout2d, convert_for_global_batch
from ccgpu.train.loss.consistency import FORMS
from ccgpu.train.loss.criterion import Criterion
from tests.processes import alone, environments, run_together

# The program of one process with the global batch and of two processes with a share each. Every process saves the sums
# over the shares and the values that must be equal on all processes.
PROGRAM = """
import sys
import torch
import ccgpu
from torch import nn
from ccgpu.models.ccnet import Outputs
from ccgpu.train import distributed, engine
from ccgpu.train.loss.criterion import ConsistencyWeights, Criterion
from ccgpu.train.loss.cross_entropy import PixelLoss
from ccgpu.train.loss.hard_pixels import ohem_label
from ccgpu.models.precision import Precision
from ccgpu.models.prediction import Prediction
from ccgpu.train.optimisation.averaging import Average
from ccgpu.train.optimisation.freezing import freeze
from ccgpu.train.optimisation.optimisers import build_optimiser
from ccgpu.train.optimisation.update import Update


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.5),
        nn.Conv2d(6, 5, 3, padding=2), nn.BatchNorm2d(5, momentum=None, affine=False), nn.Dropout2d(0.2),
    ).double()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    # A mean far from 0 and unequal shares of ignored pixels in the samples.
    images = torch.randn(4, 3, 6, 7, generator=generator, dtype=torch.float64) + 100
    label = torch.randint(0, 5, (4, 6, 7), generator=generator)
    for sample in range(4):
        label[sample, : sample + 2 * step] = 255
    return images, label


class Heads(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, padding=1)
        self.logits, self.auxiliary = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)
        self.embedding = nn.Conv2d(6, 3, 1, stride=2) if embedding else None

    def forward(self, images):
        x = torch.tanh(self.trunk(images))
        embedding = None if self.embedding is None else 6 * self.embedding(x)
        return Outputs(3 * self.logits(x), self.auxiliary(x), embedding)


def labels():
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randint(0, 5, (4, 17, 25), generator=generator)
    mixed[torch.rand(mixed.shape, generator=generator) < 0.3] = 255
    mixed[1] = 255
    apart = mixed.where(mixed == 255, mixed % 3)
    apart[2:] = 255
    apart[2:, :9, :9] = 3
    apart[3, 4, 8] = 4  # a class with a single pixel
    half = mixed.clone()
    half[2:] = 255
    return {"mixed": mixed, "no class in both": apart, "one process without a pixel": half,
            "no pixel": torch.full_like(mixed, 255)}


def losses(rank, world):
    images = torch.randn(4, 3, 17, 25, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    saved = {}
    for name, label in labels().items():
        for kind, criterion in criteria().items():
            torch.manual_seed(0)
            net = Heads(embedding=criterion.consistency is not None).double()
            model = distributed.wrap(net, torch.device("cpu"))
            outputs = model(images[own])
            hard = ohem_label(outputs.logits, label[own], 0.1, 64 * 3)
            loss = criterion(outputs, label[own])
            loss.total.backward()
            values = torch.stack([loss.total.detach(), *loss.parts.values()])
            saved[name, kind] = {
                "values": distributed.sum_over_processes(values) / world, "own": values, "parts": list(loss.parts),
                "gradients": gradients(net), "hard": hard, "valid": int((label[own] != 255).sum()),
                "pieces": in_pieces(model, net, criterion, images[own], label[own]),
            }
    return saved


def criteria():
    weights = (0.5, 2.0, 1.0, 0.0, 3.0)
    terms = [ConsistencyWeights(0.7, 1.3, 0.9, 0.5, 1.5, form) for form in ("piecewise", "quadratic")]
    return {
        "piecewise": Criterion(ohem=(0.1, 64 * 3), consistency=terms[0]),
        "quadratic": Criterion(ohem=(0.1, 64 * 3), consistency=terms[1]),
        "dice": Criterion(ohem=(0.1, 64 * 3), dice_weight=0.8, pixels=PixelLoss(weights, average="all")),
        "weights": Criterion(pixels=PixelLoss(weights, label_smoothing=0.2)),
        "focal": Criterion(pixels=PixelLoss(weights, focal=1.5)),
        "all": Criterion(pixels=PixelLoss(average="all")),
    }


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


def in_pieces(model, net, criterion, images, label):
    net.zero_grad(set_to_none=True)
    totals = criterion.totals(label, pieces=2)
    for piece in torch.arange(len(label)).chunk(2):
        criterion(model(images[piece]), label[piece], totals).total.backward()
    return gradients(net)


def optimised(name, accumulate, rank, world):
    # Pieces, clipping, the average and a frozen norm, on a batch of four images.
    torch.manual_seed(2)
    net = distributed.convert_for_global_batch(network())
    frozen = freeze("norms", net[:2], net[:2])
    average = Average(net, 0.5)
    optimiser = build_optimiser(net, net[:3], name, lr=1.0, momentum=0.9, weight_decay=0.01, head_lr=3.0)
    update = Update(
        distributed.wrap(net, torch.device("cpu")), optimiser, torch.amp.GradScaler("cpu", enabled=False),
        Precision(torch.device("cpu")), lambda i: 0.01 / (i + 1), Criterion(), accumulate=accumulate, clip=0.5,
        frozen=frozen, average=average,
    )
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    batches = [{"image": images[own], "label": label[own]} for images, label in map(batch, range(3))]
    return {
        "losses": [step.loss for step in engine.train(update, batches)], "weights": net.state_dict(),
        "average": average.net.state_dict(), "start": network().state_dict(),
    }


def waited(work):
    said = []
    try:
        distributed.let_first_process(lambda: work(said))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def succeed(said):
    for step in range(3):
        said.append(step)
        yield


def fail(said):
    said.append("begun")
    yield
    raise OSError("a file is broken")


def main(path):
    distributed._SIGN_OF_LIFE = 0.0
    with distributed.processes(torch.device("cpu")):
        rank, world = distributed.rank(), distributed.world_size()
        net = distributed.convert_for_global_batch(network())
        model = distributed.wrap(net, torch.device("cpu"))
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        share = 4 // world
        batches = []
        for step in range(3):
            images, label = batch(step)
            own = slice(rank * share, (rank + 1) * share)
            batches.append({"image": images[own], "label": label[own]})
        torch.manual_seed(1)
        precision = Precision(torch.device("cpu"))
        update = Update(model, optimiser, precision.scaler(), precision, lambda _: 0.1, Criterion())
        steps = engine.train(update, batches, interrupted=lambda: rank == world - 1)
        steps = [(s.loss, s.interrupted) for s in steps]
        drawn = [batch(0), batch(1)]
        samples = [
            {"image": x[i : i + 1], "label": y[i : i + 1], "names": [("a",)], "first": torch.tensor([0])}
            for x, y in drawn for i in range(4)
        ]
        samples = samples[:7]  # does not divide by two
        confusion = engine.evaluate(
            net, samples[rank::world], num_classes=5, precision=precision, predict=Prediction()
        )
        saved = {
            "steps": steps, "weights": net.state_dict(), "draw": torch.rand(2), "matrix": confusion.matrix,
            "seen": sum(int((s["label"] != 255).sum()) for s in samples), "world": world, "main": distributed.is_main(),
            "kinds": [type(module).__name__ for module in net], "losses": losses(rank, world),
            "optimised": {
                (name, pieces): optimised(name, pieces, rank, world)
                for name, pieces in (("sgd", 1), ("sgd", 2), ("adamw", 2))
            },
            "waited": [waited(work) for work in (succeed, fail, succeed)],
        }
        torch.save(saved, f"{path}/{world}-{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The values that `PROGRAM` saved in a run of one process ("1-0") and in one of two ("2-0", "2-1")."""
    folder = tmp_path_factory.mktemp("processes")
    script = folder / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    for status, errors in run_together([str(script), str(folder)], [alone(), *environments(2)]):
        assert status == 0, errors
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def test_two_processes_have_the_loss_curve_of_one(results: dict[str, dict]) -> None:
    alone = [loss for loss, _ in results["1-0"]["steps"]]
    assert len({round(loss, 6) for loss in alone}) == 3
    for key in ("2-0", "2-1"):
        assert [loss for loss, _ in results[key]["steps"]] == pytest.approx(alone, rel=1e-10)


def test_two_processes_end_with_the_weights_and_running_statistics_of_one(results: dict[str, dict]) -> None:
    alone = results["1-0"]["weights"]
    assert results["2-0"]["kinds"] != results["1-0"]["kinds"]
    for key in ("2-0", "2-1"):
        weights = results[key]["weights"]
        assert list(weights) == list(alone)
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-9, atol=1e-11, msg=f"{key} {name}")
    assert alone["1.num_batches_tracked"] == 3


def test_two_processes_take_the_optimisation_of_one(results: dict[str, dict]) -> None:
    """Pieces of the batch, clipped gradients, a frozen norm, the head's own learning rate and the average."""
    alone = results["1-0"]["optimised"]
    assert len({tuple(found["losses"]) for found in alone.values()}) == 3
    for case, expected in alone.items():
        for key in ("2-0", "2-1"):
            got = results[key]["optimised"][case]
            assert got["losses"] == pytest.approx(expected["losses"], rel=1e-10)
            for part in ("weights", "average"):
                for name, value in expected[part].items():
                    torch.testing.assert_close(got[part][name], value, rtol=1e-9, atol=1e-11, msg=f"{case} {name}")
        for name, value in expected["weights"].items():
            assert torch.equal(value, expected["start"][name]) == name.startswith("1."), name


def test_two_processes_hold_the_same_random_state_as_one(results: dict[str, dict]) -> None:
    assert torch.equal(results["1-0"]["draw"], results["2-0"]["draw"])
    assert torch.equal(results["1-0"]["draw"], results["2-1"]["draw"])


def test_evaluation_counts_every_sample_once(results: dict[str, dict]) -> None:
    alone = results["1-0"]
    assert int(alone["matrix"].sum()) == alone["seen"] > 0
    assert torch.equal(results["2-0"]["matrix"], results["2-1"]["matrix"])
    # The weights agree to rounding; no two logits of these images are that close.
    assert torch.equal(alone["matrix"], results["2-0"]["matrix"])


def test_a_stop_asked_of_one_process_reaches_all_of_them(results: dict[str, dict]) -> None:
    for saved in results.values():
        assert all(interrupted for _, interrupted in saved["steps"])
    assert [results[key]["main"] for key in ("1-0", "2-0", "2-1")] == [True, True, False]


def test_work_of_the_first_process_ends_the_waiting_of_all(results: dict[str, dict]) -> None:
    for name in ("1-0", "2-0"):
        assert results[name]["waited"] == [[0, 1, 2], ["begun", "OSError: a file is broken"], [0, 1, 2]]
    assert results["2-1"]["waited"] == [[], ["ValueError: a file is broken"], []]


def test_two_processes_have_the_losses_and_gradients_of_one(results: dict[str, dict]) -> None:
    alone = results["1-0"]["losses"]
    assert len(alone) == 24
    for case, expected in alone.items():
        more = {"dice": ["dice"]}.get(case[1], ["variance", "distance", "regularity"] * (case[1] in FORMS))
        assert expected["parts"] == ["main", "auxiliary", *more]
        assert (expected["values"] != 0).all() or case[0] == "no pixel"
        assert all(g.any() for g in expected["gradients"]) or case[0] == "no pixel"
        for key in ("2-0", "2-1"):
            got = results[key]["losses"][case]
            torch.testing.assert_close(got["values"], expected["values"], rtol=1e-12, atol=1e-14, msg=f"{case} {key}")
            # Every process returns the Dice loss and the consistency of the global batch itself.
            torch.testing.assert_close(got["own"][3:], expected["values"][3:], rtol=1e-12, atol=1e-14)
            for gradient, reference in zip(got["gradients"], expected["gradients"], strict=True):
                torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12, msg=f"{case} {key}")


def test_pieces_of_a_batch_add_up_to_its_gradients_in_any_number_of_processes(results: dict[str, dict]) -> None:
    for key in ("1-0", "2-0", "2-1"):
        for case, expected in results["1-0"]["losses"].items():
            if case[1] in ("weights", "focal", "all"):
                for gradient, reference in zip(
                    results[key]["losses"][case]["pieces"], expected["gradients"], strict=True
                ):
                    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12, msg=f"{case} {key}")


def test_two_processes_keep_the_hard_pixels_of_one(results: dict[str, dict]) -> None:
    alone = results["1-0"]["losses"]
    for case, expected in alone.items():
        shares = [results[key]["losses"][case] for key in ("2-0", "2-1")]
        assert torch.equal(torch.cat([share["hard"] for share in shares]), expected["hard"])
        kept = int((expected["hard"] != 255).sum())
        assert 0 < kept < expected["valid"] or case[0] == "no pixel"
    unequal = [results[key]["losses"]["one process without a pixel", "piecewise"]["valid"] for key in ("2-0", "2-1")]
    assert unequal[0] > unequal[1] == 0


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}])
def test_global_batch_norm_equals_torch_in_one_process(options: dict) -> None:
    torch.manual_seed(0)
    expected, ours = nn.BatchNorm2d(4, **options).double(), GlobalBatchNorm2d(4, **options).double()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.copy_(torch.randn(4))
    ours.load_state_dict(expected.state_dict())
    for _ in range(2):
        x = torch.randn(3, 4, 5, 6, dtype=torch.float64) * 2 + 1000
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, reference = ours(b), expected(a)
        torch.testing.assert_close(out, reference, rtol=1e-9, atol=1e-9)
        weight = torch.randn_like(x)
        (out * weight).sum().backward()
        (reference * weight).sum().backward()
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-9)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    for own, other in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-8, atol=1e-8)
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), expected.eval()(x), rtol=1e-12, atol=1e-12)


def test_global_batch_norm_in_float32_does_not_cancel() -> None:
    x = torch.randn(4, 2, 8, 8) + 1e4
    out = GlobalBatchNorm2d(2)(x)
    torch.testing.assert_close(out.double().var(dim=(0, 2, 3)), torch.ones(2).double(), rtol=1e-2, atol=1e-2)


def test_global_batch_norm_refuses_a_single_value() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GlobalBatchNorm2d(2)(torch.randn(1, 2, 1, 1))


def test_global_dropout_drops_whole_channels_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    out = GlobalDropout2d(0.25)(torch.ones(200, 50, 2, 3))
    channels = out.flatten(2)
    assert torch.equal(channels.amin(2), channels.amax(2))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_global_dropout_at_the_ends_and_in_eval_mode() -> None:
    x = torch.randn(3, 4, 2, 2)
    assert torch.equal(GlobalDropout2d(0.0)(x), x)
    assert torch.equal(GlobalDropout2d(1.0)(x), torch.zeros_like(x))
    assert torch.equal(GlobalDropout2d(0.9).eval()(x), x)
    with pytest.raises(ValueError, match=r"must be \(B, C, H, W\)"):
        GlobalDropout2d(0.5)(x[0])


def test_convert_for_global_batch_keeps_the_state_dict_and_the_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout2d(0.3), nn.BatchNorm2d(3, eps=0.1)))

    single = convert_for_global_batch(build().eval())
    assert type(single[0]) is nn.BatchNorm2d
    assert type(single[1][0]) is GlobalDropout2d
    assert single[1][0].p == 0.3
    assert not single[1][0].training
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    net = build()
    parameters, keys = list(net.parameters()), list(net.state_dict())
    convert_for_global_batch(net)
    assert type(net[1][1]) is GlobalBatchNorm2d
    assert net[1][1].eps == 0.1
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert type(convert_for_global_batch(nn.BatchNorm2d(3))) is GlobalBatchNorm2d


def test_convert_for_global_batch_keeps_hooks_and_modules_of_two_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    norm, drop = nn.BatchNorm2d(3), nn.Dropout2d(0.3)
    norm.register_forward_hook(lambda *_: torch.ones(()))
    net = convert_for_global_batch(nn.Sequential(norm, drop, norm, drop).eval())
    assert net[0] is net[2] is norm
    assert net[1] is net[3] is drop
    assert type(norm) is GlobalBatchNorm2d
    assert type(drop) is GlobalDropout2d
    assert norm(torch.zeros(1, 3, 2, 2)) == 1


def test_convert_for_global_batch_changes_nothing_where_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))
    with pytest.raises(TypeError, match="got Dropout at 1"):
        convert_for_global_batch(net)
    assert type(net[0]) is nn.BatchNorm2d


@pytest.mark.parametrize("module", [nn.BatchNorm1d(2), nn.Dropout(0.5), type("Own", (nn.BatchNorm2d,), {})(2)])
def test_convert_for_global_batch_refuses_what_it_would_break(module: nn.Module) -> None:
    with pytest.raises(TypeError, match=rf"got {type(module).__name__} at 1\.0"):
        convert_for_global_batch(nn.Sequential(nn.ReLU(), nn.Sequential(module)))


def test_choose_device_errors() -> None:
    assert distributed.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="must be auto, cpu or cuda, got 'tpu'"):
        distributed.choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device, got none"):
            distributed.choose_device("cuda")


@pytest.mark.parametrize("local_rank", ["0", "1", "2"])
def test_choose_device_finds_too_few_devices_on_every_process(local_rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process finds it too: it alone prints an error that all processes have."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"the 3 processes of this machine need a CUDA device each, got 2;"):
        distributed.choose_device("auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if local_rank != "2":
        assert distributed.choose_device("cuda") == torch.device("cuda", int(local_rank))


def test_single_process_helpers() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(distributed.sum_over_processes(value), value.detach())
    assert distributed.differentiable_sum(value) is value
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    net = nn.Conv2d(3, 2, 1)
    assert distributed.wrap(net, torch.device("cpu")) is net
    assert Criterion()(net(torch.randn(1, 3, 2, 2)), torch.zeros(1, 2, 2).long()).total.requires_grad
    assert AMP_DTYPES["off"] is None
