"""The compiled loops behind `vector_machine`. Imports numba; use `kernels.vector_machine`."""

# numba functions cannot be annotated.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from typing import Any

import numba
import numpy as np

from .blocks import GROUP, add_sources
from .blocks import STRIP as FP8_STRIP
from .codes import BLOCK
from .vector_machine import STRIP, TO_COUNTS, TO_ROWS, TO_SUMS, Op

__all__ = ["SCRATCH_BYTES", "build_vector_machine"]

SCRATCH_BYTES = 4 * GROUP * FP8_STRIP + 8 * GROUP
_ROOM_ROWS = BLOCK // 2 // STRIP
_LARGEST = np.finfo(np.float64).max

_F64, _F64_2 = (numba.types.Array(numba.f8, n, "C") for n in (1, 2))
_U8, _U64, _I64, _F32 = (numba.types.Array(kind, 1, "C") for kind in (numba.u1, numba.u8, numba.i8, numba.f4))
_I64_2, _I64_3 = (numba.types.Array(numba.i8, n, "C") for n in (2, 3))
_U32_2 = numba.types.Array(numba.u4, 2, "C")
_LOAD, _ADD, _SUBTRACT, _MULTIPLY, _DIVIDE = map(int, (Op.LOAD, Op.ADD, Op.SUBTRACT, Op.MULTIPLY, Op.DIVIDE))
_LESS, _LESS_EQUAL, _EQUAL, _BOTH, _EITHER = map(int, (Op.LESS, Op.LESS_EQUAL, Op.EQUAL, Op.BOTH, Op.EITHER))
_NOT, _WHERE, _ABSOLUTE, _NEGATIVE, _SIGN = map(int, (Op.NOT, Op.WHERE, Op.ABSOLUTE, Op.NEGATIVE, Op.SIGN))
_SQRT, _SINGLE, _TOTAL, _MOVE, _UNIFORM = map(int, (Op.SQRT, Op.SINGLE, Op.TOTAL, Op.MOVE, Op.UNIFORM))


def _each(function: Any) -> Any:
    """Make an instruction of a function of three numbers: a loop of its own, which LLVM turns into vectors."""
    inner = numba.njit(inline="always", error_model="numpy")(function)

    @numba.njit(nogil=True, error_model="numpy")
    def instruction(rows, goal, height, a, a_step, b, b_step, c, c_step, length):
        for k in range(height):
            to, x, y, z = rows[goal + k], rows[a + k * a_step], rows[b + k * b_step], rows[c + k * c_step]
            for j in range(length):
                to[j] = inner(x[j], y[j], z[j])

    return instruction


_add = _each(lambda x, y, z: x + y)
_subtract = _each(lambda x, y, z: x - y)
_multiply = _each(lambda x, y, z: x * y)
_divide = _each(lambda x, y, z: x / y)
_less = _each(lambda x, y, z: 1.0 if x < y else 0.0)
_less_equal = _each(lambda x, y, z: 1.0 if x <= y else 0.0)
_equal = _each(lambda x, y, z: 1.0 if x == y else 0.0)
_either = _each(lambda x, y, z: x if x > y else y)
_not = _each(lambda x, y, z: 1.0 - x)
_where = _each(lambda x, y, z: y if x != 0.0 else z)
_absolute = _each(lambda x, y, z: abs(x))
_negative = _each(lambda x, y, z: -x)
_sign = _each(lambda x, y, z: (1.0 if x > 0.0 else 0.0) - (1.0 if x < 0.0 else 0.0))
_sqrt = _each(lambda x, y, z: np.sqrt(x))
_single = _each(lambda x, y, z: np.float64(np.float32(x)))
_move = _each(lambda x, y, z: x)


@numba.njit(nogil=True, error_model="numpy")
def _decode(rows, goal, height, sources, codes, begin, at, length, one, scratch, bad):
    """Decode elements of checkpoints, and count those that are not finite."""
    stage = np.uint64(scratch.ctypes.data)
    places = stage + np.uint64(4 * GROUP * FP8_STRIP)
    for k in range(height):
        to = rows[goal + k]
        where = np.uint64(to.ctypes.data)
        add_sources(sources[k : k + 1], codes[k : k + 1], one, begin, at, length, where, (stage, places), np.uint64(0))
        found = 0
        for j in range(length):
            found += 0 if abs(to[j]) <= _LARGEST else 1
        bad[k] += found


@numba.njit(nogil=True)
def _load(rows, goal, height, source, first, at, length):
    for k in range(height):
        to, x = rows[goal + k], source[first + k]
        for j in range(length):
            to[j] = x[at + j]


@numba.njit(nogil=True)
def _store(rows, out, goal, height, a, a_step, at, length):
    found = 0
    for k in range(height):
        to, x = out[goal + k], rows[a + k * a_step]
        for j in range(length):
            to[at + j] = x[j]
            found += 0 if abs(x[j]) <= _LARGEST else 1
    return found


