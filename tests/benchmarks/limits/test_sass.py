"""Machine code written by hand: its blocks, loops and ways, and the instructions of an item."""

import pytest

from benchmarks.counts import Item
from benchmarks.limits.issue import Kernel, issued, turns
from benchmarks.limits.paths import Marks, ways
from benchmarks.limits.sass import order, parse
from ccgpu.kernels.cuda.configurations import Configuration

# A prologue with two ways; a loop over chunks with a branch around one store, a copy in all turns but the last, and an
# inner loop; a wait; code behind a convergence check and a called function, which are not on a way.
TEXT = """
	.target	sm_90
//--------------------- .text.other --------------------------
.text.other:
        /*0000*/                   EXIT ;
//--------------------- .text.kernel --------------------------
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   ATOMG.E.ADD.STRONG.GPU PT, R10, desc[UR10][R2.64], R5 ;
        /*0030*/                   STS.128 [R1], R4 ;
.L_x_1:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
.L_x_2:
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/              @!P3 BRA `(.L_x_3) ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
.L_x_3:
        /*0080*/                   LDSM.16.MT88.4 R4, [R1] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R8, R12.reuse, R4 ;
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R12, RZ ;
        /*00b0*/              @!P1 BRA !P2, `(.L_x_4) ;
        /*00c0*/                   STS.64 [R1], R4 ;
        /*00d0*/                   STSM.16.M88.4 [R1], R4 ;
.L_x_4:
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_5:
        /*00f0*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0100*/               @P4 BRA `(.L_x_5) ;
        /*0110*/               @P5 BRA `(.L_x_2) ;
        /*0120*/                   BRA.DIV UR5, `(.L_x_6) ;
        /*0130*/                   CALL.REL.NOINC `($__internal_0_$slow) ;
.L_x_7:
        /*0140*/               @P0 EXIT ;
        /*0150*/                   ATOMG.E.ADD.STRONG.GPU PT, R10, desc[UR10][R2.64], R5 ;
        /*0160*/                   LDL R1, [R2] ;
        /*0170*/                   EXIT ;
.L_x_6:
        /*0180*/                   NOP ;
        /*0190*/                   BRA `(.L_x_7) ;
        .type           $__internal_0_$slow,@function
$__internal_0_$slow:
        /*01a0*/                   STL [R2], R1 ;
        /*01b0*/                   RET.REL.NODEC R62 `(kernel) ;
.L_x_8:
        /*01c0*/                   BRA `(.L_x_8);
//--------------------- .nv.shared.kernel --------------------------
"""
KERNEL = Configuration("forward", "bf16", 7, 64, 2, 8, 3)
CHUNKS = 4


def code(text=TEXT):
    return parse(text, "kernel")


def item(passes=1, **changes):
    """Return an item of four warps of `kernel`, of which the last one copies and multiplies as much and stores less."""
    counted = {
        "matrix_multiplies": 4 * 2 * CHUNKS,
        "matrix_load_wavefronts": 4 * 4 * CHUNKS,
        "copy_wavefronts": 4 * 4 * CHUNKS,
        "store_wavefronts": 3 * 6 * CHUNKS,
    }
    numbers = dict.fromkeys(Item._fields, 0) | counted | changes
    numbers |= {"kernel": "forward", "phase": "first", "entry": KERNEL.entry, "threads": 128}
    numbers |= {"channels": 64 * CHUNKS * passes, "passes": passes}
    return Item(**numbers)


def test_blocks_and_loops():
    function = code()
    inner, chunk = function.loops
    assert sum(function.count(inner.body).values()) == 2
    assert dict(function.count(chunk.body)) == {
        "BAR": 1, "BRA": 4, "LDGSTS": 1, "LDSM": 1, "HMMA": 2, "STS": 1, "STSM": 1, "STG": 1, "IADD3": 1,
    }  # fmt: skip
    assert inner.body < chunk.body
    assert order(function.blocks)[0] == 0
    assert not function.count()["NOP"]  # behind the convergence check
    assert not function.count()["STL"]  # in the called function
    assert function.count()["LDL"] == 1


