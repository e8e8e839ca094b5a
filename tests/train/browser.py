"""Opens a page in headless Chromium, for tests that click on it; they are skipped where there is no Chromium."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    from playwright import sync_api
except ImportError:
    sync_api = None  # type: ignore[assignment]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), None) if sync_api else None
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@contextlib.contextmanager
def opened(page: Path) -> Iterator[Any]:
    """Open a page of `python -m train.attention` and wait until it shows a pixel; an error in it fails the test."""
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page()
        problems: list[str] = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
        tab.goto(page.as_uri())
        tab.wait_for_function("document.body.dataset.chosen !== undefined")
        yield tab
        browser.close()
    assert not problems
