"""Candidates that are scored several at once: the decisions and bits of one after the other, and what it cost."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from factory import fine_tunes, read_checkpoint, same_bits, weights_bytes, write_checkpoint
from greedy_pools import FileScore, equals_its_recipe, flat, make_pool, quality, small_pool

import streamsoup
from streamsoup.errors import DiskSpaceError, NonFiniteError, RecipeError, ResumeError, ScoreError
from streamsoup.forecast import Forecast
from streamsoup.pool import Pool, PoolOptions
from streamsoup.rules import Accept, Begin, Rule, Search, Trial

PATIENCE_SECONDS = 30


class AtOnce(FileScore):
    """Reads files as a command does, and may be called by several threads."""

    at_once = True


def names(members):
    return tuple(Path(m.path).name for m in members)


def near(target):
    def score(soup):
        found = read_checkpoint(soup.path)
        return quality({name: found[name].reshape(-1) for name in target}, flat(target))

    return score


def told(result):
    """All that must not depend on how many are scored at once."""
    return (
        [(m.path, m.weight) for m in result.members],
        [(t.path, t.change, t.round, t.run, t.score, t.best_before, t.accepted, t.size) for t in result.trials],
        result.score,
        result.own_scores,
        result.ties,
    )


def run(runs, folder, score, jobs=1, **options):
    folder.mkdir(exist_ok=True)
    return streamsoup.greedy(
        runs, folder / "soup", score=score, workdir=folder / "work", jobs=jobs, budget_bytes="200MiB", **options
    )


def run_of_length(scores):
    """Score by the number of members, which `scores` says; alone, earlier ones are better."""

    def score(soup):
        return scores(names(soup.members)) if len(soup.members) > 1 else -float(names(soup.members)[0][-2:])

    return score


# -- decisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accept": "gt"},
        {"tolerance": 40.0},
        {"tolerance": float("inf")},
        {"minimize": True},
        {"order": "given"},
        {"order": "random", "seed": 3},
        {"max_ingredients": 2},
        {"rounds": 3},
        {"rounds": 2, "order": "given", "max_ingredients": 3},
        {"prune": True},
        {"prune": True, "rounds": 2, "accept": "gt", "tolerance": 30.0},
        {"prune": True, "order": "given", "sums": "disk"},
        {"restarts": 2},
        {"rounds": 2, "restarts": 2, "sums": "disk"},
        {"sums_dtype": "float32", "rounds": 2},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "paper",
)
def test_decisions_scores_and_bits_do_not_depend_on_how_many_are_scored_at_once(tmp_path, options):
    runs, target = small_pool(tmp_path / "runs", 6, seed=len(options))
    sign = -1.0 if options.get("minimize") else 1.0
    score = near(target)
    one = run(runs, tmp_path / "one", FileScore(lambda soup: sign * score(soup)), **options)
    assert one.at_once is None
    for jobs in (2, 3, 20):
        place = tmp_path / f"{jobs}"
        many = run(runs, place, AtOnce(lambda soup: sign * score(soup)), jobs, **options)
        assert told(many) == told(one)
        assert weights_bytes(place / "soup") == weights_bytes(tmp_path / "one" / "soup")
        recipes = [(folder / "soup" / "recipe.yaml").read_text() for folder in (tmp_path / "one", place)]
        assert recipes[0] == recipes[1]
        assert equals_its_recipe(place / "soup", tmp_path)
        assert many.at_once.jobs == jobs
        assert many.evaluations >= one.evaluations
        written = json.loads((place / "soup" / "decisions.json").read_text())["at_once"]
        assert {"jobs", "beside", "wasted", "saved_seconds", "saved_evaluations"} == written.keys()


@pytest.mark.parametrize("dtype", ["F32", "F64"])
@pytest.mark.parametrize("sums_dtype", ["float64", "float32"])
@pytest.mark.parametrize("options", [{}, {"prune": True, "rounds": 2}, {"rounds": 3, "restarts": 1}])
def test_candidates_of_rounded_sums_have_the_bits_that_they_would_have_had(tmp_path, dtype, sums_dtype, options):
    runs = fine_tunes(tmp_path / "runs", 5, dtype=dtype)
    middle = np.mean([read_checkpoint(Path(run))["layer.0.weight"].astype(np.float64) for run in runs], axis=0)

    def score(soup):  # to the last bit
        return -float(np.square(read_checkpoint(soup.path)["layer.0.weight"].astype(np.float64) - middle).sum())

    one = run(runs, tmp_path / "one", FileScore(score), sums_dtype=sums_dtype, **options)
    many = run(runs, tmp_path / "many", AtOnce(score), 3, sums_dtype=sums_dtype, **options)
    assert told(many) == told(one)
    assert same_bits(read_checkpoint(tmp_path / "one" / "soup"), read_checkpoint(tmp_path / "many" / "soup"))


def test_looking_ahead_is_what_a_run_asks_for_should_nothing_be_accepted():
    search = Search(Rule(rounds=2, max_ingredients=2, tolerance=float("inf")), [0.4, 0.3, 0.2, 0.1])
    assert [s.ingredient for s in search.ahead(0, [1.0]) if isinstance(s, Trial)] == [1, 2, 3, 0, 1, 2, 3]
    trial = Trial(1, 1.0)
    after = list(search.ahead(0, [1.0, 1.0, 0.0]))
    assert not any(isinstance(step, Accept) for step in after)
    assert [s.ingredient for s in after] == [0, 1], "two are kept, which may enter again"
    assert next(search.ahead(0, [1.0, 1.0])) == Accept(trial)
    first, *more = Search(Rule(prune=True), [0.2, 0.1]).ahead(0, [])
    assert first == Begin((0, 1))
    assert more == [Trial(1, -1.0), Trial(0, -1.0)]


# -- evaluators that end in another order --------------------------------------------------------------------------


class Backwards:
    """Answers the later ones of what is asked for at once before the earlier ones."""

    at_once = needs_files = True

    def __init__(self, score, jobs):
        self.score, self.jobs = score, jobs
        self.asked, self.places, self.answered, self.most = [], set(), [], 0
        self._lock, self._running = threading.Condition(), {}

    def __call__(self, soup):
        with self._lock:
            number = len(self.asked)
            self.asked.append(names(soup.members))
            assert soup.job not in self._running.values(), "two have one place"
            assert soup.job in range(self.jobs)
            self.places.add((soup.job, soup.path.name if len(soup.members) > 1 else ""))
            self._running[number] = soup.job
            self.most = max(self.most, len(self._running))
            self._lock.notify_all()
            is_last = lambda: max(self._running) == number  # noqa: E731
            while not is_last() or self._lock.wait_for(lambda: not is_last(), 0.2):  # nobody comes any more
                assert self._lock.wait_for(is_last, PATIENCE_SECONDS)
            value = self.score(soup)
            self.answered.append(names(soup.members))
            del self._running[number]
            self._lock.notify_all()
            return value


@pytest.mark.parametrize("options", [{}, {"prune": True}, {"rounds": 2}, {"order": "given"}])
def test_evaluations_that_end_in_reverse_order_change_nothing(tmp_path, options):
    runs, target = small_pool(tmp_path / "runs", 6, seed=2)
    one = run(runs, tmp_path / "one", FileScore(near(target)), **options)
    score = Backwards(near(target), 3)
    many = run(runs, tmp_path / "many", score, 3, **options)
    assert told(many) == told(one)
    assert weights_bytes(tmp_path / "many" / "soup") == weights_bytes(tmp_path / "one" / "soup")
    assert score.most > 1
    assert score.answered != score.asked
    assert {place for place in score.places if place[1]} <= {(0, "candidate"), (1, "candidate-1"), (2, "candidate-2")}
    assert many.at_once.beside > 0


# -- counting ------------------------------------------------------------------------------------------------------


class Together:
    """Answers only when as many as are to come at once have come; so what is begun depends on decisions alone."""

    at_once = needs_files = True

    def __init__(self, score, waves):
        self.score = score
        self.barriers = [b for b in map(threading.Barrier, waves) for _ in range(b.parties)]
        self.asked, self._lock = [], threading.Lock()

    def __call__(self, soup):
        with self._lock:
            number = len(self.asked)
            self.asked.append(names(soup.members))
        self.barriers[number].wait(PATIENCE_SECONDS)
        return self.score(soup)


def test_where_nothing_is_accepted_nothing_is_wasted(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 7)
    # Own scores go on wherever a place is free.
    score = Together(run_of_length(lambda members: -99.0), [3, 1, 1, 1, 1, 3, 3])
    result = run(runs, tmp_path / "here", score, 3)
    assert len(result.members) == 1
    assert result.evaluations == 7 + 6
    assert result.at_once.wasted == 0
    assert result.at_once.beside >= 9


def test_what_was_scored_behind_an_accepted_one_is_counted_as_wasted(tmp_path):
    """Four are tried at once and the first is kept, again and again: three are wasted, then two, then one."""
    runs, _ = small_pool(tmp_path / "runs", 5)
    order = {"order": "given", "own_scores": {runs[0]: 0.0}}
    score = Together(run_of_length(lambda members: float(len(members))), [4, 3, 2, 1])
    result = run(runs, tmp_path / "here", score, 4, **order)
    assert len(result.members) == 5
    assert result.evaluations == len(score.asked) == 4 + 3 + 2 + 1
    assert result.at_once.wasted == 6
    assert 9 <= result.at_once.beside <= 10, "the last one may begin before those of the last but one have ended"
    scored = [json.loads(line) for line in (tmp_path / "here" / "work" / "scores.jsonl").read_text().splitlines()]
    assert len(scored) == 10, "scores that came are kept"


def test_what_was_wasted_is_found_by_whoever_asks_for_the_same_later(tmp_path):
    """A restart asks for a soup that another run had looked ahead to, in vain."""
    runs, _ = small_pool(tmp_path / "runs", 3)
    rule = {"order": "given", "restarts": 1}
    rule["seed"] = next(s for s in range(99) if Search(Rule(**rule, seed=s), [None] * 3).order(1) == [0, 2, 1])
    score = run_of_length(lambda found: float(len(found)))
    one = run(runs, tmp_path / "one", FileScore(score), **rule)
    assert one.evaluations == 1 + 2 + 2
    many = run(runs, tmp_path / "many", Together(score, [1, 2, 1, 1]), 2, **rule)
    assert told(many) == told(one)
    assert many.evaluations == 1 + 2 + 1 + 1, "the third soup was not scored again"
    assert many.at_once.wasted == 0


def test_with_one_at_a_time_there_is_no_thread_and_no_other_folder(tmp_path):
    runs, target = small_pool(tmp_path / "runs", 4)
    threads, inner = set(), near(target)

    def score(soup):
        threads.add(threading.current_thread())
        return inner(soup)

    run(runs, tmp_path / "here", FileScore(score))
    assert threads == {threading.main_thread()}
    assert {p.name for p in (tmp_path / "here" / "work").iterdir()} == {
        *("greedy.json", "scores.jsonl", "decisions.json", "candidate")
    }
    rows = [json.loads(line) for line in (tmp_path / "here" / "work" / "scores.jsonl").read_text().splitlines()]
    assert not any("ahead" in row for row in rows)


# -- errors --------------------------------------------------------------------------------------------------------


def failing_at(members, waves, value=-99.0):
    def decide(found):
        if found == members:
            raise ScoreError("the evaluator fell over")
        return float(len(found)) if found == ("run00", "run01") else value

    return Together(run_of_length(decide), waves)


def test_an_error_of_what_turns_out_not_to_be_needed_is_none(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 4)
    given = {"order": "given", "own_scores": {runs[0]: 0.0}}
    result = run(runs, tmp_path / "here", failing_at(("run00", "run02"), [3, 2]), 3, **given)
    assert names(result.members) == ("run00", "run01")
    assert result.at_once.wasted == 2
    assert result.evaluations == 4


def test_an_error_of_what_is_needed_is_that_of_one_after_the_other(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 4)
    given = {"order": "given", "own_scores": {runs[0]: 0.0}}
    errors = []
    for jobs in (1, 3):
        score = failing_at(("run00", "run01", "run02"), [3, 2] if jobs > 1 else [1, 1])
        with pytest.raises(ScoreError, match="fell over") as caught:
            run(runs, tmp_path / f"{jobs}", score, jobs, **given)
        errors.append([note.replace(f"/{jobs}/", "/") for note in caught.value.__notes__])
    assert errors[0] == errors[1]
    score = Together(run_of_length(lambda found: float(len(found)) if len(found) == 2 else -99.0), [1, 1])
    result = streamsoup.resume_greedy(tmp_path / "3" / "work", score=score, jobs=2)
    assert ("run00", "run01", "run03") not in score.asked, "its score had come"
    assert names(result.members) == ("run00", "run01")


def test_a_candidate_that_cannot_be_made_fails_when_it_is_its_turn(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 4)
    bad = {name: array.copy() for name, array in read_checkpoint(Path(runs[2])).items()}
    bad["head"][3] = np.nan
    write_checkpoint(Path(runs[2]), bad)
    given = {"order": "given", "own_scores": {runs[0]: 0.0}}
    score = Together(run_of_length(lambda found: float(len(found))), [1, 1])
    with pytest.raises(NonFiniteError, match="run02"):
        run(runs, tmp_path / "here", score, 4, **given)
    assert score.asked == [("run00", "run01")], "what is behind it is not begun"


# -- commands ------------------------------------------------------------------------------------------------------

# Where there is a file `together`, the first one answers when so many have come, and the others sleep.
COMMAND = """
import os, sys, time
folder, log, job = sys.argv[1], sys.argv[2], os.environ["STREAMSOUP_JOB"]
wait = os.path.join(log, "together")
together = os.path.exists(wait) and int(open(wait).read())
open(os.path.join(log, f"{job}-{os.getpid()}"), "w").close()
if together and int(job):
    time.sleep(1000)