@numba.njit(nogil=True)
def _halve(block, length, out, number, room):
    """Add the elements of a block by halves."""
    for r in range(block.shape[0]):
        for j in range(length, BLOCK):
            block[r, j] = 0.0
        half = BLOCK // 2
        for j in range(half):
            room[j] = block[r, j] + block[r, j + half]
        half //= 2
        while half:
            for j in range(half):
                room[j] += room[j + half]
            half //= 2
        out[r, number] = room[0]


@numba.njit(nogil=True)
def _count(block, length, upper, low, prefixes, histograms, bits):
    """Count some bits of float32 keys, among those that begin with a prefix."""
    mask = np.uint32((1 << (upper - low)) - 1)
    above, below = np.uint32(upper), np.uint32(low)
    for r in range(block.shape[0]):
        for j in range(length):
            bits[j] = np.float32(block[r, j])
        keys = bits.view(np.uint32)
        for k in range(prefixes.shape[1]):
            wanted, counts = prefixes[r, k], histograms[r, k]
            if upper == 31:
                for j in range(length):
                    counts[(keys[j] >> below) & mask] += 1
            else:
                for j in range(length):
                    if keys[j] >> above == wanted:
                        counts[(keys[j] >> below) & mask] += 1


@numba.njit(nogil=True)
def _total(rows, goal, height, a, length):
    to = rows[goal]
    x = rows[a]
    for j in range(length):
        to[j] = x[j]
    for k in range(1, height):
        y = rows[a + k]
        for j in range(length):
            to[j] += y[j]


@numba.njit(nogil=True)
def _uniform(rows, goal, height, keys, first, start, length):
    for k in range(height):
        to, key = rows[goal + k], keys[first + k]
        for j in range(length):
            w = key + np.uint64(start + j) * np.uint64(0x9E3779B97F4A7C15)
            w = (w ^ (w >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            w = (w ^ (w >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            w ^= w >> np.uint64(31)
            to[j] = np.float64(np.int64(w >> np.uint64(11))) * 2.0**-53


def build_vector_machine(stamp: int) -> Any:
    """Compile the loop of `run`."""
    signature = numba.void(
        _I64_2, _F64, _U64, _U8, numba.i8, numba.i8, _F64_2, _U64, numba.i8,
        numba.i8, _F64_2, numba.i8, numba.i8, _U32_2, _I64_3,
        _F64_2, _F64_2, _I64, _F64, _U8, _F32,
    )  # fmt: skip

    @numba.njit(signature, nogil=True, cache=True, error_model="numpy")
    def loop(
        program, constants, sources, codes, begin, count, outside, keys, start,
        mode, out, upper, low, prefixes, histograms,
        rows, block, bad, one, scratch, bits,
    ):  # fmt: skip
        room = rows[len(rows) - _ROOM_ROWS :].reshape(_ROOM_ROWS * STRIP)
        for c in range(len(constants)):
            rows[c, :] = constants[c]
        for number in range(stamp & 0, (count + BLOCK - 1) // BLOCK):
            first = number * BLOCK
            stop = min(first + BLOCK, count)
            for at in range(first, stop, STRIP):
                length = min(STRIP, stop - at)
                for line in range(len(program)):
                    op, goal, height = program[line, 0], program[line, 1], program[line, 2]
                    a, a_step, b = program[line, 3], program[line, 4], program[line, 5]
                    b_step, c, c_step = program[line, 6], program[line, 7], program[line, 8]
                    if op == _ADD:
                        _add(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _SUBTRACT:
                        _subtract(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op in (_MULTIPLY, _BOTH):
                        _multiply(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _DIVIDE:
                        _divide(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _LESS:
                        _less(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _LESS_EQUAL:
                        _less_equal(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _EQUAL:
                        _equal(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _EITHER:
                        _either(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _NOT:
                        _not(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _WHERE:
                        _where(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _ABSOLUTE:
                        _absolute(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _NEGATIVE:
                        _negative(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _SIGN:
                        _sign(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _SQRT:
                        _sqrt(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _SINGLE:
                        _single(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _MOVE:
                        _move(rows, goal, height, a, a_step, b, b_step, c, c_step, length)
                    elif op == _LOAD:
                        if b:
                            _load(rows, goal, height, outside, a, at, length)
                        else:
                            _decode(rows, goal, height, sources, codes, begin, at, length, one, scratch, bad)
                    elif op == _TOTAL:
                        _total(rows, goal, height, a, length)
                    elif op == _UNIFORM:
                        _uniform(rows, goal, height, keys, a, start + at, length)
                    else:
                        if mode == TO_ROWS:
                            bad[-1] += _store(rows, out, goal, height, a, a_step, at, length)
                        else:
                            _store(rows, block, goal, height, a, a_step, at - first, length)
            if mode == TO_SUMS:
                _halve(block, stop - first, out, number, room)
            elif mode == TO_COUNTS:
                _count(block, stop - first, upper, low, prefixes, histograms, bits)

    return loop
