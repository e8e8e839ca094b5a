"""Images and label files of a split that a text file lists, as in Pascal VOC."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from ccgpu.models.image_files import SUFFIXES
from ccgpu.train.data.pairs import Pair, check_folder, listing


def read_list(folder: Path, split: str) -> list[str]:
    """Return the names that folder/SPLIT.txt lists, each once, in the file's order.

    A line may give paths, of which the name is taken, and further columns, which are not read:
    "/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png" is 2007_000032. Blank lines are left out.

    Raises:
        FileNotFoundError: there is no such list, or no folder of lists; the message names those that there are.
        ValueError: the list is empty, or no text.
    """
    check_folder("read_list", "the lists of the splits", folder)
    path = folder / f"{split}.txt"
    if not path.is_file():
        there = sorted(file.stem for file in folder.glob("*.txt") if not file.name.startswith("."))
        raise FileNotFoundError(
            f"read_list: split must be one of the lists of {folder}, got {split!r}; correct the dataset's folder or the"
            f" split. Lists there: {' '.join(there) or 'none'}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"read_list: a list must be text, got {path} ({error}); copy it again.") from error
    # A name may hold dots; only the endings of images are taken off.
    columns = (PurePosixPath(line.split()[0].replace("\\", "/")) for line in lines if line.strip())
    names = dict.fromkeys(file.stem if file.suffix.lower() in SUFFIXES else file.name for file in columns)
    if not names:
        raise ValueError(f"read_list: a list must name images, got none in {path}; copy it again.")
    return [*names]


def find_listed(names: Iterable[str], images: Path, masks: Sequence[Path], split: str) -> list[Pair]:
    """Return the images of these names with their label files, sorted by name.

    Args:
        names: names of images without endings.
        images: folder of the images, NAME.jpg.
        masks: folders of label files, NAME.png, of which the first that holds the name is taken; none: find images
            only.
        split: the split's name, for messages.

    Raises:
        FileNotFoundError: a folder, an image or a label file is missing; the message lists the first ten files.
        ValueError: there are no names.
        OSError: a folder cannot be read.
    """
    wanted = sorted(names)
    if not wanted:
        raise ValueError(f"find_listed: split must name images, got none for {split!r}; correct its list.")
    photos = files_by_name("images", images, ".jpg")
    labels = [files_by_name("label files", folder, ".png") for folder in masks if folder.is_dir() or folder == masks[0]]
    found, missing = [], []
    for name in wanted:
        image = photos.get(name)
        label = next((files[name] for files in labels if name in files), None)
        if image is None:
            missing.append(f"no image {images / name}.jpg")
        if label is None and masks:
            missing.append(f"no label file {masks[0] / name}.png")
        if image is not None:
            found.append(Pair(image, label, name))
    if missing:
        raise FileNotFoundError(
            f"find_pairs: every image of the split {split!r} must be there with its label file, got {len(missing)} "
            f"missing of {len(wanted)} images; unpack the archive again, or correct the list:\n{listing(missing)}"
        )
    return found


def files_by_name(kind: str, folder: Path, suffix: str) -> dict[str, Path]:
    """Return name -> file of a folder's files with an ending, upper or lower case; hidden files are left out.

    Args:
        kind: what they are, for the message.
        folder: the folder.
        suffix: the ending, in lower case.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: it cannot be read.
    """
    check_folder("find_pairs", kind, folder)
    files = (path for path in folder.iterdir() if not path.name.startswith("."))  # macOS leaves ._a.png beside a.png
    return {path.name[: -len(suffix)]: path for path in files if path.name.lower().endswith(suffix)}
