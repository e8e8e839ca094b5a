"""Forward and backward of criss-cross attention in Numba CUDA: the readable twin of cuda/forward.cu and backward.cu.

The names, the order of steps and the algorithm are the same, without matrix units, shuffles, tickets or double buffers;
docs/kernels.md explains the algorithm. Arrays are channels-last and C-contiguous: q, k (B, P, D), v, out, dout
(B, P, C), lse, dlse, delta (B, P) with P all positions of an image; the positions of a line are start, start + inner,
start + 2 inner ... Results, lse and delta have the type of sums (`Shape.real`); the other arrays may be float16 where
that is float32.

Shared memory, for a tile of T positions and a chunk of c channels: two tiles of T x (c + 1) numbers, one for rows of
queries (q, dout) and one for rows of keys (k, v), and the sheet of weights, T x (T + 1).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from numba import cuda

from ccgpu.kernels.numba_cuda.schedule import item_of
from ccgpu.kernels.numba_cuda.tiles import (
    DeviceFunction,
    Shape,
    load_numbers_of,
    load_rows_of,
    multiply_rows_of,
    multiply_weights_of,
    put_results_of,
)


@lru_cache
def _find_row_maxima_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS = shape.side, shape.parts

    @cuda.jit(device=True)
    def find_row_maxima(x: Any, partial: Any, tx: Any, ty: Any) -> None:
        """Write the maximum of a thread's energies in each of its rows to column tx of `partial`."""
        for i in range(PARTS):
            row_max = x[i, 0]
            for j in range(1, PARTS):
                row_max = max(row_max, x[i, j])
            partial[ty + i * SIDE, tx] = row_max

    return find_row_maxima


@lru_cache
def _weigh_rows_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS, zero, empty = shape.side, shape.parts, shape.real(0), shape.real(-math.inf)

    @cuda.jit(device=True)
    def weigh_rows(x: Any, row_max: Any, weights: Any, partial: Any, sums: Any, tx: Any, ty: Any) -> None:
        """Write exp(E - row_max) to the sheet, and its sum over a thread's columns to column tx of `sums`.

        `partial` holds what `find_row_maxima` wrote; `row_max` receives the maximum of each of the thread's rows.
        """
        for i in range(PARTS):
            row = ty + i * SIDE
            highest = partial[row, 0]
            for t in range(1, SIDE):
                highest = max(highest, partial[row, t])
            row_max[i] = highest
            offset = zero if highest == empty else highest  # -inf - -inf is NaN, and these weights are 0
            partial_sum = zero
            for j in range(PARTS):
                weight = math.exp(x[i, j] - offset)
                weights[row, tx + j * SIDE] = weight
                partial_sum += weight
            sums[row, tx] = partial_sum

    return weigh_rows


@lru_cache
def _merge_rows_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS, zero, one = shape.side, shape.parts, shape.real(0), shape.real(1)
    empty, undefined = shape.real(-math.inf), shape.real(math.nan)

    @cuda.jit(device=True)
    def merge_rows(row_max: Any, sums: Any, before: Any, factor: Any, lse: Any, last: Any,
                   image: Any, first: Any, inner: Any, rows: Any, tx: Any, ty: Any) -> None:  # fmt: skip
        """Merge the log-sum-exp of each row's energies with that of the earlier lines, and write it.

        `before` holds the log-sum-exp of the earlier lines and receives the factor of what they have written to out;
        `factor` receives the factor of the weights exp(E - row_max), whose partial sums are in `sums`. Where all
        energies are -inf, weights and factors are 0.
        """
        for i in range(PARTS):
            row, row_sum, other = ty + i * SIDE, zero, before[i]
            for t in range(SIDE):
                row_sum += sums[row, t]
            own = empty if row_sum == zero else row_max[i] + math.log(row_sum)
            merged: Any = own
            part: Any = one
            before[i] = zero
            if own != empty or other != empty:
                # The two parts must sum to 1, so they are computed from a and b: `merged` has a rounding error that
                # grows with the energies.
                offset = max(own, other)
                a, b = math.exp(own - offset), math.exp(other - offset)
                merged = offset + math.log(a + b)
                part, before[i] = a / (a + b), b / (a + b)
            factor[i] = zero if row_sum == zero else part / row_sum
            if last and merged == empty:  # no weight anywhere: 0 / 0
                factor[i] = undefined
            if row < rows and tx == 0:
                lse[image, first + row * inner] = merged

    return merge_rows