while together and len(os.listdir(log)) < 1 + together:
    time.sleep(0.01)
print(1.0)
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "score.py").write_text(COMMAND)
    return f"{sys.executable} -I -S {tmp_path / 'score.py'} {{soup}} {tmp_path / 'log'}"


def pids(log):
    return [int(name.split("-")[1]) for name in os.listdir(log) if "-" in name]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_commands_that_are_not_needed_any_more_are_ended(tmp_path, command):
    runs, _ = make_pool(tmp_path / "runs", 5)
    (tmp_path / "log" / "together").write_text("3")
    seen = []

    def look(record):
        seen.append(pids(tmp_path / "log"))
        if len(seen) == 3:  # those that ran beside the first trial
            assert len(seen[1]) == 3
            deadline = time.monotonic() + PATIENCE_SECONDS
            while any(map(is_alive, seen[1])):
                assert time.monotonic() < deadline, "they hold their places"
                time.sleep(0.01)

    given = {"order": "given", "own_scores": {runs[0]: 0.0}, "max_ingredients": 3}
    result = run(runs, tmp_path / "here", command, 3, on_trial=look, **given)
    assert names(result.members) == ("run00", "run01", "run02")
    assert result.evaluations == 2, "the others never came to a score"
    assert 2 <= result.at_once.wasted <= 4  # behind the second one others may not have begun
    assert not any(map(is_alive, pids(tmp_path / "log")))
    assert equals_its_recipe(tmp_path / "here" / "soup", tmp_path)


