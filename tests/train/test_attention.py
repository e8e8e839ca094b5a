"""python -m train.attention: the maps that it draws, and its page, clicked on in headless Chromium."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.models.attention import RCCA, attention_map, attention_weights
from ccgpu.models.ccnet import CCNet
from ccgpu.models.context import NonLocal
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import Prediction, predict_classes
from ccgpu.train import attention
from ccgpu.train.visualise import CAPTION_HEIGHT, GAP
from tests.train.browser import CHROMIUM, opened
from tests.train.networks import write_network


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "net.safetensors"
    write_network(path)
    return path


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "a.png"
    coarse = np.random.default_rng(1).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((97, 65), Image.Resampling.BILINEAR).save(path)
    return path


def random_images(net: CCNet, path: Path) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (net.backbone.mean, net.backbone.std))
    return ((torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) - mean) / std)[None]


def run(*arguments: Any) -> int:
    return attention.main([str(argument) for argument in arguments])


# Weights of single loops


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (6, 1), (3, 4, 5)])
def test_composing_the_weights_of_the_loops_gives_the_map(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = RCCA(6, 3, dims=len(size), reduction=2, gamma=0.8).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    weights = attention_weights(module, x)
    assert len(weights) == 3
    at = tuple(extent // 2 for extent in size)
    for loops in range(4):
        row = torch.zeros(2, *size, dtype=torch.float64)
        row[(slice(None), *at)] = 1
        for loop in reversed(weights[:loops]):
            row = step(row, loop)
        torch.testing.assert_close(attention_map(module, x, at, recurrence=loops), row)


def step(row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return row A of one loop: a position's weight goes to its neighbours, in the order of ccgpu.affinity."""
    size = row.shape[1:]
    out = torch.zeros_like(row)
    for position in np.ndindex(*size):
        channel = 0
        for axis, extent in enumerate(size):
            for index in range(extent):
                if index == position[axis] and axis < len(size) - 1:
                    continue
                neighbour = (*position[:axis], index, *position[axis + 1 :])
                share = weights[(slice(None), channel, *position)]
                out[(slice(None), *neighbour)] += row[(slice(None), *position)] * share
                channel += 1
    return out


def test_attention_weights_refuse_other_modules() -> None:
    with pytest.raises(TypeError, match="attention_weights: module must be a CrissCrossAttention or RCCA, got Non"):
        attention_weights(NonLocal(8), torch.zeros(1, 8, 3, 3))
    with pytest.raises(ValueError, match="recurrence must be 0 or more"):
        attention_weights(RCCA(8), torch.zeros(1, 8, 3, 3), recurrence=-1)


# The command


