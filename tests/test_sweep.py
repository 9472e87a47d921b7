"""Sweeps over a parameter, and averages that slide along a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from factory import read_checkpoint, write_checkpoint

import streamsoup
import streamsoup.sweeping
from streamsoup.errors import RecipeError, ResumeError, ScoreError
from streamsoup.recipe import make_recipe
from streamsoup.sweeping import parse_sweep


@pytest.fixture
def runs(tmp_path):
    """Five checkpoints of one run; the base is all zero."""
    paths = []
    for i in range(5):
        rng = np.random.default_rng(i)
        paths.append(str(write_checkpoint(tmp_path / f"step{i}", {"w": (rng.standard_normal(5000) * i).astype("f4")})))
    return paths


def recipe_of(runs):
    return make_recipe(runs[1:2], method="wise_ft", base=runs[0])


def test_both_ends_of_a_sweep_count_and_no_value_is_off_by_a_bit():
    assert parse_sweep("0:1:0.1") == ("alpha", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert parse_sweep("density=0.5:0.2:-0.1") == ("density", [0.5, 0.4, 0.3, 0.2])


@pytest.mark.parametrize("text", ["0:1", "a:b:c", "0:1:0", "1:0:0.1", "0:1:1e-9", "x=nan:1:1"])
def test_a_sweep_that_cannot_be_is_refused(text):
    with pytest.raises(RecipeError, match=f"sweep {text}: "):
        parse_sweep(text)


def test_the_best_value_makes_the_soup(tmp_path, runs):
    seen = []

    def score(trial):
        soup = read_checkpoint(trial.path)["w"]
        seen.append(trial.value)
        return -float(np.abs(soup - 0.3 * read_checkpoint(Path(runs[1]))["w"]).max())

    found = streamsoup.sweep(recipe_of(runs), tmp_path / "soup", score, values=[0.0, 0.25, 0.3, 1.0])
    assert seen == [0.0, 0.25, 0.3, 1.0]
    assert (found.name, found.best) == ("alpha", 0.3)
    streamsoup.soup(runs[1:2], tmp_path / "same", method="wise_ft", base=runs[0], parameters={"alpha": 0.3})
    made = [read_checkpoint(tmp_path / name)["w"].tobytes() for name in ("soup", "same")]
    assert made[0] == made[1]
    assert not (tmp_path / "soup.work").exists()


def test_a_failure_loses_no_score_and_another_recipe_is_refused(tmp_path, runs):
    calls = []

    def score(trial):
        calls.append(trial.value)
        return float("nan") if len(calls) == 3 else trial.value

    with pytest.raises(ScoreError, match="nan"):
        streamsoup.sweep(recipe_of(runs), tmp_path / "soup", score, values=[0.0, 0.5, 1.0])
    assert not (tmp_path / "soup").exists()
    with pytest.raises(ResumeError, match="another recipe"):
        streamsoup.sweep(make_recipe(runs[2:3], method="wise_ft", base=runs[0]), tmp_path / "soup", score, values=[0.0])
    found = streamsoup.sweep(recipe_of(runs), tmp_path / "soup", score, values=[0.0, 0.5, 1.0])
    assert calls == [0.0, 0.5, 1.0, 1.0]
    assert found.best == 1.0


def test_a_folder_of_somebody_else_is_not_taken(tmp_path, runs):
    (tmp_path / "soup.work").mkdir()
    (tmp_path / "soup.work" / "thesis.tex").write_text("x")
    with pytest.raises(ResumeError, match="is no sweep of ours"):
        streamsoup.sweep(recipe_of(runs), tmp_path / "soup", lambda trial: 0.0, values=[0.0])
    assert (tmp_path / "soup.work" / "thesis.tex").exists()


@pytest.mark.parametrize("window", [1, 2, 5])
def test_sliding_averages_are_the_soups_of_their_checkpoints(tmp_path, runs, window):
    for first, candidate in enumerate(streamsoup.sliding_averages(runs, window)):
        found = candidate.tensors()["w"].numpy().tobytes()
        streamsoup.soup(runs[first : first + window], tmp_path / f"soup{first}")
        assert found == read_checkpoint(tmp_path / f"soup{first}")["w"].tobytes()
    assert first == len(runs) - window


def test_a_checkpoint_may_be_named_twice(tmp_path, runs):
    *_, last = streamsoup.sliding_averages([runs[1], runs[2], runs[1]], 2)
    found = last.tensors()["w"].numpy().tobytes()
    streamsoup.soup([runs[1], runs[2]], tmp_path / "soup")
    assert found == read_checkpoint(tmp_path / "soup")["w"].tobytes()


def test_the_same_call_goes_on_after_the_last_soup_was_interrupted(tmp_path, runs, monkeypatch):
    with monkeypatch.context() as patch:
        original = streamsoup.sweeping.cook

        def failing(recipe, out, execution):
            if "candidate" not in str(out):
                patch.setattr("streamsoup.making.write_side_files", lambda *a, **k: 1 / 0)
            return original(recipe, out, execution)

        patch.setattr(streamsoup.sweeping, "cook", failing)
        with pytest.raises(ZeroDivisionError):
            streamsoup.sweep(recipe_of(runs), tmp_path / "soup", lambda t: t.value, values=[0.0, 1.0])
    found = streamsoup.sweep(recipe_of(runs), tmp_path / "soup", lambda t: 1 / 0, values=[0.0, 1.0])
    assert found.best == 1.0
    assert (tmp_path / "soup").exists()
    assert not (tmp_path / "soup.work").exists()


def test_a_window_longer_than_the_run_is_refused(runs):
    with pytest.raises(RecipeError, match="window: 6 of 5 checkpoints"):
        next(streamsoup.sliding_averages(runs, 6))
