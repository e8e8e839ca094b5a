"""Maps that lie on several processes, each with a shard along one spatial axis: what the ranks agree on and exchange.

Every function here is a collective: all ranks of the group call it, in the same order.
"""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ccgpu.bridges.call import first_line

Group = Any
"""A `torch.distributed.ProcessGroup`; None is the default group of all processes."""


class _Held:
    """Holds a group, which belongs to this process: copies share it, and files do not hold it."""

    def __init__(self, group: Group, lost: bool = False) -> None:
        self.group, self.lost = group, lost

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self

    def __reduce__(self) -> tuple[type[_Held], tuple[None, bool]]:
        return _Held, (None, self.group is not None or self.lost)


class OnGroup:
    """A module with a `group`, that can be copied and pickled although a process group cannot."""

    _held = _Held(None)

    @property
    def group(self) -> Group:
        """The process group over which the maps are sharded; RuntimeError where a file has lost it."""
        if self._held.lost:
            raise RuntimeError(
                f"{type(self).__name__}: group must be set again after the module comes from a file, which holds none; "
                "call convert_to_shards(net, group), or set module.group"
            )
        return self._held.group

    @group.setter
    def group(self, group: Group) -> None:
        self._held = _Held(group)

    @property
    def is_sharded(self) -> bool:
        """Whether the module has a group, or had one before it came from a file."""
        return self._held.lost or self._held.group is not None


class Choice(NamedTuple):
    """A fact that is one of some values, which all ranks list in the same order."""

    value: Any
    values: Sequence[Any]


Fact = int | float | Choice


def check_group(function: str, group: Group) -> None:
    """Raise RuntimeError or ValueError unless this process belongs to the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{function}: group must be a process group, got none, because this process has joined no other; start it "
            "with torchrun and call torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{function}: group must hold this process, rank {dist.get_rank()}, got a group without it; "
            "call the function on the ranks of the group alone"
        )


def exchange_device(group: Group) -> torch.device:
    """Return the device on which a group exchanges tensors, for a rank whose own tensors do not say."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def exchangeable(x: Tensor) -> bool:
    """Return whether a tensor has values that ranks can exchange."""
    return x.device.type in ("cpu", "cuda") and x.layout is torch.strided


def fail(function: str, group: Group, problem: Exception) -> None:
    """Raise `problem`, and RuntimeError on the other ranks, whichever function they call next."""
    check_group(function, group)
    agree(function, {}, 0, group, exchange_device(group), problem)


