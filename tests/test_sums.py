"""A running sum has no history: its mean is, bit for bit, the soup of its members in order."""

from __future__ import annotations

import random
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import zarr
from factory import any_bits, fine_tunes, read_checkpoint, realistic, same_bits, write_checkpoint

import streamsoup
from streamsoup.errors import BudgetError, DestinationError, RecipeError, ResumeError
from streamsoup.pool import Pool, PoolOptions
from streamsoup.sums import Member, merge
from streamsoup.sums.generations import CHUNK_BYTES, GenerationStore

BUDGET = 1 << 28
SHAPES = {"a.weight": (50, 70), "b.weight": (4100,), "c": ()}


def mean_equals_soup(running, tmp_path):
    """Compare the mean with `streamsoup.soup` of the written members."""
    out, reference = tmp_path / "mean", tmp_path / "reference"
    running.mean().write(out)
    streamsoup.soup(
        [m.path for m in running.members],
        reference,
        weights=[m.weight for m in running.members],
        overwrite=True,
        nonfinite=running.pool.options.nonfinite,
    )
    return same_bits(read_checkpoint(out), read_checkpoint(reference))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
def test_after_fifty_steps_of_adding_and_removing_the_mean_is_the_soup(tmp_path, dtype, place, sums_dtype):
    runs = fine_tunes(tmp_path / "runs", 6, dtype=dtype)
    folder = tmp_path / "sums" if place == "folder" else None
    running = streamsoup.RunningSoup(runs, folder=folder, budget_bytes=BUDGET, sums_dtype=sums_dtype)
    chance = random.Random(f"{dtype}{place}")
    for step in range(50):
        present = [m.path for m in running.members]
        if present and chance.random() < 0.45:
            path = chance.choice(present)
            weight = next(m.weight for m in running.members if m.path == path)
            running.remove(path, chance.choice([None, weight / 2]))
        else:
            running.add(chance.choice(runs), chance.choice([1.0, 2.0, 0.5, 0.7, 0.1, 0.9]))
        if running.members and step % 12 == 11:
            assert mean_equals_soup(running, tmp_path)
    assert running.weight == pytest.approx(sum(m.weight for m in running.members))


def adversarial(folder, dtype):
    """Any bits but NaN and infinity: exponents far apart, subnormals, cancellation."""
    rng = np.random.default_rng(5)
    runs = []
    for i in range(4):
        array = any_bits(rng, dtype, (3000,))
        array = np.where(np.isfinite(array.astype(np.float64)), array, np.ones_like(array))
        runs.append(str(write_checkpoint(folder / f"run{i}", {"w": array})))
    return runs


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_sums_that_float64_cannot_hold_leave_no_trace_either(tmp_path, dtype):
    runs = adversarial(tmp_path / "runs", dtype)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET, nonfinite="allow")
    for path in runs:
        running.add(path)
    running.remove(runs[1]).add(runs[0]).remove(runs[2]).add(runs[1], 3.0)
    out, reference = tmp_path / "mean", tmp_path / "reference"
    running.mean().write(out)
    weights = [m.weight for m in running.members]
    streamsoup.soup([m.path for m in running.members], reference, weights=weights, nonfinite="allow")
    assert same_bits(read_checkpoint(out), read_checkpoint(reference))
    assert running.rebuilt or dtype == "F16", "float16 alone has a range that float64 always covers"


def test_a_candidate_is_the_soup_with_one_more_and_changes_nothing(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 4)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET).add(runs[0]).add(runs[1])
    before = {name: tensor.numpy(force=True).copy() for name, tensor in _floats(running.mean()).items()}
    candidate = running.candidate(runs[2], 2.0)
    assert candidate.is_exact
    candidate.write(tmp_path / "candidate")
    streamsoup.soup(runs[:3], tmp_path / "reference", weights=[1, 1, 2])
    assert same_bits(read_checkpoint(tmp_path / "candidate"), read_checkpoint(tmp_path / "reference"))
    after = _floats(running.mean())
    assert all(np.array_equal(before[name], after[name].numpy(force=True)) for name in before)


def _floats(candidate):
    return {name: tensor.float() for name, tensor in candidate.tensors().items()}


