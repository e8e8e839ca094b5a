"""Images and arguments that a user gives by mistake are refused in words that say what to pass."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.models.segmenter import Segmenter

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    return Segmenter(CCNet("resnet18", 3, head_channels=8), device="cpu")


@pytest.fixture(scope="module")
def content() -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("wrap", [lambda image: image, lambda image: [image]], ids=["one", "in a list"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_the_content_of_a_file_is_no_image(segmenter: Segmenter, content: bytes, kind: Any, wrap: Any) -> None:
    """A list of its bytes or lines would be thousands of images that cannot be used."""
    with pytest.raises((TypeError, ValueError), match=rf"got {kind.__name__}; pass PIL.Image.open\(") as caught:
        segmenter.predict(wrap(kind(content)))
    assert len(str(caught.value)) < 500


def test_an_opened_file_is_passed_through_pillow(segmenter: Segmenter, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with (tmp_path / "a.png").open("rb") as file:
        with pytest.raises(TypeError, match=r"got BufferedReader; pass PIL\.Image\.open"):
            segmenter.predict(file)
        assert segmenter.predict(Image.open(file)).classes.shape == (20, 30)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"a": PIXELS}, "got dict"),
        ("https://example.com/a.jpg", "got the address https://example.com/a.jpg; download it"),
        (PIXELS > 9, "of whole numbers or floats, got bool"),
        (PIXELS.astype(np.complex64), "of whole numbers or floats, got complex64"),
        (torch.zeros(3, 9, 9, device="meta"), "got a meta one"),
        (torch.zeros(3, 9, 9).to_sparse(), "got a sparse one"),
    ],
)
def test_other_images(segmenter: Segmenter, image: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        segmenter.predict(image, value_range=(0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile": 64.5}, "tile must be 0, or 32 or more, got 64.5"),
        ({"tile": None}, "tile must be 0, or 32 or more, got None"),
        ({"batch": 2.5}, "batch must be 1 or more, got 2.5"),
        ({"scales": 1.5}, "scales must be several numbers, got 1.5"),
        ({"scales": ("1",)}, "scales must be one or more numbers"),
        ({"flip": 2}, "flip must be True or False, got 2"),
        ({"short_side": 40.5}, "got 40.5"),
        ({"short_side": True}, "got True"),
        ({"value_range": (0, 1, 2)}, r"value_range must be \(low, high\)"),
        ({"value_range": (0,)}, r"value_range must be \(low, high\)"),
        ({"value_range": 255}, r"value_range must be \(low, high\)"),
    ],
)
def test_arguments_out_of_their_range(segmenter: Segmenter, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter.predict(PIXELS, **arguments)


def test_pillow_images_of_every_mode_of_8_bits(segmenter: Segmenter) -> None:
    image = Image.fromarray(PIXELS)
    for mode in ("1", "L", "P", "LA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        assert segmenter.predict(image.convert(mode)).classes.shape == (20, 30)
    grey = segmenter.predict(image.convert("L"), probabilities=True)
    for mode in ("La", "LA"):
        found = segmenter.predict(image.convert("LA").convert(mode), probabilities=True)
        assert np.array_equal(found.probabilities, grey.probabilities)


def test_what_a_segmenter_is_made_of_is_checked() -> None:
    net = CCNet("resnet18", 3, head_channels=8, in_channels=4, mean=(0,) * 4, std=(1,) * 4)
    four = ImageFormat(4, raw=True, dtype="uint16")
    with pytest.raises(TypeError, match=r"net must be a CCNet, got str; Segmenter.load takes the path"):
        Segmenter("runs/ponds")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels must be a Labels, got list"):
        Segmenter(net, ["a", "b", "c"], images=four)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"the network's 4 channels, got 8-bit RGB; pass such as images=ImageFormat\(4"
    ):
        Segmenter(net)
    with pytest.raises(ValueError, match="value_range must be None for images of 4 channels"):
        Segmenter(net, images=four, value_range=(0, 1))
    for value_range in ((1, 0), 3, (0,)):
        with pytest.raises(ValueError, match="value_range must be"):
            Segmenter(CCNet("resnet18", 3, head_channels=8), value_range=value_range)  # type: ignore[arg-type]
    for device in ("gpu", "meta", None, "xpu"):
        with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
            Segmenter(net, images=four, device=device)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must be one of this machine"):
        Segmenter(net, images=four, device="cuda:99")
    with pytest.raises(ValueError, match=r"got 300: class 0, .*, \.\.\.; rename") as caught:
        Labels.numbered(300)
    assert len(str(caught.value)) < 400


def test_arrays_whose_channels_are_first_are_told_their_shape() -> None:
    net = CCNet("resnet18", 3, head_channels=8, in_channels=4, mean=(0,) * 4, std=(1,) * 4)
    segmenter = Segmenter(net, images=ImageFormat(4, raw=True), device="cpu")
    with pytest.raises(ValueError, match=r"got 30 channels in the shape \(4, 20, 30\); pass an array \(H, W, 4\)"):
        segmenter.predict(np.zeros((4, 20, 30), np.uint8))
    one = Segmenter(
        CCNet("resnet18", 3, head_channels=8, in_channels=1, mean=(0,), std=(1,)),
        images=ImageFormat(1, raw=True),
        device="cpu",
    )
    grey = np.repeat(PIXELS[..., :1], 3, axis=-1)
    assert np.array_equal(one.predict(grey).classes, one.predict(PIXELS[..., :1]).classes)
    with pytest.raises(ValueError, match="with 3 channels of uint8"):
        one.predict(PIXELS)
