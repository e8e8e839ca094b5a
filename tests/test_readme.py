"""Every Python block of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    # Blocks may build on those before them, as a reader's session does.
    exec(compile("import torch\n" + "\n".join(BLOCKS[: number + 1]), f"README block {number}", "exec"), {})


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
