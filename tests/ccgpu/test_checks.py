"""Messages about wrong arguments of `ccgpu.cca`: function, argument, what it must be, what it is, what to do."""

import math
import warnings

import numpy as np
import pytest
import torch

import ccgpu
from ccgpu.checks import check_inputs

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


# A forgotten batch axis


@pytest.mark.parametrize("size", [(9, 11), (5, 9, 11)])
def test_inputs_without_their_batch_axis_are_told_how_to_add_it(size: tuple[int, ...]) -> None:
    q, v = torch.zeros(2, *size), torch.zeros(16, *size)
    with pytest.raises(ValueError, match=r"if one image lacks its batch axis, pass q\[None\], k\[None\] and v\[None\]"):
        ccgpu.cca(q, q, v)


@pytest.mark.parametrize("shape", [(64, 97, 97), (64, 64, 64), (16, 33, 49), (512, 97, 193)])
def test_an_image_without_its_batch_axis_is_likely_none_of_lines(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape)
    with pytest.warns(UserWarning, match=r"of three axes are \(B, D, L\).*the batch axis: q\[None\]") as caught:
        check_inputs(q, q, q)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_inputs(q[None], q[None], q[None])


@pytest.mark.parametrize(
    ("q", "v"),
    [
        ((97, 8, 97), (97, 64, 97)),  # the columns of a map
        ((194, 64, 97), (194, 64, 97)),
        ((2, 512, 1000), (2, 512, 1000)),
        ((3, 5, 7), (3, 5, 7)),
        ((2, 1, 64), (2, 1, 64)),
        ((4, 97, 97), (4, 12, 97)),
    ],
)
def test_lines_are_no_reason_to_warn(q: tuple[int, ...], v: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_inputs(torch.zeros(q), torch.zeros(q), torch.zeros(v))


def test_the_warning_is_the_callers_and_comes_once(recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("default")
    q = torch.zeros(1, 9, 9)
    for _ in range(3):
        ccgpu.cca(q, q, q)
    (warning,) = recwarn
    assert warning.filename == __file__


def test_nothing_warns_while_torch_compiles() -> None:
    q = torch.zeros(1, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(ccgpu.cca, fullgraph=True, backend="eager")(q, q, q)
