"""Products of the rows of a strip, four by four at most, and how their partial sums are added up.

Lane l of a strip sums, one after the other, what elements l, l + 4, l + 8 ... of the strip give; the sums of the strips
are added by halves, then the lanes. So what is summed stays in registers: ten sums of a triangle and four factors fill
the sixteen of AVX2, and a product and a sum take half a cycle (Zen 3). When products of a block were added by halves
from the start, it took twice as long, since most of them were spilled.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

import platform
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .codes import BLOCK
from .measuring import STRIP
from .vectors import F32 as SINGLE
from .vectors import F64 as DOUBLE
from .vectors import I32, I64, constant, load, plus, store, vector

__all__ = ["ROW", "ROWS", "STRIPS", "SUMS", "square", "total", "triangle"]

ROW = STRIP
"""Elements of a row in a strip. Eight rows are half of L1; with 128 elements all took a tenth longer."""

STRIPS = BLOCK // ROW

SUMS = 4 * STRIPS
"""Partial sums of one product."""

ROWS = 4
"""Rows that are multiplied by so many at a time."""

_FOUR = vector(DOUBLE, 4)
_FUSES = platform.machine() in ("aarch64", "arm64") or bool(llvm.get_host_cpu_features().get("fma"))


def _summed(builder: Any, one: Any, other: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(one, other))


def _fused(builder: Any, one: Any, other: Any, total: Any) -> Any:
    """Do the same where products are exact: one rounding either way, so the bits are the same on any device."""
    if not _FUSES:
        return _summed(builder, one, other, total)
    kind = ir.FunctionType(_FOUR, [_FOUR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v4f64"), [one, other, total])


def _tile(rows: int, columns: int, *, short: bool) -> Any:
    """Make the loop over `rows` by `columns` products, or over those of a triangle where there are no columns.

    `short`: numbers are float32, differences that were not rounded, so products of them have 48 bits and are exact.
    """
    size, add = (4, _fused) if short else (8, _summed)
    pairs = [(i, k) for i in range(rows) for k in range(columns or i + 1)]

    @intrinsic
    def products(typingctx, left, right, room, width):
        """Write the sums of a strip: the first one at `room`, the first of the next row `width` bytes on."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            left, right, room, width = arguments
            zero, none = constant(DOUBLE, 4, 0.0), ir.Constant(I64, 0)
            before = builder.append_basic_block("before")
            builder.branch(before)
            builder.position_at_end(before)
            loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            at, sums = builder.phi(I64), [builder.phi(_FOUR) for _ in pairs]
            homes = [builder.add(one, at) for one in (left, right)]

            def read(home: Any, row: int) -> Any:
                found = load(builder, plus(builder, home, size * ROW * row), vector(SINGLE if short else DOUBLE, 4))
                return builder.fpext(found, _FOUR) if short else found

            ones = [read(homes[0], i) for i in range(rows)]
            others = [read(homes[1], k) for k in range(columns)] or ones
            new = [add(builder, ones[i], others[k], one) for one, (i, k) in zip(sums, pairs, strict=True)]
            following = plus(builder, at, 4 * size)
            for value, start, step in zip([at, *sums], [none, *[zero] * len(sums)], [following, *new], strict=True):
                value.add_incoming(start, before)
                value.add_incoming(step, loop)
            builder.cbranch(builder.icmp_unsigned("<", following, ir.Constant(I64, size * ROW)), loop, after)
            builder.position_at_end(after)
            for one, (i, k) in zip(new, pairs, strict=True):
                home = builder.add(room, builder.mul(width, ir.Constant(I64, i)))
                store(builder, one, plus(builder, home, 8 * SUMS * k))
            return context.get_dummy_value()

        u = types.uint64
        return types.void(u, u, u, u), generate

    return products


_triangle_1, _triangle_2, _triangle_3, _triangle_4 = (_tile(n, 0, short=False) for n in range(1, 5))
_half_1, _half_2, _half_3, _half_4 = (_tile(n, ROWS // 2, short=False) for n in range(1, 5))
_short_triangle_1, _short_triangle_2, _short_triangle_3, _short_triangle_4 = (
    _tile(n, 0, short=True) for n in range(1, 5)
)
_short_half_1, _short_half_2, _short_half_3, _short_half_4 = (_tile(n, ROWS // 2, short=True) for n in range(1, 5))


@numba.njit(nogil=True)
def triangle(short, rows, left, room, width):
    """Multiply up to four rows of a strip by one another."""
    if short:
        if rows == 4:
            _short_triangle_4(left, left, room, width)
        elif rows == 3:
            _short_triangle_3(left, left, room, width)
        elif rows == 2:
            _short_triangle_2(left, left, room, width)
        else:
            _short_triangle_1(left, left, room, width)
    elif rows == 4:
        _triangle_4(left, left, room, width)
    elif rows == 3:
        _triangle_3(left, left, room, width)
    elif rows == 2:
        _triangle_2(left, left, room, width)
    else:
        _triangle_1(left, left, room, width)


@numba.njit(nogil=True)
def square(short, rows, left, right, room, width):
    """Multiply up to four rows of a strip by four others, two at a time: eight sums do not wait for one another."""
    for half in range(2):
        side, place = right + np.uint64((4 if short else 8) * ROW * 2 * half), room + np.uint64(8 * SUMS * 2 * half)
        if short:
            if rows == 4:
                _short_half_4(left, side, place, width)
            elif rows == 3:
                _short_half_3(left, side, place, width)
            elif rows == 2:
                _short_half_2(left, side, place, width)
            else:
                _short_half_1(left, side, place, width)
        elif rows == 4:
            _half_4(left, side, place, width)
        elif rows == 3:
            _half_3(left, side, place, width)
        elif rows == 2:
            _half_2(left, side, place, width)
        else:
            _half_1(left, side, place, width)


@intrinsic
def total(typingctx, sums):
    """Add up the partial sums of one product."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        ones = [load(builder, plus(builder, arguments[0], 32 * strip), _FOUR) for strip in range(STRIPS)]
        while len(ones) > 1:
            half = len(ones) // 2
            ones = [builder.fadd(one, other) for one, other in zip(ones[:half], ones[half:], strict=True)]
        lanes = [builder.extract_element(ones[0], ir.Constant(I32, lane)) for lane in range(4)]
        return builder.fadd(builder.fadd(lanes[0], lanes[2]), builder.fadd(lanes[1], lanes[3]))

    return types.float64(types.uint64), generate
