"""The compiled loop behind `combine_wide`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

import numba
import numpy as np

from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE, PAIR
from .finishing import finish, move_bytes
from .hashing import block_digest
from .inspection import canonical_nans, mark_bad
from .lanes import as_bits, load_f16, load_f32, load_f64, load_u8, load_u16, store_u64
from .pairs import add_pairs, divide_pairs, round_scaled, scale_of, split, times, to_odd
from .rounding import MULTIPLY

__all__ = ["build_wide"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)
_S16 = np.uint64(16)


@numba.njit(nogil=True)
def _widen(source, code, count, high, low, tables, scratch):
    """Write a block of any source as float64 (and the low half of a PAIR) and tell whether it is a PAIR."""
    if code == F64:
        for j in range(count):
            high[j] = load_f64(source + np.uint64(8 * j))
    elif code == PAIR:
        for j in range(count):
            high[j] = load_f64(source + np.uint64(16 * j))
            low[j] = load_f64(source + np.uint64(16 * j + 8))
    elif code == F32:
        for j in range(count):
            high[j] = load_f32(source + np.uint64(4 * j))
    elif code == F16:
        for j in range(count):
            high[j] = load_f16(source + np.uint64(2 * j))
    elif code == BF16:
        for j in range(count):
            scratch[j] = np.uint32(load_u16(source + np.uint64(2 * j)) << _S16)
        singles = np.uint64(scratch.ctypes.data)
        for j in range(count):
            high[j] = load_f32(singles + np.uint64(4 * j))
    else:
        table = tables + np.uint64(1024) * np.uint64(code - 4)
        for j in range(count):
            high[j] = load_f32(table + np.uint64(4) * load_u8(source + np.uint64(j)))


@numba.njit(nogil=True)
def _add(count, high, low, paired, weight, fresh, scale, s_high, s_low, plain):
    """Add one block times its weight to the pairs, and to a plain float64 sum beside them."""
    w_high, w_low = split(weight)
    for j in range(count):
        if paired:
            p, e = high[j] * scale[j], low[j] * scale[j]
        else:
            p, e = times(high[j] * scale[j], weight, w_high, w_low)
        if fresh:
            s_high[j], s_low[j], plain[j] = p, e, weight * high[j]
        else:
            s_high[j], s_low[j] = add_pairs(s_high[j], s_low[j], p, e)
            plain[j] += weight * high[j]


@numba.njit(nogil=True)
def _quotients(count, s_high, s_low, plain, marks, scale, divisor, divisor_low, out_code, acc, goal):
    """Divide the pairs; write float64 and PAIR outputs to `goal`, narrower ones, rounded to odd, to `acc`."""
    d_high, d_low = split(divisor)
    infinite = 0
    for j in range(count):
        q, q_low = divide_pairs(s_high[j], s_low[j], divisor, divisor_low, d_high, d_low)
        unscaled = scale[j]
        if s_high[j] == 0.0:
            q, q_low, unscaled = (plain[j] if plain[j] == 0.0 else 0.0) / divisor, 0.0, 1.0
        if marks[j]:
            q, q_low, unscaled = plain[j] / divisor, 0.0, 1.0
        if out_code == F64:
            value = round_scaled(q, q_low, unscaled)
            store_u64(goal + np.uint64(8 * j), as_bits(value))
        elif out_code == PAIR:
            value = q / unscaled
            rest = q_low / unscaled if np.isfinite(value) else 0.0
            store_u64(goal + np.uint64(16 * j), as_bits(value))
            store_u64(goal + np.uint64(16 * j + 8), as_bits(rest))
        else:
            value = to_odd(q, q_low) / unscaled
            acc[j] = value
        infinite += not np.isfinite(value)
    return infinite


def build_wide(signature: Any, stamp: int) -> Any:
    """Compile the loop, or load it from numba's cache."""

    @numba.njit(signature, nogil=True, cache=True, error_model="numpy")
    def loop(
        sources, codes, weights, divisor, divisor_low, elements, first_block, out, out_code,
        hashed, digests, nonfinite, tables, reals, integers,
    ):  # fmt: skip
        n = len(sources)
        overflowed = np.int64(stamp) & 0
        room = np.empty((8, BLOCK), dtype=np.float64)
        high, low, s_high, s_low, plain, scale, acc = room[0], room[1], room[2], room[3], room[4], room[5], room[6]
        spare = np.empty(2 * BLOCK, dtype=np.float64)
        scratch = np.empty(BLOCK, dtype=np.uint32)
        marks, clean = np.empty(BLOCK, dtype=np.uint8), np.empty(BLOCK, dtype=np.uint8)
        out_size = _SIZES[out_code]
        in_place = False
        for k in range(n):
            in_place |= sources[k] == out
        for block in range((elements + BLOCK - 1) // BLOCK):
            begin = block * BLOCK
            count = min(BLOCK, elements - begin)
            marks[:] = 0
            scale[:] = 0.0
            for k in range(n):
                code = np.int64(codes[k])
                where = sources[k] + np.uint64(begin * _SIZES[code])
                if hashed[k]:
                    digests[k] += block_digest(where, count * _SIZES[code], first_block + block)
                nonfinite[k] += mark_bad(where, code, count, np.uint64(marks.ctypes.data))
                _widen(where, code, count, high, low, tables, scratch)
                for j in range(count):
                    scale[j] = max(scale[j], abs(high[j]))
            for j in range(count):
                scale[j] = scale_of(scale[j])
            for k in range(n):
                code = np.int64(codes[k])
                where = sources[k] + np.uint64(begin * _SIZES[code])
                _widen(where, code, count, high, low, tables, scratch)
                _add(count, high, low, code == PAIR, weights[k], k == 0, scale, s_high, s_low, plain)
            target = out + np.uint64(begin * out_size)
            goal = np.uint64(spare.ctypes.data) if in_place else target
            held = np.uint64(acc.ctypes.data)
            found = _quotients(count, s_high, s_low, plain, marks, scale, divisor, divisor_low, out_code, acc, goal)
            if out_code != F64 and out_code != PAIR:
                found = finish(held, count, goal, out_code, (1.0, 1.0, MULTIPLY), (reals, integers))
            if found:
                if out_code <= F64:
                    canonical_nans(goal, out_code, count)
                elif out_code == PAIR:
                    for j in range(2 * count):
                        canonical_nans(goal + np.uint64(8 * j), F64, 1)
                clean[:] = 0
                mark_bad(goal, out_code, count, np.uint64(clean.ctypes.data))
                for j in range(count):
                    overflowed += np.int64(clean[j]) & ~np.int64(marks[j])
            if in_place:
                move_bytes(goal, target, count * out_size)
        # numba frees an array after its last use, and an address is no use of it: this keeps the scratch alive.
        room[0, 0] = spare[0] + scratch[0] + marks[0] + clean[0]
        return overflowed

    return loop
