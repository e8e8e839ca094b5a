"""ccgpu attention: the maps that it draws, and its page, clicked on in headless Chromium."""

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
from ccgpu.models.legend import SMALLEST_TEXT
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import Prediction
from ccgpu.models.tiles import predict_classes
from ccgpu.train import attention
from ccgpu.train.visualise import GAP, caption_height
from tests.train.browser import DESKTOP, PHONE, needs_browser, opened, overflow
from tests.train.networks import write_network

CAPTION = caption_height(SMALLEST_TEXT)


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
    assert sheet.shape == (2 * (65 + CAPTION + GAP) + GAP, 3 * (97 + GAP) + GAP, 3)
    net = CCNet.from_checkpoint(file)
    image = np.asarray(Image.open(image_file), dtype=float)
    for line, at in enumerate([(8, 16), (64, 96)]):
        for column in range(3):
            top, left = GAP + line * (65 + CAPTION + GAP) + CAPTION, GAP + column * (97 + GAP)
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
    assert Image.open(tmp_path / "maps.png").size == (49 + 2 * GAP, 33 + CAPTION + 2 * GAP)
    assert run(*given, "--out", tmp_path / "maps.png", "--short-side", "65", "--overwrite") == 0
    assert Image.open(tmp_path / "maps.png").size == (97 + 2 * GAP, 65 + CAPTION + 2 * GAP)


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
        rounded = 11 / 65535  # half a step of the weight itself, and of each of the 21 in their sum
        np.testing.assert_allclose(shares, weights[0].permute(1, 2, 0), rtol=0, atol=rounded)


CHOSEN = "document.body.dataset.chosen !== undefined"


@pytest.fixture(scope="module")
def page_file(file: Path, image_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert run("--checkpoint", file, image_file, "--html", path) == 0
    return path


def drawn(tab: Any, view: int) -> str:
    return tab.evaluate(f"canvases[{view}].toDataURL()")


def size_of(tab: Any, view: int) -> tuple[float, float]:
    box = tab.locator("canvas").nth(view).bounding_box()
    return box["width"], box["height"]


@needs_browser
@pytest.mark.parametrize("align_corners", [True, False])
def test_a_click_shows_the_maps_of_the_pixel(
    align_corners: bool, browser: Any, image_file: Path, tmp_path: Path
) -> None:
    net = write_network(tmp_path / "net.pt", align_corners=align_corners)
    assert run("--checkpoint", tmp_path / "net.pt", image_file, "--html", tmp_path / "page.html") == 0
    with opened(browser, tmp_path / "page.html", shown=CHOSEN) as tab:
        assert tab.evaluate("document.body.dataset.chosen") == "32,48", "the middle at first"
        before = drawn(tab, 2)
        for y, x in [(5, 90), (64, 0), (33, 12)]:
            view = y % 4
            wide, high = size_of(tab, view)
            place = {"x": (x + 0.5) / 97 * wide, "y": (y + 0.5) / 65 * high}
            tab.locator("canvas").nth(view).click(position=place)
            chosen = tuple(int(index) for index in tab.evaluate("document.body.dataset.chosen").split(","))
            # The browser rounds where a click fell to its own pixels, which lie between those of the image.
            assert max(abs(chosen[0] - y), abs(chosen[1] - x)) <= 1
            for loops in (1, 2, 3):
                expected = net.attention_map(random_images(net, image_file), chosen, recurrence=loops)[0].flatten()
                shown = torch.tensor(tab.evaluate(f"Array.from(maps[{loops - 1}])"))
                torch.testing.assert_close(shown, expected, rtol=0, atol=1e-4)
                largest = tab.locator(".scale span span:last-child").nth(loops - 1).inner_text()
                assert float(largest.removesuffix(" %")) == pytest.approx(100 * float(expected.max()), rel=0.01)
        assert drawn(tab, 2) != before
        tab.locator("canvas").nth(2).hover(position={"x": 50, "y": 20})
        assert "R = 2" in tab.inner_text("#status")
        tab.goto((tmp_path / "page.html").as_uri() + "#8,9")
        tab.reload()
        tab.wait_for_function("document.body.dataset.chosen === '8,9'")


@needs_browser
@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)])
def test_the_views_are_as_large_as_the_window_allows(
    size: tuple[int, int], dark: bool, browser: Any, page_file: Path
) -> None:
    with opened(browser, page_file, shown=CHOSEN, size=size, dark=dark) as tab:
        assert overflow(tab) <= 0
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(re.search(r"\d+", ground)[0])
        assert red < 64 if dark else red > 192
        wide, high = size_of(tab, 0)
        assert all(size_of(tab, view) == (wide, high) for view in range(4))
        assert wide / high == pytest.approx(97 / 65, rel=0.02)
        assert tab.evaluate("canvases[0].width") == wide * (2 if size == PHONE else 1), "as many pixels as the screen"
        if size == PHONE:  # one below the other, across the window
            assert wide > 0.9 * size[0]
        else:  # two lines of two, without scrolling
            assert tab.evaluate("document.documentElement.scrollHeight") == size[1]
            assert 2 * high > 0.62 * size[1]
        tab.keyboard.press("2")
        assert [tab.locator("canvas").nth(view).is_visible() for view in range(4)] == [False, False, True, False]
        alone = size_of(tab, 2)
        assert tab.evaluate("document.documentElement.scrollHeight") == size[1], "one view fits into the window"
        assert alone[0] > 0.9 * size[0] or alone[1] > 0.65 * size[1]
        tab.set_viewport_size({"width": 700, "height": 500})
        # The page arranges its views when the browser tells it of the new size, which may be after the call returned.
        tab.wait_for_function("width => canvases[2].clientWidth !== width", arg=alone[0])
        assert overflow(tab) <= 0


