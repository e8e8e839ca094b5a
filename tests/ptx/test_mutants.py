"""Mistakes planted in the kernels' PTX: each must be reported by the machine, or give results that are plainly wrong.

A mistake that only some orders of blocks and warps show must show within a few seeds.
"""

import functools

import pytest

from benchmarks import nvrtc
from ccgpu.bridges.cupy_cuda.attention import Kernels
from tests.kernels.cuda.test_kernels import DTYPE, random_problem
from tests.ptx.memory import Fault
from tests.ptx.parse import Immediate, Vector
from tests.ptx.problems import arithmetic_of, launcher

try:
    nvrtc.version()
except nvrtc.NotInstalled as reason:
    pytest.skip(f"needs NVRTC: {reason}", allow_module_level=True)

pytestmark = [pytest.mark.nvrtc, pytest.mark.timeout(900)]
SEEDS = 3
WRONG = 0.05  # error in proportion to the largest result that no rounding explains
KERNELS = ("forward", "backward")


TILES = (2,)  # of a block, which then has two warps
TWO_PHASES, THREE_PHASES = 33, 65  # positions of a line; only with three is one neither the first nor the last


def results(kernel, arithmetic, change=None, seed=0, lockstep=True, length=TWO_PHASES):
    """Return out and lse, or dq, dk, dv, of the changed kernel, and the PTX lines that were reached.

    The map is a line in segments, whose items wait for each other, with several chunks of channels.
    """
    x = random_problem(DTYPE[arithmetic], 1, (length,), 16, 192)
    saved = right("forward", arithmetic, length)[0] if kernel == "backward" else None
    on = launcher(90, 0, change=change, seed=seed, lockstep=lockstep)
    with arithmetic_of(arithmetic, TILES):
        if kernel == "forward":
            found = Kernels(on).forward(*x.tensors, x.scale)
        else:
            found = Kernels(on).backward(x.dout, *x.tensors, *saved, x.dlse, x.scale)
    return found, frozenset().union(*(counts.lines for counts in on.counts))


@functools.cache
def right(kernel, arithmetic, length=TWO_PHASES):
    return results(kernel, arithmetic, length=length)


def noticed(kernel, arithmetic, change, seeds=1, length=TWO_PHASES):
    """Return how a mistake shows: the machine's message or the largest error; None if it does not."""
    for seed in range(seeds):
        try:
            wrong, _ = results(kernel, arithmetic, change, seed, seeds == 1, length)
        except Fault as fault:
            return str(fault)
        for a, b in zip(wrong, right(kernel, arithmetic, length)[0], strict=True):
            error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
            if not error < WRONG:
                return error
    return None


def places(kernel, arithmetic, wanted, length=TWO_PHASES):
    """Return the lines of the instructions that `wanted` picks, of those that are reached."""
    found = []

    def look(ptx):
        found.extend(i.line for i in ptx.instructions if wanted(i))
        return ptx

    _, reached = results(kernel, arithmetic, look, length=length)
    return sorted(reached.intersection(found))


def places_in_middle_phase(kernel, arithmetic, wanted):
    """Return the lines of those instructions that only a phase between the first and the last reaches."""
    others = places(kernel, arithmetic, wanted)
    return sorted(set(places(kernel, arithmetic, wanted, THREE_PHASES)).difference(others))


def changing(wanted, change):
    """Return a change of a kernel: of every instruction that `wanted` picks."""

    def changed(ptx):
        return ptx._replace(instructions=tuple(change(i) if wanted(i) else i for i in ptx.instructions))

    return changed


def exchanged(instruction, a, b):
    operands = list(instruction.operands)
    operands[a], operands[b] = operands[b], operands[a]
    return instruction._replace(operands=tuple(operands))


def exchanged_registers(instruction, operand, a, b):
    operands = list(instruction.operands)
    registers = list(operands[operand].elements)
    registers[a], registers[b] = registers[b], registers[a]
    operands[operand] = Vector(tuple(registers))
    return instruction._replace(operands=tuple(operands))


def nothing(instruction):
    return instruction._replace(parts=("prefetch",), operands=(), guard=None, text=f"(removed) {instruction.text}")


def moved(instruction, operand, distance):
    operands = list(instruction.operands)
    operands[operand] = operands[operand]._replace(offset=operands[operand].offset + distance)
    return instruction._replace(operands=tuple(operands))


def weaker(instruction):
    """Wait for one group less."""
    return instruction._replace(operands=(Immediate(instruction.operands[0].value + 1),))


def opcode(*words):
    return lambda instruction: instruction.parts[: len(words)] == words


def is_transposed(instruction):
    return instruction.parts[0] == "ldmatrix" and "trans" in instruction.parts


def without_trans(instruction):
    return instruction._replace(parts=tuple(word for word in instruction.parts if word != "trans"))


