"""The extent of a tile bounds its elements: judged by brute force."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from exact import DTYPES, NAMES, random_finite

from streamsoup.kernels.extent import extent


@pytest.mark.parametrize("code", range(8), ids=NAMES)
def test_every_element_is_below_the_bound_and_a_multiple_of_the_unit(code):
    rng = np.random.default_rng(code)
    for size in (1, 2, 7, 64, 3000):
        array = np.ascontiguousarray(random_finite(rng, code, size)).view(DTYPES[code])
        above, unit, negative = extent(array.view(np.uint8).reshape(-1), code)
        for value in map(Fraction, array[:200].astype(np.float64).tolist()):
            assert abs(value) < Fraction(2) ** above
            assert (value / Fraction(2) ** unit).denominator == 1
        zeros = array.astype(np.float64) == 0
        assert negative == bool((zeros & np.signbit(array.astype(np.float64))).any())


@pytest.mark.parametrize("code", range(8), ids=NAMES)
def test_zeros_alone_bound_nothing(code):
    assert extent(np.zeros(5, DTYPES[code]).view(np.uint8), code) == (-5000, 5000, False)


def test_known_extents():
    assert extent(np.array([0.0, 0.75, -3.5, 1e-3], np.float32).view(np.uint8), 2) == (2, -33, False)
    assert extent(np.array([5e-324], np.float64).view(np.uint8), 3) == (-1021, -1074, False)


def test_misaligned_bytes_are_read_too():
    raw = np.zeros(13, np.uint8)
    raw[1:] = np.array([1.0, 2.0, 4.0], np.float32).view(np.uint8)
    assert extent(raw[1:], 2) == (3, -23, False)


@pytest.mark.parametrize("value", [np.inf, np.nan, -np.inf])
def test_what_is_not_finite_bounds_nothing(value):
    assert extent(np.array([0.0, value], np.float32).view(np.uint8), 2)[:2] == (5000, -5000)
