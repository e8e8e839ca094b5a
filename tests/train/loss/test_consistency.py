import itertools

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.train.loss.consistency import FORMS, category_consistent_loss
from tests.train.loss.consistency_reference import consistency_loop

NAMES = ("variance", "distance", "regularity")


def values(embedding: torch.Tensor, label: torch.Tensor, num_classes: int = 6, **arguments) -> list[float]:
    return [term.item() for term in category_consistent_loss(embedding, label, num_classes=num_classes, **arguments)]


def loop_form(
    embedding: torch.Tensor, label: torch.Tensor, delta_v: float = 0.5, delta_d: float = 1.5, form: str = "piecewise"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the terms by loops over classes and pairs, whose gradients autograd computes."""
    points, owner = embedding.flatten(2).transpose(0, 1).flatten(1).T, label.flatten()
    classes = sorted(set(owner.tolist()) - {255})
    zero = embedding.sum() * 0
    means = {c: points[owner == c].mean(0) for c in classes}
    variance = distance = regularity = zero
    for c in classes:
        d = torch.linalg.vector_norm(points[owner == c] - means[c], dim=1)
        cost = torch.where(d > delta_v, (d - delta_v) ** 2, 0 * d)
        if form == "piecewise":
            cost = torch.where(d > delta_d, d - delta_d + (delta_d - delta_v) ** 2, cost)
        variance = variance + cost.mean() / len(classes)
        regularity = regularity + torch.linalg.vector_norm(means[c]) / len(classes)
    for a, b in itertools.permutations(classes, 2):
        gap = torch.linalg.vector_norm(means[a] - means[b])
        if gap <= 2 * delta_d:
            distance = distance + (2 * delta_d - gap) ** 2 / (len(classes) * (len(classes) - 1))
    return variance, distance, regularity


# One number a pixel; class 0 has two pixels at distance (second - first) / 2 from their mean, class 1 has one.
TABLE = [
    # points            piecewise variance, quadratic, distance, regularity
    ((0.0, 0.8, 5.0), 0.0, 0.0, 0.0, 2.7),  # 0.4 < delta_v; gap 4.6 > 2 delta_d
    ((0.0, 1.0, 3.5), 0.0, 0.0, 0.0, 2.0),  # 0.5 = delta_v; gap 3 = 2 delta_d
    ((0.0, 2.0, 2.5), 0.125, 0.125, 2.25, 1.75),  # 1: (1 - 0.5)^2 / 2 classes; gap 1.5: 1.5^2
    ((0.0, 3.0, 1.5), 0.5, 0.5, 9.0, 1.5),  # 1.5 = delta_d: 1 / 2; gap 0: 9
    ((0.0, 4.0, -0.5), 0.75, 1.125, 0.25, 1.25),  # 2: 0.5 + 1 or 1.5^2, / 2; gap 2.5: 0.5^2
    ((1.0, 8.0, 2.5), 1.5, 4.5, 1.0, 3.5),  # 3.5: 2 + 1 or 3^2, / 2; gap 2: 1
]


@pytest.mark.parametrize(("points", "piecewise", "quadratic", "distance", "regularity"), TABLE)
@pytest.mark.parametrize("form", FORMS)
def test_table_computed_by_hand(
    points: tuple[float, ...], piecewise: float, quadratic: float, distance: float, regularity: float, form: str
) -> None:
    embedding = torch.tensor(points, dtype=torch.float64).reshape(1, 1, 1, 3)
    label = torch.tensor([[[0, 0, 1]]])
    expected = [piecewise if form == "piecewise" else quadratic, distance, regularity]
    assert consistency_loop(embedding.numpy(), label.numpy(), form=form) == pytest.approx(expected, abs=1e-14)
    assert values(embedding, label, form=form) == pytest.approx(expected, abs=1e-14)


def test_distances_are_euclidean_over_the_channels() -> None:
    embedding = torch.tensor([[[0.0, 3.0, 3.0], [0.0, 4.0, 4.0]]])
    label = torch.tensor([[0, 1, 1]])
    assert values(embedding, label) == [0.0, 0.0, 2.5]
    assert values(embedding, label, delta_d=3.0) == [0.0, 1.0, 2.5]
    assert values(embedding, torch.zeros_like(label), delta_v=1.0, delta_d=2.0) == pytest.approx(
        [((10 / 3 - 2 + 1) + 2 * (5 / 3 - 1) ** 2) / 3, 0.0, 10 / 3]
    )


@st.composite
def problems(draw, magnitudes=(1e-20, 1e-3, 1.0, 1e4)) -> tuple[torch.Tensor, torch.Tensor]:
    shape = draw(st.sampled_from([(1,), (7,), (2, 3), (5, 1), (4, 5), (2, 3, 2)]))
    batch, channels = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2, 3, 16]))
    classes, ignored = draw(st.integers(1, 6)), draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.sampled_from(magnitudes)) * draw(st.floats(0.3, 3.0))
    embedding = size * torch.randn(batch, channels, *shape, generator=generator, dtype=torch.float64)
    label = torch.randint(0, classes, (batch, *shape), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = 255
    return embedding, label


@settings(max_examples=80, deadline=None)
@given(problem=problems(), form=st.sampled_from(FORMS), precise=st.booleans())
def test_values_equal_the_loops(problem: tuple[torch.Tensor, torch.Tensor], form: str, precise: bool) -> None:
    embedding, label = problem
    embedding = embedding if precise else embedding.float()
    expected = consistency_loop(embedding.numpy(), label.numpy(), form=form)
    terms = category_consistent_loss(embedding, label, num_classes=6, form=form)
    assert terms._fields == NAMES
    for term, value in zip(terms, expected, strict=True):
        assert term.dtype == embedding.dtype
        assert term.shape == ()
        # At 1e-20 the squares of float32 are denormal numbers of few bits.
        rtol, atol = (1e-11, 1e-12) if precise else (2e-5, 1e-5)
        assert term.item() == pytest.approx(value, rel=rtol, abs=atol)


@settings(max_examples=60, deadline=None)
@given(
    problem=problems(),
    form=st.sampled_from(FORMS),
    margins=st.sampled_from([(0.5, 1.5), (0.0, 0.0), (0.3, 0.3), (1.0, 4.0)]),
    weights=st.tuples(*[st.sampled_from([0.0, 0.7, 3.0])] * 3),
)
def test_gradients_equal_autograd_through_the_loop_form(
    problem: tuple[torch.Tensor, torch.Tensor],
    form: str,
    margins: tuple[float, float],
    weights: tuple[float, float, float],
) -> None:
    embedding, label = problem
    ours, plain = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    v, d = margins
    terms = category_consistent_loss(ours, label, num_classes=6, delta_v=v, delta_d=d, form=form)
    expected = loop_form(plain, label, v, d, form)
    assert [t.item() for t in terms] == pytest.approx([t.item() for t in expected], rel=1e-11, abs=1e-12)
    for got in (terms, expected):
        sum((w * t for w, t in zip(weights, got, strict=True)), torch.zeros(())).backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-12)


def on_both_sides_of_each_kink() -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings whose distances and gaps lie on both sides of delta_v, delta_d and 2 delta_d, none close to."""
    generator = torch.Generator().manual_seed(5)
    label = torch.randint(0, 4, (2, 3, 4), generator=generator)
    label[0, 0, :2] = 255
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.5], [6.0, 0.0], [-1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    shift = torch.randn(2, 3, 4, 2, generator=generator, dtype=torch.float64) * 1.2
    return (centres[label.clamp(max=4)] + shift).movedim(-1, 1).contiguous(), label


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_finite_differences(form: str) -> None:
    embedding, label = on_both_sides_of_each_kink()
    points = {c: embedding.movedim(1, -1)[label == c] for c in range(4)}
    means = torch.stack([p.mean(0) for p in points.values()])
    d = torch.cat([(p - p.mean(0)).norm(dim=1) for p in points.values()])
    gaps = torch.pdist(means)
    kinks = [((d, 0.5), (d, 1.5), (gaps, 3.0)), ((d, 0.0), (means.norm(dim=1), 0.0), (gaps, 0.0))]
    for distances, kink in itertools.chain(*kinks):
        assert (distances - kink).abs().min() > 1e-3
    for distances, kink in kinks[0]:
        assert 0 < int((distances < kink).sum()) < len(distances)
    assert torch.autograd.gradcheck(
        lambda x: tuple(category_consistent_loss(x, label, num_classes=4, form=form)), (embedding.requires_grad_(),)
    )


def scattered(size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return size * torch.randn(2, 3, 2, 3, generator=generator)


ONE_EACH = torch.full((2, 2, 3), 255).index_put(
    (torch.tensor([0, 0, 1]), *[torch.tensor([0, 1, 1])] * 2), torch.arange(3)
)
HALVES = torch.arange(12).reshape(2, 2, 3) // 6
# Embedding, label, and the value of each term; None: any finite value.
DEGENERATE = {
    "no valid pixel": (scattered(1.0), torch.full((2, 2, 3), 255), (0.0, 0.0, 0.0)),
    "no image": (scattered(1.0)[:0], HALVES[:0], (0.0, 0.0, 0.0)),
    "one class": (scattered(1.0), torch.ones(2, 2, 3).long(), (None, 0.0, None)),
    "one pixel a class": (scattered(1.0), ONE_EACH, (0.0, None, None)),
    "one pixel": (scattered(1.0), torch.full((2, 2, 3), 255).index_fill(2, torch.tensor([0]), 2), (None, 0.0, None)),
    "identical": (torch.full((2, 3, 2, 3), 0.3), HALVES, (0.0, 9.0, None)),
    "zero": (torch.zeros(2, 3, 2, 3), HALVES, (0.0, 9.0, 0.0)),
    "tiny": (scattered(1e-20), HALVES, (0.0, 9.0, None)),
    "denormal": (scattered(1e-38), HALVES, (0.0, 9.0, None)),
    "huge": (scattered(1e4), HALVES, (None, 0.0, None)),
    "huge and identical": (torch.full((2, 3, 2, 3), 1e4), HALVES, (0.0, 9.0, None)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_cases_have_finite_values_and_gradients(name: str, dtype: torch.dtype, form: str) -> None:
    embedding, label, expected = DEGENERATE[name]
    embedding = embedding.to(dtype).requires_grad_()
    terms = category_consistent_loss(embedding, label, num_classes=3, form=form)
    for term, value in zip(terms, expected, strict=True):
        assert torch.isfinite(term)
        assert value is None or term.item() == value
        (gradient,) = torch.autograd.grad(term, embedding, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert gradient.dtype == dtype
        if value == 0.0 and name != "one class":
            assert not gradient.any()


def test_regularity_has_the_direction_of_a_tiny_mean() -> None:
    embedding = torch.tensor([[[3e-20], [4e-20]]], requires_grad=True)
    category_consistent_loss(embedding, torch.tensor([[0]]), num_classes=1).regularity.backward()
    torch.testing.assert_close(embedding.grad, torch.tensor([[[0.6], [0.8]]]), rtol=1e-4, atol=0)


def test_classes_and_means_are_those_of_the_whole_batch() -> None:
    embedding = torch.tensor([[[0.0, 0.0]], [[4.0, 1.0]]])
    label = torch.tensor([[0, 0], [0, 1]])
    # Class 0 has the mean 4/3 over both images; each image by itself would have no variance at all.
    far = 8 / 3 - 1.5 + 1
    near = (4 / 3 - 0.5) ** 2
    assert values(embedding, label) == pytest.approx([(far + 2 * near) / 3 / 2, (3 - 1 / 3) ** 2, (4 / 3 + 1) / 2])
    assert [values(embedding[i : i + 1], label[i : i + 1])[0] for i in range(2)] == [0.0, 0.0]


@settings(max_examples=25, deadline=None)
@given(problem=problems(magnitudes=(0.1, 1.0)), form=st.sampled_from(FORMS), seed=st.integers(0, 2**31))
def test_names_of_classes_order_of_pixels_and_origin_do_not_matter(
    problem: tuple[torch.Tensor, torch.Tensor], form: str, seed: int
) -> None:
    embedding, label = problem
    rng = np.random.default_rng(seed)
    expected = values(embedding, label, form=form)
    names = torch.full((256,), 255)
    names[:6] = torch.from_numpy(rng.permutation(9)[:6])
    renamed = category_consistent_loss(embedding, names[label], num_classes=9, form=form)
    assert [t.item() for t in renamed] == pytest.approx(expected, rel=1e-11, abs=1e-13)
    flat, owner = embedding.flatten(2).transpose(0, 1).flatten(1), label.flatten()
    order = torch.from_numpy(rng.permutation(len(owner)))
    shuffled = values(flat[None, :, order], owner[None, order], form=form)
    assert shuffled == pytest.approx(expected, rel=1e-11, abs=1e-13)
    shift = torch.from_numpy(rng.normal(size=embedding.shape[1])).reshape(-1, *[1] * (embedding.ndim - 2))
    assert values(embedding + shift, label, form=form)[:2] == pytest.approx(expected[:2], rel=1e-9, abs=1e-12)


def test_ignored_pixels_change_nothing_and_get_no_gradient() -> None:
    embedding, label = on_both_sides_of_each_kink()
    ignored = (label == 255)[:, None].expand_as(embedding)
    other = torch.where(ignored, 1e3, embedding).requires_grad_()
    assert values(other, label) == pytest.approx(values(embedding, label), rel=1e-12)
    sum(category_consistent_loss(other, label, num_classes=4)).backward()
    assert other.grad is not None
    assert not other.grad[ignored].any()
    assert (other.grad[~ignored] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_leaves_the_sums_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding = (torch.randn(2, 16, 30, 40, generator=generator) + 5).to(dtype)
    label = torch.randint(0, 5, (2, 30, 40), generator=generator)
    expected = consistency_loop(embedding.double().numpy(), label.numpy())
    with torch.autocast("cpu", torch.bfloat16):
        ours = embedding.requires_grad_()
        terms = category_consistent_loss(ours, label, num_classes=5)
    assert [term.dtype for term in terms] == [torch.float32] * 3
    assert [term.item() for term in terms] == pytest.approx(expected, rel=2e-5)
    sum(terms).backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype


def test_channels_last_and_strided_embeddings_give_the_same() -> None:
    embedding, label = on_both_sides_of_each_kink()
    plain = embedding.clone().requires_grad_()
    expected = category_consistent_loss(plain, label, num_classes=4)
    sum(expected).backward()
    wide = torch.full((2, 4, 3, 8), torch.nan, dtype=torch.float64)
    wide[:, ::2, :, ::2] = embedding
    for other in (embedding.contiguous(memory_format=torch.channels_last), wide[:, ::2, :, ::2]):
        assert other.stride() != embedding.stride()
        other = other.detach().requires_grad_()
        terms = category_consistent_loss(other, label, num_classes=4)
        torch.testing.assert_close(tuple(terms), tuple(expected), rtol=1e-12, atol=1e-12)
        sum(terms).backward()
        torch.testing.assert_close(other.grad, plain.grad, rtol=1e-12, atol=1e-12)


def test_one_compiled_graph_serves_all_labels() -> None:
    # fullgraph: nothing in it is decided by a number that the host would have to wait for.
    counter = torch._dynamo.testing.CompileCounter()
    embedding, label = on_both_sides_of_each_kink()
    compiled = torch.compile(
        lambda x, y: category_consistent_loss(x, y, num_classes=4), fullgraph=True, dynamic=False, backend=counter
    )
    for case in (label, torch.full_like(label, 255), torch.ones_like(label)):
        ours, plain = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
        terms, expected = compiled(ours, case), category_consistent_loss(plain, case, num_classes=4)
        torch.testing.assert_close(tuple(terms), tuple(expected), rtol=1e-12, atol=1e-12)
        sum(terms).backward()
        sum(expected).backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_four_bytes_a_class_and_position_are_saved_for_backward() -> None:
    classes, channels, positions = 150, 16, 2 * 32 * 32
    embedding = torch.randn(2, channels, 32, 32, requires_grad=True)
    label = torch.randint(0, classes, (2, 32, 32))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = category_consistent_loss(embedding, label, num_classes=classes)
    # Beside the one-hot map: a few numbers a channel and position, and those of the pairs of classes.
    rest = 4 * (2 * channels * positions + 8 * positions + classes * classes * (channels + 4))
    assert 4 * classes * positions <= sum(kept.values()) <= 4 * classes * positions + rest
    sum(terms).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embedding": torch.zeros(1, 2, 3, 3).long()}, TypeError, "embedding must be floating point, got torch.int64"),
        ({"label": torch.zeros(1, 3, 3)}, TypeError, "label must be int64, got torch.float32; convert"),
        ({"label": torch.zeros(1, 3, 4).long()}, ValueError, r"label must have .* got \(1, 3, 4\) for \(1, 2, 3, 3\)"),
        ({"embedding": torch.zeros(1, 2), "label": torch.zeros(1).long()}, ValueError, r"got \(1,\) for \(1, 2\)"),
        ({"num_classes": 0}, ValueError, "num_classes must be 1 to 255, got 0"),
        ({"num_classes": 256}, ValueError, "num_classes must be 1 to 255, got 256"),
        ({"delta_v": 2.0}, ValueError, "must be 0 <= delta_v <= delta_d, got 2.0 and 1.5"),
        ({"delta_v": -0.1}, ValueError, "got -0.1 and 1.5"),
        ({"delta_d": float("nan")}, ValueError, "got 0.5 and nan"),
        ({"delta_d": float("inf")}, ValueError, "got 0.5 and inf"),
        ({"form": "linear"}, ValueError, "form must be one of .* got 'linear'"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"embedding": torch.zeros(1, 2, 3, 3), "label": torch.zeros(1, 3, 3).long(), "num_classes": 3}
    with pytest.raises(error, match=f"category_consistent_loss: .*{message}"):
        category_consistent_loss(**{**arguments, **change})
