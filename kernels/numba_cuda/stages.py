"""The stages affinity, aggregate and aggregate_transposed in Numba CUDA: the readable twin of cuda/stages.cu.

  affinity              E_uj = q_u . k_i                 i is the j-th neighbour of u
  aggregate             out_u = sum over j of W_uj v_i
  aggregate_transposed  out_i = sum over the (u, j) whose neighbour is i of W_uj v_u

Arrays are as in fused.py; energies and weights are (B, P, K), in the type of sums, with the K positions of a
criss-cross side by side. The position itself is a neighbour on the last axis. Sums divide its weight equally among the
axes that are run: with a weight of 0 on all axes but one, an infinite value would give 0 * inf = NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import cuda

from ccgpu.kernels.numba_cuda.schedule import item_of
from ccgpu.kernels.numba_cuda.tiles import (
    DeviceFunction,
    Shape,
    load_rows_of,
    multiply_rows_of,
    multiply_weights_of,
    put_results_of,
)


@lru_cache
def affinity_kernel(shape: Shape) -> Any:
    """Return the kernel of one phase of affinity: a block writes the energies of its queries and keys, each once."""
    ROWS, SQUARE, real, zero = shape.rows, shape.square, shape.real, shape.real(0)
    CHUNK, SIDE, PARTS = shape.chunk, shape.side, shape.parts
    load_rows, multiply_rows = load_rows_of(shape), multiply_rows_of(shape)

    @cuda.jit
    def cca_affinity(q: Any, k: Any, energies: Any, depth: Any, phase: Any) -> None:
        query_rows = cuda.shared.array(ROWS, real)
        key_rows = cuda.shared.array(ROWS, real)
        x = cuda.local.array(SQUARE, real)
        tx, ty, inner = cuda.threadIdx.x, cuda.threadIdx.y, phase.inner
        image, start, query, key, queries, keys = item_of(cuda.blockIdx.x, phase)
        first_query, first_key, thread = start + query * inner, start + key * inner, ty * SIDE + tx
        for i in range(PARTS):
            for j in range(PARTS):
                x[i, j] = zero
        for channel in range(0, depth, CHUNK):
            load_rows(query_rows, q, image, first_query, inner, queries, channel, depth, thread)
            load_rows(key_rows, k, image, first_key, inner, keys, channel, depth, thread)
            cuda.syncthreads()
            multiply_rows(x, query_rows, key_rows, min(CHUNK, depth - channel), tx, ty)
            cuda.syncthreads()
        for i in range(PARTS):
            for j in range(PARTS):
                row, column = ty + i * SIDE, tx + j * SIDE
                itself = query + row == key + column
                if row < queries and column < keys and not (phase.skips and itself):
                    behind = phase.skips and key + column > query + row  # the left-out position comes before them
                    place = phase.slot + key + column - (1 if behind else 0)
                    energies[image, first_query + row * inner, place] = x[i, j]

    return cca_affinity


@lru_cache
def _load_weights_of(shape: Shape) -> DeviceFunction:
    TILE, THREADS, zero = shape.tile, shape.side**2, shape.real(0)

    @cuda.jit(device=True)
    def load_weights(sheet: Any, weights: Any, phase: Any, share: Any, item: Any, thread: Any) -> None:
        """Copy the weights of an item to the sheet, a row for each query; zeros beyond queries and keys."""
        image, start, query, key, queries, keys = item
        for index in range(thread, TILE * TILE, THREADS):
            row, column, weight = index // TILE, index % TILE, zero
            position = start + (query + row) * phase.inner
            if row < queries and column < keys:
                if query + row == key + column:
                    itself = phase.neighbours - phase.width + position % phase.width
                    weight = share * weights[image, position, itself]
                else:
                    behind = phase.skips and key + column > query + row
                    weight = weights[image, position, phase.slot + key + column - (1 if behind else 0)]
            sheet[row, column] = weight

    return load_weights


@lru_cache
def aggregate_kernel(shape: Shape, transposed: bool) -> Any:
    """Return the kernel of one phase of aggregate, or of its transpose.

    A block sums over its keys for each of its queries, or, transposed, over its queries for each of its keys, and adds
    the sums to what the earlier phases have written; each thread writes the elements that it owns.
    """
    ROWS, SHEET, STRIPE, real, one = shape.rows, shape.sheet, shape.stripe, shape.real, shape.real(1)
    CHUNK, SIDE, PARTS = shape.chunk, shape.side, shape.parts
    load_rows, load_weights = load_rows_of(shape), _load_weights_of(shape)
    multiply_weights, put_results = multiply_weights_of(shape, transposed), put_results_of(shape)

    @cuda.jit
    def cca_aggregate(weights: Any, v: Any, out: Any, channels: Any, phase: Any, share: Any) -> None:
        sheet = cuda.shared.array(SHEET, real)
        values = cuda.shared.array(ROWS, real)
        sums, ones = cuda.local.array(STRIPE, real), cuda.local.array(PARTS, real)
        tx, ty, inner = cuda.threadIdx.x, cuda.threadIdx.y, phase.inner
        item = item_of(cuda.blockIdx.x, phase)
        image, start, query, key, queries, keys = item
        to, rows, source, count = query, queries, key, keys
        if transposed:
            to, rows, source, count = key, keys, query, queries
        for i in range(PARTS):
            ones[i] = one
        load_weights(sheet, weights, phase, share, item, ty * SIDE + tx)
        for channel in range(0, channels, CHUNK):
            load_rows(values, v, image, start + source * inner, inner, count, channel, channels, ty * SIDE + tx)
            cuda.syncthreads()
            multiply_weights(sums, sheet, values, count, tx, ty)
            put_results(out, sums, ones, ones, not phase.first,
                        image, start + to * inner, inner, rows, channel, channels, tx, ty)  # fmt: skip
            cuda.syncthreads()

    return cca_aggregate