def test_each_step_reads_one_ingredient_and_the_sum(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 5)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET)
    each = int(running.pool.first.table.nbytes.sum())
    buffers = each - int(running.pool.first.table.nbytes[running.pool.averaged].sum())
    for number, path in enumerate(runs):
        before = running.bytes_read
        running.add(path)
        assert running.bytes_read - before == each + (running.pool.sum_bytes + buffers if number else 0)
        assert running.reads[path] == 1


def test_stock_zarr_reads_the_exact_sum(tmp_path):
    runs = [
        str(write_checkpoint(tmp_path / f"run{i}", {"w": np.full((3, 5), 1.5 * (i + 1), np.float32)})) for i in range(3)
    ]
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
    for path in runs:
        running.add(path, 2.0)
    newest = sorted((tmp_path / "sums").glob("gen-*"))[-1]
    array = zarr.open_group(newest, mode="r")["w"]
    assert array.dtype == np.float64
    assert np.isnan(array.fill_value)
    assert not array.compressors
    assert not array.filters
    assert array.attrs["shape"] == [3, 5]
    assert np.array_equal(array[:], np.full(15, 18.0))


def test_a_sum_is_taken_up_again_from_its_folder(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)
    streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0]).add(runs[2], 2.0)
    again = streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)
    assert again.members == (Member(runs[0], 1.0), Member(runs[2], 2.0))
    again.add(runs[1])
    assert mean_equals_soup(again, tmp_path)
    with pytest.raises(ResumeError):
        streamsoup.RunningSoup.open(tmp_path / "nowhere", budget_bytes=BUDGET)


def test_a_damaged_chunk_is_noticed(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 2)
    streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0])
    chunk = next(path for path in (tmp_path / "sums").rglob("c/0") if path.stat().st_size > 64)
    raw = bytearray(chunk.read_bytes())
    raw[17] ^= 4
    chunk.write_bytes(raw)
    with pytest.raises(ResumeError, match="damaged"):
        streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)


def test_a_fold_that_fails_leaves_the_last_generation_whole(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path / "runs", 3)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0])
    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.sums.generations.GenerationStore.commit", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            running.add(runs[1])
    assert running.members == (Member(runs[0], 1.0),)
    assert mean_equals_soup(running.add(runs[2]), tmp_path)
    assert len(list((tmp_path / "sums").glob("gen-*"))) <= 2


@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
@pytest.mark.parametrize("place", ["memory", "folder"])
@pytest.mark.parametrize("failing", ["add", "rebuild"])
def test_after_a_failure_half_way_the_members_are_those_before_and_the_sum_is_made_anew(
    tmp_path, monkeypatch, place, failing, sums_dtype
):
    runs = fine_tunes(tmp_path / "runs", 4)
    folder = None if place == "memory" else tmp_path / "sums"
    running = streamsoup.RunningSoup(runs, folder=folder, budget_bytes=BUDGET, sums_dtype=sums_dtype)
    running.add(runs[0]).add(runs[1])
    gone = tmp_path / "gone"
    Path(runs[2]).rename(gone)

    def fail():
        return running.add(runs[2]) if failing == "add" else running.rebuild(others)

    others = merge(merge((), runs[3], 1.0), runs[2], 1.0)
    with pytest.raises(streamsoup.StreamsoupError):
        fail()
    assert [m.path for m in running.members] == runs[:2]
    gone.rename(runs[2])
    assert mean_equals_soup(running, tmp_path)
    running.add(runs[2])
    assert [m.path for m in running.members] == runs[:3]
    assert mean_equals_soup(running, tmp_path)


def test_a_float32_sum_made_anew_has_the_bits_of_one_that_grew(tmp_path):
    paths = written(tmp_path, *(np.random.default_rng(i).standard_normal(5000).astype(np.float32) for i in range(5)))
    grown = streamsoup.RunningSoup(paths, budget_bytes=BUDGET, sums_dtype="float32")
    for path in paths[:4]:
        grown.add(path)
    anew = streamsoup.RunningSoup(paths, budget_bytes=BUDGET, sums_dtype="float32").rebuild(grown.members)
    one, other = (soup.candidate(paths[4]).tensors()["w"].numpy().tobytes() for soup in (grown, anew))
    assert one == other


