"""Criss-cross attention computed in parts by a backend: axis by axis, and merged. What maps on several devices need."""

import torch

from ccgpu.distributed import _merged


def lines_along(x, axis):
    """Return the lines of x (B, channels, *S) along an axis, (lines, channels, N)."""
    return x.movedim(1, -1).movedim(1 + axis, -1).flatten(0, -3).contiguous()


def map_of(lines, axis, like):
    """Return lines (lines, channels, N) as a map of the batch and sizes of `like`."""
    others = [size for a, size in enumerate(like.shape[2:]) if a != axis]
    return lines.unflatten(0, (like.shape[0], *others)).movedim(-1, 1 + axis).movedim(-1, 1)


def attend_in_parts(problem, bridge):
    """Return out, lse, dq, dk, dv of a problem, every axis alone, as one of the lines that cross at a position."""
    (q, k, v), dout, dlse, scale = problem[:4]
    axes = [axis for axis, size in enumerate(q.shape[2:]) if size > 1] or [0]  # others hold the position itself alone
    parts = []
    for axis in axes:
        out, lse = bridge.forward(*(lines_along(x, axis) for x in (q, k, v)), scale, len(axes))
        parts.append((map_of(out, axis, v), map_of(lse.unsqueeze(1), axis, v)))
    out, lse = _merged(parts, v)
    gradients = [torch.zeros_like(x) for x in (q, k, v)]
    for axis in axes:
        maps = [lines_along(x, axis) for x in (dout, q, k, v, out)]
        numbers = [lines_along(x.unsqueeze(1), axis).squeeze(1) for x in (lse, dlse)]
        for total, part in zip(gradients, bridge.backward(*maps, *numbers, scale, len(axes)), strict=True):
            total += map_of(part, axis, v)
    return out, lse, *gradients
