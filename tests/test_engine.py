"""The numbers, on both backends, against exact rationals; and what may not change a bit of them."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import weakref
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from factory import DTYPES, FLOATS, any_bits, bits, fine_tunes, realistic, same_bits, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import assert_within_bound, exact_bits, one
from simmer import MemorySink, plan_for, simmer

from streamsoup.backends import open_backend
from streamsoup.engine import Engine
from streamsoup.errors import DiskSpaceError, IngredientReadError, RecipeError
from streamsoup.outcome import Progress
from streamsoup.read import MappedSource
from streamsoup.source import Source
from streamsoup.tiling import BLOCK_ELEMENTS

NARROW = tuple(name for name in FLOATS if name != "F64")
NATIVE = ("BF16", "F16", "F32", "F64")


def write_all(folder: Path, checkpoints: list[dict[str, np.ndarray]], **options: object) -> list[Path]:
    return [write_checkpoint(folder / f"i{n}", tensors, **options) for n, tensors in enumerate(checkpoints)]


def scalars(folder: Path, values: list[np.ndarray]) -> list[Path]:
    return write_all(folder, [{"t": value} for value in values])


# -- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [1, 2, 10, 72])
def test_uniform_soup_of_realistic_weights_has_no_wrongly_rounded_element(tmp_path, device, dtype, n):
    tensors = [realistic(i, {"w": (20, 13)}, dtype) for i in range(n)]
    soup, _ = simmer(write_all(tmp_path, tensors), device=device)
    want = exact_bits([t["w"] for t in tensors], [1.0] * n, Fraction(n), dtype)
    np.testing.assert_array_equal(bits(soup["w"]), want)


@pytest.mark.parametrize("out", NATIVE)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("n", [10, 72])
def test_weighted_soup_of_16_bit_weights_is_correctly_rounded_for_every_output(tmp_path, device, dtype, out, n):
    rng = np.random.default_rng(n)
    tensors = [realistic(i, {"w": (251,)}, dtype) for i in range(n)]
    weights = rng.random(n).tolist()
    soup, _ = simmer(write_all(tmp_path, tensors), weights, device=device, dtype=out)
    want = exact_bits([t["w"] for t in tensors], weights, sum(map(Fraction, weights)), out)
    np.testing.assert_array_equal(bits(soup["w"]), want)


@pytest.mark.parametrize("n", [2, 10, 72])
def test_coefficients_are_applied_as_given_and_not_divided(tmp_path, device, n):
    rng = np.random.default_rng(n)
    tensors = [realistic(i, {"w": (251,)}, "F32") for i in range(n)]
    numbers = rng.standard_normal(n).tolist()
    soup, _ = simmer(write_all(tmp_path, tensors), numbers, normalize=False, device=device)
    want = exact_bits([t["w"] for t in tensors], numbers, Fraction(1), "F32")
    np.testing.assert_array_equal(bits(soup["w"]), want)


def test_coefficients_that_sum_to_zero_are_a_task_vector(tmp_path, device):
    a, b = np.array([3.0, 0.5], np.float32), np.array([1.0, 0.25], np.float32)
    soup, _ = simmer(scalars(tmp_path, [a, b]), [1.0, -1.0], normalize=False, device=device)
    np.testing.assert_array_equal(soup["t"], [2.0, 0.25])


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, object]:
    """A whole soup: shapes, dtypes per ingredient and tensor, weights, shard layouts, sizes of the work."""
    n = draw(st.sampled_from([1, 2, 3, 5, 9, 10, 10, 17, 72, 72]))
    most = 9000 if n <= 10 else 2500
    shapes = draw(
        st.lists(
            st.one_of(
                st.tuples(),
                st.tuples(st.integers(0, most)),
                st.tuples(st.integers(1, 40), st.integers(1, most // 40)),
                st.sampled_from([(BLOCK_ELEMENTS,), (BLOCK_ELEMENTS + 1,), (BLOCK_ELEMENTS - 1,)]),
            ),
            min_size=1,
            max_size=4,
        )
    )
    names = [f"t{i}" for i in range(len(shapes))]
    family = draw(st.sampled_from([FLOATS, NATIVE, NARROW, ("BF16",), ("F32",), ("F64",)]))
    normalize = draw(st.booleans())
    number = st.one_of(
        st.just(1.0),
        st.integers(1, 9).map(float),
        st.floats(0.015625, 4.0),
        st.floats(-4.0, 4.0).filter(lambda w: not normalize and abs(w) > 2**-40),
    )
    return {
        "n": n,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "shapes": dict(zip(names, shapes, strict=True)),
        "family": family,
        "patterns": draw(st.booleans()),
        "normalize": normalize,
        "weights": draw(st.one_of(st.just([1.0] * n), st.lists(number, min_size=n, max_size=n))),
        "dtype": draw(st.sampled_from([None, *FLOATS])),
        "shards": draw(st.one_of(st.none(), st.integers(1, len(shapes)))),
        "pad": draw(st.sampled_from([1, 1, 2, 8, 64])),
        "tiles": draw(st.lists(st.integers(1, 5), min_size=5, max_size=5)),
        "groups": draw(st.lists(st.integers(1, n), min_size=5, max_size=5)),
        "workers": draw(st.lists(st.integers(1, 4), min_size=5, max_size=5)),
    }


def make_job(job: dict, folder: Path) -> tuple[list[dict[str, np.ndarray]], list[Path]]:
    rng = np.random.default_rng(job["seed"])
    checkpoints, paths = [], []
    for i in range(job["n"]):
        kinds = {name: job["family"][rng.integers(len(job["family"]))] for name in job["shapes"]}
        tensors = {
            name: any_bits(rng, kinds[name], shape)
            if job["patterns"]
            else (rng.standard_normal(shape) * 0.02).astype(DTYPES[kinds[name]])
            for name, shape in job["shapes"].items()
        }
        if i:  # every ingredient has an order and a sharding of its own
            tensors = {name: tensors[name] for name in rng.permutation(list(tensors))}
        shards = job["shards"] and int(rng.integers(1, job["shards"] + 1))
        checkpoints.append(tensors)
        paths.append(write_checkpoint(folder / f"i{i}", tensors, shards=shards, pad=job["pad"]))
    return checkpoints, paths


@settings(max_examples=60)
@given(job=jobs())
@example(
    job={
        "n": 72, "seed": 1, "shapes": {"a": (3000,), "b": ()}, "family": NATIVE, "patterns": True, "normalize": True,
        "weights": [0.1 * (i + 1) for i in range(72)], "dtype": "F32", "shards": 2, "pad": 1,
        "tiles": [1, 2, 4, 3, 5], "groups": [1, 7, 30, 71, 72], "workers": [1, 2, 3, 3, 4],
    }
)  # fmt: skip
@example(
    job={
        "n": 10, "seed": 2, "shapes": {"a": (5000,)}, "family": ("BF16",), "patterns": True, "normalize": True,
        "weights": [1.0] * 10, "dtype": None, "shards": None, "pad": 1,
        "tiles": [1, 2, 4, 3, 5], "groups": [1, 3, 5, 9, 10], "workers": [1, 2, 3, 3, 4],
    }
)  # fmt: skip
def test_every_soup_is_within_its_bound_and_no_bit_depends_on_how_it_is_made(job):
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, paths = make_job(job, Path(folder))
        ways = [("cpu", "map"), ("cpu", "ahead"), ("cpu", "plain"), ("torch:cpu", "plain"), ("torch:cpu", "map")]
        found = []
        for way, tile, group, workers in zip(ways, job["tiles"], job["groups"], job["workers"], strict=True):
            found.append(
                simmer(
                    paths, job["weights"], normalize=job["normalize"], dtype=job["dtype"], device=way[0],
                    read_mode=way[1], tile_blocks=tile, group=group, workers=workers,
                )
            )  # fmt: skip
        plan = plan_for(paths, job["weights"], normalize=job["normalize"], dtype=job["dtype"])
        soup, outcome = found[0]
        for other, other_outcome in found[1:]:
            for name in soup:
                np.testing.assert_array_equal(bits(soup[name]), bits(other[name]), err_msg=name)
            np.testing.assert_array_equal(outcome.digests, other_outcome.digests)
            assert outcome.nonfinite == other_outcome.nonfinite == {}
            assert outcome.overflowed == other_outcome.overflowed
            assert outcome.bytes_read == other_outcome.bytes_read == plan.bytes_to_read
        divisor = sum(map(Fraction, job["weights"])) if job["normalize"] else Fraction(1)
        for name, shape in job["shapes"].items():
            arrays = [t[name].reshape(-1) for t in checkpoints]
            out = soup[name].reshape(-1)
            sample = np.unique(np.linspace(0, max(0, len(out) - 1), 25).astype(int)) if len(out) else []
            assert soup[name].shape == tuple(shape)
            assert_within_bound([a[sample] for a in arrays], job["weights"], divisor, out[sample], where=name)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([2, 3, 10, 72]),
    dtype=st.sampled_from(FLOATS),
    weighted=st.booleans(),
    group=st.integers(1, 72),
    device=st.sampled_from(["cpu", "torch:cpu"]),
)
def test_soup_of_identical_ingredients_is_bit_identical_to_them(seed, n, dtype, weighted, group, device):
    rng = np.random.default_rng(seed)
    tensors = {"w": any_bits(rng, dtype, (2100,)), "s": any_bits(rng, dtype, ())}
    tensors["w"][:3] = np.array([-0.0, 0.0, -0.0]).astype(DTYPES[dtype])
    weights = (rng.random(n) + 0.01).tolist() if weighted else [1.0] * n
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_checkpoint(Path(folder) / "x", tensors)] * n
        soup, outcome = simmer(paths, weights, group=group, device=device, tile_blocks=1)
    assert same_bits(soup, tensors)
    assert outcome.overflowed == {}


# -- the corners -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("n", [2, 10, 72])
def test_mean_of_negative_zeros_is_negative_zero(tmp_path, device, dtype, n):
    value = np.array([-0.0, -0.0, 0.0]).astype(DTYPES[dtype])
    soup, _ = simmer(scalars(tmp_path, [value] * n), device=device)
    np.testing.assert_array_equal(bits(soup["t"]), bits(value))


def test_mean_of_opposite_zeros_is_positive_zero(tmp_path, device):
    soup, _ = simmer(scalars(tmp_path, [np.array([0.0, -0.0], np.float32), np.array([-0.0, 0.0], np.float32)]),
                     device=device)  # fmt: skip
    np.testing.assert_array_equal(bits(soup["t"]), [0, 0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals_are_averaged_and_not_flushed(tmp_path, device, dtype):
    kind = DTYPES[dtype]
    unsigned = np.dtype(f"u{kind.itemsize}")
    arrays = [np.arange(1, 4, dtype=unsigned).view(kind), np.arange(2, 5, dtype=unsigned).view(kind)]
    arrays.append(np.array([5, 9, 1], unsigned).view(kind))
    soup, _ = simmer(scalars(tmp_path, arrays), device=device)
    np.testing.assert_array_equal(bits(soup["t"]), exact_bits(arrays, [1.0] * 3, Fraction(3), dtype))


def test_a_small_number_survives_the_cancellation_of_two_large_ones(tmp_path, device):
    values = [np.array([v], np.float32) for v in (2.0**24, 1.0, -(2.0**24))]
    soup, _ = simmer(scalars(tmp_path, values), device=device)
    assert soup["t"][0] == np.float32(1 / 3)


def test_float64_keeps_what_a_float64_sum_would_lose(tmp_path, device):
    values = [np.array([v], np.float64) for v in (2.0**60, 1.0, -(2.0**60))]
    soup, _ = simmer(scalars(tmp_path, values), device=device)
    assert bits(soup["t"])[0] == bits(one(Fraction(1, 3), "F64"))[0]


@pytest.mark.parametrize("group", [1, 2, 10])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_beyond_the_input_dtype_still_has_a_finite_mean(tmp_path, device, dtype, group):
    kind = DTYPES[dtype]
    top = np.array([float(ml_dtypes.finfo(kind).max)] * 2).astype(kind)
    soup, outcome = simmer(scalars(tmp_path, [top] * 10), device=device, group=group)
    np.testing.assert_array_equal(bits(soup["t"]), bits(top))
    assert outcome.overflowed == {}
    assert outcome.nonfinite == {}


@pytest.mark.parametrize("group", [1, 2, 3])
def test_float64_sums_that_overflow_have_the_exact_mean_whatever_the_groups(tmp_path, device, group):
    values = [np.array([1.5e308, -1.5e308, 1e308]), np.array([1.2e308, -1.1e308, 1e308]), np.array([1.0, -3.0, 1e308])]
    soup, outcome = simmer(scalars(tmp_path, values), [0.3, 0.5, 0.2], device=device, group=group)
    divisor = sum(map(Fraction, [0.3, 0.5, 0.2]))
    np.testing.assert_array_equal(bits(soup["t"]), exact_bits(values, [0.3, 0.5, 0.2], divisor, "F64"))
    soup, outcome = simmer(scalars(tmp_path, values), device=device, group=group)
    np.testing.assert_array_equal(bits(soup["t"]), exact_bits(values, [1.0] * 3, Fraction(3), "F64"))
    assert outcome.overflowed == {}


@pytest.mark.parametrize("group", [1, 2, 10])
def test_exponents_far_apart_stay_within_the_bound(tmp_path, device, group):
    rng = np.random.default_rng(0)
    values = [(rng.standard_normal(200) * 2.0 ** rng.integers(-60, 60, 200)).astype(DTYPES["BF16"]) for _ in range(10)]
    weights = rng.random(10).tolist()
    paths = scalars(tmp_path, values)
    for out in NATIVE:
        soup, _ = simmer(paths, weights, dtype=out, device=device, group=group)
        assert_within_bound(values, weights, sum(map(Fraction, weights)), soup["t"])


def test_rounding_to_16_bits_is_not_done_twice(tmp_path, device):
    # 1 + 2**-8 + 2**-30 is just above a midpoint of bfloat16; by way of float32 it would be the midpoint, and go down.
    values = [np.array([1 + 2.0**-8], np.float32), np.array([1 + 2.0**-8 + 2.0**-22], np.float32)]
    weights = [1.0, 2.0**-9]
    soup, _ = simmer(scalars(tmp_path, values), weights, dtype="BF16", device=device)
    divisor = sum(map(Fraction, weights))
    np.testing.assert_array_equal(bits(soup["t"]), exact_bits(values, weights, divisor, "BF16"))
    assert float(soup["t"][0]) == 1 + 2.0**-7


@pytest.mark.parametrize("scale", [1e-300, 1e300, 2.0**-1000, 5e-324])
def test_scaling_all_weights_by_any_power_leaves_the_average(tmp_path, device, scale):
    values = [np.array([3.0e38, -1.5, 1e-38], np.float32), np.array([2.0e38, 2.5, 3e-39], np.float32)]
    weights = [1 * scale, 3 * scale]
    for dtype in ("F32", "F64"):
        soup, outcome = simmer(scalars(tmp_path, values), weights, device=device, dtype=dtype)
        assert_within_bound(values, weights, sum(map(Fraction, weights)), soup["t"])
        assert outcome.overflowed == {}


def test_order_of_ingredients_changes_no_bit_of_an_exact_sum(tmp_path, device):
    tensors = [realistic(i, {"w": (500,)}) for i in range(10)]
    paths = write_all(tmp_path, tensors)
    forward, _ = simmer(paths, device=device)
    backward, _ = simmer(paths[::-1], device=device)
    assert same_bits(forward, backward)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_inexact_sums_are_added_in_the_order_of_the_recipe(tmp_path, device, group):
    # (2**53 + 1) + 1 stays at 2**53 in float64; (1 + 1) + 2**53 does not: coefficients let both be seen.
    values = [np.array([2.0**53], np.float32), np.array([1.0], np.float32), np.array([1.0], np.float32)]
    back = np.array([-(2.0**53)], np.float32)
    options = {"normalize": False, "device": device, "group": group}
    first, _ = simmer(scalars(tmp_path / "a", [*values, back]), [1.0] * 4, **options)
    second, _ = simmer(scalars(tmp_path / "b", [*values[::-1], back]), [1.0] * 4, **options)
    assert (first["t"][0], second["t"][0]) == (0.0, 2.0)


def test_fp8_without_scales_decodes(tmp_path, device):
    raw = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    values = raw.view(DTYPES["F8_E4M3"])
    soup, _ = simmer(scalars(tmp_path, [values, values]), dtype="F32", device=device)
    np.testing.assert_array_equal(soup["t"], values.astype(np.float32))


# -- NaN, infinity, overflow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [1, 2, 5])
def test_every_nonfinite_element_is_counted_for_its_ingredient(tmp_path, device, read_mode, dtype, group):
    kind = DTYPES[dtype]
    tensors = [{"a": np.ones(5000, kind), "b": np.ones(9, kind)} for _ in range(5)]
    tensors[1]["a"][[0, 17, 4999]] = np.nan
    tensors[3]["a"][17] = np.nan
    tensors[4]["b"][2] = -np.inf if np.isinf(np.array([np.inf]).astype(kind).astype(np.float64))[0] else np.nan
    soup, outcome = simmer(write_all(tmp_path, tensors), device=device, read_mode=read_mode, group=group, tile_blocks=1)
    assert outcome.nonfinite == {(1, 0): 3, (3, 0): 1, (4, 1): 1}
    assert outcome.overflowed == {}
    assert np.flatnonzero(~np.isfinite(soup["a"].astype(np.float64))).tolist() == [0, 17, 4999]
    assert np.flatnonzero(~np.isfinite(soup["b"].astype(np.float64))).tolist() == [2]


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("group", [1, 3])
def test_infinity_is_found_even_where_a_weight_of_zero_or_its_opposite_hides_it(tmp_path, device, dtype, group):
    kind = DTYPES[dtype]
    tensors = [{"w": np.ones(4, kind)} for _ in range(3)]
    tensors[0]["w"][1], tensors[1]["w"][1] = np.inf, -np.inf
    tensors[2]["w"][3] = np.inf
    _, outcome = simmer(write_all(tmp_path, tensors), [1.0, 1.0, 0.0], device=device, group=group)
    assert outcome.nonfinite == {(0, 0): 1, (1, 0): 1, (2, 0): 1}


@pytest.mark.parametrize("group", [1, 2])
def test_finite_numbers_too_large_for_the_output_are_counted(tmp_path, device, group):
    values = [np.array([1e5, 65519.9, 1.0, -1e30], DTYPES["BF16"]), np.array([1e5, 1.0, 1.0, -1e30], DTYPES["BF16"])]
    soup, outcome = simmer(scalars(tmp_path, values), dtype="F16", device=device, group=group)
    assert outcome.nonfinite == {}
    assert outcome.overflowed == {0: 2}
    assert soup["t"][2] == 1.0


def test_weights_beyond_what_double_double_sums_take_are_refused(tmp_path, device):
    values = [np.array([3e38, 1.0], DTYPES["F64"]) for _ in range(2)]
    for numbers in ([1e290, 1.0], [1.0, 1e-290]):
        with pytest.raises(RecipeError, match=r"weight 1e[+-]290.*2\^-400"):
            simmer(scalars(tmp_path, values), numbers, normalize=False, device=device)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_coefficients_that_overflow_the_sum_are_counted_whatever_the_groups(tmp_path, device, group):
    values = [np.array([3e38, 1.0], DTYPES["F32"]) for _ in range(3)]
    numbers = [1e290, 1e290, 1.0]
    _, outcome = simmer(scalars(tmp_path, values), numbers, normalize=False, device=device, group=group)
    assert outcome.nonfinite == {}
    assert sum(outcome.overflowed.values()) == 2


# -- digests, copies, failures -----------------------------------------------------------------------------------


def test_digests_change_with_any_byte_and_not_with_the_way_of_reading(tmp_path, device):
    rng = np.random.default_rng(3)
    tensors = [{"w": any_bits(rng, "BF16", (4500,)), "n": np.arange(4500)} for _ in range(2)]
    paths = write_all(tmp_path, tensors)
    _, before = simmer(paths, device=device, tile_blocks=1)
    _, again = simmer(paths, device=device, tile_blocks=3, read_mode="plain", group=1)
    np.testing.assert_array_equal(before.digests, again.digests)
    for name, tensor in (("w", 0), ("n", 1)):
        for place in (0, 2047, 2048, 4499):
            changed = {k: v.copy() for k, v in tensors[1].items()}
            bits(changed[name])[place] ^= 1
            write_checkpoint(paths[1], changed)
            _, after = simmer(paths, device=device)
            assert np.argwhere(after.digests != before.digests).tolist() == [[1, tensor]]


def test_copied_tensors_are_compared_in_every_ingredient(tmp_path, device, read_mode):
    ids = np.arange(6000, dtype=np.int64)
    tensors = [{"ids": ids.copy(), "flag": np.array([True, False])} for _ in range(4)]
    tensors[2]["ids"][5999] += 1
    tensors[3]["flag"][0] = False
    soup, outcome = simmer(write_all(tmp_path, tensors), device=device, read_mode=read_mode, tile_blocks=1)
    assert outcome.differs == {0: {2}, 1: {3}}
    np.testing.assert_array_equal(soup["ids"], ids)


def test_only_the_tiles_that_are_asked_for_are_done(tmp_path):
    tensors = [realistic(i, {"w": (5 * BLOCK_ELEMENTS,)}) for i in range(2)]
    plan = plan_for(write_all(tmp_path, tensors), tile_blocks=2)
    done = {0: [(2 * BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS)]}
    ranges = [(t.start // BLOCK_ELEMENTS, t.elements // BLOCK_ELEMENTS) for t in plan.tiles(averaged=True, done=done)]
    assert ranges == [(0, 2), (4, 1)]


def test_tiles_are_durable_before_they_are_committed(tmp_path, monkeypatch):
    monkeypatch.setattr("streamsoup.engine._COMMIT_SECONDS", 0.0)
    plan = plan_for(write_all(tmp_path, [realistic(i, {"w": (300_000,)}) for i in range(2)]), tile_blocks=1)
    written, durable, committed = [], set(), []
    engine = _engine(plan, commit=lambda records: committed.extend((r.start, r.start in durable) for r in records))
    write = engine._sink.write

    def note(tensor, offset, buffer):
        write(tensor, offset, buffer)
        written.append(offset // 2)

    engine._sink.write = note
    engine._sink.sync = lambda: durable.update(list(written))
    engine.run(plan.tiles(averaged=True))
    assert sorted(committed) == [(start, True) for start in range(0, 300_000, BLOCK_ELEMENTS)]


def test_after_a_sync_has_failed_nothing_more_is_committed(tmp_path):
    """The kernel reports a failed write-back once: a second sync may succeed though bytes of the first are lost."""
    plan = plan_for(write_all(tmp_path, [realistic(i, {"w": (100_000,)}) for i in range(2)]), tile_blocks=1)
    committed = []
    engine = _engine(plan, commit=committed.extend)
    calls = [0]

    def sync():
        calls[0] += 1
        if calls[0] == 1:
            raise DiskSpaceError("full")

    engine._sink.sync = sync
    engine._keep_syncing = lambda: _sync_once(engine)
    with pytest.raises(DiskSpaceError):
        engine.run(plan.tiles(averaged=True))
    assert committed == []


def _sync_once(engine):
    while not engine._finished and not engine._idle.is_set():
        pass
    try:
        engine._commit_finished()
    except DiskSpaceError as error:
        engine._fail(error)


class _Failing(Source):
    """A source that has vanished."""

    def fetch(self, position, offset, nbytes, staging):
        raise IngredientReadError("gone")


def _engine(plan, sources=None, **options):
    backend = open_backend("cpu")
    backend.prepare(wide=False, fp8=False)
    sources = sources or [MappedSource(checkpoint) for checkpoint in plan.checkpoints]
    return Engine(plan, backend, sources, MemorySink(plan), **options)


def test_an_error_in_a_worker_is_raised_where_run_was_called(tmp_path):
    plan = plan_for(write_all(tmp_path, [realistic(i, {"w": (9000,)}) for i in range(2)]), tile_blocks=1)
    with pytest.raises(IngredientReadError, match="gone"):
        _engine(plan, [_Failing(), _Failing()]).run(plan.tiles(averaged=True))


class StopError(Exception):
    """What a caller's progress function may raise."""


