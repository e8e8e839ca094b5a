"""Draw the figures of docs/kernels.md: `python -m docs.draw_kernels` (needs matplotlib, and g++).

The script reads orders, places and sizes from the sources, so that the figures cannot contradict them: the order of the
items and the permutation of a tile's units come from kernels/cuda/*.cuh, compiled with g++ and run on the CPU, the
sizes of shared memory from kernels/cuda/configurations.py, the effect of the lag from benchmarks/limits/.
"""

from __future__ import annotations

from itertools import pairwise

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks.counts import CHANNELS, DEPTH, H100, N
from benchmarks.counts import IMAGES as BATCH
from benchmarks.limits.gpus import H100 as GPU
from benchmarks.limits.table import launches_of, traffic_of
from ccgpu.kernels.cuda.configurations import ITEM_BYTES, TILE, Configuration, configuration
from docs.drawing import (
    BLUE,
    GREEN,
    GREY,
    IMAGES,
    INK,
    OF_IMAGES,
    ORANGE,
    PURPLE,
    RED,
    arrow,
    box,
    note,
    panel,
    save,
)
from docs.kernel_schedule import BEFORE, Item, order, places, simulate

IMAGES_SHOWN = 3  # images of the batch whose tickets are drawn
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}


def draw_lines() -> None:
    """Draw a criss-cross as two lines, and where their positions lie in memory."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5.6), height_ratios=(6.2, 4.4), layout="constrained")
    height, width, (y, x) = 5, 8, (2, 5)
    panel(top, 20, 6.2, f"the criss-cross of one position: two lines (map {height} x {width})")
    for i in range(height):
        for j in range(width):
            color = PURPLE if (i, j) == (y, x) else BLUE if i == y else ORANGE if j == x else "white"
            box(top, (j + 0.2, i + 0.6, 1, 1), f"{i},{j}", color, fontsize=7)
    note(top, 9.3, 0.9, "row: axis W", 9)
    note(top, 9.3, 1.6, f"{width} positions, inner = 1 apart; {height} such lines an image")
    note(top, 9.3, 2.7, "column: axis H", 9)
    note(top, 9.3, 3.4, f"{height} positions, inner = W = {width} apart; {width} such lines an image")
    note(top, 9.3, 4.5, "a third axis T adds lines of its own: inner = H W apart")
    note(top, 9.3, 5.3, "the position itself is on every line through it: 1/A of it on each of A")
    panel(bottom, 20, 4.4, "the same positions in channels-last memory: each is one run of C elements")
    step = 19.6 / (3 * width)
    for place in range(3 * width):
        i, j = place // width + 1, place % width
        color = PURPLE if (i, j) == (y, x) else BLUE if i == y else ORANGE if j == x else "white"
        box(bottom, (0.2 + place * step, 0.9, step, 0.7), f"{i},{j}", color, fontsize=6)
    ends = [0.2 + (place + 0.5) * step for place in (x, width + x, 2 * width + x)]
    for a, b in pairwise(ends):
        arrow(bottom, (a, 0.9), (b, 0.9), "#b9770e", -0.12)
    note(bottom, sum(ends[:2]) / 2, 0.25, "W C elements", 7, "center", "#b9770e")
    for place in range(width, 2 * width - 1):
        arrow(bottom, (0.2 + (place + 0.5) * step, 1.62), (0.2 + (place + 1.5) * step, 1.62), "#21618c", 0.5)
    note(bottom, 0.2 + 1.5 * width * step, 2.15, "C elements", 7, "center", "#21618c")
    chunk = configuration("forward", "bf16", 7, DEPTH, H100).chunk_units * 16
    pieces, left, wide = CHANNELS * 2 // chunk, 3.2, 13.6
    for i in range(pieces):
        color = GREEN if i == 2 else "white"
        box(bottom, (left + i * wide / pieces, 3.0, wide / pieces, 0.7), f"{chunk} B", color, fontsize=7)
    for place, end in ((width + x, left), (width + x + 1, left + wide)):
        bottom.plot([0.2 + place * step, end], [1.6, 3.0], color=INK, linewidth=0.6, linestyle=":")
    text = (
        f"one position, C = {CHANNELS}, bf16: {CHANNELS * 2:,} bytes. A block takes one chunk of every position of its "
    )
    note(bottom, 10, 4.1, text + f"line at a time: N pieces of {chunk} bytes, on a row as on a column", 8, "center")
    save(figure, IMAGES / "lines.svg")


def memory(ax: Axes, x: float, heading: str, parts: list[tuple[str, int, str]], total: int, scale: float) -> None:
    """Draw shared memory as a column of parts (name, bytes, colour), from its first byte down."""
    note(ax, x + 1.6, 0.25, heading, 8, "center")
    y = 0.6
    for what, size, color in parts:
        box(ax, (x, y, 3.2, size * scale), f"{what}\n{size:,}" if size * scale > 0.55 else "", color, fontsize=7)
        y += size * scale
    assert sum(size for _, size, _ in parts) == total


def draw_forward() -> None:
    """Draw one block's forward: the data flow, and shared memory early and late."""
    used = configuration("forward", "bf16", 7, DEPTH, H100)
    figure, (flow, shared) = plt.subplots(1, 2, figsize=(9, 5.4), width_ratios=(10, 7), layout="constrained")
    forward_flow(flow, used)
    forward_memory(shared, used)
    save(figure, IMAGES / "forward.svg")


