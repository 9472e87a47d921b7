from fractions import Fraction

import numpy as np
import pytest
from exact import BACKENDS, DTYPES, bits, expected, random_finite, run

from streamsoup.kernels.codes import BF16, F16, F32, F64, PAIR

on_both = pytest.mark.parametrize("backend", BACKENDS)
LARGEST = np.finfo(np.float64).max


def exact_sum(weights):
    total = sum(map(Fraction, weights), Fraction(0))
    high = float(total)
    return total, high, float(total - Fraction(high))


@on_both
@pytest.mark.parametrize("n", [1, 2, 3, 10, 72])
def test_identical_float64_ingredients_come_back_bit_for_bit(backend, n):
    rng = np.random.default_rng(n)
    x = np.concatenate(
        [
            random_finite(rng, F64, 3000),
            rng.standard_normal(1000),
            rng.integers(0, 1 << 53, 1000).view(np.float64),
            [-0.0, 0.0, 5e-324, -5e-324, LARGEST, -LARGEST, 2.0**-1022, -(2.0**-1023)],
        ]
    )
    for weights in ([1.0] * n, [float(w) for w in rng.random(n) + 0.01]):
        _, high, low = exact_sum(weights)
        answer = run(backend, [x] * n, [F64] * n, weights, high, F64, low=low)
        np.testing.assert_array_equal(bits(answer, F64), x.view(np.uint64))
        assert answer.overflowed == 0


@on_both
@pytest.mark.parametrize("out_code", [BF16, F16, F32, F64], ids=["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize("n", [2, 10])
def test_results_are_correctly_rounded_over_all_exponents(backend, out_code, n):
    rng = np.random.default_rng(n + out_code)
    weights = [float(w) for w in rng.random(n) + 0.1]
    total, high, low = exact_sum(weights)
    base = random_finite(rng, F64, 400)
    base[:200] = rng.standard_normal(200)
    arrays = [(base * (0.5 + rng.random(400) / 2)) for _ in range(n)]
    answer = run(backend, arrays, [F64] * n, weights, high, out_code, low=low)
    np.testing.assert_array_equal(bits(answer, out_code), expected(arrays, [F64] * n, weights, total, out_code))


@on_both
def test_subnormal_means_are_correctly_rounded(backend):
    rng = np.random.default_rng(0)
    arrays = [(rng.integers(0, 1 << 54, 2000) - 0).view(np.float64) for _ in range(3)]
    arrays[1] = -arrays[1]
    for weights in ([1.0] * 3, [0.3, 0.25, 0.45]):
        total, high, low = exact_sum(weights)
        answer = run(backend, arrays, [F64] * 3, weights, high, F64, low=low)
        np.testing.assert_array_equal(bits(answer, F64), expected(arrays, [F64] * 3, weights, total, F64))


@on_both
def test_ties_of_subnormals_go_to_even(backend):
    odd = np.arange(1, 99, 2, dtype=np.int64)
    arrays = [odd.view(np.float64), np.zeros(len(odd))]
    answer = run(backend, arrays, [F64] * 2, [1.0, 1.0], 2.0, F64, low=0.0)
    np.testing.assert_array_equal(bits(answer, F64), expected(arrays, [F64] * 2, [1.0, 1.0], Fraction(2), F64))


@on_both
def test_cancellation_leaves_what_float64_would_lose(backend):
    arrays = [np.array([v]) for v in (1e16, 1.0, -1e16, 2.0**-40)]
    answer = run(backend, arrays, [F64] * 4, [1.0] * 4, 4.0, F64, low=0.0)
    assert bits(answer, F64).view(np.float64)[0] == (1.0 + 2.0**-40) / 4


@on_both
def test_mean_of_maxima_is_the_maximum_and_their_sum_overflows(backend):
    x = np.array([LARGEST, -LARGEST])
    mean = run(backend, [x, x], [F64] * 2, [1.0, 1.0], 2.0, F64, low=0.0)
    np.testing.assert_array_equal(bits(mean, F64).view(np.float64), x)
    total = run(backend, [x, x], [F64] * 2, [1.0, 1.0], 1.0, F64, low=0.0)
    np.testing.assert_array_equal(bits(total, F64).view(np.float64), [np.inf, -np.inf])
    assert (mean.overflowed, total.overflowed) == (0, 2)


@on_both
def test_running_pair_continues_to_the_bits_of_one_pass(backend):
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(5000) for _ in range(4)]
    weights = [0.1, 0.7, 0.4, 0.9]
    _, high, low = exact_sum(weights)
    whole = run(backend, arrays, [F64] * 4, weights, high, F64, low=low)
    pair = run(backend, arrays[:2], [F64] * 2, weights[:2], 1.0, PAIR, low=0.0)
    rest = run(
        backend, [pair.out, *arrays[2:]], [PAIR, F64, F64], [1.0, *weights[2:]], high, F64,
        low=low, hashed=[False, True, True],
    )  # fmt: skip
    np.testing.assert_array_equal(whole.out, rest.out)
    assert rest.digests[0] == 0


@on_both
def test_mixed_sources_join_float64(backend):
    rng = np.random.default_rng(4)
    codes = [0, 3, 1, 2, 4, 5, 6, 7]
    arrays = [rng.standard_normal(300).astype(DTYPES[code]) for code in codes]
    weights = [float(w) for w in rng.random(8)]
    total, high, low = exact_sum(weights)
    for out_code in (BF16, F64):
        answer = run(backend, arrays, codes, weights, high, out_code, low=low)
        np.testing.assert_array_equal(bits(answer, out_code), expected(arrays, codes, weights, total, out_code))


@pytest.mark.parametrize("divisor", [1.0, -2.0, 8.0, 2.0**64, 2.0**65, 2.0**-64, 3.0])
@pytest.mark.parametrize("out_code", [F64, PAIR, F32], ids=["f64", "pair", "f32"])
def test_scaling_by_powers_of_two_gives_the_bits_of_a_division(divisor, out_code):
    rng = np.random.default_rng(int(abs(divisor)) % 97)
    base = random_finite(rng, F64, 3001)
    base[:1000] *= 2.0**-480
    base[500:700] = rng.standard_normal(200) * 2.0**-499
    base[700:800] = 0.0
    almost = -base * (1.0 + 2.0**-52 * rng.integers(-2, 3, 3001))
    arrays = [base, almost, rng.integers(-9, 10, 3001) * 5e-324]
    for weights in ([1.0] * 3, [1.0, 2.0**-300, 2.0**-399]):
        arguments = (arrays, [F64] * 3, weights, divisor, out_code)
        one, other = run("numba", *arguments, low=0.0), run("torch", *arguments, low=0.0)
        np.testing.assert_array_equal(one.out, other.out)
        assert one[1:] == other[1:]


@pytest.mark.parametrize("divisor", [1.0, 2.0, 3.0])
def test_a_pair_alone_is_made_canonical_the_same_way(divisor):
    rng = np.random.default_rng(6)
    pair = rng.standard_normal(2000) * 2.0 ** rng.integers(-80, 80, 2000)
    pair[1:200:2] = -0.0
    pair[200:300:2] = -0.0
    for out_code in (PAIR, F64):
        one, other = (run(backend, [pair], [PAIR], [1.0], divisor, out_code, low=0.0) for backend in BACKENDS)
        np.testing.assert_array_equal(one.out, other.out)