@lru_cache
def _form_energies_of(shape: Shape) -> DeviceFunction:
    CHUNK, SIDE, PARTS = shape.chunk, shape.side, shape.parts
    zero, empty = shape.real(0), shape.real(-math.inf)
    load_rows, multiply_rows = load_rows_of(shape), multiply_rows_of(shape)

    @cuda.jit(device=True)
    def form_energies(x: Any, q: Any, k: Any, query_rows: Any, key_rows: Any, depth: Any, phase: Any,
                      scale: Any, share: Any, tx: Any, ty: Any) -> None:  # fmt: skip
        """x = E = scale Q K^T, plus `share` = log(1/A) where query and key are the same position; -inf beyond the keys.

        A is the number of lines through a position, each of which counts the position itself as 1/A.
        """
        image, start, query, key, queries, keys = item_of(cuda.blockIdx.x, phase)
        first_query, first_key, thread = start + query * phase.inner, start + key * phase.inner, ty * SIDE + tx
        for i in range(PARTS):
            for j in range(PARTS):
                x[i, j] = zero
        for channel in range(0, depth, CHUNK):
            load_rows(query_rows, q, image, first_query, phase.inner, queries, channel, depth, thread)
            load_rows(key_rows, k, image, first_key, phase.inner, keys, channel, depth, thread)
            cuda.syncthreads()
            multiply_rows(x, query_rows, key_rows, min(CHUNK, depth - channel), tx, ty)
            cuda.syncthreads()
        for i in range(PARTS):
            for j in range(PARTS):
                row, column = ty + i * SIDE, tx + j * SIDE
                x[i, j] *= scale
                if query + row == key + column:
                    x[i, j] += share
                if column >= keys:
                    x[i, j] = empty

    return form_energies


@lru_cache
def forward_kernel(shape: Shape) -> Any:
    """Return the kernel of one phase of forward.

    A block computes 1. the energies E of its queries and keys, in registers; 2. weights exp(E - row_max), in the sheet,
    and lse, merged with that of the earlier phases; 3. out = weights . V, a chunk of channels at a time, added to what
    the earlier phases have written. Each thread writes the elements of out that it owns; threads with tx = 0 write lse.
    """
    ROWS, SHEET, SQUARE, STRIPE = shape.rows, shape.sheet, shape.square, shape.stripe
    CHUNK, SIDE, PARTS, real, empty = shape.chunk, shape.side, shape.parts, shape.real, shape.real(-math.inf)
    load_rows, load_numbers, put_results = load_rows_of(shape), load_numbers_of(shape), put_results_of(shape)
    form_energies, multiply_weights = _form_energies_of(shape), multiply_weights_of(shape, False)
    find_row_maxima, weigh_rows, merge_rows = _find_row_maxima_of(shape), _weigh_rows_of(shape), _merge_rows_of(shape)

    @cuda.jit
    def cca_forward(q: Any, k: Any, v: Any, out: Any, lse: Any,
                    depth: Any, channels: Any, phase: Any, scale: Any, share: Any) -> None:  # fmt: skip
        query_rows = cuda.shared.array(ROWS, real)
        key_rows = cuda.shared.array(ROWS, real)
        weights = cuda.shared.array(SHEET, real)
        x, sums = cuda.local.array(SQUARE, real), cuda.local.array(STRIPE, real)
        row_max, factor = cuda.local.array(PARTS, real), cuda.local.array(PARTS, real)
        before = cuda.local.array(PARTS, real)
        tx, ty, inner = cuda.threadIdx.x, cuda.threadIdx.y, phase.inner
        image, start, query, key, queries, keys = item_of(cuda.blockIdx.x, phase)
        first_query, first_key, thread = start + query * inner, start + key * inner, ty * SIDE + tx

        form_energies(x, q, k, query_rows, key_rows, depth, phase, scale, share, tx, ty)

        find_row_maxima(x, key_rows, tx, ty)
        load_numbers(before, lse, empty, image, first_query, inner, 0 if phase.first else queries, ty)
        cuda.syncthreads()  # all threads of a row have read lse
        weigh_rows(x, row_max, weights, key_rows, query_rows, tx, ty)
        cuda.syncthreads()
        merge_rows(
            row_max, query_rows, before, factor, lse, phase.last, image, first_query, inner, queries, tx, ty
        )  # fmt: skip

        for channel in range(0, channels, CHUNK):
            load_rows(key_rows, v, image, first_key, inner, keys, channel, channels, thread)
            cuda.syncthreads()
            multiply_weights(sums, weights, key_rows, keys, tx, ty)
            put_results(out, sums, factor, before, not phase.first,
                        image, first_query, inner, queries, channel, channels, tx, ty)  # fmt: skip
            cuda.syncthreads()

    return cca_forward


