"""Setting up commands: networks, built or read from files, and loaders of a dataset's samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import DataLoader

from ccgpu.models import checkpoint
from ccgpu.models.backbones import RESNETS, load_imagenet
from ccgpu.models.ccnet import EMBEDDING_CHANNELS, CCNet
from ccgpu.models.heads import initialise_as_mmsegmentation
from ccgpu.models.image_format import ImageFormat
from ccgpu.models.input_statistics import trained_deviation
from ccgpu.models.labels import class_differences
from ccgpu.models.normalisation import IMAGENET_STD, Normalise
from ccgpu.models.published import AUTHORS_MEAN, RESNET
from ccgpu.models.resnet import ResNet
from ccgpu.train import distributed
from ccgpu.train.data.census import check_number
from ccgpu.train.data.clips import Clip, evaluation_clips, training_clips
from ccgpu.train.data.reading import Reading
from ccgpu.train.data.samples import EvaluationSet, StreamSampler, TrainStream, evaluation_indices
from ccgpu.train.data.transforms import EvaluationTransform
from ccgpu.train.dataset import Dataset, Opened, find_dataset
from ccgpu.train.distributed import say
from ccgpu.train.loaders import load_batches
from ccgpu.train.optimisation.averaging import Average
from ccgpu.train.optimisation.freezing import freeze
from ccgpu.train.optimisation.optimisers import build_optimiser
from ccgpu.train.runs.data_check import check_data
from ccgpu.train.runs.folder import saved_folder
from ccgpu.train.runs.initial import Initial, holds_network, start_from
from ccgpu.train.runs.plan import SCENES
from ccgpu.train.runs.settings.training import Settings

Batches: TypeAlias = DataLoader[dict[str, Any]]
IMAGENET_DEVIATION = sum(IMAGENET_STD) / 3  # of images in 0..255
_OTHER_SCALE = 8.0  # the geometric mean of 1 and the deviation above: far from both
UNCHECKED = "files are not checked (--no-check): one that cannot be used ends the command when its turn comes"


def read_network(path: Path) -> checkpoint.Checkpoint:
    """Return the network of the file that --checkpoint names.

    Raises:
        ValueError, OSError: the file cannot be used, or holds a backbone alone.
    """
    found = checkpoint.read(path)
    if found.source == RESNET:
        raise ValueError(f"--checkpoint must hold a whole network, got {path} with a backbone alone")
    return found


def dataset_of_network(found: checkpoint.Checkpoint, name: str | None, root: Path | None = None) -> Dataset:
    """Return the dataset with a network's classes: the one that --dataset names, else the one that it was trained on.

    The network's own dataset must have the names and label ids that it was trained on. Another one must have the same
    classes in the same order; label ids belong to its label files, and so may differ, which is printed. Images are read
    and normalised as those that the network was trained on.

    Args:
        found: the network's file; a file without names of classes is compared by their number alone.
        name: the value of --dataset; None: the dataset that the file names.
        root: the value of --data, for a run on a folder of images and masks; None: the run's own folder.

    Raises:
        ValueError: no dataset is named, there is no such dataset, or it has other classes.
    """
    chosen = found.dataset if name is None else name
    if found.run is not None and found.run["folder"] is not None and name is None:
        return saved_folder(found.run, root)
    if chosen is None:
        raise ValueError(
            "--dataset must be given for a file that does not say on what it was trained: cityscapes, for example"
        )
    dataset = find_dataset(chosen, found.network["num_classes"])
    dataset = as_trained(dataset, found.images, found.network)
    if found.labels is None:
        return dataset
    # The names in a published file are in its authors' spelling, and without label ids.
    own = dataset.name == found.dataset and "ids" in found.labels
    # Void ids decide which label files are refused, and no score: a dataset may add some after training.
    known = {key: value for key, value in found.labels.items() if key != "void"}
    difference = class_differences(known, dataset.labels, exact=own)
    if difference:
        raise ValueError(
            f"--dataset must have the classes that the network was trained on, got {dataset.name} with {difference}; "
            "write the dataset's classes as the network has them, or train a network on these."
        )
    if not own and known.get("ids", [*dataset.labels.ids]) != [*dataset.labels.ids]:
        say(f"note: label ids are those of {dataset.name}, others than those that the network was trained on")
    return dataset


def as_trained(dataset: Dataset, images: ImageFormat, network: Mapping[str, Any]) -> Dataset:
    """Return a dataset whose images are read and normalised as those that a network was trained on.

    Args:
        dataset: the dataset.
        images: the format of the images that the network was trained on.
        network: the network's arguments, of which mean and std are taken.
    """
    mean, std = (None if network.get(name) is None else tuple(network[name]) for name in ("mean", "std"))
    return dataclasses.replace(dataset, images=images, mean=mean, std=std)


def build_network(
    settings: Settings, dataset: Dataset, device: torch.device, *, pretrained: bool, initial: Initial | None = None
) -> CCNet:
    """Return the network on its device, converted for the global batch.

    Args:
        settings: the settings of the run.
        dataset: its dataset.
        device: its device.
        pretrained: whether the backbone gets the weights of --imagenet.
        initial: the network whose weights it gets; None: none.

    Raises:
        ValueError, OSError, ImportError: the network cannot be built, or its weights cannot be loaded.
    """
    is_resnet, by_authors = settings.backbone in RESNETS, settings.normalisation == "authors"
    try:
        net = CCNet(
            settings.backbone,
            dataset.labels.num_classes,
            context=settings.context,
            recurrence=settings.loops,
            dims=2 if settings.clip == 1 else 3,
            stem=settings.stem,
            halved_dilation=settings.halved_dilation if is_resnet else None,
            ceil_mode=settings.ceil_mode if is_resnet else None,
            in_channels=dataset.images.channels,
            mean=AUTHORS_MEAN if by_authors and dataset.mean is None else dataset.mean,
            std=(1.0, 1.0, 1.0) if by_authors and dataset.std is None else dataset.std,
            head_channels=settings.head_channels,
            auxiliary=settings.auxiliary_weight > 0,
            auxiliary_channels=settings.auxiliary_channels,
            embedding=EMBEDDING_CHANNELS if settings.ccl else 0,
            dropout=settings.dropout,
            activation=settings.activation,
            align_corners=settings.align_corners,
            gamma=settings.gamma,
            nonlocal_form=settings.nonlocal_form,
            recompute=settings.recompute,
        )
        if settings.head_init == "mmsegmentation":
            for head in (net.head, net.auxiliary_head):
                if head is not None:
                    initialise_as_mmsegmentation(head)
        if pretrained and settings.imagenet is not None:
            _load_backbone(net, settings.imagenet, blue_first=by_authors)
            if isinstance(net.backbone, ResNet) and dataset.mean is None:
                say_deviation(net.backbone, settings)
            if net.in_channels != 3:
                say(
                    f"--imagenet: the weights were trained on RGB; each of the {net.in_channels} channels begins with "
                    f"the sum of those of red, green and blue, divided by {net.in_channels}"
                )
    except RuntimeError as error:  # a package of weights or models cannot be imported, or its download failed
        raise ValueError(str(error)) from error
    if initial is not None:
        if settings.freeze == "norms" and not any(name.startswith("auxiliary_head.") for name in initial.found.weights):
            raise ValueError(
                f"--freeze norms must come with a network that has all norms, got --init {initial.path} without the "
                "auxiliary head, whose new norms would learn nothing; leave --freeze out, or freeze the backbone."
            )
        say("\n".join(start_from(net, initial, dataset.labels)))
    return place_network(net, settings, device)


def _load_backbone(net: CCNet, source: str, *, blue_first: bool) -> None:
    try:
        load_imagenet(net.backbone, source, blue_first=blue_first)
    except (OSError, ValueError) as error:
        if holds_network(source):
            raise ValueError(
                f"--imagenet must hold a backbone alone, got {source} with a whole network; use --init."
            ) from error
        raise


def say_deviation(backbone: ResNet, settings: Settings) -> None:
    """Warn where a file's first batch norm was trained on images of another scale than --normalisation gives."""
    own = IMAGENET_DEVIATION if settings.normalisation == "authors" else 1.0
    state = backbone.state_dict()
    found = trained_deviation(state["conv1.weight"], state["bn1.running_var"])
    if found > own * _OTHER_SCALE or found < own / _OTHER_SCALE:
        other = "imagenet" if settings.normalisation == "authors" else "authors"
        say(
            f"warning: the first batch norm of {settings.imagenet} was trained on images of a standard deviation of "
            f"about {found:.2g}, and --normalisation {settings.normalisation} gives {own:.2g}: is the file one for "
            f"--normalisation {other}?"
        )


