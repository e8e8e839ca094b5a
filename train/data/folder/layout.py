"""The layout of a folder of images and masks: where they lie, and which splits it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ccgpu.models.image_files import SUFFIXES
from ccgpu.train.data import masks
from ccgpu.train.data.pairs import LISTED, Pair, match_by_name

IMAGES = ("images", "image", "imgs", "img", "jpegimages")
MASKS = ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
ALL = "all"
"""The part of a folder without splits."""
ENDINGS = (*(f"{mark}{word}" for word in ("mask", "masks", "label", "labels", "seg", "gt") for mark in "_-"), *SUFFIXES)
"""What may follow an image's name in that of its mask; its own ending too, as in a.jpg.png."""
_MASK_SUFFIXES = (*masks.SUFFIXES, *masks.LOSSY_SUFFIXES)
_EXPECTED = (
    "images/ and masks/; or train/ and val/ with images/ and masks/ in each; or images/train, masks/train, images/val, "
    "masks/val; or masks beside their images, as a.jpg and a_mask.png"
)


@dataclass(frozen=True)
class Part:
    """The folders of the images of a split and of their masks: one folder, where the endings of names tell them apart.

    The folder of masks is None where there are none, as for a test split.
    """

    images: Path
    masks: Path | None

    @property
    def is_mixed(self) -> bool:
        """Whether images and masks lie in one folder."""
        return self.images == self.masks


@dataclass(frozen=True)
class Layout:
    """Where the images and masks of a folder lie.

    Attributes:
        root: the folder.
        parts: "train", "val" and "test", as far as they are there; or "all" alone.
        left_out: a line for each thing in the folder that is not used.
    """

    root: Path
    parts: Mapping[str, Part]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return the layout in one line, such as "images/train with masks/train"."""
        return "; ".join(
            f"{name + ': ' if name != ALL else ''}{self._shown(part)}" for name, part in self.parts.items()
        )

    def _shown(self, part: Part) -> str:
        if part.masks is None:
            return f"{self._below(part.images)} without masks"
        if part.is_mixed:
            return f"images and masks in {self._below(part.images)}"
        return f"{self._below(part.images)} with {self._below(part.masks)}"

    def _below(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix() + "/"

    def match(self, part: str, labelled: bool = True, *, whole: bool = False) -> tuple[list[Pair], list[str]]:
        """Return the pairs of a part, and a text for each kind of problem, `whole` without leaving lines out.

        See `pairs.match_by_name`.

        The name of a pair keeps the subfolders.

        Raises:
            FileNotFoundError: there is no such part, or it holds no images.
            OSError: a folder cannot be read.
        """
        if part not in self.parts:
            raise FileNotFoundError(
                f"find_pairs: split must be one of {', '.join(self.parts)}, got {part!r} in {self.root}; name another."
            )
        found = self.parts[part]
        if labelled and found.masks is None:
            raise FileNotFoundError(
                f"find_pairs: {found.images} must have masks, got no folder of them; add it, or predict the images."
            )
        where = found.masks if labelled else None
        return match_by_name(
            "find_pairs",
            found.images,
            where,
            SUFFIXES,
            _MASK_SUFFIXES,
            0 if found.is_mixed else None,
            ENDINGS,
            None if whole else LISTED,
            mixed=found.is_mixed,
        )


def find_layout(root: Path, images: str | None = None, masks: str | None = None) -> Layout:
    """Return the layout of a folder; upper and lower case do not matter.

    Args:
        root: the folder.
        images: name of the folders of images; None: any of `IMAGES`.
        masks: name of the folders of masks; None: any of `MASKS`.

    Raises:
        FileNotFoundError: there is no such folder, or it has no layout that is known.
        ValueError: the folder can be taken for several things.
        OSError: a folder cannot be read.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"find_layout: --data must be a folder, got {root}, which is none; correct it.")
    wanted: dict[str, tuple[str, ...]] = {"--images": IMAGES if images is None else (images.lower(),)}
    wanted["--masks"] = MASKS if masks is None else (masks.lower(),)
    at_root = {flag: _one(root, names, flag) for flag, names in wanted.items()}
    splits = _splits(root)
    with_images = {
        split: folder for split, folder in splits.items() if any(_one(folder, *item) for item in _flipped(wanted))
    }
    if any(at_root.values()) and with_images:
        shown = [f"{path.name}/" for path in (*at_root.values(), *with_images.values()) if path is not None]
        raise ValueError(
            f"find_layout: {root} must hold images/ and masks/, or splits with these, got {', '.join(shown)}; move "
            "one kind elsewhere."
        )
    if with_images:
        parts = {}
        for split, folder in with_images.items():
            inner = {flag: _one(folder, names, flag) for flag, names in wanted.items()}
            parts[split] = _part(folder, inner, split)
        return _checked(Layout(root, parts))
    image_folder, mask_folder = at_root["--images"], at_root["--masks"]
    if image_folder is None and mask_folder is None:
        mixed = {split: folder for split, folder in splits.items() if _is_mixed(folder)}
        if mixed:  # a split without masks is an error, but for that of test
            return _checked(
                Layout(
                    root, {split: Part(f, f if split != "test" else mixed.get(split)) for split, f in splits.items()}
                )
            )
        if _is_mixed(root):
            return Layout(root, {ALL: Part(root, root)})
        there = ", ".join(f"{path.name}/" for path in _folders(root)) or "none"
        raise FileNotFoundError(
            f"find_layout: {root} must hold {_EXPECTED}, got the folders: {there}; rename them, or name them with "
            "--images and --masks."
        )
    whole = _part(root, at_root, "train")
    image_splits = _splits(whole.images)
    if not image_splits:
        return Layout(root, {ALL: whole})
    assert whole.masks is not None
    mask_splits = _splits(whole.masks)
    alone = sorted(mask_splits.keys() - image_splits.keys())
    alone += sorted(image_splits.keys() - mask_splits.keys() - {"test"})
    if alone:
        raise FileNotFoundError(
            f"find_layout: {whole.images} and {whole.masks} must have the same splits, got {', '.join(alone)} in one "
            "of them; add the other."
        )
    beside = sum(path.suffix.lower() in SUFFIXES for path in whole.images.iterdir())
    left_out = (f"{beside} images in {whole.images} itself, beside its splits, are left out",) * bool(beside)
    parts = {split: Part(folder, mask_splits.get(split)) for split, folder in image_splits.items()}
    return _checked(Layout(root, parts, left_out))


