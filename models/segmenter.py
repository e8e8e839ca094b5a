"""From images to masks in Python: a `Segmenter` is a trained network with all that using it on an image takes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from ccgpu.models import checkpoint
from ccgpu.models.ccnet import CCNet
from ccgpu.models.given_images import Given, listed, name_of, read_given, read_one
from ccgpu.models.image_files import MAX_PIXELS
from ccgpu.models.image_format import ImageFormat, Pixels
from ccgpu.models.labels import Labels
from ccgpu.models.network_input import PixelInput
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import AMP_DTYPES, Precision, amp_problems
from ccgpu.models.prediction import Prediction
from ccgpu.models.published import RESNET
from ccgpu.models.segmentation import Segmentation
from ccgpu.models.tiles import TILE, Outcome, is_large, outcomes, predict_image, whole_input

Progress: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]
SMALLEST_TILE = 32  # pixels; a few positions of a feature map, and still fewer than 2000 tiles a million pixels
BATCH = 8
_SHOWN = 8  # classes that a repr names


class Segmenter:
    """A trained network as a function from images to masks.

    Images are read, resized and normalised as the network was trained; large ones are cut into tiles (see `predict`).
    A network for clips gets each image as a clip of one. Threads may share a segmenter.

    Args:
        net: the network; it is moved to the device and set to eval mode.
        labels: its classes; None: "class 0", "class 1", ...
        images: how its images are read; None: as 8-bit RGB.
        prediction: how images are resized and averaged; that of the file for a network of `load`.
        value_range: (low, high), the values of files and Pillow images of more than 8 bits that become 0 and 255.
        device: "auto" (CUDA where there is one), "cpu", "cuda", or a torch.device.
        amp: "off", or the dtype of autocast: "bf16", or "fp16" on CUDA devices.
        max_pixels: largest image that is read, in pixels.

    Raises:
        TypeError: net or labels is of another type.
        ValueError: labels of another number of classes, images of other channels, or an argument out of its range.

    Examples:
        >>> import numpy as np
        >>> from ccgpu.models.ccnet import CCNet
        >>> from ccgpu.models.segmenter import Segmenter
        >>> segmenter = Segmenter(CCNet("resnet18", 3), device="cpu")
        >>> result = segmenter.predict(np.zeros((40, 50, 3), np.uint8))
        >>> result.classes.shape, result.names
        ((40, 50), ('class 0', 'class 1', 'class 2'))
    """

    def __init__(
        self,
        net: CCNet,
        labels: Labels | None = None,
        *,
        images: ImageFormat | None = None,
        prediction: Prediction | None = None,
        value_range: tuple[float, float] | None = None,
        device: str | torch.device = "auto",
        amp: str = "off",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not isinstance(net, CCNet):
            raise TypeError(
                f"Segmenter: net must be a CCNet, got {type(net).__name__}; Segmenter.load takes the path of a "
                "checkpoint."
            )
        if labels is not None and not isinstance(labels, Labels):
            raise TypeError(
                f"Segmenter: labels must be a Labels, got {type(labels).__name__}; see ccgpu.models.labels.Labels."
            )
        number, channels = cast(int, net.config["num_classes"]), cast(int, net.config["in_channels"])
        labels = Labels.numbered(number) if labels is None else labels
        if labels.num_classes != number:
            raise ValueError(
                f"Segmenter: labels must be those of the network's {number} classes, got "
                f"{labels.num_classes}; pass its own."
            )
        images = ImageFormat() if images is None else images
        if images.channels != channels:
            raise ValueError(
                f"Segmenter: images must be a format of the network's {channels} channel{'s'[: channels > 1]}, got "
                f'{images}; pass such as images=ImageFormat({channels}, raw=True, dtype="uint8").'
            )
        if value_range is not None:
            images.check_range(value_range)
        chosen = _device(device)
        if amp not in AMP_DTYPES:
            raise ValueError(f"Segmenter: amp must be one of {tuple(AMP_DTYPES)}, got {amp!r}; pass one of these.")
        if problems := amp_problems(amp, chosen):
            raise ValueError(f"Segmenter: {problems[0]}.")
        if max_pixels < 1:
            raise ValueError(f"Segmenter: max_pixels must be 1 or more, got {max_pixels}; leave it out.")
        self.net = net.to(chosen).eval()
        self.labels = labels
        self.images = images
        self.prediction = Prediction() if prediction is None else prediction
        self.value_range = value_range
        self.max_pixels = max_pixels
        self._precision = Precision(chosen, amp)
        self._normalise = Normalise(net.backbone.mean, net.backbone.std)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        labels: Labels | None = None,
        value_range: tuple[float, float] | None = None,
        device: str | torch.device = "auto",
        amp: str = "off",
        max_pixels: int = MAX_PIXELS,
    ) -> Segmenter:
        """Return the segmenter of a file: a run's folder or `last.pt`, a converted file, or a published checkpoint.

        Args:
            path: the file or the run's folder.
            labels: the classes; None: those of the file, or "class 0", "class 1", ... where it has none.
            value_range: None: that of the file.
            device, amp, max_pixels: as for `Segmenter`.

        Raises:
            ValueError, OSError: a file or an argument that cannot be used.
        """
        return cls.of_checkpoint(
            checkpoint.read(path),
            labels=labels,
            value_range=value_range,
            device=device,
            amp=amp,
            max_pixels=max_pixels,
        )

    @classmethod
    def of_checkpoint(
        cls,
        found: checkpoint.Checkpoint,
        *,
        labels: Labels | None = None,
        value_range: tuple[float, float] | None = None,
        device: str | torch.device = "auto",
        amp: str = "off",
        max_pixels: int = MAX_PIXELS,
    ) -> Segmenter:
        """Return the segmenter of a checkpoint that was read; arguments and errors are those of `load`."""
        if found.source == RESNET:
            raise ValueError("Segmenter: the file must hold a whole network, got a backbone alone; name another.")
        if labels is None and found.labels is not None:
            labels = Labels.from_plain(found.labels)
        return cls(
            checkpoint.build(found),
            labels,
            images=found.images,
            prediction=Prediction.of_images(found.prediction),
            value_range=found.value_range if value_range is None else value_range,
            device=device,
            amp=amp,
            max_pixels=max_pixels,
        )

    def predict(
        self,
        images: Given | Iterable[Given],
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        short_side: int | None = None,
        long_side: int | None = None,
        fit: tuple[int, int] | None = None,
        tile: int = TILE,
        batch: int = BATCH,
        value_range: tuple[float, float] | None = None,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Predict an image, or several.

        Kinds of images: a file's path, read as by `ImageFormat.open`, upright by its EXIF orientation and checked for
        damage; a Pillow image; an array uint8 (H, W, 3) of red, green, blue, or (H, W) of grey; a tensor uint8
        (3, H, W). Arrays of other dtypes need `value_range`, because their range is not known. A network of another
        `ImageFormat` takes (H, W, channels) and (channels, H, W) of its dtype.

        Several images are a list, or a batch: an array (B, H, W, 3) or a tensor (B, 3, H, W). All are read before the
        first is predicted, so that one that cannot be used is told before anything is computed; for more than fit into
        memory, call this for one after the other. Images of one size run together, as many as have 2 tile^2 pixels and
        at most `batch`. Their scores equal those of the images alone up to rounding.

        An image of more than 2 tile^2 pixels is cut into overlapping tiles, or, by a network with an image size of its
        own, shrunk to so many pixels (`predict_classes` tells both). Memory for it is that of the image, 4 bytes a
        pixel, and of its classes, 1 byte, on top of what the network takes for 2 tile^2 pixels; `probabilities` add
        4 K bytes a pixel.

        Args:
            images: an image, or several.
            scales: factors of the image's size; predictions are averaged over them.
            flip: whether the flipped image is predicted too.
            short_side, long_side, fit: the image's size for the network, as in `Prediction`; None: as the network was
                trained.
            tile: side of the tiles of large images in pixels, 32 or more; 0: none is cut.
            batch: most images that run together, 1 or more.
            value_range: (low, high), the values that become 0 and 255, for images of more than 8 bits and arrays that
                are not uint8; None: that of the segmenter, for files and Pillow images.
            probabilities: whether `Segmentation.probabilities` are kept.
            progress: wraps the batches of several images and the tiles of a large one, for example tqdm.tqdm.

        Returns:
            A `Segmentation`; for several images a list of them, in the order of the images.

        Raises:
            FileNotFoundError, BadImage, TypeError, ValueError: an image or argument that cannot be used; of several
                images, all that cannot be used are named in one ValueError.
            NonFiniteScores: the network returns NaN or infinity.
        """
        if not _is_whole(tile) or (tile != 0 and tile < SMALLEST_TILE):
            raise ValueError(
                f"Segmenter.predict: tile must be 0, or {SMALLEST_TILE} or more, got {tile!r}; 0 cuts no image."
            )
        if not _is_whole(batch) or batch < 1:
            raise ValueError(f"Segmenter.predict: batch must be 1 or more, got {batch!r}; 1 runs each image alone.")
        how = self.settings(scales, flip, short_side=short_side, long_side=long_side, fit=fit)
        given, are_several = listed(images)
        read = read_given(
            given,
            are_several,
            lambda image: read_one(
                image,
                self.images,
                value_range=value_range,
                known_range=self.value_range,
                max_pixels=self.max_pixels,
            ),
        )
        sources = [PixelInput(pixels, self._input) for pixels, _ in read]
        groups = _batches(sources, tile, batch)
        wrap = iter if progress is None else progress
        found: dict[int, Segmentation] = {}
        for group in wrap(groups) if are_several else groups:
            names = [name_of(given, index, are_several) for index in group]
            if len(group) == 1:
                pixels, source = read[group[0]]
                found[group[0]] = self.predict_decoded(
                    pixels,
                    how,
                    tile=tile,
                    probabilities=probabilities,
                    progress=wrap,
                    source=source,
                    name=names[0],
                )
                continue
            with self._precision.autocast():
                inputs = torch.cat([whole_input(sources[index], how, tile) for index in group])
                results = outcomes(how, how(self.logits, inputs), probabilities, names)
            for index, result in zip(group, results, strict=True):
                pixels, source = read[index]
                found[index] = self._segmentation(pixels, source, result)
        segmentations = [found[index] for index in range(len(read))]
        return segmentations if are_several else segmentations[0]

    def predict_decoded(
        self,
        pixels: Pixels,
        how: Prediction,
        *,
        tile: int = TILE,
        probabilities: bool = False,
        progress: Progress = iter,
        source: Path | None = None,
        name: str = "an image",
    ) -> Segmentation:
        """Predict an image that is decoded already, without a copy of it.

        Args:
            pixels: from `images.open` or `images.convert`, of `ImageFormat`.
            how: from `settings`.
            tile, probabilities, progress: as for `predict`.
            source: the image's file, for `Segmentation.source`.
            name: of the image, for the message about scores that are not finite.

        Raises:
            NonFiniteScores: the network returns NaN or infinity.
        """
        with self._precision.autocast():
            outcome = predict_image(
                self.logits,
                PixelInput(pixels, self._input),
                how,
                tile=tile,
                overlap=tile // 4,
                progress=progress,
                probabilities=probabilities,
                name=name,
            )
        return self._segmentation(pixels, source, outcome)

    def _segmentation(self, pixels: Pixels, source: Path | None, outcome: Outcome) -> Segmentation:
        shares = None if outcome.probabilities is None else outcome.probabilities.numpy()
        return Segmentation(outcome.classes.numpy(), self.labels, pixels, source, self.images, shares)

    def settings(
        self,
        scales: Sequence[float],
        flip: bool,
        *,
        short_side: int | None = None,
        long_side: int | None = None,
        fit: tuple[int, int] | None = None,
    ) -> Prediction:
        """Return how an image is predicted with these arguments of `predict`.

        Raises:
            ValueError: an argument is out of its range.
        """
        if not isinstance(scales, Iterable) or isinstance(scales, str):
            raise ValueError(
                f"Segmenter.predict: scales must be several numbers, got {scales!r}; pass a list of these, such as "
                "(0.75, 1, 1.25)."
            )
        how = dataclasses.replace(self.prediction, scales=tuple(scales), flip=flip)
        return how.resized(short_side, long_side, fit)

    def __repr__(self) -> str:
        names = ", ".join(self.labels.names[:_SHOWN])
        more = f" and {len(self.labels.names) - _SHOWN} more" if len(self.labels.names) > _SHOWN else ""
        backbone = self.net.config["backbone"]
        return f"Segmenter({backbone}, {self.images}, {self.labels.num_classes} classes: {names}{more})"

    def _input(self, pixels: np.ndarray) -> Tensor:
        return self._precision.images(self._normalise(pixels)[None])

    def logits(self, images: Tensor) -> Tensor:
        """Return the network's logits of normalised images (B, C, H, W); one for clips gets each as a clip of one."""
        return self.net(images[:, :, None])[:, :, 0] if self.net.dims == 3 else self.net(images)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _device(device: str | torch.device) -> torch.device:
    """Return the device that is asked for.

    Raises:
        ValueError: it is none of cpu and cuda, or this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"Segmenter: device must be auto, cpu or cuda, got {device!r}; pass one of these.")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"Segmenter: device must be one of this machine, got {device!r}; pass 'auto' or 'cpu'.")
    return chosen


def _batches(sources: Sequence[PixelInput], tile: int, batch: int) -> list[list[int]]:
    """Return the indices of the images that run together, each group in the order of the images."""
    open_groups: dict[tuple[int, int], list[int]] = {}
    groups: list[list[int]] = []
    for index, source in enumerate(sources):
        height, width = source.size
        together = (
            1 if is_large(source.size, tile) else batch if tile == 0 else min(batch, 2 * tile**2 // (height * width))
        )
        group = open_groups.get(source.size)
        if group is None or len(group) >= together:
            group = open_groups[source.size] = []
            groups.append(group)
        group.append(index)
    return groups
