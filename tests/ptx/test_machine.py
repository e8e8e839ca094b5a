"""What the machine forbids and how blocks take turns, by a few lines of PTX each: every mistake must be reported."""

import numpy as np
import pytest

from tests.ptx.memory import Fault
from tests.ptx.single import execute

pytestmark = pytest.mark.nvrtc

# %t0: the thread's word of shared memory; %t1: that of thread + 32, modulo the block.
PLACES = """shl.b32 %t0, %thread, 2;
mov.u32 %t2, memory;
mov.u32 %t3, %ntid.x;
add.u32 %t1, %thread, 32;
rem.u32 %t1, %t1, %t3;
shl.b32 %t1, %t1, 2;
add.u32 %t0, %t0, %t2;
add.u32 %t1, %t1, %t2;
"""
# %w0: the thread's 16 bytes of `data`; %t4: its 16 bytes of shared memory; %t5: those of thread + 32.
COPIES = """ld.param.u64 %w1, [data];
cvta.to.global.u64 %w1, %w1;
mul.wide.u32 %w2, %thread, 16;
add.s64 %w0, %w1, %w2;
mov.u32 %t2, memory;
mov.u32 %t3, %ntid.x;
shl.b32 %t4, %thread, 4;
add.u32 %t4, %t4, %t2;
add.u32 %t5, %thread, 32;
rem.u32 %t5, %t5, %t3;
shl.b32 %t5, %t5, 4;
add.u32 %t5, %t5, %t2;
"""
LOAD = "ld.shared.v4.u32 {%d0, %d1, %d2, %d3}, [%t5];"
MODES = pytest.mark.parametrize("lockstep", [True, False])


def exchange(middle, lockstep, threads=64, seed=0):
    """Each thread writes to its word of shared memory and reads that of another warp."""
    body = f"{PLACES}st.shared.u32 [%t0], %thread;\n{middle}\nld.shared.u32 %d0, [%t1];"
    return execute(body, [], ["u32"], threads, 4 * threads, lockstep=lockstep, seed=seed)[0]


@MODES
def test_a_barrier_lets_warps_read_each_other(lockstep):
    assert exchange("bar.sync 0;", lockstep).tolist() == [(n + 32) % 64 for n in range(64)]


@MODES
@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_is_found(lockstep, seed):
    with pytest.raises(
        Fault, match=r"line \d+: ld\.shared\.u32 %d0, \[%t1\]; (a race|a read of shared memory that nothing)"
    ):
        exchange("", lockstep, seed=seed)


@MODES
def test_a_write_to_what_another_warp_has_read_is_a_race(lockstep):
    body = """st.shared.u32 [%t0], %thread;
    bar.sync 0;
    ld.shared.u32 %d0, [%t1];
    st.shared.u32 [%t0], %d0;"""
    with pytest.raises(Fault, match=r"a race in shared memory: a (write to what|read of what) another warp has"):
        execute(PLACES + body, [], ["u32"], 64, 256, lockstep=lockstep)


def test_several_warps_may_read_the_same():
    body = """st.shared.u32 [%t0], %thread;
    bar.sync 0;
    ld.shared.u32 %d0, [memory+12];
    ld.shared.u32 %t5, [%t1];"""
    assert set(execute(PLACES + body, [], ["u32"], 96, 384)[0].tolist()) == {3}


