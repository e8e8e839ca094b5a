"""What maps on several devices cost each of them: memory and traffic of `ccgpu.distributed.cca`.

`python -m benchmarks.sharded --size 1024 2048 --ranks 4` prints what each rank of a map of this size holds and sends.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

MB = 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


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


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", nargs=2, type=int, default=(1024, 2048), metavar=("H", "W"), help="of the map")
    parser.add_argument("--ranks", type=int, default=4, help="processes that hold rows of it")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--depth", type=int, default=64, help="channels of q and k")
    parser.add_argument("--channels", type=int, default=512, help="channels of v")
    parser.add_argument("--dtype", choices=ITEM_BYTES, default="float32")
    flags = parser.parse_args(argv)
    print(table(flags.size, flags.ranks, flags.batch, flags.depth, flags.channels, flags.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
