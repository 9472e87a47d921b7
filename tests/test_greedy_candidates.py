"""Candidates of a greedy run: their files, commands that score them, and the work folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from factory import read_checkpoint, same_bits, write_checkpoint
from greedy_pools import FileScore, as_arrays, equals_its_recipe, flat, make_pool, quality, scorer, small_pool

import streamsoup
from streamsoup.errors import (
    ChangedIngredientError,
    DestinationError,
    DiskSpaceError,
    RecipeError,
    ScoreError,
)
from streamsoup.forecast import Forecast
from streamsoup.greedy_job import WORK_NAMES
from streamsoup.pool import Pool, PoolOptions


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