def _flipped(wanted: Mapping[str, Sequence[str]]) -> list[tuple[Sequence[str], str]]:
    return [(names, flag) for flag, names in wanted.items()]


def _checked(layout: Layout) -> Layout:
    if "train" not in layout.parts:
        raise FileNotFoundError(
            f"find_layout: {layout.root} must have a split to train on, got {', '.join(layout.parts)}; name it train."
        )
    return layout


def _part(folder: Path, found: Mapping[str, Path | None], split: str) -> Part:
    images, masks = found["--images"], found["--masks"]
    if images is None or (masks is None and split != "test"):
        there, missing = ("masks", "images") if images is None else ("images", "masks")
        names = ", ".join(f"{name}/" for name in (IMAGES if images is None else MASKS))
        raise FileNotFoundError(
            f"find_layout: {folder} must hold images and masks, got {there} alone; add a folder of {missing} "
            f"({names}), or name it with --{missing}."
        )
    return Part(images, masks)


def _is_mixed(folder: Path) -> bool:
    """Return whether a folder holds masks beside their images: a.jpg and a_mask.png, say."""
    names = {
        path.stem for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    }
    return any(name.lower().endswith(ending) and name[: -len(ending)] in names for name in names for ending in ENDINGS)


def _splits(folder: Path) -> dict[str, Path]:
    """Return the folders of splits in a folder."""
    found = {split: _one(folder, names, None) for split, names in SPLITS.items()}
    return {split: path for split, path in found.items() if path is not None}


def _one(folder: Path, names: Sequence[str], flag: str | None) -> Path | None:
    """Return the folder of one of these names.

    Raises:
        ValueError: there are several.
    """
    found = [path for path in _folders(folder) if path.name.lower() in names]
    if len(found) > 1:
        advice = "rename all but one" if flag is None else f"name one with {flag}, or rename the others"
        shown = " and ".join(f"{path.name}/" for path in found)
        raise ValueError(f"find_layout: {folder} must hold one of these folders, got {shown}; {advice}.")
    return found[0] if found else None


def _folders(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
