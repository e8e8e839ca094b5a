"""Networks with attention in torch.fx, torch.jit and ONNX."""

from __future__ import annotations

import copy
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccgpu
from ccgpu.models.attention import RCCA, CrissCrossAttention
from ccgpu.models.ccnet import CCNet
from ccgpu.models.context import CONTEXTS
from tests.ccgpu.exports.cases import run_without_ccgpu

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DYNAMIC = torch.export.Dim.DYNAMIC


class Segmenter(nn.Module):
    """A user's network around RCCA."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.context = RCCA(16, gamma=1.0)
        self.logits = nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        x = self.logits(torch.cat([x, self.context(x)], 1))
        return nn.functional.interpolate(x, size=images.shape[-2:], mode="bilinear")


def segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter().eval()


def rcca() -> RCCA:
    torch.manual_seed(0)
    return RCCA(3, gamma=1.0).eval()


def ccnet(**options: Any) -> CCNet:
    torch.manual_seed(0)
    return CCNet("local", num_classes=4, head_channels=8, **{"gamma": 1.0, **options}).eval()


def random_images(batch: int, *sizes: int) -> Tensor:
    return torch.randn(batch, 3, *sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_symbolic_trace_of_attention(dims: int, recompute: bool) -> None:
    for module in (
        CrissCrossAttention(8, dims=dims, gamma=1.0, recompute=recompute),
        RCCA(8, 3, dims=dims, gamma=1.0, recompute=recompute),
    ):
        traced = torch.fx.symbolic_trace(module)
        for sizes in ((4, 5, 6), (1, 9, 2)):
            x = torch.randn(2, 8, *sizes[:dims])
            torch.testing.assert_close(traced(x), module(x))
        with pytest.raises(ValueError, match=f"{type(module).__name__}: x must have 8 channels"):
            traced(torch.randn(2, 7, *(4, 5, 6)[:dims]))


@pytest.mark.parametrize("context", CONTEXTS)
def test_symbolic_trace_of_ccnet(context: str) -> None:
    net = ccnet(context=context)
    traced = copy.deepcopy(torch.fx.symbolic_trace(net))
    for size in ((33, 49), (64, 57)):
        assert_same(traced(random_images(2, *size)), net(random_images(2, *size)))
    with pytest.raises(ValueError, match="CCNet: images must be"):
        traced(torch.randn(1, 4, 33, 33))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert traced(random_images(1, 33, 49)).dtype == torch.float32  # as the network's logits


@pytest.mark.parametrize("backbone", ["resnet18", "efficientnet-lite0"])
def test_symbolic_trace_of_backbones(backbone: str) -> None:
    net = CCNet(backbone, num_classes=4, head_channels=8, gamma=1.0).eval()
    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(random_images(1, 40, 57)), net(random_images(1, 40, 57)))


def test_symbolic_trace_of_clips() -> None:
    net = ccnet(dims=3)
    traced = torch.fx.symbolic_trace(net)
    for sizes in ((2, 17, 25), (3, 20, 16)):
        assert_same(traced(random_images(2, *sizes)), net(random_images(2, *sizes)))


def test_symbolic_trace_records_the_functions() -> None:
    """Whoever transforms the graph finds the public functions in it, with their arguments."""

    class Stages(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, lse = ccgpu.cca(q, k, v, scale=0.5, return_lse=True)
            return out + ccgpu.aggregate(ccgpu.affinity(q, k), v) + lse.unsqueeze(1)

    traced = torch.fx.symbolic_trace(Stages())
    called = {node.target: node.kwargs for node in traced.graph.nodes if node.op == "call_function"}
    assert called[ccgpu.cca] == {"scale": 0.5, "return_lse": True, "backend": None}
    assert {ccgpu.affinity, ccgpu.aggregate} <= called.keys()
    q, k, v = torch.randn(3, 2, 4, 5, 6).unbind()
    torch.testing.assert_close(traced(q, k, v), Stages()(q, k, v))


@pytest.mark.parametrize("build", [rcca, segmenter, ccnet])
def test_script_is_refused_with_what_to_use(build: Any) -> None:
    with pytest.raises(RuntimeError, match=r"torch.jit.script: (RCCA|CCNet) must be exported or traced.*decomposed"):
        torch.jit.script(build())


def onnx_model(net: nn.Module, images: Tensor, exporter: str) -> bytes:
    """Export a network with dynamic batch, height and width."""
    if exporter == "torch.export":
        axes = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
        program = torch.onnx.export(net, (images,), dynamic_shapes=(axes,), dynamo=True, verbose=False)
        return program.model_proto.SerializeToString()
    names = {"images": {0: "batch", 2: "height", 3: "width"}}
    file = io.BytesIO()
    torch.onnx.export(net, (images,), file, input_names=["images"], dynamic_axes=names, dynamo=False, opset_version=18)
    return file.getvalue()


def in_onnxruntime(model: bytes, images: Tensor) -> Tensor:
    """Run an ONNX model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs onnx, onnxruntime and onnxscript",
)