def test_a_command_finds_its_number_also_where_it_runs_alone(tmp_path, command, monkeypatch):
    monkeypatch.setenv("STREAMSOUP_JOB", "7")
    runs, _ = make_pool(tmp_path / "runs", 3)
    run(runs, tmp_path / "here", command)
    assert {name.split("-")[0] for name in os.listdir(tmp_path / "log")} == {"0"}


def test_an_error_ends_all_commands(tmp_path, command):
    runs, _ = make_pool(tmp_path / "runs", 4)
    (tmp_path / "log" / "together").write_text("3")
    given = {"order": "given", "own_scores": {runs[0]: 0.0}, "accept": "gt"}

    def interrupt(record):
        if record.change:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(runs, tmp_path / "here", command, 3, on_trial=interrupt, **given)
    assert len(pids(tmp_path / "log")) == 3
    assert not any(map(is_alive, pids(tmp_path / "log")))


def test_what_is_run_before_scoring_runs_beside_others_too(tmp_path, command):
    runs, _ = make_pool(tmp_path / "runs", 4)
    script = tmp_path / "before.py"
    script.write_text(
        "import sys\npath = sys.argv[1] + '/model.safetensors'\nraw = bytearray(open(path, 'rb').read())\n"
        "raw[-2:] = b'\\x80\\x3f'\nopen(path, 'wb').write(raw)\n"
    )

    def score(soup):
        changed = (soup.path / "model.safetensors").read_bytes()[-2:] == b"\x80\x3f"
        assert changed is (len(soup.members) > 1)
        return float(len(soup.members))

    before = f"{sys.executable} -I -S {script} {{soup}}"
    result = run(runs, tmp_path / "here", AtOnce(score), 3, before_score=before)
    assert len(result.members) == 4
    assert (tmp_path / "here" / "soup" / "model.safetensors").read_bytes()[-2:] == b"\x80\x3f"