def test_ways_have_the_operations_of_the_branches_taken():
    function = code()
    _, chunk = function.loops
    found = ways(
        function, lambda loop: range(CHUNKS, CHUNKS + 1) if loop == chunk else range(1, 2), Marks(99, 99, 99, 99, 0)
    )
    copies = {marks.copies for marks in found}
    assert copies == {4, 4 * CHUNKS, 4 * CHUNKS + 4}  # no turn copies, all but the last do, all do
    assert {marks.stores for marks in found} == {0, 6 * CHUNKS}
    assert {(marks.products, marks.matrix_loads, marks.atomics) for marks in found} == {(2 * CHUNKS, 4 * CHUNKS, 0)}
    way = found[Marks(2 * CHUNKS, 4 * CHUNKS, 4 * CHUNKS, 6 * CHUNKS, 0)]
    turn = 13  # the instructions of the loop's body, its inner loop once
    assert way.most == way.least == 3 + CHUNKS * turn - 1 + 3  # the last turn does not copy
    assert Marks(2 * CHUNKS, 4 * CHUNKS, 4 * CHUNKS, 0, 0) in found


def test_instructions_of_an_item():
    kernel = Kernel(KERNEL, code(), 168, 0, 0)
    got = issued(kernel, item())
    assert got.most == got.least == 4 * (3 + CHUNKS * 13 - 1 + 3) - 2 * CHUNKS
    assert got.names["HMMA"] == 4 * 2 * CHUNKS
    assert got.names["STSM"] == 3 * CHUNKS
    assert issued(kernel, item(passes=2)) == got  # of twice the channels
    assert kernel.local_accesses == 1
    assert kernel.constant_loads == 0


@pytest.mark.parametrize("changed", ["matrix_multiplies", "matrix_load_wavefronts", "copy_wavefronts"])
def test_other_counts_are_an_error(changed):
    with pytest.raises(ValueError, match="ways through cca_forward_bf16_n112_d64_r2c8b3 must have the operations"):
        issued(Kernel(KERNEL, code(), 168, 0, 0), item(**{changed: getattr(item(), changed) + 4}))


@pytest.mark.parametrize("kind", ["matrix_load", "store", "copy"])
def test_bank_conflicts_are_no_instructions(kind):
    kernel = Kernel(KERNEL, code(), 168, 0, 0)
    some = getattr(item(), f"{kind}_wavefronts")
    assert issued(kernel, item(**{f"{kind}_wavefronts": some + 40, f"{kind}_conflicts": 40})) == issued(kernel, item())


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match="item must be of cca_forward_bf16_n80"):
        issued(Kernel(KERNEL._replace(tiles=5), code(), 168, 0, 0), item())


def test_a_kernel_without_its_loop_is_an_error():
    with pytest.raises(ValueError, match="must have a loop over 4 chunks"):
        turns(Kernel(KERNEL, code(TEXT.replace("BAR.SYNC", "NOP")), 168, 0, 0), 64 * CHUNKS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("`(.L_x_4) ;", "`(.L_x_9) ;", "hold the target of every jump"),
        ("@P4 BRA `(.L_x_5) ;", "BRX R4 -0x90 ;", "jump to labels only, got BRX"),
        ("@P0 BRA `(.L_x_1) ;", "@P0 BRA `(.L_x_4) ;", "must have one entry"),
        ("IADD3 R1, R1, 0x1, RZ ;", "{ IADD3 R1 }", "form of nvdisasm -c"),
        (".text.kernel:", ".text.renamed:", "must hold the kernel kernel"),
    ],
)
def test_code_that_is_not_understood_is_an_error(old, new, message):
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        code(TEXT.replace(old, new))
