"""The steps of `combine` within one block, compiled.

Sources are read in groups of eight, a cache line of each in turn: as fine-tunes of one network lie at equal
offsets in their files, these lines all fall into one set of L1, and it has eight ways. In groups of 32 the speed
from mapped files fell from 15 to 3 GB/s. The digest is taken of the same loads.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

import numba
import numpy as np

from .accumulating import TO_F32, TO_F64
from .codes import BF16, F16, F32, F64, ITEMSIZE
from .exact_means import LANES, mean_bf16, mean_f16
from .expanding import expand_f8
from .finishing import finish
from .given import GROUP, MULTIPLY, SLOT, STRIP
from .hashing import block_digest, settle
from .lanes import array_at, store_u64

__all__ = [
    "GROUP",
    "PAUSE",
    "STRIP",
    "add_sources",
    "block_part",
    "block_singles",
    "digest_rest",
    "means",
    "survey",
]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)

PAUSE = 15
"""Blocks for which the proof is not tried again after it failed for most of one."""


@numba.njit(nogil=True, inline="always")
def survey(sources, codes, weights, out, out_code, hashed):
    """Return whether the output is a source, whether anything is digested, and whether it is a plain mean."""
    in_place, digesting, plain = False, False, True
    for k in range(len(sources)):
        in_place |= sources[k] == out
        digesting |= hashed[k] != 0
        plain &= np.int64(codes[k]) == out_code and weights[k] == 1.0
    return in_place, digesting, plain


@numba.njit(nogil=True, inline="always")
def digest_rest(sources, codes, begin, count, block, hashed, digests, slots):
    """Complete the digests of a block: what is left of it after whole steps, or all of an 8-bit source."""
    for k in range(len(sources)):
        if hashed[k]:
            size = _SIZES[codes[k]]
            where = sources[k] + np.uint64(begin * size)
            if size == 1:
                digests[k] += block_digest(where, count, block)
            else:
                words = count // LANES * LANES * size // 8
                digests[k] += settle(slots + np.uint64(SLOT * k), where, count * size, words, block)


@numba.njit(nogil=True, inline="always")
def means(sources, code, begin, steps, goal, division, bounds, state, slots):
    """Write a block's means where `exact_means` applies, and return a bit for each step where it does not."""
    divisor, reciprocal, mode = division
    gap, top, bottom = bounds
    n, failed = len(sources), np.uint64(0)
    for first in range(0, n, GROUP):
        run, fresh, last = min(GROUP, n - first), np.int64(first == 0), np.int64(first + GROUP >= n)
        pointers = np.uint64(sources.ctypes.data) + np.uint64(8 * first)
        sums = slots + np.uint64(SLOT * first) if slots else slots
        if code == BF16:
            failed = mean_bf16(
                pointers, run, 2 * begin, steps, goal, divisor, reciprocal, mode, gap, top, bottom,
                state, fresh, last, sums,
            )  # fmt: skip
        else:
            failed = mean_f16(
                pointers, run, 2 * begin, steps, goal, divisor, reciprocal, mode, gap, top, bottom,
                state, fresh, last, sums,
            )  # fmt: skip
    return failed


def _summing(adders, real):
    """Return the function that sums sources into accumulators of `real` bytes."""
    add_bf16, add_f16, add_f32, add_f64 = adders

    @numba.njit(nogil=True, inline="always")
    def _add_f8(sources, code, factors, first, run, begin, count, acc, fresh, scratch):
        """Expand strips of a group of 8-bit sources to float32, and add them."""
        stage, places = scratch
        for strip in range(0, count, STRIP):
            length = min(STRIP, count - strip)
            for k in range(run):
                target = stage + np.uint64(4 * STRIP * k)
                store_u64(places + np.uint64(8 * k), target)
                expand_f8(sources[first + k] + np.uint64(begin + strip), code, length, target)
            there = acc + np.uint64(real * strip)
            add_f32(places, factors, run, 0, length, there, fresh, np.uint64(0), 0)

    @numba.njit(nogil=True, inline="always")
    def add_sources(sources, codes, weights, begin, start, count, acc, scratch, slots):
        """Sum all sources over a part of a block into the accumulators, a group of sources of one dtype at a time."""
        first, n = 0, len(sources)
        while first < n:
            code = np.int64(codes[first])
            last = first + 1
            while last < n and np.int64(codes[last]) == code and last - first < GROUP:
                last += 1
            run, fresh = last - first, np.int64(first == 0)
            pointers = np.uint64(sources.ctypes.data) + np.uint64(8 * first)
            factors = np.uint64(weights.ctypes.data) + np.uint64(8 * first)
            at, word = _SIZES[code] * (begin + start), _SIZES[code] * start // 8
            sums = slots + np.uint64(SLOT * first) if slots else slots
            if code == BF16:
                add_bf16(pointers, factors, run, at, count, acc, fresh, sums, word)
            elif code == F16:
                add_f16(pointers, factors, run, at, count, acc, fresh, sums, word)
            elif code == F64:
                add_f64(pointers, factors, run, at, count, acc, fresh, sums, word)
            elif code == F32:
                add_f32(pointers, factors, run, at, count, acc, fresh, sums, word)
            else:
                _add_f8(sources, code, factors, first, run, begin + start, count, acc, fresh, scratch)
            first = last

    return add_sources


add_sources = _summing(TO_F64, 8)
_add_singles = _summing(TO_F32, 4)


@numba.njit(nogil=True, error_model="numpy")
def _quotients(sums, count, divisor, out):
    """Divide float32 sums, and write what comes of it as float64."""
    by = np.float32(divisor)
    singles, quotients = array_at(sums, (count,), np.float32), array_at(out, (count,), np.float64)
    for j in range(count):
        quotients[j] = singles[j] / by


@numba.njit(nogil=True, inline="always")
def block_part(sources, codes, weights, begin, start, count, goal, out_code, division, acc, scratch, slots, encoder):
    """Combine `count` elements from the block's element `start`, and tell whether a result is not finite."""
    add_sources(sources, codes, weights, begin, start, count, acc, scratch, slots)
    return finish(acc, count, goal + np.uint64(start * _SIZES[out_code]), out_code, division, encoder)


@numba.njit(nogil=True, inline="always")
def block_singles(sources, codes, weights, begin, count, goal, out_code, divisor, acc, spare, scratch, slots, encoder):
    """Do what `block_part` does for a whole block, in float32.

    The sums lie in the spare block, to which `goal` may be equal: they are divided before it is written.
    """
    _add_singles(sources, codes, weights, begin, 0, count, spare, scratch, slots)
    _quotients(spare, count, divisor, acc)
    return finish(acc, count, goal, out_code, (1.0, 1.0, MULTIPLY), encoder)
