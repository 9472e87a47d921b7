"""The compiled loops behind `block_scaled`. Imports numba; use `kernels.block_scaled`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator,call-arg"

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .codes import BF16, CANONICAL_NAN, F16, F32, ITEMSIZE
from .expanding import expand_f8
from .halves import singles_from_halves
from .lanes import load_f32
from .vectors import F32 as SINGLE
from .vectors import I8, I16, I32, I64, constant, load, splat, store, vector

__all__ = ["build_dequantise", "build_largest", "build_quantise"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)
_WIDTH = 8
_CODES = (BF16, F16, F32)
_LARGEST_E4M3 = 448.0
_LEAST_NORMAL_E4M3 = 2.0**-6
_SPLITTER = 2.0**14  # the last bit of its float32 neighbours is 2**-9, the least subnormal of e4m3
_NAN_E4M3 = 0x7F


def _in_vectors(builder: Any, count: Any, body: Any) -> None:
    """Go through `count` elements, eight at a time and then one at a time: `body(first, width)`."""
    whole = builder.sdiv(count, ir.Constant(I64, _WIDTH))
    done = builder.mul(whole, ir.Constant(I64, _WIDTH))
    for begin, steps, width in ((ir.Constant(I64, 0), whole, _WIDTH), (done, builder.sub(count, done), 1)):
        with cgutils.for_range(builder, steps) as step:
            body(builder.add(begin, builder.mul(step.index, ir.Constant(I64, width))), width)


def _words(builder: Any, address: Any, at: Any, code: int, width: int) -> Any:
    """Load elements as the 32-bit integers of what they are as float32."""
    place = builder.add(address, builder.mul(at, ir.Constant(I64, ITEMSIZE[code])))
    if code == F32:
        return load(builder, place, vector(I32, width))
    halves = load(builder, place, vector(I16, width))
    if code == F16:
        return builder.bitcast(singles_from_halves(builder, halves), vector(I32, width))
    return builder.shl(builder.zext(halves, vector(I32, width)), constant(I32, width, 16))


@intrinsic
def _multiply(typingctx, target, count, scale):
    """Multiply float32 numbers in their place; the bits of a NaN depend on nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, count, scale = arguments
        scale = builder.fptrunc(scale, SINGLE)

        def body(first: Any, width: int) -> None:
            place = builder.add(target, builder.mul(first, ir.Constant(I64, 4)))
            product = builder.fmul(load(builder, place, vector(SINGLE, width)), splat(builder, scale, width))
            is_nan = builder.fcmp_unordered("uno", product, product)
            words = builder.bitcast(product, vector(I32, width))
            nan = constant(I32, width, CANONICAL_NAN[F32])
            store(builder, builder.select(is_nan, nan, words), place)

        _in_vectors(builder, count, body)
        return context.get_dummy_value()

    return types.void(types.uint64, types.int64, types.float64), generate