# -- folders -------------------------------------------------------------------------------------------------------


def test_candidates_in_another_place_leave_nothing_there(tmp_path):
    runs, target = small_pool(tmp_path / "runs", 5)
    (tmp_path / "ram").mkdir()
    score = Backwards(near(target), 3)
    run(runs, tmp_path / "here", score, 3, candidates=str(tmp_path / "ram"))
    assert len({name for _, name in score.places if name}) > 1
    assert list((tmp_path / "ram").iterdir()) == []


def test_the_candidate_that_was_kept_becomes_the_soup_wherever_it_lies(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 4)
    nodes = {}

    def score(soup):
        if len(soup.members) > 1:
            nodes[names(soup.members)] = (soup.path / "model.safetensors").stat().st_ino
        return -99.0 if len(soup.members) > 1 and names(soup.members)[-1] != "run03" else float(len(soup.members))

    given = {"order": "given", "own_scores": {runs[0]: 0.0}}
    result = run(runs, tmp_path / "here", Together(score, [3]), 3, **given)
    assert names(result.members) == ("run00", "run03")
    assert (tmp_path / "here" / "soup" / "model.safetensors").stat().st_ino == nodes["run00", "run03"]
    assert equals_its_recipe(tmp_path / "here" / "soup", tmp_path)


