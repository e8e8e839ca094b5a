"""Maps on several devices: what `ccgpu.distributed.cca` costs each of them, and a strip that one process cannot hold.

    python -m benchmarks.sharded --size 1024 2048 --ranks 4
    python -m benchmarks.sharded --example

The first command prints what each rank holds of a map of this size and sends to the others. The example trains a small
CCNet on a strip: one process runs out of memory under a limit under which four processes train on it.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


# What a call costs ----------------------------------------------------------------------------------------------------


def sent_bytes(
    extents: Sequence[int], lines: int, rank: int, depth: int, channels: int, itemsize: int, wide: int
) -> tuple[int, int]:
    """Return the bytes that forward and backward of a call send from one rank to all others.

    Args:
        extents: the sizes of the ranks' shards along the sharded axis.
        lines: images times positions of the other axes.
        rank: the rank.
        depth: channels of q and k.
        channels: channels of v.
        itemsize: bytes of a number of q, k and v.
        wide: bytes of a number of lse.
    """
    ranks = len(extents)
    own = (rank + 1) * lines // ranks - rank * lines // ranks
    to_lines, to_shards = extents[rank] * (lines - own), own * (sum(extents) - extents[rank])
    forward = to_lines * (2 * depth + channels) * itemsize + to_shards * (channels * itemsize + wide)
    backward = to_lines * ((2 * depth + 2 * channels) * itemsize + 2 * wide)
    return forward, backward + to_shards * (2 * depth + channels) * itemsize


def saved_bytes(positions: int, depth: int, channels: int, itemsize: int, wide: int) -> int:
    """Return the bytes of q, k, v, out and lse on positions, which a rank saves for backward."""
    return positions * (2 * (depth + channels) * itemsize + wide)


def table(size: Sequence[int], ranks: int, batch: int, depth: int, channels: int, dtype: str) -> str:
    """Return a line for each rank: its rows, what it saves for backward, what it sends."""
    height, width = size
    itemsize, wide = ITEM_BYTES[dtype], 8 if dtype == "float64" else 4
    extents = [(rank + 1) * height // ranks - rank * height // ranks for rank in range(ranks)]
    one = saved_bytes(batch * height * width, depth, channels, itemsize, wide)
    lines = [
        f"{batch} x {height} x {width}, D = {depth}, C = {channels}, {dtype}; one device saves {one / MB:.1f} MB",
        "rank  rows  saved MB  sent forward MB  sent backward MB",
    ]
    for rank, rows in enumerate(extents):
        saved = saved_bytes(batch * rows * width, depth, channels, itemsize, wide)
        forward, backward = sent_bytes(extents, batch * width, rank, depth, channels, itemsize, wide)
        lines.append(f"{rank:4}  {rows:4}  {saved / MB:8.1f}  {forward / MB:15.1f}  {backward / MB:16.1f}")
    return "\n".join(lines)


# The example ----------------------------------------------------------------------------------------------------------


class Strip(NamedTuple):
    """A strip, and what each process may use for it beside what it has at its start."""

    height: int = 1536
    width: int = 512
    steps: int = 3
    limit: int = 256 * MB
    seconds: int = 600  # most of a process


def _rank_of_example(rank: int, ranks: int, folder: Path, strip: Strip) -> int:
    """Train on a rank's shard of the strip, under the limit; print the losses and the memory that they took."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from ccgpu.models.attention import RCCA
    from ccgpu.models.halo import convert_to_shards
    from ccgpu.train.distributed import convert_for_global_batch, sum_over_processes

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / f'store-{ranks}'}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 32, 7, stride=4, padding=3), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [RCCA(32, gamma=1.0, backend="cpu"), nn.Conv2d(32, 5, 1)]
    net = convert_for_global_batch(convert_to_shards(nn.Sequential(*layers), dist.group.WORLD))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.2)
    rows = strip.height // ranks
    images = torch.cat([_rows(row, strip.width) for row in range(rank * rows, (rank + 1) * rows, 4)], 2)
    labels = (images[:, 0, ::4, ::4] * 5).long()  # the class is the brightness of the pixel
    total = strip.height * strip.width // 16
    start = _virtual()
    resource.setrlimit(resource.RLIMIT_AS, (start + strip.limit,) * 2)
    try:
        for _ in range(strip.steps):
            loss = nn.functional.cross_entropy(net(images), labels, reduction="sum") / total
            optimiser.zero_grad()
            loss.backward()
            for parameter in net.parameters():
                parameter.grad = sum_over_processes(parameter.grad)
            optimiser.step()
            whole = float(sum_over_processes(loss))
            if rank == 0:
                print(f"loss {whole:.4f}", flush=True)
    except RuntimeError as error:
        print(f"out of memory: {str(error).splitlines()[0]}" if "memory" in str(error) else f"failed: {error}")
        return 3
    print(f"peak {_peak() // MB} MB", flush=True)
    dist.destroy_process_group()
    return 0


def _rows(row: int, width: int) -> object:
    """Return four rows of the strip, which depend on their place alone."""
    import torch

    return torch.rand(1, 3, 4, width, generator=torch.Generator().manual_seed(row))


def _virtual() -> int:
    """Return the bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak() -> int:
    """Return the most bytes of memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_example(ranks: int, strip: Strip) -> list[tuple[int, str]]:
    """Return the exit status and the output of each of the processes that train on a strip."""
    # One arena: each thread's own would reserve 64 MB of address space, which the limit counts.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sharded", "--ranks", str(ranks), "--folder", folder]
        command += ["--strip", *map(str, strip)]
        running = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        try:
            outputs = [process.communicate(timeout=strip.seconds)[0] for process in running]
        finally:
            for process in running:
                process.kill()
        return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


def example(strip: Strip) -> int:
    """Run the example; return 0 if one process runs out of memory and four train."""
    print(f"a strip of {strip.height} x {strip.width}; a process may use {strip.limit // MB} MB beside its start")
    ((status, output),) = run_example(1, strip)
    print(f"1 process:   {output.strip() or f'exit status {status}'}")
    alone = "out of memory" in output
    results = run_example(4, strip)
    losses = re.findall(r"loss (\S+)", results[0][1])
    peaks = [int(found[1]) for _, text in results if (found := re.search(r"peak (\d+) MB", text))]
    print(f"4 processes: loss {' -> '.join(losses)}; at most {max(peaks, default=0)} MB each, torch included")
    return 0 if alone and all(status == 0 for status, _ in results) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or run the example."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", nargs=2, type=int, default=(1024, 2048), metavar=("H", "W"), help="of the map")
    parser.add_argument("--ranks", type=int, default=4, help="processes that hold rows of it")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--depth", type=int, default=64, help="channels of q and k")
    parser.add_argument("--channels", type=int, default=512, help="channels of v")
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="float32")
    parser.add_argument("--example", action="store_true", help="train on a strip that one process cannot hold")
    for internal in ("--rank", "--folder", "--strip"):  # of the example's processes
        kind = {"--folder": Path}.get(internal, int)
        parser.add_argument(internal, type=kind, nargs="+" if internal == "--strip" else None, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.folder is not None:
        return _rank_of_example(flags.rank, flags.ranks, flags.folder, Strip(*flags.strip))
    if flags.example:
        return example(Strip())
    print(table(flags.size, flags.ranks, flags.batch, flags.depth, flags.channels, flags.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
