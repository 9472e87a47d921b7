"""The compiled loops behind `low_rank`. Imports numba; use `kernels.low_rank`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .codes import BF16, CANONICAL_NAN, F16, F32, F64, ITEMSIZE
from .halves import singles_from_halves
from .low_rank import LANES
from .vectors import F32 as SINGLE
from .vectors import F64 as DOUBLE
from .vectors import I16, I32, I64, constant, load, plus, splat, store, vector

__all__ = ["build_low_rank", "build_spread"]

_WIDTH = 8
# So many rows go through a panel of V before the next one is fetched from the second-level cache.
_ROWS = 16
_CODES = (BF16, F16, F32, F64)
_LOW_RANK = numba.i8(*(numba.u8, numba.i8, numba.u8, *(numba.i8,) * 5, numba.u8, numba.u8, numba.i8, numba.f8))
_SPREAD = numba.i8(numba.u8, *(numba.i8,) * 5, numba.u8, *(numba.i8,) * 3)


def _doubles(builder: Any, address: Any, code: int, width: int) -> Any:
    """Load `width` numbers of a dtype as float64, exactly."""
    if code == F64:
        return load(builder, address, vector(DOUBLE, width))
    if code == F32:
        singles = load(builder, address, vector(SINGLE, width))
    elif code == F16:
        singles = singles_from_halves(builder, load(builder, address, vector(I16, width)))
    else:
        halves = builder.zext(load(builder, address, vector(I16, width)), vector(I32, width))
        singles = builder.bitcast(builder.shl(halves, constant(I32, width, 16)), vector(SINGLE, width))
    return builder.fpext(singles, vector(DOUBLE, width))


def _stored(builder: Any, numbers: Any, code: int, address: Any) -> None:
    """Round float64 to the dtype of the result and store them; the bits of a NaN depend on nothing."""
    width = numbers.type.count
    bits, kind, nan = (I64, DOUBLE, CANONICAL_NAN[F64]) if code == F64 else (I32, SINGLE, CANONICAL_NAN[F32])
    rounded = numbers if code == F64 else builder.fptrunc(numbers, vector(kind, width))
    is_nan = builder.fcmp_unordered("uno", rounded, rounded)
    pattern = builder.bitcast(rounded, vector(bits, width))
    store(builder, builder.select(is_nan, constant(bits, width, nan), pattern), address)


def _step(code: int, width: int, parts: int) -> Any:
    """Make what writes `parts` times `width` elements of one row and one panel."""

    @intrinsic
    def step(typingctx: Any, base: Any, left: Any, right: Any, rank: Any, scale: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            base, left, right, rank, scale, out = arguments
            kind = vector(DOUBLE, width)
            sums = [cgutils.alloca_once(builder, kind) for _ in range(parts)]

            def product(k: Any, number: int) -> Any:
                at = builder.add(right, builder.mul(k, ir.Constant(I64, 8 * LANES)))
                numbers = load(builder, plus(builder, at, 8 * width * number), kind)
                factor = load(builder, builder.add(left, builder.mul(k, ir.Constant(I64, 8))), DOUBLE)
                return builder.fmul(splat(builder, factor, width), numbers)

            for number, total in enumerate(sums):  # from the first product and not from zero: -0.0 stays
                builder.store(product(ir.Constant(I64, 0), number), total)
            with cgutils.for_range(builder, rank, start=ir.Constant(I64, 1)) as loop:
                for number, total in enumerate(sums):
                    builder.store(builder.fadd(builder.load(total), product(loop.index, number)), total)
            by = splat(builder, scale, width)
            for number, total in enumerate(sums):
                first = number * width
                weights = _doubles(builder, plus(builder, base, first * ITEMSIZE[code]), code, width)
                moved = builder.fadd(weights, builder.fmul(by, builder.load(total)))
                _stored(builder, moved, code, plus(builder, out, first * max(4, ITEMSIZE[code])))
            return context.get_dummy_value()

        u, i = types.uint64, types.int64
        return types.void(u, u, u, i, types.float64, u), generate

    return step


def _expander(code: int, width: int) -> Any:
    """Make what writes `width` numbers as float64."""

    @intrinsic
    def expand(typingctx: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            store(builder, _doubles(builder, arguments[0], code, width), arguments[1])
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64), generate

    return expand


def _rows_loop(code: int) -> Any:
    whole, some, one = _step(code, _WIDTH, LANES // _WIDTH), _step(code, _WIDTH, 1), _step(code, 1, 1)
    size, out_size = ITEMSIZE[code], max(4, ITEMSIZE[code])

    @numba.njit(nogil=True, error_model="numpy")
    def rows_loop(base, out, count, first_column, columns, begin, end, left, right, rank, scale):
        last = first_column + count  # as if the first row began at its start
        rows = (last + columns - 1) // columns
        for group in range(0, rows, _ROWS):
            for panel in range((end - begin + LANES - 1) // LANES):
                start = begin + panel * LANES
                numbers = right + np.uint64(8 * panel * LANES * rank)
                for row in range(group, min(group + _ROWS, rows)):
                    low = max(start, first_column) if row == 0 else start
                    high = min(min(start + LANES, end), last - row * columns)
                    factors = left + np.uint64(8 * row * rank)
                    while low < high:
                        here = row * columns + low - first_column
                        weights, goal = base + np.uint64(here * size), out + np.uint64(here * out_size)
                        lanes = numbers + np.uint64(8 * (low - start))
                        if high - low == LANES:
                            whole(weights, factors, lanes, rank, scale, goal)
                            low += LANES
                        elif high - low >= _WIDTH:
                            some(weights, factors, lanes, rank, scale, goal)
                            low += _WIDTH
                        else:
                            one(weights, factors, lanes, rank, scale, goal)
                            low += 1

    return rows_loop


def build_low_rank(stamp: int, **options: Any) -> Any:
    """Compile the loop of `add_low_rank`."""
    bf16, f16, f32, f64 = (_rows_loop(code) for code in _CODES)

    @numba.njit(_LOW_RANK, nogil=True, error_model="numpy", **options)
    def loop(base, code, out, count, first_column, columns, begin, end, left, right, rank, scale):
        if code == BF16:
            bf16(base, out, count, first_column, columns, begin, end, left, right, rank, scale)
        elif code == F16:
            f16(base, out, count, first_column, columns, begin, end, left, right, rank, scale)
        elif code == F32:
            f32(base, out, count, first_column, columns, begin, end, left, right, rank, scale)
        else:
            f64(base, out, count, first_column, columns, begin, end, left, right, rank, scale)
        return np.int64(stamp) & 0

    return loop


def _spread_loop(code: int) -> Any:
    some, one = _expander(code, _WIDTH), _expander(code, 1)
    size = ITEMSIZE[code]

    @numba.njit(nogil=True, error_model="numpy")
    def spread_loop(source, rows, columns, row_step, column_step, target, to_row, to_panel, to_column):
        together = column_step == 1 and to_column == 1
        for row in range(rows):
            for panel in range((columns + LANES - 1) // LANES):
                start = panel * LANES
                width = min(LANES, columns - start)
                here = source + np.uint64(size * (row * row_step + start * column_step))
                there = target + np.uint64(8 * (row * to_row + panel * to_panel))
                done = 0
                if together:
                    while width - done >= _WIDTH:
                        some(here + np.uint64(size * done), there + np.uint64(8 * done))
                        done += _WIDTH
                for column in range(done, width):
                    one(here + np.uint64(size * column * column_step), there + np.uint64(8 * column * to_column))

    return spread_loop


def build_spread(stamp: int, **options: Any) -> Any:
    """Compile the loop of `spread`."""
    bf16, f16, f32, f64 = (_spread_loop(code) for code in _CODES)

    @numba.njit(_SPREAD, nogil=True, error_model="numpy", **options)
    def loop(source, code, rows, columns, row_step, column_step, target, to_row, to_panel, to_column):
        if code == BF16:
            bf16(source, rows, columns, row_step, column_step, target, to_row, to_panel, to_column)
        elif code == F16:
            f16(source, rows, columns, row_step, column_step, target, to_row, to_panel, to_column)
        elif code == F32:
            f32(source, rows, columns, row_step, column_step, target, to_row, to_panel, to_column)
        else:
            f64(source, rows, columns, row_step, column_step, target, to_row, to_panel, to_column)
        return np.int64(stamp) & 0

    return loop
