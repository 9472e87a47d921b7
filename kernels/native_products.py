"""The compiled loop behind `measuring.products`. Imports numba; use `kernels.measuring`.

A block of the last row is decoded once and stays in the L1 cache, while the same block of every other source comes by:
one conversion, one multiplication and one addition for each of its elements. In a tree by halves, elements meet that
lie an eighth of a block apart: the upper three levels are added in registers.
"""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .blocks import add_sources
from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE
from .given import GROUP, STRIP
from .halves import singles_from_halves
from .vectors import F32 as SINGLE
from .vectors import F64 as DOUBLE
from .vectors import I32, I64, constant, load, part, plus, prefetch, store, vector

__all__ = ["ROOM", "SCRATCH_BYTES", "build_products"]

SCRATCH_BYTES = 4 * GROUP * STRIP + 8 * GROUP
_EIGHTH = BLOCK // 8
ROOM = _EIGHTH
"""Partial sums of one inner product."""

_LANES = 8
# Elements that meet at the upper three levels, in the order in which their sums need the fewest registers.
_PAIRS = ((0, 4), (2, 6), (1, 5), (3, 7))
_SIZES = np.array(ITEMSIZE, dtype=np.int64)


def _bf16(builder: Any, address: Any) -> Any:
    half = load(builder, address, vector(ir.IntType(16), _LANES))
    wide = builder.shl(builder.zext(half, vector(I32, _LANES)), constant(I32, _LANES, 16))
    return builder.fpext(builder.bitcast(wide, vector(SINGLE, _LANES)), vector(DOUBLE, _LANES))


def _f16(builder: Any, address: Any) -> Any:
    half = load(builder, address, vector(ir.IntType(16), _LANES))
    return builder.fpext(singles_from_halves(builder, half), vector(DOUBLE, _LANES))


def _f32(builder: Any, address: Any) -> Any:
    return builder.fpext(load(builder, address, vector(SINGLE, _LANES)), vector(DOUBLE, _LANES))


def _f64(builder: Any, address: Any) -> Any:
    return load(builder, address, vector(DOUBLE, _LANES))


def _multiplier(itemsize: int, read: Any) -> Any:
    @intrinsic
    def multiply(typingctx, source, row, room):
        """Return the inner product of a block of a source with a decoded row."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, row, room = arguments

            def product(at: Any, eighth: int) -> Any:
                theirs = builder.add(source, builder.mul(at, ir.Constant(I64, itemsize)))
                ours = builder.add(row, builder.mul(at, ir.Constant(I64, 8)))
                left = read(builder, plus(builder, theirs, itemsize * _EIGHTH * eighth))
                return builder.fmul(left, load(builder, plus(builder, ours, 8 * _EIGHTH * eighth), left.type))

            steps = _EIGHTH // _LANES
            with cgutils.for_range(builder, ir.Constant(I64, steps)) as step:
                at = builder.mul(step.index, ir.Constant(I64, _LANES))
                a, b, c, d = (builder.fadd(product(at, low), product(at, high)) for low, high in _PAIRS)
                total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
                share = BLOCK * itemsize // steps
                following = builder.add(source, builder.mul(step.index, ir.Constant(I64, share)))
                for line in range(0, share, 64):
                    prefetch(builder, plus(builder, following, BLOCK * itemsize + line))
                store(builder, total, builder.add(room, builder.mul(at, ir.Constant(I64, 8))))
            lanes = _EIGHTH
            while lanes > _LANES:
                lanes //= 2
                with cgutils.for_range(builder, ir.Constant(I64, lanes // _LANES)) as step:
                    here = builder.add(room, builder.mul(step.index, ir.Constant(I64, 8 * _LANES)))
                    ones = [load(builder, plus(builder, here, 8 * gap), vector(DOUBLE, _LANES)) for gap in (0, lanes)]
                    store(builder, builder.fadd(*ones), here)
            total = load(builder, room, vector(DOUBLE, _LANES))
            while lanes > 1:
                lanes //= 2
                total = builder.fadd(part(builder, total, 0, lanes), part(builder, total, lanes, lanes))
            return builder.extract_element(total, ir.Constant(I32, 0))

        u = types.uint64
        return types.float64(u, u, u), generate

    return multiply


_multiply_bf16, _multiply_f16 = _multiplier(2, _bf16), _multiplier(2, _f16)
_multiply_f32, _multiply_f64 = _multiplier(4, _f32), _multiplier(8, _f64)

_F64_1, _F64_2 = numba.types.Array(numba.f8, 1, "C"), numba.types.Array(numba.f8, 2, "C")
_U8, _U64 = (numba.types.Array(t, 1, "C") for t in (numba.u1, numba.u8))
_PRODUCTS = numba.void(_U64, _U8, numba.i8, numba.i8, _F64_2, _F64_1, _F64_2, _F64_1, _U8)


def build_products(stamp: int) -> Any:
    """Compile the loop of `products`."""

    @numba.njit(_PRODUCTS, nogil=True, cache=True)
    def loop(sources, codes, begin, elements, out, one, rows, room, scratch):
        last = len(sources) - 1
        stage = np.uint64(scratch.ctypes.data) + np.uint64(stamp & 0)
        places = stage + np.uint64(4 * GROUP * STRIP)
        unused = np.uint64(0)
        ours, theirs = np.uint64(rows[0].ctypes.data), np.uint64(rows[1].ctypes.data)
        sums = np.uint64(room.ctypes.data)
        for block in range(out.shape[0]):
            at = begin + block * BLOCK
            length = min(BLOCK, elements - block * BLOCK)
            rows[0, length:] = 0.0
            rows[1, length:] = 0.0
            add_sources(sources[last:], codes[last:], one, at, 0, length, ours, (stage, places), unused)
            for k in range(last):
                code = np.int64(codes[k])
                source = sources[k] + np.uint64(at * _SIZES[code])
                if length == BLOCK and code == BF16:
                    out[block, k] = _multiply_bf16(source, ours, sums)
                elif length == BLOCK and code == F16:
                    out[block, k] = _multiply_f16(source, ours, sums)
                elif length == BLOCK and code == F32:
                    out[block, k] = _multiply_f32(source, ours, sums)
                elif length == BLOCK and code == F64:
                    out[block, k] = _multiply_f64(source, ours, sums)
                else:
                    add_sources(
                        sources[k : k + 1], codes[k : k + 1], one, at, 0, length, theirs, (stage, places), unused
                    )
                    out[block, k] = _multiply_f64(theirs, ours, sums)

    return loop