def test_a_saved_sum_is_taken_up_elsewhere_and_a_sum_that_lies_there_is_not_overwritten(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET)
    with pytest.raises(RecipeError, match="empty"):
        running.save(tmp_path / "sums")
    running.add(runs[0]).add(runs[2], 2.0).save(tmp_path / "sums")
    with streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET) as again:
        assert again.members == running.members
        assert again.bytes_read == 0
        assert mean_equals_soup(again.add(runs[1]), tmp_path)
    for refused in (
        lambda: running.save(tmp_path / "sums"),
        lambda: streamsoup.RunningSoup(runs, folder=tmp_path / "sums"),
    ):
        with pytest.raises(DestinationError, match="already"):
            refused()
    assert mean_equals_soup(running, tmp_path)


def test_a_later_ingredient_that_needs_wider_sums_is_refused(tmp_path):
    one = str(write_checkpoint(tmp_path / "one", {"w": np.ones(50, np.float32)}))
    wide = str(write_checkpoint(tmp_path / "wide", {"w": np.ones(50)}))
    running = streamsoup.RunningSoup(one, budget_bytes=BUDGET).add(one)
    with pytest.raises(RecipeError, match=r"wide.*float64.*first"):
        running.add(wide)
    assert streamsoup.RunningSoup([one, wide], budget_bytes=BUDGET).add(one).add(wide).weight == 2


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_narrow_tensors_beside_wide_ones_have_the_bits_of_their_soup(tmp_path, place):
    """A float64 tensor makes all sums double-double, but the soup sums the other tensors in float64."""
    rng = [np.random.default_rng(i) for i in range(3)]
    runs = [
        str(write_checkpoint(tmp_path / f"d{i}", {"w": r.standard_normal(5), "h": spread(r, 9000)}))
        for i, r in enumerate(rng)
    ]
    folder = tmp_path / "sums" if place == "folder" else None
    with streamsoup.RunningSoup(runs, folder=folder, budget_bytes=BUDGET) as running:
        for run in runs:
            running.add(run)
        assert not running.is_exact
        assert mean_equals_soup(running, tmp_path)
    tame = [
        str(write_checkpoint(tmp_path / f"t{i}", {"w": r.standard_normal(5), "h": tamed(r, 900)}))
        for i, r in enumerate(rng)
    ]
    running = streamsoup.RunningSoup(tame, budget_bytes=BUDGET)
    for run in tame:
        running.add(run)
    assert running.is_exact, "nothing need be read again"
    assert mean_equals_soup(running, tmp_path)


def spread(rng, count):
    """Finite bfloat16 of all exponents."""
    found = any_bits(rng, "BF16", (count,))
    return np.where(np.isfinite(found.astype(np.float32)), found, np.ones_like(found))


def tamed(rng, count):
    """Float16 of like exponents."""
    return (1 + rng.random(count)).astype(np.float16)


def test_a_candidate_of_nothing_or_of_a_senseless_weight_is_refused(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 2)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET).add(runs[0])
    with pytest.raises(RecipeError, match="empty"):
        running.candidate(runs[0], -1.0)
    for weight in (float("nan"), float("inf"), 0.0):
        with pytest.raises(RecipeError, match="Weight"):
            running.candidate(runs[1], weight)


def test_two_sums_of_one_process_or_another_do_not_share_a_folder(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 2)
    one = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
    with pytest.raises(ResumeError, match="at work"):
        streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
    one.close()
    streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).close()


def test_two_sums_in_memory_may_share_a_pool(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 2)
    pool = Pool(runs, PoolOptions(budget_bytes=BUDGET))
    sums = [streamsoup.RunningSoup(runs, pool=pool).add(run) for run in runs]
    assert pool.budget_bytes == sums[0].pool.budget_bytes
    assert all(mean_equals_soup(running, tmp_path) for running in sums)
    assert sums[0].mean().plan.projected_peak_bytes >= pool.sum_bytes