def forward_flow(flow: Axes, used: Configuration) -> None:
    """Draw which data each step of a block's forward reads and writes."""
    warps, chunk = used.threads // 32, used.chunk_units * 8
    panel(flow, 10, 10.8, f"forward, one line of N = {N} (D = {DEPTH}, C = {CHANNELS}, bf16)")
    for t in range(used.tiles):
        box(flow, (0.1, 0.6 + 0.42 * t, 1.6, 0.42), "16 queries", BLUE, fontsize=6.5)
    for w in range(warps):
        owned = min(used.row_tiles, used.tiles - w * used.row_tiles)
        box(flow, (1.7, 0.6 + 0.84 * w, 0.9, 0.42 * owned), f"warp {w}", "white", fontsize=7)
    note(flow, 0.1, 0.3, "Q, rows of the block")
    box(flow, (3.5, 0.5, 6.3, 0.65), f"K: {used.tiles} tiles of 16 keys, read by every warp", ORANGE)
    text = "1. E = scale Q K$^T$ + share on the diagonal, 16 keys\nat a time: row_max and row_sum (online softmax)"
    box(flow, (3.5, 1.45, 6.3, 0.85), text, GREY)
    text = "2. wait for earlier phases; lse merged with theirs:\na factor for the weights, one for out$_{earlier}$"
    box(flow, (3.5, 2.6, 6.3, 0.85), text, PURPLE)
    held = used.row_tiles * used.tiles * 4
    text = f"3. E again; P = factor exp(E - row_max), rounded,\nstays in registers, {held} a thread"
    box(flow, (3.5, 3.75, 6.3, 0.85), text, GREY)
    box(flow, (0.1, 4.55, 2.5, 1.3), f"V: chunks of\n{chunk} channels,\ntwo in flight", GREEN)
    box(flow, (0.1, 6.1, 2.5, 1.05), "out$_{earlier}$, a chunk,\nby cp.async (none in\nthe first phase)", PURPLE)
    half = chunk // used.row_tiles
    size = f"{16 * used.row_tiles} x {half} a warp at a time, {used.row_tiles * half // 2} registers"
    text = f"4. out = factor out$_{{earlier}}$ + P V, accumulated in\nfloat32: {size}"
    box(flow, (3.5, 5.3, 6.3, 0.95), text, GREY)
    text = "rounded once, into the warp's own rows of a tile in\nshared memory (stmatrix)"
    box(flow, (3.5, 6.6, 6.3, 0.85), text, GREY)
    box(flow, (3.5, 7.8, 6.3, 0.65), "out: 16 bytes a thread, 128 bytes a row", BLUE)
    for y, end in ((1.15, 1.45), (2.3, 2.6), (3.45, 3.75), (4.6, 5.3), (6.25, 6.6), (7.45, 7.8)):
        arrow(flow, (6.6, y), (6.6, end))
    for start, end in ((1.9, 1.9), (5.2, 5.6), (6.6, 5.95)):
        arrow(flow, (2.6, start), (3.5, end))
    flow.add_patch(Rectangle((3.25, 5.0), 6.7, 3.95, fill=False, linestyle="--", linewidth=0.8, edgecolor=INK))
    note(flow, 9.8, 8.72, f"for each of {CHANNELS // chunk} chunks of channels, in two halves", 8, "right")
    note(flow, 0.1, 9.5, "A warp owns 32 rows from the first energy to the last store: what it reads of K and V")
    note(flow, 0.1, 9.95, "serves two tiles. The warps meet only where a chunk of V has arrived. They take turns,")
    note(flow, 0.1, 10.4, "from item to item, at the place with one tile.")


