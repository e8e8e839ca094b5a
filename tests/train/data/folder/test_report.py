"""The report of a folder: its lines and its table, by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccgpu.models.labels import Labels
from ccgpu.train.data.census import Census
from ccgpu.train.data.facts import Facts
from ccgpu.train.data.folder.layout import Layout, Part
from ccgpu.train.data.folder.report import class_table, images_line, masks_line, report_text
from ccgpu.train.data.folder.split import Split
from ccgpu.train.data.masks import Counts

IDS = Labels(("water", "reed"), np.array([[30, 80, 160], [1, 2, 3]], np.uint8), (1, 300), (0,))


def test_images_and_masks_in_one_line_each() -> None:
    images = {Path(f"{index}.jpg"): Facts(size=size) for index, size in enumerate([(8, 6), (80, 60), (4, 3)])}
    assert images_line(images, "8-bit RGB") == "images: 3 of 4x3 to 80x60, median 8x6 pixels, 8-bit RGB"
    assert images_line({Path("a"): Facts(size=(8, 6))}, "1 channel") == "images: 1 of 8x6 pixels, 1 channel"
    masks = {Path(f"m/{index}.png"): Counts(kind, {}, 0) for index, kind in enumerate(("palette", "grey8", "grey8"))}
    assert masks_line(masks, "ids") == "masks: read as ids; 2 of 8-bit grey (1.png), 1 with a palette (0.png)"
    assert masks_line({}, "ids") == "masks: none that can be read"


def test_the_table_has_values_colours_shares_and_files() -> None:
    censuses = [
        Census("training", {1: 6, 0: 2}, {1: 3, 0: 1}, {1: 8, 0: 4}),
        Census("evaluation", {300: 5}, {300: 1}, {300: 5}),
    ]
    assert [line.split() for line in class_table(IDS, censuses).splitlines()] == [
        ["class", "id", "colour", "training", "%", "files", "evaluation", "%", "files"],
        ["water", "1", "#1e50a0", "75.00", "3", "0.00", "0"],
        ["reed", "300", "#010203", "0.00", "0", "100.00", "1"],
        ["void", "0", "25.00", "1", "0.00", "0"],
    ]
    colours = Labels(("a", "b"), IDS.colours, (0x1E50A0, 0x010203), (0xFFFFFF,), coding="colours")
    assert [line.split()[:2] for line in class_table(colours, []).splitlines()] == [
        ["class", "colour"],
        ["a", "#1e50a0"],
        ["b", "#010203"],
        ["void", "#ffffff"],
    ]


def test_the_report_has_everything_in_order() -> None:
    root = Path("/data/ponds")
    layout = Layout(root, {"all": Part(root / "images", root / "masks")}, ("2 images are left out",))
    split = Split({"train": ["a", "b"], "val": ["c"]}, {"train": "all", "val": "all"}, "by hand")
    text = report_text(layout, split, "images: 3", "masks: 3", IDS, [], ["255 is void"], ["--gamma 1: short"])
    lines = text.splitlines()
    assert lines[:6] == [
        "/data/ponds: images/ with masks/",
        "images: 3",
        "split: 2 to train on, 1 to evaluate on; by hand",
        "masks: 3",
        "255 is void",
        "2 images are left out",
    ]
    assert lines[-2:] == ["settings that follow from the data; each flag changes its own:", "  --gamma 1: short"]
