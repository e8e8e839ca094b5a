from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.train import camvid
from ccgpu.train.data.cityscapes_labels import CITYSCAPES
from tests.train.training import run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in the Cityscapes layout: 9 + 3 images of 64x128 pixels, noisy blocks of class colours."""
    root = tmp_path_factory.mktemp("tiny_data")
    for split, number in (("train", 9), ("val", 3)):
        for index in range(number):
            generator = np.random.default_rng((number, index))
            classes = np.kron(generator.integers(0, 19, (4, 8)), np.ones((16, 16), dtype=np.int64))
            ids = CITYSCAPES.to_file[classes]
            ids[: 4 * index] = 0  # unlabelled, another share in each image
            noise = generator.integers(0, 50, (64, 128, 1))
            image = (CITYSCAPES.colours[classes] * 0.8 + noise).astype(np.uint8)
            for kind, pixels, ending in (
                ("leftImg8bit", image, "leftImg8bit"),
                ("gtFine", ids, "gtFine_labelIds"),
            ):
                folder = root / kind / split / "town"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"town_{index:06d}_000019_{ending}.png")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run of train.camvid without attention; tests leave it as it is."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(camvid, out, "--context", "none")
    return out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: images of a few pixels gain nothing from more, which wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