def place_network(net: CCNet, settings: Settings, device: torch.device) -> CCNet:
    """Return a network on its device, converted for the global batch.

    The settings choose its memory format and whether it is compiled.
    """
    order = torch.channels_last if settings.channels_last else torch.contiguous_format
    net = net.to(device)
    for parameter in net.parameters():
        if parameter.ndim == 4:  # channels_last is a format of 4 axes; 1x1x1 kernels for clips need no format
            parameter.data = parameter.data.contiguous(memory_format=order)
    distributed.convert_for_global_batch(net)
    if settings.compile:
        net.compile()
    return net


def build_optimisation(
    settings: Settings, net: CCNet
) -> tuple[Sequence[nn.Module], torch.optim.Optimizer, Average[CCNet] | None]:
    """Return the frozen modules of a network, the optimiser of the rest, and the average of the weights if asked for.

    Args:
        settings: the settings of the run.
        net: from `build_network`, before its first step; what is frozen is taken from its training.

    Raises:
        ValueError: there is nothing to freeze.
    """
    frozen = freeze(settings.freeze, net.backbone, net.backbone if settings.init is None else net)
    optimiser = build_optimiser(
        net,
        net.backbone,
        settings.optimiser,
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        head_lr=settings.head_lr,
    )
    average = None if settings.ema is None else Average(net, settings.ema, compiled=settings.compile)
    return frozen, optimiser, average


