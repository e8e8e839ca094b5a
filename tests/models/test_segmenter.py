"""From images to masks in Python: every kind of image, batches, large images, and what a result can do."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.image_files import BadImage, read_image
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.labels import Labels
from ccgpu.models.prediction import NonFiniteScores, Prediction
from ccgpu.models.segmentation import Segmentation
from ccgpu.models.segmenter import Segmenter
from tests.train.networks import write_network

LABELS = Labels(
    ("soil", "water", "reed"), np.array([[90, 60, 30], [20, 90, 220], [60, 200, 40]], np.uint8), (4, 0, 250)
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    write_network(path, LABELS, num_classes=3)
    return path


@pytest.fixture(scope="module")
def segmenter(file: Path) -> Segmenter:
    return Segmenter.load(file, device="cpu")


def image(height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width]


def scores(net: CCNet, pixels: np.ndarray, prediction: Prediction | None = None) -> torch.Tensor:
    """Return the scores of one image, (K, H, W)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    images = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) - mean) / std)[None]
    return (prediction or Prediction())(net, images)[0]


# Images


def test_every_kind_of_image_gives_the_classes_of_the_network(segmenter: Segmenter, tmp_path: Path) -> None:
    pixels = image()
    expected = scores(segmenter.net, pixels).argmax(0).numpy()
    assert len(np.unique(expected)) > 1, "an image of one class would show nothing"
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    single = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels, pixels[::-1][::-1], tensor]
    for given in single:
        result = segmenter.predict(given)
        assert isinstance(result, Segmentation)
        assert result.classes.dtype == np.uint8
        assert np.array_equal(result.classes, expected), type(given)
        assert np.array_equal(np.asarray(result.image), pixels)
    for given in ([pixels], (pixels,), pixels[None], tensor[None], iter([pixels])):
        (result,) = segmenter.predict(given)
        assert np.array_equal(result.classes, expected), type(given)


def test_grey_images_are_those_of_three_equal_channels(segmenter: Segmenter) -> None:
    grey = image()[..., 0]
    expected = segmenter.predict(np.stack([grey] * 3, axis=-1)).classes
    for given in (grey, grey[..., None], Image.fromarray(grey), torch.from_numpy(grey.copy())):
        assert np.array_equal(segmenter.predict(given).classes, expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (np.zeros((8, 9, 3), np.float32), ValueError, "float32, whose range is not known.*value_range"),
        (torch.zeros(3, 8, 9), ValueError, "float32, whose range is not known"),
        (np.zeros((8, 9, 3), np.uint16), ValueError, "uint16, whose range is not known"),
        (np.zeros((8, 9, 4), np.uint8), ValueError, r"got 4 in the shape \(8, 9, 4\); pass an array \(H, W, 3\)"),
        (
            torch.zeros(8, 9, 3, dtype=torch.uint8),
            ValueError,
            r"got 8 in the shape \(8, 9, 3\); .* a tensor",
        ),
        (np.zeros((2, 2, 8, 9, 3), np.uint8), ValueError, "shape"),
        (np.zeros((0, 9, 3), np.uint8), ValueError, "pixel"),
        (7, TypeError, "must be a path, .* got int"),
        ([7], ValueError, "image 0: .*must be a Pillow image, an array or a tensor, got int"),
        ("nowhere.jpg", FileNotFoundError, "no file nowhere.jpg"),
        (".", BadImage, r"must be files, got the folder \.; pass a list"),
    ],
)
def test_what_is_no_image_is_refused(given: Any, error: type[Exception], message: str, segmenter: Segmenter) -> None:
    with pytest.raises(error, match=message):
        segmenter.predict(given)


def test_a_range_of_values_is_used_where_it_is_named(segmenter: Segmenter) -> None:
    pixels = image()
    expected = segmenter.predict(pixels).classes
    for given, value_range in (
        (pixels.astype(np.float32) / 255, (0, 1)),
        (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1, (-1, 1)),
        (pixels.astype(np.float64), (0, 255)),
        (pixels.astype(np.uint16) * 257, (0, 65535)),
    ):
        assert np.array_equal(segmenter.predict(given, value_range=value_range).classes, expected), value_range
    with pytest.raises(ValueError, match="value_range must be"):
        segmenter.predict(pixels, value_range=(1, 1))