def forward_memory(shared: Axes, used: Configuration) -> None:
    """Draw shared memory while energies are computed, and while values are summed."""
    rows = TILE * used.tiles
    tile, chunk = rows * DEPTH * 2, rows * used.chunk_units * 16
    panel(shared, 7.4, 10.8, "shared memory, bytes")
    scale = 8.6 / used.shared_bytes
    end = [("factors", rows * 4, "white"), ("item", ITEM_BYTES, "white")]
    values = [("V, chunk 0, arriving", chunk, GREEN), ("(free)", chunk, "white"), *end]
    memory(shared, 0.2, "energies", [("Q", tile, BLUE), ("K", tile, ORANGE), *values], used.shared_bytes, scale)
    values = [("V, even chunks", chunk, GREEN), ("V, odd chunks", chunk, GREEN), *end]
    results = [("out, even chunks\n(first phase: all)", tile, PURPLE), ("out, odd chunks", tile, PURPLE)]
    memory(shared, 4.0, "values", [*results, *values], used.shared_bytes, scale)
    note(shared, 0.2, 9.55, f"with {rows * 4} for the factors of earlier results and")
    note(shared, 0.2, 10.0, f"{ITEM_BYTES} for the item: {used.shared_bytes:,};")
    note(shared, 0.2, 10.45, f"{used.blocks} blocks of {used.threads} threads a multiprocessor")


def draw_backward() -> None:
    """Draw one block's backward, transposed: the data flow, and shared memory early and late."""
    used = configuration("backward", "bf16", 7, DEPTH, H100)
    figure, (flow, shared) = plt.subplots(1, 2, figsize=(9, 5.8), width_ratios=(10, 8.4), layout="constrained")
    backward_flow(flow, used)
    backward_memory(shared, used)
    save(figure, IMAGES / "backward.svg")


