"""The compiled loop behind `measuring.survey`. Imports numba; use `kernels.measuring`.

In a tree by halves, elements meet that lie an eighth of a block apart, so a step takes the same four lanes of each
eighth and adds the upper three levels in registers, for two rows by two at a time: one load a product. A strip of all
rows (a part of each eighth) goes through centring and all products before the next takes its place in the L1 cache; of
many rows, the strips of a few go through the products at a time. From L2, or from strips that share the sets of L1,
products took twice as long. Meanwhile the next block comes from memory.
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
from .lanes import load_u64
from .vectors import F32 as SINGLE
from .vectors import F64 as DOUBLE
from .vectors import I32, I64, constant, load, plus, store, vector

__all__ = ["ROOM", "ROW", "SCRATCH_BYTES", "build_survey", "rooms", "strips"]

SCRATCH_BYTES = 4 * GROUP * STRIP + 8 * GROUP
_EIGHTH = BLOCK // 8
ROOM = 4 * _EIGHTH
"""Partial sums of four inner products."""

_STRIPS = 8
_STEPS = _EIGHTH // 4 // _STRIPS
ROW = BLOCK // _STRIPS
"""Elements of a row's strip: a part of each eighth, one after the other."""

_MOST_ROWS = 16
"""Strips of more rows than these do not lie in the L1 cache."""
_TEAM = 12
"""Of many rows, so many are multiplied by so many at a time."""

_FOUR = vector(DOUBLE, 4)
_SIZES = np.array(ITEMSIZE, dtype=np.int64)


def _halved(builder: Any, ones: list[Any]) -> Any:
    """Add vectors by halves."""
    while len(ones) > 1:
        half = len(ones) // 2
        ones = [builder.fadd(one, other) for one, other in zip(ones[:half], ones[half:], strict=True)]
    return ones[0]


@intrinsic
def _products(typingctx, left, right, other_left, other_right, room):
    """Write the sums over eighths of left·right, left·other_right, other_left·right, other_left·other_right."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, other_left, other_right, room = arguments
        with cgutils.for_range(builder, ir.Constant(I64, _STEPS)) as step:
            at = builder.mul(step.index, ir.Constant(I64, 32))
            homes = [builder.add(one, at) for one in (left, other_left, right, other_right)]
            products: list[list[Any]] = [[], [], [], []]
            for eighth in range(8):
                a, b, c, d = (load(builder, plus(builder, h, 32 * _STEPS * eighth), _FOUR) for h in homes)
                for of_pair, (x, y) in zip(products, ((a, c), (a, d), (b, c), (b, d)), strict=True):
                    of_pair.append(builder.fmul(x, y))
            there = builder.add(room, builder.mul(step.index, ir.Constant(I64, 128)))
            for place, of_pair in enumerate(products):
                store(builder, _halved(builder, of_pair), plus(builder, there, 32 * place))
        return context.get_dummy_value()

    u = types.uint64
    return types.void(u, u, u, u, u), generate


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
    def centre(typingctx, pointers, offset, rows, count, based):
        """Write a strip of the first source, and of the differences of the others from it.

        `pointers` is the address of a table of `count` sources, `offset` in bytes. Returns how many elements vary,
        moved, and conflict.
        """

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointers, offset, rows, count, based = arguments
            counts = [cgutils.alloca_once_value(builder, constant(I64, 4, 0)) for _ in range(3)]
            has_base = builder.icmp_signed("!=", based, ir.Constant(I64, 0))
            zero, eight = constant(DOUBLE, 4, 0.0), ir.Constant(I64, 8)
            limits = (float("inf"), "<"), (float("-inf"), ">")
            starts = [builder.select(has_base, constant(DOUBLE, 4, limit), zero) for limit, _ in limits]
            bounds = [[cgutils.alloca_once_value(builder, start) for _ in range(4)] for start in starts]
            others = builder.sub(count, ir.Constant(I64, 1))

            def sixteen(inside: Any, home: Any) -> None:
                first = builder.add(load(builder, pointers, I64), inside)
                centres = [read(builder, plus(builder, first, 4 * itemsize * n)) for n in range(4)]
                for n, one in enumerate(centres):
                    store(builder, one, plus(builder, home, 32 * n))
                for of_four, start in zip(bounds, starts, strict=True):
                    for bound in of_four:
                        builder.store(start, bound)
                with cgutils.for_range(builder, others) as row:
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
                        builder.store(builder.sub(builder.load(one), builder.sext(flag, vector(I64, 4))), one)

            groups = ir.Constant(I64, _STEPS // 4)
            with cgutils.for_range(builder, eight) as eighth:
                begin = builder.add(offset, builder.mul(eighth.index, ir.Constant(I64, _EIGHTH * itemsize)))
                with cgutils.for_range(builder, groups) as group:
                    number = builder.add(builder.mul(eighth.index, groups), group.index)
                    home = builder.add(rows, builder.mul(number, ir.Constant(I64, 128)))
                    sixteen(builder.add(begin, builder.mul(group.index, ir.Constant(I64, 16 * itemsize))), home)
            totals = []
            for one in counts:
                lanes, total = builder.load(one), ir.Constant(I64, 0)
                for lane in range(4):
                    total = builder.add(total, builder.extract_element(lanes, ir.Constant(I32, lane)))
                totals.append(total)
            return context.make_tuple(builder, signature.return_type, totals)

        i, u = types.int64, types.uint64
        return types.UniTuple(i, 3)(u, i, u, i, i), generate

    return centre


_centre_bf16, _centre_f16 = _centrer(2, _bf16), _centrer(2, _f16)
_centre_f32, _centre_f64 = _centrer(4, _f32), _centrer(8, _f64)


@numba.njit(nogil=True, inline="always")
def _centre(code, pointers, offset, rows, count, based):
    if code == BF16:
        return _centre_bf16(pointers, offset, rows, count, based)
    if code == F16:
        return _centre_f16(pointers, offset, rows, count, based)
    if code == F32:
        return _centre_f32(pointers, offset, rows, count, based)
    return _centre_f64(pointers, offset, rows, count, based)


@intrinsic
def _prefetch(typingctx, address):
    """Ask for a cache line, which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        numbers = [ir.Constant(I32, number) for number in (0, 2, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], byte), *numbers])
        return context.get_dummy_value()

    return types.void(types.uint64), generate


