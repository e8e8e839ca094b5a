"""The reference against tables computed by hand, and against properties that follow from the definition."""

import math

import numpy as np
import pytest

from ccgpu.kernels import reference


def channel(rows):
    """Return a map (H, W) as one image with one channel."""
    return np.array(rows, dtype=np.float64)[None, None]


# A 2x2 map, D = C = 1, scale 1; L2 is the natural logarithm of 2.
# q = [[L2, 0], [0, 0]], k = [[1, 2], [3, 5]], v = [[1, 10], [100, 1000]].
# Position (0, 0) attends to (1, 0), (0, 0), (0, 1): energies L2 * (3, 1, 2), weights (8, 2, 4) / 14.
# The three other queries are 0: equal weights 1/3 over their three positions.
TABLE_Q = channel([[math.log(2), 0], [0, 0]])
TABLE_K = channel([[1, 2], [3, 5]])
TABLE_V = channel([[1, 10], [100, 1000]])


def test_forward_hand_table():
    out, lse = reference.forward(TABLE_Q, TABLE_K, TABLE_V, 1.0)
    expected = [
        [(8 * 100 + 2 * 1 + 4 * 10) / 14, (1000 + 10 + 1) / 3],
        [(1 + 100 + 1000) / 3, (10 + 1000 + 100) / 3],
    ]
    np.testing.assert_allclose(out[0, 0], expected, rtol=1e-14)
    np.testing.assert_allclose(lse[0], [[math.log(14), math.log(3)], [math.log(3), math.log(3)]], rtol=1e-14)


def test_forward_scale_hand_table():
    out, lse = reference.forward(TABLE_Q, TABLE_K, TABLE_V, 2.0)  # energies double: weights (64, 4, 16) / 84
    assert out[0, 0, 0, 0] == pytest.approx((64 * 100 + 4 * 1 + 16 * 10) / 84, rel=1e-14)
    assert lse[0, 0, 0] == pytest.approx(math.log(84), rel=1e-14)


def test_backward_hand_table():
    # Only out at (0, 0) has a gradient, 1. Weights w = (8, 2, 4)/14 on (1, 0), (0, 0), (0, 1); out = 842/14.
    dout = channel([[1, 0], [0, 0]])
    out, lse = reference.forward(TABLE_Q, TABLE_K, TABLE_V, 1.0)
    dq, dk, dv = reference.backward(dout, TABLE_Q, TABLE_K, TABLE_V, out, lse, np.zeros_like(lse), 1.0)
    mean = 842 / 14
    d10, d00, d01 = 8 / 14 * (100 - mean), 2 / 14 * (1 - mean), 4 / 14 * (10 - mean)
    np.testing.assert_allclose(dv[0, 0], [[2 / 14, 4 / 14], [8 / 14, 0]], rtol=1e-14)
    np.testing.assert_allclose(dq[0, 0], [[3 * d10 + 1 * d00 + 2 * d01, 0], [0, 0]], rtol=1e-13)
    np.testing.assert_allclose(dk[0, 0], math.log(2) * np.array([[d00, d01], [d10, 0]]), rtol=1e-13)


def test_backward_of_lse_hand_table():
    # The gradient of lse at (0, 0) is the weights: dk = w q, dq = sum w k; v has no part.
    dlse = channel([[1, 0], [0, 0]])[0]
    out, lse = reference.forward(TABLE_Q, TABLE_K, TABLE_V, 1.0)
    dq, dk, dv = reference.backward(np.zeros_like(out), TABLE_Q, TABLE_K, TABLE_V, out, lse, dlse, 1.0)
    assert not dv.any()
    assert dq[0, 0, 0, 0] == pytest.approx((8 * 3 + 2 * 1 + 4 * 2) / 14, rel=1e-14)
    np.testing.assert_allclose(dk[0, 0], math.log(2) * np.array([[2, 4], [8, 0]]) / 14, rtol=1e-14)


def test_three_axes_count_the_centre_once():
    # Equal energies: out is the mean over T + H + W - 2 positions.
    sizes = (2, 3, 4)
    v = np.arange(24.0).reshape(1, 1, *sizes)
    out, lse = reference.forward(np.zeros((1, 1, *sizes)), np.zeros((1, 1, *sizes)), v, 1.0)
    assert np.allclose(lse, math.log(2 + 3 + 4 - 2))
    # At (0, 0, 0): T gives 12; H gives 4, 8; W gives 0, 1, 2, 3.
    assert out[0, 0, 0, 0, 0] == pytest.approx((12 + 4 + 8 + 0 + 1 + 2 + 3) / 7)


def test_single_position_returns_v():
    v = np.full((1, 3, 1, 1), 5.0)
    out, lse = reference.forward(np.full((1, 2, 1, 1), 3.0), np.full((1, 2, 1, 1), 2.0), v, 0.5)
    assert np.array_equal(out, v)
    assert lse[0, 0, 0] == 6.0


def test_neighbours_are_the_lines_once():
    sizes = (3, 4, 2)
    for u in np.ndindex(*sizes):
        around = list(reference.neighbours(u, sizes))
        assert len(around) == len(set(around)) == sum(sizes) - 2
        assert all(sum(a != b for a, b in zip(u, i, strict=True)) <= 1 for i in around)


def test_minus_infinity_and_nan_reach_those_who_attend_only():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1, 3, 4)) for _ in range(3))
    v[0, 0, 1, 2] = np.nan
    out, _ = reference.forward(q, k, v, 1.0)
    touched = np.zeros((3, 4), bool)
    touched[1, :] = touched[:, 2] = True
    assert np.array_equal(np.isnan(out[0, 0]), touched)


def test_infinite_energies():
    q, k, v = np.ones((1, 1, 1, 3)), np.array([[[[-np.inf, 0.0, 0.0]]]]), np.array([[[[5.0, 1.0, 3.0]]]])
    out, lse = reference.forward(q, k, v, 1.0)
    np.testing.assert_allclose(out, 2.0)  # the first position has weight 0
    np.testing.assert_allclose(lse, math.log(2))
    out, lse = reference.forward(q, -k, v, 1.0)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()
    out, lse = reference.forward(q, np.full_like(k, -np.inf), v, 1.0)
    assert np.isnan(out).all()
    assert (lse == -np.inf).all()
