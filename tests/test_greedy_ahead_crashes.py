"""Several candidates at once, killed or interrupted anywhere: the same decisions and bits, and no process is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_greedy_crashes as crashes
from dying import serving
from factory import weights_bytes
from test_greedy_cli import make_runs

import streamsoup

PATIENCE_SECONDS = 100


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with serving(crashes.__file__) as ask:
        yield crashes.Bench(tmp_path_factory.mktemp("greedy"), ask)


def kill_and_resume(bench, folder, place, kind, *points, jobs=(2,)):
    """Die at each point in turn, with so many at once each time, then go on to the end. Returns the last answer.

    Judged by the run that scored one after the other and was not interrupted.
    """
    expected, weights, asked = bench.uninterrupted(kind)
    job, answer, known = bench.job(folder, place, kind), {}, []
    job["options"]["jobs"] = jobs[0]
    for turn, (point, number, before) in enumerate((*points, (None, 0, False))):
        more = {"point": point, "number": number, "before": before, "jobs": jobs[turn % len(jobs)]}
        answer = bench.server({**job, **more})
        assert answer["code"] in (0, -signal.SIGKILL), answer["errors"]
        if (folder / "soup").exists():
            assert weights_bytes(folder / "soup") == weights, "a soup that is in its place is whole"
        known.append((len(crashes.diary(folder)), crashes.book(folder)))
        if answer["code"] == 0:
            break  # the point was never passed
    diary = crashes.diary(folder)
    for count, written in known:
        assert not written & set(diary[count:]), "what was written down was asked for again"
    assert weights_bytes(folder / "soup") == weights
    assert answer["members"] == expected["members"]
    assert answer["trials"] == expected["trials"]
    assert crashes.digests(folder) == expected["digests"]
    assert set(asked) <= set(diary)
    assert len(diary) <= len(set(diary)) + max(jobs) * len(points), "more than those under way were asked for again"
    assert not (folder / "soup.partial").exists()
    folders = {path.name for path in (folder / "work").glob("candidate*")}
    assert folders <= {"candidate", *(f"candidate-{n}" for n in range(1, jobs[(len(known) - 1) % len(jobs)]))}
    return answer


@pytest.mark.parametrize(("point", "number", "before"), crashes.CHOSEN)
def test_killed_anywhere_with_two_at_once(bench, tmp_path, point, number, before):
    kill_and_resume(bench, tmp_path, "host", "greedy", (point, number, before))


@pytest.mark.parametrize(("point", "number", "before"), crashes.CHOSEN[::6] + crashes.ON_DISK[::2])
def test_killed_anywhere_with_two_at_once_and_the_sum_on_disk(bench, tmp_path, point, number, before):
    kill_and_resume(bench, tmp_path, "disk", "greedy", (point, number, before))


@pytest.mark.parametrize("point", [("rename", 1), ("rename", 2), ("move", 1), ("decisions", 1)])
def test_killed_while_a_candidate_becomes_the_soup(bench, tmp_path, point):
    kill_and_resume(bench, tmp_path, "host", "given", (*point, False))


@pytest.mark.parametrize("kind", sorted(crashes.OPTIONS))
def test_going_on_with_another_number_at_once(bench, tmp_path, kind):
    points = [("enter", 3, False), ("enter", 2, True), ("evaluation", 3, False)]
    kill_and_resume(bench, tmp_path, "host", kind, *points, jobs=(3, 1, 2))


@pytest.mark.parametrize("seed", range(10))
def test_killed_several_times_at_random(bench, tmp_path, seed):
    chance = random.Random(seed)
    place, kind = chance.choice(["host", "disk"]), chance.choice(sorted(crashes.OPTIONS))
    points = [
        (chance.choice(sorted(crashes.POINTS)), int(chance.paretovariate(0.6)), chance.random() < 0.5)
        for _ in range(chance.randrange(1, 5))
    ]
    kill_and_resume(bench, tmp_path, place, kind, *points, jobs=[chance.randrange(1, 5) for _ in range(3)])


# -- commands, at the command line ---------------------------------------------------------------------------------

# Sleeps over each candidate while there is a file `sleep`; names its process first.
COMMAND = """
import os, struct, sys, time
folder, log = sys.argv[1:3]
raw = open(os.path.join(folder, "model.safetensors"), "rb").read()
open(os.path.join(log, f"pid-{os.getpid()}"), "w").close()
if "candidate" in os.path.basename(folder) and os.path.exists(os.path.join(log, "sleep")):
    open(os.path.join(log, f"sleeps-{os.getpid()}"), "w").close()
    time.sleep(1000)
print(-sum(raw[-400:]))
"""


def running(log):
    """Processes of evaluations that have not ended."""
    found = []
    for path in log.glob("pid-*"):
        try:
            state = Path("/proc", path.name.split("-")[1], "stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            continue
        if state != "Z":
            found.append(int(path.name.split("-")[1]))
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_a_run_it_goes_on_and_interrupts_end_all_commands(tmp_path, number):
    runs, log = make_runs(tmp_path / "runs"), tmp_path / "log"
    log.mkdir()
    (tmp_path / "score.py").write_text(COMMAND)
    score = f"{sys.executable} -I -S {tmp_path / 'score.py'} {{soup}} {log}"
    one = streamsoup.greedy(runs, tmp_path / "one", score=score, workdir=tmp_path / "one.work", budget_bytes="200MiB")
    (log / "sleep").touch()
    arguments = [*runs, "--score", score, "-o", str(tmp_path / "soup"), "--jobs", "2", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "streamsoup", "greedy", *arguments], stderr=subprocess.PIPE, text=True
    )
    with process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(list(log.glob("sleeps-*"))) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    if number == signal.SIGKILL:  # nobody was left to end them, and they do no harm
        assert len(running(log)) == 2
    else:
        assert running(log) == []
        assert f"--resume {tmp_path / 'soup.work'}" in errors
        assert "Traceback" not in errors
    (log / "sleep").unlink()
    again = streamsoup.resume_greedy(tmp_path / "soup.work")
    for pid in running(log):
        os.kill(pid, signal.SIGKILL)
    assert [(t.path, t.score, t.accepted) for t in again.trials] == [(t.path, t.score, t.accepted) for t in one.trials]
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "one")


def test_the_command_line_says_what_it_came_to(tmp_path, cli):
    runs, log = make_runs(tmp_path / "runs"), tmp_path / "log"
    log.mkdir()
    (tmp_path / "score.py").write_text(COMMAND)
    score = f"{sys.executable} -I -S {tmp_path / 'score.py'} {{soup}} {log}"
    done = cli("greedy", *runs, "--score", score, "-o", "soup", "--jobs", "3")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "beside others" in line]
    assert "wasted" in line
    assert "waiting" in line
    assert not (tmp_path / "soup.work").exists(), "with all its folders"
    document = json.loads((tmp_path / "soup" / "decisions.json").read_text())
    assert document["at_once"]["jobs"] == 3
    done = cli("greedy", *runs, "-o", "other", "--jobs", "3", "--dry-run")
    assert "3 candidates" in done.stdout
    plan = json.loads(cli("greedy", *runs, "-o", "other", "--jobs", "3", "--dry-run", "--json").stdout)
    assert plan["disk_bytes"] == 3 * plan["candidate_bytes"] + plan["output_bytes"] + plan["sums_bytes"]
    done = cli("greedy", *runs, "--score", score, "-o", "other", "--jobs", "0")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "jobs" in done.stderr
