from fractions import Fraction

import numpy as np
import pytest
from exact import (
    BACKENDS,
    DTYPES,
    LARGEST,
    LEAST,
    MANTISSA,
    NAMES,
    SIGNED_ZERO,
    UNSIGNED,
    bits,
    boundaries,
    encoded,
    expected,
    narrowed,
    random_finite,
    run,
    widened,
)

from streamsoup.kernels.codes import BF16, CANONICAL_NAN, F8_E4M3, F8_E5M2, F16, F32, F64, ITEMSIZE

ALL = range(8)
on_both = pytest.mark.parametrize("backend", BACKENDS)
each_code = pytest.mark.parametrize("code", ALL, ids=NAMES)


@on_both
@each_code
@pytest.mark.parametrize("n", [1, 2, 10, 72])
def test_realistic_means_are_never_wrongly_rounded(backend, code, n):
    rng = np.random.default_rng(n)
    base = rng.standard_normal(300) * 0.02
    arrays = [(base + rng.standard_normal(300) * 1e-3).astype(DTYPES[code]) for _ in range(n)]
    for weights in ([1.0] * n, [float(w) for w in rng.integers(1, 9, n)]):
        answer = run(backend, arrays, [code] * n, weights, sum(weights), code)
        if code != F64:
            want = expected(arrays, [code] * n, weights, Fraction(sum(weights)), code)
            np.testing.assert_array_equal(bits(answer, code), want)
        assert answer.overflowed == 0


@on_both
@each_code
def test_exact_sums_are_correctly_rounded_for_every_output(backend, code):
    rng = np.random.default_rng(5)
    source = F8_E5M2 if code in (F8_E4M3, F8_E5M2) else BF16
    arrays = [random_finite(rng, source, 600) for _ in range(2)]
    # Within 2**40 of each other, so the float64 sum is exact, over every exponent.
    for array in arrays[1:]:
        array[:] = narrowed(widened(arrays[0]) * rng.integers(-8, 9, 600) / 8, source)
    answer = run(backend, arrays, [source] * 2, [1.0, 3.0], 4.0, code)
    np.testing.assert_array_equal(bits(answer, code), expected(arrays, [source] * 2, [1.0, 3.0], Fraction(4), code))


@on_both
@pytest.mark.parametrize("code", [c for c in ALL if c != F64], ids=[n for n in NAMES if n != "f64"])
def test_float64_is_rounded_once_at_every_boundary(backend, code):
    points = boundaries(code, np.random.default_rng(0))
    answer = run(backend, [points], [F64], [1.0], 1.0, code)
    np.testing.assert_array_equal(bits(answer, code), expected([points], [F64], [1.0], Fraction(1), code))
    wide = run(backend, [points], [F64], [1.0], 1.0, code, low=0.0)
    np.testing.assert_array_equal(wide.out, answer.out)
    assert wide[1:] == answer[1:]


@on_both
@each_code
def test_every_pattern_survives_alone_and_among_copies_of_itself(backend, code):
    if ITEMSIZE[code] <= 2:
        raw = np.arange(1 << 8 * ITEMSIZE[code]).astype(UNSIGNED[ITEMSIZE[code]])
    else:
        raw = np.random.default_rng(1).integers(0, 1 << 63, 5000, dtype=np.uint64).astype(UNSIGNED[ITEMSIZE[code]])
    array = raw.view(DTYPES[code])
    want, nan = raw.copy(), np.isnan(widened(array))
    want[nan] = CANONICAL_NAN[code]
    bad = int((~np.isfinite(widened(array))).sum())
    for weights in ([1.0], [1.0, 1.0], [1.0] * 10, [0.3, 0.3, 0.4], [1.0] * 72):
        if len(weights) > 3 and len(raw) > 5000:
            continue
        if code == F64 and len(weights) > 2:
            continue  # float64 accumulation of float64 is for running sums; combine_wide keeps this promise
        n, total = len(weights), float(np.sum(weights))
        answer = run(backend, [array] * n, [code] * n, weights, total, code)
        if code == F64 and n == 2:
            huge = np.abs(widened(array)) > 2.0**1022
            np.testing.assert_array_equal(bits(answer, code)[~huge], want[~huge])
        else:
            np.testing.assert_array_equal(bits(answer, code), want)
            assert answer.overflowed == 0
        assert answer.nonfinite == [bad] * n


