"""Count pixels that keep their class in half precision: `python -m benchmarks.half_precision --checkpoint X INPUT...`.

Each image is predicted as `ccgpu predict` does it, in float32 and under autocast to bfloat16 and float16, and the
classes are compared pixel by pixel. A trained network should keep at least 99.5 % of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ccgpu.models.image_format import Pixels
from ccgpu.models.network_input import PixelInput
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import Precision
from ccgpu.models.segmenter import Segmenter
from ccgpu.models.tiles import TILE, predict_classes
from ccgpu.train.data.inputs import find_inputs
from ccgpu.train.runs import records

HALVES = ("bf16", "fp16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="half_precision", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="images, folders, patterns")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a run's last.pt, or any other network")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the shares to this file of JSON lines")
    flags = parser.parse_args(argv)
    segmenter = Segmenter.load(flags.checkpoint, device=flags.device)
    images = [segmenter.images.open(entry.path) for entry in find_inputs(flags.inputs)[0]]
    device = next(segmenter.net.parameters()).device
    predictors = {amp: predictor(segmenter, Precision(device, amp)) for amp in ("off", *HALVES)}
    shares = kept_shares(predictors, images)
    for amp, share in shares.items():
        print(f"{amp}: {100 * share:.3f} % of the pixels of {len(images)} images keep their class")
    if flags.record is not None:
        record = {"kind": "half_precision", "kept": shares, "images": len(images), **records.circumstances(device)}
        records.append_record(flags.record, record)
    return 0


def predictor(segmenter: Segmenter, precision: Precision) -> Callable[[Pixels], np.ndarray]:
    """Return a function from images to classes, computed in a precision: also in fp16 on a CPU, which is only slow."""
    how = segmenter.settings((1.0,), flip=False)
    normalise = Normalise(segmenter.net.backbone.mean, segmenter.net.backbone.std)

    def classes(image: Pixels) -> np.ndarray:
        source = PixelInput(image, lambda values: precision.images(normalise(values)[None]))
        with precision.autocast():
            return predict_classes(segmenter.logits, source, how, tile=TILE, overlap=TILE // 4).numpy()

    return classes


def kept_shares(predictors: Mapping[str, Callable[[Pixels], np.ndarray]], images: Sequence[Pixels]) -> dict[str, float]:
    """Return, for each half precision, the share of all pixels whose class is the same as in float32."""
    kept, pixels = dict.fromkeys(HALVES, 0), 0
    for image in images:
        classes = predictors["off"](image)
        pixels += classes.size
        for amp in HALVES:
            kept[amp] += int((predictors[amp](image) == classes).sum())
    return {amp: number / pixels for amp, number in kept.items()}


if __name__ == "__main__":
    sys.exit(main())