def test_files_and_pillow_images_of_16_bits_have_the_range_of_the_network(file: Path, tmp_path: Path) -> None:
    grey = image()[..., 0]
    deep = grey.astype(np.uint16) << 4
    Image.fromarray(deep).save(tmp_path / "deep.png")
    ranged = Segmenter.load(file, device="cpu", value_range=(0, 255 << 4))
    expected = ranged.predict(grey).classes
    assert np.array_equal(ranged.predict(tmp_path / "deep.png").classes, expected)
    assert np.array_equal(ranged.predict(Image.fromarray(deep)).classes, expected)
    with pytest.raises(ValueError, match="uint16, whose range is not known"):
        ranged.predict(deep)


def test_files_that_are_nearly_black_are_warned_of(segmenter: Segmenter, tmp_path: Path) -> None:
    values = (image()[..., 0].astype(np.uint16) << 4) | 15  # 12 bits, the highest 4095
    Image.fromarray(values).save(tmp_path / "deep.png")
    with pytest.warns(UserWarning, match=r"deep.png is nearly black.*value_range=\(0, 4095\)") as told:
        segmenter.predict([tmp_path / "deep.png"])
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter.predict(tmp_path / "deep.png", value_range=(0, 4095))
        segmenter.predict(np.zeros((40, 56, 3), np.uint8))  # an array says what it is


def test_files_are_turned_upright_and_pillow_images_must_be(segmenter: Segmenter, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image(40, 56)).save(tmp_path / "phone.png", exif=exif)
    result = segmenter.predict(tmp_path / "phone.png")
    assert result.classes.shape == (56, 40)
    assert np.array_equal(np.asarray(result.image), read_image(tmp_path / "phone.png"))
    with (
        Image.open(tmp_path / "phone.png") as opened,
        pytest.raises(ValueError, match=r"EXIF orientation 6; pass PIL\.ImageOps\.exif_transpose"),
    ):
        segmenter.predict(opened)


