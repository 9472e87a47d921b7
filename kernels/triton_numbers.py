"""Numbers of all dtypes in Triton: blocks of words, what is not finite in them, decoding, encoding. Imports triton.

A block of 2,048 elements is loaded as 64-bit words, whatever its dtype, and its elements are cut out of them.
"""

# Triton's functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

from collections.abc import Iterable
from typing import Any

import numpy as np
import triton
import triton.language as tl

from . import codes
from .fp8 import FORMATS

__all__ = [
    "ALL",
    "MASKS",
    "SIZES",
    "VALUES",
    "count_flags",
    "cut",
    "decode",
    "encode",
    "find_flags",
    "flag_counters",
    "load_words",
]

_BLOCK = tl.constexpr(codes.BLOCK)
_BF16, _F16 = tl.constexpr(codes.BF16), tl.constexpr(codes.F16)
_F32, _F64 = tl.constexpr(codes.F32), tl.constexpr(codes.F64)
_E4M3, _E5M2, _E4M3FNUZ = tl.constexpr(codes.F8_E4M3), tl.constexpr(codes.F8_E5M2), tl.constexpr(codes.F8_E4M3FNUZ)
_LOW32 = tl.constexpr(0xFFFFFFFF)
_EVEN_BYTES = tl.constexpr(0x00FF00FF00FF00FF)
_SIGN = tl.constexpr(1 << 63)
_MAGNITUDE = tl.constexpr((1 << 63) - 1)
_EXPONENT = tl.constexpr(0x7FF << 52)
_MOST = tl.constexpr((1023 + 200) << 52)