@lru_cache
def _weigh_pairs_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS, zero = shape.side, shape.parts, shape.real(0)

    @cuda.jit(device=True)
    def weigh_pairs(x: Any, weights: Any, lse: Any, queries: Any, keys: Any, tx: Any, ty: Any) -> None:
        """Write P = exp(E - lse) to the sheet, 0 beyond queries and keys, and set x to 0."""
        for i in range(PARTS):
            for j in range(PARTS):
                row, column = ty + i * SIDE, tx + j * SIDE
                inside = row < queries and column < keys
                weights[row, column] = math.exp(x[i, j] - lse[i]) if inside else zero
                x[i, j] = zero

    return weigh_pairs


@lru_cache
def _differentiate_pairs_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS = shape.side, shape.parts

    @cuda.jit(device=True)
    def differentiate_pairs(x: Any, weights: Any, delta: Any, queries: Any, keys: Any, tx: Any, ty: Any) -> None:
        """Replace P in the sheet by dS = P (dP - delta); x holds dP = dout V^T."""
        for i in range(PARTS):
            for j in range(PARTS):
                row, column = ty + i * SIDE, tx + j * SIDE
                if row < queries and column < keys:
                    weights[row, column] *= x[i, j] - delta[i]

    return differentiate_pairs


@lru_cache
def _add_delta_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS, COLUMNS, real = shape.side, shape.parts, shape.columns, shape.real

    @cuda.jit(device=True)
    def add_delta(delta: Any, douts: Any, out: Any, image: Any, first: Any, inner: Any, rows: Any,
                  channel: Any, channels: Any, tx: Any, ty: Any) -> None:  # fmt: skip
        """Add dout . out over a thread's columns of a chunk of channels to delta, for each of the thread's rows."""
        for i in range(PARTS):
            row = ty + i * SIDE
            for j in range(COLUMNS):
                column = tx + j * SIDE
                if row < rows and channel + column < channels:
                    delta[i] += douts[row, column] * real(out[image, first + row * inner, channel + column])

    return add_delta


@lru_cache
def _finish_delta_of(shape: Shape) -> DeviceFunction:
    SIDE, PARTS = shape.side, shape.parts

    @cuda.jit(device=True)
    def finish_delta(own: Any, sums: Any, dlse: Any, delta: Any,
                     image: Any, first: Any, inner: Any, rows: Any, tx: Any, ty: Any) -> None:  # fmt: skip
        """Write delta = dout . out - dlse of each row; the columns of `sums` hold its threads' parts of dout . out."""
        for i in range(PARTS):
            row = ty + i * SIDE
            if row < rows:
                own[i] = -dlse[image, first + row * inner]
                for t in range(SIDE):
                    own[i] += sums[row, t]
                if tx == 0:
                    delta[image, first + row * inner] = own[i]

    return finish_delta


@lru_cache
def _form_gradients_of(shape: Shape) -> DeviceFunction:
    CHUNK, SIDE = shape.chunk, shape.side
    load_rows, put_results = load_rows_of(shape), put_results_of(shape)
    multiply_weights, multiply_transposed = multiply_weights_of(shape, False), multiply_weights_of(shape, True)

    @cuda.jit(device=True)
    def form_gradients(dq: Any, dk: Any, q: Any, k: Any, weights: Any, sums: Any, query_rows: Any, key_rows: Any,
                       depth: Any, phase: Any, scales: Any, ones: Any, tx: Any, ty: Any) -> None:  # fmt: skip
        """dq += scale dS K, dk += scale dS^T Q; the sheet holds dS."""
        image, start, query, key, queries, keys = item_of(cuda.blockIdx.x, phase)
        inner, adds, thread = phase.inner, not phase.first, ty * SIDE + tx
        first_query, first_key = start + query * inner, start + key * inner
        for channel in range(0, depth, CHUNK):
            load_rows(query_rows, q, image, first_query, inner, queries, channel, depth, thread)
            load_rows(key_rows, k, image, first_key, inner, keys, channel, depth, thread)
            cuda.syncthreads()
            multiply_weights(sums, weights, key_rows, keys, tx, ty)
            put_results(dq, sums, scales, ones, adds, image, first_query, inner, queries, channel, depth, tx, ty)
            multiply_transposed(sums, weights, query_rows, queries, tx, ty)
            put_results(dk, sums, scales, ones, adds, image, first_key, inner, keys, channel, depth, tx, ty)
            cuda.syncthreads()

    return form_gradients