def agree(
    function: str, facts: dict[str, Fact], own: int, group: Group, device: torch.device, problem: Exception | None
) -> list[int]:
    """Return every rank's `own` number, once all of them have stated the same facts: one small all-gather.

    Args:
        function: name for messages; all ranks must call the same one.
        facts: what must be equal on all ranks, by names that follow from the function alone.
        own: a number that may differ from rank to rank, such as the size of its shard.
        group: the ranks.
        device: of the tensors that the group exchanges.
        problem: why this rank cannot take part, whose facts then do not count; None: it can.

    Raises:
        ValueError: the ranks state different facts, or call different functions; on every rank.
        RuntimeError: another rank has a problem, or has ended.
        Exception: `problem`, on its own rank.
    """
    identity = zlib.crc32("/".join((function, *facts)).encode())
    row = torch.tensor([identity, problem is None, own, *map(_encoded, facts.values())] + [0] * _ROW)[:_ROW].to(device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    with answered(function, group):
        dist.all_gather(rows, row, group=group)
    table = torch.stack(rows).tolist()
    if problem is not None:
        raise problem
    for rank, theirs in enumerate(table):
        if not theirs[1]:
            raise RuntimeError(
                f"{function}: every rank must make a valid call, got an error on rank {rank}; it is printed there"
            )
        if theirs[0] != identity:
            raise ValueError(
                f"{function}: all ranks must make the same calls in the same order, got another one on rank {rank}; "
                "compare what the ranks run"
            )
    for number, (name, fact) in enumerate(facts.items(), 3):
        values = [_decoded(theirs[number], fact) for theirs in table]
        for rank, value in enumerate(values):
            if table[rank][number] != table[0][number]:
                raise ValueError(
                    f"{function}: {name} must be equal on all ranks, got {values[0]} on rank 0 and {value} on rank "
                    f"{rank}; pass the shards of the same maps, with the same arguments"
                )
    return [theirs[2] for theirs in table]


_ROW = 24  # numbers that a rank states; a fixed count, so that ranks which call different functions can tell


def _encoded(fact: Fact) -> int:
    if isinstance(fact, Choice):
        return list(fact.values).index(fact.value)
    if isinstance(fact, float):
        return int(struct.unpack("q", struct.pack("d", fact))[0])
    return fact


def _decoded(number: int, like: Fact) -> Any:
    if isinstance(like, Choice):
        return like.values[number]
    if isinstance(like, float):
        return struct.unpack("d", struct.pack("q", number))[0]
    return number


@contextmanager
def answered(function: str, group: Group) -> Iterator[None]:
    """Raise RuntimeError, in one line, if a collective within the block fails because a process has ended or hangs."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{function}: all ranks of the group must answer, got none from another one on rank "
            f"{dist.get_rank(group)} ({_reason(error)}); look at the first error among all ranks: a process has "
            "ended, or has been silent for the group's timeout"
        ) from error


def _reason(error: RuntimeError) -> str:
    """Return gloo's reason without its source file's name and its advice."""
    return re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).split(". This is")[0]


def all_to_all(function: str, x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Return what the ranks send to this one, in one row, rank by rank.

    Args:
        function: name for messages.
        x: what this rank sends, contiguous, rank by rank.
        send: number of elements for each rank.
        receive: number of elements from each rank.
        group: the ranks.
    """
    received = x.new_empty(sum(receive))
    with answered(function, group):
        dist.all_to_all_single(received, x.view(-1), list(receive), list(send), group=group)
    return received


class Lines:
    """The lines of maps along a sharded axis, divided among the ranks: from shards to whole lines and back.

    A map has B times the other positions lines. Rank r gets the r-th of equal parts of them, whole, in exchange for its
    shard of the others: an all-to-all each way. One rank sends and receives (P - 1) / P of its share of the map.
    """

    def __init__(self, function: str, axis: int, shape: Sequence[int], extents: Sequence[int], group: Group) -> None:
        """Divide the lines.

        Args:
            function: name for messages.
            axis: the sharded axis, a number of a spatial one.
            shape: of this rank's shard, (B, channels, *S); any channels.
            extents: the size of every rank's shard along the axis.
            group: the ranks.
        """
        self._function, self._axis, self._group, self._extents = function, axis, group, list(extents)
        self._others = [shape[0], *(size for a, size in enumerate(shape[2:]) if a != axis)]
        rank, ranks = dist.get_rank(group), len(extents)
        lines = 1
        for size in self._others:
            lines *= size
        bounds = [r * lines // ranks for r in range(ranks + 1)]
        self._counts = [end - start for start, end in itertools.pairwise(bounds)]
        self.number = self._counts[rank]
        self.length = sum(extents)
        self._own = self._extents[rank]

    def gather(self, shard: Tensor) -> Tensor:
        """Return this rank's lines (lines, channels, length), in channels-last memory, of a map (B, channels, *S)."""
        channels = shard.shape[1]
        rows = shard.movedim(1, -1).movedim(1 + self._axis, -2).contiguous()
        send = [count * self._own * channels for count in self._counts]
        receive = [self.number * extent * channels for extent in self._extents]
        parts = all_to_all(self._function, rows, send, receive, self._group).split(receive)
        del rows
        whole = [part.view(self.number, -1, channels) for part in parts if part.numel()]
        if not whole:
            return shard.new_empty((self.number, self.length, channels)).transpose(1, 2)
        return torch.cat(whole, 1).transpose(1, 2)

    def scatter(self, lines: Tensor) -> Tensor:
        """Return this rank's shard (B, channels, *S) of a map whose lines (lines, channels, length) the ranks hold."""
        channels = lines.shape[1]
        parts = lines.transpose(1, 2).split(self._extents, 1)
        rows = torch.cat([part.reshape(-1) for part in parts])
        del parts
        send = [self.number * extent * channels for extent in self._extents]
        receive = [count * self._own * channels for count in self._counts]
        own = all_to_all(self._function, rows, send, receive, self._group)
        return own.view(*self._others, self._own, channels).movedim(-2, 1 + self._axis).movedim(-1, 1)


class Windows:
    """What ranks hold of a map and what each of them reads of it, both ranges along a sharded axis."""

    def __init__(
        self, function: str, dim: int, extents: Sequence[int], windows: Sequence[tuple[int, int]], group: Group
    ) -> None:
        """Plan the exchange.

        Args:
            function: name for messages.
            dim: the sharded axis of the maps.
            extents: the size of every rank's shard along it.
            windows: every rank's range of the map, start and end; ranges may overlap, and do not leave the map.
            group: the ranks.
        """
        self._function, self._dim, self._group = function, dim, group
        rank = dist.get_rank(group)
        bounds = list(itertools.accumulate(extents, initial=0))
        shards = list(itertools.pairwise(bounds))
        self._start, self._extent = bounds[rank], extents[rank]
        self._sent = [_common(shards[rank], window) for window in windows]
        self._received = [_common(shard, windows[rank]) for shard in shards]

    def gather(self, shard: Tensor) -> Tensor:
        """Return this rank's window of the map."""
        send = [shard.narrow(self._dim, start - self._start, end - start) for start, end in self._sent]
        parts = self._exchange(send, self._received)
        return torch.cat(parts, self._dim)

    def scatter(self, window: Tensor) -> Tensor:
        """Return this rank's shard of the sum over all ranks' windows: the transpose of `gather`."""
        send = window.split([end - start for start, end in self._received], self._dim)
        sizes = [*window.shape]
        sizes[self._dim] = self._extent
        total = window.new_zeros(sizes)
        for part, (start, end) in zip(self._exchange(send, self._sent), self._sent, strict=True):
            total.narrow(self._dim, start - self._start, end - start).add_(part)
        return total

    def _exchange(self, send: Sequence[Tensor], ranges: list[tuple[int, int]]) -> list[Tensor]:
        """Return what every rank sends, of these ranges along the axis, for what is sent to every rank."""
        sizes = [*send[0].shape]
        shapes = [[*sizes[: self._dim], end - start, *sizes[self._dim + 1 :]] for start, end in ranges]
        numbers = [torch.Size(shape).numel() for shape in shapes]
        row = torch.cat([part.reshape(-1) for part in send])
        received = all_to_all(self._function, row, [part.numel() for part in send], numbers, self._group)
        return [part.view(shape) for part, shape in zip(received.split(numbers), shapes, strict=True)]


def _common(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Return the intersection of two ranges, or an empty one at the start of `a`."""
    start, end = max(a[0], b[0]), min(a[1], b[1])
    return (start, end) if start < end else (a[0], a[0])