def backward_flow(flow: Axes, used: Configuration) -> None:
    """Draw which data each step of a block's backward reads and writes."""
    parts = used.chunk_units // used.half_units
    held = used.row_tiles * used.tiles * 4
    panel(flow, 10, 11.4, "backward, transposed: rows are keys, columns queries")
    box(flow, (0.1, 0.3, 2.3, 0.7), "K, Q", ORANGE)
    box(flow, (3.0, 0.3, 6.8, 0.7), f"P$^T$ = exp(scale K Q$^T$ - lse): {held} registers", GREY)
    arrow(flow, (2.4, 0.65), (3.0, 0.65))
    box(flow, (3.0, 1.35, 6.8, 0.6), "wait for earlier phases; later ones read delta", PURPLE)
    arrow(flow, (6.4, 1.0), (6.4, 1.35))
    flow.add_patch(Rectangle((2.75, 2.2), 7.2, 4.0, fill=False, linestyle="--", linewidth=0.8, edgecolor=INK))
    note(flow, 9.85, 2.45, f"for each of {CHANNELS * 2 // (used.chunk_units * 16)} chunks of channels", 8, "right")
    arrow(flow, (6.4, 1.95), (6.4, 2.7))
    box(flow, (0.1, 2.7, 2.3, 0.7), "chunk of V", GREEN)
    box(flow, (0.1, 3.7, 2.3, 0.7), "chunk of dout", BLUE)
    box(flow, (0.1, 4.7, 2.3, 1.3), "chunk of out\n(first phase) or\nof dv (later)", PURPLE)
    box(flow, (3.0, 2.7, 6.8, 0.7), f"dP$^T$ += V dout$^T$, float32, {2 * held} registers", GREY)
    box(flow, (3.0, 3.7, 6.8, 0.7), f"dv = P$^T$ dout (+ dv), in {parts} parts $\\to$ memory", GREY)
    box(
        flow,
        (3.0, 4.7, 6.8, 1.3),
        "first phase: delta$_u$ += dout$_u$ . out$_u$, own rows\n(the diagonal of dout out$^T$): "
        "queries and keys\nare the same segment in that phase",
        GREY,
    )
    for y in (3.05, 4.05, 5.35):
        arrow(flow, (2.4, y), (3.0, y))
    arrow(flow, (2.4, 3.9), (3.0, 3.25))
    arrow(flow, (2.4, 4.2), (3.0, 5.0))
    arrow(flow, (2.4, 4.9), (3.0, 4.25))
    box(flow, (3.0, 6.6, 6.8, 0.7), "dS$^T$ = P$^T$ (dP$^T$ - delta), rounded, in P$^T$'s place", GREY)
    arrow(flow, (6.4, 6.2), (6.4, 6.6))
    box(flow, (3.0, 7.9, 3.2, 1.0), "sheet: dS$^T$ in\nshared memory", BLUE)
    box(flow, (6.6, 7.9, 3.2, 1.0), "dk = scale dS$^T$ Q\n(+ dk) $\\to$ memory", GREY)
    box(flow, (3.0, 9.4, 3.2, 1.0), "dq = scale dS K\n(+ dq) $\\to$ memory", GREY)
    arrow(flow, (4.6, 7.3), (4.6, 7.9))
    arrow(flow, (8.2, 7.3), (8.2, 7.9))
    arrow(flow, (4.6, 8.9), (4.6, 9.4))
    note(flow, 6.4, 9.7, "dS's rows: the sheet's columns,")
    note(flow, 6.4, 10.15, "by transposed matrix loads")
    note(
        flow,
        0.1,
        10.95,
        "Registers: 32-bit, a thread, for the line of the forward figure; products accumulate in float32.",
    )


def backward_memory(shared: Axes, used: Configuration) -> None:
    """Draw shared memory while chunks of channels pass by, and afterwards."""
    rows = TILE * used.tiles
    tile, chunk, sheet = rows * DEPTH * 2, rows * used.chunk_units * 16, rows * 256
    panel(shared, 8.4, 11.4, "shared memory, bytes")
    scale = 9.2 / used.shared_bytes
    end = [("lse, delta", 2 * rows * 4, "white"), ("item", ITEM_BYTES, "white")]
    stream = [
        ("V, even", chunk, GREEN),
        ("V, odd", chunk, GREEN),
        ("dout, even", chunk, BLUE),
        ("dout, odd", chunk, BLUE),
    ]
    first = [("Q", tile, ORANGE), ("K", tile, ORANGE)]
    memory(shared, 0.2, "chunks", [*first, *stream, ("out or dv", chunk, PURPLE), *end], used.shared_bytes, scale)
    free = 5 * chunk - sheet - tile
    late = [("sheet of dS$^T$", sheet, BLUE), ("dq, then dk", tile, PURPLE), ("(free)", free, "white")]
    memory(shared, 4.6, "the rest", [*first, *late, *end], used.shared_bytes, scale)
    note(
        shared,
        0.2,
        10.2,
        f"with {2 * rows * 4} for lse and delta and {ITEM_BYTES} for the item: {used.shared_bytes:,};",
    )
    note(shared, 0.2, 10.65, f"{used.blocks} blocks of {used.threads} threads a multiprocessor")