def _everywhere(value: int, size: int) -> int:
    """Return the word that has `value` in each of its elements of `size` bytes."""
    return sum(value << (8 * size * lane) for lane in range(8 // size))


def _by_code(values: Iterable[int]) -> Any:
    """Return one number that holds 64 bits for each dtype: old versions of Triton know no tuples of constants."""
    return tl.constexpr(sum(value << (64 * code) for code, value in enumerate(values)))


ALL = tl.constexpr((1 << 64) - 1)
_CODES = range(codes.PAIR)
SIZES, _NANS = _by_code(codes.ITEMSIZE[: codes.PAIR]), _by_code(codes.CANONICAL_NAN[: codes.PAIR])
MASKS, VALUES = _by_code(codes.NONFINITE_MASK[: codes.PAIR]), _by_code(codes.NONFINITE_VALUE[: codes.PAIR])
# The same for all elements of a word, their top bits, and what raises NONFINITE_VALUE to the top bit.
_WORD_MASKS = _by_code(_everywhere(codes.NONFINITE_MASK[code], codes.ITEMSIZE[code]) for code in _CODES)
_WORD_VALUES = _by_code(_everywhere(codes.NONFINITE_VALUE[code], codes.ITEMSIZE[code]) for code in _CODES)
_WORD_TOPS = _by_code(_everywhere(1 << (8 * size - 1), size) for size in codes.ITEMSIZE[: codes.PAIR])
_WORD_FILLS = _by_code(
    _everywhere((1 << (8 * codes.ITEMSIZE[code] - 1)) - codes.NONFINITE_VALUE[code], codes.ITEMSIZE[code])
    for code in _CODES
)
# Stored mantissa bits, and the exponent of the smallest normal number, which is negative, without its sign.
_FORMS = [FORMATS[code] for code in sorted(FORMATS)]
_MANTISSA = _by_code([7, 10, 23, 52, *(form.mantissa for form in _FORMS)])
_LEAST = _by_code([126, 14, 126, 1022, *(form.bias - 1 for form in _FORMS)])
# Of the 8-bit formats: the largest number as the bits of a float64, what is written above it, and whether -0.0 exists.
_LARGEST = _by_code([0] * 4 + [int(np.float64(form.largest).view(np.int64)) for form in _FORMS])
_BEYOND = _by_code([0] * 4 + [form.infinity for form in _FORMS])
_MINUS_ZERO = _by_code([0] * 4 + [int(form.signed_zero) for form in _FORMS])


@triton.jit
def load_words(address, k, n, count, CODE: tl.constexpr, WHOLE: tl.constexpr):
    """Return the words of a block at `address`, zeros beyond its `count` elements, and all zeros unless k < n."""
    size: tl.constexpr = (SIZES >> 64 * CODE) & ALL
    number = tl.arange(0, _BLOCK * size // 8)
    words = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), 16)
    if WHOLE:
        # The interpreter of Triton 3.9 cannot spread a scalar comparison over a block.
        loaded = tl.load(words + number, mask=tl.full(number.shape, 0, tl.int32) + k < n, other=0)
    else:
        nbytes = tl.where(k < n, count * size, 0)
        whole, rest = nbytes // 8, nbytes % 8
        lane = tl.arange(0, 8)
        last = tl.load(address.to(tl.pointer_type(tl.uint8)) + 8 * whole + lane, mask=lane < rest, other=0)
        last = tl.sum(last.to(tl.uint64) << (8 * lane).to(tl.uint64), 0)
        loaded = tl.where(number == whole, last, tl.load(words + number, mask=number < whole, other=0))
    return loaded


@triton.jit
def find_flags(words, CODE: tl.constexpr):
    """Return the words with only the top bit of each element that is not finite."""
    tops: tl.constexpr = (_WORD_TOPS >> 64 * CODE) & ALL
    if CODE >= _E4M3FNUZ:
        # An element is one value: its bytes become zero, and only zero stays below 0x80 when 0x7F is added.
        value: tl.constexpr = (_WORD_VALUES >> 64 * CODE) & ALL
        low: tl.constexpr = tops ^ ALL
        rest = words ^ value
        flags = (((rest & low) + low) | rest | low) ^ ALL
    else:
        mask: tl.constexpr = (_WORD_MASKS >> 64 * CODE) & ALL
        fill: tl.constexpr = (_WORD_FILLS >> 64 * CODE) & ALL
        flags = ((words & mask) + fill) & tops
    return flags


@triton.jit
def flag_counters(flags, CODE: tl.constexpr):
    """Return words that count the flags of each in fields of at least 16 bits, which hold the sum of a block."""
    size: tl.constexpr = (SIZES >> 64 * CODE) & ALL
    ones = flags >> (8 * size - 1)
    if size == 1:
        ones = (ones & _EVEN_BYTES) + ((ones >> 8) & _EVEN_BYTES)
    return ones


@triton.jit
def count_flags(total, CODE: tl.constexpr):
    """Return the sum of the fields of a word."""
    size: tl.constexpr = (SIZES >> 64 * CODE) & ALL
    if size <= 4:
        total = (total & _LOW32) + (total >> 32)
    if size <= 2:
        total = (total & 0xFFFF) + (total >> 16)
    return total.to(tl.int64, bitcast=True)


@triton.jit
def cut(words, CODE: tl.constexpr):
    """Return the elements of words, shape (BLOCK,), as uint32, or uint64 where they are as large."""
    size: tl.constexpr = (SIZES >> 64 * CODE) & ALL
    elements = words
    # Halves are joined, not broadcast: the parts of a word stay in the thread that loaded it.
    if size <= 4:
        low, high = words.to(tl.uint32), (words >> 32).to(tl.uint32)
        elements = tl.reshape(tl.join(low, high), [2 * words.shape[0]])
    if size <= 2:
        elements = tl.reshape(tl.join(elements & 0xFFFF, elements >> 16), [4 * words.shape[0]])
    if size == 1:
        elements = tl.reshape(tl.join(elements & 0xFF, elements >> 8), [8 * words.shape[0]])
    return elements


@triton.jit
def decode(words, CODE: tl.constexpr):
    """Return the elements of words as float64, all exact."""
    bits = cut(words, CODE)
    if CODE == _F64:
        value = bits.to(tl.float64, bitcast=True)
    elif CODE == _F32:
        value = bits.to(tl.float32, bitcast=True)
    elif CODE == _BF16:
        value = (bits << 16).to(tl.float32, bitcast=True)
    elif CODE == _F16:
        value = bits.to(tl.uint16).to(tl.float16, bitcast=True)
    elif CODE == _E5M2:  # a float16 without its low byte
        value = (bits << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    else:  # a float32 whose exponent is too small, also where it is subnormal; the product is exact
        mantissa: tl.constexpr = (_MANTISSA >> 64 * CODE) & ALL
        least: tl.constexpr = (_LEAST >> 64 * CODE) & ALL
        mask: tl.constexpr = (MASKS >> 64 * CODE) & ALL
        nonfinite: tl.constexpr = (VALUES >> 64 * CODE) & ALL
        scale: tl.constexpr = 2.0 ** (126 - least)
        single = ((bits & 0x7F) << (23 - mantissa)) | ((bits & 0x80) << 24)
        product = single.to(tl.float32, bitcast=True) * scale
        nan = (bits & mask) == nonfinite
        value = tl.where(nan, 0x7FC00000, product.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return value.to(tl.float64)


@triton.jit
def _to_grid(q, CODE: tl.constexpr):
    """Round float64 to a narrower format's grid, as `rounding.to_grid`."""
    mantissa: tl.constexpr = (_MANTISSA >> 64 * CODE) & ALL
    least: tl.constexpr = (1023 - ((_LEAST >> 64 * CODE) & ALL)) << 52
    factor: tl.constexpr = 1.5 * 2.0 ** (52 - mantissa)
    bits = q.to(tl.uint64, bitcast=True)
    power = tl.minimum(tl.maximum(bits & _EXPONENT, least), _MOST)
    large = power.to(tl.float64, bitcast=True) * factor
    rounded = ((q + large) - large).to(tl.uint64, bitcast=True)
    return (rounded & _MAGNITUDE) | (bits & _SIGN)


@triton.jit
def _encode_f8(grid, sign, CODE: tl.constexpr):
    """Return the bytes, as uint32, of the bits of float64 numbers on the grid of an 8-bit format; NaN is left over."""
    mantissa: tl.constexpr = (_MANTISSA >> 64 * CODE) & ALL
    exponent: tl.constexpr = (_LEAST >> 64 * CODE) & ALL
    largest: tl.constexpr = (_LARGEST >> 64 * CODE) & ALL
    beyond: tl.constexpr = (_BEYOND >> 64 * CODE) & ALL
    nan: tl.constexpr = (_NANS >> 64 * CODE) & ALL
    minus_zero: tl.constexpr = (_MINUS_ZERO >> 64 * CODE) & ALL
    least: tl.constexpr = (1023 - exponent) << 52
    base: tl.constexpr = least >> (52 - mantissa)
    smallest: tl.constexpr = 2.0 ** (0 - exponent)
    normal: tl.constexpr = 2**mantissa
    size = grid & _MAGNITUDE
    value = size.to(tl.float64, bitcast=True)
    below = size < least
    # Added to the smallest normal number, a subnormal one has the mantissa that is wanted.
    shifted = tl.where(below, (value + smallest).to(tl.uint64, bitcast=True), size) >> (52 - mantissa)
    result = (shifted - base).to(tl.uint32)
    result = tl.where(below, result, result + normal)
    signed = result | sign
    if not minus_zero:
        signed = tl.where(result == 0, result, signed)
    if beyond == nan:
        signed = tl.where(size > largest, beyond, signed)
    else:
        signed = tl.where(size > largest, sign | beyond, signed)
    return signed


@triton.jit
def encode(q, CODE: tl.constexpr):
    """Round float64 once and return the bits, as uint64 of a float64, else as uint32; NaNs are canonical."""
    nan: tl.constexpr = (_NANS >> 64 * CODE) & ALL
    bits = q.to(tl.uint64, bitcast=True)
    if CODE == _F64:
        result = bits
    elif CODE == _F32:
        result = q.to(tl.float32).to(tl.uint32, bitcast=True)
    else:
        grid = _to_grid(q, CODE)
        single = grid.to(tl.float64, bitcast=True).to(tl.float32)
        if CODE == _BF16:
            result = single.to(tl.uint32, bitcast=True) >> 16
        elif CODE == _F16:
            result = single.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        else:
            result = _encode_f8(grid, (bits >> 56).to(tl.uint32) & 0x80, CODE)
    return tl.where((bits & _MAGNITUDE) > _EXPONENT, nan, result)
