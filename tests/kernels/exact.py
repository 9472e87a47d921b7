"""The judge of every backend: exact rationals rounded once; and one way to call both backends."""

from fractions import Fraction
from functools import partial
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch

from streamsoup.kernels import combine as compiled
from streamsoup.kernels import torch_combine, triton_combine
from streamsoup.kernels.codes import CANONICAL_NAN, F64, ITEMSIZE

DTYPES = [
    np.dtype(kind)
    for kind in (
        ml_dtypes.bfloat16,
        np.float16,
        np.float32,
        np.float64,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2fnuz,
    )
]
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
MANTISSA = (7, 10, 23, 52, 3, 2, 3, 2)
LEAST = (-126, -14, -126, -1022, -6, -14, -7, -15)
HAS_INFINITY = (True, True, True, True, False, True, False, False)
SIGNED_ZERO = (True,) * 6 + (False,) * 2
LARGEST = [Fraction(float(ml_dtypes.finfo(dtype).max)) for dtype in DTYPES]
NAMES = ["bf16", "f16", "f32", "f64", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"]
BACKENDS = ["numba", "torch"]


class Answer(NamedTuple):
    out: np.ndarray
    digests: list[int]
    nonfinite: list[int]
    overflowed: int


def rounded(value: Fraction, code: int) -> Fraction | None:
    """Round to nearest even into a format; None is beyond its largest number."""
    if value == 0:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, LEAST[code]) - MANTISSA[code])
    result = round(size / step) * step
    if result > LARGEST[code]:
        return None
    return result if value > 0 else -result


def encoded(value: Fraction, code: int, negative_zero: bool = False) -> int:
    """Return the bits of an exact value rounded once into a format."""
    result = rounded(value, code)
    negative = value < 0 or (value == 0 and negative_zero)
    beyond = np.inf if HAS_INFINITY[code] else np.nan
    number = beyond if result is None else float(abs(result))
    if np.isnan(number):
        return CANONICAL_NAN[code]
    bits = int(np.array([number]).astype(DTYPES[code]).view(UNSIGNED[ITEMSIZE[code]])[0])
    if negative and (SIGNED_ZERO[code] or bits):
        bits |= 1 << (8 * ITEMSIZE[code] - 1)
    return bits


def expected(arrays, codes, weights, divisor: Fraction, out_code: int) -> np.ndarray:
    """Return the bits of the exact combination of finite arrays."""
    wide = [array.astype(np.float64) for array in arrays]
    result = []
    for column in zip(*wide, strict=True):
        total = sum((Fraction(w) * Fraction(x) for w, x in zip(weights, column, strict=True)), Fraction(0))
        minus = all(x == 0 and np.signbit(x) != (w < 0) for w, x in zip(weights, column, strict=True))
        result.append(encoded(total / divisor, out_code, minus))
    return np.array(result, dtype=UNSIGNED[ITEMSIZE[out_code]])


def run(
    backend,
    arrays,
    codes,
    weights,
    divisor,
    out_code,
    *,
    low=None,
    single=False,
    first_block=0,
    hashed=None,
    misalign=0,
    device="cpu",
) -> Answer:
    """Run `combine`, or `combine_wide` where `low` is given, and return plain values."""
    n, hashed = len(arrays), [True] * len(arrays) if hashed is None else hashed
    elements = arrays[0].nbytes // ITEMSIZE[codes[0]]
    raws = [np.frombuffer(array.tobytes(), dtype=np.uint8) for array in arrays]
    more = [] if low is None else [low]
    if backend != "numba":
        twin = torch_combine if backend == "torch" else triton_combine
        function = partial(twin.combine, single=single) if low is None else torch_combine.combine_wide
        # Each source has memory of its own.
        tensors = [torch.from_numpy(np.concatenate([np.zeros(misalign, np.uint8), raw])) for raw in raws]
        tensors = [tensor.to(device)[misalign:] for tensor in tensors]
        out, digests, nonfinite, over = function(tensors, codes, weights, divisor, *more, first_block, out_code, hashed)
        return Answer(out.cpu().numpy(), [d % 2**64 for d in digests.tolist()], nonfinite.tolist(), int(over))
    buffers = [np.concatenate([np.zeros(misalign, np.uint8), raw]) for raw in raws]
    out = np.full(elements * ITEMSIZE[out_code] + misalign + 8, 0xA5, dtype=np.uint8)
    digests, nonfinite = np.zeros(n, np.uint64), np.zeros(n, np.int64)
    function = compiled.combine_single if single else compiled.combine if low is None else compiled.combine_wide
    over = function(
        np.array([b.ctypes.data + misalign for b in buffers], np.uint64), np.array(codes, np.uint8),
        np.array(weights, np.float64), divisor, *more, elements, first_block, out.ctypes.data + misalign,
        out_code, np.array(hashed, np.uint8), digests, nonfinite,
    )  # fmt: skip
    assert (out[len(out) - 8 :] == 0xA5).all()
    assert (out[:misalign] == 0xA5).all()
    return Answer(out[misalign : len(out) - 8], digests.tolist(), nonfinite.tolist(), over)


def bits(answer: Answer, code: int) -> np.ndarray:
    return answer.out.view(UNSIGNED[ITEMSIZE[code]])


def widened(array: np.ndarray) -> np.ndarray:
    """Return float64 values; numpy warns of signalling NaNs."""
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def narrowed(values: np.ndarray, code: int) -> np.ndarray:
    """Round values to a format, overflowing ones to zero; numpy warns of overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        array = values.astype(DTYPES[code])
    array[~np.isfinite(widened(array))] = 0
    return array


def random_finite(rng, code: int, size: int) -> np.ndarray:
    """Draw bit patterns, so all exponents, subnormals and zeros; non-finite ones become zero."""
    raw = rng.integers(0, 256, size * ITEMSIZE[code], dtype=np.uint8).view(DTYPES[code]).copy()
    wide = widened(raw)
    raw[~np.isfinite(wide)] = 0
    return raw


def boundaries(code, rng, count=200):
    """Midpoints of neighbours of a format, and the float64 numbers next to them; all signs, subnormals too."""
    raw = (
        np.arange(256, dtype=np.uint8)
        if ITEMSIZE[code] == 1
        else rng.integers(0, 1 << 62, count, dtype=np.uint64).astype(UNSIGNED[ITEMSIZE[code]])
    )
    top = UNSIGNED[ITEMSIZE[code]]((1 << (8 * ITEMSIZE[code] - 1)) - 1)
    raw = np.concatenate([raw & top, np.arange(20, dtype=raw.dtype)])
    a, b = widened(raw.view(DTYPES[code])), widened((raw + 1).view(DTYPES[code]))
    keep = np.isfinite(a) & np.isfinite(b)
    middle = (a[keep] + b[keep]) / 2
    edge = float(LARGEST[code]) + 2.0 ** (np.floor(np.log2(float(LARGEST[code]))) - MANTISSA[code] - 1)
    middle = np.concatenate([middle, [edge, float(LARGEST[code]), 2.0 ** LEAST[code], 1e300, 5e-324]])
    points = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    return np.concatenate([points, -points, [0.0, -0.0]])


def narrow_codes() -> list[int]:
    return [code for code in range(8) if code != F64]
