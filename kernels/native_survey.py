"""The compiled loop behind `measuring.survey`. Imports numba; use `kernels.measuring`.

In a tree by halves, elements meet that lie an eighth of a block apart, so a step takes the same four lanes of each
eighth and adds the upper three levels in registers, for two rows by two at a time: one load a product. A strip of all
rows goes through centring and all products while it lies in the L1 cache: from L2 the products took three times as
long.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import GROUP, STRIP, add_sources
from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE
from .hashing import block_digest
from .vectors import F32 as SINGLE
from .vectors import F64 as DOUBLE
from .vectors import I32, I64, constant, load, plus, store, vector

__all__ = ["ROOM", "ROW", "SCRATCH_BYTES", "build_survey", "rooms"]

ROW = BLOCK + 32
"""Elements from one row to the next: the strips of eight rows fill a cache of eight ways evenly."""

SCRATCH_BYTES = 4 * GROUP * STRIP + 8 * GROUP
_EIGHTH = BLOCK // 8
ROOM = 4 * _EIGHTH
"""Partial sums of four inner products."""

_STEPS = _EIGHTH // 4
_STRIP_STEPS = 8
_MOST_ROWS = 16
"""Strips of more rows than these do not lie in the L1 cache, and their partial sums not in L2."""

_FOUR = vector(DOUBLE, 4)
_SIZES = np.array(ITEMSIZE, dtype=np.int64)
_TREE = ((0, 4), (2, 6), (1, 5), (3, 7))


@intrinsic
def _products(typingctx, left, right, other_left, other_right, room, first, steps):
    """Write the sums over eighths of left·right, left·other_right, other_left·right, other_left·other_right."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, other_left, other_right, room, first, steps = arguments
        with cgutils.for_range(builder, steps) as step:
            number = builder.add(first, step.index)
            at = builder.mul(number, ir.Constant(I64, 32))
            homes = [builder.add(one, at) for one in (left, other_left, right, other_right)]
            halves: list[list[Any]] = [[], [], [], []]
            for pair in _TREE:
                quarters: list[list[Any]] = [[], [], [], []]
                for eighth in pair:
                    a, b, c, d = (load(builder, plus(builder, h, 8 * _EIGHTH * eighth), _FOUR) for h in homes)
                    for place, (x, y) in enumerate(((a, c), (a, d), (b, c), (b, d))):
                        quarters[place].append(builder.fmul(x, y))
                for place, (one, other) in enumerate(quarters):
                    halves[place].append(builder.fadd(one, other))
                    if len(halves[place]) == 2 and pair == _TREE[1]:
                        halves[place] = [builder.fadd(*halves[place])]
            there = builder.add(room, builder.mul(number, ir.Constant(I64, 128)))
            for place, (upper, one, other) in enumerate(halves):
                total = builder.fadd(upper, builder.fadd(one, other))
                store(builder, total, plus(builder, there, 32 * place))
        return context.get_dummy_value()

    i, u = types.int64, types.uint64
    return types.void(u, u, u, u, u, i, i), generate


def _bf16(builder: Any, address: Any) -> Any:
    half = load(builder, address, vector(ir.IntType(16), 4))
    wide = builder.shl(builder.zext(half, vector(I32, 4)), constant(I32, 4, 16))
    return builder.fpext(builder.bitcast(wide, vector(SINGLE, 4)), _FOUR)


def _f16(builder: Any, address: Any) -> Any:
    return builder.fpext(builder.fpext(load(builder, address, vector(ir.HalfType(), 4)), vector(SINGLE, 4)), _FOUR)


def _f32(builder: Any, address: Any) -> Any:
    return builder.fpext(load(builder, address, vector(SINGLE, 4)), _FOUR)


def _f64(builder: Any, address: Any) -> Any:
    return load(builder, address, _FOUR)


