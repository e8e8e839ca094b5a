"""The commands of docs/checkpoints.md convert, predict with, explain and export a published mmsegmentation file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.ccnet import CCNet
from ccgpu.train.data.cityscapes_labels import CITYSCAPES
from tests.docs.reader import ROOT, Reader
from tests.models.published_networks import mmsegmentation_network
from tests.train.browser import CHROMIUM, opened, started


@pytest.mark.parametrize("exported", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_published_checkpoint_goes_all_the_way(exported: bool, folder: Path, data: Callable[[str], Path]) -> None:
    if exported:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    Reader(data, leave_out=() if exported else ("ccgpu export", "ccnet.onnx")).read(ROOT / "docs" / "checkpoints.md")

    pixels = np.array(Image.open("photos/street.jpg"))
    photos = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    state = torch.load("ccnet_r50-d8_769x769.pth", weights_only=True)["state_dict"]
    expected, _ = mmsegmentation_network(state, photos, align_corners=True)
    close = 1e-4 * expected.abs().max().item()

    # The converted file gives the published network's logits. The predicted classes agree wherever the two highest
    # logits differ by more than the tolerance.
    net = CCNet.from_checkpoint("ccnet.safetensors")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    images = (photos - mean) / std
    torch.testing.assert_close(net(images), expected, rtol=0, atol=close)
    best, second = expected[0].topk(2, dim=0).values
    sure = (best - second > 2 * close).numpy()
    predicted = np.asarray(Image.open("predicted/ids/street.png"))
    assert sure.mean() > 0.9
    assert len(np.unique(predicted)) > 1
    assert np.array_equal(predicted[sure], CITYSCAPES.to_file[expected[0].argmax(0).numpy()][sure])
    records = [json.loads(line) for line in Path("predicted/predictions.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == ["park", "street"]
    for name in ("masks/park.png", "overlays/street.jpg", "sheet.jpg"):
        assert Image.open(f"predicted/{name}").size[0] >= pixels.shape[1]
    assert {path.suffix for path in Path("predicted-too/overlays").iterdir()} >= {".jpg", ".mp4"}

    if exported:
        check_exported(images, expected)

    # The attention maps: the image, and the page clicked through in a browser.
    assert Image.open("maps.png").size[0] > 3 * pixels.shape[1]
    if CHROMIUM is not None:
        shown = "document.body.dataset.chosen !== undefined"
        with started() as browser, opened(browser, Path("maps.html").resolve(), shown=shown) as tab:
            view = tab.locator("canvas").nth(1)
            box = view.bounding_box()
            for y, x in [(5, 90), (60, 3)]:
                across, down = (x + 0.5) / pixels.shape[1], (y + 0.5) / pixels.shape[0]
                view.click(position={"x": across * box["width"], "y": down * box["height"]})
                chosen = tuple(int(index) for index in tab.evaluate("document.body.dataset.chosen").split(","))
                assert max(abs(chosen[0] - y), abs(chosen[1] - x)) <= 1
                for loops in (1, 2, 3):
                    seen = net.attention_map(images, chosen, recurrence=loops)[0].flatten()
                    shown = torch.tensor(tab.evaluate(f"Array.from(maps[{loops - 1}])"))
                    torch.testing.assert_close(shown, seen, rtol=0, atol=1e-4)


def check_exported(images: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that the exported files give a network's logits, `expected`."""
    import onnxruntime

    session = onnxruntime.InferenceSession("ccnet.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert torch.export.load("ccnet.pt2").module()(images).shape == expected.shape
