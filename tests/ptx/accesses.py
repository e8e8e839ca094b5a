"""Instructions that access memory: ld, st, atom, red, cp.async, createpolicy, fences.

PTX ISA, "Data Movement and Conversion Instructions" and "Parallel Synchronization and Communication Instructions".
A `bind_...` function takes an instruction apart for a group of threads once and returns a function that executes it
for the threads of a mask (None: all).

Memory is sequentially consistent here; visibility.py finds what a weaker order would break. An asynchronous copy
completes as late as its thread's cp.async.wait_group allows: until then its destination may neither be read nor
written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.ptx import floats
from tests.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW, UNSIGNED, Fault
from tests.ptx.parse import Immediate, Instruction, Operand, PtxError, Register, Vector
from tests.ptx.registers import DTYPES, put

if TYPE_CHECKING:
    from tests.ptx.unit import Unit

Step = Callable[[Any], None]
SPACES = ("param", "global", "shared", "local")
PAST_L1 = {"volatile", "relaxed", "acquire", "cg", "cv"}  # words of loads that never find an old value in L1
WORDS = PAST_L1 | {"weak", "release", "gpu", "sys", "cta", "ca", "cs", "lu", "nc", "wb", "wt", "shared::cta"}
WORDS |= {"L1::no_allocate", "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L2::cache_hint"}
WORDS |= {"L2::64B", "L2::128B", "L2::256B"}
SYNCHRONISING = {"volatile", "relaxed", "acquire"}
POLICIES = {"L2::evict_last": 1, "L2::evict_normal": 2, "L2::evict_first": 3, "L2::evict_unchanged": 4}
POLICY = 0x5CA1AB1E00000000  # a cache policy of this machine: opaque to a program


class Form(NamedTuple):
    """What the words of a load or store say."""

    space: str  # "" for generic addresses
    count: int  # elements of a vector
    kind: str  # type of an element
    past_l1: bool
    hint: bool  # whether the last operand is a cache policy
    synchronises: bool  # whether blocks may access the place at the same time

    @property
    def size(self) -> int:
        """Bytes of an access."""
        return self.count * DTYPES[self.kind].itemsize


def _form(instruction: Instruction) -> Form:
    words = list(instruction.parts[1:-1])
    space = next((word for word in words if word.split("::")[0] in SPACES), "")
    vector = next((word for word in words if word in ("v2", "v4", "v8")), "v1")
    unknown = set(words) - WORDS - {space, vector}
    if unknown:
        raise PtxError(f"accesses: {instruction.text} has the unknown word {unknown.pop()}")
    return Form(
        *(space.split("::")[0], int(vector[1:]), instruction.parts[-1]),
        *(bool(PAST_L1 & set(words)), "L2::cache_hint" in words, bool(SYNCHRONISING & set(words))),
    )


def chosen(x: Any, mask: np.ndarray | None, count: int) -> np.ndarray:
    """Return the values of the threads of a mask; a scalar is repeated."""
    if np.ndim(x) == 0:
        return np.full(count if mask is None else int(mask.sum()), x)
    return x if mask is None else x[mask]


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.elements if isinstance(operand, Vector) else (operand,)


def _check_policy(unit: Unit, operand: Operand) -> Step:
    policy = unit.registers.source(operand, "u64")

    def check(mask: Any) -> None:
        if ((chosen(policy, mask, unit.count) & np.uint64(0xFFFFFFFF00000000)) != np.uint64(POLICY)).any():
            raise Fault("the cache policy must come from createpolicy")

    return check


# Loads and stores of any space, of bytes at addresses, for threads by their index in the unit -----------------------


def _global_index(offsets: np.ndarray, size: int) -> tuple[np.dtype, np.ndarray]:
    unit = min(size, 8)
    return UNSIGNED[unit], (offsets // unit)[:, None] + np.arange(size // unit)


def read_global(
    unit: Unit, addresses: np.ndarray, size: int, threads: np.ndarray, past_l1: bool, synchronises: bool = False
) -> np.ndarray:
    """Return (accesses, size) bytes; what synchronises, as a flag does, needs no order with the writes."""
    memory, result = unit.memory, np.empty((len(addresses), size), np.uint8)
    for place in memory.places(addresses, size, write=False):
        which = slice(None) if place.which is None else place.which
        if not synchronises:
            memory.check_read(place, size, unit.slot.clock, unit.warps[threads[which]], past_l1)
        dtype, index = _global_index(place.offsets, size)
        result[which] = memory.view(place.buffer, dtype)[index].view(np.uint8)
    return result


def write_global(unit: Unit, addresses: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
    """Write (accesses, size) bytes."""
    memory, size = unit.memory, values.shape[1]
    for place in memory.places(addresses, size, write=True):
        which = slice(None) if place.which is None else place.which
        dtype, index = _global_index(place.offsets, size)
        memory.view(place.buffer, dtype)[index] = np.ascontiguousarray(values[which]).view(dtype)
        memory.mark_written(place, size, unit.slot.clock, unit.warps[threads[which]])


def _read(unit: Unit, form: Form, space: str, addresses: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """Return (accesses, bytes)."""
    if space == "global":
        return read_global(unit, addresses, form.size, threads, form.past_l1, form.synchronises)
    if space == "shared":
        step, index = unit.shared.indices(addresses, form.size, form.size)
        return unit.shared.read(step, index, unit.warps[threads]).view(np.uint8)
    held = unit.parameters if space == "param" else unit.local
    offsets = addresses.astype(np.int64)
    if (offsets % form.size).any() or (offsets < 0).any() or (offsets + form.size > held.shape[-1]).any():
        raise Fault(f"{form.size} bytes of .{space} memory out of bounds or not aligned")
    columns = offsets[:, None] + np.arange(form.size)
    return held[columns] if space == "param" else held[threads[:, None], columns]


def _write(unit: Unit, form: Form, space: str, addresses: np.ndarray, threads: np.ndarray, values: np.ndarray) -> None:
    if space == "global":
        write_global(unit, addresses, values, threads)
    elif space == "shared":
        step, index = unit.shared.indices(addresses, form.size, form.size)
        unit.shared.write(step, index, values.view(UNSIGNED[step]), unit.warps[threads])
    elif space == "local":
        offsets = addresses.astype(np.int64)
        if (offsets % form.size).any() or (offsets < 0).any() or (offsets + form.size > unit.local.shape[1]).any():
            raise Fault(f"{form.size} bytes of .local memory out of bounds or not aligned")
        unit.local[threads[:, None], offsets[:, None] + np.arange(form.size)] = values
    else:
        raise PtxError(f"accesses: .{space} memory cannot be written")


def _spaces(space: str, addresses: np.ndarray) -> list[tuple[str, np.ndarray | None, np.ndarray]]:
    """Return (space, which accesses, addresses there); a generic address lies in the space of its window."""
    if space:
        return [(space, None, addresses)]
    result = []
    kinds = (addresses >= np.uint64(SHARED_WINDOW)).astype(int) + (addresses >= np.uint64(LOCAL_WINDOW))
    for kind, (name, start) in enumerate((("global", 0), ("shared", SHARED_WINDOW), ("local", LOCAL_WINDOW))):
        which = np.flatnonzero(kinds == kind)
        if which.size:
            result.append((name, which, addresses[which] - np.uint64(start)))
    return result


def bind_load(unit: Unit, instruction: Instruction) -> Step:
    """ld: a scalar or vector from any space."""
    form = _form(instruction)
    targets = [unit.registers.target(e, form.kind) for e in _elements(instruction.operands[0])]
    if len(targets) != form.count:
        raise PtxError(f"accesses: {instruction.text} must have {form.count} results")
    address = unit.registers.address(instruction.operands[1], 32 if form.space in ("shared", "local", "param") else 64)
    dtype, every = DTYPES[form.kind], np.arange(unit.count)
    check = _check_policy(unit, instruction.operands[-1]) if form.hint else None

    def load(mask: Any) -> None:
        if check:
            check(mask)
        addresses, threads = chosen(address(), mask, unit.count), chosen(every, mask, unit.count)
        if form.space:
            data = _read(unit, form, form.space, addresses, threads)
        else:
            data = np.empty((len(threads), form.size), np.uint8)
            for space, which, inside in _spaces("", addresses):
                data[which] = _read(unit, form, space, inside, threads[which])
        values = np.ascontiguousarray(data).view(dtype)
        for i, target in enumerate(targets):
            if mask is None:
                target[...] = values[:, i]
            else:
                target[mask] = values[:, i]
        if "acquire" in instruction.parts:
            acquire(unit, mask)

    return load


def bind_store(unit: Unit, instruction: Instruction) -> Step:
    """st: a scalar or vector to global, shared or local memory."""
    form = _form(instruction)
    sources = [unit.registers.source(e, form.kind) for e in _elements(instruction.operands[1])]
    if len(sources) != form.count:
        raise PtxError(f"accesses: {instruction.text} must have {form.count} sources")
    address = unit.registers.address(instruction.operands[0], 32 if form.space in ("shared", "local") else 64)
    every, check = np.arange(unit.count), _check_policy(unit, instruction.operands[-1]) if form.hint else None

    def store(mask: Any) -> None:
        if check:
            check(mask)
        if "release" in instruction.parts:
            release(unit, mask)
        addresses, threads = chosen(address(), mask, unit.count), chosen(every, mask, unit.count)
        data = np.stack([chosen(x, mask, unit.count) for x in sources], 1).view(np.uint8)
        for space, which, inside in _spaces(form.space, addresses):
            if which is None:
                _write(unit, form, space, inside, threads, data)
            else:
                _write(unit, form, space, inside, threads[which], np.ascontiguousarray(data[which]))

    return store


# Order among blocks -------------------------------------------------------------------------------------------------


def release(unit: Unit, mask: Any) -> None:
    """Publish what the warps of these threads have written, and seen of their block."""
    for warp in set(chosen(unit.warps, mask, unit.count).tolist()):
        unit.memory.publications.release(unit.slot.clock, warp)


def acquire(unit: Unit, mask: Any) -> None:
    """Let the warps of these threads see what has been published."""
    for warp in set(chosen(unit.warps, mask, unit.count).tolist()):
        unit.memory.publications.acquire(unit.slot.clock, warp)


def bind_fence(unit: Unit, instruction: Instruction) -> Step:
    """membar and fence: a release for what follows, and an acquire by what was read before."""
    words = set(instruction.parts[1:])
    if words - {"gl", "sys", "gpu", "acq_rel", "sc"}:
        raise PtxError(f"accesses: {instruction.text} must be a fence of the whole GPU; add it")

    def execute(mask: Any) -> None:
        release(unit, mask)
        acquire(unit, mask)

    return execute


# Atomic operations --------------------------------------------------------------------------------------------------


def _add_halves(kind: str, a: Any, b: Any) -> Any:
    """Add two packed 16-bit floats, each rounded once; both are uint32 scalars."""
    x, y = (np.array([v], np.uint32).view(np.uint16) for v in (a, b))
    if kind == "bf16x2":
        return floats.to_bf16(floats.from_bf16(x) + floats.from_bf16(y)).view(np.uint32)[0]
    return (x.view(np.float16) + y.view(np.float16)).view(np.uint32)[0]


def _combine(operation: str, kind: str) -> Callable[[Any, Any, Any], Any]:
    """Return the new value, given the old one, b and c."""
    if operation == "add" and kind in ("bf16x2", "f16x2"):
        return lambda old, b, c: _add_halves(kind, old, b)
    if operation == "add" and kind == "f32":
        return lambda old, b, c: floats.add_ftz(old, b)
    functions: dict[str, Callable[[Any, Any, Any], Any]] = {
        "add": lambda old, b, c: old + b,
        "exch": lambda old, b, c: b,
        "cas": lambda old, b, c: c if old == b else old,
        "min": lambda old, b, c: min(old, b),
        "max": lambda old, b, c: max(old, b),
        "and": lambda old, b, c: old & b,
        "or": lambda old, b, c: old | b,
        "xor": lambda old, b, c: old ^ b,
    }
    return functions[operation]


OPERATIONS = ("add", "exch", "cas", "min", "max", "and", "or", "xor")


def bind_atomic(unit: Unit, instruction: Instruction) -> Step:
    """atom and red, one thread after the other; a vector (red only) element by element."""
    words, kind = list(instruction.parts[1:-1]), instruction.parts[-1]
    operation = next((word for word in words if word in OPERATIONS), "")
    space = next((word.split("::")[0] for word in words if word.split("::")[0] in ("global", "shared")), "")
    vector = next((word for word in words if word in ("v2", "v4", "v8")), "v1")
    known = {operation, vector, "noftz", "relaxed", "release", "acquire", "acq_rel", "gpu", "sys", "cta", "global"}
    unknown = set(words) - known - {"shared", "shared::cta", "L2::cache_hint"}
    if unknown or not operation or not space:
        raise PtxError(f"accesses: {instruction.text} must be an atomic operation that the machine knows")
    returns = instruction.parts[0] == "atom"
    place, *rest = instruction.operands[1:] if returns else instruction.operands
    address = unit.registers.address(place, 32 if space == "shared" else 64)
    sources = [unit.registers.source(e, kind) for e in _elements(rest[0])]
    third = unit.registers.source(rest[1], kind) if operation == "cas" else None
    target = unit.registers.target(instruction.operands[0], kind) if returns else None
    combine, dtype, every = _combine(operation, kind), DTYPES[kind], np.arange(unit.count)
    size, count = dtype.itemsize, int(vector[1:])
    form = Form(space, 1, kind, past_l1=True, hint=False, synchronises=True)
    check = _check_policy(unit, rest[-1]) if "L2::cache_hint" in words else None

    def execute(mask: Any) -> None:
        if check:
            check(mask)
        if {"release", "acq_rel"} & set(words):
            release(unit, mask)
        if {"acquire", "acq_rel"} & set(words):
            acquire(unit, mask)
        addresses, threads = address(), chosen(every, mask, unit.count)
        if (addresses[threads] % np.uint64(size * count)).any():
            raise Fault(f"an address is not aligned to {size * count} bytes")
        for thread in threads:
            one = np.array([thread])
            for i, source in enumerate(sources):
                at = addresses[one] + np.uint64(i * size)
                old = _read(unit, form, space, at, one).view(dtype)[0, 0]
                b = source if np.ndim(source) == 0 else source[thread]
                c = third if third is None or np.ndim(third) == 0 else third[thread]
                new = np.array([[combine(old, b, c)]]).astype(dtype)
                _write(unit, form, space, at, one, new.view(np.uint8))
                if target is not None:
                    target[thread] = old

    return execute


# Asynchronous copies ------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """Copies that one instruction began, a row for each thread: what to write where, and which are not complete."""

    group: np.ndarray  # number of the thread's group
    index: np.ndarray  # units of 4 bytes of shared memory
    values: np.ndarray
    threads: np.ndarray
    sources: np.ndarray  # addresses
    sizes: np.ndarray  # bytes that are read


def bind_copy(unit: Unit, instruction: Instruction) -> Step:
    """cp.async and its groups."""
    words = instruction.parts[2:]
    if words[0] == "commit_group":
        return lambda mask: put(unit.committed, unit.committed + 1, mask)
    if words[0] in ("wait_group", "wait_all"):
        newest = int(instruction.operands[0].value) if words[0] == "wait_group" else -1  # type: ignore[union-attr]
        return lambda mask: _complete(unit, mask, newest)
    unknown = set(words) - {"ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint", *WORDS}
    if unknown or not isinstance(instruction.operands[2], Immediate):
        raise PtxError(f"accesses: {instruction.text} must be a copy that the machine knows")
    to, source = (unit.registers.address(x, bits) for x, bits in zip(instruction.operands[:2], (32, 64), strict=True))
    size, rest = int(instruction.operands[2].value), list(instruction.operands[3:])
    check = _check_policy(unit, rest.pop()) if "L2::cache_hint" in words else None
    if size not in ((16,) if "cg" in words else (4, 8, 16)):
        raise PtxError(f"accesses: {instruction.text} must copy 16 bytes, or with .ca 4, 8 or 16")
    given = rest[0] if rest else Immediate(size)
    ignored = isinstance(given, Register) and unit.registers.kernel.registers[given.name] == 1
    amount = unit.registers.source(given, "pred" if ignored else "u32")
    every = np.arange(unit.count)

    def begin(mask: Any) -> None:
        if check:
            check(mask)
        threads, sources = chosen(every, mask, unit.count), chosen(source(), mask, unit.count)
        sizes = chosen(amount, mask, unit.count)
        sizes = np.where(sizes, 0, size) if ignored else sizes.astype(np.int64)
        if (sizes > size).any():
            raise Fault(f"cp.async reads more than its {size} bytes")
        _, index = unit.shared.indices(chosen(to(), mask, unit.count), size, size)
        values = _copied(unit, sources, sizes, size, threads)
        unit.shared.begin_copy(index, unit.warps[threads])
        # The addresses are copied: they may be a view of a register, which will change.
        unit.copies.append(Copy(unit.committed[threads], index, values, threads, sources.copy(), sizes))

    return begin


def _copied(unit: Unit, sources: np.ndarray, sizes: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
    """Return the (threads, size / 4) units that copies write now: `sizes` bytes of the source, then zeros."""
    values = np.zeros((len(sources), size), np.uint8)
    whole = np.flatnonzero(sizes == size)
    if whole.size:
        values[whole] = read_global(unit, sources[whole], size, threads[whole], past_l1=True)
    for thread in np.flatnonzero((sizes > 0) & (sizes < size)):
        if int(sources[thread]) % size:
            raise Fault(f"the source of cp.async is not aligned to {size} bytes")
        for byte in range(int(sizes[thread])):
            at = sources[thread : thread + 1] + np.uint64(byte)
            values[thread, byte] = read_global(unit, at, 1, threads[thread : thread + 1], past_l1=True)[0, 0]
    return values.view(np.uint32)


def _complete(unit: Unit, mask: Any, newest: int) -> None:
    """Complete the copies of all but the `newest` groups of each thread (-1: also of the open group)."""
    left = []
    for copy in unit.copies:
        due = copy.group < unit.committed[copy.threads] - newest
        if mask is not None:
            due &= mask[copy.threads]
        if due.any():
            values = _copied(unit, copy.sources[due], copy.sizes[due], copy.values.shape[1] * 4, copy.threads[due])
            if (values != copy.values[due]).any():
                raise Fault("the source of a cp.async was written between its begin and its completion")
            unit.shared.end_copy(copy.index[due], values, unit.warps[copy.threads[due]])
        if not due.all():
            left.append(Copy(*(field[~due] for field in copy)))
    unit.copies[:] = left


def bind_policy(unit: Unit, instruction: Instruction) -> Step:
    """createpolicy.fractional: an opaque cache policy; hints are not modelled, but where they come from is."""
    words = instruction.parts
    if words[1] != "fractional" or words[2] not in POLICIES or words[-1] != "b64":
        raise PtxError(f"accesses: {instruction.text} must be createpolicy.fractional")
    target = unit.registers.target(instruction.operands[0], "u64")
    value = np.uint64(POLICY + POLICIES[words[2]])
    return lambda mask: put(target, value, mask)