def open_data(settings: Settings, opened: Opened, out: Path) -> tuple[list[Clip], list[tuple[Clip, int]]]:
    """Return the checked clips to train and evaluate on, single images as clips of one.

    Without --data, synthetic images are written to out/scenes first. All frames of a clip are from one split.

    Raises:
        ValueError, OSError: files are missing or unusable, or nothing can be learned from their labels.
    """
    dataset = opened.dataset
    check_number(dataset.labels)
    root = data_root(settings, out)
    if settings.data is None:
        distributed.let_first_process(lambda: _write_scenes(settings, dataset, root))
    training = {split: dataset.find_pairs(root, split, True) for split in settings.train_split}
    evaluation = {split: dataset.find_pairs(root, split, True) for split in settings.val_split}
    length, frame_of = settings.clip, dataset.frame_of
    listed = [clip for pairs in training.values() for clip in training_clips(pairs, length, frame_of)]
    clips = [*dict.fromkeys(listed)]
    if len(clips) < len(listed):
        say(
            f"note: {len(listed) - len(clips)} {'images' if length == 1 else 'clips'} are in several of "
            f"{' '.join(training)}; each is trained on once"
        )
    images = {pair.image for clip in clips for pair in clip}
    twice = len({pair for clip in clips for pair in clip}) - len(images)
    if twice:
        say(f"note: {twice} images are trained on with two label files each, as {' '.join(training)} have them")
    counted = [clip for pairs in evaluation.values() for clip in evaluation_clips(pairs, length, frame_of)]
    to_train = [*dict.fromkeys(pair for clip in clips for pair in clip)]
    found = {pair for pairs in training.values() for pair in pairs}
    if len(to_train) < len(found):
        say(
            f"note: {len(found) - len(to_train)} of {len(found)} images for training are left out, because fewer than "
            f"{length} of them follow each other without a gap (--clip)"
        )
    if settings.check:
        to_evaluate = [pair for pairs in evaluation.values() for pair in pairs]
        both = [*clips, *(clip for clip, _ in counted)]
        check_data(
            root,
            to_train,
            to_evaluate,
            dataset.labels,
            reading_of(settings, dataset),
            settings.workers > 0,
            both,
            opened.facts,
        )
    else:
        say(UNCHECKED)
    return clips, counted


def data_root(settings: Settings, out: Path) -> Path:
    """Return the dataset's folder; that of the synthetic images of a run without --data."""
    return out / SCENES if settings.data is None else Path(settings.data)


def _write_scenes(settings: Settings, dataset: Dataset, root: Path) -> Generator[None, None, None]:
    """Write the synthetic images of a run without --data."""
    if dataset.write_synthetic is not None:
        train, val = settings.scenes
        say(f"no --data: writing synthetic images to {root}, {train} to train and {val} to evaluate on")
        root.parent.mkdir(parents=True, exist_ok=True)
        yield
        splits, (val_split, *_) = [*dict.fromkeys(settings.train_split)], settings.val_split
        shares = {split: len(range(index, train, len(splits))) for index, split in enumerate(splits)}
        dataset.write_synthetic(root, {val_split: val, **shares}, settings.scenes_size, settings.seed)


def reading_of(settings: Settings, dataset: Dataset) -> Reading:
    """Return how the files of a dataset are read.

    Raises:
        ValueError: a range of values for images whose values are taken as they are stored.
    """
    if dataset.images.raw and settings.value_range is not None:
        raise ValueError(
            f"--value-range must be left out for images of {dataset.images}, whose values are taken as they are stored,"
            " got {:g} {:g}".format(*settings.value_range)
        )
    return Reading(settings.exif, settings.value_range, settings.max_pixels, dataset.images)


def load_training(
    settings: Settings,
    dataset: Dataset,
    clips: list[Clip],
    normalise: Normalise,
    start: int,
    device: torch.device,
) -> Batches:
    """Return this process's training batches from iteration `start` on."""
    stream = TrainStream(
        clips,
        dataset.labels,
        settings.transform(normalise, dataset.exchange),
        settings.seed,
        settings.iterations * settings.batch,
        video=settings.clip > 1,
        reading=reading_of(settings, dataset),
    )
    rank, processes = distributed.rank(), distributed.world_size()
    order = StreamSampler(start, settings.iterations, settings.batch, rank, processes)
    return load_batches(stream, batches=order, workers=settings.workers, device=device)


def load_evaluation(
    clips: list[tuple[Clip, int]],
    dataset: Dataset,
    normalise: Normalise,
    settings: Settings,
    workers: int,
    device: torch.device,
) -> tuple[EvaluationSet, Batches]:
    """Return the evaluation set and this process's share of it."""
    val_set = EvaluationSet(
        clips,
        dataset.labels,
        EvaluationTransform(normalise),
        video=settings.clip > 1,
        reading=reading_of(settings, dataset),
    )
    # One image or clip a batch: a dataset's images may differ in size.
    share = [[index] for index in evaluation_indices(len(val_set), distributed.rank(), distributed.world_size())]
    return val_set, load_batches(val_set, batches=share, workers=workers, device=device, again=True)
