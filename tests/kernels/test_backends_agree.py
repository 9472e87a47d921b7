from fractions import Fraction

import numpy as np
import pytest
from exact import DTYPES, NAMES, random_finite, run
from hypothesis import given, settings
from hypothesis import strategies as st

from streamsoup.backends.cuda import TorchBackend
from streamsoup.backends.protocol import Blend
from streamsoup.kernels import combine as compiled
from streamsoup.kernels.codes import BLOCK, F64, ITEMSIZE, PAIR
from streamsoup.tiling import TileNeeds, Tiling, slot_bytes

lengths = st.one_of(st.integers(1, 70), st.sampled_from([511, 512, 513, BLOCK - 1, BLOCK, BLOCK + 1, 5000]))


def same(one, other):
    np.testing.assert_array_equal(one.out, other.out)
    assert one[1:] == other[1:]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    codes=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    out_code=st.integers(0, 7),
    elements=lengths,
    patterns=st.booleans(),
    wide=st.booleans(),
    first_block=st.integers(0, 2**40),
    misalign=st.integers(0, 15),
    uniform=st.booleans(),
)
def test_same_bits_digests_and_counts(seed, codes, out_code, elements, patterns, wide, first_block, misalign, uniform):
    rng = np.random.default_rng(seed)
    if uniform:
        codes = [codes[0]] * len(codes)
    arrays = [
        rng.integers(0, 256, elements * ITEMSIZE[code], dtype=np.uint8).view(DTYPES[code])
        if patterns
        else rng.standard_normal(elements).astype(DTYPES[code])
        for code in codes
    ]
    weights = [1.0] * len(codes) if rng.random() < 0.5 else rng.standard_normal(len(codes)).tolist()
    hashed = [bool(h) for h in rng.integers(0, 2, len(codes))]
    divisor = float(rng.choice([1.0, float(len(codes)), -2.0, 0.7]))
    low = (1e-17 if rng.random() < 0.5 else 0.0) if wide else None
    options = {"low": low, "first_block": first_block, "hashed": hashed}
    same(
        run("numba", arrays, codes, weights, divisor, out_code, misalign=misalign, **options),
        run("torch", arrays, codes, weights, divisor, out_code, **options),
    )


def single_reference(arrays, weights, divisor):
    """Every operation in float32, one by one."""
    total = None
    with np.errstate(all="ignore"):
        for array, weight in zip(arrays, weights, strict=True):
            product = array.astype(np.float32) * np.float32(weight)
            total = product if total is None else total + product
        return total / np.float32(divisor)


NARROW = [code for code in range(8) if code != F64]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    codes=st.lists(st.sampled_from(NARROW), min_size=1, max_size=20),
    out_code=st.sampled_from(NARROW),
    elements=lengths,
    patterns=st.booleans(),
    misalign=st.integers(0, 15),
)
def test_sums_in_float32(seed, codes, out_code, elements, patterns, misalign):
    rng = np.random.default_rng(seed)
    arrays = [
        rng.integers(0, 256, elements * ITEMSIZE[code], dtype=np.uint8).view(DTYPES[code])
        if patterns
        else rng.standard_normal(elements).astype(DTYPES[code])
        for code in codes
    ]
    weights = [1.0] * len(codes) if rng.random() < 0.5 else rng.standard_normal(len(codes)).tolist()
    divisor = float(rng.choice([1.0, float(len(codes)), -2.0, 0.7]))
    found = run("numba", arrays, codes, weights, divisor, out_code, single=True, misalign=misalign)
    same(found, run("torch", arrays, codes, weights, divisor, out_code, single=True))
    expected = single_reference(arrays, weights, divisor)
    single = run("numba", arrays, codes, weights, divisor, 2, single=True).out.view(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(single[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert np.isnan(single[nan]).all()
    # The one rounding to the output is that of a float64 soup of this one number.
    again = run("numba", [expected], [2], [1.0], 1.0, out_code)
    np.testing.assert_array_equal(found.out, again.out)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-140])
@pytest.mark.parametrize("weights", [[1.0] * 7, [0.3, -0.1, 1.7, 0.9, 0.5, 1e-3, 2.2]])
def test_sums_in_float32_keep_their_bound(backend, scale, weights):
    """As docs/numerics.md has it; the output is float32, so that nothing hides behind its rounding."""
    arrays = [(np.random.default_rng(i).standard_normal(300) * scale).astype(np.float32) for i in range(7)]
    total = sum(map(Fraction, weights))
    found = run(backend, arrays, [2] * 7, weights, float(total), 2, single=True).out.view(np.float32)
    terms = 7 if len(set(weights)) == 1 else 7 + 3
    for j, value in enumerate(found.tolist()):
        products = [Fraction(w) * Fraction(float(a[j])) for w, a in zip(weights, arrays, strict=True)]
        small = 7 * Fraction(2) ** -150 / total + Fraction(2) ** -150
        bound = terms * Fraction(2) ** -24 * sum(map(abs, products)) / total + small
        assert abs(Fraction(value) - sum(products) / total) <= bound * (1 + Fraction(1, 10**5))


def test_sums_in_float32_are_not_those_in_float64():
    arrays = [np.array([2.0**24], np.float32), np.ones(1, np.float32), np.ones(1, np.float32)]
    values = [run("numba", arrays, [2] * 3, [1.0] * 3, 1.0, 2, single=s).out.view(np.float32)[0] for s in (True, False)]
    assert values == [2.0**24, 2.0**24 + 2]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), elements=lengths, out_code=st.sampled_from([0, 2, 3, 4, 7, PAIR]))