WRONG_VALUES = {
    "exchanged halves of a pair": (opcode("cvt", "rn", "bf16x2"), lambda i: exchanged(i, 1, 2)),
    "exchanged registers of A": (opcode("mma"), lambda i: exchanged_registers(i, 1, 1, 2)),
    "exchanged registers of B": (opcode("mma"), lambda i: exchanged_registers(i, 2, 0, 1)),
    "exchanged registers of C": (opcode("mma"), lambda i: exchanged_registers(i, 3, 0, 2)),
    "no .trans": (is_transposed, without_trans),
}
WRONG_ACCESSES = {
    "a store out of bounds": (opcode("st", "global"), lambda i: moved(i, 0, 1 << 14), "out of bounds"),
    "a copy from out of bounds": (opcode("cp", "async", "cg"), lambda i: moved(i, 1, 1 << 14), "out of bounds"),
    "a misaligned store": (opcode("st", "global"), lambda i: moved(i, 0, 2), "not aligned"),
    "a missing copy": (opcode("cp", "async", "cg"), nothing, "nothing has been written"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32"])
def test_without_a_change_nothing_is_wrong(kernel, arithmetic):
    assert noticed(kernel, arithmetic, lambda ptx: ptx, seeds=3) is None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mistake", WRONG_VALUES)
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32"])
def test_wrong_operands_give_wrong_results(kernel, arithmetic, mistake):
    wanted, change = WRONG_VALUES[mistake]
    if not places(kernel, arithmetic, wanted):
        assert arithmetic == "tf32"  # which has no pairs, and loads its operands without .trans
        pytest.skip("no such instruction")
    assert noticed(kernel, arithmetic, changing(wanted, change)) is not None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mistake", WRONG_ACCESSES)
def test_wrong_accesses_are_reported(kernel, mistake):
    wanted, change, reason = WRONG_ACCESSES[mistake]
    assert places(kernel, "bf16", wanted)
    assert reason in str(noticed(kernel, "bf16", changing(wanted, change)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32"])
def test_every_weakened_wait_for_copies_is_reported(kernel, arithmetic):
    lines = places(kernel, arithmetic, opcode("cp", "async", "wait_group"))
    assert lines
    for line in lines:
        change = changing(lambda i, at=line: i.line == at, weaker)
        assert "an asynchronous copy may still be writing" in str(noticed(kernel, arithmetic, change)), line


MIDDLE_PHASE = {
    "exchanged registers of A": (opcode("mma"), lambda i: exchanged_registers(i, 1, 1, 2)),
    "exchanged registers of a store": (opcode("st", "global"), lambda i: exchanged_registers(i, 1, 0, 1)),
    "a weakened wait": (opcode("cp", "async", "wait_group"), weaker),
    "a missing barrier": (opcode("barrier", "sync"), nothing),
    "a missing copy": (opcode("cp", "async", "cg"), nothing),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mistake", MIDDLE_PHASE)
def test_mistakes_in_a_middle_phase_show(kernel, mistake):
    """The loop of phases that are neither the first nor the last is code of its own."""
    wanted, change = MIDDLE_PHASE[mistake]
    lines = places_in_middle_phase(kernel, "bf16", wanted)
    assert lines
    seeds = SEEDS if mistake == "a missing barrier" else 1
    assert noticed(kernel, "bf16", changing(lambda i: i.line in lines, change), seeds, THREE_PHASES) is not None


@pytest.mark.parametrize("kernel", KERNELS)
def test_weakened_wait_for_other_blocks_shows(kernel):
    """The block goes on when one item of its image is done, instead of all of the earlier phases."""
    after = places(kernel, "bf16", lambda i: i.parts[0] == "ld" and bool({"acquire", "volatile"} & set(i.parts)))
    assert after

    def change(ptx):
        instructions, waiting = [], False
        for instruction in ptx.instructions:
            waiting |= instruction.line in after
            if waiting and instruction.parts[0] == "setp":
                operands = (*instruction.operands[:2], Immediate(1))
                instruction, waiting = instruction._replace(operands=operands), False
            instructions.append(instruction)
        return ptx._replace(instructions=tuple(instructions))

    assert noticed(kernel, "bf16", change, SEEDS) is not None


@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_barriers_show(kernel):
    """But for one in each kernel that so small a block does not need.

    In forward it keeps results from the place of q, which bf16 has in registers by then; in backward it comes after the
    wait for other blocks, and only the warp that waits reads what they have written before the next barrier.
    """
    lines = places(kernel, "bf16", opcode("barrier", "sync"))
    unnoticed = [
        line
        for line in lines
        if noticed(kernel, "bf16", changing(lambda i, at=line: i.line == at, nothing), SEEDS) is None
    ]
    assert len(lines) > 4
    assert len(unnoticed) <= 1


def test_a_mistake_is_reported_with_the_kernel_the_block_and_the_line():
    message = noticed("forward", "bf16", changing(opcode("st", "global"), lambda i: moved(i, 0, 1 << 14)))
    assert message.startswith("cca_forward_bf16_")
    assert "block " in message
    assert "PTX line " in message
    assert "st.global" in message