def test_what_makes_no_sense_is_refused(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 2)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET)
    with pytest.raises(RecipeError, match="empty"):
        running.mean()
    with pytest.raises(RecipeError, match="not in"):
        running.remove(runs[0])
    for weight in (0.0, -1.0, float("nan"), 1e-40):
        with pytest.raises(RecipeError):
            running.add(runs[0], weight)
    with pytest.raises(RecipeError, match="only 1 of it"):
        running.add(runs[0]).remove(runs[0], 2.0)
    with pytest.raises(RecipeError, match="needs a folder"):
        streamsoup.RunningSoup(runs, budget_bytes=BUDGET, sums="disk")
    with pytest.raises(BudgetError, match=r"half the budget.*folder"):
        streamsoup.RunningSoup(
            write_checkpoint(tmp_path / "large", {"w": np.zeros(2 << 20, np.float32)}), budget_bytes=20 << 20
        )


def test_merging_keeps_the_order_of_first_entry():
    members = merge(merge(merge((), "a", 1.0), "b", 2.0), "a", 0.5)
    assert members == (Member("a", 1.5), Member("b", 2.0))
    assert merge(members, "a", -1.5) == (Member("b", 2.0),)


def written(folder, *arrays):
    """One checkpoint for each array."""
    return [str(write_checkpoint(folder / f"run{i}", {"w": array})) for i, array in enumerate(arrays)]


@pytest.mark.parametrize("steps", [["+0", ".1+1", ".9+1"], [".1+0", "+1", ".9+0"], ["+0", ".7+1", ".3-1", ".6+1"]])
@pytest.mark.parametrize("place", ["memory", "folder"])
def test_weights_that_add_up_to_round_ones_leave_no_trace(tmp_path, steps, place):
    """0.1 θ was rounded when it was added, even if the weight is 1 in the end."""
    runs = fine_tunes(tmp_path / "runs", 3)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums" if place == "folder" else None, budget_bytes=BUDGET)
    for step in steps:
        weight, change, number = step.rpartition("+") if "+" in step else step.rpartition("-")
        getattr(running, "add" if change == "+" else "remove")(runs[int(number)], float(weight or 1))
    assert mean_equals_soup(running, tmp_path)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("weight", [0.3, 3.0, 0.5])
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
def test_equal_weights_have_the_bits_of_their_mean_though_the_sum_holds_multiples(tmp_path, dtype, weight, sums_dtype):
    runs = fine_tunes(tmp_path / "runs", 4, dtype=dtype)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET, sums_dtype=sums_dtype)
    for path in runs[:3]:
        candidate = running.candidate(path, weight)
        candidate.write(tmp_path / "candidate")
        running.add(path, weight)
        assert mean_equals_soup(running, tmp_path)
        ones = [m.path for m in candidate.members]
        streamsoup.soup(ones, tmp_path / "ones", overwrite=True)
        if candidate.is_exact:
            assert same_bits(read_checkpoint(tmp_path / "candidate"), read_checkpoint(tmp_path / "ones"))
    running.add(runs[3], weight / 2).add(runs[3], weight / 2)
    assert mean_equals_soup(running, tmp_path)


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
def test_zeros_keep_their_sign_when_others_leave(tmp_path, dtype):
    kind = any_bits(np.random.default_rng(0), dtype, (1,)).dtype
    zeros = np.array([-0.0, -0.0, 0.0, 1.0, -0.0]).astype(kind)
    other = np.array([3.0, -3.0, 2.0, -1.0, -0.0]).astype(kind)
    runs = written(tmp_path / "runs", zeros, other, zeros)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET).add(runs[0]).add(runs[1]).remove(runs[1])
    assert mean_equals_soup(running, tmp_path)
    running.add(runs[2]).add(runs[1], 2.0).remove(runs[1], 2.0)
    assert mean_equals_soup(running, tmp_path)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F64"])