def _largest_of(code: int) -> Any:
    @intrinsic
    def largest(typingctx: Any, source: Any, count: Any, place: Any) -> Any:
        """Raise the float32 at `place` to the largest magnitude, as whole numbers: a NaN is the largest of all."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, count, place = arguments
            found = {}
            for width in (_WIDTH, 1):
                found[width] = cgutils.alloca_once_value(builder, constant(I32, width, 0))

            def larger(one: Any, other: Any) -> Any:
                return builder.select(builder.icmp_unsigned(">", one, other), one, other)

            def body(first: Any, width: int) -> None:
                words = _words(builder, source, first, code, width)
                words = builder.and_(words, constant(I32, width, 0x7FFFFFFF))
                builder.store(larger(builder.load(found[width]), words), found[width])

            _in_vectors(builder, count, body)
            total = load(builder, place, I32)
            for width, kept in found.items():
                lanes = builder.load(kept)
                for lane in range(width):
                    total = larger(total, builder.extract_element(lanes, ir.Constant(I32, lane)))
            store(builder, total, place)
            return context.get_dummy_value()

        return types.void(types.uint64, types.int64, types.uint64), generate

    return largest


def _encoded(builder: Any, quotient: Any) -> Any:
    """Round float32 to nearest even e4m3, above 448 to 448; returns 8-bit integers without the sign."""
    width = quotient.type.count
    words, singles = vector(I32, width), vector(SINGLE, width)
    size = builder.and_(builder.bitcast(quotient, words), constant(I32, width, 0x7FFFFFFF))
    magnitude = builder.bitcast(size, singles)
    is_nan = builder.fcmp_unordered("uno", magnitude, magnitude)
    most = constant(SINGLE, width, _LARGEST_E4M3)
    magnitude = builder.select(builder.fcmp_ordered(">", magnitude, most), most, magnitude)
    size = builder.bitcast(magnitude, words)
    # Just under half a unit, or half for an odd last bit.
    odd = builder.and_(builder.lshr(size, constant(I32, width, 20)), constant(I32, width, 1))
    rounded = builder.add(builder.add(size, constant(I32, width, 0x7FFFF)), odd)
    normal = builder.sub(builder.lshr(rounded, constant(I32, width, 20)), constant(I32, width, (127 - 7) << 3))
    splitter = constant(SINGLE, width, _SPLITTER)
    small = builder.bitcast(builder.fadd(magnitude, splitter), words)
    small = builder.sub(small, builder.bitcast(splitter, words))
    is_small = builder.fcmp_ordered("<", magnitude, constant(SINGLE, width, _LEAST_NORMAL_E4M3))
    code = builder.select(is_small, small, normal)
    return builder.select(is_nan, constant(I32, width, _NAN_E4M3), code)


def _quantiser_of(code: int) -> Any:
    @intrinsic
    def quantise(typingctx: Any, source: Any, count: Any, scale: Any, out: Any) -> Any:
        """Write numbers divided by a scale, as e4m3."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, count, scale, out = arguments
            scale = builder.fptrunc(scale, SINGLE)

            def body(first: Any, width: int) -> None:
                words = _words(builder, source, first, code, width)
                singles = builder.bitcast(words, vector(SINGLE, width))
                found = _encoded(builder, builder.fdiv(singles, splat(builder, scale, width)))
                sign = builder.and_(builder.lshr(words, constant(I32, width, 24)), constant(I32, width, 0x80))
                is_nan = builder.icmp_unsigned("==", found, constant(I32, width, _NAN_E4M3))
                found = builder.select(is_nan, found, builder.or_(found, sign))
                store(builder, builder.trunc(found, vector(I8, width)), builder.add(out, first))

            _in_vectors(builder, count, body)
            return context.get_dummy_value()

        return types.void(types.uint64, types.int64, types.float64, types.uint64), generate

    return quantise


_LARGEST = {code: _largest_of(code) for code in _CODES}
_QUANTISE = {code: _quantiser_of(code) for code in _CODES}
_largest_bf16, _largest_f16, _largest_f32 = (_LARGEST[code] for code in _CODES)
_quantise_bf16, _quantise_f16, _quantise_f32 = (_QUANTISE[code] for code in _CODES)


@numba.njit(nogil=True)
def _dequantise_run(source, code, count, place, out):
    expand_f8(source, code, count, out)
    _multiply(out, count, load_f32(place))


@numba.njit(nogil=True)
def _largest_run(source, code, count, place, out):
    if code == BF16:
        _largest_bf16(source, count, place)
    elif code == F16:
        _largest_f16(source, count, place)
    else:
        _largest_f32(source, count, place)


@numba.njit(nogil=True)
def _quantise_run(source, code, count, place, out):
    scale = load_f32(place)
    if code == BF16:
        _quantise_bf16(source, count, scale, out)
    elif code == F16:
        _quantise_f16(source, count, scale, out)
    else:
        _quantise_f32(source, count, scale, out)


_LOOP = numba.i8(numba.u8, *(numba.i8,) * 7, numba.u8, numba.i8, numba.u8)


def _build(run: Any, out_bytes: int, stamp: int, options: Any) -> Any:
    """Compile what calls `run` for each stretch of elements that have one scale."""

    @numba.njit(_LOOP, nogil=True, error_model="numpy", **options)
    def loop(source, code, first, count, rows, columns, block_rows, block_columns, scales, first_scale, out):
        size, lines = _SIZES[code], (rows + block_rows - 1) // block_rows
        per_line = (columns + block_columns - 1) // block_columns
        done = np.int64(stamp) & 0
        while done < count:
            row = (first + done) // columns
            column = first + done - row * columns
            line = row // rows * lines + row % rows // block_rows
            block = column // block_columns
            end = min(columns, column + count - done)
            while column < end:
                length = min((block + 1) * block_columns, end) - column
                place = scales + np.uint64(4 * (line * per_line + block - first_scale))
                run(source + np.uint64(done * size), code, length, place, out + np.uint64(done * out_bytes))
                done += length
                column += length
                block += 1
        return np.int64(0)

    return loop


def build_dequantise(stamp: int, **options: Any) -> Any:
    """Compile the loop of `dequantise`."""
    return _build(_dequantise_run, 4, stamp, options)


def build_largest(stamp: int, **options: Any) -> Any:
    """Compile the loop of `largest`."""
    return _build(_largest_run, 0, stamp, options)


def build_quantise(stamp: int, **options: Any) -> Any:
    """Compile the loop of `quantise`."""
    return _build(_quantise_run, 1, stamp, options)
