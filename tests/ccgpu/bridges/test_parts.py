"""Every backend computes the parts of a criss-cross, from which `ccgpu.distributed.cca` puts it together."""

import pytest
import torch

from ccgpu.dispatch import choose
from tests.ccgpu.parts import attend_in_parts
from tests.ccgpu.problems import attend_plainly, cells, check_errors, expected, problems, row_of, try_examples


def check(backend, problem):
    bridge = choose(problem.tensors[0], backend, problem.tensors[2], whole=False).module
    ours = attend_in_parts(problem, bridge)
    check_errors(ours, attend_plainly(problem), expected(problem), problem, row=row_of(problem, f"{backend}, in parts"))


# Lines alone are a part of nothing; `torch` is `cpu` by another name.
PARTS = [cell for cell in cells() if cell.values[0] not in ("reference", "torch") and cell.values[2] > 1]


@pytest.mark.parametrize(("backend", "dtype", "rank"), PARTS)
def test_parts_merge_into_the_whole(backend, dtype, rank):
    try_examples(check, problems, backend, dtype, rank, examples=5)


def test_the_reference_says_that_it_computes_no_parts():
    q = torch.zeros(1, 1, 2)
    with pytest.raises(RuntimeError, match="cannot run this call: it computes whole criss-crosses"):
        choose(q, "reference", q, whole=False)
