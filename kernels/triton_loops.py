"""The fused kernels behind `triton_combine` and `triton_measuring`, which see to their arguments. Imports triton.

One program is one block of 2,048 elements. It loads the block of a source as 64-bit words, each once, and the words
serve all: they are digested, what is not finite is found in whole words, and the elements are cut out of them. Digests
and counts are integers, and an element is summed by itself in the order of the sources, so that nothing depends on how
values lie in threads. Compile them with ``enable_fp_fusion=False``: a fused multiply-add rounds once where the other
kernels round twice.
"""

# Triton's functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import triton
import triton.language as tl

from . import codes
from .triton_numbers import (
    ALL,
    MASKS,
    SIZES,
    VALUES,
    count_flags,
    cut,
    decode,
    encode,
    find_flags,
    flag_counters,
    load_words,
)

__all__ = ["HEADER", "OPTIONS", "ROW", "combine_blocks", "gram_blocks"]

HEADER = 4
"""Numbers before the rows of the table: elements, first block, the bits of the divisor, one that is free."""

ROW = 3
"""Numbers in the row of a source: address, the bits of its weight, whether it is to be digested."""

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Eight elements a thread: 16 bytes of a 16-bit source, and 64 registers by what ptxas says for it on sm_90."""

_HEADER, _ROW = tl.constexpr(HEADER), tl.constexpr(ROW)
_BLOCK, _HALF = tl.constexpr(codes.BLOCK), tl.constexpr(codes.BLOCK // 2)
_STEP = tl.constexpr(0x9E3779B97F4A7C15)
_M1 = tl.constexpr(0xBF58476D1CE4E5B9)
_M2 = tl.constexpr(0x94D049BB133111EB)
_LOW32 = tl.constexpr(0xFFFFFFFF)


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
    """Return the words of the block of source `k`, or zeros where there is no such source."""
    size: tl.constexpr = (SIZES >> 64 * CODE) & ALL
    address = tl.load(table + _HEADER + k * _ROW, mask=k < n, other=0)
    return load_words(address + block * (_BLOCK * size), k, n, count, CODE, WHOLE)


@triton.jit
def _take(
    words,
    table,
    k,
    here,
    count,
    found,
    digests,
    CODE: tl.constexpr,
    HASHED: tl.constexpr,
    WHOLE: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Inspect a block of source `k`, and return its elements times the weight, and its flags."""
    size: tl.constexpr = (SIZES >> 64 * CODE) & ALL
    row = table + _HEADER + k * _ROW
    flags = find_flags(words, CODE)
    counters = flag_counters(flags, CODE)
    if HASHED:
        number = tl.arange(0, _BLOCK * size // 8)
        a = words + (number + 1).to(tl.uint64) * _STEP
        product = (a & _LOW32) * (a >> 32)
        if not WHOLE:
            product = tl.where(number < (count * size + 7) // 8, product, 0)
        s1, s2, total = tl.reduce((product, words, counters), 0, _add_three)
        digest = _mix(s1 ^ _mix(s2 + here * _M1))
        wanted = tl.load(row + 2) != 0
        tl.atomic_add(digests + k, digest.to(tl.int64, bitcast=True), mask=wanted, sem="relaxed")
    else:
        total = tl.sum(counters, 0)
    nonfinite = count_flags(total, CODE)
    tl.atomic_add(found + 1 + k, nonfinite, mask=nonfinite != 0, sem="relaxed")
    value, weight = decode(words, CODE), tl.load(row + 1).to(tl.float64, bitcast=True)
    if SINGLE:
        value, weight = value.to(tl.float32), weight.to(tl.float32)
    return value * weight, flags


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
    SINGLE: tl.constexpr,
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
    digests : pointer to int64, shape (N,)
        Changed: where a source is to be digested, the digests of its blocks are added.
    n : int
        At least 1.
    FIRST, REST, OUT : codes
    FIRST_HASHED, REST_HASHED : bool
        Whether the first source, and whether any other one, may be digested.
    WHOLE : bool
        Whether the elements are a multiple of BLOCK.
    SINGLE : bool
        Whether products, sums and the quotient are float32.

    Notes
    -----
    Memory: a block of float64 in registers; each byte of a source is read once, each of the output written once.
    Source: own; see `kernels.combine`, and `rounding` for the one rounding.
    """
    size: tl.constexpr = (SIZES >> 64 * REST) & ALL
    mask: tl.constexpr = (MASKS >> 64 * OUT) & ALL
    value: tl.constexpr = (VALUES >> 64 * OUT) & ALL
    block = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(table) - block * _BLOCK, _BLOCK)
    here = (tl.load(table + 1) + block + 1).to(tl.uint64, bitcast=True)
    first = _load(table, 0, n, block, count, FIRST, WHOLE)
    ahead = _load(table, 1, n, block, count, REST, WHOLE)
    total, marks = _take(first, table, 0, here, count, found, digests, FIRST, FIRST_HASHED, WHOLE, SINGLE)
    others = tl.zeros([_BLOCK * size // 8], tl.uint64)
    for k in range(1, n):
        # The next source is on its way while this one is worked on.
        words, ahead = ahead, _load(table, k + 1, n, block, count, REST, WHOLE)
        product, flags = _take(words, table, k, here, count, found, digests, REST, REST_HASHED, WHOLE, SINGLE)
        total = total + product
        others = others | flags
    divisor = tl.load(table + 2).to(tl.float64, bitcast=True)
    if SINGLE:
        # Not `/`, which is the fast division of float32.
        quotient = tl.div_rn(total, tl.zeros([_BLOCK], tl.float32) + divisor.to(tl.float32)).to(tl.float64)
    else:
        quotient = total / divisor
    result = encode(quotient, OUT)
    clean = (cut(marks, FIRST) == 0) & (cut(others, REST) == 0)
    number = tl.arange(0, _BLOCK)
    beyond = ((result & mask) == value) & clean & (number < count)
    overflowed = tl.sum(beyond.to(tl.int32), 0).to(tl.int64)
    tl.atomic_add(found, overflowed, mask=overflowed != 0, sem="relaxed")
    target, item = out + block * _BLOCK + number, result.to(out.dtype.element_ty)
    if WHOLE:
        tl.store(target, item)
    else:
        tl.store(target, item, mask=number < count)


@triton.jit
def _halves(values):
    """Add the elements of a block by halves, as `torch_measuring.halves`."""
    for level in tl.static_range(10):
        values = tl.sum(tl.reshape(values, [2, _HALF >> level]), 0)
    return tl.sum(values, 0)


@triton.jit
def _row(table, k, n, block, count, centre, middle, CODE: tl.constexpr, CENTRED: tl.constexpr, WHOLE: tl.constexpr):
    """Return a block of source `k` as float64, or its difference from the centre: zero for the centre itself."""
    row = decode(_load(table, k, n, block, count, CODE, WHOLE), CODE)
    if CENTRED:
        # Not a comparison of numbers alone; see `load_words`.
        row = tl.where(tl.full([_BLOCK], 0, tl.int64) + k == centre, 0.0, row - middle)
    return row


@triton.jit(do_not_specialize=["n", "centre"])
def gram_blocks(table, out, n, centre, CODE: tl.constexpr, CENTRED: tl.constexpr, WHOLE: tl.constexpr):
    """Multiply one block of one source by those of all sources up to it, all of dtype CODE.

    Parameters
    ----------
    table : pointer to int64
        As in `combine_blocks`; first block, divisor and weights are not used.
    out : pointer to float64, shape (blocks, N, N)
        Changed: the inner products of every pair, both ways round.
    n, centre : int
    CODE : code
    CENTRED : bool
        Whether the differences from source `centre` are multiplied.
    WHOLE : bool
        Whether the elements are a multiple of BLOCK.

    Notes
    -----
    Memory: two or three blocks of float64 in registers. The programs of one block run side by side, and read what the
    others read from the second-level cache. Source: own; see `measuring.gram`.
    """
    number = tl.program_id(0).to(tl.int64)
    block, i = number // n, number % n
    count = tl.minimum(tl.load(table) - block * _BLOCK, _BLOCK)
    middle = tl.full([_BLOCK], 0.0, tl.float64)
    if CENTRED:
        middle = decode(_load(table, centre, n, block, count, CODE, WHOLE), CODE)
    row = _row(table, i, n, block, count, centre, middle, CODE, CENTRED, WHOLE)
    out += block * n * n
    for j in range(i + 1):
        product = _halves(_row(table, j, n, block, count, centre, middle, CODE, CENTRED, WHOLE) * row)
        tl.store(out + i * n + j, product)
        tl.store(out + j * n + i, product)