def _centrer(itemsize: int, read: Any) -> Any:
    @intrinsic
    def centre(typingctx, pointers, offset, rows, count, based, groups):
        """Write groups of 16 elements of the first source, and of the differences of the others from it.

        `pointers` is the address of a table of `count` sources, `offset` in bytes; they may be the rows. Returns how
        many elements vary, moved, and conflict.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers, offset, rows, count, based, groups = arguments
            counts = [cgutils.alloca_once_value(builder, constant(I64, 4, 0)) for _ in range(3)]
            has_base = builder.icmp_signed("!=", based, ir.Constant(I64, 0))
            zero, eight = constant(DOUBLE, 4, 0.0), ir.Constant(I64, 8)
            limits = (float("inf"), "<"), (float("-inf"), ">")
            starts = [builder.select(has_base, constant(DOUBLE, 4, limit), zero) for limit, _ in limits]
            with cgutils.for_range(builder, groups) as step:
                inside = builder.add(offset, builder.mul(step.index, ir.Constant(I64, 16 * itemsize)))
                home = builder.add(rows, builder.mul(step.index, ir.Constant(I64, 128)))
                first = builder.add(load(builder, pointers, I64), inside)
                centres = [read(builder, plus(builder, first, 4 * itemsize * n)) for n in range(4)]
                for n, one in enumerate(centres):
                    store(builder, one, plus(builder, home, 32 * n))
                bounds = [[cgutils.alloca_once_value(builder, start) for _ in range(4)] for start in starts]
                for of_four, start in zip(bounds, starts, strict=True):
                    for bound in of_four:
                        builder.store(start, bound)
                with cgutils.for_range(builder, builder.sub(count, ir.Constant(I64, 1))) as row:
                    number = builder.add(row.index, ir.Constant(I64, 1))
                    entry = builder.add(pointers, builder.mul(number, eight))
                    source = builder.add(load(builder, entry, I64), inside)
                    there = builder.add(home, builder.mul(number, ir.Constant(I64, 8 * ROW)))
                    for n in range(4):
                        value = builder.fsub(read(builder, plus(builder, source, 4 * itemsize * n)), centres[n])
                        store(builder, value, plus(builder, there, 32 * n))
                        for of_four, (_, relation) in zip(bounds, limits, strict=True):
                            old = builder.load(of_four[n])
                            closer = builder.fcmp_ordered(relation, value, old)
                            builder.store(builder.select(closer, value, old), of_four[n])
                for n in range(4):
                    low, high = (builder.load(of_four[n]) for of_four in bounds)
                    below, above = builder.fcmp_ordered("<", low, zero), builder.fcmp_ordered(">", high, zero)
                    flags = builder.fcmp_ordered("<", low, high), builder.or_(below, above), builder.and_(below, above)
                    for one, flag in zip(counts, flags, strict=True):
                        builder.store(builder.add(builder.load(one), builder.zext(flag, vector(I64, 4))), one)
            totals = []
            for one in counts:
                lanes, total = builder.load(one), ir.Constant(I64, 0)
                for lane in range(4):
                    total = builder.add(total, builder.extract_element(lanes, ir.Constant(I32, lane)))
                totals.append(total)
            return context.make_tuple(builder, signature.return_type, totals)

        i, u = types.int64, types.uint64
        return types.UniTuple(i, 3)(u, i, u, i, i, i), generate

    return centre


_centre_bf16, _centre_f16 = _centrer(2, _bf16), _centrer(2, _f16)
_centre_f32, _centre_f64 = _centrer(4, _f32), _centrer(8, _f64)


@numba.njit(nogil=True, inline="always")
def _centre(code, pointers, offset, rows, count, based, groups):
    if code == BF16:
        return _centre_bf16(pointers, offset, rows, count, based, groups)
    if code == F16:
        return _centre_f16(pointers, offset, rows, count, based, groups)
    if code == F32:
        return _centre_f32(pointers, offset, rows, count, based, groups)
    return _centre_f64(pointers, offset, rows, count, based, groups)


@intrinsic
def _fold(typingctx, room):
    """Add the partial sums of four products by halves, to the first four numbers of each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (room,) = arguments

        def add(home: Any, distance: int) -> None:
            for place in range(4):
                here = plus(builder, home, 32 * place)
                ones = [load(builder, plus(builder, here, distance * eighth), _FOUR) for eighth in range(8)]
                while len(ones) > 1:
                    half = len(ones) // 2
                    ones = [builder.fadd(one, other) for one, other in zip(ones[:half], ones[half:], strict=True)]
                store(builder, ones[0], here)

        with cgutils.for_range(builder, ir.Constant(I64, 8)) as step:
            add(builder.add(room, builder.mul(step.index, ir.Constant(I64, 128))), 8 * 128)
        add(room, 128)
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@numba.njit(nogil=True, inline="always")
def _decode(source, code, one, begin, length, row, stage):
    """Write a block of a source as float64, with zeros after its end."""
    for j in range(length, BLOCK):
        row[j] = 0.0
    places = stage + np.uint64(4 * GROUP * STRIP)
    target = np.uint64(row.ctypes.data)
    add_sources(source, code, one, begin, 0, length, target, (stage, places), np.uint64(0))


