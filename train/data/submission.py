"""Saving predictions as the label files that test servers and the datasets' own evaluations read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ccgpu.models.labels import Labels
from ccgpu.models.png_files import strips, write_png
from ccgpu.models.weights import write_atomically


def save_prediction(folder: Path, name: str, classes: torch.Tensor | np.ndarray, labels: Labels) -> Path:
    """Write the predicted classes of an image as folder/NAME.png, a label file of the dataset.

        pixel = labels.to_file[class]:    Cityscapes 7, 8, 11, ... 33, ADE20K 1..150

    The PNG is of 8-bit grey, of 16-bit grey where ids are above 255, and RGB where the dataset's masks are colours.

    The file is written atomically: as NAME.png.partial, synchronised to the disk and renamed, so a killed run leaves at
    most such partial files. A file of the same name is replaced.

    Args:
        folder: an existing folder.
        name: the image's name without folder and ending (`Pair.name`), by which evaluations match it to its label file.
        classes: (H, W), H and W 1 or more, integers of any dtype: train ids 0 .. K - 1; on the CPU.
        labels: the dataset's classes.

    Returns:
        The path of the file.

    Raises:
        ValueError: classes has another rank, no pixels, another dtype, or a value that is no class. Nothing is written.
        OSError: the file cannot be written.
    """
    values = np.asarray(classes)
    fits = values.ndim == 2 and values.size > 0 and np.issubdtype(values.dtype, np.integer)
    if not fits or values.min() < 0 or values.max() >= labels.num_classes:
        held = f"{values.min()}..{values.max()}" if values.size else "none"
        raise ValueError(
            f"save_prediction: classes must be integers (H, W) in 0..{labels.num_classes - 1}, got {values.dtype} "
            f"{values.shape} with values {held} for {name}; pass one image's logits.argmax over the classes."
        )
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)  # a name may have subfolders
    height, width = values.shape
    rows = (labels.to_file[values[part]] for part in strips(height, width))
    write_atomically(path, lambda file: write_png(file, height, width, rows))
    return path
