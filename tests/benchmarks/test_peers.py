"""The peers compute what they are compared as: values and gradients, on the CPU."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import ccgpu
from benchmarks import flex, line_sdpa, peers
from benchmarks.cases import LAYOUTS, in_layout

CPU = torch.device("cpu")
SIZES = [(9, 14), (1, 7), (6, 1), (3, 6, 5), (1, 4, 1)]


def gradients(function, tensors, dout):
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def inputs(sizes, d, c, layout="NCHW", dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(sizes))
    q, k, v, dout = (torch.randn(2, n, *sizes, generator=generator, dtype=dtype) for n in (d, d, c, c))
    return tuple(in_layout(x, layout) for x in (q, k, v)), dout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("function", "channels"),
    [(peers.einsum, 7), (peers.authors_bmm, 7), (peers.batched_products, 7), (line_sdpa.line_sdpa, 4)],
)
def test_values_and_gradients(function, channels, sizes, layout):
    tensors, dout = inputs(sizes, 4, channels, layout)
    for a, b in zip(gradients(function, tensors, dout), gradients(ccgpu.cca, tensors, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_permuted_products_stay_in_the_dtype_of_the_inputs(dtype):
    tensors, dout = inputs((5, 6), 4, 7, dtype=dtype)
    assert {x.dtype for x in gradients(peers.batched_products, tensors, dout)} == {dtype}


@pytest.mark.parametrize("sizes", [(9, 14), (3, 6, 5)])
def test_permuted_products_read_channels_last_memory_in_place(sizes, monkeypatch):
    """Of one image every product of the forward takes q, k and v where they are: views of their memory."""
    tensors, _ = inputs(sizes, 4, 7, "channels_last")
    tensors = tuple(x[:1] for x in tensors)
    multiply, factors = torch.Tensor.__matmul__, []
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: factors.extend((a, b)) or multiply(a, b))
    peers.batched_products(*tensors)
    memories = {x.untyped_storage().data_ptr() for x in tensors}
    in_place = [x.untyped_storage().data_ptr() in memories for x in factors]
    assert in_place == [True] * 2 * len(sizes) + [False, True] * len(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("function", [peers.einsum, peers.batched_products])
def test_compiled_values_and_gradients(function):
    tensors, dout = inputs((9, 14), 4, 7)
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    for a, b in zip(gradients(compiled, tensors, dout), gradients(ccgpu.cca, tensors, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("sizes", [(9, 14), (3, 6, 5), (40,)])
def test_flex_values(sizes, block):
    tensors, _ = inputs(sizes, 16, 24, dtype=torch.float32)
    attend = flex.flex(sizes, block, CPU, compiled=False)
    torch.testing.assert_close(attend(*tensors), ccgpu.cca(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_flex_compiled_values():
    tensors, _ = inputs((9, 14), 16, 24, dtype=torch.float32)
    torch.testing.assert_close(flex.flex((9, 14), 16, CPU)(*tensors), ccgpu.cca(*tensors), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("sizes", [(9, 14), (3, 6, 5)])
def test_blocks_are_those_that_torch_finds(sizes, block):
    mask = flex.criss_cross_mask(sizes, block, CPU)
    n = torch.Size(sizes).numel()
    theirs = create_block_mask(mask.mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(mask.to_dense() > 0, theirs.to_dense() > 0)
    assert flex.touched(mask) == pytest.approx(float((theirs.to_dense() > 0).double().mean()))


def test_share_of_blocks_touched():
    """At torch's own block size nothing is skipped on a 97x97 map."""
    shares = [flex.touched(flex.criss_cross_mask((97, 97), block, CPU)) for block in (16, 32, 128)]
    assert shares == pytest.approx([0.330, 0.658, 1.0], abs=1e-3)


def test_dense_is_attention_over_all_positions():
    (q, k, v), _ = inputs((3, 4), 4, 5)
    weights = torch.softmax(torch.einsum("bdx,bdy->bxy", q.flatten(2), k.flatten(2)), -1)
    expected = torch.einsum("bxy,bcy->bcx", weights, v.flatten(2)).view(2, 5, 3, 4)
    torch.testing.assert_close(peers.dense_sdpa(q, k, v), expected)


@pytest.mark.parametrize("sizes", [(33, 31), (3, 32, 5)])
def test_line_sdpa_calls_the_fused_attention_of_a_gpu_as_torch_declares_it(sizes, monkeypatch):
    """Schemas, shapes and the padded lse of the kernels that a GPU runs, on tensors without data."""
    lengths = []

    class Watched:
        def __getattr__(self, name):
            function = getattr(torch.ops.aten, name)
            if not name.endswith("efficient_attention_backward"):
                return function
            return lambda *inputs, **scale: lengths.append(inputs[6].shape[-1]) or function(*inputs, **scale)

    monkeypatch.setattr(line_sdpa, "aten", Watched())
    shapes = [(2, n, *sizes) for n in (64, 64, 512)]
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape in shapes)
    out = line_sdpa.line_sdpa(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == v.shape
    assert [g.shape for g in gradients] == shapes
    assert lengths == [-(-n // 32) * 32 for n in sizes]