@numba.njit(nogil=True, inline="always")
def _settle(room, a, b, count, out):
    """Add the partial sums of four products, and write those of the triangle."""
    _fold(np.uint64(room.ctypes.data))
    for place in range(4):
        i, k = a + place // 2, b + place % 2
        if k <= i < count:
            first = room[4 * place] + room[4 * place + 2]
            out[i * (i + 1) // 2 + k] = first + (room[4 * place + 1] + room[4 * place + 3])


@numba.njit(nogil=True, inline="always")
def _measure(code, pointers, offset, rows, count, based, room, out):
    """Centre a block of all sources; write the triangle of their inner products, and three counts."""
    start, step, size = np.uint64(rows.ctypes.data), np.uint64(8 * ROW), _SIZES[code]
    small = count <= _MOST_ROWS
    steps = _STRIP_STEPS if small else _STEPS
    varying = moved = conflicts = 0
    for first in range(0, _STEPS, steps):
        for eighth in range(8):
            at = _EIGHTH * eighth + 4 * first
            found = _centre(code, pointers, offset + at * size, start + np.uint64(8 * at), count, based, steps // 4)
            varying, moved, conflicts = varying + found[0], moved + found[1], conflicts + found[2]
        tile = 0
        for a in range(0, count, 2):
            left, other_left = start + step * np.uint64(a), start + step * np.uint64(min(a + 1, count - 1))
            for b in range(0, a + 1, 2):
                right, other_right = start + step * np.uint64(b), start + step * np.uint64(min(b + 1, count - 1))
                _products(left, right, other_left, other_right, np.uint64(room[tile].ctypes.data), first, steps)
                if small:
                    tile += 1
                else:
                    _settle(room[0], a, b, count, out)
    if small:
        tile = 0
        for a in range(0, count, 2):
            for b in range(0, a + 1, 2):
                _settle(room[tile], a, b, count, out)
                tile += 1
    end = count * (count + 1) // 2
    out[end], out[end + 1], out[end + 2] = varying, moved, conflicts


def rooms(count: int) -> int:
    """Return for how many products at a time there must be room."""
    half = (count + 1) // 2
    return half * (half + 1) // 2 if count <= _MOST_ROWS else 1


_F64_1, _F64_2 = numba.types.Array(numba.f8, 1, "C"), numba.types.Array(numba.f8, 2, "C")
_U8, _U64, _I64 = (numba.types.Array(t, 1, "C") for t in (numba.u1, numba.u8, numba.i8))
_SURVEY = numba.void(
    _U64, _U8, numba.i8, numba.i8, numba.i8, numba.i8, _F64_2, _U64, _I64, _F64_1, _F64_2, _F64_2, _U64, _U8
)  # fmt: skip


def build_survey(stamp: int) -> Any:
    """Compile the loop of `survey`."""

    @numba.njit(_SURVEY, nogil=True, cache=True)
    def loop(
        sources, codes, begin, elements, first_block, based, out, digests, nonfinite, one, rows, room, places, scratch
    ):
        count, code = len(sources), np.int64(codes[0])
        stage = np.uint64(scratch.ctypes.data) + np.uint64(stamp & 0)
        plain = code in (BF16, F16, F32, F64)
        for k in range(count):
            plain &= np.int64(codes[k]) == code
            places[k] = np.uint64(rows[k].ctypes.data)
        for number in range(out.shape[0]):
            at = begin + number * BLOCK
            length = min(BLOCK, elements - number * BLOCK)
            for k in range(count):
                size = _SIZES[codes[k]]
                digests[k] += block_digest(sources[k] + np.uint64(at * size), length * size, first_block + number)
            found = out[number]
            if plain and length == BLOCK:
                pointers = np.uint64(sources.ctypes.data)
                _measure(code, pointers, at * _SIZES[code], rows, count, based, room, found)
            else:
                for k in range(count):
                    _decode(sources[k : k + 1], codes[k : k + 1], one, at, length, rows[k], stage)
                _measure(F64, np.uint64(places.ctypes.data), 0, rows, count, based, room, found)
            finite = True
            for k in range(count):
                value = found[k * (k + 1) // 2 + k]
                finite &= value - value == 0.0
            if not finite:
                for k in range(count):
                    _decode(sources[k : k + 1], codes[k : k + 1], one, at, length, rows[0], stage)
                    for j in range(length):
                        value = rows[0, j]
                        if value - value != 0.0:
                            nonfinite[k] += 1

    return loop
