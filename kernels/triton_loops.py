"""The fused kernel behind `triton_combine`, which sees to its arguments. Imports triton.

One program is one block of 2,048 elements. It loads the block of a source as 64-bit words, each once, and the words
serve all: they are digested, what is not finite is found in whole words, and the elements are cut out of them. Digests
and counts are integers, and an element is summed by itself in the order of the sources, so that nothing depends on how
values lie in threads. Compile it with ``enable_fp_fusion=False``: a fused multiply-add rounds once where the other
kernels round twice.
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

__all__ = ["HEADER", "OPTIONS", "ROW", "combine_blocks"]

HEADER = 4
"""Numbers before the rows of the table: elements, first block, the bits of the divisor, one that is free."""

ROW = 3
"""Numbers in the row of a source: address, the bits of its weight, whether it is to be digested."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Eight elements a thread: 16 bytes of a 16-bit source, and 64 registers by what ptxas says for it on sm_90."""

_HEADER, _ROW = tl.constexpr(HEADER), tl.constexpr(ROW)
_BLOCK = tl.constexpr(codes.BLOCK)
_BF16, _F16 = tl.constexpr(codes.BF16), tl.constexpr(codes.F16)
_F32, _F64 = tl.constexpr(codes.F32), tl.constexpr(codes.F64)
_E4M3, _E5M2, _E4M3FNUZ = tl.constexpr(codes.F8_E4M3), tl.constexpr(codes.F8_E5M2), tl.constexpr(codes.F8_E4M3FNUZ)
_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_M1 = tl.constexpr(0xBF58476D1CE4E5B9)
_M2 = tl.constexpr(0x94D049BB133111EB)
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


_ALL = tl.constexpr((1 << 64) - 1)
_CODES = range(codes.PAIR)
_SIZES, _NANS = _by_code(codes.ITEMSIZE[: codes.PAIR]), _by_code(codes.CANONICAL_NAN[: codes.PAIR])
_MASKS, _VALUES = _by_code(codes.NONFINITE_MASK[: codes.PAIR]), _by_code(codes.NONFINITE_VALUE[: codes.PAIR])
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
def _mix(value):
    value = (value ^ (value >> 30)) * _M1
    value = (value ^ (value >> 27)) * _M2
    return value ^ (value >> 31)


@triton.jit
def _add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _load(table, k, n, block, count, CODE: tl.constexpr, WHOLE: tl.constexpr):
    """Return the words of the block of source `k`, zeros beyond its `count` elements and where there is no source."""
    size: tl.constexpr = (_SIZES >> 64 * CODE) & _ALL
    address = tl.load(table + _HEADER + k * _ROW, mask=k < n, other=0) + block * (_BLOCK * size)
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
def _flags(words, CODE: tl.constexpr):
    """Return the words with only the top bit of each element that is not finite."""
    tops: tl.constexpr = (_WORD_TOPS >> 64 * CODE) & _ALL
    if CODE >= _E4M3FNUZ:
        # An element is one value: its bytes become zero, and only zero stays below 0x80 when 0x7F is added.
        value: tl.constexpr = (_WORD_VALUES >> 64 * CODE) & _ALL
        low: tl.constexpr = tops ^ _ALL
        rest = words ^ value
        flags = (((rest & low) + low) | rest | low) ^ _ALL
    else:
        mask: tl.constexpr = (_WORD_MASKS >> 64 * CODE) & _ALL
        fill: tl.constexpr = (_WORD_FILLS >> 64 * CODE) & _ALL
        flags = ((words & mask) + fill) & tops
    return flags


@triton.jit
def _counters(flags, CODE: tl.constexpr):
    """Return words that count the flags of each in fields of at least 16 bits, which hold the sum of a block."""
    size: tl.constexpr = (_SIZES >> 64 * CODE) & _ALL
    ones = flags >> (8 * size - 1)
    if size == 1:
        ones = (ones & _EVEN_BYTES) + ((ones >> 8) & _EVEN_BYTES)
    return ones


@triton.jit
def _counted(total, CODE: tl.constexpr):
    """Return the sum of the fields of a word."""
    size: tl.constexpr = (_SIZES >> 64 * CODE) & _ALL
    if size <= 4:
        total = (total & _LOW32) + (total >> 32)
    if size <= 2:
        total = (total & 0xFFFF) + (total >> 16)
    return total.to(tl.int64, bitcast=True)


