"""Which crops are taken: counted by hand."""

import numpy as np
import pytest

from ccgpu.train.data.augmentation.crops import is_mixed


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ({0: 75, 1: 25}, 0.75, False),  # the share is reached
        ({0: 74, 1: 26}, 0.75, True),
        ({0: 74, 1: 26, 255: 10000}, 0.75, True),  # void does not count
        ({0: 76, 255: 24}, 0.99, False),  # one class
        ({255: 100}, 0.5, False),
        ({0: 50, 254: 50}, 0.5, False),  # a tie, and the last class
        ({0: 50, 254: 50}, 0.51, True),
        ({3: 40, 4: 30, 5: 30}, 0.41, True),
    ],
)
def test_shares_of_classes(counts: dict[int, int], most: float, expected: bool) -> None:
    label = np.repeat(np.array([*counts], np.uint8), [*counts.values()])
    assert is_mixed(np.random.default_rng(0).permutation(label)[None], most) is expected
