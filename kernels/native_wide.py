"""The compiled loop behind `combine_wide`: strips of elements, first as if no scaling were needed, rarely again."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE, PAIR
from .finishing import finish, inspect, move_bytes
from .given import MULTIPLY
from .hashing import block_digest
from .lanes import (
    as_bits,
    load_f16,
    load_f32,
    load_f64,
    load_u8,
    load_u16,
    store_u32,
    store_u64,
)
from .wide_loops import AS_F64, AS_ODD, AS_PAIR, LANES, STRIP, add_wide, quotients

__all__ = ["build_wide", "inverse_of", "wide_scratch"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)
_S16, _MAGNITUDE = np.uint64(16), np.uint64(0x7FFFFFFFFFFFFFFF)

GROUP = 8
"""Sources read side by side (see `blocks`)."""

_ROW = 8 * STRIP
# Where in the scratch lie, in bytes: the state, at 0; widened sources; results; a block of output, for work in
# place; marks; and addresses of widened sources.
_STAGE = 5 * _ROW
_RESULT = _STAGE + GROUP * _ROW
_SPARE = _RESULT + 2 * _ROW
_MARKS = _SPARE + 16 * BLOCK
_PLACES = _MARKS + 2 * BLOCK
_END = _PLACES + 8 * GROUP


def wide_scratch() -> NDArray[np.uint8]:
    """Return the memory that the loop works in; the caller holds it."""
    return np.empty(_END, np.uint8)


def inverse_of(divisor: float, divisor_low: float) -> float:
    """Return 1 / divisor if that is a power of two of moderate size with nothing beside it, else 0."""
    simple = divisor_low == 0.0 and 2.0**-64 <= abs(divisor) <= 2.0**64 and abs(math.frexp(divisor)[0]) == 0.5
    return 1.0 / divisor if simple else 0.0


@numba.njit(nogil=True)
def _widen(source, code, count, padded, row, tables):
    """Write a strip of a source as float64, zeros behind it."""
    for j in range(count):
        if code == F64:
            value = load_f64(source + np.uint64(8 * j))
        elif code == F32:
            value = load_f32(source + np.uint64(4 * j))
        elif code == F16:
            value = load_f16(source + np.uint64(2 * j))
        elif code == BF16:
            here = row + np.uint64(8 * j)
            store_u32(here, load_u16(source + np.uint64(2 * j)) << _S16)
            value = load_f32(here)
        else:
            table = tables + np.uint64(1024) * np.uint64(code - 4)
            value = load_f32(table + np.uint64(4) * load_u8(source + np.uint64(j)))
        store_u64(row + np.uint64(8 * j), as_bits(value))
    for j in range(count, padded):
        store_u64(row + np.uint64(8 * j), np.uint64(0))


@numba.njit(nogil=True)
def _begin_with_pair(source, count, padded, state, trial):
    """Make a strip of a PAIR the state."""
    for j in range(padded):
        high, low, scale = 0.0, 0.0, 1.0
        here = state + np.uint64(8 * j)
        if j < count:
            high, low = load_f64(source + np.uint64(16 * j)), load_f64(source + np.uint64(16 * j + 8))
        if not trial:
            scale = load_f64(here + np.uint64(4 * _ROW))
        store_u64(here, as_bits(high * scale))
        store_u64(here + np.uint64(_ROW), as_bits(low * scale))
        store_u64(here + np.uint64(2 * _ROW), as_bits(high))
        store_u64(here + np.uint64(3 * _ROW), as_bits(high) & _MAGNITUDE)


@numba.njit(nogil=True)
def _sum_strip(sources, codes, weights, unit, begin, count, room, tables, trial):
    """Sum all sources over a strip into the state."""
    stage, places = room + np.uint64(_STAGE), room + np.uint64(_PLACES)
    padded = (count + LANES - 1) // LANES * LANES
    first, fresh, n = 0, np.int64(1), len(sources)
    if trial and not unit:
        for j in range(padded):
            store_u64(room + np.uint64(4 * _ROW + 8 * j), as_bits(1.0))
    if codes[0] == PAIR:
        _begin_with_pair(sources[0] + np.uint64(16 * begin), count, padded, room, trial)
        first, fresh = 1, np.int64(0)
    while first < n:
        run = min(GROUP, n - first)
        for k in range(run):
            code = np.int64(codes[first + k])
            where = sources[first + k] + np.uint64(_SIZES[code] * begin)
            if code != F64 or padded != count:
                row = stage + np.uint64(_ROW * k)
                _widen(where, code, count, padded, row, tables)
                where = row
            store_u64(places + np.uint64(8 * k), where)
        factors = np.uint64(weights.ctypes.data) + np.uint64(8 * first)
        add_wide(places, factors, run, np.int64(unit and trial), padded // LANES, room, fresh)
        first, fresh = first + run, np.int64(0)


def build_wide(signature: Any, stamp: int) -> Any:
    """Compile the loop, or load it from numba's cache."""

    @numba.njit(signature, nogil=True, cache=True, error_model="numpy")
    def loop(
        sources, codes, weights, divisor, divisor_low, inverse, elements, first_block, out, out_code,
        hashed, digests, nonfinite, tables, reals, integers, scratch,
    ):  # fmt: skip
        overflowed = np.int64(stamp) & 0
        room = np.uint64(scratch.ctypes.data)
        result = room + np.uint64(_RESULT)
        size = _SIZES[out_code]
        kind = AS_F64 if out_code == F64 else (AS_PAIR if out_code == PAIR else AS_ODD)
        in_place, unit = False, True
        for k in range(len(sources)):
            in_place |= sources[k] == out
            unit &= weights[k] == 1.0
        for block in range((elements + BLOCK - 1) // BLOCK):
            begin = block * BLOCK
            count = min(BLOCK, elements - begin)
            target = out + np.uint64(begin * size)
            goal = room + np.uint64(_SPARE) if in_place else target
            for k in range(len(sources)):
                if hashed[k]:
                    itemsize = _SIZES[codes[k]]
                    where = sources[k] + np.uint64(begin * itemsize)
                    digests[k] += block_digest(where, count * itemsize, first_block + block)
            found = np.int64(0)
            for strip in range(0, count, STRIP):
                length = min(STRIP, count - strip)
                steps, flags, trial = (length + LANES - 1) // LANES, np.int64(1), np.int64(1)
                while flags & 1:
                    _sum_strip(sources, codes, weights, unit, begin + strip, length, room, tables, trial)
                    flags = quotients(room, steps, divisor, divisor_low, inverse, kind, result, trial)
                    trial = np.int64(0)
                there = goal + np.uint64(strip * size)
                if kind == AS_ODD:
                    found |= finish(result, length, there, out_code, (1.0, 1.0, MULTIPLY), (reals, integers))
                else:
                    found |= flags
                    move_bytes(result, there, length * size)
            if found:
                overflowed += inspect(sources, codes, begin, count, goal, out_code, nonfinite, room + np.uint64(_MARKS))
            if in_place:
                move_bytes(goal, target, count * size)
        return overflowed

    return loop