def draw_schedule() -> None:
    """Draw the order of tickets, of parts of an image, of work on block slots, the effect of the lag, segments."""
    sizes = (3, 4)
    items = order(IMAGES_SHOWN, sizes)
    figure, axes = plt.subplot_mosaic(
        "AAAAABBB;EEEEEBBB;CCCCCDDD", figsize=(9, 8.2), height_ratios=(1.9, 1.6, 3.9), layout="constrained"
    )
    draw_tickets(axes["A"], items, sizes)
    draw_parts(axes["E"], sizes)
    draw_lags(axes["B"])
    draw_execution(axes["C"], items, slots=14)
    draw_segments(axes["D"])
    save(figure, IMAGES / "schedule.svg")


def draw_tickets(ax: Axes, items: list[Item], sizes: tuple[int, int]) -> None:
    """Draw the items of maps of `sizes` = (H, W) in the order of their tickets, a row for each image."""
    of_image = sum(sizes)
    panel(ax, 12.6, IMAGES_SHOWN + 1.0, f"tickets of {IMAGES_SHOWN} images of {sizes[0]} x {sizes[1]}")
    note(ax, 2.2 + sizes[1] / 2 * 1.4, 0.4, f"phase 0: {sizes[1]} columns", 8, "center")
    note(ax, 2.7 + (sizes[1] + sizes[0] / 2) * 1.4, 0.4, f"phase 1: {sizes[0]} rows", 8, "center")
    for ticket, item in enumerate(items):
        row, place = divmod(ticket, of_image)
        x = 2.2 + place * 1.4 + 0.5 * item.axis
        box(ax, (x, row + 0.8, 1.4, 0.8), "", OF_IMAGES[item.image], hatch="///" if item.axis else None)
        ax.text(x + 0.7, row + 1.2, f"image {item.image}", ha="center", va="center", fontsize=6.5, bbox=LABEL)
    for row in range(IMAGES_SHOWN):
        note(ax, 0.1, row + 1.2, f"{row * of_image} - {(row + 1) * of_image - 1}")


def draw_parts(ax: Axes, sizes: tuple[int, int]) -> None:
    """Draw the items of one map of which the channels are cut, in passes and within a pass, a row for each pass."""
    cuts, passes = 2, 2
    items = order(1, sizes, cuts=cuts, passes=passes)
    of_pass = len(items) // passes
    panel(ax, 12.6, passes + 1.0, f"one such image, {passes} passes of {cuts} cuts: which part of the channels")
    for ticket, item in enumerate(items):
        row, place = divmod(ticket, of_pass)
        x = 2.2 + place * 1.4 / cuts + 0.5 * item.axis
        color = OF_IMAGES[item.cut]
        box(ax, (x, row + 0.3, 1.4 / cuts, 0.8), "", color, hatch="///" if item.axis else None)
        ax.text(x + 0.7 / cuts, row + 0.7, str(item.cut), ha="center", va="center", fontsize=6.5, bbox=LABEL)
    for row in range(passes):
        note(ax, 0.1, row + 0.7, f"{row * of_pass} - {(row + 1) * of_pass - 1}")


