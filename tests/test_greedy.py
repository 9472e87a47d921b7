"""Greedy soups: the paper's decisions, the recipe's bits, few reads, and scores that are asked for once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from factory import DTYPES, read_checkpoint, same_bits, write_checkpoint
from greedy_pools import (
    DRIVER,
    SIZE,
    SMALL,
    as_arrays,
    equals_its_recipe,
    flat,
    make_pool,
    quality,
    recipe_of,
    scorer,
    small_pool,
)

import streamsoup
from streamsoup.errors import (
    ChangedIngredientError,
    DestinationError,
    RecipeError,
    ResumeError,
    ScoreError,
)
from streamsoup.own_scores import read_own_scores
from streamsoup.reread import MOST_READS
from streamsoup.sinks import Nowhere


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_it_keeps_what_helps_and_its_soup_is_that_of_its_recipe(tmp_path, place):
    runs, target = make_pool(tmp_path / "runs", 7, bad=(1, 4))
    asked = []
    result = streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=scorer(target, asked),
        workdir=tmp_path / "work",
        budget_bytes="200MiB",
        sums="disk" if place == "disk" else "host",
    )
    assert (tmp_path / "work" / "sums").exists() is (place == "disk")
    kept = [Path(m.path).name for m in result.members]
    assert "run01" not in kept
    assert "run04" not in kept
    assert kept[0] == "run00"
    assert [(m.path, m.weight) for m in result.members] == recipe_of(tmp_path / "soup")
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
    assert len(asked) == len(set(asked)) == result.evaluations
    best = max(result.own_scores.values())
    assert result.score >= best
    decisions = json.loads((tmp_path / "soup" / "decisions.json").read_text())
    assert [t["accepted"] for t in decisions["trials"]] == [t.accepted for t in result.trials]
    assert (tmp_path / "soup" / "README.md").exists()


def test_each_ingredient_is_read_at_most_twice_beyond_its_own_scoring(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 16)
    real = scorer(target)
    first = {"own": True}

    def score(candidate):  # candidates are streamed once, whole, as a module would take them
        if len(candidate.members) == 1:
            return -float(candidate.members[0].path[-2:])
        first["own"] = False
        real(candidate)
        candidate.stream(Nowhere())
        return float(len(candidate.members)) if int(candidate.members[-1].path[-2:]) % 2 == 0 else -100.0

    result = streamsoup.greedy(runs, tmp_path / "soup", score=score, budget_bytes="200MiB")
    assert len(result.members) == 8
    assert max(result.reads.values()) <= MOST_READS
    assert equals_its_recipe(tmp_path / "soup", tmp_path)


def test_bytes_read_are_one_ingredient_and_the_sum_a_trial(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 6)
    result = streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=lambda c: c.write(tmp_path / "candidate") and len(c.members),
        order="given",
        budget_bytes="200MiB",
    )
    each, buffers = SIZE * 2 + 32, 32
    sums = SIZE * 8
    assert [t.bytes_read for t in result.trials[2:]] == [each + sums + buffers] * 4


@pytest.mark.parametrize("options", [{"prune": True}, {"rounds": 3}, {"restarts": 2}, {"order": "random", "seed": 5}])
def test_other_rules_have_the_bits_of_their_recipe_too(tmp_path, options):
    runs, target = make_pool(tmp_path / "runs", 5, bad=(2,))
    result = streamsoup.greedy(runs, tmp_path / "soup", score=scorer(target), budget_bytes="200MiB", **options)
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
    assert "run02" not in {Path(m.path).name for m in result.members} or options.get("order") == "random"


def test_equal_scores_of_their_own_are_told(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 3)
    result = streamsoup.greedy(runs, score=lambda candidate: 1.0, budget_bytes="200MiB")
    assert result.ties == [runs]
    assert [t.tie for t in result.trials] == [False, True, True]
    assert result.path is None


def test_a_metric_of_a_mapping_decides_and_others_are_recorded(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 3)
    value = scorer(target)
    result = streamsoup.greedy(
        runs,
        score=lambda c: {"loss": -value(c), "size": len(c.members)},
        metric="loss",
        also=["size"],
        minimize=True,
        budget_bytes="200MiB",
    )
    assert len(result.members) == 3
    assert [t.also["size"] for t in result.trials[1:]] == [2, 3]


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_own_scores_may_be_given(tmp_path, suffix):
    runs, _ = make_pool(tmp_path / "runs", 3)
    text = {"json": '{"run00": 0.1, "run01": 0.3, "run02": 0.2}', "csv": "run,acc\nrun00,0.1\nrun01,0.3\nrun02,0.2\n"}
    (tmp_path / f"scores.{suffix}").write_text(text[suffix])
    own = read_own_scores(tmp_path / f"scores.{suffix}", runs)
    asked = []
    result = streamsoup.greedy(
        runs,
        score=lambda c: asked.append(len(c.members)) or 1.0,
        own_scores=own,
        budget_bytes="200MiB",
    )
    assert min(asked) == 2, "no ingredient was scored again"
    assert [Path(m.path).name for m in result.members] == ["run01", "run02", "run00"]
    for wrong in ('{"run00": 1}', "[1]", "{", '{"run00": 1, "run01": "x", "run02": 1}'):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(RecipeError, match=r"wrong\.json"):
            read_own_scores(tmp_path / "wrong.json", runs)


def test_a_score_that_fails_loses_nothing(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 5)
    asked, real = [], scorer(target)

    def failing(candidate):
        if len(asked) == 7:
            raise ScoreError("the evaluator fell over")
        asked.append(candidate.members)
        return real(candidate)

    with pytest.raises(ScoreError, match="fell over") as caught:
        streamsoup.greedy(runs, tmp_path / "soup", score=failing, workdir=tmp_path / "work", budget_bytes="200MiB")
    assert any("--resume" in note for note in caught.value.__notes__)
    again = []
    result = streamsoup.resume_greedy(tmp_path / "work", score=scorer(target, again))
    assert len(asked) + len(again) == 9
    assert len(result.members) == 5
    assert equals_its_recipe(tmp_path / "soup", tmp_path)


def test_an_ingredient_that_changed_since_is_named(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 3)
    with pytest.raises(ZeroDivisionError):
        streamsoup.greedy(
            runs, tmp_path / "soup", score=lambda c: 1 / 0, workdir=tmp_path / "work", budget_bytes="200MiB"
        )
    file = Path(runs[1]) / "model.safetensors"
    stat, raw = file.stat(), bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ChangedIngredientError, match="run01"):
        streamsoup.resume_greedy(tmp_path / "work", score=lambda c: 1.0)


def test_what_runs_before_scoring_changes_candidates_and_the_soup_and_is_told(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 3)
    script = tmp_path / "before.py"
    script.write_text(
        "import sys\npath = sys.argv[1] + '/model.safetensors'\nraw = bytearray(open(path, 'rb').read())\n"
        "raw[-2:] = b'\\0\\0'\nopen(path, 'wb').write(raw)\n"
    )
    log = tmp_path / "log"
    np.save(tmp_path / "target.npy", target)
    streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=f"{sys.executable} {DRIVER} score {tmp_path / 'target.npy'} {log} {{soup}}",
        before_score=f"{sys.executable} {script} {{soup}}",
        workdir=tmp_path / "work",
        budget_bytes="200MiB",
    )
    assert (tmp_path / "soup" / "model.safetensors").read_bytes()[-2:] == b"\0\0"
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert "before.py" in manifest["notes"][0]


def test_refusals_come_before_any_score(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 3)

    def never(candidate):
        pytest.fail("was scored")

    for wrong in (runs[:1], [runs[0], runs[0]], []):
        with pytest.raises(RecipeError):
            streamsoup.greedy(wrong, score=never)
    with pytest.raises(RecipeError, match="Unknown option"):
        streamsoup.greedy(runs, score=never, colour="red")
    with pytest.raises(DestinationError):
        streamsoup.greedy(runs, runs[0], score=never)
    with pytest.raises(ResumeError):
        streamsoup.resume_greedy(tmp_path / "nowhere", score=never)


# -- reads ---------------------------------------------------------------------------------------------------------


def reading(candidate):
    """Score what even numbers improve and odd ones spoil, having read the candidate once, as a live module would."""
    candidate.stream(Nowhere())
    numbers = [int(m.path[-2:]) for m in candidate.members]
    return float(len(numbers)) - 100.0 * any(n % 2 for n in numbers[1:]) - numbers[0] / 100


@pytest.mark.parametrize("place", ["host", "disk"])
def test_all_bytes_are_those_of_one_ingredient_and_the_sum_for_each_trial(tmp_path, place):
    runs, _ = small_pool(tmp_path / "runs", 16)
    result = streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=reading,
        order="given",
        own_scores=dict.fromkeys(runs, 0.0) | {runs[0]: 1.0},
        workdir=tmp_path / "work",
        sums=place,
        budget_bytes="200MiB",
    )
    assert [int(m.path[-2:]) for m in result.members] == list(range(0, 16, 2))
    elements = {dtype: int(np.prod(shape)) for dtype, shape in SMALL.values()}
    one = sum(n * DTYPES[dtype].itemsize for dtype, n in elements.items())
    sums = 8 * sum(elements.values())
    assert [t.bytes_read for t in result.trials[2:]] == [one + sums] * 14
    assert result.trials[1].bytes_read == 2 * one, "the first trial reads both: there is no sum yet"
    trials = 2 * one + 14 * (one + sums)
    folds = one + 7 * (one + sums)  # the first, then each that was kept
    assert result.bytes_read == trials + folds + sums, "and the soup is made from the sum"
    assert max(result.reads.values()) == 2
    assert result.rebuilt <= 1


def test_scoring_ingredients_alone_is_not_counted_as_reading_them_again(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 8)
    result = streamsoup.greedy(runs, tmp_path / "soup", score=reading, budget_bytes="200MiB")
    assert len(result.members) == 4
    assert max(result.reads.values()) <= MOST_READS


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_where_all_are_rejected_the_best_is_read_twice(tmp_path, count):
    runs, _ = small_pool(tmp_path / "runs", count)

    def score(candidate):
        candidate.stream(Nowhere())
        return -float(len(candidate.members))

    own = {run: -float(i) for i, run in enumerate(runs)}
    result = streamsoup.greedy(runs, tmp_path / "soup", score=score, own_scores=own, budget_bytes="200MiB")
    assert [m.path for m in result.members] == runs[:1]
    assert max(result.reads.values()) <= MOST_READS
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(Path(runs[0])))


# -- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"prune": True}, {"rounds": 3}, {"restarts": 3}, {"order": "given", "prune": True}]
)
def test_no_soup_is_scored_twice_and_none_without_need(tmp_path, options):
    runs, target = small_pool(tmp_path / "runs", 5)
    asked = []

    def score(candidate):
        asked.append(candidate.members)
        return quality(as_arrays(candidate), flat(target))

    result = streamsoup.greedy(runs, score=score, budget_bytes="200MiB", **options)
    assert len(asked) == len(set(asked)) == result.evaluations
    tried = {t.path for t in result.trials}
    assert tried <= set(runs)
    if options.get("prune") and options.get("order") == "given":
        assert all(len(members) > 1 for members in asked) or len(result.members) == 1, "no order needs these"


def test_ingredients_that_differ_outside_of_what_identities_sample_are_scored_each(tmp_path):
    base = np.zeros(3000, np.float32)
    runs = []
    for i in range(3):
        array = base.copy()
        array[0] = i  # a fine-tune of one embedding leaves all the rest alone
        runs.append(str(write_checkpoint(tmp_path / f"run{i}", {"w": array})))
    result = streamsoup.greedy(runs, score=lambda c: float(c.tensors()["w"][0]), budget_bytes="200MiB")
    assert result.own_scores == {runs[0]: 0.0, runs[1]: 1.0, runs[2]: 2.0}
    assert [m.path for m in result.members] == [runs[2]]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), "high"])
def test_own_scores_that_decide_nothing_are_refused(tmp_path, wrong):
    runs, _ = small_pool(tmp_path / "runs", 3)
    with pytest.raises((RecipeError, ScoreError)):
        streamsoup.greedy(
            runs, score=lambda c: pytest.fail("scored"), own_scores={runs[0]: wrong, runs[1]: 1.0, runs[2]: 0.5}
        )


def test_scores_that_are_missing_are_asked_for(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 3)
    asked = []

    def score(candidate):
        asked.append([m.path for m in candidate.members])
        return 1.0

    streamsoup.greedy(runs, score=score, own_scores={runs[2]: 2.0}, budget_bytes="200MiB")
    assert asked[:2] == [[runs[0]], [runs[1]]]
    assert all(runs[2] in members for members in asked[2:])


def test_who_looks_on_is_told_each_score_and_each_decision_at_once(tmp_path):
    runs, target = small_pool(tmp_path / "runs", 4)
    seen = []

    def score(candidate):
        seen.append(("asked", len(candidate.members)))
        return quality(as_arrays(candidate), flat(target))

    result = streamsoup.greedy(
        runs,
        score=score,
        on_trial=lambda record: seen.append(("decided", record)),
        on_score=lambda path, value: seen.append(("alone", path)),
        budget_bytes="200MiB",
    )
    assert [what for what, _ in seen] == ["asked", "alone"] * 4 + ["decided"] + ["asked", "decided"] * 3
    assert tuple(record for what, record in seen if what == "decided") == result.trials


@pytest.mark.parametrize(
    "rule", [{}, {"prune": True}, {"order": "given", "rounds": 2}, {"order": "random", "seed": 3, "restarts": 2}]
)
@pytest.mark.parametrize("sums", ["host", "disk"])
def test_buffers_that_differ_are_those_of_the_first_one_kept(tmp_path, rule, sums):
    """As in the soup of its recipe; a sum once had those of the first one named."""
    rng, target, runs = np.random.default_rng(0), np.full(5000, 0.5, np.float32), []
    for number, off in enumerate((0.4, -0.3, 0.25, 0.02, -0.02)):
        names = {
            "w": target + np.float32(off) + rng.normal(0, 1e-3, 5000).astype(np.float32),
            "ids": np.arange(9) + number,
            "also": np.full((3,), number, np.int32),
        }
        names = dict(reversed(names.items())) if number % 2 else names
        runs.append(str(write_checkpoint(tmp_path / f"run{number}", names)))
    result = streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=lambda candidate: -float(np.abs(candidate.tensors()["w"].numpy() - target).max()),
        workdir=tmp_path / "work",
        buffers="first",
        sums=sums,
        budget_bytes="200MiB",
        **rule,
    )
    assert (result.members[0].path == runs[0]) is (rule.get("order") == "given")
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
    found = read_checkpoint(tmp_path / "soup")
    assert found["ids"].tobytes() == read_checkpoint(Path(result.members[0].path))["ids"].tobytes()


def test_ingredients_may_have_their_tensors_in_another_order(tmp_path):
    """One layout serves all candidates: one that began with another order was written into wrong places."""
    rng = np.random.default_rng(0)
    runs, seen = [], {}
    for number in range(4):
        names = {f"w{i}": rng.normal(size=300 + i).astype(np.float32) for i in range(5)}
        seen[number] = names
        order = dict(reversed(names.items())) if number else names
        runs.append(str(write_checkpoint(tmp_path / f"run{number}", order, shards=2 if number == 2 else 1)))
    asked = []

    class Score:
        needs_files = True

        def __call__(self, candidate):
            found = read_checkpoint(candidate.path)
            names = [int(Path(m.path).name[3:]) for m in candidate.members]
            for name, array in found.items():
                mean = np.mean([seen[i][name].astype(np.float64) for i in names], axis=0).astype(np.float32)
                assert array.tobytes() == mean.tobytes(), (names, name)
            asked.append(names)
            return float(len(names) - 0.1 * min(names))

    result = streamsoup.greedy(runs[1:] + runs[:1], tmp_path / "soup", score=Score(), workdir=tmp_path / "work")
    assert len(asked) > 4
    assert len(result.members) > 1
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
