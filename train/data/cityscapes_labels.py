"""The label table of Cityscapes: names, label ids, train ids and colours of all labels, and the 19 classes.

Label ids are the values in the `*_gtFine_labelIds.png` files. Train ids 0..18 are the classes that a network predicts;
every other label has the train id 255 and counts neither in the loss nor in the evaluation.

Source: the dataset's published table (cityscapesScripts, `helpers/labels.py`); the tests compare every row with it.
"""

from typing import NamedTuple

import numpy as np

from ccgpu.models.labels import Labels


class Label(NamedTuple):
    """One row of the label table.

    Attributes:
        name: the label's name.
        id: value in labelIds files; -1 for a label that these files never contain.
        train_id: class 0..18; 255 (-1 for the licence plate) where the label is no class.
        category: group that the label belongs to.
        ignored: whether the evaluation leaves it out.
        colour: RGB, 0..255.
    """

    name: str
    id: int
    train_id: int
    category: str
    ignored: bool
    colour: tuple[int, int, int]


LABELS: tuple[Label, ...] = (
    Label("unlabeled", 0, 255, "void", True, (0, 0, 0)),
    Label("ego vehicle", 1, 255, "void", True, (0, 0, 0)),
    Label("rectification border", 2, 255, "void", True, (0, 0, 0)),
    Label("out of roi", 3, 255, "void", True, (0, 0, 0)),
    Label("static", 4, 255, "void", True, (0, 0, 0)),
    Label("dynamic", 5, 255, "void", True, (111, 74, 0)),
    Label("ground", 6, 255, "void", True, (81, 0, 81)),
    Label("road", 7, 0, "flat", False, (128, 64, 128)),
    Label("sidewalk", 8, 1, "flat", False, (244, 35, 232)),
    Label("parking", 9, 255, "flat", True, (250, 170, 160)),
    Label("rail track", 10, 255, "flat", True, (230, 150, 140)),
    Label("building", 11, 2, "construction", False, (70, 70, 70)),
    Label("wall", 12, 3, "construction", False, (102, 102, 156)),
    Label("fence", 13, 4, "construction", False, (190, 153, 153)),
    Label("guard rail", 14, 255, "construction", True, (180, 165, 180)),
    Label("bridge", 15, 255, "construction", True, (150, 100, 100)),
    Label("tunnel", 16, 255, "construction", True, (150, 120, 90)),
    Label("pole", 17, 5, "object", False, (153, 153, 153)),
    Label("polegroup", 18, 255, "object", True, (153, 153, 153)),
    Label("traffic light", 19, 6, "object", False, (250, 170, 30)),
    Label("traffic sign", 20, 7, "object", False, (220, 220, 0)),
    Label("vegetation", 21, 8, "nature", False, (107, 142, 35)),
    Label("terrain", 22, 9, "nature", False, (152, 251, 152)),
    Label("sky", 23, 10, "sky", False, (70, 130, 180)),
    Label("person", 24, 11, "human", False, (220, 20, 60)),
    Label("rider", 25, 12, "human", False, (255, 0, 0)),
    Label("car", 26, 13, "vehicle", False, (0, 0, 142)),
    Label("truck", 27, 14, "vehicle", False, (0, 0, 70)),
    Label("bus", 28, 15, "vehicle", False, (0, 60, 100)),
    Label("caravan", 29, 255, "vehicle", True, (0, 0, 90)),
    Label("trailer", 30, 255, "vehicle", True, (0, 0, 110)),
    Label("train", 31, 16, "vehicle", False, (0, 80, 100)),
    Label("motorcycle", 32, 17, "vehicle", False, (0, 0, 230)),
    Label("bicycle", 33, 18, "vehicle", False, (119, 11, 32)),
    Label("license plate", -1, -1, "vehicle", True, (0, 0, 142)),
)

_CLASSES = sorted((label for label in LABELS if not label.ignored), key=lambda label: label.train_id)

CITYSCAPES = Labels(
    names=tuple(label.name for label in _CLASSES),
    colours=np.array([label.colour for label in _CLASSES], dtype=np.uint8),
    ids=tuple(label.id for label in _CLASSES),
    void=tuple(label.id for label in LABELS if label.ignored and label.id >= 0),
    hint="use the *_gtFine_labelIds.png files, not train ids or colours",
)
"""The 19 classes that a network predicts."""
