"""Count pixels that keep their class in half precision: `python -m benchmarks.half_precision --checkpoint X INPUT...`.

Each image is predicted as `train.predict` does it, in float32 and under autocast to bfloat16 and float16, and the
classes are compared pixel by pixel. A trained network should keep at least 99.5 % of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ccgpu.models.image_files import open_image
from ccgpu.train import predict
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
    images = [open_image(entry.path) for entry in find_inputs(flags.inputs)[0]]
    # The command requires --out; nothing is written.
    common = ["--checkpoint", flags.checkpoint, "--device", flags.device, "--out", "unused", *flags.inputs]
    predictors = {amp: predict.Predictor(predict.read_flags([*common, "--amp", amp])) for amp in ("off", *HALVES)}
    shares = kept_shares(predictors, images)
    pixels = sum(image.width * image.height for image in images)
    for amp, share in shares.items():
        print(f"{amp}: {100 * share:.3f} % of {pixels:,} pixels keep their class")
    if flags.record is not None:
        device = predictors["off"].precision.device
        record = {"kind": "half_precision", "kept": shares, "images": len(images), **records.circumstances(device)}
        records.append_record(flags.record, record)
    return 0


def kept_shares(predictors: dict[str, predict.Predictor], images: Sequence[Image.Image]) -> dict[str, float]:
    """Return, for each half precision, the share of all pixels whose class is the same as in float32."""
    kept = dict.fromkeys(HALVES, 0)
    for image in images:
        classes = predictors["off"](image)
        for amp in HALVES:
            kept[amp] += int((predictors[amp](image) == classes).sum())
    pixels = sum(image.width * image.height for image in images)
    return {amp: number / pixels for amp, number in kept.items()}


if __name__ == "__main__":
    sys.exit(main())
