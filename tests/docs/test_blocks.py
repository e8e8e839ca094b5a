"""Every block of code of the README and of the documentation's pages runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.reader import ROOT, Reader, blocks

PLACES = ("*.md", "docs/*.md", "docs/api/*.md", "docs/api/*/*.md", "tests/*/*.md")
PAGES = {page.relative_to(ROOT).as_posix(): page for place in PLACES for page in ROOT.glob(place) if blocks(page)}
# test_checkpoints.py, test_coming_from.py and test_readme.py run their blocks and check the results.
CHECKED_ELSEWHERE = {"README.md", "docs/checkpoints.md", "docs/coming-from.md"}


@pytest.mark.parametrize("name", sorted(PAGES.keys() - CHECKED_ELSEWHERE))
def test_blocks_run(name: str, folder: Path, data: Callable[[str], Path], request: pytest.FixtureRequest) -> None:
    reader = Reader(data)
    if "cuda_on_cpu" in name:  # its code uses the fixture of that name, which skips without g++
        reader.names["cuda_on_cpu"] = request.getfixturevalue("cuda_on_cpu")
    reader.read(PAGES[name])


def test_the_pages_are_there() -> None:
    assert {"docs/start.md", *CHECKED_ELSEWHERE} <= PAGES.keys()
