"""The compiled loop behind `measuring.survey`. Imports numba; use `kernels.measuring`.

A strip of all rows goes through centring and all products before the next takes its place in the L1 cache; of many
rows, the strips of a few go through the products at a time. From L2, products took twice as long.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

from typing import Any

import numba
import numpy as np

from .blocks import add_sources
from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE
from .given import GROUP, SLOT, STRIP
from .hashing import block_digest, settle
from .survey_products import ROW, ROWS, STRIPS, SUMS, square, total, triangle
from .survey_strips import centre, centre_again

__all__ = ["ROW", "SCRATCH_BYTES", "SUMS", "build_survey", "rooms", "strips"]

SCRATCH_BYTES = 4 * GROUP * STRIP + 8 * GROUP

_MOST_ROWS = 16
"""Strips of more rows than these do not lie in the L1 cache."""
_TEAM = 12
"""Of many rows, so many are multiplied by so many at a time."""

_SIZES = np.array(ITEMSIZE, dtype=np.int64)


@numba.njit(nogil=True)
def _decode(source, code, one, begin, length, row, stage):
    """Write a block of a source as float64, with zeros after its end."""
    for j in range(length, BLOCK):
        row[j] = 0.0
    places = stage + np.uint64(4 * GROUP * STRIP)
    target = np.uint64(row.ctypes.data)
    add_sources(source, code, one, begin, 0, length, target, (stage, places), np.uint64(0))


@numba.njit(nogil=True)
def _multiply(short, strip, count, top, side, team, room):
    """Write the partial sums of the products of a team of rows, from `top` on, with another, from `side` on."""
    row_bytes = np.uint64((4 if short else 8) * ROW)
    product, width = np.uint64(8 * SUMS), np.uint64(8 * SUMS * team)
    for a in range(top, min(top + team, count), ROWS):
        rows, left, place = min(ROWS, count - a), strip + row_bytes * np.uint64(a), room + width * np.uint64(a - top)
        for b in range(side, min(side + team, a), ROWS):
            square(short, rows, left, strip + row_bytes * np.uint64(b), place + product * np.uint64(b - side), width)
        if top == side:
            triangle(short, rows, left, place + product * np.uint64(a - side), width)


@numba.njit(nogil=True)
def _settle(count, top, side, team, room, out):
    """Add up what `_multiply` wrote of all strips, and write what is in the triangle."""
    for i in range(top, min(top + team, count)):
        for k in range(side, min(side + team, i + 1)):
            out[i * (i + 1) // 2 + k] = total(room + np.uint64(8 * SUMS * ((i - top) * team + k - side)))


@numba.njit(nogil=True)
def _measure(code, pointers, offset, rows, count, based, room, slots, out):
    """Centre and digest a block of all sources; write the triangle of their inner products, and three counts."""
    start, home, size = np.uint64(rows.ctypes.data), np.uint64(room.ctypes.data), _SIZES[code]
    few = count <= _MOST_ROWS
    apart = np.uint64(0 if few else 8 * ROW * count)
    varying = moved = conflicts = shorts = 0
    for number in range(STRIPS):
        strip, at = start + apart * np.uint64(number), ROW * number * size
        found = centre(code, pointers, offset + at, strip, count, based, slots, at // 8)
        varying, moved, conflicts = varying + found[0], moved + found[1], conflicts + found[2]
        short = code in (BF16, F16) and found[3] == 0
        if code in (BF16, F16) and not short:
            # Digested already: these sums go nowhere.
            centre_again(code, pointers, offset + at, strip, count, based, slots + np.uint64(SLOT * count), at // 8)
        shorts |= int(short) << number
        if few:
            _multiply(short, strip, count, 0, 0, count, home + np.uint64(32 * number))
    if few:
        _settle(count, 0, 0, count, home, out)
    else:
        for top in range(0, count, _TEAM):
            for side in range(0, top + 1, _TEAM):
                for number in range(STRIPS):
                    strip = start + apart * np.uint64(number)
                    short = (shorts >> number) & 1 != 0
                    _multiply(short, strip, count, top, side, _TEAM, home + np.uint64(32 * number))
                _settle(count, top, side, _TEAM, home, out)
    end = count * (count + 1) // 2
    out[end], out[end + 1], out[end + 2] = varying, moved, conflicts


def strips(count: int) -> int:
    """Return how many strips of rows are held at a time."""
    return count if count <= _MOST_ROWS else count * STRIPS


def rooms(count: int) -> int:
    """Return for how many products at a time there must be room."""
    return count**2 if count <= _MOST_ROWS else _TEAM**2


_F64_1, _F64_2 = numba.types.Array(numba.f8, 1, "C"), numba.types.Array(numba.f8, 2, "C")
_U8, _U64, _I64 = (numba.types.Array(t, 1, "C") for t in (numba.u1, numba.u8, numba.i8))
_SURVEY = numba.void(
    _U64, _U8, numba.i8, numba.i8, numba.i8, numba.i8, _F64_2, _U64, _I64, _F64_1, _F64_2, _F64_2, _F64_2, _U64, _U64,
    _U8,
)  # fmt: skip


def build_survey(stamp: int) -> Any:
    """Compile the loop of `survey`."""

    @numba.njit(_SURVEY, nogil=True, cache=True)
    def loop(
        sources, codes, begin, elements, first_block, based, out, digests, nonfinite,
        one, decoded, rows, room, places, sums, scratch,
    ):  # fmt: skip
        count, code = len(sources), np.int64(codes[0])
        stage = np.uint64(scratch.ctypes.data) + np.uint64(stamp & 0)
        slots = np.uint64(sums.ctypes.data)
        plain = code in (BF16, F16, F32, F64)
        for k in range(count):
            plain &= np.int64(codes[k]) == code
            places[k] = np.uint64(decoded[k].ctypes.data)
        for number in range(out.shape[0]):
            at = begin + number * BLOCK
            length = min(BLOCK, elements - number * BLOCK)
            found, whole = out[number], plain and length == BLOCK
            sums[:] = 0
            if whole:
                pointers = np.uint64(sources.ctypes.data)
                _measure(code, pointers, at * _SIZES[code], rows, count, based, room, slots, found)
            else:
                for k in range(count):
                    _decode(sources[k : k + 1], codes[k : k + 1], one, at, length, decoded[k], stage)
                _measure(F64, np.uint64(places.ctypes.data), 0, rows, count, based, room, slots, found)
            finite = True
            for k in range(count):
                size = _SIZES[codes[k]]
                where, nbytes = sources[k] + np.uint64(at * size), length * size
                if whole:
                    digests[k] += settle(slots + np.uint64(SLOT * k), where, nbytes, nbytes // 8, first_block + number)
                else:
                    digests[k] += block_digest(where, nbytes, first_block + number)
                value = found[k * (k + 1) // 2 + k]
                finite &= value - value == 0.0
            if not finite:
                found[-3:] = 0.0
                for k in range(count):
                    _decode(sources[k : k + 1], codes[k : k + 1], one, at, length, decoded[0], stage)
                    for j in range(length):
                        value = decoded[0, j]
                        if value - value != 0.0:
                            nonfinite[k] += 1

    return loop
