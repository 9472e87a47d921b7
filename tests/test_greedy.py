"""Greedy soups: the paper's decisions, the recipe's bits, few reads, and nothing lost in a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from factory import read_checkpoint, same_bits, write_checkpoint

import streamsoup
from streamsoup.errors import ChangedIngredientError, DestinationError, RecipeError, ResumeError, ScoreError
from streamsoup.own_scores import read_own_scores
from streamsoup.reread import MOST_READS, prefer_reread

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

    class _Nowhere:
        def write(self, tensor, offset, buffer):
            pass

        start_sync = sync = lambda self: None

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


def test_ingredients_too_far_apart_leave_the_best_one(tmp_path, capfd):
    runs, target = make_pool(tmp_path / "runs", 4, bad=(1, 2, 3))
    done = _cli(tmp_path, runs, target)
    assert done.returncode == 0, done.stderr
    assert "kept 1 of 4" in done.stdout
    assert "best single ingredient" in done.stdout
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(Path(runs[0])))


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


def test_reading_again_is_chosen_only_where_it_is_cheaper_and_never_a_third_time():
    kept = {"a": 10, "b": 10}
    assert prefer_reread({"a": 10}, {}, sum_bytes=40, sum_ready=False)
    assert not prefer_reread(kept, {"a": 1, "b": 1}, sum_bytes=40, sum_ready=False)
    assert not prefer_reread({"a": 10}, {}, sum_bytes=40, sum_ready=True)


def _cli(tmp_path, runs, target, *more):
    np.save(tmp_path / "target.npy", target)
    score = f"{sys.executable} {DRIVER} score {tmp_path / 'target.npy'} {tmp_path / 'log'} {{soup}}"
    command = [sys.executable, "-m", "streamsoup", "greedy", *runs, "--score", score, "-o", str(tmp_path / "soup")]
    return subprocess.run([*command, *more], capture_output=True, text=True, check=False)


def test_the_command_line_shows_decisions_draws_them_and_leaves_no_litter(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 4, bad=(2,))
    done = _cli(tmp_path, runs, target, "--plot", str(tmp_path / "run.svg"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" kept ") >= 3
    assert " rejected " in done.stdout
    assert "kept 3 of 4" in done.stdout
    assert "<svg" in (tmp_path / "run.svg").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "soup", "run.svg", "log", "target.npy"}
    assert equals_its_recipe(tmp_path / "soup", tmp_path)


def test_the_command_line_forecasts_and_reads_json(tmp_path):
    runs, target = make_pool(tmp_path / "runs", 3)
    done = _cli(tmp_path, runs, target, "--dry-run")
    assert "running sum" in done.stdout
    assert "disk needed" in done.stdout
    assert not (tmp_path / "soup.work").exists()
    done = _cli(tmp_path, runs, target, "--json")
    assert json.loads(done.stdout)["score"] > -1e9
    done = _cli(tmp_path, runs, target)
    assert done.returncode == 1
    assert "exists already" in done.stderr


KILLS = [
    ("streamsoup.scorebook:ScoreBook.enter", n, before) for n in (1, 3, 5, 7) for before in (True, False)
] + [
    ("streamsoup.write:FileSink.write", n, True) for n in (1, 2, 3, 4)
] + [
    ("streamsoup.sums.generations:GenerationStore.write", 1, False),
    ("streamsoup.sums.generations:GenerationStore.write", 2, True),
    ("streamsoup.sums.generations:GenerationStore.commit", 1, True),
    ("streamsoup.sums.generations:GenerationStore.commit", 2, False),
    ("streamsoup.sums.store:MemoryStore.write", 2, False),
    ("streamsoup.greedy_output:_move", 1, True),
    ("streamsoup.greedy_output:_move", 1, False),
    ("streamsoup.greedy_output:write_side_files", 1, True),
    ("streamsoup.greedy_output:write_side_files", 1, False),
    ("streamsoup.workspace:Workspace.publish", 1, True),
    ("streamsoup.workspace:Workspace.publish", 1, False),
    ("streamsoup.score:run_command", 2, True),
    ("streamsoup.score:run_command", 6, False),
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A pool, and the soup of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("greedy")
    runs, target = make_pool(folder / "runs", 5, bad=(2,))
    np.save(folder / "target.npy", target)
    job = _job(folder, folder, runs, "memory")
    _drive(folder, job)
    lines = (folder / "log").read_text().splitlines()
    assert len(lines) == 9
    return folder, runs, (folder / "soup" / "model.safetensors").read_bytes(), recipe_of(folder / "soup")


def _job(pool, folder, runs, place):
    score = f"{sys.executable} {DRIVER} score {pool / 'target.npy'} {folder / 'log'} {{soup}}"
    return {
        "runs": runs,
        "out": str(folder / "soup"),
        "workdir": str(folder / "work"),
        "score": score,
        "sums": "disk" if place == "disk" else "host",
        "point": None,
        "number": 0,
        "before": False,
    }


def _drive(folder, job):
    (folder / "job.json").write_text(json.dumps(job))
    return subprocess.run(
        [sys.executable, DRIVER, "run", folder / "job.json"], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize(("point", "number", "before"), KILLS)
def test_killed_anywhere_resume_ends_with_the_same_decisions_and_bits(
    uninterrupted, tmp_path, point, number, before, place
):
    pool, runs, bits, recipe = uninterrupted
    if ("generations" in point and place != "disk") or ("MemoryStore" in point and place == "disk"):
        pytest.skip("that store is not used here")
    job = {**_job(pool, tmp_path, runs, place), "point": point, "number": number, "before": before}
    died = _drive(tmp_path, job)
    assert died.returncode in (-9, 0), died.stderr
    if (tmp_path / "soup").exists():
        assert (tmp_path / "soup" / "model.safetensors").read_bytes() == bits
    scored = len((tmp_path / "log").read_text().splitlines()) if (tmp_path / "log").exists() else 0
    if died.returncode == -9:
        if point.endswith("publish") and not before:
            return  # it was done
        done = _drive(tmp_path, {**job, "point": None})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "soup" / "model.safetensors").read_bytes() == bits
    assert recipe_of(tmp_path / "soup") == recipe
    total = len((tmp_path / "log").read_text().splitlines())
    # What was scored but not yet written down when the process died is the only thing asked twice.
    lost = int(died.returncode == -9 and point.endswith(("enter", "run_command")) and scored > 0)
    assert 9 <= total <= 9 + lost
