"""Files in the published layouts, for the tests of layouts and of checkpoints."""

from __future__ import annotations

import pytest

from tests.models.published_files import State, authors_file, mmsegmentation_file
from tests.train.narrow import narrow_backbone  # noqa: F401  # of tests.train.networks


@pytest.fixture(scope="module")
def authors() -> State:
    return authors_file(50)


@pytest.fixture(scope="module")
def mmsegmentation() -> State:
    return mmsegmentation_file(50)
