"""The compiled loop behind `combine`: blocks outside, sources inside. Imports numba; use `kernels.combine`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,var-annotated,untyped-decorator"

import hashlib
import math
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np

from .codes import BF16, BLOCK, F16, F32, F64, ITEMSIZE
from .hashing import block_digest
from .inspection import canonical_nans, mark_bad
from .lanes import as_bits, as_float, load_f64, load_u8, load_u32, load_u64, store_u8, store_u32, store_u64
from .rounding import DIVIDE, MULTIPLY, finish_bf16, finish_f16, finish_f32, finish_f64
from .vectors import accumulate_f32, accumulate_f64, expand_bf16, expand_f16

__all__ = ["combine_loop", "digest_loop", "division", "fingerprint", "sum_loop", "wide_loop"]

_SIZES = np.array(ITEMSIZE, dtype=np.int64)
_LOCK = threading.Lock()
# Sources and elements that are in L1 together. Of 8 x 512, 8 x 256, 4 x 512, 4 x 1024 and 2 x 2048, the first
# three were equal within 1 % (bfloat16, 32 sources, 9.4 GB/s), the last lost a tenth to accumulator traffic.
_GROUP = 8
_STRIP = 512


@cache
def fingerprint() -> int:
    """Return a number that changes with the kernels' sources.

    numba's disk cache notices an edit only in the file of the function itself, not in what that calls, but it
    does key on closure variables: every cached kernel here closes over this one.
    """
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


def division(divisor: float) -> tuple[float, int]:
    """Choose how to divide so that the bits are those of a true division.

    Parameters
    ----------
    divisor : float
        Divides every accumulator.

    Returns
    -------
    reciprocal : float
        1 / divisor where that is exact, otherwise unused.
    mode : int
        MULTIPLY for powers of two, whose reciprocals are exact; DIVIDE otherwise.
    """
    if 2.0**-500 < abs(divisor) < 2.0**500 and abs(math.frexp(divisor)[0]) == 0.5:
        return 1.0 / divisor, MULTIPLY
    return 1.0, DIVIDE


@numba.njit(nogil=True)
def _expand(source, code, count, stage, tables):
    """Write a strip of a 16 or 8-bit source as float32 at `stage`: exact."""
    if code == BF16:
        expand_bf16(source, count, stage)
    elif code == F16:
        expand_f16(source, count, stage)
    else:
        table = tables + np.uint64(1024) * np.uint64(code - 4)
        for j in range(count):
            bits = load_u32(table + np.uint64(4) * load_u8(source + np.uint64(j)))
            store_u32(stage + np.uint64(4 * j), bits)


@numba.njit(nogil=True)
def _accumulate(sources, codes, weights, first, last, begin, count, acc, stage, places, tables):
    """Add sources first <= k < last, all float64 or all narrower, to one block's accumulator, strip by strip."""
    fresh = np.int64(first == 0)
    factors = np.uint64(weights.ctypes.data)
    spots = np.uint64(places.ctypes.data)
    for strip in range(0, count, _STRIP):
        length = min(_STRIP, count - strip)
        there = acc + np.uint64(8 * strip)
        if codes[first] == F64:
            pointers = np.uint64(sources.ctypes.data)
            accumulate_f64(pointers, first, last, factors, 8 * (begin + strip), length, there, fresh)
            continue
        for k in range(first, last):
            code = np.int64(codes[k])
            source = sources[k] + np.uint64(_SIZES[code] * (begin + strip))
            if code == F32:
                places[k - first] = source
            else:
                places[k - first] = stage + np.uint64(4 * _STRIP * (k - first))
                _expand(source, code, length, places[k - first], tables)
        accumulate_f32(spots, 0, last - first, factors + np.uint64(8 * first), 0, length, there, fresh)


@numba.njit(nogil=True)
def encode_f8(acc, count, out, row, reals, integers):
    """Round float64 quotients to an 8-bit format and return how many are not finite there."""
    smallest, largest = reals[row, 0], reals[row, 1]
    mantissa, nan = integers[row, 0], np.uint64(integers[row, 1])
    infinity, signed_zero = np.uint64(integers[row, 2]), integers[row, 3]
    drop = np.uint64(52 - mantissa)
    large = 1.5 * 2.0 ** (52 - mantissa)
    normal_step = np.uint64(1) << np.uint64(mantissa)
    base = as_bits(smallest) >> drop
    found = 0
    for j in range(count):
        value = load_f64(acc + np.uint64(8 * j))
        bits = as_bits(value)
        sign = (bits >> np.uint64(56)) & np.uint64(0x80)
        size = abs(value)
        power = min(max(as_float(bits & np.uint64(0x7FF0000000000000)), smallest), 2.0**200) * large
        size = (size + power) - power
        if size != size:
            result = nan
        elif size > largest:
            result = infinity | sign if infinity != nan else nan
        elif size < smallest:
            result = (as_bits(size + smallest) >> drop) - base
            result = result | sign if signed_zero or result else result
        else:
            result = ((as_bits(size) >> drop) - base + normal_step) | sign
        if not size <= largest:
            found += 1
        store_u8(out + np.uint64(j), result)
    return found


@numba.njit(nogil=True)
def finish(acc, count, out, out_code, divisor, reciprocal, mode):
    if out_code == BF16:
        return finish_bf16(acc, count, out, divisor, reciprocal, mode)
    if out_code == F16:
        return finish_f16(acc, count, out, divisor, reciprocal, mode)
    if out_code == F32:
        return finish_f32(acc, count, out, divisor, reciprocal, mode)
    if out_code == F64:
        return finish_f64(acc, count, out, divisor, reciprocal, mode)
    return np.int64(0)


