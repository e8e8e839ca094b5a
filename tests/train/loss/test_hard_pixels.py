import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccgpu.train.loss.criterion import Criterion
from ccgpu.train.loss.hard_pixels import ohem_label
from ccgpu.train.loss.inputs import label_at
from tests.train.loss.pixel_cases import random_case


def interpolation(positions: int, extent: int) -> np.ndarray:
    """Return the weights (positions, extent) of linear interpolation with corners aligned."""
    weights = np.zeros((positions, extent))
    for i in range(positions):
        at = i * (extent - 1) / (positions - 1) if positions > 1 else 0.0
        low = min(int(at), extent - 1)
        weights[i, low] += 1 - (at - low)
        weights[i, min(low + 1, extent - 1)] += at - low
    return weights


def authors_rule(logits: np.ndarray, label: np.ndarray, threshold: float, kept: int) -> tuple[np.ndarray, float]:
    """Return each pixel's true-class probability, and the limit, by the authors' algorithm in NumPy."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability = odds / odds.sum(axis=1, keepdims=True)
    height, width = label.shape[1:]
    rows, columns = (interpolation(max(round(n / 8), 1), n) for n in (height, width))
    zoomed = np.einsum("yh,bkhw,xw->bkyx", rows, probability, columns)
    small = label_at(torch.from_numpy(label), (len(rows), len(columns))).numpy()
    pred = np.array([zoomed[b, c, y, x] for (b, y, x), c in np.ndenumerate(small) if c != 255])
    min_kept = kept // 64
    if min_kept >= len(pred):
        limit = 1.0
    else:
        limit = threshold
        if min_kept > 0:
            limit = max(threshold, np.partition(pred, min_kept - 1)[min_kept - 1])
    true = np.take_along_axis(probability, np.where(label == 255, 0, label)[:, None], axis=1)[:, 0]
    return true, limit


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 3),
    classes=st.integers(1, 5),
    threshold=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    kept=st.integers(0, 64 * 30),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    sharpness=st.sampled_from([0.3, 3.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_ohem_keeps_the_pixels_of_the_authors_rule(
    size: tuple[int, int],
    batch: int,
    classes: int,
    threshold: float,
    kept: int,
    ignored: float,
    sharpness: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, *size, generator=generator, dtype=torch.float64) * sharpness
    label = torch.randint(0, classes, (batch, *size), generator=generator)
    label[torch.rand(label.shape, generator=generator) < ignored] = 255
    got = ohem_label(logits, label, threshold, kept)
    true, limit = authors_rule(logits.numpy(), label.numpy(), threshold, kept)
    close = np.abs(true - limit) < 1e-12  # rounding decides there
    expected = torch.from_numpy(np.where(true <= limit, label.numpy(), 255))
    assert got.dtype == torch.int64
    decided = torch.from_numpy(~close | (label.numpy() == 255) | (limit == 1.0))
    assert torch.equal(got[decided], expected[decided])
    assert torch.logical_or(got == label, got == 255).all()


@pytest.mark.parametrize("size", [(16, 24), (20, 36), (47, 106), (97, 115)])
def test_ohem_shrinks_as_scipy_zoom_does(size: tuple[int, int]) -> None:
    zoom = pytest.importorskip("scipy.ndimage").zoom
    rng = np.random.default_rng(0)
    maps, label = rng.random((3, *size)), rng.integers(0, 9, size)
    # mode="nearest": by default scipy puts 0 where a position is beyond the border by a rounding error.
    zoomed = zoom(maps, (1, 1 / 8, 1 / 8), order=1, mode="nearest")
    rows, columns = (interpolation(round(n / 8), n) for n in size)
    np.testing.assert_allclose(np.einsum("yh,khw,xw->kyx", rows, maps, columns), zoomed, rtol=1e-12)
    nearest = zoom(label, (1 / 8, 1 / 8), order=0, mode="nearest")
    assert np.array_equal(label_at(torch.from_numpy(label)[None], (len(rows), len(columns)))[0].numpy(), nearest)


def sureness(p: torch.Tensor) -> torch.Tensor:
    """Return logits of two classes that give class 1 the probability p."""
    return torch.stack([torch.log1p(-p), torch.log(p)], dim=1)


def test_ohem_limit_comes_from_an_eighth_of_the_size() -> None:
    # 24x24 pixels, 3x3 positions at rows and columns 0, 12, 23 (11.5 lies between two pixels of one probability).
    p = torch.full((1, 24, 24), 0.99, dtype=torch.float64)
    label = torch.ones(1, 24, 24).long()
    spots = {(0, 0): 0.75, (0, 23): 0.8, (23, 0): 0.85, (23, 23): 0.9}
    for (y, x), value in spots.items():
        p[0, y, x] = value
    p[0, 5, 5], p[0, 5, 6], p[0, 5, 7] = 0.1, 0.82, 0.7
    everything = {**spots, (5, 5): 0.1, (5, 6): 0.82, (5, 7): 0.7}
    for k, limit in ((0, 0.7), (1, 0.75), (2, 0.8), (3, 0.85), (4, 0.9)):
        for kept in (64 * k, 64 * k + 63):
            hard = (ohem_label(sureness(p), label, 0.7 + 1e-9, kept) == 1)[0].nonzero().tolist()
            assert sorted(hard) == sorted([y, x] for (y, x), value in everything.items() if value <= limit + 1e-9)
    assert int((ohem_label(sureness(p), label, 0.8 + 1e-9, 64) == 1).sum()) == 4
    for kept in (64 * 8, 64 * 9, 10**9):
        assert int((ohem_label(sureness(p), label, 0.7, kept) == 1).sum()) == 24 * 24


def test_ohem_keeps_all_where_no_more_than_k_pixels_are_valid() -> None:
    p = torch.full((1, 24, 24), 0.99, dtype=torch.float64)
    label = torch.ones(1, 24, 24).long()
    p[0, 20, 20] = 0.999  # above every probability that the limit could be
    label[0, :12] = 255  # a third of the 9 positions, and half of the pixels
    assert int((ohem_label(sureness(p), label, 0.7, 64 * 6) == 1).sum()) == 12 * 24
    label[0, 23, 23] = 255
    assert int((ohem_label(sureness(p), label, 0.7, 64 * 5) == 1).sum()) == 12 * 24 - 1
    p[0, 23, 0] = 0.8
    assert (ohem_label(sureness(p), label, 0.7, 64) == 1).nonzero().tolist() == [[0, 23, 0]]
    none = torch.full_like(label, 255)
    assert torch.equal(ohem_label(sureness(p), none, 0.7, 64), none)


def test_ohem_has_one_limit_for_all_images_and_frames() -> None:
    logits, label = random_case(3, size=(20, 33))
    whole = ohem_label(logits, label, 0.0, 64 * 7)
    clips = logits.transpose(0, 1)[None], label[None]
    assert torch.equal(ohem_label(*clips, 0.0, 64 * 7)[0], whole)
    other = logits.clone()
    other[1] = -other[1]
    assert not torch.equal(ohem_label(other, label, 0.0, 64 * 7)[0], whole[0])


def test_ohem_keeps_pixels_whose_probability_is_not_a_number() -> None:
    logits, label = random_case(0, ignored=0.0, size=(16, 16))
    logits[0, 2, 7, 7] = math.nan
    for kept in (0, 64, 64 * 100):
        hard = ohem_label(logits, label, 0.0, kept)
        assert hard[0, 7, 7] == label[0, 7, 7]
    assert math.isnan(Criterion(ohem=(0.0, 64))(logits, label).total.item())


def test_ohem_of_half_precision_is_computed_in_float32() -> None:
    logits, label = random_case(4, size=(24, 24))
    half = logits.bfloat16()
    expected = ohem_label(half.float(), label, 0.3, 64 * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ohem_label(half, label, 0.3, 64 * 3), expected)
    assert 0 < int((expected != 255).sum()) < int((label != 255).sum())


@pytest.mark.parametrize(
    ("logits", "arguments", "message"),
    [
        (torch.zeros(1, 2, 8, 9), (), r"label must have the shape .* got \(1, 8, 8\) for \(1, 2, 8, 9\)"),
        (torch.zeros(1, 2, 8, 8), (1.1, 100), "threshold must be from 0 to 1 and kept 0 or more, got 1.1 and 100"),
        (torch.zeros(1, 2, 8, 8), (math.nan, 100), "got nan and 100"),
        (torch.zeros(1, 2, 8, 8), (0.7, -1), "got 0.7 and -1"),
    ],
)
def test_ohem_errors(logits: torch.Tensor, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"ohem_label: .*{message}"):
        ohem_label(logits, torch.zeros(1, 8, 8).long(), *arguments)


def test_ohem_refuses_logits_without_two_axes() -> None:
    with pytest.raises(ValueError, match=r"ohem_label: logits must be .* got shape \(1, 2, 8\)"):
        ohem_label(torch.zeros(1, 2, 8), torch.zeros(1, 8).long())