def draw_lags(ax: Axes) -> None:
    """Plot, over the lag, what the model of the L2 cache says of DRAM and of waiting on an H100."""
    lags = range(3)
    for kernel, color in (("forward", "#21618c"), ("backward", "#b9770e")):
        found = [traffic_of(GPU, launches_of(GPU, kernel, BATCH, (N, N), lag)) for lag in lags]
        ax.plot(lags, [x.ratio for x in found], "o-", color=color, markersize=4, label=f"{kernel}: DRAM / least")
        ax.plot(lags, [x.idle for x in found], "s:", color=color, markersize=4, label=f"{kernel}: waiting, share")
    ax.set(xlabel="lag", xticks=lags, ylim=(0, None))
    ax.set_title(f"{BATCH} images of {N} x {N}, modelled", loc="left", fontsize=9, fontweight="bold")
    ax.legend(fontsize=7, loc="center right")


def draw_execution(gantt: Axes, items: list[Item], slots: int) -> None:
    """Draw which block slot works on which item at which time."""
    times = simulate(items, slots)
    for item, (slot, begin, resumed, end) in zip(items, times, strict=True):
        if item.exists:
            hatch = "///" if item.axis else None
            box(gantt, (begin, slot - 0.4, end - begin, 0.8), "", OF_IMAGES[item.image], hatch=hatch)
            if resumed > begin + BEFORE:
                box(gantt, (begin + BEFORE, slot - 0.4, resumed - begin - BEFORE, 0.8), "", "white")
            gantt.text(end - 0.3, slot, str(item.image), ha="center", va="center", fontsize=7, bbox=LABEL)
    gantt.set(yticks=range(slots), xlabel="time, items", ylabel="block slot", xlim=(0, 3), ylim=(slots + 0.2, -0.6))
    gantt.set_title(f"on {slots} block slots; empty: waiting", loc="left", fontsize=10, fontweight="bold")
    done: dict[float, list[int]] = {}
    for image in range(IMAGES_SHOWN):
        finished = [time[3] for item, time in zip(items, times, strict=True) if item[:3] == (True, image, 0)]
        done.setdefault(max(finished), []).append(image)
    for time, those in done.items():
        gantt.axvline(time, color=RED, linewidth=1.0, linestyle=":")
        text = f" phase 0 done of image {', '.join(map(str, those))}"
        gantt.text(time, slots - 0.1, text, color=RED, fontsize=7, va="center")


def draw_segments(square: Axes) -> None:
    """Draw which segments of a long line meet in which phase."""
    line = [item for item in order(1, (1000,)) if item.exists]
    count = max(item.query for item in line) + 1
    panel(square, count + 1.4, count + 1.9, f"a line of 1,000 in {count} segments")
    note(square, 1.2 + count / 2, 0.2, "keys of segment", 8, "center")
    for i in range(count):
        note(square, 1.7 + i, 0.6, str(i), 8, "center")
        note(square, 0.85, 1.3 + i, str(i), 8, "center")
    square.text(0.3, 0.8 + count / 2, "queries of segment", rotation=90, ha="center", va="center", fontsize=8)
    for item in line:
        phase = (item.key - item.query) % count
        box(square, (1.2 + item.key, 0.8 + item.query, 1, 1), f"phase\n{phase}", OF_IMAGES[phase], fontsize=7)
    note(square, 1.2 + count / 2, count + 1.2, "each phase: every row and", 8, "center")
    note(square, 1.2 + count / 2, count + 1.55, "every column once", 8, "center")