def test_pairs_agree(seed, elements, out_code):
    rng = np.random.default_rng(seed)
    high = random_finite(rng, F64, elements)
    pair = np.stack([high, high * 2.0**-54], axis=1).reshape(-1)
    arrays = [pair, random_finite(rng, F64, elements), rng.integers(0, 256, 8 * elements, dtype=np.uint8)]
    arguments = (arrays, [PAIR, F64, F64], [1.0, 0.3, 1.0], 1.0, out_code)
    same(run("numba", *arguments, low=0.0), run("torch", *arguments, low=0.0))


@pytest.mark.parametrize("code", [*range(8), PAIR], ids=[*NAMES, "pair"])
@pytest.mark.parametrize("wide", [False, True])
def test_running_sum_in_place_equals_the_same_sum_elsewhere(code, wide):
    if code == PAIR and not wide:
        pytest.skip("PAIR belongs to combine_wide")
    rng = np.random.default_rng(code)
    kind = DTYPES[F64 if code == PAIR else code]
    held = rng.standard_normal(5000 * (2 if code == PAIR else 1)).astype(kind)
    held[7] = np.nan
    more = rng.standard_normal(5000).astype(DTYPES[0])
    more[4000] = np.inf
    codes, weights = [code, 0], [1.0, 2.0]
    low = 0.0 if wide else None
    elsewhere = run("numba", [held, more], codes, weights, 1.0, code, low=low)
    digests, nonfinite = np.zeros(2, np.uint64), np.zeros(2, np.int64)
    function, rest = (compiled.combine_wide, [0.0]) if wide else (compiled.combine, [])
    over = function(
        np.array([held.ctypes.data, more.ctypes.data], np.uint64), np.array(codes, np.uint8),
        np.array(weights), 1.0, *rest, 5000, 0, held.ctypes.data, code,
        np.ones(2, np.uint8), digests, nonfinite,
    )  # fmt: skip
    np.testing.assert_array_equal(held.view(np.uint8), elsewhere.out)
    assert (digests.tolist(), nonfinite.tolist(), over) == elsewhere[1:]
    assert elsewhere.nonfinite[1] == 1


def test_tiles_of_any_size_give_the_same_bits_and_digests():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(5 * BLOCK + 77).astype(DTYPES[0]) for _ in range(9)]
    whole = run("numba", arrays, [0] * 9, [1.0] * 9, 9.0, 0)
    for blocks in (1, 2, 4):
        parts = [
            run(
                "numba", [a[at : at + blocks * BLOCK] for a in arrays], [0] * 9, [1.0] * 9, 9.0, 0,
                first_block=at // BLOCK,
            )
            for at in range(0, len(arrays[0]), blocks * BLOCK)
        ]  # fmt: skip
        np.testing.assert_array_equal(np.concatenate([p.out for p in parts]), whole.out)
        assert [sum(d) % 2**64 for d in zip(*[p.digests for p in parts], strict=True)] == whole.digests


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    codes=st.lists(st.integers(0, 7), min_size=1, max_size=9),
    out_code=st.integers(0, 7),
    elements=st.one_of(st.sampled_from([1, BLOCK, BLOCK + 1, 5 * BLOCK]), st.integers(1, 6 * BLOCK)),
    budget=st.integers(1 << 20, 1 << 22),
    group=st.integers(1, 9),
    first_block=st.integers(0, 2**40),
    devices=st.integers(1, 2),
    single=st.booleans(),
)
def test_a_slot_of_a_device_has_the_bits_of_one_call(
    seed, codes, out_code, elements, budget, group, first_block, devices, single
):
    """In pieces, in groups, and in a slot that was used before."""
    rng = np.random.default_rng(seed)
    wide = out_code == F64 or F64 in codes
    single &= not wide
    group = len(codes) if wide else min(group, len(codes))
    arrays = [rng.integers(0, 256, elements * ITEMSIZE[c], dtype=np.uint8).view(DTYPES[c]) for c in codes]
    weights, divisor = rng.standard_normal(len(codes)).tolist(), 0.7
    hashed = rng.integers(0, 2, len(codes))
    tile = -(-elements // BLOCK) * BLOCK
    needs = TileNeeds(len(codes), 8, 8, staged=True, largest_elements=elements, wide=wide, locked=True)
    tiling = Tiling(devices, tile, group, slot_bytes(needs, tile, group))
    backend = TorchBackend(["cpu"] * devices, 8 * budget)
    slots = [backend.slot(tiling, needs) for _ in range(devices)]
    blend = Blend(
        np.array(codes, np.uint8), tuple(ITEMSIZE[c] for c in codes), np.array(weights), (divisor, 0.0),
        hashed.astype(np.uint8), out_code, ITEMSIZE[out_code], wide, single,
    )  # fmt: skip
    low = 0.0 if wide else None
    options = {"low": low, "single": single, "first_block": first_block, "hashed": hashed.astype(bool).tolist()}
    expected = run("numba", arrays, codes, weights, divisor, out_code, **options)
    for slot in [*slots, slots[0]]:
        token = None
        for first in range(0, len(codes), group):
            part = arrays[first : first + group]
            for index, array in enumerate(part):
                slot.staging(index, array.nbytes)[:] = array.tobytes()
            token = slot.combine([0] * len(part), blend, first, elements, first_block)
        found = token.result()
        np.testing.assert_array_equal(np.frombuffer(found.output, np.uint8), expected.out)
        assert found.digests.tolist() == expected.digests
        if group == len(codes):  # what overflows on the way is found in the group that it belongs to
            assert (found.nonfinite.tolist(), found.overflowed) == expected[2:]