def test_maps_are_drawn_for_each_pixel_and_number_of_loops(file: Path, image_file: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", file, image_file, "--at", "8,16", "--at", "64,96", "--out", tmp_path / "maps.png")
    assert run(*flags) == 0
    sheet = np.asarray(Image.open(tmp_path / "maps.png"), dtype=float)
    assert sheet.shape == (2 * (65 + CAPTION_HEIGHT + GAP) + GAP, 3 * (97 + GAP) + GAP, 3)
    net = CCNet.from_checkpoint(file)
    image = np.asarray(Image.open(image_file), dtype=float)
    for line, at in enumerate([(8, 16), (64, 96)]):
        for column in range(3):
            top, left = GAP + line * (65 + CAPTION_HEIGHT + GAP) + CAPTION_HEIGHT, GAP + column * (97 + GAP)
            changed = np.abs(sheet[top : top + 65, left : left + 97] - image).sum(-1)
            weights = net.attention_map(random_images(net, image_file), at, recurrence=column + 1)[0]
            # Positions lie 8 pixels apart, corners on corners: where there is weight the image is changed.
            drawn = torch.from_numpy(changed[::8, ::8])
            assert drawn.flatten()[weights.argmax()] > 30
            if column == 0:  # one loop: nothing outside of the cross but the ring around the pixel
                assert (weights == 0).sum() == 8 * 12
                outside = changed[20:60, 30:90] if line == 0 else changed[:50, :80]
                assert outside.max() == 0


def test_pixels_refer_to_the_file_while_the_network_gets_its_own_size(image_file: Path, tmp_path: Path) -> None:
    write_network(tmp_path / "net.pt", prediction={"short_side": 33})
    given = ("--checkpoint", tmp_path / "net.pt", image_file, "--at", "64,96", "--loops", "2")
    assert run(*given, "--out", tmp_path / "maps.png") == 0
    assert Image.open(tmp_path / "maps.png").size == (49 + 2 * GAP, 33 + CAPTION_HEIGHT + 2 * GAP)
    assert run(*given, "--out", tmp_path / "maps.png", "--short-side", "65", "--overwrite") == 0
    assert Image.open(tmp_path / "maps.png").size == (97 + 2 * GAP, 65 + CAPTION_HEIGHT + 2 * GAP)


def test_a_network_for_clips_sees_a_clip_of_one(image_file: Path, tmp_path: Path) -> None:
    write_network(tmp_path / "net.pt", dims=3)
    out = ("--out", tmp_path / "maps.png", "--html", tmp_path / "page.html")
    assert run("--checkpoint", tmp_path / "net.pt", image_file, *out) == 0
    assert (tmp_path / "maps.png").exists()
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["IMAGE"], "must be given, got neither"),
        (["IMAGE", "--out", "OUT", "--at", "65,0"], "--at must be a pixel Y,X of 65 x 97, counted from 0, got 65,0"),
        (["IMAGE", "--out", "OUT", "--loops", "0"], "--loops must be from 1 to 64, got 0"),
        (["IMAGE", "--out", "OUT", "--loops", "100000"], "--loops must be from 1 to 64, got 100000"),
        (["IMAGE", "--out", "OUT", "--at", "-1,0"], "--at must be a pixel Y,X of 65 x 97, counted from 0, got -1,0"),
        (["IMAGE", "--out", "OUT", "--at=0,-1"], "--at must be a pixel Y,X of 65 x 97, counted from 0, got 0,-1"),
        (["IMAGE", "--out", "OUT", "--html", "OUT"], "--html must be another file than --out"),
        (["IMAGE", "--out", "maps.jpg"], "--out must end in .png, got maps.jpg"),
        (
            ["IMAGE", "--out", "OUT", "--value-range", "9", "1"],
            "--value-range must be LOW HIGH with LOW < HIGH, got 9 1",
        ),
        (["IMAGE", "--out", "nowhere/maps.png"], "--out must lie in a folder that exists"),
        (["IMAGE", "--html", "IMAGE", "--overwrite"], "--html must not replace what the command reads"),
        (["IMAGE", "--out", "IMAGE", "--overwrite"], "--out must not replace what the command reads"),
        (["IMAGE", "--out", "IMAGE"], "--out must not replace what the command reads"),
        (["IMAGE", "--out", "OUT", "--max-pixels", "6304"], "--max-pixels"),
        (["nowhere.png", "--out", "OUT"], "nowhere.png"),
        (["IMAGE", "--out", "OUT", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["IMAGE", "--out", "OUT", "--short-side", "0"], "--short-side must be from 1 to 32768 pixels, got 0"),
        (["IMAGE", "--html", "OUT", "--short-side", "1000"], "holds at most 9409 positions"),
    ],
)
def test_errors_are_told_in_one_line(
    arguments: list[str], message: str, file: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"IMAGE": image_file, "OUT": tmp_path / "out.png"}
    given = [] if "--checkpoint" in arguments else ["--checkpoint", file]
    assert run(*given, *(places.get(argument, argument) for argument in arguments)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a,b", "3", "1,2,3", "1.5,2", ",", "-1,-1-"])
def test_a_pixel_is_two_whole_numbers(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run("--checkpoint", "net.pt", "a.png", "--out", tmp_path / "a.png", "--at", text)
    assert exit.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert f"argument --at: must be Y,X, a row and a column in pixels, got {text!r}" in line


def test_what_is_odd_about_the_image_is_told(
    file: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = np.asarray(Image.open(image_file).convert("L")).astype(np.uint16) << 4
    Image.fromarray(deep).save(tmp_path / "deep.png")
    out = ("--out", tmp_path / "maps.png")
    assert run("--checkpoint", file, tmp_path / "deep.png", *out) == 0
    assert "--value-range 0 4095" in capsys.readouterr().out
    assert run("--checkpoint", file, tmp_path / "deep.png", *out, "--overwrite", "--value-range", "0", "4095") == 0
    assert "warning" not in capsys.readouterr().out
    Image.open(image_file).convert("RGB").save(tmp_path / "cut.jpg", quality=95)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    assert run("--checkpoint", file, tmp_path / "cut.jpg", *out, "--overwrite") == 2
    assert "pixels are missing before its end marker" in capsys.readouterr().err


def test_maps_are_replaced_only_when_asked(
    file: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "maps.png").write_text("kept")
    given = ("--checkpoint", file, image_file, "--loops", "1", "--out", tmp_path / "maps.png")
    assert run(*given) == 2
    assert "--out must be new, got existing results" in capsys.readouterr().err
    assert (tmp_path / "maps.png").read_text() == "kept"
    assert run(*given, "--overwrite") == 0
    assert Image.open(tmp_path / "maps.png").size[0] > 97


def test_a_page_too_large_is_refused_before_anything_is_computed(
    file: Path, image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CCNet, "attention_weights", lambda *arguments, **options: pytest.fail("computed"))
    monkeypatch.setattr(CCNet, "attention_map", lambda *arguments, **options: pytest.fail("computed"))
    given = ("--checkpoint", file, image_file, "--short-side", "700", "--out", tmp_path / "a.png")
    assert run(*given, "--html", tmp_path / "a.html") == 2
    assert "--html holds at most 9409 positions of the feature map, got 88 x 131" in capsys.readouterr().err


@pytest.mark.parametrize("short_side", [33, 70])
def test_the_network_sees_the_pixels_that_prediction_gives_it(short_side: int, tmp_path: Path) -> None:
    net = write_network(tmp_path / "net.pt")
    pixels = np.random.default_rng(2).integers(0, 256, (65, 97, 3), dtype=np.uint8)
    prediction = Prediction(short_side=short_side)
    seen: list[torch.Tensor] = []

    def watch(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images

    predict_classes(watch, Normalise(net.backbone.mean, net.backbone.std)(pixels)[None], prediction, tile=1024)
    assert torch.equal(attention.seen_images(net, Image.fromarray(pixels), prediction), seen[0])


@pytest.mark.parametrize("output", ["--out", "--html"])
def test_weights_that_are_not_finite_are_an_error(
    output: str, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path / "net.pt", mean=(0, 0, 0), std=(1e-36, 1e-36, 1e-36))
    assert run("--checkpoint", tmp_path / "net.pt", image_file, output, tmp_path / "maps.png") == 1
    assert "the attention weights of" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_overlays_follow_the_networks_corners(
    image_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = attention.attention_overlay

    def watch(*arguments: Any, **options: Any) -> Image.Image:
        seen.append(options["align_corners"])
        return original(*arguments, **options)

    monkeypatch.setattr(attention, "attention_overlay", watch)
    for corners in (True, False):
        write_network(tmp_path / "net.pt", align_corners=corners)
        given = ("--checkpoint", tmp_path / "net.pt", image_file, "--loops", "1", "--out", tmp_path / "maps.png")
        assert run(*given, "--overwrite") == 0
    assert seen == [True, False]


def test_a_network_without_criss_cross_attention_is_refused(
    image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path / "net.pt", context="none", gamma=0)
    assert run("--checkpoint", tmp_path / "net.pt", image_file, "--out", tmp_path / "maps.png") == 2
    assert "must hold a network with criss-cross attention" in capsys.readouterr().err


# The page


def test_page_is_a_single_file_and_holds_the_weights(file: Path, image_file: Path, tmp_path: Path) -> None:
    assert run("--checkpoint", file, image_file, "--html", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']", text), "the page refers to other files"
    assert "http" not in text
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    net = CCNet.from_checkpoint(file)
    loops = net.attention_weights(random_images(net, image_file), recurrence=3)
    for packed, weights in zip(data["weights"], loops, strict=True):
        counts = np.frombuffer(gzip.decompress(base64.b64decode(packed)), "<u2").reshape(9, 13, 21).astype(float)
        shares = counts / counts.sum(-1, keepdims=True)
        np.testing.assert_allclose(shares, weights[0].permute(1, 2, 0), rtol=0, atol=2e-5)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("align_corners", [True, False])
def test_a_click_shows_the_maps_of_the_pixel(align_corners: bool, image_file: Path, tmp_path: Path) -> None:
    net = write_network(tmp_path / "net.pt", align_corners=align_corners)
    assert run("--checkpoint", tmp_path / "net.pt", image_file, "--html", tmp_path / "page.html") == 0
    with opened(tmp_path / "page.html") as tab:
        assert tab.evaluate("document.body.dataset.chosen") == "32,48", "the middle at first"
        before = tab.evaluate("canvases[2].toDataURL()")
        for y, x in [(5, 90), (64, 0), (33, 12)]:
            tab.locator("canvas").nth(y % 4).click(position={"x": x + 0.5, "y": y + 0.5})
            chosen = tuple(int(index) for index in tab.evaluate("document.body.dataset.chosen").split(","))
            # The browser rounds where a click fell to its own pixels, which lie between those of the image.
            assert max(abs(chosen[0] - y), abs(chosen[1] - x)) <= 1
            for loops in (1, 2, 3):
                expected = net.attention_map(random_images(net, image_file), chosen, recurrence=loops)[0].flatten()
                shown = torch.tensor(tab.evaluate(f"Array.from(maps[{loops - 1}])"))
                torch.testing.assert_close(shown, expected, rtol=0, atol=1e-4)
        assert tab.evaluate("canvases[2].toDataURL()") != before
        tab.locator("canvas").nth(2).hover(position={"x": 50, "y": 20})
        assert "R = 2" in tab.inner_text("#status")
        tab.goto((tmp_path / "page.html").as_uri() + "#8,9")
        tab.reload()
        tab.wait_for_function("document.body.dataset.chosen === '8,9'")