def test_damaged_files_are_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "changed.png"):
        noise.save(tmp_path / name, compress_level=0)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    changed = bytearray((tmp_path / "changed.png").read_bytes())
    changed[-13] ^= 1
    (tmp_path / "changed.png").write_bytes(changed)
    with pytest.raises(BadImage, match="pixels are missing before its end marker"):
        segmenter.predict(tmp_path / "cut.jpg")
    with pytest.raises(BadImage, match="checksum"):
        segmenter.predict(tmp_path / "changed.png")
    (tmp_path / "short.jpg").write_bytes(content[: len(content) // 2])
    with Image.open(tmp_path / "short.jpg") as opened, pytest.raises(BadImage, match=r"must decode, got .*truncated"):
        segmenter.predict(opened)


def test_all_bad_images_of_a_list_are_named_before_anything_is_computed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.png").write_text("no image")
    segmenter = Segmenter.load(file, device="cpu")
    monkeypatch.setattr(segmenter.net, "forward", lambda images: pytest.fail("computed"))
    given = [image(), tmp_path / "text.png", tmp_path / "missing.jpg", np.zeros((4, 4, 9), np.uint8)]
    with pytest.raises(ValueError, match="got 3 of 4 that are not") as caught:
        segmenter.predict(given)
    lines = str(caught.value).splitlines()[1:]
    assert [line.partition(": ")[0] for line in lines] == [
        str(tmp_path / "text.png"),
        str(tmp_path / "missing.jpg"),
        "image 3",
    ]


# Lists


def test_lists_keep_their_order_and_run_in_batches(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(40, 56), (24, 24), (40, 56), (40, 56), (24, 24), (8, 70), (40, 56)]
    given = [image(*size, seed=seed) for seed, size in enumerate(sizes)]
    alone = [segmenter.predict(pixels, probabilities=True) for pixels in given]
    seen: list[tuple[int, ...]] = []
    forward = segmenter.net.forward
    monkeypatch.setattr(segmenter.net, "forward", lambda images: (seen.append(tuple(images.shape)), forward(images))[1])
    results = segmenter.predict(given, batch=3, probabilities=True)
    assert seen == [(3, 3, 40, 56), (2, 3, 24, 24), (1, 3, 8, 70), (1, 3, 40, 56)]
    for pixels, one, result in zip(given, alone, results, strict=True):
        assert np.array_equal(np.asarray(result.image), pixels)
        assert np.allclose(result.probabilities, one.probabilities, atol=1e-5)
        assert (result.classes == one.classes).mean() > 0.99
    seen.clear()
    segmenter.predict([image(64, 64)] * 3, tile=64)
    assert [shape[0] for shape in seen] == [2, 1], "together no more pixels than two tiles"
    assert segmenter.predict([]) == []


def test_progress_wraps_batches_and_tiles(segmenter: Segmenter) -> None:
    wrapped: list[int] = []

    def progress(items: Any) -> Any:
        wrapped.append(len(items))
        return items

    segmenter.predict(image(), progress=progress)
    assert wrapped == []
    segmenter.predict([image(), image(), image(8, 8)], progress=progress)
    assert wrapped == [2]
    segmenter.predict(image(80, 100), tile=32, progress=progress)
    assert wrapped == [2, 12]


# Scores


def test_probabilities_are_those_of_the_classes(segmenter: Segmenter) -> None:
    pixels = image()
    for options in ({}, {"flip": True, "scales": (0.5, 1)}, {"tile": 32}, {"short_side": 24}):
        how = {name: value for name, value in options.items() if name != "tile"}
        result = segmenter.predict(pixels, probabilities=True, **options)
        found = result.probabilities
        assert (found.shape, found.dtype) == ((3, 40, 56), np.float32)
        assert np.abs(found.sum(axis=0) - 1).max() < 1e-5
        assert np.array_equal(np.take_along_axis(found, result.classes[None], axis=0)[0], found.max(axis=0))
        if "tile" not in options:
            expected = scores(segmenter.net, pixels, Prediction(**how))
            assert np.allclose(found, expected.softmax(0).numpy(), atol=1e-6)
            assert np.array_equal(result.classes, expected.argmax(0).numpy())
    with pytest.raises(ValueError, match=r"probabilities must be asked for .*probabilities=True"):
        _ = segmenter.predict(pixels).probabilities


def test_large_images_are_cut_into_tiles(segmenter: Segmenter) -> None:
    pixels = image(90, 100)
    result = segmenter.predict(pixels, tile=64, probabilities=True)
    tiles = scores(segmenter.net, pixels[:64, :64]).argmax(0).numpy()
    assert np.array_equal(result.classes[:45, :50], tiles[:45, :50])
    assert np.array_equal(result.classes, segmenter.predict(pixels, tile=64).classes)
    whole = segmenter.predict(pixels, tile=0)
    assert np.array_equal(whole.classes, scores(segmenter.net, pixels).argmax(0).numpy())
    assert not np.array_equal(whole.classes, result.classes)


def test_a_network_with_an_image_size_sees_large_images_whole(tmp_path: Path) -> None:
    write_network(tmp_path / "net.pt", LABELS, {"short_side": 24}, num_classes=3)
    segmenter = Segmenter.load(tmp_path / "net.pt", device="cpu")
    result = segmenter.predict(image(90, 100), tile=32, probabilities=True)
    assert result.classes.shape == (90, 100)
    assert np.array_equal(
        np.take_along_axis(result.probabilities, result.classes[None], 0)[0], result.probabilities.max(0)
    )
    assert np.array_equal(
        segmenter.predict(image(), short_side=40).classes, scores(segmenter.net, image()).argmax(0).numpy()
    )


def test_a_network_for_clips_takes_images(tmp_path: Path) -> None:
    net = write_network(tmp_path / "net.pt", LABELS, num_classes=3, dims=3)
    pixels = image()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    clip = ((torch.from_numpy(pixels.copy()).permute(2, 0, 1) - mean) / std)[None, :, None]
    with torch.no_grad():
        expected = net(clip)[0, :, 0].argmax(0).numpy()
    segmenter = Segmenter.load(tmp_path / "net.pt", device="cpu")
    assert np.array_equal(segmenter.predict(pixels).classes, expected)
    assert [result.classes.shape for result in segmenter.predict([pixels, pixels])] == [(40, 56)] * 2


def test_scores_that_are_not_finite_name_their_image(tmp_path: Path) -> None:
    write_network(tmp_path / "net.pt", LABELS, num_classes=3, mean=(255, 255, 255), std=(1e-36, 1e-36, 1e-36))
    segmenter = Segmenter.load(tmp_path / "net.pt", device="cpu")
    white, black = np.full((24, 24, 3), 255, np.uint8), np.zeros((24, 24, 3), np.uint8)
    assert segmenter.predict(white).classes.shape == (24, 24)
    with pytest.raises(NonFiniteScores, match="scores of image 1 must be finite"):
        segmenter.predict([white, black])


def test_threads_may_share_a_segmenter(segmenter: Segmenter) -> None:
    given = [image(seed=seed) for seed in range(4)]
    expected = [segmenter.predict(pixels).classes for pixels in given]
    found: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        found[index] = segmenter.predict(given[index], flip=False).classes

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[index], expected[index]) for index in range(4))
    assert torch.is_grad_enabled()


