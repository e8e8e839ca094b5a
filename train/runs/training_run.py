"""A training run: its records, checkpoints and evaluations between two steps, and its final report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from ccgpu.models.ccnet import CCNet
from ccgpu.models.checkpoint_keys import RUN_FORMAT, RunCheckpoint
from ccgpu.models.normalisation import Normalise
from ccgpu.models.prediction import Prediction
from ccgpu.models.weights import write_atomically
from ccgpu.train import engine
from ccgpu.train.data.samples import EvaluationSet
from ccgpu.train.dataset import Dataset
from ccgpu.train.distributed import bar_interval, is_main, say
from ccgpu.train.metrics import ConfusionMatrix, results_table, scores_line
from ccgpu.train.runs import checkpoints, records
from ccgpu.train.runs.interrupts import DeferredInterrupts
from ccgpu.train.visualise import attention_overlay, side_by_side

SHOWN = 4  # number of evaluation images that are drawn beside truth and prediction
RESULTS = "results.txt"


@dataclass
class TrainingRun:
    """Network, optimiser, evaluation images and folder of a run; the methods write the files of the run folder.

    Attributes:
        out: the run folder.
        dataset: classes, colours and official scores.
        settings: all settings by name, for checkpoints.
        data_digest: digest of the training images' names, for checkpoints.
        batch: images or clips per step, over all processes; gives the position in the stream of samples.
        precision: device, autocast dtype and memory format.
        net: the network itself, not its wrapper for several processes.
        optimiser: the optimiser, saved in checkpoints.
        scaler: the gradient scaler, saved in checkpoints.
        val_set: the evaluation images.
        val_loader: loader of this process's share of the evaluation images.
        normalise: image -> network input, and back for drawing.
        predict: network input -> class scores.
        board: TensorBoard files.
        interrupts: whether to stop; called between two images of an evaluation.
    """

    out: Path
    dataset: Dataset
    settings: Mapping[str, Any]
    data_digest: str
    batch: int
    precision: engine.Precision
    net: CCNet
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    val_set: EvaluationSet
    val_loader: DataLoader[dict[str, Any]]
    normalise: Normalise
    predict: Prediction
    board: records.Board
    interrupts: DeferredInterrupts

    def record(self, step: engine.Step, images_per_second: float) -> None:
        """Write losses, learning rate and speed of a step to metrics.jsonl and TensorBoard."""
        if not is_main():
            return
        values = {
            "loss": step.loss,
            **step.parts,
            "lr": step.lr,
            "images_per_second": images_per_second,
        }
        line = {"kind": "training", "iteration": step.iteration, **values}
        records.append_record(self.out / records.METRICS, line)
        self.board.scalars(step.iteration, {f"training/{name}": value for name, value in values.items()})

    def save(self, iteration: int) -> None:
        """Write a checkpoint after `iteration` steps, from which the run continues exactly."""
        checkpoints.check_finite(self.net, iteration)
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
            data=self.data_digest,
            model=self.net.state_dict(),
            optimiser=self.optimiser.state_dict(),
            scaler=self.scaler.state_dict(),
            random=checkpoints.random_state(),
        )
        checkpoints.save_checkpoint(self.out, content)

    def evaluate(self, iteration: int) -> None:
        """Evaluate on all images; the first process draws some and records the scores.

        Raises:
            engine.Interrupted: the run was asked to stop; nothing is recorded then.
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
            self.net,
            bar,
            num_classes=labels.num_classes,
            precision=self.precision,
            predict=self.predict,
            interrupted=self.interrupts,
        )
        if not is_main():
            return
        self._draw(iteration)
        record = records.evaluation_record(iteration, confusion, labels.names)
        scalars = {f"evaluation/{name}": record[name] for name in self.dataset.scores}
        scalars |= {f"iou/{name}": value for name, value in record["iou"].items()}
        self.board.scalars(iteration, scalars)
        # The record comes last, because a resumed run considers an evaluation with a record complete.
        records.append_record(self.out / records.METRICS, record)
        say(f"iteration {iteration}: {scores_line(confusion, self.dataset.scores)}")

    def _draw(self, iteration: int) -> None:
        folder = self.out / "images"
        folder.mkdir(exist_ok=True)
        for index in range(min(SHOWN, len(self.val_set))):
            sample = self.val_set[index]
            with self.precision.autocast():
                scores = self.predict(self.net, self.precision.images(sample["image"][None]))
            image, label, classes = sample["image"], sample["label"], scores[0].argmax(dim=0).cpu()
            if label.ndim == 3:  # a clip is shown by its last frame
                image, label, classes = image[:, -1], label[-1], classes[-1]
            sheet = side_by_side(self.normalise.denormalise(image), label, classes, self.dataset.labels.colours)
            sheet.save(folder / f"{sample['names'][-1]}.png")
            self.board.image(iteration, f"evaluation/{index}", np.asarray(sheet))

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
        text = "\n".join(lines)
        write_atomically(self.out / RESULTS, text + "\n")
        say(f"\n{text}\n\nrun folder: {self.out} (results.txt, metrics.jsonl, settings.json, last.pt)")
        say(f"images: {self.out / 'images'}")
        if self.net.head.cca is not None:
            say(f"attention of the middle pixel: {self._draw_attention()}")
        if (self.out / "tensorboard").exists():
            say(f"curves: tensorboard --logdir {self.out}")

    def _draw_attention(self) -> Path:
        images = self.precision.images(self.val_set[0]["image"][None])
        *frame, y, x = (side // 2 for side in images.shape[2:])
        with self.precision.autocast():
            attention = self.net.attention_map(images, at=(*frame, y, x))[0]
        image = images[0].cpu()
        if attention.ndim == 3:  # a clip's map is shown by its middle frame
            attention, image = attention[frame[0]], image[:, frame[0]]
        path = self.out / "images" / "attention.png"
        path.parent.mkdir(exist_ok=True)  # a finished run may be resumed without its images
        pixels, corners = self.normalise.denormalise(image), self.net.align_corners
        overlay: Image.Image = attention_overlay(pixels, attention, (y, x), align_corners=corners)
        overlay.save(path)
        return path


def one_class_baseline(confusion: ConfusionMatrix, prediction: int = 0) -> ConfusionMatrix:
    """Return the confusion matrix of predicting one class at every pixel of the images in `confusion`."""
    baseline = ConfusionMatrix(confusion.num_classes)
    baseline.matrix[:, prediction] = confusion.matrix.sum(dim=1)
    return baseline
