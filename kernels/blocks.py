"""The steps of `combine` within one block, compiled."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import numba
import numpy as np

from .accumulating import add_bf16, add_f16, add_f32, add_f64
from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE
from .exact_means import limits, mean_bf16, mean_f16
from .expanding import expand_f8
from .finishing import finish
from .hashing import block_digest
from .lanes import store_u64

__all__ = ["GROUP", "PAUSE", "ROOM", "block_part", "digest_sources", "means", "survey"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)

STRIP = 512
"""Elements whose accumulators are summed and then finished: 4 KiB, so that they stay in L1."""

GROUP = 8
"""8-bit sources that are expanded to float32 at a time."""

ROOM = STRIP + GROUP * STRIP // 2 + BLOCK
"""Scratch in float64 numbers: accumulators, expanded sources, and a block of output for work in place."""

PAUSE = 15
"""Blocks for which the proof is not tried again after it failed for most of one."""


@numba.njit(nogil=True, inline="always")
def survey(sources, codes, weights, divisor, out, out_code):
    """Return whether the output is a source, whether all weights are 1, and the limits of `exact_means`."""
    in_place, unit, one_dtype = False, np.int64(1), True
    for k in range(len(sources)):
        in_place |= sources[k] == out
        unit &= np.int64(weights[k] == 1.0)
        one_dtype &= np.int64(codes[k]) == out_code
    if unit and one_dtype:
        return in_place, unit, limits(len(sources), out_code, divisor)
    return in_place, unit, (0, 0, 0)


@numba.njit(nogil=True, inline="always")
def digest_sources(sources, codes, begin, count, block, hashed, digests):
    """Add one block's digests; this is what brings the block into the cache."""
    for k in range(len(sources)):
        if hashed[k]:
            size = _SIZES[codes[k]]
            digests[k] += block_digest(sources[k] + np.uint64(begin * size), count * size, block)


@numba.njit(nogil=True, inline="always")
def means(sources, code, begin, steps, goal, divisor, reciprocal, mode, bounds):
    """Write a block's means where `exact_means` applies, and return a bit for each step where it does not."""
    gap, top, bottom = bounds
    pointers = np.uint64(sources.ctypes.data)
    n, at, ahead = len(sources), 2 * begin, 2 * BLOCK
    if code == BF16:
        return mean_bf16(pointers, n, at, steps, goal, divisor, reciprocal, mode, gap, top, bottom, ahead)
    return mean_f16(pointers, n, at, steps, goal, divisor, reciprocal, mode, gap, top, bottom, ahead)


@numba.njit(nogil=True, inline="always")
def _expand(sources, code, first, last, at, count, acc, places):
    """Write a strip of a few 8-bit sources as float32 behind the accumulators, and the addresses to `places`."""
    for k in range(first, last):
        stage = acc + np.uint64(8 * STRIP + 4 * STRIP * (k - first))
        store_u64(places + np.uint64(8 * (k - first)), stage)
        expand_f8(sources[k] + np.uint64(at), code, count, stage)


@numba.njit(nogil=True, inline="always")
def _add_all(sources, codes, weights, unit, begin, count, scratch):
    """Sum all sources over a strip into the accumulators, a run of sources of one dtype at a time."""
    acc, places = scratch
    first, n = 0, len(sources)
    while first < n:
        code = np.int64(codes[first])
        last = first + 1
        while last < n and np.int64(codes[last]) == code and (code <= F64 or last - first < GROUP):
            last += 1
        run, fresh = last - first, np.int64(first == 0)
        pointers = np.uint64(sources.ctypes.data) + np.uint64(8 * first)
        factors = np.uint64(weights.ctypes.data) + np.uint64(8 * first)
        at, ahead = _SIZES[code] * begin, _SIZES[code] * BLOCK
        if code == BF16:
            add_bf16(pointers, factors, run, unit, at, count, acc, fresh, ahead)
        elif code == F16:
            add_f16(pointers, factors, run, unit, at, count, acc, fresh, ahead)
        elif code == F64:
            add_f64(pointers, factors, run, unit, at, count, acc, fresh, ahead)
        else:
            if code != F32:
                _expand(sources, code, first, last, at, count, acc, places)
                pointers, at, ahead = places, 0, 0
            add_f32(pointers, factors, run, unit, at, count, acc, fresh, ahead)
        first = last


@numba.njit(nogil=True, inline="always")
def block_part(
    sources, codes, weights, unit, begin, start, length, goal, out_code, divisor, reciprocal, mode,
    scratch, reals, integers,
):  # fmt: skip
    """Combine `length` elements from the block's element `start`, and tell whether a result is not finite."""
    found = np.int64(0)
    for strip in range(start, start + length, STRIP):
        count = min(STRIP, start + length - strip)
        _add_all(sources, codes, weights, unit, begin + strip, count, scratch)
        there = goal + np.uint64(strip * _SIZES[out_code])
        found |= finish(scratch[0], count, there, out_code, divisor, reciprocal, mode, reals, integers)
    return found