# What a result can do


def test_masks_are_label_files_with_a_palette(segmenter: Segmenter, tmp_path: Path) -> None:
    result = segmenter.predict(image())
    path = result.save(tmp_path / "mask.png")
    for found in (Image.open(path), result.mask()):
        assert found.mode == "P"
        assert np.array_equal(np.asarray(found), np.array(LABELS.ids)[result.classes])
        assert np.array_equal(np.asarray(found.convert("RGB")), LABELS.colours[result.classes])
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.png"]
    with pytest.raises(ValueError, match=r"path must end in \.png, got .*mask\.jpg"):
        result.save(tmp_path / "mask.jpg")


def test_a_mask_never_replaces_its_image(segmenter: Segmenter, tmp_path: Path) -> None:
    Image.fromarray(image()).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    result = segmenter.predict(tmp_path / "link.png")
    for name in ("a.png", "link.png"):
        with pytest.raises(ValueError, match="another file than the image"):
            result.save(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == before


def test_overlays_blend_and_leave_the_image_alone(segmenter: Segmenter) -> None:
    pixels = image()
    result = segmenter.predict(pixels)
    overlay = np.asarray(result.overlay(0.25))
    assert np.abs(overlay - (0.75 * pixels + 0.25 * LABELS.colours[result.classes])).max() <= 0.51
    assert np.array_equal(np.asarray(result.image), pixels)
    with pytest.raises(ValueError, match="opacity must be from 0 to 1, got 2"):
        result.overlay(2)


def test_a_legend_shows_the_classes_that_occur() -> None:
    classes = np.zeros((30, 50), np.uint8)
    classes[:2] = 2
    result = Segmentation(classes, LABELS, Image.new("RGB", (50, 30)))
    shown = np.asarray(result.overlay(0.5, legend=True))
    assert np.array_equal(shown[:30, :50], np.asarray(result.overlay(0.5)))
    legend = shown[30:]
    assert [bool((legend == colour).all(axis=-1).any()) for colour in LABELS.colours] == [True, False, True]


def test_shares_name_every_class() -> None:
    classes = np.zeros((10, 10), np.uint8)
    classes[:3] = 2
    result = Segmentation(classes, LABELS, Image.new("RGB", (10, 10)), Path("pond.jpg"))
    assert result.shares() == {"soil": 0.7, "water": 0.0, "reed": 0.3}
    assert repr(result) == "Segmentation(pond.jpg: 10 x 10 pixels: soil 70.0%, reed 30.0%)"
    assert result.names == LABELS.names
    assert np.array_equal(result.colours, LABELS.colours)


# Loading


def test_a_folder_of_a_run_is_its_last_checkpoint(tmp_path: Path) -> None:
    net = write_network(tmp_path / "last.pt", None, num_classes=3)
    segmenter = Segmenter.load(tmp_path, device="cpu")
    assert segmenter.labels.names == ("class 0", "class 1", "class 2")
    assert np.array_equal(segmenter.predict(image()).classes, scores(net, image()).argmax(0).numpy())
    named = Segmenter.load(tmp_path, device="cpu", labels=LABELS)
    assert named.predict(image()).names == LABELS.names
    assert "narrow" in repr(named)
    assert "soil, water, reed" in repr(named)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a run's folder with a last\.pt, got the folder .*empty"):
        Segmenter.load(tmp_path / "empty")


def test_autocast_is_used(file: Path) -> None:
    pixels = image()
    exact = Segmenter.load(file, device="cpu").predict(pixels, probabilities=True).probabilities
    rough = Segmenter.load(file, device="cpu", amp="bf16").predict(pixels, probabilities=True).probabilities
    assert not np.array_equal(exact, rough)
    assert np.abs(exact - rough).mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu7"}, "device must be auto, cpu or cuda, got 'tpu7'"),
        ({"amp": "half"}, "amp must be one of"),
        ({"amp": "fp16", "device": "cpu"}, "fp16 needs a CUDA device"),
        ({"max_pixels": 0}, "max_pixels must be 1 or more"),
        ({"labels": Labels.numbered(4)}, "labels must be those of the network's 3 classes, got 4"),
    ],
)
def test_arguments_of_load_are_checked(options: dict[str, Any], message: str, file: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Segmenter.load(file, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 31}, "tile must be 0, or 32 or more, got 31"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"scales": ()}, "scales must be"),
        ({"scales": (0,)}, "scales must be"),
        ({"short_side": 0}, "short_side, long_side and fit must be"),
    ],
)
def test_arguments_of_predict_are_checked(options: dict[str, Any], message: str, segmenter: Segmenter) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        segmenter.predict(image(), **options)