def test_an_infinity_that_was_let_in_leaves_again(tmp_path, dtype):
    kind = any_bits(np.random.default_rng(0), dtype, (1,)).dtype
    infinite = np.array([np.inf, 1.0, -np.inf, np.nan]).astype(kind)
    runs = written(tmp_path / "runs", np.arange(4).astype(kind), infinite)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET, nonfinite="allow")
    running.add(runs[0]).add(runs[1]).remove(runs[1])
    assert mean_equals_soup(running, tmp_path)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_float64_at_the_edges_of_its_range(tmp_path, place):
    rng = np.random.default_rng(1)
    exponents = [rng.integers(-1070, 1020, 2000), rng.integers(900, 1022, 2000), rng.integers(-1074, -900, 2000)]
    arrays = [np.ldexp(rng.choice([-1.5, 1.0, 1.25], 2000), e) for e in exponents]
    arrays.append(-arrays[0])  # cancels
    runs = written(tmp_path / "runs", *arrays)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums" if place == "folder" else None, budget_bytes=BUDGET)
    for number in range(4):
        running.add(runs[number])
        assert mean_equals_soup(running, tmp_path)
    running.remove(runs[1]).add(runs[0], 2.0).remove(runs[3])
    assert mean_equals_soup(running, tmp_path)
    candidate = running.candidate(runs[1])
    candidate.write(tmp_path / "candidate")
    weights = [m.weight for m in candidate.members]
    streamsoup.soup([m.path for m in candidate.members], tmp_path / "soup", weights=weights)
    assert not candidate.is_exact or same_bits(
        read_checkpoint(tmp_path / "candidate"), read_checkpoint(tmp_path / "soup")
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
def test_a_candidate_that_says_exact_is_the_soup_of_its_members_on_any_way(tmp_path, dtype, sums_dtype):
    runs = fine_tunes(tmp_path / "runs", 5, dtype=dtype)
    running = streamsoup.RunningSoup(runs, budget_bytes=BUDGET, sums_dtype=sums_dtype)
    chance, compared = random.Random(dtype), 0
    for step in range(24):
        present = {m.path: m.weight for m in running.members}
        path = chance.choice(runs)
        weight = -present[path] if path in present and chance.random() < 0.5 else chance.choice([1.0, 0.3, 2.0])
        if len(present) == 1 and weight == -present.get(path, 0.0):
            continue
        candidate = running.candidate(path, weight)
        if path not in present and sums_dtype == "float64":
            assert candidate.is_exact
        if candidate.is_exact and step % 3 == 0:
            candidate.write(tmp_path / "candidate")
            weights = [m.weight for m in candidate.members]
            streamsoup.soup([m.path for m in candidate.members], tmp_path / "ref", weights=weights, overwrite=True)
            assert same_bits(read_checkpoint(tmp_path / "candidate"), read_checkpoint(tmp_path / "ref"))
            compared += 1
        if weight > 0:
            running.add(path, weight)
        else:
            running.remove(path)
    assert compared or sums_dtype == "float32"


def test_a_rejected_candidate_leaves_the_sum_bitwise_unchanged(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 4)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0]).add(runs[1])
    before = snapshot(tmp_path / "sums")
    for path, weight in ((runs[2], 1.0), (runs[0], 2.0), (runs[1], -1.0)):
        running.candidate(path, weight).write(tmp_path / "candidate")
    assert snapshot(tmp_path / "sums") == before
    assert mean_equals_soup(running, tmp_path)


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_ingredient_that_does_not_fit_changes_nothing(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 2)
    (wrong,) = written(tmp_path / "wrong", np.zeros(3, np.float32))
    for folder in (None, tmp_path / "sums"):
        running = streamsoup.RunningSoup(runs, folder=folder, budget_bytes=BUDGET).add(runs[0]).add(runs[1])
        with pytest.raises(streamsoup.StreamsoupError):
            running.add(wrong)
        with pytest.raises(streamsoup.StreamsoupError):
            running.candidate(wrong).write(tmp_path / "c")
        with pytest.raises(streamsoup.StreamsoupError):
            running.add(tmp_path / "nowhere")
        assert mean_equals_soup(running, tmp_path)