@on_both
@pytest.mark.parametrize("out_code", ALL, ids=NAMES)
def test_adversarial_sums_stay_within_the_stated_bound(backend, out_code):
    rng = np.random.default_rng(3)
    codes = [BF16, F16, F32, BF16, F32, F16, BF16, F32, F16, BF16, F32]
    arrays = [random_finite(rng, code, 300) for code in codes]
    for array, code in zip(arrays, codes, strict=True):
        array[150:] = narrowed(rng.standard_normal(150) * 2.0 ** rng.integers(-20, 8, 150), code)
    arrays[-1] = -arrays[0].astype(np.float32)  # cancellation
    weights = [float(w) for w in rng.standard_normal(len(codes))]
    weights[-1] = weights[0]
    total = float(np.sum(weights))
    answer = run(backend, arrays, codes, weights, total, out_code)
    got = bits(answer, out_code)
    got = widened(got.view(DTYPES[out_code]))
    columns = zip(*[a.astype(np.float64) for a in arrays], strict=True)
    compared = 0
    for value, column in zip(got, columns, strict=True):
        if not np.isfinite(value):
            continue
        terms = [Fraction(w) * Fraction(x) for w, x in zip(weights, column, strict=True)]
        exact = sum(terms, Fraction(0)) / Fraction(total)
        slack = (len(codes) + 2) * Fraction(2) ** -53 * sum(map(abs, terms)) / abs(Fraction(total))
        scale = max(abs(Fraction(value)), Fraction(2) ** LEAST[out_code])
        exponent = scale.numerator.bit_length() - scale.denominator.bit_length()
        half_ulp = Fraction(2) ** (exponent - MANTISSA[out_code] - 1)
        assert abs(Fraction(value) - exact) <= half_ulp + slack
        compared += 1
    assert compared > 30


@on_both
@pytest.mark.parametrize("code", [BF16, F16, F32], ids=["bf16", "f16", "f32"])
def test_mean_of_two_largest_numbers_is_the_largest(backend, code):
    array = np.array([float(LARGEST[code]), -float(LARGEST[code])]).astype(DTYPES[code])
    answer = run(backend, [array, array], [code] * 2, [1.0, 1.0], 2.0, code)
    np.testing.assert_array_equal(bits(answer, code), array.view(UNSIGNED[ITEMSIZE[code]]))
    assert answer.overflowed == 0


@on_both
def test_cancelling_large_numbers_leave_the_small_one(backend):
    arrays = [np.array([v]).astype(DTYPES[BF16]) for v in (2.0**24, 1.0, -(2.0**24))]
    answer = run(backend, arrays, [BF16] * 3, [1.0] * 3, 3.0, F32)
    assert bits(answer, F32)[0] == encoded(Fraction(1, 3), F32)


@on_both
@each_code
def test_overflow_and_non_finite_sources_are_counted_apart(backend, code):
    top = float(LARGEST[code])
    first = np.array([top, 1.0, np.nan, np.inf, top, -top] + [0.0] * 3000).astype(DTYPES[code])
    second = np.array([top, 1.0, 1.0, -np.inf, 0.0, -top] + [0.0] * 3000).astype(DTYPES[code])
    second[3004] = np.nan
    low = 0.0 if code == F64 else None
    answer = run(backend, [first, second], [code] * 2, [1.0, 1.0], 1.0, code, low=low)
    assert answer.overflowed == 2
    assert answer.nonfinite == [2, 2]
    assert bits(answer, code)[2] == CANONICAL_NAN[code]
    assert bits(answer, code)[3] == CANONICAL_NAN[code]
    assert bits(answer, code)[0] == encoded(Fraction(2) * LARGEST[code], code)
    assert bits(answer, code)[5] == encoded(Fraction(-2) * LARGEST[code], code)


@on_both
@each_code
@pytest.mark.parametrize("divisor", [1.0, 2.0, 3.0, -3.0])
def test_negative_zero_survives(backend, code, divisor):
    zeros = np.array([-0.0] * 40).astype(DTYPES[code])
    answer = run(backend, [zeros] * 3, [code] * 3, [1.0] * 3, divisor, code)
    wide = run(backend, [zeros] * 3, [code] * 3, [1.0] * 3, divisor, code, low=0.0)
    negative = SIGNED_ZERO[code] and divisor > 0
    want = (1 << (8 * ITEMSIZE[code] - 1)) if negative else 0
    assert set(bits(answer, code).tolist()) == {want}
    assert set(bits(wide, code).tolist()) == {want}
