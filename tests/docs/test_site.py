"""The site as `make docs` builds it, in a browser: on a desktop and on a phone, in light and dark colours."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.docs.reader import ROOT
from tests.train.browser import DESKTOP, PHONE, needs_browser, opened, overflow

BUILT = "document.querySelector('.md-content') !== null"
LONGEST = 12_000  # CSS pixels of a page of the API on a desktop: what is longer is hard to find one's way in

pytestmark = [
    needs_browser,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("material", "mkdocstrings", "latex2mathml")),
        reason="docs/requirements.txt is not installed, as `make docs` does",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "build" / "tree" / "ccgpu").exists():
        pytest.skip("`make tree` laid out no packages for the pages of the API")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages(site: Path) -> list[Path]:
    """The pages of the site; the lists of a folder's files are all alike, and 404.html is for servers."""
    found = [path for path in sorted(site.rglob("*.html")) if "results/" not in path.relative_to(site).as_posix()]
    return [path for path in found if path.name != "404.html"]


@pytest.mark.parametrize(("size", "dark"), [(DESKTOP, False), (PHONE, True)])
def test_no_page_is_wider_than_its_window_or_clips_a_formula(
    browser: Any, site: Path, size: tuple[int, int], dark: bool
) -> None:
    found = pages(site)
    assert len(found) > 25
    formulas = 0
    with opened(browser, found[0], shown=BUILT, size=size, dark=dark) as tab:
        for page in found:
            name = page.relative_to(site).as_posix()
            tab.goto(page.as_uri())
            tab.wait_for_function(BUILT)
            assert overflow(tab) <= 0, name
            if name.startswith("api/") and size == DESKTOP:
                assert tab.evaluate("document.documentElement.scrollHeight") < LONGEST, name
            for formula in tab.locator(".math").all():
                formulas += 1
                inside = formula.evaluate("""box => {
                  const frame = box.getBoundingClientRect();
                  return [...box.querySelectorAll("math *")].every(part => {
                    const place = part.getBoundingClientRect();
                    return place.top >= frame.top - 0.5 && place.bottom <= frame.bottom + 0.5;
                  }) && box.scrollHeight <= box.clientHeight;
                }""")
                assert inside, f"{name} clips a formula at the top or the bottom"
    assert formulas >= 2


def test_flags_stay_in_one_line_on_a_phone(browser: Any, site: Path) -> None:
    seen = 0
    with opened(browser, site / "index.html", shown=BUILT, size=PHONE, dark=False) as tab:
        for name in ("checkpoints", "own-data", "reproduce"):
            tab.goto((site / f"{name}.html").as_uri())
            tab.wait_for_function(BUILT)
            lines = tab.evaluate("""() => [...document.querySelectorAll("code")].flatMap(code => {
              const nodes = document.createTreeWalker(code, NodeFilter.SHOW_TEXT), found = [];
              while (nodes.nextNode()) {
                for (const flag of nodes.currentNode.data.matchAll(/--[a-z][a-z-]*/g)) {
                  const range = document.createRange();
                  range.setStart(nodes.currentNode, flag.index);
                  range.setEnd(nodes.currentNode, flag.index + flag[0].length);
                  found.push([flag[0], new Set([...range.getClientRects()].map(part => part.top)).size]);
                }
              }
              return found;
            })""")
            assert [flag for flag, count in lines if count > 1] == [], name
            seen += len(lines)
    assert seen > 50


def brightness(tab: Any, figure: Any, path: Path) -> float:
    """Mean brightness, 0..255, of a figure's corner, which is its ground."""
    figure.scroll_into_view_if_needed()
    tab.wait_for_timeout(100)  # ms, for the browser to draw it
    figure.screenshot(path=path)
    return float(np.asarray(Image.open(path).convert("L"))[:4, :4].mean())


def test_figures_follow_the_colours_of_the_page(browser: Any, site: Path, tmp_path: Path) -> None:
    page = site / "op.html"
    with opened(browser, page, shown=BUILT) as tab:
        figure = tab.locator("img[src$='.svg']").first
        assert brightness(tab, figure, tmp_path / "light.png") > 250
        tab.locator("label.md-header__button[title=dark]").click()
        tab.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
        assert brightness(tab, figure, tmp_path / "chosen.png") < 64
    with opened(browser, page, shown=BUILT, dark=True) as tab:
        assert brightness(tab, tab.locator("img[src$='.svg']").first, tmp_path / "dark.png") < 64


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    for page in pages(site):
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', page.read_text(encoding="utf-8")), page
