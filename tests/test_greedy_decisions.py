"""What a greedy soup decides, against exact averages and brute force."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from factory import DTYPES, fine_tunes, read_checkpoint, same_bits
from greedy_pools import SMALL, as_arrays, equals_its_recipe, flat, quality, small_pool
from reference import exact_bits
from test_rules import by_hand

import streamsoup
from streamsoup.rules import Rule, Search


def exact_soup(arrays, weights):
    """The soup by rationals, rounded once."""
    total = sum(map(Fraction, weights))
    return {
        name: exact_bits([a[name] for a in arrays], weights, total, dtype).view(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape) in SMALL.items()
    }


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