def test_going_on_with_fewer_at_once_removes_the_folders_of_the_others(tmp_path):
    runs, target = small_pool(tmp_path / "runs", 5)
    given = {"order": "given", "own_scores": {runs[0]: 0.0}}

    def stop(record):
        if record.change:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(runs, tmp_path / "here", Together(near(target), [3]), 3, on_trial=stop, **given)
    work = tmp_path / "here" / "work"
    (work / "candidate-9").mkdir()
    (work / "candidate-9" / "thesis.txt").write_text("years of work")
    assert {"candidate", "candidate-1", "candidate-2"} <= {p.name for p in work.iterdir()}
    one = run(runs, tmp_path / "one", FileScore(near(target)), **given)
    result = streamsoup.resume_greedy(work, score=FileScore(near(target)), jobs=1)
    assert told(result) == told(one)
    assert {p.name for p in work.glob("candidate*")} == {"candidate", "candidate-9"}
    assert (work / "candidate-9" / "thesis.txt").exists()


def test_every_candidate_must_have_room_before_anything_is_scored(tmp_path, monkeypatch):
    runs, target = small_pool(tmp_path / "runs", 4)
    forecast = Forecast.of(Pool(runs, PoolOptions(budget_bytes=200 << 20)), on_disk=False, jobs=3)
    assert forecast.disk_bytes == 3 * forecast.candidate_bytes + forecast.output_bytes
    full = SimpleNamespace(f_bavail=forecast.disk_bytes + 10, f_frsize=1)
    monkeypatch.setattr("streamsoup.files.os.statvfs", lambda _: full)
    never = AtOnce(lambda soup: pytest.fail("scored"))
    with pytest.raises(DiskSpaceError, match="free"):
        run(runs, tmp_path / "four", never, 4)
    one = run(runs, tmp_path / "three", AtOnce(near(target)), 3)
    assert len(one.trials) == 4
    with pytest.raises(DiskSpaceError, match="free"):
        streamsoup.resume_greedy(tmp_path / "three" / "work", score=never, jobs=99)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_callables_that_do_not_say_so_are_not_called_at_once(tmp_path):
    runs, _ = small_pool(tmp_path / "runs", 3)

    def never(soup):
        pytest.fail("was scored")

    for score in (never, FileScore(never)):
        with pytest.raises(RecipeError, match="at_once") as caught:
            run(runs, tmp_path / "here", score, 2)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="runs before"):
        run(runs, tmp_path / "here", AtOnce(never), 2, before_score=never)
    assert not (tmp_path / "here" / "work").exists()


@pytest.mark.parametrize("jobs", [0, -1, 1.5, "two", True])
def test_a_number_of_jobs_that_makes_no_sense_is_refused(tmp_path, jobs):
    runs, _ = small_pool(tmp_path / "runs", 3)
    with pytest.raises(RecipeError, match="jobs"):
        run(runs, tmp_path / "here", AtOnce(lambda soup: 1.0), jobs)


def test_a_job_of_an_earlier_version_is_taken_up(tmp_path):
    runs, target = small_pool(tmp_path / "runs", 3)
    one = run(runs, tmp_path / "here", FileScore(near(target)))
    job = tmp_path / "here" / "work" / "greedy.json"
    document = json.loads(job.read_text())
    del document["jobs"]
    job.write_text(json.dumps(document))
    try:
        assert told(streamsoup.resume_greedy(job.parent, score=FileScore(near(target)))) == told(one)
    except ResumeError:
        pytest.fail("is not readable")
