"""A training run: its records, checkpoints and evaluations between two steps, and its final report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ccgpu.models.attention import GatedAttention
from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint_keys import RUN_FORMAT, RunCheckpoint
from ccgpu.models.normalisation import Normalise
from ccgpu.models.precision import Precision
from ccgpu.models.prediction import Prediction
from ccgpu.models.weights import write_atomically
from ccgpu.train import engine
from ccgpu.train.data.samples import EvaluationSet
from ccgpu.train.dataset import Dataset
from ccgpu.train.distributed import bar_interval, is_main, say
from ccgpu.train.metrics import SCORES, ConfusionMatrix, results_table, scores_line
from ccgpu.train.optimisation.averaging import Average
from ccgpu.train.runs import checkpoints, records
from ccgpu.train.runs.boards import TENSORBOARD, Board
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.runs.scores import Scores
from ccgpu.train.visualise import attention_overlay, side_by_side

SHOWN = 4  # number of evaluation images that are drawn beside truth and prediction
RESULTS = "results.txt"
# Pixels of the first evaluation image whose attention maps the boards get at each evaluation, as shares (y, x).
WATCHED = ((1 / 2, 1 / 2), (3 / 4, 1 / 4), (1 / 4, 3 / 4))


@dataclass
class TrainingRun:
    """Network, optimiser, evaluation images and folder of a run; the methods write the files of the run folder.

    Attributes:
        out: the run folder.
        dataset: classes, colours and official scores.
        settings: all settings by name, for checkpoints.
        lengths: iterations of the run as it began and after each --extend, for checkpoints.
        scores: the first official score of each evaluation so far, in all processes.
        data_digest: digest of the training images' names, for checkpoints.
        folder: for a folder of images and masks what it was taken for, for checkpoints; None for other datasets.
        class_weights: the weights of the classes in the loss, for checkpoints; None where all weigh the same.
        batch: images or clips per step, over all processes; gives the position in the stream of samples.
        precision: device, autocast dtype and memory format.
        net: the network itself, not its wrapper for several processes.
        frozen: the modules of the network that training leaves as they are.
        optimiser: the optimiser, saved in checkpoints.
        scaler: the gradient scaler, saved in checkpoints.
        average: the average of the weights, saved in checkpoints; None for a run without --ema.
        val_set: the evaluation images.
        val_loader: loader of this process's share of the evaluation images.
        normalise: image -> network input, and back for drawing.
        predict: network input -> class scores.
        boards: where curves and pictures are watched; empty in all processes but the first.
        interrupts: whether to stop; called between two images of an evaluation.
    """

    out: Path
    dataset: Dataset
    settings: Mapping[str, Any]
    lengths: Sequence[int]
    scores: Scores
    data_digest: str
    folder: Mapping[str, Any] | None
    class_weights: tuple[float, ...] | None
    batch: int
    precision: Precision
    net: CCNet
    frozen: Sequence[nn.Module]
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average[CCNet] | None
    val_set: EvaluationSet
    val_loader: DataLoader[dict[str, Any]]
    normalise: Normalise
    predict: Prediction
    boards: Sequence[Board]
    interrupts: DeferredInterrupts

    @property
    def evaluated(self) -> CCNet:
        """The network that is evaluated: the averaged one of a run with --ema, else the trained one itself."""
        return self.net if self.average is None else self.average.net

    def record(self, step: engine.Step, images_per_second: float) -> None:
        """Write losses, learning rate, the attention's gamma and speed of a step to metrics.jsonl and the boards."""
        if not is_main():
            return
        values = {
            "loss": step.loss,
            **step.parts,
            "lr": step.lr,
            **self._gamma(),
            "images_per_second": images_per_second,
        }
        line = {"kind": "training", "iteration": step.iteration, **values}
        records.append_record(self.out / records.METRICS, line)
        for board in self.boards:
            board.scalars(step.iteration, {f"training/{name}": value for name, value in values.items()})

    def _gamma(self) -> dict[str, float]:
        """Return gamma of the head's attention by its name; nothing for a head without."""
        attention = self.net.head.context if self.net.head.cca is None else self.net.head.cca
        return {"gamma": attention.gamma.item()} if isinstance(attention, GatedAttention) else {}

    def save(self, iteration: int) -> None:
        """Write a checkpoint after `iteration` steps, from which the run continues exactly."""
        for net in dict.fromkeys((self.net, self.evaluated)):
            checkpoints.check_finite(net, iteration)
        if not is_main():
            return
        value_range = self.settings["value_range"]
        content = RunCheckpoint(
            format=RUN_FORMAT,
            iteration=iteration,
            position=iteration * self.batch,
            dataset=self.dataset.name,
            network=self.net.config,
            labels=self.dataset.labels.as_plain(),
            prediction=self.predict.preparation(),
            value_range=None if value_range is None else list(value_range),
            images=self.dataset.images.as_plain(),
            settings=dict(self.settings),
            lengths=[*self.lengths],
            data=self.data_digest,
            folder=None if self.folder is None else dict(self.folder),
            class_weights=None if self.class_weights is None else [*self.class_weights],
            model=self.net.state_dict(),
            average=None if self.average is None else self.average.net.state_dict(),
            optimiser=self.optimiser.state_dict(),
            scaler=self.scaler.state_dict(),
            random=checkpoints.random_state(),
        )
        checkpoints.save_checkpoint(self.out, content)

    def evaluate(self, iteration: int) -> None:
        """Evaluate on all images; the first process draws some, chooses best.pt and records the scores.

        Unless `iteration` is 0, the folder's newest checkpoint is the one of this iteration.

        Raises:
            engine.Interrupted: the run was asked to stop; nothing is recorded then.
            checkpoints.CheckpointError: best.pt cannot be written; nothing is recorded then.
        """
        labels = self.dataset.labels
        bar = tqdm(
            self.val_loader,
            desc="evaluating",
            unit="image" if self.net.dims == 2 else "clip",
            leave=False,
            disable=not is_main(),
            delay=5.0,  # seconds; a short evaluation needs no bar
            mininterval=bar_interval(),
        )
        confusion = engine.evaluate(
            self.evaluated,
            bar,
            num_classes=labels.num_classes,
            precision=self.precision,
            predict=self.predict,
            interrupted=self.interrupts,
        )
        record = records.evaluation_record(iteration, confusion, labels.names)
        is_best = iteration > 0 and self.scores.add(iteration, record[self.dataset.scores[0]])
        if not is_main():
            return
        self._draw(iteration)
        scalars = {f"evaluation/{name}": record[name] for name in SCORES}
        scalars |= {f"iou/{name}": value for name, value in record["iou"].items()}
        for board in self.boards:
            board.scalars(iteration, {name: value for name, value in scalars.items() if value is not None})
        if is_best:
            checkpoints.keep_best(self.out)
        # The record comes last, because a resumed run considers an evaluation with a record complete.
        records.append_record(self.out / records.METRICS, record)
        say(f"iteration {iteration}: {scores_line(confusion, self.dataset.scores)}")

    def _draw(self, iteration: int) -> None:
        folder = self.out / "images"
        folder.mkdir(exist_ok=True)
        for index in range(min(SHOWN, len(self.val_set))):
            sample = self.val_set[index]
            with self.precision.autocast():
                scores = self.predict(self.evaluated, self.precision.images(sample["image"][None]))
            image, label, classes = sample["image"], sample["label"], scores[0].argmax(dim=0).cpu()
            if label.ndim == 3:  # a clip is shown by its last frame
                image, label, classes = image[:, -1], label[-1], classes[-1]
            labels, pixels = self.dataset.labels, self.dataset.images.display(self.normalise.values(image))
            sheet = side_by_side(pixels, label, classes, labels.colours, labels.names)
            path = folder / f"{sample['names'][-1]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)  # a name may have subfolders
            sheet.save(path)
            for board in self.boards:
                board.image(iteration, f"evaluation/{index}", np.asarray(sheet))
        if self.boards and self.net.head.cca is not None:
            height, width = self.val_set[0]["image"].shape[-2:]
            for down, across in WATCHED:
                at = int(down * height), int(across * width)
                overlay = self._attention_overlay(at)
                for board in self.boards:
                    board.image(iteration, f"attention/pixel_{at[0]}_{at[1]}", np.asarray(overlay))

    def report(self) -> None:
        """Print the last evaluation's table and the baselines, write results.txt, and say where the files are."""
        evaluations = [
            record for record in records.read_records(self.out / records.METRICS) if record["kind"] == "evaluation"
        ]
        names, scores = self.dataset.labels.names, self.dataset.scores
        confusion = records.confusion(evaluations[-1])
        lines = [results_table(confusion, names), "", f"trained network: {scores_line(confusion, scores)}"]
        if evaluations[0]["iteration"] == 0:
            lines.append(f"untrained network: {scores_line(records.confusion(evaluations[0]), scores)}")
            lines.append(f"everything is {names[0]}: {scores_line(one_class_baseline(confusion), scores)}")
        lines += self._choice()
        text = "\n".join(lines)
        write_atomically(self.out / RESULTS, text + "\n")
        say(f"\n{text}\n\nrun folder: {self.out} (results.txt, metrics.jsonl, settings.json, last.pt, best.pt)")
        say(f"images: {self.out / 'images'}")
        if self.net.head.cca is not None:
            height, width = self.val_set[0]["image"].shape[-2:]
            path = self.out / "images" / "attention.png"
            path.parent.mkdir(exist_ok=True)  # a finished run may be resumed without its images
            self._attention_overlay((height // 2, width // 2)).save(path)
            say(f"attention of the middle pixel: {path}")
        if (self.out / TENSORBOARD).exists():
            say(f"curves: tensorboard --logdir {self.out}")
        say(f"next: ccgpu predict photos/ --checkpoint {shlex.quote(str(self.out))} --out predicted")
        best = self.scores.best()
        if best is not None and best[0] != self.scores.values[-1][0] and (self.out / checkpoints.BEST).exists():
            file = shlex.quote(str(self.out / checkpoints.BEST))
            say(f"the best evaluated network: ccgpu predict photos/ --checkpoint {file} --out predicted")

    def _choice(self) -> list[str]:
        """Return which evaluation is the best, where there are several, and whether --patience ended the run."""
        lines, best = [], self.scores.best()
        name = SCORES[self.dataset.scores[0]][0]
        if best is not None and len(self.scores.values) > 1:
            kept = checkpoints.BEST if (self.out / checkpoints.BEST).exists() else "whose checkpoint is not kept"
            lines.append(f"best evaluation: iteration {best[0]}, {name} {100 * best[1]:.2f} % ({kept})")
        last, patience = self.scores.values[-1][0], self.settings["patience"]
        if last < self.settings["iterations"] and self.scores.stalled_at(last, patience):
            number = self.scores.since_best()
            lines.append(
                f"stopped after {last} of {self.settings['iterations']} iterations: {number} "
                f"evaluation{'s' * (number > 1)} in a row without a better {name} (--patience {patience}; --resume "
                "--patience 0 goes on)"
            )
        return lines

    def _attention_overlay(self, at: tuple[int, int]) -> Image.Image:
        """Return the first evaluation image under the attention map of its pixel (y, x), over all loops."""
        images = self.precision.images(self.val_set[0]["image"][None])
        frame = [images.shape[2] // 2] if images.ndim == 5 else []  # a clip is shown by its middle frame
        with self.precision.autocast():
            attention = self.evaluated.attention_map(images, at=(*frame, *at))[0]
        image = images[0].cpu()
        if frame:
            attention, image = attention[frame[0]], image[:, frame[0]]
        pixels, corners = self.dataset.images.display(self.normalise.values(image)), self.net.align_corners
        return attention_overlay(pixels, attention, at, align_corners=corners)


def one_class_baseline(confusion: ConfusionMatrix, prediction: int = 0) -> ConfusionMatrix:
    """Return the confusion matrix of predicting one class at every pixel of the images in `confusion`."""
    baseline = ConfusionMatrix(confusion.num_classes)
    baseline.matrix[:, prediction] = confusion.matrix.sum(dim=1)
    return baseline