def test_two_warps_that_write_the_same_place_at_once_are_a_race():
    with pytest.raises(Fault, match="race"):
        execute("st.shared.u32 [memory], %thread;", [], [], 64, 64)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.shared.u32 %d0, [memory+64];", "out of bounds"),
        ("st.shared.v4.u32 [memory+52], {%t0, %t0, %t0, %t0};", "not aligned"),
        ("st.shared.v4.u32 [memory+64], {%t0, %t0, %t0, %t0};", "out of bounds"),
        ("ld.shared.u32 %d0, [memory];", "nothing has been written"),
        ("mov.u32 %t0, 0;\nld.shared.u32 %d0, [%t0];", "out of bounds"),
    ],
)
def test_mistakes_in_shared_memory(body, reason):
    with pytest.raises(Fault, match=f"tested: block 0, PTX line .*{reason}"):
        execute(body, [], ["u32"], 32, 64)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("st.global.u32 [%w0+512], %thread;", "4 bytes at offset 512 from the start of data.*out of bounds"),
        ("st.global.u32 [%w0+-4], %thread;", "offset -4 from the start of data.*out of bounds"),
        ("ld.global.v4.u32 {%d0, %d1, %d2, %d3}, [%w0+8];", "not aligned to 16"),
        ("ld.global.v4.u32 {%d0, %d1, %d2, %d3}, [%w1+512];", "out of bounds"),
        ("st.global.u32 [%w3], %thread;", "a write to given, which is only to be read"),
        ("atom.global.add.u32 %d0, [%w3], 1;", "a write to given, which is only to be read"),
    ],
)
def test_mistakes_in_global_memory(body, reason):
    data, given = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    memory = [("data", data, True), ("given", given, False)]
    with pytest.raises(Fault, match=reason):
        execute(f"{COPIES}ld.param.u64 %w3, [given];\n{body}", [], ["u32"] * 4, memory=memory, shared_bytes=512)


# Asynchronous copies --------------------------------------------------------------------------------------------------


def copied(body, threads=64, **options):
    data = np.arange(4 * threads, dtype=np.uint32)
    found = execute(COPIES + body, [], ["u32"] * 4, threads, 32 * threads, memory=[("data", data, True)], **options)
    return np.stack(found, 1)


@MODES
def test_asynchronous_copies(lockstep):
    wait = "cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\n"
    body = f"cp.async.cg.shared.global [%t4], [%w0], 16;\n{wait}{LOAD}"
    assert np.array_equal(copied(body, lockstep=lockstep), np.roll(np.arange(256).reshape(64, 4), -32, 0))


def test_source_size_and_ignored_sources_give_zeros():
    wait = "cp.async.wait_all;\nbar.sync 0;\nld.shared.v4.u32 {%d0, %d1, %d2, %d3}, [%t4];"
    rows = np.arange(256).reshape(64, 4)
    for size, held in ((0, 0), (4, 1), (16, 4)):
        found = copied(f"mov.u32 %t6, {size};\ncp.async.cg.shared.global [%t4], [%w0], 16, %t6;\n{wait}")
        assert np.array_equal(found[:, :held], rows[:, :held])
        assert not found[:, held:].any()
    body = f"setp.lt.u32 %p0, %thread, 5;\ncp.async.cg.shared.global [%t4], [%w0], 16, %p0;\n{wait}"
    found = copied(body)
    assert not found[:5].any()
    assert np.array_equal(found[5:], rows[5:])
    # A copy of no bytes may have any source.
    copied(f"mov.u32 %t6, 0;\nmov.u64 %w0, 0;\ncp.async.cg.shared.global [%t4], [%w0], 16, %t6;\n{wait}")


def test_groups_complete_in_order_and_only_as_waited_for():
    second = "add.u32 %t6, %t4, 1024;"
    begin = f"""{second}
    cp.async.cg.shared.global [%t4], [%w0], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%t6], [%w0], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    """
    copied(begin + LOAD)
    with pytest.raises(Fault, match="an asynchronous copy may still be writing"):
        copied(f"{begin}add.u32 %t5, %t5, 1024;\n{LOAD}")
    with pytest.raises(Fault, match="an asynchronous copy may still be writing"):
        copied(begin.replace("wait_group 1", "wait_group 2") + LOAD)
    with pytest.raises(Fault, match="a write to shared memory that an asynchronous copy may still be writing"):
        copied(f"{begin}st.shared.u32 [%t6], %thread;")
    with pytest.raises(Fault, match="an asynchronous copy may still be writing"):  # the group is still open
        copied(f"cp.async.cg.shared.global [%t4], [%w0], 16;\ncp.async.wait_group 0;\nbar.sync 0;\n{LOAD}")