# -- on disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True])
def test_stock_zarr_reads_several_chunks_and_every_tensor(tmp_path, wide):
    rng = np.random.default_rng(0)
    elements = CHUNK_BYTES // 8 + 5000  # two or three chunks, the last one short
    arrays = [rng.standard_normal(elements).astype(np.float16) for _ in range(2)]
    scalar = np.float64 if wide else np.float32  # one float64 in the pool makes all sums double-double
    runs = [
        str(write_checkpoint(tmp_path / f"run{i}", {"a.b/c": a, "s": np.array(i + 1.5, scalar), "ids": np.arange(3)}))
        for i, a in enumerate(arrays)
    ]
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET, dtype="float32")
    running.add(runs[0]).add(runs[1], 0.5)
    group = zarr.open_group(sorted((tmp_path / "sums").glob("gen-*"))[-1], mode="r")
    arrays_of = {array.attrs["tensor"]: array for array in group.array_values()}
    assert arrays_of.keys() == {"a.b/c", "s"}
    found = arrays_of["a.b/c"][:].reshape(elements, -1).sum(axis=1)  # double-double: the low halves are zero here
    assert np.array_equal(found, arrays[0].astype(np.float64) + 0.5 * arrays[1].astype(np.float64))
    assert arrays_of["s"][:].sum() == 1.5 + 0.5 * 2.5
    assert 4 << 20 <= np.prod(arrays_of["a.b/c"].chunks) * 8 <= 16 << 20
    assert mean_equals_its(running, arrays, tmp_path)
    running.close()
    # With another budget tiles are smaller.
    assert mean_equals_its(
        streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=40 << 20, workers=1, dtype="float32"),
        arrays,
        tmp_path,
    )


def mean_equals_its(running, arrays, tmp_path):
    running.mean().write(tmp_path / "out")
    exact = (2 * arrays[0].astype(np.float64) + arrays[1].astype(np.float64)) / 3
    return np.array_equal(read_checkpoint(tmp_path / "out")["a.b/c"], exact.astype(np.float32))


def test_the_two_halves_of_a_double_double_add_up_exactly(tmp_path):
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(40) * 10.0 ** rng.integers(-8, 8, 40) for _ in range(3)]
    runs = written(tmp_path / "runs", *arrays)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
    for path in runs:
        running.add(path)
    pairs = zarr.open_group(sorted((tmp_path / "sums").glob("gen-*"))[-1], mode="r")["w"][:].reshape(-1, 2)
    for j, (high, low) in enumerate(pairs.tolist()):
        exact = sum(Fraction(float(a[j])) for a in arrays)
        assert abs(Fraction(high) + Fraction(low) - exact) <= abs(exact) * Fraction(1, 2**98)


def test_elements_that_were_never_written_are_nan(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 1)
    streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0])
    newest = sorted((tmp_path / "sums").glob("gen-*"))[-1]
    (newest / "norm.scale" / "c" / "0").unlink()
    assert np.isnan(zarr.open_group(newest, mode="r")["norm.scale"][:]).all()


def test_never_more_than_two_generations_lie_on_disk(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path / "runs", 5)
    most, real = [], GenerationStore.write

    def write(self, *arguments):
        most.append(len(list((tmp_path / "sums").glob("gen-*"))))
        return real(self, *arguments)

    monkeypatch.setattr(GenerationStore, "write", write)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
    for path in runs:
        running.add(path)
    assert max(most) == 2
    assert mean_equals_soup(running, tmp_path)


@pytest.mark.parametrize("point", ["begin", "write", "commit"])
def test_an_unfinished_generation_never_touches_the_old_one(tmp_path, monkeypatch, point):
    runs = fine_tunes(tmp_path / "runs", 4)
    running = streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
    running.add(runs[0]).add(runs[1]).add(runs[2])
    newest = sorted((tmp_path / "sums").glob("gen-*"))[-1]
    before, real = snapshot(newest), getattr(GenerationStore, point)

    def fails(self, *arguments):
        if point != "commit":
            real(self, *arguments)
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(GenerationStore, point, fails)
        with pytest.raises(OSError, match="gone"):
            running.add(runs[3])
    assert snapshot(newest) == before
    running.close()
    again = streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)
    assert [m.path for m in again.members] == runs[:3]
    assert mean_equals_soup(again, tmp_path)
    assert mean_equals_soup(again.add(runs[3]), tmp_path)


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "tensor gone", "manifest torn"])
def test_damage_of_any_kind_is_noticed(tmp_path, damage):
    runs = fine_tunes(tmp_path / "runs", 2)
    streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0]).add(runs[1])
    newest = sorted((tmp_path / "sums").glob("gen-*"))[-1]
    chunk = newest / "layer.0.bias" / "c" / "0"
    raw = bytearray(chunk.read_bytes())
    if damage == "bit":
        raw[len(raw) // 3] ^= 1
        chunk.write_bytes(raw)
    elif damage == "short":
        chunk.write_bytes(raw[: 8 * 69])
    elif damage == "gone":
        chunk.unlink()
    elif damage == "tensor gone":
        shutil.rmtree(newest / "layer.0.bias")
    else:
        text = (newest / "zarr.json").read_text()
        (newest / "zarr.json").write_text(text[: len(text) // 2])
    with pytest.raises(ResumeError):
        streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)


def test_an_ingredient_that_changed_since_is_noticed_when_a_sum_is_opened(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)
    streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET).add(runs[0]).add(runs[1])
    write_checkpoint(Path(runs[1]), read_checkpoint(Path(runs[2])))
    with pytest.raises(streamsoup.StreamsoupError, match="run2"):
        streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)