@needs_browser
def test_keys_buttons_and_the_strength_change_the_drawing(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file, shown=CHOSEN) as tab:

        def chosen() -> list[int]:
            return [int(index) for index in tab.evaluate("document.body.dataset.chosen").split(",")]

        seen = [drawn(tab, 2)]
        for key, position in {
            "ArrowRight": (4, 7),
            "ArrowDown": (5, 7),
            "ArrowLeft": (5, 6),
            "ArrowUp": (4, 6),
        }.items():
            tab.keyboard.press(key)
            y, x = chosen()
            assert (round(y * 8 / 64), round(x * 12 / 96)) == position, "a step is one position of the feature map"
            seen.append(drawn(tab, 2))
        assert len(set(seen)) == 4, "the last arrow leads back to the first map"
        before = chosen()
        tab.keyboard.press("Shift+ArrowRight")
        assert chosen() == [before[0], before[1] + 1]
        for _ in range(20):
            tab.keyboard.press("ArrowUp")
        assert chosen()[0] == 0, "it stays within the image"

        strong = drawn(tab, 2)
        tab.keyboard.press("-")
        assert tab.input_value("#strength") == "70"
        weaker = drawn(tab, 2)
        assert weaker != strong
        tab.keyboard.press("+")
        assert drawn(tab, 2) == strong
        tab.fill("#strength", "0")
        bare = drawn(tab, 2)
        assert bare not in (strong, weaker)
        assert tab.inner_text("#percent") == "0 %"
        image = drawn(tab, 0)
        assert bare != image, "the image below a map is grey"
        tab.keyboard.press("g")
        assert drawn(tab, 2) == image
        tab.locator("#strength").focus()
        place = chosen()
        tab.keyboard.press("ArrowRight")
        assert (tab.input_value("#strength"), chosen()) == ("1", place), "in the slider the arrows are the slider's"

        for name, view in {"image": 0, "R = 1": 1, "R = 3": 3}.items():
            button = tab.get_by_role("button", name=name)
            button.click()
            assert button.get_attribute("aria-pressed") == "true"
            assert tab.locator("canvas").nth(view).is_visible()
            assert tab.locator("canvas:visible").count() == 1
        tab.keyboard.press("a")
        assert tab.locator("canvas:visible").count() == 4
        tab.keyboard.press("9")
        assert tab.locator("canvas:visible").count() == 4, "there is no map of nine loops"
        tab.keyboard.press("?")
        assert tab.get_by_role("dialog").is_visible()
        tab.keyboard.press("2")
        tab.keyboard.press("Escape")
        assert not tab.get_by_role("dialog").is_visible()
        assert tab.locator("canvas:visible").count() == 4, "keys do nothing below the help"


@needs_browser
def test_a_finger_chooses_and_moves_the_pixel(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file, shown=CHOSEN, size=PHONE) as tab:
        wide, high = size_of(tab, 1)
        tab.locator("canvas").nth(1).tap(position={"x": 0.1 * wide, "y": 0.9 * high})
        y, x = (int(index) for index in tab.evaluate("document.body.dataset.chosen").split(","))
        assert (y, x) == pytest.approx((58, 9), abs=1)
        tab.get_by_role("button", name="R = 2").tap()
        assert tab.locator("canvas:visible").count() == 1
        wide, high = size_of(tab, 2)
        box = tab.locator("canvas").nth(2).bounding_box()
        session = tab.context.new_cdp_session(tab)
        for kind, share in (("touchStart", 0.2), ("touchMove", 0.5), ("touchMove", 0.8), ("touchEnd", None)):
            points = [] if share is None else [{"x": box["x"] + share * wide, "y": box["y"] + share * high}]
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        tab.wait_for_function("Math.abs(document.body.dataset.chosen.split(',')[1] - 77) <= 1")


@needs_browser
def test_what_the_page_shows_has_accessible_names(browser: Any, page_file: Path) -> None:
    with opened(browser, page_file, shown=CHOSEN) as tab:
        assert tab.get_by_role("img", name="attention map of R = 2, of pixel 32, 48").count() == 1
        assert tab.get_by_role("slider", name="strength").count() == 1
        assert tab.get_by_role("checkbox", name="grey image").is_checked()
        assert tab.get_by_role("button", name="Help").count() == 1
        assert tab.get_by_role("status").inner_text().startswith("pixel (32, 48) of 65 x 97")
        for role, number in {"img": 4, "button": 6, "slider": 1, "checkbox": 1}.items():
            assert tab.get_by_role(role, name=re.compile(r"\w")).count() == tab.get_by_role(role).count() == number
