"""The floors of ARCHITECTURE.md: imports go downwards, nothing goes in circles, every file has its line there."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
TREES = ("kernels", "ccgpu", "models", "train")
# Imports that may close a circle, each with its reason.
EXCEPTED = {
    # CCNet.from_checkpoint reads a file, which builds a CCNet: imported when it is called.
    ("models/ccnet.py", "models/checkpoint.py"),
}


def files():
    return [path.relative_to(ROOT).as_posix() for tree in TREES for path in sorted((ROOT / tree).rglob("*.py"))]


def module_of(file):
    """Return the name that a file is imported by."""
    parts = Path(file).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "ccgpu" else ("ccgpu", *parts))


MODULES = {module_of(file): file for file in files()}


def named_by(node):
    """Return the modules that a node may import: by a statement, or by name, as importlib.import_module does."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        return [*inner, node.module] if any(name not in MODULES for name in inner) else inner
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("ccgpu."):
        return [node.value]
    return []


@functools.cache
def graph():
    """Return the files that each file imports, those included that it imports when a function is called."""
    found = {}
    for file in files():
        names = [name for node in ast.walk(ast.parse((ROOT / file).read_text())) for name in named_by(node)]
        found[file] = {MODULES[name] for name in names if name in MODULES} - {file}
    return found


def floors():
    """Return the rooms (folders and files) of each floor, from the top down, as ARCHITECTURE.md lists them."""
    (block,) = re.findall(r"```floors\n(.*?)```", TEXT, re.S)
    return [line.split() for line in block.splitlines() if line.strip()]


def place_of(file):
    """Return a file's floor, counted from the top, and its room: the most particular one that holds it."""
    rooms = [(len(room), floor, room) for floor, line in enumerate(floors()) for room in line]
    fitting = [
        (length, floor, room)
        for length, floor, room in rooms
        if file == room or (room.endswith("/") and file.startswith(room))
    ]
    assert fitting, f"no floor of ARCHITECTURE.md holds {file}"
    _, floor, room = max(fitting)
    return floor, room


@pytest.mark.parametrize("file", files())
def test_imports_go_downwards(file):
    floor, room = place_of(file)
    for other in sorted(graph()[file]):
        other_floor, other_room = place_of(other)
        beside = other_floor == floor and other_room.endswith("/") and other_room != room
        assert other_floor >= floor, f"{file} imports {other}, from a floor above"
        assert not beside, f"{file} imports {other}, from another room of its floor"


def test_no_import_closes_a_circle():
    """Lazy imports count: a circle of modules is one idea in two files, whenever it is closed."""
    remaining = {file: {other for other in to if (file, other) not in EXCEPTED} for file, to in graph().items()}
    while leaves := [file for file, to in remaining.items() if not to]:
        remaining = {file: to - set(leaves) for file, to in remaining.items() if file not in leaves}
    assert not remaining, f"these files import each other or one that does: {remaining}"


@pytest.mark.parametrize("pair", sorted(EXCEPTED))
def test_every_exception_is_needed(pair):
    importer, imported = pair
    assert imported in graph()[importer]
    reached, waiting = set(), [imported]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            waiting += graph()[file]
    assert importer in reached


@pytest.mark.parametrize("file", files())
def test_packages_are_imported_by_their_full_names(file):
    """`kernels`, `models` and `train` are other people's names too; kernels/ never sees torch."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in named_by(node):
                top = name.split(".")[0]
                assert top not in {"kernels", "models", "train"}, f"{file}: write ccgpu.{name}"
                assert not (file.startswith("kernels/") and top == "torch"), f"{file} imports torch"


def test_no_file_repeats_the_name_of_its_folder():
    repeated = [file for file in files() if re.search(r"([a-z0-9]+)s?/\1s?(_[a-z0-9_]*)?\.py$", file)]
    assert not repeated


def test_no_prefix_stands_for_a_folder():
    """Three files of a folder with one prefix are a folder of their own."""
    groups = {}
    for file in files():
        folder, name = file.rsplit("/", 1)
        groups.setdefault((folder, name.removesuffix(".py").split("_")[0]), []).append(name)
    assert not {key: names for key, names in groups.items() if len(names) > 2 and key[1]}


def paths_named():
    """Return what looks like a path of the repository in the text: it has a folder, or an ending of a file."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S))
    words = [word.strip("(),;:") for span in spans for word in span.split()]
    return {
        word
        for word in words
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", word)
        and ("/" in word or re.search(r"\.(py|cuh?|md|yml|cfg|html)$", word))
    }


def test_every_path_exists():
    missing = [path for path in sorted(paths_named()) if not list(ROOT.glob(path))]
    assert not missing, f"ARCHITECTURE.md names paths that are not there: {missing}"


def test_every_file_has_its_line():
    wanted = {file for file in files() if not file.endswith("__init__.py")}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.cu*")}
    missing = sorted(wanted - paths_named())
    assert not missing, f"ARCHITECTURE.md does not say what these are for: {missing}"


def test_questions_have_answers():
    """The table of "I want to ..." answers at least twelve questions, each with files to open."""
    section = TEXT.split("## I want to")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) >= 12
    for row in rows:
        spans = re.findall(r"`([^`]+)`", row.split("|")[2])
        paths = [span for span in spans if "/" in span or span.endswith(".yml")]
        assert paths, row
        text = "".join(path.read_text() for span in paths for path in [ROOT / span] if path.is_file())
        missing = [span for span in spans if span not in paths and not re.search(rf"\b{span}\b", text)]
        assert not missing, f"{missing} is in none of the files of its answer: {row}"


def test_files_stay_small():
    """House rule: below about 400 lines a file."""
    long = {file: n for file in files() if (n := len((ROOT / file).read_text().splitlines())) > 420}
    assert not long