@numba.njit(nogil=True)
def move_bytes(source, target, nbytes):
    """Copy a block between addresses that do not overlap."""
    for j in range(nbytes >> 3):
        store_u64(target + np.uint64(8 * j), load_u64(source + np.uint64(8 * j)))
    for j in range(nbytes & ~7, nbytes):
        store_u8(target + np.uint64(j), load_u8(source + np.uint64(j)))


_U8, _I64, _U64, _F64 = (numba.types.Array(t, 1, "C") for t in (numba.u1, numba.i8, numba.u8, numba.f8))
_COMBINE = numba.i8(
    _U64, _U8, _F64, numba.f8, numba.f8, numba.i8, numba.i8, numba.i8, numba.u8, numba.i8,
    _U8, _U64, _I64, numba.u8, numba.types.Array(numba.f8, 2, "C"), numba.types.Array(numba.i8, 2, "C"),
)  # fmt: skip


_WIDE = numba.i8(
    _U64, _U8, _F64, numba.f8, numba.f8, numba.i8, numba.i8, numba.u8, numba.i8,
    _U8, _U64, _I64, numba.u8, numba.types.Array(numba.f8, 2, "C"), numba.types.Array(numba.i8, 2, "C"),
)  # fmt: skip


def _build_wide(stamp: int) -> Any:
    from .native_wide import build_wide

    return build_wide(_WIDE, stamp)


def _build_combine(stamp: int) -> Any:
    @numba.njit(_COMBINE, nogil=True, cache=True, error_model="numpy")
    def loop(
        sources, codes, weights, divisor, reciprocal, mode, elements, first_block, out, out_code,
        hashed, digests, nonfinite, tables, reals, integers,
    ):  # fmt: skip
        n = len(sources)
        overflowed = np.int64(stamp) & 0
        room = np.empty(2 * BLOCK + _GROUP * _STRIP // 2, dtype=np.float64)
        places = np.empty(_GROUP, dtype=np.uint64)
        acc, spare = np.uint64(room.ctypes.data), np.uint64(room.ctypes.data + 8 * BLOCK)
        stage = np.uint64(room.ctypes.data + 16 * BLOCK)
        out_size = _SIZES[out_code]
        in_place = False
        for k in range(n):
            in_place |= sources[k] == out
        for block in range((elements + BLOCK - 1) // BLOCK):
            begin = block * BLOCK
            count = min(BLOCK, elements - begin)
            first = 0
            while first < n:
                code = np.int64(codes[first])
                last = first
                while last < n and last - first < _GROUP and (codes[last] == F64) == (code == F64):
                    if hashed[last]:
                        size = _SIZES[codes[last]]
                        where = sources[last] + np.uint64(begin * size)
                        digests[last] += block_digest(where, count * size, first_block + block)
                    last += 1
                _accumulate(sources, codes, weights, first, last, begin, count, acc, stage, places, tables)
                first = last
            target = out + np.uint64(begin * out_size)
            goal = spare if in_place else target
            if out_code <= F64:
                found = finish(acc, count, goal, out_code, divisor, reciprocal, mode)
            else:
                finish_f64(acc, count, acc, divisor, reciprocal, mode)
                found = encode_f8(acc, count, goal, out_code - 4, reals, integers)
            if found:
                marks = np.zeros(BLOCK, dtype=np.uint8)
                for k in range(n):
                    code = np.int64(codes[k])
                    where = sources[k] + np.uint64(begin * _SIZES[code])
                    nonfinite[k] += mark_bad(where, code, count, marks)
                if out_code <= F64:
                    canonical_nans(goal, out_code, count)
                clean = np.zeros(BLOCK, dtype=np.uint8)
                mark_bad(goal, out_code, count, clean)
                for j in range(count):
                    overflowed += np.int64(clean[j]) & ~np.int64(marks[j])
            if in_place:
                move_bytes(goal, target, count * out_size)
        # numba frees an array after its last use, and an address is no use of it: this keeps the scratch alive.
        room[0] = places[0]
        return overflowed

    return loop


def _build_digest(stamp: int) -> Any:
    @numba.njit(numba.u8(numba.u8, numba.i8, numba.i8, numba.i8), nogil=True, cache=True, error_model="numpy")
    def loop(address, nbytes, itemsize, first_block):
        total = np.uint64(stamp) & np.uint64(0)
        step = BLOCK * itemsize
        for block in range((nbytes + step - 1) // step):
            begin = block * step
            total += block_digest(address + np.uint64(begin), min(step, nbytes - begin), first_block + block)
        return total

    return loop


def _build_sum(stamp: int) -> Any:
    @numba.njit(numba.u8(numba.u8, numba.i8), nogil=True, cache=True, error_model="numpy")
    def loop(address, nbytes):
        total = np.uint64(stamp) & np.uint64(0)
        for j in range(nbytes >> 3):
            total += load_u64(address + np.uint64(8) * np.uint64(j))
        for j in range(nbytes & ~7, nbytes):
            total += load_u8(address + np.uint64(j))
        return total

    return loop


_BUILDERS = {"combine": _build_combine, "wide": _build_wide, "digest": _build_digest, "sum": _build_sum}
_BUILT: dict[str, Any] = {}


def _built(name: str) -> Any:
    with _LOCK:
        if name not in _BUILT:
            _BUILT[name] = _BUILDERS[name](fingerprint())
        return _BUILT[name]


def combine_loop() -> Any:
    """Return the compiled loop of `combine`; the first call compiles it or loads it from numba's cache."""
    return _built("combine")


def wide_loop() -> Any:
    """Return the compiled loop of `combine_wide`."""
    return _built("wide")


def digest_loop() -> Any:
    """Return the compiled loop of `digest`."""
    return _built("digest")


def sum_loop() -> Any:
    """Return the compiled loop of `read_sum`."""
    return _built("sum")