def test_images_of_other_channels_are_taken_as_they_are_stored(tmp_path: Path) -> None:
    stored = ImageFormat(4, raw=True, dtype="uint16")
    torch.manual_seed(0)
    net = CCNet("resnet18", 3, in_channels=4, mean=(9000,) * 4, std=(4000,) * 4, head_channels=16).eval()
    checkpoint.write(
        tmp_path / "net.pt", checkpoint.Checkpoint(net.config, net.state_dict(), LABELS.as_plain(), images=stored)
    )
    segmenter = Segmenter.load(tmp_path / "net.pt", device="cpu")
    pixels = np.dstack([image(), image(seed=1)[..., 0]]).astype(np.uint16) * 70
    normalised = (torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] - 9000) / 4000
    with torch.no_grad():
        expected = net(normalised)[0].argmax(0).numpy()
    result = segmenter.predict(pixels)
    assert np.array_equal(result.classes, expected)
    tensor = torch.from_numpy(pixels.astype(np.int32)).to(torch.uint16).permute(2, 0, 1)
    assert np.array_equal(segmenter.predict(tensor).classes, expected)
    assert result.overlay().size == (56, 40)
    assert result.image.mode == "RGB"
    assert "4 channels of uint16" in repr(segmenter)
    for given in (image(), pixels[..., :3], pixels.astype(np.uint8)):
        with pytest.raises(ValueError, match="image must have 4 channels of uint16"):
            segmenter.predict(given)
    with pytest.raises(ValueError, match="value_range must be None for images of 4 channels"):
        segmenter.predict(pixels, value_range=(0, 1))
