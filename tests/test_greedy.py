"""Greedy soups: the paper's decisions, the recipe's bits, few reads, and nothing lost in a crash."""

from __future__ import annotations

import json
import os
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from factory import DTYPES, fine_tunes, read_checkpoint, same_bits, write_checkpoint
from reference import exact_bits
from test_rules import by_hand

import streamsoup
from streamsoup.errors import (
    ChangedIngredientError,
    DestinationError,
    DiskSpaceError,
    RecipeError,
    ResumeError,
    ScoreError,
)
from streamsoup.forecast import Forecast
from streamsoup.greedy_job import WORK_NAMES
from streamsoup.own_scores import read_own_scores
from streamsoup.pool import Pool, PoolOptions
from streamsoup.reread import MOST_READS
from streamsoup.rules import Rule, Search
from streamsoup.write import Sink

DRIVER = Path(__file__).with_name("greedy_driver.py")
SIZE = 6000


def make_pool(folder, count, *, bad=(), seed=0):
    """Write runs around one target: `bad` ones lie far off. Returns their paths and the target."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal(SIZE)
    runs = []
    for i in range(count):
        noise = (3.0 if i in bad else 0.3 + 0.01 * i) * rng.standard_normal(SIZE)
        tensors = {"w": (target + noise).astype(ml_dtypes.bfloat16), "ids": np.arange(4)}
        path = write_checkpoint(folder / f"run{i:02d}", tensors)
        (folder / f"run{i:02d}" / "config.json").write_text("{}")
        runs.append(str(path))
    return runs, target


def scorer(target, asked=None):
    """Score a candidate by its distance to the target, and note what was asked."""

    def score(candidate):
        if asked is not None:
            asked.append(tuple((m.path, m.weight) for m in candidate.members))
        return -float(np.square(candidate.tensors()["w"].double().numpy() - target).sum())

    return score


def recipe_of(soup):
    manifest = json.loads((soup / "streamsoup.json").read_text())
    return [(entry["path"], entry["weight"]) for entry in manifest["ingredients"]]


def equals_its_recipe(soup, tmp_path):
    recipe = streamsoup.read_recipe(soup / "recipe.yaml")
    again = tmp_path / "again"
    paths, weights = [i.path for i in recipe.ingredients], [i.weight for i in recipe.ingredients]
    streamsoup.soup(paths, again, weights=weights, overwrite=True)
    return same_bits(read_checkpoint(soup), read_checkpoint(again))


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
        candidate.stream(_Nowhere())
        return float(len(candidate.members)) if int(candidate.members[-1].path[-2:]) % 2 == 0 else -100.0

    class _Nowhere(Sink):
        def write(self, tensor, offset, buffer):
            pass

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


# -- decisions, against brute force --------------------------------------------------------------------------------

SMALL = {"w": ("BF16", (8, 12)), "head": ("F32", (20,)), "half": ("F16", (5,))}


def small_pool(folder, count, seed=0, spread=60):
    """Tiny runs on a grid of 1/64, where sums of squares are whole numbers and so have no rounding of their own."""
    rng = np.random.default_rng(seed)
    target = {name: rng.integers(-100, 100, shape) for name, (_, shape) in SMALL.items()}
    runs = []
    for i in range(count):
        reach = 6 if i in (1, 3) else 1
        tensors = {
            name: ((target[name] + reach * rng.integers(-spread, spread + 1, shape)) / 64).astype(DTYPES[dtype])
            for name, (dtype, shape) in SMALL.items()
        }
        runs.append(str(write_checkpoint(folder / f"run{i:02d}", tensors)))
    return runs, target


def quality(tensors, target):
    """Minus the distance to the target, of whole numbers: the same in any order of adding."""
    return -float(
        sum(
            np.abs(np.rint(tensors[name].astype(np.float64) * 4096).astype(np.int64) - target[name] * 64).sum()
            for name in target
        )
    )


def exact_soup(arrays, weights):
    """The soup by rationals, rounded once."""
    total = sum(map(Fraction, weights))
    return {
        name: exact_bits([a[name] for a in arrays], weights, total, dtype).view(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in SMALL.items()
    }


def as_arrays(candidate):
    tensors = candidate.tensors()
    kinds = {name: DTYPES[dtype] for name, (dtype, _) in SMALL.items()}
    return {name: tensors[name].flatten().view(torch.uint8).numpy().view(kinds[name]) for name in SMALL}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accept": "gt"},
        {"tolerance": 40.0},
        {"minimize": True},
        {"order": "given"},
        {"order": "random", "seed": 3},
        {"max_ingredients": 2},
        {"rounds": 3},
        {"rounds": 2, "order": "given", "max_ingredients": 3},
        {"prune": True},
        {"prune": True, "rounds": 2, "accept": "gt", "tolerance": 30.0},
        {"restarts": 2},
        {"prune": True, "sums": "disk"},
        {"sums": "disk"},
        {"rounds": 3, "sums": "disk"},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "paper",
)
def test_decisions_are_those_of_exact_averages(tmp_path, options):
    runs, target = small_pool(tmp_path / "runs", 5, seed=len(options))
    arrays = [read_checkpoint(Path(run)) for run in runs]
    sign = -1.0 if options.get("minimize") else 1.0
    known = {}

    def score_of(members):
        key = tuple(members.items())
        if key not in known:
            soup = exact_soup([arrays[i] for i in members], list(members.values()))
            known[key] = sign * quality({n: a.reshape(-1) for n, a in soup.items()}, flat(target))
        return known[key]

    rule = Rule(**{k: v for k, v in options.items() if k != "sums"})
    own = [score_of({i: 1.0}) for i in range(5)]
    outcomes = [by_hand(rule, Search(rule, own).order(run), score_of) for run in range(rule.restarts + 1)]
    expected = outcomes[0]
    for other in outcomes[1:]:
        expected = other if rule.better(other[1], expected[1]) else expected
    result = streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=lambda c: sign * quality(as_arrays(c), flat(target)),
        workdir=tmp_path / "work",
        budget_bytes="200MiB",
        **options,
    )
    assert [(m.path, m.weight) for m in result.members] == [(runs[i], w) for i, w in expected[0].items()]
    assert result.score == expected[1]
    if "max_ingredients" not in options:
        assert {t.accepted for t in result.trials[1:]} == {True, False}, "decides nothing"
    soup = exact_soup([arrays[i] for i in expected[0]], list(expected[0].values()))
    assert same_bits(
        read_checkpoint(tmp_path / "soup"), {name: soup[name] for name in read_checkpoint(tmp_path / "soup")}
    )
    assert equals_its_recipe(tmp_path / "soup", tmp_path)


def flat(target):
    return {name: array.reshape(-1) for name, array in target.items()}


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
@pytest.mark.parametrize("options", [{}, {"prune": True}, {"rounds": 2}])
def test_where_sums_are_not_exact_the_soup_still_has_the_bits_of_its_recipe(tmp_path, dtype, sums_dtype, options):
    runs = fine_tunes(tmp_path / "runs", 5, dtype=dtype)
    middle = np.mean([read_checkpoint(Path(run))["layer.0.weight"].astype(np.float64) for run in runs], axis=0)

    def score(candidate):
        found = candidate.tensors()["layer.0.weight"].double().numpy()
        return -round(float(np.square(found - middle).sum()), 12)

    result = streamsoup.greedy(
        runs, tmp_path / "soup", score=score, sums_dtype=sums_dtype, budget_bytes="200MiB", **options
    )
    assert len(result.members) > 2
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
    if sums_dtype == "float32":  # the sum is no soup, so the ingredients were read again; who reads on is told
        manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
        assert result.rebuilt or any("again" in note or "float32" in note for note in manifest["notes"])


# -- reads ---------------------------------------------------------------------------------------------------------


class Nowhere(Sink):
    """Takes a candidate and forgets it."""

    def write(self, tensor, offset, buffer):
        pass

    def sync(self):
        pass


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


# -- candidates, commands and the work folder ----------------------------------------------------------------------


class FileScore:
    """Reads files as a command does, in this process."""

    needs_files = True

    def __init__(self, function):
        self.function = function

    def __call__(self, candidate):
        return self.function(candidate)


def test_ingredients_are_scored_where_they_lie_and_candidates_in_one_reused_folder(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 5, bad=(3,))
    places, nodes = [], set()

    def score(candidate):
        places.append(candidate.path)
        found = read_checkpoint(candidate.path)
        if len(candidate.members) > 1:
            nodes.add((candidate.path / "model.safetensors").stat().st_ino)
            assert {p.name for p in candidate.path.iterdir()} == {
                *("model.safetensors", "config.json", ".streamsoup-candidate")
            }
        return -float(np.square(found["w"].astype(np.float64) - target).sum())

    result = streamsoup.greedy(
        runs, tmp_path / "soup", score=FileScore(score), workdir=tmp_path / "work", budget_bytes="200MiB"
    )
    assert places[:5] == [Path(run) for run in runs]
    assert set(places[5:]) == {tmp_path / "work" / "candidate"}
    assert len(nodes) == 1
    assert {p.name for p in (tmp_path / "work").iterdir()} <= set(WORK_NAMES)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "soup", "work"}
    assert [json.loads(line)["value"] for line in (tmp_path / "work" / "scores.jsonl").read_text().splitlines()]
    for place in ("work", "soup"):
        decisions = json.loads((tmp_path / place / "decisions.json").read_text())
        assert [(t["path"], t["accepted"]) for t in decisions["trials"]] == [
            (t.path, t.accepted) for t in result.trials
        ]


def test_the_last_candidate_becomes_the_soup_without_a_copy(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 3)
    nodes = []

    def score(candidate):
        nodes.append((candidate.path / "model.safetensors").stat().st_ino)
        return float(len(candidate.members))

    streamsoup.greedy(runs, tmp_path / "soup", score=FileScore(score), workdir=tmp_path / "work", budget_bytes="200MiB")
    assert (tmp_path / "soup" / "model.safetensors").stat().st_ino == nodes[-1]
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
    assert (tmp_path / "soup" / "config.json").exists()


def test_an_evaluator_that_writes_into_its_candidate_spoils_no_soup(tmp_path):
    """Nothing says that it may not: an evaluation may cache, convert or fix what it was given."""
    runs, _ = make_pool(tmp_path / "runs", 3)

    def score(candidate):
        if len(candidate.members) > 1:
            (candidate.path / "cache.bin").write_bytes(b"12345")
        return float(len(candidate.members))

    streamsoup.greedy(runs, tmp_path / "soup", score=FileScore(score), workdir=tmp_path / "work", budget_bytes="200MiB")
    assert not (tmp_path / "soup" / "cache.bin").exists()


def test_candidates_in_another_place_leave_nothing_there(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 4, bad=(3,))
    places = set()

    def score(candidate):
        places.add(candidate.path)
        return float(len(candidate.members)) if runs[3] not in {m.path for m in candidate.members} else -1.0

    (tmp_path / "ram").mkdir()
    streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=FileScore(score),
        workdir=tmp_path / "work",
        candidates=str(tmp_path / "ram"),
        budget_bytes="200MiB",
    )
    (place,) = places - {Path(run) for run in runs}
    assert place.parent == tmp_path / "ram"
    assert list((tmp_path / "ram").iterdir()) == [], "a checkpoint is left on the RAM disk"
    assert equals_its_recipe(tmp_path / "soup", tmp_path)


def test_single_files_are_scored_as_single_files(tmp_path):
    runs = []
    for i in range(3):
        runs.append(str(write_checkpoint(tmp_path / f"run{i}.safetensors", {"w": np.full(9, i, np.float32)})))

    def score(candidate):
        assert candidate.path.is_file()
        return float(len(candidate.members))

    result = streamsoup.greedy(
        runs, tmp_path / "soup", score=FileScore(score), workdir=tmp_path / "work", budget_bytes="200MiB"
    )
    assert len(result.members) == 3
    assert read_checkpoint(tmp_path / "soup")["w"].tolist() == [1.0] * 9


def test_a_soup_that_is_to_be_one_file_is_one_or_is_refused_before_scoring(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 3)
    asked = []

    def score(candidate):
        asked.append(1)
        return float(len(candidate.members))

    try:
        streamsoup.greedy(runs, tmp_path / "soup.safetensors", score=score, budget_bytes="200MiB")
    except (RecipeError, DestinationError):
        assert not asked
    else:
        streamsoup.soup(runs, tmp_path / "plain.safetensors")
        assert same_bits(
            read_checkpoint(tmp_path / "soup.safetensors"), read_checkpoint(tmp_path / "plain.safetensors")
        )


@pytest.mark.parametrize("budget", ["30MiB", "64MiB", "100MiB"])
def test_small_budgets_do_for_small_networks(tmp_path, budget):
    runs, _ = small_pool(tmp_path / "runs", 3)
    result = streamsoup.greedy(
        runs, tmp_path / "soup", score=lambda c: 1.0, workdir=tmp_path / "work", budget_bytes=budget, workers=1
    )
    assert len(result.members) == 3


def test_what_is_run_before_scoring_is_run_on_every_candidate_and_never_on_ingredients(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 4)
    script, log = tmp_path / "before.py", tmp_path / "log"
    script.write_text(
        f"import sys\nopen({str(log)!r}, 'a').write(sys.argv[1] + '\\n')\npath = sys.argv[1] + '/model.safetensors'\n"
        "raw = bytearray(open(path, 'rb').read())\nraw[-2:] = b'\\x80\\x3f'\nopen(path, 'wb').write(raw)\n"
    )
    before = {run: (Path(run) / "model.safetensors").read_bytes() for run in runs}

    def score(candidate):
        changed = (candidate.path / "model.safetensors").read_bytes()[-2:] == b"\x80\x3f"
        assert changed is (len(candidate.members) > 1)
        return float(len(candidate.members))

    result = streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=FileScore(score),
        before_score=f"{sys.executable} -S {script} {{soup}}",
        workdir=tmp_path / "work",
        budget_bytes="200MiB",
    )
    lines = log.read_text().splitlines()
    assert lines[:3] == [str(tmp_path / "work" / "candidate")] * 3
    assert len(lines) == 4
    assert Path(lines[3]).is_relative_to(tmp_path / "soup.partial"), "the finished files, before they are in place"
    assert (tmp_path / "soup" / "model.safetensors").read_bytes()[-2:] == b"\x80\x3f"
    assert not equals_its_recipe(tmp_path / "soup", tmp_path)
    assert len(result.members) == 4
    assert before == {run: (Path(run) / "model.safetensors").read_bytes() for run in runs}
    assert "before.py" in (tmp_path / "soup" / "README.md").read_text()


def test_a_callable_that_changes_candidates_first_is_told_in_the_manifest(tmp_path):
    """The score is that of the changed candidate; the files are those of the pure average."""
    runs, _ = small_pool(tmp_path / "runs", 3)
    order = []
    streamsoup.greedy(
        runs,
        tmp_path / "soup",
        before_score=lambda c: order.append(("before", len(c.members))),
        score=lambda c: order.append(("score", len(c.members))) or 1.0,
        budget_bytes="200MiB",
    )
    assert order == [("score", 1)] * 3 + [("before", 2), ("score", 2), ("before", 3), ("score", 3)]
    assert equals_its_recipe(tmp_path / "soup", tmp_path)
    assert json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"]


def test_a_command_that_fails_before_scoring_loses_nothing(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 3)
    flag = tmp_path / "flag"
    script = tmp_path / "before.py"
    script.write_text(f"import os, sys\nprint('no GPU')\nsys.exit(not os.path.exists({str(flag)!r}))\n")
    asked = []

    def score(candidate):
        asked.append(candidate.members)
        return float(len(candidate.members))

    with pytest.raises(ScoreError, match=r"before\.py") as caught:
        streamsoup.greedy(
            runs,
            tmp_path / "soup",
            score=FileScore(score),
            before_score=f"{sys.executable} -S {script}",
            workdir=tmp_path / "work",
            budget_bytes="200MiB",
        )
    assert any("| no GPU" in note for note in caught.value.__notes__)
    assert len(asked) == 3
    flag.touch()
    result = streamsoup.resume_greedy(tmp_path / "work", score=FileScore(score))
    assert (len(asked), result.evaluations) == (5, 2)


def test_a_greedy_soup_may_replace_one_when_asked(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 3)
    for overwrite in (False, True):
        result = streamsoup.greedy(
            runs, tmp_path / "soup", score=lambda c: 1.0, overwrite=overwrite, budget_bytes="200MiB"
        )
    assert result.path == tmp_path / "soup"
    assert equals_its_recipe(tmp_path / "soup", tmp_path)


def test_the_manifest_says_who_the_ingredients_were(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 3)
    streamsoup.greedy(runs, tmp_path / "soup", score=lambda c: 1.0, budget_bytes="200MiB")
    streamsoup.soup(runs, tmp_path / "plain")
    one, other = (json.loads((tmp_path / name / "streamsoup.json").read_text()) for name in ("soup", "plain"))
    assert [i["content_digest"] for i in one["ingredients"]] == [i["content_digest"] for i in other["ingredients"]]
    assert all(i["content_digest"] for i in one["ingredients"])
    assert one["notes"] == other["notes"]


def test_the_forecast_is_what_lies_on_disk_at_most(tmp_path):
    runs, _ = make_pool(tmp_path / "runs", 6)
    most = []

    def score(candidate):
        sizes = (p.stat().st_size for p in (tmp_path / "work").rglob("*") if p.is_file())
        most.append(sum(size for size in sizes if size > 3000))
        return float(len(candidate.members))

    options = PoolOptions(sums="disk", budget_bytes=200 << 20)
    forecast = Forecast.of(Pool(runs, options), on_disk=True)
    streamsoup.greedy(
        runs,
        tmp_path / "soup",
        score=FileScore(score),
        workdir=tmp_path / "work",
        sums="disk",
        budget_bytes="200MiB",
    )
    assert forecast.disk_bytes - forecast.output_bytes <= max(most) * 1.01
    assert max(most) <= forecast.disk_bytes


def test_a_disk_that_is_too_small_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    runs, _ = small_pool(tmp_path / "runs", 3)
    monkeypatch.setattr("streamsoup.files.os.statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=512))
    with pytest.raises(DiskSpaceError, match="free"):
        streamsoup.greedy(
            runs, tmp_path / "soup", score=lambda c: pytest.fail("scored"), workdir=tmp_path / "work", sums="disk"
        )


def test_memory_is_given_back_to_whoever_calls_again(tmp_path):
    """Each run has a pool of its own: one run's options or sums do not leak into the next."""
    runs, target = small_pool(tmp_path / "runs", 4)
    results = [
        streamsoup.greedy(runs, score=lambda c: quality(as_arrays(c), flat(target)), budget_bytes="200MiB")
        for _ in range(2)
    ]
    assert results[0].members == results[1].members
    assert [t.score for t in results[0].trials] == [t.score for t in results[1].trials]
    assert results[0].bytes_read == results[1].bytes_read


@pytest.mark.parametrize("times_kept", [False, True])
def test_an_ingredient_that_changes_during_the_run_is_noticed(tmp_path, times_kept):
    runs, target = make_pool(tmp_path / "runs", 4)
    real, file = scorer(target), Path(runs[0]) / "model.safetensors"

    def score(candidate):
        if len(candidate.members) == 3:  # run00 is in the sum by now
            stat, raw = file.stat(), bytearray(file.read_bytes())
            raw[-2000] ^= 1
            file.write_bytes(raw)
            if times_kept:
                os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        candidate.write(tmp_path / "candidate")  # reads all of it, as a command's score would have it
        return real(candidate)

    # With its time put back, only reading it again can tell: a second round does.
    options = {"rounds": 2} if times_kept else {}
    with pytest.raises(ChangedIngredientError, match="run00"):
        streamsoup.greedy(runs, tmp_path / "soup", score=score, budget_bytes="200MiB", **options)
    assert not (tmp_path / "soup").exists()
