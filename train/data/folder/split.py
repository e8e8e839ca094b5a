"""The split of a folder's images: its own, or a share that a hash of their names chooses; saved with a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ccgpu.train.data.folder.layout import ALL, Layout
from ccgpu.train.data.pairs import Pair, listing


@dataclass(frozen=True)
class Split:
    """Which images are trained and evaluated on.

    Attributes:
        names: "train" and "val" -> names of the images; None: all of the part.
        parts: "train" and "val" -> the part of the layout that they are from.
        said: how the split came about, in one line.
    """

    names: Mapping[str, Sequence[str]] | None
    parts: Mapping[str, str]
    said: str

    def as_plain(self) -> dict[str, Any]:
        """Return the split as plain values, to be stored with a run."""
        assert self.names is not None
        return {
            "names": {split: list(names) for split, names in self.names.items()},
            "parts": dict(self.parts),
            "said": self.said,
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Split:
        """Return the split with these plain values: the inverse of `as_plain`.

        Raises:
            KeyError, TypeError, ValueError: the values are no split.
        """
        names, parts = ({**values[name]} for name in ("names", "parts"))
        listed = [name for group in names.values() for name in group]
        if not ({*names} == {*parts} == {"train", "val"} and {*map(type, (*listed, *parts.values()))} <= {str}):
            raise ValueError(f"Split: values must have the names and parts of train and val, got {values!r:.300}.")
        return cls(names, parts, values["said"])

    def choose(self, layout: Layout, split: str, labelled: bool = True) -> list[Pair]:
        """Return the pairs of a split: its names alone where they are fixed.

        Raises:
            FileNotFoundError, ValueError: images of the split are not there any more, or lack their masks; one error
                lists all.
        """
        pairs, problems = layout.match(self.parts.get(split, split), labelled)
        if self.names is None or split not in self.names:
            if problems:
                raise ValueError("find_pairs: " + "\n".join(problems))
            return pairs
        wanted = set(self.names[split])
        chosen = [pair for pair in pairs if pair.name in wanted]
        missing = sorted(wanted - {pair.name for pair in chosen})
        if missing:
            raise FileNotFoundError(
                f"find_pairs: {layout.root} must hold the images and masks of the run's split, got {len(missing)} "
                f"of {len(wanted)} for {split} missing; put them back, or start a new run:\n{listing(missing)}"
            )
        return chosen

    def new(self, layout: Layout) -> list[str]:
        """Return the names of images in the folder that are in neither part of a fixed split."""
        assert self.names is not None
        return [
            pair.name
            for part in dict.fromkeys(self.parts.values())
            for pair in layout.match(part, labelled=False)[0]
            if not any(self.parts[split] == part and pair.name in set(names) for split, names in self.names.items())
        ]


def split_of(layout: Layout, pairs: Mapping[str, Sequence[Pair]], share: float) -> Split:
    """Return the split of a folder: its own, or a fixed share of the images for evaluation.

    The share of images whose names have the lowest SHA-256 is evaluated on, at least one; so which images these are
    does not depend on their order.

    Args:
        layout: the folder's layout.
        pairs: the pairs of each of its parts.
        share: the share for evaluation, between 0 and 1, where there is no split for it.

    Raises:
        ValueError: there are fewer than two images to be shared.
    """
    if "val" in layout.parts:
        names = {split: [pair.name for pair in pairs[split]] for split in ("train", "val")}
        return Split(names, {"train": "train", "val": "val"}, "the folder's own; --val-share is not used")
    part = ALL if ALL in layout.parts else "train"
    every = [pair.name for pair in pairs[part]]
    if len(every) < 2:
        raise ValueError(
            f"split_of: {layout.root} must hold 2 images with masks or more, one of them to evaluate on, got "
            f"{len(every)}; add some."
        )
    order = sorted(every, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    held_out = set(order[: min(max(1, round(share * len(every))), len(every) - 1)])
    names = {
        "train": [name for name in every if name not in held_out],
        "val": [name for name in every if name in held_out],
    }
    said = f"{share:g} of the images are for evaluation (--val-share), chosen by a hash of their names"
    return Split(names, {"train": part, "val": part}, said)


def whole_of(layout: Layout) -> Split:
    """Return what is evaluated of another folder than the run's: its val split, or all of it if it has none."""
    if "val" in layout.parts:
        return Split(None, {}, "its val split")
    part = ALL if ALL in layout.parts else "train"
    return Split(None, {"val": part}, f"all of {part if part != ALL else 'it'}, because it has no val split")
