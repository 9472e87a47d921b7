"""Weights and coefficients: what they are divided by, and when they mean nothing."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamsoup.errors import RecipeError
from streamsoup.methods import linear
from streamsoup.methods.protocol import TensorInfo

finite = st.floats(allow_nan=False, allow_infinity=False)


def test_coefficients_are_applied_as_given():
    numbers = linear([2, -1, 0.1], normalize=False).numbers
    assert numbers.weights == (2.0, -1.0, 0.1)
    assert numbers.divisor == (1.0, 0.0)


def test_the_numbers_are_the_same_for_every_tensor():
    method = linear([1, 2], normalize=True)
    assert method.merge(TensorInfo("a", (1,)), None) is method.merge(TensorInfo("b", (2,)), None)


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=80))
def test_the_divisor_is_the_exact_sum_to_106_bits(weights):
    assume(len(set(weights)) > 1)
    numbers = linear(weights, normalize=True).numbers
    exact = sum(map(Fraction, weights))
    high, low = map(Fraction, numbers.divisor)
    assert numbers.weights == tuple(weights)
    assert float(exact) == numbers.divisor[0]
    assert abs(high + low - exact) <= exact / 2**105


@given(weight=finite.filter(bool), count=st.integers(1, 80))
def test_equal_weights_are_ones(weight, count):
    assert linear([weight] * count, normalize=True) == linear([1.0] * count, normalize=True)


@given(weights=st.lists(finite, min_size=1, max_size=20))
def test_extreme_weights_are_brought_into_range_and_change_no_quotient(weights):
    total, size = sum(map(Fraction, weights)), sum(abs(Fraction(w)) for w in weights)
    assume(size and abs(total) >= size / 10**6)
    numbers = linear(weights, normalize=True).numbers
    assert all(abs(w) <= 2.0**101 for w in numbers.weights)
    assert 2.0**-125 <= abs(numbers.divisor[0]) < 2.0**110
    high, low = map(Fraction, numbers.divisor)
    for before, after in zip(weights, numbers.weights, strict=True):
        want = Fraction(before) / total
        assert abs(Fraction(after) / (high + low) - want) <= abs(want) / 2**100 + Fraction(1, 2**900)


@pytest.mark.parametrize("weights", [[1, -1], [1, 1, -2], [1e300, -1e300], [1, -1 + 1e-9], [0.1, 0.2, -0.3]])
def test_weights_that_cancel_are_refused(weights):
    with pytest.raises(RecipeError, match=r"cancel.*coefficients"):
        linear(weights, normalize=True)
    linear(weights, normalize=False)


@pytest.mark.parametrize("weights", [[0.0], [0, 0, -0.0]])
def test_weights_that_are_all_zero_are_refused(weights):
    with pytest.raises(RecipeError, match="zero"):
        linear(weights, normalize=True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(bad, normalize):
    with pytest.raises(RecipeError, match="finite"):
        linear([1.0, bad], normalize=normalize)


def test_negative_weights_with_a_sound_sum_are_weights():
    numbers = linear([3, -1], normalize=True).numbers
    assert numbers.divisor == (2.0, 0.0)
    assert linear([-1, -3], normalize=True).numbers.divisor == (-4.0, 0.0)


def test_sums_beyond_float64_are_no_error():
    numbers = linear([1.7e308] * 10, normalize=True).numbers
    assert numbers.divisor[0] == 10 * numbers.weights[0]
