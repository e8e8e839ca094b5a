"""Opens a page in headless Chromium, for tests that look at it; they are skipped where there is no Chromium."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    from playwright import sync_api
except ImportError:
    sync_api = None  # type: ignore[assignment]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def _starts(path: str) -> bool:
    """Return whether a browser starts; some systems have a script of that name which only tells to install it."""
    return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0


CHROMIUM = (
    next((path for name in BROWSERS if (path := shutil.which(name)) and _starts(path)), None) if sync_api else None
)
REASON = "playwright is not installed" if sync_api is None else f"no Chromium ({', '.join(BROWSERS)}) on this machine"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason=REASON)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


DESKTOP, PHONE = (1440, 900), (390, 844)  # width and height of a window, in CSS pixels


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """Start Chromium, and end it afterwards."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, once for all tests of a module that look at pages."""
    with started() as running:
        yield running


@contextlib.contextmanager
def opened(
    browser: Any, page: Path, *, shown: str, size: tuple[int, int] = DESKTOP, dark: bool = False
) -> Iterator[Any]:
    """Open a page and wait until the JavaScript expression `shown` is true; an error on the page fails the test.

    Args:
        browser: a started browser; the page shares no storage with others that it has opened.
        page: a file.
        shown: what is true once the page is there.
        size: width and height of the window; that of a phone gets touch and two device pixels for a CSS pixel.
        dark: whether the reader prefers dark colours.
    """
    tab = browser.new_page(
        viewport={"width": size[0], "height": size[1]},
        device_scale_factor=2 if size == PHONE else 1,
        has_touch=size == PHONE,
        color_scheme="dark" if dark else "light",
    )
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    try:
        tab.goto(page.as_uri())
        tab.wait_for_function(shown)
        yield tab
    finally:
        tab.close()  # with the context that new_page has made for it
    assert not problems


def overflow(tab: Any) -> int:
    """Return by how many CSS pixels the page is wider than its window."""
    return tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