def test_an_opened_sum_goes_on_as_if_it_had_never_been_closed(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 5)
    one = streamsoup.RunningSoup(runs, budget_bytes=BUDGET)
    for step in range(9):
        other = (
            streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET)
            if step
            else streamsoup.RunningSoup(runs, folder=tmp_path / "sums", budget_bytes=BUDGET)
        )
        change, path = ("remove", one.members[1].path) if step % 3 == 2 else ("add", runs[step % 5])
        for running in (one, other):
            getattr(running, change)(path)
        assert other.members == one.members
        if step < 8:
            other.close()
    one.mean().write(tmp_path / "a")
    other.mean().write(tmp_path / "b")
    assert same_bits(read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b"))


def test_a_sum_may_be_opened_with_the_ingredients_it_was_made_for(tmp_path):
    """The first ingredient gives the dtype, whether it is a member or not."""
    first = str(write_checkpoint(tmp_path / "first", {"w": np.ones(50, np.float32)}))
    runs = [str(write_checkpoint(tmp_path / f"run{i}", {"w": realistic(i, {"w": (50,)})["w"]})) for i in range(2)]
    running = streamsoup.RunningSoup([first, *runs], folder=tmp_path / "sums", budget_bytes=BUDGET)
    running.add(runs[0]).add(runs[1]).mean().write(tmp_path / "a")
    running.close()
    streamsoup.RunningSoup.open(tmp_path / "sums", budget_bytes=BUDGET).mean().write(tmp_path / "b")
    assert same_bits(read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b"))


@pytest.mark.parametrize(
    "name", ["../up", "a/../../up", "/up", "manifest.json", "zarr.json", "c", "a/b", "x" * 300, "ä.ö"]
)
def test_no_tensor_name_leads_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "deep" / "sums"
    if name == "/up":
        name = f"{tmp_path}/deep/up"
    tensors = [{"w": np.full(4, i, np.float32), name: np.full((3, 5), i + 2.0, np.float32)} for i in range(2)]
    runs = [str(write_checkpoint(tmp_path / f"run{i}", t)) for i, t in enumerate(tensors)]
    try:
        running = streamsoup.RunningSoup(runs, folder=folder, budget_bytes=BUDGET).add(runs[0]).add(runs[1])
    except streamsoup.StreamsoupError:
        pass  # a refusal in our words does, too
    else:
        assert mean_equals_soup(running, tmp_path)
        running.close()
        assert streamsoup.RunningSoup.open(folder, budget_bytes=BUDGET).members == running.members
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sums"]
    assert all(p.name.startswith("gen-") for p in folder.iterdir())


def test_scalars_and_empty_tensors_are_summed_too(tmp_path):
    tensors = [{"s": np.array(i + 0.5, np.float32), "none": np.zeros((0, 5), np.float32)} for i in range(2)]
    runs = [str(write_checkpoint(tmp_path / f"run{i}", t)) for i, t in enumerate(tensors)]
    for folder in (None, tmp_path / "sums"):
        running = streamsoup.RunningSoup(runs, folder=folder, budget_bytes=BUDGET).add(runs[0]).add(runs[1])
        assert mean_equals_soup(running, tmp_path)