def test_an_exception_from_progress_stops_the_run_and_finished_tiles_are_committed(tmp_path, monkeypatch):
    monkeypatch.setattr("streamsoup.engine._PROGRESS_SECONDS", 0.0)
    plan = plan_for(write_all(tmp_path, [realistic(i, {"w": (400_000,)}) for i in range(2)]), tile_blocks=1)
    committed = []

    def progress(report: Progress) -> None:
        if report.done_bytes:
            raise StopError

    engine = _engine(plan, commit=committed.extend, progress=progress)
    with pytest.raises(StopError):
        engine.run(plan.tiles(averaged=True))
    assert sum(r.elements for r in committed) == engine.outcome.bytes_read // 4
    assert committed


def test_progress_never_goes_back_and_ends_with_all_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("streamsoup.engine._PROGRESS_SECONDS", 0.0)
    plan = plan_for(write_all(tmp_path, [realistic(i, {"w": (200_000,)}) for i in range(2)]), tile_blocks=1)
    seen: list[Progress] = []
    _engine(plan, progress=seen.append).run(plan.tiles(averaged=True))
    done = [report.done_bytes for report in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes == plan.bytes_to_read


# -- interrupts --------------------------------------------------------------------------------------------------------

_TWICE = """
import sys, threading, time, _thread
import streamsoup
from streamsoup.backends import cpu

real = cpu.CpuSlot.combine
def slow(self, *arguments, **more):
    if threading.current_thread().name.startswith("streamsoup-"):
        time.sleep(1.0)
    return real(self, *arguments, **more)
cpu.CpuSlot.combine = slow

def progress(report):
    if report.stage == "reduce" and not seen:
        seen.append(1)
        for wait in (0.2, 0.3, 0.4):
            threading.Timer(wait, _thread.interrupt_main).start()
        raise KeyboardInterrupt

seen = []
mode, out, *runs = sys.argv[1:]
try:
    streamsoup.soup(runs, out, read_mode=mode, workers=2, progress=progress)
except KeyboardInterrupt:
    left = [t.name for t in threading.enumerate() if t.name.startswith("streamsoup")]
    print("left", left)
"""


@pytest.mark.parametrize("read_mode", ["map", "ahead", "plain"])
def test_interrupts_while_threads_end_are_waited_out(tmp_path, read_mode):
    """Maps and descriptors are closed afterwards: a thread that still used them would be a crash."""
    runs = fine_tunes(tmp_path, 2)
    done = subprocess.run(
        [sys.executable, "-c", _TWICE, read_mode, str(tmp_path / "soup"), *runs],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "left []\n"), done.stderr


def test_an_engine_is_freed_at_once_with_all_that_it_held(tmp_path):
    paths = write_all(tmp_path, [realistic(i, {"w": (3000,)}) for i in range(2)])
    plan = plan_for(paths)
    sources = [MappedSource(checkpoint) for checkpoint in plan.checkpoints]
    engine = Engine(plan, open_backend("cpu"), sources, MemorySink(plan))
    engine.run(plan.tiles(averaged=True))
    freed = weakref.ref(engine)
    gc.disable()  # a gradient that waits for the collector is as large as a network
    try:
        del engine
        assert freed() is None
    finally:
        gc.enable()
        for source in sources:
            source.close()
