"""The README's first blocks take a folder of 20 images with masks in colours to a mask, by commands and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.docs.reader import ROOT, Reader
from tests.train.folders import COLOURS


def test_the_readme_goes_from_a_folder_of_images_to_a_mask(folder: Path, data: Callable[[str], Path]) -> None:
    assert len(list(Path("my-images/masks").iterdir())) == 20
    reader = Reader(data)
    reader.read(ROOT / "README.md")

    mask = Image.open("predicted/masks/street.png")
    assert mask.mode == "P"
    assert mask.size == Image.open("photos/street.jpg").size
    assert {tuple(colour) for colour in np.unique(np.array(mask.convert("RGB")).reshape(-1, 3), axis=0).tolist()} <= {
        tuple(colour) for colour in COLOURS.tolist()
    }
    result = reader.names["result"]
    assert np.array_equal(result.classes, np.asarray(mask))  # Python and the command agree
    assert Image.open("street.png").height > mask.height  # the overlay with its legend
    assert Image.open("predicted/overlays/street.jpg").size == mask.size
    records = [json.loads(line) for line in Path("predicted/predictions.jsonl").read_text().splitlines()]
    assert [record["name"] for record in records] == ["park", "street"]
    assert "class 0" in Path("runs/my-images/dataset.txt").read_text()
