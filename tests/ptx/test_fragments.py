"""Instructions of a whole warp against NumPy: the fragments of mma, ldmatrix, stmatrix, and the modes of shfl.

The places of elements are written out here lane by lane, from the formulas of the PTX ISA ("Matrix Fragments for
mma.m16n8k16 with floating point type", "Matrix Fragments for mma.m16n8k8", "ldmatrix", "stmatrix", "shfl.sync").
"""

import numpy as np
import pytest
import torch

from tests.ptx.memory import Fault
from tests.ptx.single import execute

pytestmark = pytest.mark.nvrtc
LANES = range(32)


def bits16(x, dtype):
    """Return the bits of values as bfloat16 or float16."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


def place(name, i, lane):
    """Return row and column of element i of a lane in A, B (16-bit elements), A8, B8 (tf32) and C."""
    group, thread = lane >> 2, lane % 4
    if name == "A":
        row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (0 if i < 4 else 8)
    if name == "B":
        return thread * 2 + (i & 1) + (0 if i < 2 else 8), group
    if name == "A8":
        return group if i in (0, 2) else group + 8, thread if i in (0, 1) else thread + 4
    if name == "B8":
        return thread if i == 0 else thread + 4, group
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def fragment(name, matrix, number):
    """Return (element, lane) of a matrix."""
    return np.array([[matrix[place(name, i, lane)] for lane in LANES] for i in range(number)])


def paired(elements):
    """Return registers (register, lane) of 16-bit elements, the first in the low half."""
    wide = elements.astype(np.uint32)
    return wide[0::2] | wide[1::2] << 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_of_16_bits(dtype):
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((16, 16)), generator.standard_normal((16, 8))
    a_bits, b_bits = (bits16(x, dtype) for x in (a, b))
    registers = [*paired(fragment("A", a_bits, 8)), *paired(fragment("B", b_bits, 4))]
    add = generator.standard_normal((16, 8)).astype(np.float32)
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    memory = np.ascontiguousarray(np.stack([*registers, *fragment("C", add, 4).view(np.uint32)], 1))
    body = f"""ld.param.u64 %w0, [all];
    mul.wide.u32 %w1, %thread, 40;
    add.s64 %w0, %w0, %w1;
    ld.global.v2.u32 {{%t0, %t1}}, [%w0];
    ld.global.v2.u32 {{%t2, %t3}}, [%w0+8];
    ld.global.v2.u32 {{%t4, %t5}}, [%w0+16];
    ld.global.v2.u32 {{%d0, %d1}}, [%w0+24];
    ld.global.v2.u32 {{%d2, %d3}}, [%w0+32];
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
      {{%d0, %d1, %d2, %d3}}, {{%t0, %t1, %t2, %t3}}, {{%t4, %t5}}, {{%d0, %d1, %d2, %d3}};"""
    found = np.stack(execute(body, [], ["f32"] * 4, memory=[("all", memory, False)]))
    rounded = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    expected = np.matmul(*rounded) + add
    np.testing.assert_allclose(found, fragment("C", expected, 4), rtol=1e-6, atol=1e-6)


def test_mma_of_tf32():
    generator = np.random.default_rng(2)
    a, b = (
        generator.integers(-1000, 1000, shape).astype(np.float32) / 8 for shape in ((16, 8), (8, 8))
    )  # exact in TF32
    add = generator.standard_normal((16, 8)).astype(np.float32)
    rows = [fragment("A8", a, 4), fragment("B8", b, 2), fragment("C", add, 4)]
    memory = np.ascontiguousarray(np.concatenate(rows).astype(np.float32).T)
    body = """ld.param.u64 %w0, [all];
    mul.wide.u32 %w1, %thread, 40;
    add.s64 %w0, %w0, %w1;
    ld.global.v2.u32 {%t0, %t1}, [%w0];
    ld.global.v2.u32 {%t2, %t3}, [%w0+8];
    ld.global.v2.u32 {%t4, %t5}, [%w0+16];
    ld.global.v2.u32 {%d0, %d1}, [%w0+24];
    ld.global.v2.u32 {%d2, %d3}, [%w0+32];
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
      {%d0, %d1, %d2, %d3}, {%t0, %t1, %t2, %t3}, {%t4, %t5}, {%d0, %d1, %d2, %d3};"""
    found = np.stack(execute(body, [], ["f32"] * 4, memory=[("all", memory, False)]))
    expected = a.astype(np.float64) @ b.astype(np.float64) + add
    np.testing.assert_allclose(found, fragment("C", expected, 4), rtol=1e-6)
    memory[3, 1] = np.float32(1 + 2.0**-20)
    with pytest.raises(Fault, match="rounded"):
        execute(body, [], ["f32"] * 4, memory=[("all", memory, False)])


# Every thread writes 16 bytes of its input to its row of shared memory, 48 bytes apart.
ROWS = """mul.lo.u32 %t0, %thread, 48;
mov.u32 %t1, memory;
add.u32 %t0, %t0, %t1;
st.shared.v4.u32 [%t0], {%a, %b, %c, %e};
bar.sync 0;
"""


def row_words():
    """Return 32 rows of 8 different 16-bit elements, and their words as inputs."""
    elements = np.arange(256, dtype=np.uint16).reshape(32, 8) * 257
    words = elements.view(np.uint32)
    return elements.reshape(4, 8, 8), [("u32", words[:, i]) for i in range(4)]


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(number, transposed):
    """Lane l gets elements 2 (l % 4) and the next one of row l / 4 of each matrix, or of its transpose."""
    matrices, inputs = row_words()
    trans = ".trans" if transposed else ""
    names = ", ".join(f"%d{i}" for i in range(number))
    body = ROWS + f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{names}}}, [%t0];"
    found = execute(body, inputs, ["u32"] * number, shared_bytes=32 * 48)
    for register, matrix in zip(found, matrices, strict=False):
        for lane in LANES:
            row, column = lane // 4, 2 * (lane % 4)
            pair = (
                [matrix[column, row], matrix[column + 1, row]]
                if transposed
                else [matrix[row, column], matrix[row, column + 1]]
            )
            assert register[lane] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(number, transposed):
    matrices, _ = row_words()
    registers = [
        ("u32", [int(m[lane // 4, 2 * (lane % 4)]) | int(m[lane // 4, 2 * (lane % 4) + 1]) << 16 for lane in LANES])
        for m in matrices[:number]
    ]
    trans = ".trans" if transposed else ""
    names = ", ".join(f"%{name}" for name in "abce"[:number])
    body = f"""mul.lo.u32 %t0, %thread, 48;
    mov.u32 %t1, memory;
    add.u32 %t0, %t0, %t1;
    stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%t0], {{{names}}};
    bar.sync 0;
    setp.ge.u32 %p0, %thread, {8 * number};
    @%p0 bra END;
    ld.shared.v4.u32 {{%d0, %d1, %d2, %d3}}, [%t0];
    END:"""
    found = np.stack(execute(body, registers, ["u32"] * 4, shared_bytes=32 * 48), 1)[: 8 * number]
    for matrix, rows in zip(matrices, np.ascontiguousarray(found).view(np.uint16).reshape(-1, 8, 8), strict=False):
        assert np.array_equal(rows, matrix.T if transposed else matrix)


def test_ldmatrix_of_a_part_of_a_warp_and_of_misaligned_rows_are_errors():
    _, inputs = row_words()
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%d0, %d1, %d2, %d3}, [%t0];"
    part = f"{ROWS}setp.lt.u32 %p0, %thread, 7;\n@%p0 bra END;\n{load}\nEND:"
    with pytest.raises(Fault, match="part of a warp"):
        execute(part, inputs, ["u32"] * 4, shared_bytes=32 * 48)
    with pytest.raises(Fault, match="not aligned to 16"):
        execute(f"{ROWS}add.u32 %t0, %t0, 4;\n{load}", inputs, ["u32"] * 4, shared_bytes=32 * 48 + 4)


SHUFFLES = {
    # name: (b, c, lane that a lane reads, whether it is in range)
    "idx": (5, 31, lambda lane: 5, lambda lane: True),
    "idx of 4": (1, 28 << 8 | 31, lambda lane: lane // 4 * 4 + 1, lambda lane: True),
    "bfly": (2, 31, lambda lane: lane ^ 2, lambda lane: True),
    "bfly of 8": (
        8,
        24 << 8 | 7,
        lambda lane: lane ^ 8 if lane ^ 8 <= lane // 8 * 8 + 7 else lane,
        lambda lane: lane ^ 8 <= lane // 8 * 8 + 7,
    ),
    "up": (3, 0, lambda lane: lane - 3 if lane >= 3 else lane, lambda lane: lane >= 3),
    "up of 8": (3, 24 << 8, lambda lane: lane - 3 if lane % 8 >= 3 else lane, lambda lane: lane % 8 >= 3),
    "down": (30, 31, lambda lane: lane + 30 if lane < 2 else lane, lambda lane: lane < 2),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shfl(name):
    b, c, source, inside = SHUFFLES[name]
    mode = name.split()[0]
    body = f"shfl.sync.{mode}.b32 %d0|%p0, %a, {b}, {c}, -1; selp.u32 %d1, 1, 0, %p0;"
    found, flags = execute(body, [("u32", np.arange(64) + 100)], ["u32", "u32"], threads=64)
    assert found.tolist() == [100 + 32 * warp + source(lane) for warp in (0, 1) for lane in LANES]
    assert flags.tolist() == [int(inside(lane)) for _ in (0, 1) for lane in LANES]


@pytest.mark.parametrize("members", ["-1", "7"])
def test_shfl_of_threads_that_do_not_take_part_is_an_error(members):
    body = f"setp.lt.u32 %p0, %thread, 3;\n@%p0 shfl.sync.idx.b32 %d0, %a, 5, 31, {members};"
    with pytest.raises(Fault, match=r"diverged|does not take part"):
        execute(body, [("u32", [1])], ["u32"])


def test_active_mask():
    body = "mov.u32 %d0, 0;\nsetp.lt.u32 %p0, %thread, 3;\n@%p0 activemask.b32 %d0;"
    assert execute(body, [], ["u32"])[0].tolist() == [7] * 3 + [0] * 29
