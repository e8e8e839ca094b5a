"""Train CCNet on ADE20K (SceneParse150): `ccgpu train ade20k --data PATH`.

20210 images for training, 2000 for validation, 150 classes (`data/ade20k_labels.py`). In the paper (Huang et al., TPAMI
2020), as others quote it, the short side of a training image is one of 300, 375, 450, 525, 600, the category consistent
loss is on, and ResNet-101 reaches 45.76 % mIoU on the validation set. The paper's crop, batch, learning rate and number
of steps are not known; the values of mmsegmentation's CCNet (512x512, 16, 0.01, 160000) are used. The evaluation is
ours: whole images, resized to the middle one of the short sides, 450. `--preset mmseg-ade20k` trains as mmsegmentation
does. Without `--data` the images are synthetic street scenes (`scenes/streets.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ccgpu.train import command
from ccgpu.train.data.ade20k_labels import LABELS
from ccgpu.train.data.pairs import Pair, find_by_name
from ccgpu.train.dataset import Dataset
from ccgpu.train.presets import DEMO, MMSEGMENTATION
from ccgpu.train.scenes.canvas import by_id
from ccgpu.train.scenes.files import Key, file_in, varied_size, write_synthetic
from ccgpu.train.scenes.streets import draw_scene

# Name of a thing in synthetic scenes -> its class; trains, ego vehicle and rail tracks have none.
_CLASS_OF = {
    **{name: name for name in ("building", "sky", "sidewalk", "person", "car", "fence", "wall", "road", "pole")},
    **{name: name for name in ("truck", "bus", "van", "bicycle", "traffic light")},
    **{"parking": "road", "terrain": "grass", "vegetation": "tree", "hedge": "plant", "skyline": "skyscraper"},
    **{"street lamp": "streetlight", "traffic sign": "signboard", "static": "box", "rider": "person"},
    "motorcycle": "minibike",
}
# Id in a synthetic scene -> id in the label files.
_LABEL_IDS = by_id(
    {thing: LABELS.ids[LABELS.names.index(name)] for thing, name in _CLASS_OF.items()}, LABELS.void[0]
).astype(np.uint8)

_FULL = ("ADE20K_2021_17_01", "ADE20K_2016_07_26")  # folders of the full dataset's archives


def find_pairs(root: Path, split: str, labelled: bool = True) -> list[Pair]:
    """Return the images of a split ("training", "validation"), sorted by name.

        root/images/SPLIT/NAME.jpg
        root/annotations/SPLIT/NAME.png

    The root may also be the folder that holds ADEChallengeData2016/. The split "testing" has no label files: look for
    it with labelled=False. Errors are as in `pairs.find_by_name`.
    """
    unpacked = Path(root) / "ADEChallengeData2016"
    root = unpacked if unpacked.is_dir() else Path(root)
    if not (root / "annotations").is_dir():
        _refuse_full_dataset(root)
    return find_by_name("find_pairs", root / "images" / split, root / "annotations" / split if labelled else None)


def _refuse_full_dataset(root: Path) -> None:
    """Raise FileNotFoundError if a folder holds the full ADE20K, whose label files are of other classes and colours."""
    for folder in (root, *(root / name for name in _FULL)):
        if (folder / "images" / "ADE").is_dir() or any(folder.glob("index_ade20k.*")):
            raise FileNotFoundError(
                f"find_pairs: --data must be ADEChallengeData2016 (SceneParse150), got the full ADE20K in {folder}, "
                "whose label files have thousands of classes; download ADEChallengeData2016.zip, with images/ and "
                "annotations/ of 150 classes."
            )


def write_scenes(root: str | Path, splits: Mapping[str, int], size: tuple[int, int], seed: int) -> Path:
    """Write synthetic street scenes of up to `size`, in this layout; see `files.write_synthetic`."""
    return write_synthetic(root, splits, size, seed, layout="ade20k", write=_write_image)


def _write_image(root: Path, split: str, index: int, size: tuple[int, int], key: Key) -> None:
    generator = np.random.default_rng((*key, index))
    pixels, ids = draw_scene(varied_size(size, generator), generator, index)
    name = f"ADE_synthetic_{index:08d}"
    Image.fromarray(pixels).save(file_in(root / "images" / split, f"{name}.jpg"), quality=95)
    Image.fromarray(_LABEL_IDS[ids]).save(file_in(root / "annotations" / split, f"{name}.png"))


DATASET = Dataset(
    name="ade20k",
    labels=LABELS,
    layout="ADEChallengeData2016/ or the folder that holds it, with images/ and annotations/.",
    find_pairs=find_pairs,
    write_synthetic=write_scenes,
    source="Short sides and losses are the paper's; crop, batch and schedule are mmsegmentation's.",
    recipe={
        "train_split": ("training",),
        "val_split": ("validation",),
        "scenes_size": (384, 512),
        "ccl": True,
        "iterations": 160000,
        "batch": 16,
        "crop": (512, 512),
        "random_short_sides": (300, 375, 450, 525, 600),
        "random_scale": (1.0, 1.0),
        "mode": "whole",
        "short_side": 450,
        "eval_every": 16000,
    },
    presets={
        "demo": {
            **DEMO,
            "scenes_size": (128, 192),
            "random_short_sides": (97, 113, 129, 145, 161),
            "short_side": None,
        },
        "paper": {},
        "mmseg-ade20k": {
            **MMSEGMENTATION,
            "iterations": 80000,
            "random_short_sides": (512,),
            "random_long_side": 2048,
            "short_side": 512,
            "long_side": 2048,
            "eval_every": 8000,
        },
    },
    scores=("miou", "pixel_accuracy"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `command.main` for the exit status."""
    return command.main(DATASET, argv)


if __name__ == "__main__":
    sys.exit(main())