@triton.jit
def _cut(words, CODE: tl.constexpr):
    """Return the elements of words, shape (BLOCK,), as uint32, or uint64 where they are as large."""
    size: tl.constexpr = (_SIZES >> 64 * CODE) & _ALL
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
def _decode(words, CODE: tl.constexpr):
    """Return the elements of words as float64, all exact."""
    bits = _cut(words, CODE)
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
        mantissa: tl.constexpr = (_MANTISSA >> 64 * CODE) & _ALL
        least: tl.constexpr = (_LEAST >> 64 * CODE) & _ALL
        mask: tl.constexpr = (_MASKS >> 64 * CODE) & _ALL
        nonfinite: tl.constexpr = (_VALUES >> 64 * CODE) & _ALL
        scale: tl.constexpr = 2.0 ** (126 - least)
        single = ((bits & 0x7F) << (23 - mantissa)) | ((bits & 0x80) << 24)
        product = single.to(tl.float32, bitcast=True) * scale
        nan = (bits & mask) == nonfinite
        value = tl.where(nan, 0x7FC00000, product.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return value.to(tl.float64)


@triton.jit
def _take(words, table, k, here, count, found, digests, CODE: tl.constexpr, HASHED: tl.constexpr, WHOLE: tl.constexpr):
    """Inspect a block of source `k`, and return its elements times the weight, and its flags."""
    size: tl.constexpr = (_SIZES >> 64 * CODE) & _ALL
    row = table + _HEADER + k * _ROW
    flags = _flags(words, CODE)
    counters = _counters(flags, CODE)
    if HASHED:
        number = tl.arange(0, _BLOCK * size // 8)
        a = words + (number + 1).to(tl.uint64) * _STEP
        product = (a & _LOW32) * (a >> 32)
        if not WHOLE:
            product = tl.where(number < (count * size + 7) // 8, product, 0)
        s1, s2, total = tl.reduce((product, words, counters), 0, _add_three)
        digest = _mix(s1 ^ _mix(s2 + here * _M1))
        tl.store(digests + k, digest.to(tl.int64, bitcast=True), mask=tl.load(row + 2) != 0)
    else:
        total = tl.sum(counters, 0)
    nonfinite = _counted(total, CODE)
    tl.atomic_add(found + 1 + k, nonfinite, mask=nonfinite != 0, sem="relaxed")
    return _decode(words, CODE) * tl.load(row + 1).to(tl.float64, bitcast=True), flags


@triton.jit
def _to_grid(q, CODE: tl.constexpr):
    """Round float64 to a narrower format's grid, as `rounding.to_grid`."""
    mantissa: tl.constexpr = (_MANTISSA >> 64 * CODE) & _ALL
    least: tl.constexpr = (1023 - ((_LEAST >> 64 * CODE) & _ALL)) << 52
    factor: tl.constexpr = 1.5 * 2.0 ** (52 - mantissa)
    bits = q.to(tl.uint64, bitcast=True)
    power = tl.minimum(tl.maximum(bits & _EXPONENT, least), _MOST)
    large = power.to(tl.float64, bitcast=True) * factor
    rounded = ((q + large) - large).to(tl.uint64, bitcast=True)
    return (rounded & _MAGNITUDE) | (bits & _SIGN)


@triton.jit
def _encode_f8(grid, sign, CODE: tl.constexpr):
    """Return the bytes, as uint32, of the bits of float64 numbers on the grid of an 8-bit format; NaN is left over."""
    mantissa: tl.constexpr = (_MANTISSA >> 64 * CODE) & _ALL
    exponent: tl.constexpr = (_LEAST >> 64 * CODE) & _ALL
    largest: tl.constexpr = (_LARGEST >> 64 * CODE) & _ALL
    beyond: tl.constexpr = (_BEYOND >> 64 * CODE) & _ALL
    nan: tl.constexpr = (_NANS >> 64 * CODE) & _ALL
    minus_zero: tl.constexpr = (_MINUS_ZERO >> 64 * CODE) & _ALL
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
def _encode(q, CODE: tl.constexpr):
    """Round float64 once and return the bits, as uint64 of a float64, else as uint32; NaNs are canonical."""
    nan: tl.constexpr = (_NANS >> 64 * CODE) & _ALL
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


@triton.jit(do_not_specialize=["n"])
def combine_blocks(
    table,
    out,
    found,
    digests,
    n,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    OUT: tl.constexpr,
    FIRST_HASHED: tl.constexpr,
    REST_HASHED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Combine one block of `n` sources, the first of dtype FIRST and all others of dtype REST.

    Parameters
    ----------
    table : pointer to int64
        `HEADER` numbers, and for each source `ROW`; addresses are multiples of 16.
    out : pointer to unsigned integers of the size of OUT
    found : pointer to int64
        Changed: the outputs that are not finite although all sources are are added to the first number, and to the
        next N the elements of each source that are not finite.
    digests : pointer to int64, shape (blocks, N)
        Changed: where a source is to be digested, the digest of each block.
    n : int
        At least 1.
    FIRST, REST, OUT : codes
    FIRST_HASHED, REST_HASHED : bool
        Whether the first source, and whether any other one, may be digested.
    WHOLE : bool
        Whether the elements are a multiple of BLOCK.

    Notes
    -----
    Memory: a block of float64 in registers; each byte of a source is read once, each of the output written once.
    Source: own; see `kernels.combine`, and `rounding` for the one rounding.
    """
    size: tl.constexpr = (_SIZES >> 64 * REST) & _ALL
    mask: tl.constexpr = (_MASKS >> 64 * OUT) & _ALL
    value: tl.constexpr = (_VALUES >> 64 * OUT) & _ALL
    block = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(table) - block * _BLOCK, _BLOCK)
    here = (tl.load(table + 1) + block + 1).to(tl.uint64, bitcast=True)
    digests += block * n
    first = _load(table, 0, n, block, count, FIRST, WHOLE)
    ahead = _load(table, 1, n, block, count, REST, WHOLE)
    total, marks = _take(first, table, 0, here, count, found, digests, FIRST, FIRST_HASHED, WHOLE)
    others = tl.zeros([_BLOCK * size // 8], tl.uint64)
    for k in range(1, n):
        # The next source is on its way while this one is worked on.
        words, ahead = ahead, _load(table, k + 1, n, block, count, REST, WHOLE)
        product, flags = _take(words, table, k, here, count, found, digests, REST, REST_HASHED, WHOLE)
        total = total + product
        others = others | flags
    result = _encode(total / tl.load(table + 2).to(tl.float64, bitcast=True), OUT)
    clean = (_cut(marks, FIRST) == 0) & (_cut(others, REST) == 0)
    number = tl.arange(0, _BLOCK)
    beyond = ((result & mask) == value) & clean & (number < count)
    overflowed = tl.sum(beyond.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(found, overflowed, mask=overflowed != 0, sem="relaxed")
    target, item = out + block * _BLOCK + number, result.to(out.dtype.element_ty)
    if WHOLE:
        tl.store(target, item)
    else:
        tl.store(target, item, mask=number < count)
