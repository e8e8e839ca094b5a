import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccgpu.train import ade20k, camvid, cityscapes, far_context, lip, voc
from ccgpu.train.data.cityscapes_labels import CITYSCAPES
from ccgpu.train.scenes import files
from tests.train.browser import browser  # noqa: F401  # for the tests of pages
from tests.train.narrow import narrow_backbone  # noqa: F401  # for all tests of this folder
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


@pytest.fixture(autouse=True, scope="session")
def _scenes_are_drawn_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copy the synthetic images of a command if the same were drawn before: the arguments determine them."""
    kept = tmp_path_factory.mktemp("scenes")

    def write(root: Path, splits: Mapping[str, int], size: tuple[int, int], seed: int, **options: Any) -> Path:
        key = f"{options['layout']} {sorted(splits.items())} {tuple(size)} {seed}"
        drawn = files.write_synthetic(kept / key, splits, size, seed, **options)
        if not Path(root).exists():
            shutil.copytree(drawn, root)
        return files.write_synthetic(root, splits, size, seed, **options)  # leaves the right images as they are

    with pytest.MonkeyPatch.context() as patch:
        for module in (ade20k, camvid, cityscapes, far_context, lip, voc):
            patch.setattr(module, "write_synthetic", write)
        yield


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
