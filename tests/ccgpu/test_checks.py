"""Messages about wrong arguments of `ccgpu.cca`: function, argument, what it must be, what it is, what to do."""

import math

import numpy as np
import pytest
import torch

import ccgpu

Q = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0, 0], Q[0, 0], Q[0, 0]), ValueError, r"cca: q must be \(B, D, L\), .*got 2 axes \(4, 5\); "),
        ((Q[None, None],) * 3, ValueError, r"cca: q must be .*got 6 axes"),
        ((Q, Q[..., :4], Q), ValueError, r"cca: k must have q's shape \(2, 3, 4, 5\), got \(2, 3, 4, 4\); "),
        ((Q, Q, Q[:1]), ValueError, r"cca: v must have q's batch and map size \(2, C, 4, 5\), got \(1, 3, 4, 5\); "),
        ((Q, Q, Q[:, :, :, 0]), ValueError, r"cca: v must have q's batch and map size"),
        ((Q[:, :0], Q[:, :0], Q), ValueError, "at least one channel"),
        ((Q, Q, Q[:, :0]), ValueError, "at least one channel"),
        ((Q.int(), Q.int(), Q.int()), TypeError, "cca: q must be float32, .*got torch.int32; "),
        ((Q, Q, Q.long()), TypeError, "cca: v must be float32, .*got torch.int64; "),
        ((Q, Q.to(torch.complex64), Q), TypeError, "cca: k must be float32, .*got torch.complex64"),
        ((Q, Q.double(), Q), TypeError, "cca: k must have q's dtype torch.float32, got torch.float64; "),
        ((Q, Q, Q.half()), TypeError, "cca: v must have q's dtype torch.float32, got torch.float16; "),
        ((Q, Q.to("meta"), Q), ValueError, "cca: k must be on q's device cpu, got meta; "),
        (
            (Q.numpy(), Q, Q),
            TypeError,
            "cca: q, k, v must be arrays of one kind, got q numpy.ndarray, k torch.Tensor, v torch.Tensor; convert ",
        ),
        ((Q, Q, None), TypeError, "cca: v must be a torch.Tensor, got builtins.NoneType; "),
        ((Q.to_sparse(), Q, Q), TypeError, "cca: q must be a dense"),
    ],
)
def test_inputs(arguments, error, message):
    with pytest.raises(error, match=message):
        ccgpu.cca(*arguments)


@pytest.mark.parametrize(
    ("scale", "error"),
    [(math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), (torch.ones(()), TypeError), (True, TypeError)],
)
def test_scale(scale, error):
    with pytest.raises(error, match=r"cca: scale must be .*, got .*; "):
        ccgpu.cca(Q, Q, Q, scale=scale)


def test_numpy_scalar_scale_is_a_number():
    torch.testing.assert_close(ccgpu.cca(Q + 1, Q + 1, Q, scale=np.float64(0.5)), ccgpu.cca(Q + 1, Q + 1, Q, scale=0.5))


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"cca: backend must be one of \['numba_cpu', .*\], got 'gpu'; "):
        ccgpu.cca(Q, Q, Q, backend="gpu")
    with pytest.raises(TypeError, match="cca: backend must be a name or None, got int; "):
        ccgpu.cca(Q, Q, Q, backend=3)


def test_keyword_only_options():
    with pytest.raises(TypeError):
        ccgpu.cca(Q, Q, Q, 0.5)
