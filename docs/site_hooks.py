"""Hooks that mkdocs.yml adds to MkDocs: links into the repository work, formulas become MathML, flags stay whole.

The pages link to files of the repository by relative paths, so that they can be read in the repository as well. The
site copies each linked file outside of docs/ to repository/, and turns each linked folder into a page that lists it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
CODE = re.compile(r"<code\b.*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?=[^<>]*(?:<|$))")  # in a text of HTML, not in a tag
PAGES = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")  # pages of the site that lie outside of docs/


def math_block(source: str, *_: Any, **__: Any) -> str:
    """Return a ```math block as MathML, which browsers show without scripts; lines break where a \\qquad stands."""
    parts = "".join(convert(part, display="block") for part in source.split(r"\qquad"))
    return f'<div class="math">{parts}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to, and a page for each linked folder."""
    waiting = [*(ROOT / name for name in PAGES), *(ROOT / "docs").rglob("*.md")]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        place = in_site(path)
        if path.is_dir():
            files.append(File.generated(config, f"{place}/index.md", content=listing(path)))
            waiting += shown(path)
            continue
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(path)))
        if path.suffix == ".md":
            linked = {target_of(path, link) for link in LINK.findall(path.read_text(encoding="utf-8"))} - seen
            waiting += [target for target in sorted(linked) if target.exists()]
            seen |= linked
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite each link from a path of the repository to a path of the site."""
    source = next((path for path in candidates(page.file.src_uri) if path.is_file()), None)
    if source is None:  # the listing of a folder
        return markdown

    def moved(match: re.Match[str]) -> str:
        target = target_of(source, match[1])
        place = f"{in_site(target)}/index.md" if target.is_dir() else in_site(target)
        return f"]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}"

    return LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Keep each flag of a command, such as --short-side, in one line: browsers break lines after hyphens."""
    return CODE.sub(lambda code: FLAG.sub(r'<span class="flag">\g<0></span>', code[0]), html)


def candidates(place: str) -> list[Path]:
    """Return the files of the repository that a path of the site may come from."""
    return [ROOT / "docs" / place, ROOT / place.removeprefix("repository/")]


def in_site(path: Path) -> str:
    """Return the path in the site of a file or folder of the repository."""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else f"repository/{name}"


def target_of(page: Path, link: str) -> Path:
    """Return the file or folder that a page's link leads to."""
    return Path(os.path.normpath(page.parent / link))


def shown(folder: Path) -> list[Path]:
    """Return a folder's files and folders, sorted, without hidden ones."""
    return [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]


def listing(folder: Path) -> str:
    """Return a page that links to the files of a folder, and to the folders in it."""
    names = [path.name + ("/index.md" if path.is_dir() else "") for path in shown(folder)]
    lines = [f"- [{name.removesuffix('/index.md')}]({name})" for name in names]
    return "\n".join([f"# {folder.relative_to(ROOT).as_posix()}", "", *lines, ""])
