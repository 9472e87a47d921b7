"""The one exact reference, for whole checkpoints: rationals, rounded once (`exact.py` beside the kernels' tests)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from exact import encoded, expected, rounded
from factory import DTYPES, bits, dtype_name

from streamsoup.dtypes import BY_NAME

U = Fraction(1, 2**53)


def code_of(dtype: str) -> int:
    """Return the kernels' number of a dtype."""
    return BY_NAME[dtype].kernel_code


def exact_bits(arrays: Sequence[np.ndarray], weights: Sequence[float], divisor: Fraction, out: str) -> np.ndarray:
    """Bits of the exact combination of finite arrays, rounded once into `out`, flat."""
    flat = [array.reshape(-1) for array in arrays]
    codes = [code_of(dtype_name(array)) for array in flat]
    return expected(flat, codes, weights, divisor, code_of(out))


def assert_within_bound(
    arrays: Sequence[np.ndarray], weights: Sequence[float], divisor: Fraction, out: np.ndarray, where: str = ""
) -> None:
    """Check ½ ulp + (N + 2)·2⁻⁵³·Σ|wθ|/|W|, element by element: rounding is monotone, so both ends are rounded.

    Where a float64 takes part the unit is 2⁻¹⁰⁰ instead, and 2⁻¹⁰⁷⁴ for each product that underflows.
    """
    code = code_of(dtype_name(out))
    wide = any(a.dtype == np.float64 for a in (*arrays, out))
    unit = Fraction(1, 2**100) if wide else U
    flat = [array.reshape(-1).astype(np.float64) for array in arrays]
    w = [Fraction(x) for x in weights]
    n = len(w)
    values = out.reshape(-1)
    for j in range(len(values)):
        products = [a * Fraction(float(x[j])) for a, x in zip(w, flat, strict=True)]
        exact = sum(products, Fraction(0)) / divisor
        slack = (n + 2) * unit * sum(map(abs, products), Fraction(0)) / abs(divisor)
        slack += n * Fraction(1, 2**1074) / min(abs(divisor), 1)
        found = float(values[j])
        low, high = rounded(exact - slack, code), rounded(exact + slack, code)
        if not np.isfinite(found):
            assert low is None or high is None, f"{where}[{j}]: {found}, exactly {float(exact)!r}"
            continue
        assert low is None or Fraction(found) >= low, f"{where}[{j}]: {found!r} is below {float(exact)!r}"
        assert high is None or Fraction(found) <= high, f"{where}[{j}]: {found!r} is above {float(exact)!r}"


def one(value: Fraction, dtype: str) -> np.ndarray:
    """A single exact value rounded into a dtype."""
    code = code_of(dtype)
    kind = DTYPES[dtype]
    return np.array([encoded(value, code)], np.dtype(f"u{kind.itemsize}")).view(kind)


__all__ = ["assert_within_bound", "bits", "code_of", "exact_bits", "one"]