@needs_onnx
@pytest.mark.parametrize(
    ("build", "exporter"),
    [
        (segmenter, "torch.export"),
        (segmenter, "TorchScript"),
        (lambda: ccnet(align_corners=False), "TorchScript"),
        pytest.param(lambda: ccnet(align_corners=False), "torch.export", marks=pytest.mark.slow),
    ],
)
def test_onnx_of_networks(build: Any, exporter: str) -> None:
    net = build()
    model = onnx_model(net, random_images(2, 33, 49), exporter)
    for size in ((1, 40, 40), (3, 64, 57)):
        images = random_images(*size)
        with torch.no_grad():
            expected = net(images)
        assert_same(in_onnxruntime(model, images), expected)


@needs_onnx
@pytest.mark.parametrize("build", [rcca, segmenter, ccnet])
@pytest.mark.parametrize("exporter", [pytest.param("torch.export", marks=pytest.mark.slow), "TorchScript"])
def test_onnx_of_float16_networks(build: Any, exporter: str) -> None:
    net = build().half()
    model = onnx_model(net, random_images(2, 33, 49).half(), exporter)
    images = random_images(1, 40, 57).half()
    with torch.no_grad():
        expected = net(images)
    found = in_onnxruntime(model, images)
    assert found.dtype == torch.float16
    # Two units of the last place of the largest value: onnxruntime rounds to 16 bits in fewer places than torch does.
    unit = torch.finfo(torch.float16).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * unit)


@needs_onnx
@pytest.mark.parametrize(
    ("dtype", "refusal"),
    [
        # ONNX has some from opset 22 on, which TorchScript's exporter does not write.
        (torch.bfloat16, r"'tensor\(bfloat16\)' of input parameter .* of operator \(Conv\)"),
        (torch.float64, r"Could not find an implementation for Conv"),
    ],
)
def test_onnxruntime_has_no_convolutions_of_other_dtypes(dtype: torch.dtype, refusal: str) -> None:
    """If it had, docs/export.md would have to say so."""
    images = random_images(2, 9, 13).to(dtype)
    model = onnx_model(rcca().to(dtype), images, "TorchScript")
    with pytest.raises(Exception, match=refusal):
        in_onnxruntime(model, images.float())


def test_traced_and_exported_networks_run_without_this_package(tmp_path: Path) -> None:
    nets = {"segmenter": segmenter(), "ccnet": ccnet()}
    images = random_images(2, 33, 49)
    axes = {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    with torch.no_grad():
        for name, net in nets.items():
            with ccgpu.decomposed():
                torch.jit.trace(net, images, check_trace=False).save(tmp_path / f"{name}.pt")
            found = [(x, net(x)) for x in (random_images(1, 40, 40), random_images(3, 64, 57))]
            torch.save(found, tmp_path / f"{name}.data")
        with ccgpu.decomposed():
            program = torch.export.export(nets["segmenter"], (images,), dynamic_shapes=(axes,))
        torch.export.save(program, tmp_path / "net.pt2")
    run_without_ccgpu(
        """
import torch
traced = [(torch.jit.load(f"{name}.pt"), name) for name in ("segmenter", "ccnet")]
for net, name in (*traced, (torch.export.load("net.pt2").module(), "segmenter")):
    for images, expected in torch.load(f"{name}.data"):
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-4)
""",
        tmp_path,
    )
