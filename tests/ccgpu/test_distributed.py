"""`ccgpu.distributed.cca` on two, three and four gloo processes, which `tests/ccgpu/ranks.py` runs."""

import signal
from pathlib import Path

import pytest
import torch

import ccgpu
from benchmarks.sharded import sent_bytes
from tests.ccgpu.problems import Problem, attend_plainly, check_errors, expected, row_of
from tests.ccgpu.ranks import CASES, MISTAKES, RANKS, SILENCE, problem_of
from tests.processes import run_ranks

WAIT = 60  # most seconds, on a busy machine, from the death of a rank to the errors of the others


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what every rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    for rank, (status, errors) in enumerate(run_ranks("tests.ccgpu.ranks", RANKS, str(folder))):
        assert status == (-signal.SIGKILL if rank == RANKS - 1 else 0), errors
    return folder


@pytest.fixture(scope="module")
def saved(folder):
    """What the ranks saved, rank by rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name, case in CASES.items() for ranks in case.extents])
def test_shards_are_those_of_one_device(saved, name, ranks):
    case, problem = CASES[name], Problem(*problem_of(CASES[name]))
    axis = case.dim % (len(case.sizes) + 2)
    shards = zip(*(saved[rank]["cases"][name, ranks] for rank in range(ranks)), strict=True)
    ours = [torch.cat(x, axis - (number == 1)) for number, x in enumerate(shards)]  # lse has no channels
    assert [x.shape for x in ours[2:]] == [x.shape for x in problem.tensors]
    row = row_of(problem, f"distributed, {case.backend or 'kernels'}")
    check_errors(ours, attend_plainly(problem), expected(problem), problem, row=row)


def test_infinities_and_nan_reach_the_same_positions_as_on_one_device(saved):
    whole = saved[0]["infinite"][1]
    for result in (0, 1):
        ours = torch.cat([x["infinite"][0][result] for x in saved], 2 - result)
        assert not ours.isfinite().all()
        torch.testing.assert_close(ours, whole[result], equal_nan=True)


def test_gradients_of_some_inputs_are_those_of_all(saved):
    for rank in saved:
        everything = rank["subsets"][1, 1, 1]
        for needs, gradients in rank["subsets"].items():
            wanted = [x for x, need in zip(everything, needs, strict=True) if need]
            assert len(wanted) == len(gradients)
            assert all(torch.equal(a, b) for a, b in zip(wanted, gradients, strict=True))


def test_autocast_computes_in_its_dtype(saved):
    for rank in saved:
        lowered, plain = rank["modes"]["autocast"]
        assert lowered.dtype == torch.bfloat16
        assert torch.equal(lowered, plain)


def test_checkpointed_gradients_are_equal(saved):
    for rank in saved:
        first, again = rank["modes"]["checkpoint"]
        assert torch.equal(first, again)


def test_what_is_not_differentiated_says_so(saved):
    for rank in saved:
        assert "RuntimeError: distributed.cca: derivatives must be first ones" in rank["modes"]["second"]
        assert "got a transform of torch.func" in rank["modes"]["func"]


def test_standard_operators_are_refused(saved):
    for rank in saved:
        assert "RuntimeError: distributed.cca: maps must be whole" in rank["modes"]["decomposed"]


FACTS = {"depth": "D", "width": "the first local size", "rank": "the number of axes", "requires_grad": "requires_grad"}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_on_one_rank_is_an_error_on_all(saved, name):
    errors = [rank["modes"]["mistakes"][name] for rank in saved]
    own = {
        "keys on one rank": "ValueError: distributed.cca: k must have q's shape",
        "no tensor on one rank": "TypeError: distributed.cca: q must be a torch.Tensor",
        "no backend on one rank": "RuntimeError: distributed.cca: backend='reference' cannot run this call",
    }
    if name == "batch axis":  # on all ranks
        assert all(error.startswith("ValueError: distributed.cca: dim must be a spatial axis") for error in errors)
    elif name in own:
        assert errors[1].startswith(own[name])
        others = errors[:1] + errors[2:]
        assert all("every rank must make a valid call, got an error on rank 1" in error for error in others)
    else:
        assert errors[0].startswith(f"ValueError: distributed.cca: {FACTS.get(name, name)}")
        assert "on rank 0" in errors[0]
        assert "on rank 1" in errors[0]
        assert errors == errors[:1] * RANKS


def test_the_group_works_after_mistakes(saved):
    for rank in saved:
        assert torch.equal(rank["modes"]["before"], rank["modes"]["afterwards"])


def test_a_rank_outside_of_the_group_is_told(saved):
    assert "group must hold this process, rank 3" in saved[3]["outside"][0]


def test_a_process_without_a_group_is_told():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"distributed\.cca: group must be a process group, got none"):
        ccgpu.distributed.cca(q, q, q)


def test_a_rank_that_dies_ends_the_others(folder):
    for rank in range(RANKS - 1):
        error, seconds = torch.load(folder / f"ends-{rank}.pt")["dead"]
        assert error.startswith("RuntimeError: distributed.cca: all ranks of the group must answer")
        assert "\n" not in error
        assert seconds < WAIT


def test_a_silent_rank_ends_the_others_after_the_timeout(folder):
    error, seconds = torch.load(folder / "ends-0.pt")["silent"]
    assert "silent for the group's timeout" in error
    assert SILENCE <= seconds < SILENCE + WAIT


@pytest.mark.parametrize("name", ["uneven", "frames", "bfloat16"])
def test_ranks_send_the_bytes_that_are_stated(saved, name):
    case = CASES[name]
    axis = case.dim % (len(case.sizes) + 2) - 2
    others = [size for a, size in enumerate(case.sizes) if a != axis]
    lines = case.batch * torch.Size(others).numel()
    wide = 8 if case.dtype == torch.float64 else 4
    for rank, values in enumerate(saved):
        sizes = (case.extents[RANKS], lines, rank, case.depth, case.channels, case.dtype.itemsize, wide)
        assert values["traffic"][name] == sent_bytes(*sizes)


def test_equal_shards_send_what_the_documentation_says():
    d, c, n, ranks = 4, 32, 64 * 48, 4
    forward, backward = sent_bytes([16] * ranks, 48, 0, d, c, 1, 1)
    assert forward == n / ranks * (1 - 1 / ranks) * (2 * d + 2 * c + 1)
    assert backward == n / ranks * (1 - 1 / ranks) * (4 * d + 3 * c + 2)