def test_a_wait_without_a_barrier_is_a_race():
    body = f"cp.async.cg.shared.global [%t4], [%w0], 16;\ncp.async.commit_group;\ncp.async.wait_group 0;\n{LOAD}"
    with pytest.raises(Fault, match="a race"):
        copied(body)


def test_a_copy_to_what_another_warp_has_read_is_a_race():
    body = f"""st.shared.v4.u32 [%t4], {{%thread, %thread, %thread, %thread}};
    bar.sync 0;
    {LOAD}
    cp.async.cg.shared.global [%t4], [%w0], 16;"""
    with pytest.raises(Fault, match="a race"):
        copied(body)


def test_a_source_written_during_the_copy_is_found():
    body = """cp.async.cg.shared.global [%t4], [%w0], 16;
    cp.async.commit_group;
    st.global.u32 [%w0], 77;
    cp.async.wait_group 0;"""
    with pytest.raises(Fault, match="written between its begin and its completion"):
        copied(body)


@pytest.mark.parametrize(
    ("policy", "faulty"), [("createpolicy.fractional.L2::evict_first.b64 %w5, 1.0;", False), ("mov.u64 %w5, 0;", True)]
)
def test_cache_policies_come_from_createpolicy(policy, faulty):
    body = f"""{policy}
    ld.global.L2::cache_hint.v4.u32 {{%d0, %d1, %d2, %d3}}, [%w0], %w5;
    cp.async.cg.shared.global.L2::cache_hint [%t4], [%w0], 16, 16, %w5;
    cp.async.wait_all;
    st.global.L2::cache_hint.v4.u32 [%w0], {{%d3, %d2, %d1, %d0}}, %w5;"""
    if faulty:
        with pytest.raises(Fault, match="createpolicy"):
            copied(body)
    else:
        assert np.array_equal(copied(body), np.arange(256).reshape(64, 4))


# Barriers and blocks --------------------------------------------------------------------------------------------------


def test_a_barrier_that_a_part_of_a_warp_reaches_is_an_error():
    body = "setp.lt.u32 %p0, %thread, 7;\n@%p0 bra END;\nbar.sync 0;\nEND:"
    with pytest.raises(Fault, match="an aligned barrier that a part of a warp reaches"):
        execute(body, [], [])


@MODES
def test_bar_sync_must_be_the_same_instruction_for_all_warps(lockstep):
    """PTX ISA, "barrier": with .aligned, all threads of the block execute the same one."""
    body = "setp.lt.u32 %p0, %thread, 32;\n@%p0 bra ELSE;\n{0}\nbra.uni END;\nELSE:\n{0}\nEND:"
    with pytest.raises(Fault, match="an aligned barrier while others wait at the one of PTX line"):
        execute(body.format("bar.sync 0;"), [], [], 64, lockstep=lockstep)
    execute(body.format("barrier.sync 0;"), [], [], 64, lockstep=lockstep)


def test_threads_that_have_exited_are_not_waited_for():
    body = "setp.lt.u32 %p0, %thread, 32;\n@%p0 ret;\nbar.sync 0;\nmov.u32 %d0, 5;"
    assert execute(body, [], ["u32"], 64)[0].tolist() == [0] * 32 + [5] * 32


HAND_OVER = """ld.param.u64 %w0, [data];
ld.param.u64 %w2, [counter];
mov.u32 %t0, %ctaid.x;
setp.ne.u32 %p0, %thread, 0;
mov.u32 %t5, 0;
@%p0 bra TAKEN;
atom.global.add.u32 %t5, [%w2], 1;
TAKEN:
shfl.sync.idx.b32 %t5, %t5, 0, 31, -1;
mul.wide.u32 %w1, %t5, 128;
add.s64 %w0, %w0, %w1;
mul.wide.u32 %w1, %thread, 4;
add.s64 %w0, %w0, %w1;
setp.eq.u32 %p1, %t5, 0;
@%p1 bra FIRST;
SPIN:
nanosleep.u32 100;
ld.acquire.gpu.global.u32 %t1, [%w2+4];
setp.lt.u32 %p2, %t1, {wanted};
@%p2 bra SPIN;
{load} %t2, [%w0+-128];
add.u32 %t2, %t2, 1;
st.global.u32 [%w0], %t2;
bra.uni DONE;
FIRST:
st.global.u32 [%w0], %thread;
DONE:
bar.sync 0;
membar.gl;
@%p0 bra END;
red.release.gpu.global.add.u32 [%w2+4], 1;
END:
"""


