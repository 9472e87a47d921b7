"""Whether sums are exact in any order is decided from magnitudes alone; brute force and rationals judge it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from exact import DTYPES, NAMES, random_finite, widened
from factory import fine_tunes, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import streamsoup
from streamsoup.checkpoints import open_checkpoints
from streamsoup.dtypes import DTYPES as FORMAT_DTYPES
from streamsoup.kernels.extent import extent
from streamsoup.read import OpenFiles, open_source
from streamsoup.sums.exactness import Entered, Extent, MeasuringSource, is_exact
from streamsoup.tiling import BLOCK_ELEMENTS

F64 = NAMES.index("f64")
LEAST_UNIT = (-133, -24, -149, -1074, -9, -16, -10, -17)  # exponent of the smallest subnormal, by code
# e4m3fnuz and e5m2fnuz have one exponent bias more than their cousins.


def unit_of(values, code):
    """Exponent of the last bit that the smallest element might have, from the definition of the format."""
    mantissa = (7, 10, 23, 52, 3, 2, 3, 2)[code]
    smallest = min(abs(Fraction(float(v))) for v in values if v != 0)
    exponent = 0
    while Fraction(2) ** (exponent + 1) <= smallest:
        exponent += 1
    while Fraction(2) ** exponent > smallest:
        exponent -= 1
    return max(exponent - mantissa, LEAST_UNIT[code])


def check(array, code):
    above, unit, _ = extent(np.ascontiguousarray(array).view(np.uint8).reshape(-1), code)
    values = [v for v in widened(array).tolist() if v != 0]
    if not values:
        assert (above, unit) == (-5000, 5000)
        return
    for v in values:
        assert abs(Fraction(v)) < Fraction(2) ** above
        assert (Fraction(v) / Fraction(2) ** unit).denominator == 1
    largest = max(abs(Fraction(v)) for v in values)
    assert Fraction(2) ** (above - 1) <= largest or above == LEAST_UNIT[code] + (7, 10, 23, 52, 3, 2, 3, 2)[code] + 1
    assert unit == unit_of(values, code), "not the tightest that the formats allow"


@pytest.mark.parametrize("code", range(8), ids=NAMES)
def test_extents_bound_random_elements_as_tightly_as_the_format_allows(code):
    rng = np.random.default_rng(code)
    for size in (1, 2, 3, 8, 31, 64):
        for _ in range(12 if code == F64 else 20):
            check(random_finite(rng, code, size).view(DTYPES[code]), code)


@pytest.mark.parametrize("code", [c for c in range(8) if DTYPES[c].itemsize == 1], ids=lambda c: NAMES[c])
def test_extents_of_every_number_of_eight_bits(code):
    everything = np.arange(256, dtype=np.uint8).view(DTYPES[code])
    for number in everything[np.isfinite(widened(everything))]:
        check(np.array([number], DTYPES[code]), code)


@pytest.mark.parametrize(
    "values",
    [
        [5e-324],
        [5e-324, 1.7976931348623157e308],
        [2.2250738585072014e-308, -2.225073858507201e-308],
        [-0.0, 0.0],
        [-0.0, 1.0],
        [1.7976931348623157e308],
        [2.0**-1074, 2.0**1023],
    ],
)
def test_extents_at_the_edges_of_float64(values):
    check(np.array(values), F64)


def test_numbers_of_large_tiles_are_all_looked_at():
    """A compiled loop may treat its last few elements, or its first lanes, on their own."""
    for size in (255, 256, 257, 4095, 4097):
        for place in (0, 1, size // 2, size - 2, size - 1):
            array = np.ones(size, np.float32)
            array[place] = 2.0**-40
            assert extent(array.view(np.uint8), 2)[1] == -63
            array[place] = 2.0**40
            assert extent(array.view(np.uint8), 2)[0] == 41


# -- is_exact -----------------------------------------------------------------------------------------------------

ELEMENTS = st.lists(
    st.builds(lambda m, e: float(np.ldexp(float(m), e)), st.integers(-255, 255), st.sampled_from([-9, -8, 0, 20, 40])),
    min_size=3,
    max_size=3,
)
WEIGHTS = st.sampled_from([1.0, 2.0, 0.5, 0.75, 0.1, 3.0, 1e-3, 255 / 256])


def extent_of(values):
    above, unit, _ = extent(np.array(values, np.float32).view(np.uint8), 2)
    return Extent(np.array([above], np.int32), np.array([unit], np.int32), np.zeros(1, np.bool_))


@given(ingredients=st.lists(st.tuples(ELEMENTS, WEIGHTS), min_size=1, max_size=4), digits=st.sampled_from([53, 24]))
def test_where_it_says_exact_every_order_of_adding_and_removing_is(ingredients, digits):
    terms = {str(i): weight for i, (_, weight) in enumerate(ingredients)}
    extents = {str(i): extent_of(values) for i, (values, _) in enumerate(ingredients)}
    if not is_exact({path: Entered.of(w) for path, w in terms.items()}, extents, digits=digits):
        return
    kind = np.float64 if digits == 53 else np.float32
    for order in itertools.islice(itertools.permutations(range(len(ingredients))), 24):
        for leaving in range(len(order)):
            total = np.zeros(3, kind)
            rational = [Fraction(0)] * 3
            steps = [(i, 1) for i in order] + [(i, -1) for i in order[:leaving]]
            for i, sign in steps:
                values, weight = ingredients[i]
                # as the engine does: product and sum in float64, one rounding into the sum's dtype
                total = (total.astype(np.float64) + sign * weight * np.array(values)).astype(kind)
                rational = [r + sign * Fraction(weight) * Fraction(v) for r, v in zip(rational, values, strict=True)]
                assert [Fraction(float(t)) for t in total] == rational


def test_it_does_say_exact_of_real_fine_tunes_in_16_bits(tmp_path):
    runs = fine_tunes(tmp_path, 6, dtype="BF16")
    running = streamsoup.RunningSoup(runs, budget_bytes=1 << 28)
    for path in runs:
        running.add(path)
    running.remove(runs[2]).remove(runs[4]).add(runs[0]).add(runs[2])
    assert running.rebuilt == 0, "sums of 16-bit ingredients with equal weights never need to be made anew"


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 0.7])
def test_weights_with_many_digits_are_not_exact(weight):
    values = {"a": extent_of([1.0, 3.0]), "b": extent_of([5.0])}
    assert is_exact({"a": Entered.of(1.0), "b": Entered.of(1.0)}, values, digits=53)
    assert not is_exact({"a": Entered.of(weight), "b": Entered.of(1.0)}, values, digits=53)


def test_what_was_never_measured_is_not_exact():
    assert not is_exact({"a": Entered.of(1.0)}, {}, digits=53)
    assert is_exact({}, {}, digits=53)


def test_the_bound_is_where_it_should_be():
    one, tiny = extent_of([1.0]), extent_of([2.0**-29])
    assert is_exact({"a": Entered.of(1.0), "b": Entered.of(1.0)}, {"a": one, "b": tiny}, digits=54)
    assert not is_exact({"a": Entered.of(1.0), "b": Entered.of(1.0)}, {"a": one, "b": tiny}, digits=53)
    assert is_exact({"a": Entered.of(1.0), "b": Entered.of(1.0)}, {"a": extent_of([0.5]), "b": tiny}, digits=53)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_extents_measured_tile_by_tile_are_those_of_the_whole(tmp_path, dtype):
    rng = np.random.default_rng(3)
    size = 3 * BLOCK_ELEMENTS + 100
    values = rng.standard_normal(size) * 2.0 ** rng.integers(-9, 9, size)
    kind = next(d for d, name in zip(DTYPES, NAMES, strict=True) if name == dtype.lower())
    path = write_checkpoint(tmp_path / "run", {"a": values.astype(kind), "ids": np.arange(5), "z": np.zeros(7, kind)})
    (checkpoint,) = open_checkpoints([str(path)])
    files = OpenFiles()
    source = MeasuringSource(open_source(checkpoint, "map", files), checkpoint.table)
    for t in (2, 0, 1):
        nbytes, item = int(checkpoint.table.nbytes[t]), checkpoint.table.dtype(t).itemsize
        step = BLOCK_ELEMENTS * item
        for offset in reversed(range(0, nbytes, step)):
            source.fetch(t, offset, min(step, nbytes - offset), None)
    source.close()
    files.close()
    code = FORMAT_DTYPES[int(checkpoint.table.dtypes[0])].kernel_code
    expected = extent(np.ascontiguousarray(values.astype(kind)).view(np.uint8), code)[:2]
    assert (source.extent.above[0], source.extent.unit[0]) == expected
    assert (source.extent.above[1], source.extent.unit[1]) == (-5000, 5000)  # not a float: nothing to add up
    assert (source.extent.above[2], source.extent.unit[2]) == (-5000, 5000)
