"""Messages about wrong arguments of `ccgpu.affinity` and `ccgpu.aggregate`."""

import pytest
import torch

import ccgpu

Q = torch.zeros(2, 3, 4, 5)
W = torch.zeros(2, 8, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Q[0, 0], Q[0, 0]), ValueError, r"affinity: q must be \(B, D, L\), .*got 2 axes \(4, 5\); "),
        ((Q, Q[..., :4]), ValueError, r"affinity: k must have q's shape \(2, 3, 4, 5\), got \(2, 3, 4, 4\); "),
        ((Q[:, :0], Q[:, :0]), ValueError, r"affinity: q must have at least one channel .*got \(2, 0, 4, 5\); "),
        ((Q[:, :, :0], Q[:, :, :0]), ValueError, r"affinity: q must have .*got \(2, 3, 0, 5\); only the batch"),
        ((Q.int(), Q.int()), TypeError, "affinity: q must be float32, .*got torch.int32; "),
        ((Q, Q.to(torch.complex64)), TypeError, "affinity: k must be float32, .*got torch.complex64; "),
        ((Q, Q.double()), TypeError, "affinity: k must have q's dtype torch.float32, got torch.float64; "),
        ((Q, Q.to("meta")), ValueError, "affinity: k must be on q's device cpu, got meta; "),
        (
            (Q.numpy(), Q),
            TypeError,
            "affinity: q, k must be arrays of one kind, got q numpy.ndarray, k torch.Tensor; convert ",
        ),
        ((Q, Q.to_sparse()), TypeError, "affinity: k must be a dense"),
    ],
)
def test_affinity_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ccgpu.affinity(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W, Q[0, 0]), ValueError, r"aggregate: v must be \(B, C, L\), .*got 2 axes \(4, 5\); "),
        ((W, Q[:, :0]), ValueError, r"aggregate: v must have at least one channel .*got \(2, 0, 4, 5\); "),
        ((W[:, :7], Q), ValueError, r"weights must be \(2, 8, 4, 5\) for v \(2, 3, 4, 5\), .*got \(2, 7, 4, 5\); take"),
        ((W[:1], Q), ValueError, r"weights must be \(2, 8, 4, 5\) .*got \(1, 8, 4, 5\); "),
        ((W[..., 0], Q), ValueError, r"weights must be \(2, 8, 4, 5\) .*got \(2, 8, 4\); "),
        ((W.double(), Q), TypeError, r"weights must be torch.float32 for v torch.float32, got torch.float64; "),
        ((W.half(), Q.bfloat16()), TypeError, r"must be torch.bfloat16 or torch.float32 for v .*got torch.float16; "),
        ((W, Q.double()), TypeError, "aggregate: weights must be torch.float64 for v torch.float64, got torch.float32"),
        ((W, Q.long()), TypeError, "aggregate: v must be float32, .*got torch.int64; "),
        ((W.bool(), Q), TypeError, "aggregate: weights must be float32, .*got torch.bool; "),
        ((W.to("meta"), Q), ValueError, "aggregate: weights must be on v's device cpu, got meta; "),
        ((None, Q), TypeError, "aggregate: weights must be a torch.Tensor, got builtins.NoneType; "),
        ((W, Q.to_sparse()), TypeError, "aggregate: v must be a dense"),
    ],
)
def test_aggregate_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ccgpu.aggregate(*arguments)


def test_float64_is_not_mixed_under_autocast():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"weights must be torch[.]float64"),
    ):
        ccgpu.aggregate(W, Q.double())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=r"got torch[.]float64"):
        ccgpu.aggregate(W.double(), Q)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"affinity: backend must be one of \['numba_cpu', .*\], got 'gpu'; "):
        ccgpu.affinity(Q, Q, backend="gpu")
    with pytest.raises(TypeError, match="aggregate: backend must be a name or None, got int; "):
        ccgpu.aggregate(W, Q, backend=3)


def test_backend_that_cannot_run_is_never_replaced(monkeypatch):
    monkeypatch.setenv("CCGPU_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"affinity: CCGPU_BACKEND must be one of \[.*\], got 'cuda'; "):
        ccgpu.affinity(Q, Q)
    with pytest.raises(RuntimeError, match=r"aggregate: backend='cupy' cannot run this call: "):
        ccgpu.aggregate(W, Q, backend="cupy")