@intrinsic
def _fold(typingctx, room):
    """Add the partial sums of four products by halves, to the first four numbers of each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (room,) = arguments

        def add(home: Any, distance: int) -> None:
            for place in range(4):
                here = plus(builder, home, 32 * place)
                ones = [load(builder, plus(builder, here, distance * eighth), _FOUR) for eighth in range(8)]
                store(builder, _halved(builder, ones), here)

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
def _multiply(strip, count, top, side, team, number, room):
    """Write the partial sums of the products of a team of rows, from `top` on, with another, from `side` on."""
    row_bytes, tile = np.uint64(8 * ROW), 0
    for a in range(top, min(top + team, count), 2):
        left, other_left = strip + row_bytes * np.uint64(a), strip + row_bytes * np.uint64(min(a + 1, count - 1))
        for b in range(side, min(side + team, a + 1), 2):
            right, other_right = strip + row_bytes * np.uint64(b), strip + row_bytes * np.uint64(min(b + 1, count - 1))
            partial = np.uint64(room[tile].ctypes.data) + np.uint64(128 * _STEPS * number)
            _products(left, right, other_left, other_right, partial)
            tile += 1


@numba.njit(nogil=True, inline="always")
def _settle(count, top, side, team, room, out):
    """Add up what `_multiply` wrote of all strips, and write what is in the triangle."""
    tile = 0
    for a in range(top, min(top + team, count), 2):
        for b in range(side, min(side + team, a + 1), 2):
            sums = room[tile]
            _fold(np.uint64(sums.ctypes.data))
            for place in range(4):
                i, k = a + place // 2, b + place % 2
                if k <= i < count:
                    first = sums[4 * place] + sums[4 * place + 2]
                    out[i * (i + 1) // 2 + k] = first + (sums[4 * place + 1] + sums[4 * place + 3])
            tile += 1


@numba.njit(nogil=True, inline="always")
def _measure(code, pointers, offset, rows, count, based, room, out, ahead):
    """Centre a block of all sources; write the triangle of their inner products, and three counts."""
    start, size = np.uint64(rows.ctypes.data), _SIZES[code]
    few = count <= _MOST_ROWS
    apart = np.uint64(0 if few else 8 * ROW * count)
    varying = moved = conflicts = 0
    for number in range(_STRIPS):
        if ahead:
            for k in range(count):
                there = load_u64(pointers + np.uint64(8 * k)) + np.uint64(offset + (BLOCK + ROW * number) * size)
                for line in range(ROW * size // 64):
                    _prefetch(there + np.uint64(64 * line))
        strip = start + apart * np.uint64(number)
        found = _centre(code, pointers, offset + 4 * _STEPS * number * size, strip, count, based)
        varying, moved, conflicts = varying + found[0], moved + found[1], conflicts + found[2]
        if few:
            _multiply(strip, count, 0, 0, count, number, room)
    if few:
        _settle(count, 0, 0, count, room, out)
    else:
        for top in range(0, count, _TEAM):
            for side in range(0, top + 1, _TEAM):
                for number in range(_STRIPS):
                    _multiply(start + apart * np.uint64(number), count, top, side, _TEAM, number, room)
                _settle(count, top, side, _TEAM, room, out)
    end = count * (count + 1) // 2
    out[end], out[end + 1], out[end + 2] = varying, moved, conflicts


def strips(count: int) -> int:
    """Return how many strips of rows are held at a time."""
    return count if count <= _MOST_ROWS else count * _STRIPS


def rooms(count: int) -> int:
    """Return for how many fours of products at a time there must be room."""
    half = (count + 1) // 2
    return half * (half + 1) // 2 if count <= _MOST_ROWS else (_TEAM // 2) ** 2


_F64_1, _F64_2 = numba.types.Array(numba.f8, 1, "C"), numba.types.Array(numba.f8, 2, "C")
_U8, _U64, _I64 = (numba.types.Array(t, 1, "C") for t in (numba.u1, numba.u8, numba.i8))
_SURVEY = numba.void(
    _U64, _U8, numba.i8, numba.i8, numba.i8, numba.i8, _F64_2, _U64, _I64, _F64_1, _F64_2, _F64_2, _F64_2, _U64, _U8
)  # fmt: skip


def build_survey(stamp: int) -> Any:
    """Compile the loop of `survey`."""

    @numba.njit(_SURVEY, nogil=True, cache=True)
    def loop(
        sources, codes, begin, elements, first_block, based, out, digests, nonfinite,
        one, decoded, rows, room, places, scratch,
    ):  # fmt: skip
        count, code = len(sources), np.int64(codes[0])
        stage = np.uint64(scratch.ctypes.data) + np.uint64(stamp & 0)
        plain = code in (BF16, F16, F32, F64)
        for k in range(count):
            plain &= np.int64(codes[k]) == code
            places[k] = np.uint64(decoded[k].ctypes.data)
        for number in range(out.shape[0]):
            at = begin + number * BLOCK
            length = min(BLOCK, elements - number * BLOCK)
            for k in range(count):
                size = _SIZES[codes[k]]
                digests[k] += block_digest(sources[k] + np.uint64(at * size), length * size, first_block + number)
            found = out[number]
            if plain and length == BLOCK:
                pointers, ahead = np.uint64(sources.ctypes.data), number + 1 < out.shape[0]
                _measure(code, pointers, at * _SIZES[code], rows, count, based, room, found, ahead)
            else:
                for k in range(count):
                    _decode(sources[k : k + 1], codes[k : k + 1], one, at, length, decoded[k], stage)
                _measure(F64, np.uint64(places.ctypes.data), 0, rows, count, based, room, found, False)
            finite = True
            for k in range(count):
                value = found[k * (k + 1) // 2 + k]
                finite &= value - value == 0.0
            if not finite:
                for k in range(count):
                    _decode(sources[k : k + 1], codes[k : k + 1], one, at, length, decoded[0], stage)
                    for j in range(length):
                        value = decoded[0, j]
                        if value - value != 0.0:
                            nonfinite[k] += 1

    return loop