def hand_over(blocks, seed, wanted="%t5", load="ld.global.cg.u32", counter=0):
    """Blocks take tickets; each waits for the one before it and writes its numbers plus one."""
    data = np.full(32 * blocks, 0xFFFFFFFF, np.uint32)
    counters = np.array([0, counter], np.uint32)
    body = HAND_OVER.format(wanted=wanted, load=load)
    memory = [("data", data, True), ("counter", counters, True)]
    execute(body, [], [], memory=memory, blocks=blocks, seed=seed, resident=3)
    return data.reshape(blocks, 32)


def chain(blocks):
    return np.arange(32) + np.arange(blocks)[:, None]


@pytest.mark.parametrize("seed", range(4))
def test_blocks_wait_for_each_other(seed):
    assert np.array_equal(hand_over(7, seed), chain(7))


def test_a_wait_that_ends_too_early_is_seen_in_some_order():
    """The data are not there yet, or are there without the order that makes them visible."""
    messages = []
    for seed in range(12):
        try:
            hand_over(7, seed, wanted="1")
        except Fault as fault:
            messages.append(str(fault))
    assert messages
    assert all("written by another block, without a release there and an acquire here" in m for m in messages)


@pytest.mark.parametrize("together", ["shfl.sync.idx.b32 %d0, %t0, 0, 31, -1;", "bar.sync 0;", "bar.warp.sync -1;"])
def test_a_warp_that_diverged_meets_again_before_what_it_does_as_a_whole(together):
    """One branch lies behind the instruction, and jumps back to it."""
    body = f"""setp.lt.u32 %p0, %thread, 7;
    mov.u32 %t0, 1;
    mov.u32 %d0, 9;
    @%p0 bra FAR;
    NEAR:
    {together}
    bra.uni END;
    FAR:
    mov.u32 %t0, 5;
    bra.uni NEAR;
    END:"""
    assert set(execute(body, [], ["u32"], 64)[0].tolist()) == ({5, 1} if "shfl" in together else {9})


@pytest.mark.parametrize(
    "without",
    ["ld.acquire.gpu.global.u32 %t1", "red.release.gpu.global.add.u32 [%w2+4], 1;", "bar.sync 0;\nmembar.gl;"],
)
def test_order_among_blocks_needs_release_and_acquire(without, monkeypatch):
    """A fence before an atomic operation, and one after a volatile read, are as good; a plain operation is not."""
    plain = {"ld.acquire": "ld.relaxed.gpu.global.u32 %t1", "red.release": "red.global.add.u32 [%w2+4], 1;"}
    body = HAND_OVER.replace("membar.gl;\n", "")
    changed = body.replace(without, plain.get(without[:10], plain.get(without[:11], "")))
    if without.startswith("bar"):  # the release alone is enough: the block has one warp
        changed = body
    monkeypatch.setitem(globals(), "HAND_OVER", changed)
    if without.startswith("bar"):
        assert np.array_equal(hand_over(4, 0), chain(4))
        return
    with pytest.raises(Fault, match="without a release there and an acquire here"):
        hand_over(4, 0)
    fenced = changed.replace("@%p2 bra SPIN;", "@%p2 bra SPIN;\nmembar.gl;").replace(
        "bar.sync 0;", "bar.sync 0;\nmembar.gl;"
    )
    monkeypatch.setitem(globals(), "HAND_OVER", fenced)
    assert np.array_equal(hand_over(4, 0), chain(4))