def draw_swizzle() -> None:
    """Draw the banks of the units of eight rows of a tile, for the three access patterns of the kernels."""
    at = places()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.9), layout="constrained")
    wanted = (
        ("ldmatrix: 8 rows of a unit", [(row, 3) for row in range(8)], range(8)),
        ("32-bit operands: rows 0, 2, 4, 6", [(row, unit) for row in (0, 2, 4, 6) for unit in (2, 3)], range(8)),
        ("pairs of 32 bits: rows 0 ... 3", [(row, unit) for row in range(4) for unit in (2, 3)], range(8)),
    )
    for ax, (title, access, rows) in zip(axes, wanted, strict=True):
        panel(ax, 9.4, 10.6)
        ax.set_title(title, loc="left", fontsize=8.5, fontweight="bold")
        note(ax, 5.2, 0.3, "banks", 8, "center")
        for place in range(8):
            note(ax, 1.7 + place, 0.8, f"{4 * place}-\n{4 * place + 3}", 6, "center")
        for row in rows:
            note(ax, 1.0, 1.7 + row, f"row {row}", 7, "right")
            for unit in range(8):
                chosen = (row, unit) in access
                box(ax, (1.2 + at[row][unit], 1.2 + row, 1, 1), str(unit), ORANGE if chosen else "white", fontsize=8)
        hit = sorted(at[row][unit] for row, unit in access)
        note(ax, 5.2, 9.7, f"groups of banks: {', '.join(map(str, hit))}", 7.5, "center")
    save(figure, IMAGES / "swizzle.svg")


def draw_fragments() -> None:
    """Draw what each thread holds: results, 16-bit operands, and the order of columns in TF32."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9, 4.8), width_ratios=(10, 17, 12), layout="constrained"
    )
    colors = (BLUE, ORANGE, GREEN, PURPLE)

    def tile(ax: Axes, x: float, names: tuple[str, str]) -> None:
        for row in range(16):
            for t in range(4):
                box(ax, (x + 2 * t, 1.8 + row, 2, 1), str(4 * (row % 8) + t), colors[t], fontsize=6, linewidth=0.4)
        for half, name in enumerate(names):
            box(ax, (x, 1.8 + 8 * half, 8, 8), "", "none", linewidth=1.6)
            note(ax, x + 4, (1.35, 18.3)[half], name, 7, "center")

    panel(left, 9, 19, "results: lanes")
    tile(left, 0.5, ("rows g: x[0], x[1]", "rows g + 8: x[2], x[3]"))
    panel(middle, 17.4, 19, "16-bit operand: two of them, packed")
    tile(middle, 0.4, ("columns 0 ... 7: w[0]", "w[1]"))
    tile(middle, 8.8, ("columns 8 ... 15: w[2]", "w[3]"))
    for ax, end in ((left, 8), (middle, 16.4)):
        note(ax, 0.5, 0.6, f"each box: two columns of a row, and the lane (16 x {8 if end == 8 else 16})", 7)
    panel(right, 13, 19, "TF32: the order of columns")
    note(right, 0.2, 0.5, "one row, held by the four lanes t = 0 ... 3 of a quad", 7.5)
    order = [2 * t for t in range(4)] + [2 * t + 1 for t in range(4)]
    for column in range(8):
        box(right, (1.0 + 1.4 * column, 2.6, 1.4, 1.1), str(column), colors[column // 2])
    note(right, 1.0, 2.1, "columns of the weights, as results leave them", 7.5)
    for k, column in enumerate(order):
        box(right, (1.0 + 1.4 * k, 6.6, 1.4, 1.1), str(column), colors[k % 4])
        arrow(right, (1.7 + 1.4 * column, 3.7), (1.7 + 1.4 * k, 6.6), "#888888")
    note(right, 1.0, 8.15, "k of mma m16n8k8: lane t gives k = t and k = t + 4", 7.5)
    for k, column in enumerate(order):
        box(right, (1.0, 9.6 + 0.8 * k, 6.5, 0.8), f"row {column} of V", colors[k % 4], fontsize=7)
        note(right, 0.75, 10.0 + 0.8 * k, str(k), 7, "right")
    note(right, 1.0, 16.5, "so V's rows are read in the same order:", 7.5)
    note(right, 1.0, 17.2, "the sum over k is the same, and nothing moves", 7.5)
    note(right, 1.0, 17.9, "between threads", 7.5)
    save(figure, IMAGES / "fragments.svg")


def main() -> None:
    """Draw all figures."""
    for draw in (draw_lines, draw_forward, draw_backward, draw_schedule, draw_swizzle, draw_fragments):
        draw()


if __name__ == "__main__":
    main()