@lru_cache
def backward_kernel(shape: Shape) -> Any:
    """Return the kernel of one phase of backward.

    A block computes 1. P = exp(E - lse), in the sheet; 2. dP = dout V^T, in registers, summed over the chunks of
    channels, and dv = P^T dout of each chunk; in the first phase, whose queries and keys are the same positions, also
    delta, while dout and out are read; 3. dS = P (dP - delta), in the sheet; 4. dq = scale dS K and dk = scale dS^T Q.
    dq, dk and dv are added to what the earlier phases have written; each thread writes the elements that it owns.
    """
    ROWS, SHEET, SQUARE, STRIPE = shape.rows, shape.sheet, shape.square, shape.stripe
    CHUNK, SIDE, PARTS, real, zero, one = shape.chunk, shape.side, shape.parts, shape.real, shape.real(0), shape.real(1)
    load_rows, load_numbers, put_results = load_rows_of(shape), load_numbers_of(shape), put_results_of(shape)
    multiply_rows, multiply_transposed = multiply_rows_of(shape), multiply_weights_of(shape, True)
    form_energies, form_gradients = _form_energies_of(shape), _form_gradients_of(shape)
    weigh_pairs, differentiate_pairs = _weigh_pairs_of(shape), _differentiate_pairs_of(shape)
    add_delta, finish_delta = _add_delta_of(shape), _finish_delta_of(shape)

    @cuda.jit
    def cca_backward(q: Any, k: Any, v: Any, out: Any, lse: Any, dout: Any, dlse: Any, delta: Any, dq: Any, dk: Any,
                     dv: Any, depth: Any, channels: Any, phase: Any, scale: Any, share: Any) -> None:  # fmt: skip
        query_rows = cuda.shared.array(ROWS, real)
        key_rows = cuda.shared.array(ROWS, real)
        weights = cuda.shared.array(SHEET, real)
        x, sums, numbers = (
            cuda.local.array(SQUARE, real), cuda.local.array(STRIPE, real), cuda.local.array(PARTS, real)
        )  # fmt: skip
        scales, ones = cuda.local.array(PARTS, real), cuda.local.array(PARTS, real)
        tx, ty, inner, adds = cuda.threadIdx.x, cuda.threadIdx.y, phase.inner, not phase.first
        image, start, query, key, queries, keys = item_of(cuda.blockIdx.x, phase)
        first_query, first_key, thread = start + query * inner, start + key * inner, ty * SIDE + tx

        form_energies(x, q, k, query_rows, key_rows, depth, phase, scale, share, tx, ty)
        load_numbers(numbers, lse, zero, image, first_query, inner, queries, ty)
        weigh_pairs(x, weights, numbers, queries, keys, tx, ty)

        for i in range(PARTS):
            numbers[i], scales[i], ones[i] = zero, scale, one
        for channel in range(0, channels, CHUNK):
            load_rows(query_rows, dout, image, first_query, inner, queries, channel, channels, thread)
            load_rows(key_rows, v, image, first_key, inner, keys, channel, channels, thread)
            cuda.syncthreads()
            multiply_rows(x, query_rows, key_rows, min(CHUNK, channels - channel), tx, ty)
            multiply_transposed(sums, weights, query_rows, queries, tx, ty)
            put_results(dv, sums, ones, ones, adds, image, first_key, inner, keys, channel, channels, tx, ty)
            if phase.first:
                add_delta(numbers, query_rows, out, image, first_query, inner, queries, channel, channels, tx, ty)
            cuda.syncthreads()
        if phase.first:
            for i in range(PARTS):
                query_rows[ty + i * SIDE, tx] = numbers[i]
            cuda.syncthreads()
            finish_delta(numbers, query_rows, dlse, delta, image, first_query, inner, queries, tx, ty)
        else:
            load_numbers(numbers, delta, zero, image, first_query, inner, queries, ty)
        differentiate_pairs(x, weights, numbers, queries, keys, tx, ty)
        cuda.syncthreads()

        form_gradients(dq, dk, q, k, weights, sums, query_rows, key_rows, depth, phase, scales, ones, tx, ty)

    return cca_backward