def test_warps_of_a_block_exchange_global_memory_after_a_barrier():
    store, load = "st.global.u32 [%w0], %thread;", "ld.global.u32 %d0, [%w1+128];"
    first = "setp.ge.u32 %p0, %thread, 32;\nmov.u32 %d0, 7;"
    for middle, fine in (("bar.sync 0;", True), ("", False)):
        body = f"{COPIES}mov.u64 %w0, %w1;\nmul.wide.u32 %w2, %thread, 4;\nadd.s64 %w0, %w0, %w2;\n{store}\n{middle}\n"
        body += f"{first}\n@%p0 bra END;\n{load}\nEND:"
        memory = [("data", np.zeros(64, np.uint32), True)]
        if fine:
            found = execute(body, [], ["u32"], 64, 1024, memory=memory)[0]
            assert set(found.tolist()) == {32, 7}
        else:
            with pytest.raises(Fault, match="another warp of the block has written since the last barrier"):
                execute(body, [], ["u32"], 64, 1024, memory=memory)


def test_reading_what_another_block_wrote_through_l1_is_an_error():
    with pytest.raises(Fault, match="old values in L1"):
        hand_over(3, 0, load="ld.global.u32")


def test_a_deadlock_names_the_lines():
    with pytest.raises(Fault, match=r"tested: deadlock: .*block \d+: line \d+"):
        hand_over(3, 0, wanted="100")


# Atomic operations ----------------------------------------------------------------------------------------------------


def test_atomics_of_all_threads():
    memory = [("data", np.zeros(4, np.uint32), True)]
    body = """ld.param.u64 %w0, [data];
    atom.global.add.u32 %d0, [%w0], 1;
    red.global.max.u32 [%w0+4], %thread;
    atom.global.exch.b32 %t0, [%w0+8], %thread;
    atom.global.cas.b32 %t1, [%w0+12], 0, 9;"""
    (old,) = execute(body, [], ["u32"], threads=64, memory=memory)
    assert sorted(old.tolist()) == [*range(64)]
    assert memory[0][1].tolist()[:2] == [64, 63]
    assert memory[0][1][3] == 9


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_reductions_of_packed_floats(kind):
    """Each half is rounded by itself, after every addition."""
    one, ulp = {"f16x2": (0x3C00, 0x1000), "bf16x2": (0x3F80, 0x3B80)}[kind]  # 1 and half a unit in its last place
    data = np.array([one | one << 16] * 4, np.uint32)
    body = f"""ld.param.u64 %w0, [data];
    setp.ne.u32 %p0, %thread, 0;
    @%p0 bra END;
    mov.u32 %t0, {one | ulp << 16};
    red.global.add.noftz.v4.{kind} [%w0], {{%t0, %t0, %t0, %t0}};
    END:"""
    execute(body, [], [], memory=[("data", data, True)])
    two = {"f16x2": 0x4000, "bf16x2": 0x4000}[kind]
    assert set(data.tolist()) == {two | one << 16}


def test_local_memory_belongs_to_a_thread():
    body = """mov.u64 %w0, own;
    cvta.local.u64 %w1, %w0;
    cvta.to.local.u64 %w2, %w1;
    st.local.u32 [%w2+4], %thread;
    ld.u32 %d0, [%w1+4];
    ld.local.u32 %d1, [%w2];"""
    found, empty = execute(body, [], ["u32", "u32"], variables=".local .align 8 .b8 own[16];")
    assert found.tolist() == [*range(32)]
    assert set(empty.tolist()) == {0xFFFFFFFF}
    with pytest.raises(Fault, match="local memory out of bounds"):
        execute(body.replace("+4]", "+16]"), [], ["u32", "u32"], variables=".local .align 8 .b8 own[16];")


def test_generic_addresses_of_shared_memory():
    body = """mov.u64 %w0, memory;
    cvta.shared.u64 %w1, %w0;
    st.u32 [%w1+8], 7;
    ld.shared.u32 %d0, [memory+8];"""
    assert set(execute(body, [], ["u32"], shared_bytes=16)[0].tolist()) == {7}
