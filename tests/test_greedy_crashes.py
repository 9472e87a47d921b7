"""A greedy soup killed with -9 anywhere goes on to the same decisions and bits, and asks for no score twice.

This file is two things. As a script it runs jobs, a JSON line each from standard input, each in a fork of its own that
may kill itself at the n-th call of a point (so that torch and numba are imported once); as a test it judges them.
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from dying import die_at, serve, serving
from factory import read_checkpoint, weights_bytes, write_checkpoint

import streamsoup
from streamsoup import (
    candidate,
    greedy_cook,
    greedy_loop,
    greedy_output,
    scorebook,
    side_files,
    workspace,
    write,
)
from streamsoup.errors import ChangedIngredientError, ResumeError
from streamsoup.sums import generations, store

ELEMENTS = 6000  # three tiles of one block; more than one chunk is the business of test_sums
NAMES = ("w", "head")
OPTIONS = {
    "greedy": {},
    "given": {"order": "given"},  # the last candidate is kept: its files become the soup
    "prune": {"prune": True},
    "rounds": {"rounds": 2},
    "restarts": {"restarts": 1, "order": "given"},
}


def distance(folder, target):
    """The score: minus the squared distance to a target, of integers, so that no order of summing matters."""
    found = read_checkpoint(folder)
    whole = [np.rint(found[name].astype(np.float64).reshape(-1) * 256) for name in NAMES]
    return -float(sum(np.abs(a - b).sum() for a, b in zip(whole, target, strict=True)))


class FileScore:
    """An evaluator that reads files, as a command does, but in this process; it keeps a diary."""

    needs_files = at_once = True

    def __init__(self, diary, target):
        self.diary, self.target = Path(diary), target

    def __call__(self, soup):
        self.write("asked", soup)
        names = {p.name for p in soup.path.iterdir()}
        missing = {"config.json", "model.safetensors.index.json"} - names
        files = sorted(name for name in names if name.endswith(".safetensors"))
        if missing or files != [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]:
            raise RuntimeError(f"not a complete checkpoint: {sorted(names)}")
        value = distance(soup.path, self.target)
        self.write("answered", soup)
        return value

    def write(self, word, soup):
        with self.diary.open("a", encoding="utf-8") as file:
            file.write(json.dumps([word, [[m.path, m.weight] for m in soup.members]]) + "\n")


POINTS = {
    "job": (greedy_cook, "write_job"),
    "folder": (Path, "mkdir"),
    "reserve": (write.FileSink, "__init__"),
    "head": (write, "pwrite_all"),
    "tile": (write.FileSink, "write"),
    "companions": (candidate, "copy_companions"),
    "index": (candidate, "write_durably"),
    "evaluation": (FileScore, "__call__"),
    "enter": (scorebook.ScoreBook, "enter"),
    "sum in memory": (store.MemoryStore, "write"),
    "generation begins": (generations.GenerationStore, "begin"),
    "generation": (generations.GenerationStore, "write"),
    "generation commits": (generations.GenerationStore, "commit"),
    "manifest of a sum": (generations, "write_durably"),
    "old sums go": (generations.shutil, "rmtree"),
    "publish begins": (greedy_loop, "publish_soup"),
    "workspace": (workspace.Workspace, "create"),
    "move": (greedy_output, "_move"),
    "side files": (greedy_output, "write_side_files"),
    "side file": (side_files, "write_durably"),
    "decisions": (greedy_output, "write_durably"),
    "publish": (workspace.Workspace, "publish"),
    "workspace goes": (workspace.Workspace, "remove"),
    "folder moves": (workspace, "move_folder"),
    "durable": (workspace, "sync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "fsync": (os, "fsync"),
    "pwrite": (os, "pwrite"),
    "append": (scorebook, "append_whole"),
    "sum in place": (store.MemoryStore, "room"),
}


# -- the script ----------------------------------------------------------------------------------------------------


def run(job):
    """Start or resume; returns what the test wants to know."""
    target = [np.array(part) for part in np.load(job["target"])]
    target = [target[0], target[1][: len(target[1])]]
    score = FileScore(job["diary"], target)
    if job.get("point"):
        die_at(*POINTS[job["point"]], job["number"], job["before"])
    if (Path(job["workdir"]) / "greedy.json").exists():
        result = streamsoup.resume_greedy(job["workdir"], score=score, jobs=job.get("jobs"))
    else:
        result = streamsoup.greedy(
            job["runs"], job["out"], score=score, workdir=job["workdir"], budget_bytes=1 << 28, **job["options"]
        )
    return {
        "evaluations": result.evaluations,
        "reads": result.reads,
        "rebuilt": result.rebuilt,
        "members": [[m.path, m.weight] for m in result.members],
        "trials": [[t.path, t.change, t.score, t.accepted, t.size] for t in result.trials],
    }


def main():
    from streamsoup.backends import open_backend

    open_backend("cpu").prepare(wide=False, fp8=False)
    serve(run)


# -- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with serving(__file__) as ask:
        yield ask


def make_runs(folder, count=5, bad=(2,)):
    """Fine-tunes around one target, in two shards; `bad` ones lie far off."""
    rng = np.random.default_rng(4)
    target = rng.integers(-512, 512, (2, ELEMENTS))
    runs = []
    for i in range(count):
        noise = rng.integers(-300, 300, (2, ELEMENTS)) * (8 if i in bad else 1) + i
        w, head = ((target + noise) / 256).astype(np.float32)
        tensors = {"w": w, "head": head.reshape(2, -1), "ids": np.arange(7)}
        where = write_checkpoint(folder / f"run{i}", tensors, shards=2, companions={"config.json": "{}"})
        runs.append(str(where))
    np.save(folder / "target.npy", target)
    return runs


class Bench:
    """A pool, and one uninterrupted soup for each kind of job."""

    def __init__(self, folder, server):
        self.runs, self.folder, self.server, self.done = make_runs(folder / "runs"), folder, server, {}

    def job(self, folder, place, kind="greedy"):
        options = {"sums": place, "shard_bytes": ELEMENTS * 4 + 100, **OPTIONS[kind]}
        return {
            "runs": self.runs,
            "target": str(self.folder / "runs" / "target.npy"),
            "out": str(folder / "soup"),
            "workdir": str(folder / "work"),
            "diary": str(folder / "diary"),
            "options": options,
        }

    def uninterrupted(self, kind):
        if kind not in self.done:
            folder = self.folder / kind
            folder.mkdir()
            answer = self.server(self.job(folder, "host", kind))
            assert answer["code"] == 0, answer["errors"]
            answer["digests"] = digests(folder)
            self.done[kind] = (answer, weights_bytes(folder / "soup"), diary(folder))
        return self.done[kind]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    return Bench(tmp_path_factory.mktemp("greedy"), server)


def digests(folder):
    """Who the ingredients were, by the manifest of the soup."""
    manifest = json.loads((folder / "soup" / "streamsoup.json").read_text())
    return [entry["content_digest"] for entry in manifest["ingredients"]]


def diary(folder, word="asked"):
    path = folder / "diary"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [json.dumps(members) for said, members in rows if said == word]


def book(folder):
    """What was scored and written down, whole lines only."""
    path = folder / "work" / "scores.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {json.dumps(json.loads(line)["members"]) for line in lines}


def kill_and_resume(bench, folder, place, kind, *points):
    """Die at each point in turn, then go on to the end; checks all that was promised. Returns the last answer."""
    expected, weights, asked = bench.uninterrupted(kind)
    job, answer, known = bench.job(folder, place, kind), None, []
    for point, number, before in (*points, (None, 0, False)):
        answer = bench.server({**job, "point": point, "number": number, "before": before})
        assert answer["code"] in (0, -signal.SIGKILL), answer["errors"]
        assert answer["code"] == 0 or point is not None
        if (folder / "soup").exists():
            assert weights_bytes(folder / "soup") == weights, "a soup that is in its place is whole"
            assert {"streamsoup.json", "recipe.yaml", "README.md", "decisions.json", "config.json"} <= {
                p.name for p in (folder / "soup").iterdir()
            }
        known.append((len(diary(folder)), book(folder)))
        if answer["code"] == 0:
            break  # the point was never passed
    for count, written in known:
        assert not written & set(diary(folder)[count:]), "what was written down was asked for again"
    assert weights_bytes(folder / "soup") == weights
    assert answer["members"] == expected["members"]
    assert answer["trials"] == expected["trials"]
    assert digests(folder) == expected["digests"]
    assert set(diary(folder)) == set(asked)
    assert len(diary(folder)) <= len(asked) + len(points), "more than the one under way was asked for again"
    assert not (folder / "soup.partial").exists()
    return answer


CHOSEN = [
    *(("evaluation", n, before) for n in (1, 6, 7, 9) for before in (True, False)),
    *(("enter", n, before) for n in (1, 5, 6, 8) for before in (True, False)),
    *(("append", n, False) for n in (1, 7)),
    ("job", 1, True), ("job", 1, False),
    ("reserve", 1, True), ("reserve", 1, False), ("reserve", 2, False),
    *(("head", n, before) for n in (2, 3, 4, 8, 15) for before in (True, False)),
    *(("tile", n, before) for n in (1, 2, 5, 9, 14) for before in (True, False)),
    ("index", 1, True), ("index", 1, False), ("companions", 1, True), ("companions", 1, False),
    ("publish begins", 1, True), ("workspace", 1, True), ("workspace", 1, False),
    ("side files", 1, True), ("side files", 1, False), ("side file", 2, True), ("decisions", 1, True),
    ("decisions", 1, False), ("publish", 1, True), ("publish", 1, False), ("folder moves", 1, True),
    ("folder moves", 1, False), ("workspace goes", 2, True), ("workspace goes", 2, False),
]  # fmt: skip
IN_MEMORY = [("sum in memory", n, before) for n in (1, 4, 9) for before in (True, False)]
ON_DISK = [
    *(("generation begins", n, before) for n in (1, 2, 3) for before in (True, False)),
    *(("generation", n, before) for n in (1, 3, 6) for before in (True, False)),
    *(("generation commits", n, before) for n in (1, 2, 3) for before in (True, False)),
    *(("manifest of a sum", n, False) for n in (1, 2)),
    ("old sums go", 1, True), ("old sums go", 1, False),
]  # fmt: skip


@pytest.mark.parametrize(("point", "number", "before"), CHOSEN + IN_MEMORY)
def test_killed_anywhere_with_the_sum_in_memory(bench, tmp_path, point, number, before):
    kill_and_resume(bench, tmp_path, "host", "greedy", (point, number, before))


@pytest.mark.parametrize(("point", "number", "before"), CHOSEN[::3] + ON_DISK)
def test_killed_anywhere_with_the_sum_on_disk(bench, tmp_path, point, number, before):
    kill_and_resume(bench, tmp_path, "disk", "greedy", (point, number, before))
    assert len(list((tmp_path / "work" / "sums").glob("gen-*"))) <= 2


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize(
    "point", [*(("rename", n) for n in (1, 2)), ("move", 1), ("publish begins", 1), ("decisions", 1)]
)
@pytest.mark.parametrize("before", [True, False])
def test_killed_while_the_last_candidate_becomes_the_soup(bench, tmp_path, point, before, place):
    if point[0] == "rename" and before:
        pytest.skip("that is before the first, or after the last")
    kill_and_resume(bench, tmp_path, place, "given", (*point, before))


@pytest.mark.parametrize("seed", range(14))
def test_killed_several_times_at_random(bench, tmp_path, seed):
    chance = random.Random(seed)
    place, kind = chance.choice(["host", "disk"]), chance.choice(sorted(OPTIONS))
    points = [
        (chance.choice(sorted(POINTS)), int(chance.paretovariate(0.6)), chance.random() < 0.5)
        for _ in range(chance.randrange(1, 5))
    ]
    kill_and_resume(bench, tmp_path, place, kind, *points)


def test_the_points_are_where_the_work_is(bench, server, tmp_path):
    """A point that is never passed tests nothing."""
    never = []
    for point in sorted(POINTS):
        folder = tmp_path / point
        folder.mkdir()
        place = "disk" if point in {row[0] for row in ON_DISK} else "host"
        answer = server({**bench.job(folder, place, "given"), "point": point, "number": 1, "before": True})
        if answer["code"] != -signal.SIGKILL:
            never.append(point)
    assert never == []


@pytest.mark.parametrize("kind", sorted(OPTIONS))
@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_run_that_ended_may_be_resumed_and_changes_nothing(bench, tmp_path, kind, place):
    kill_and_resume(bench, tmp_path, place, kind)
    before = diary(tmp_path)
    answer = kill_and_resume(bench, tmp_path, place, kind)
    assert answer["evaluations"] == 0
    assert diary(tmp_path) == before


def test_a_whole_sum_on_disk_is_used_again_and_its_members_are_not_read(bench, tmp_path):
    expected, _, asked = bench.uninterrupted("greedy")
    last = len(asked)
    answer = kill_and_resume(bench, tmp_path, "disk", "greedy", ("evaluation", last, True))
    assert answer["evaluations"] == 1
    tried = expected["trials"][-1][0]
    assert {path for path, times in answer["reads"].items() if times} == {tried}
    assert answer["rebuilt"] == 0


def test_resuming_does_not_go_through_the_decisions_by_reading_again(bench, tmp_path):
    """A sum in memory is lost; its members are read for the trial that was under way, and once for the soup."""
    _, _, asked = bench.uninterrupted("greedy")
    answer = kill_and_resume(bench, tmp_path, "host", "greedy", ("evaluation", len(asked), True))
    assert answer["evaluations"] == 1
    assert max(answer["reads"].values()) <= 2


@pytest.mark.parametrize("damage", ["bit", "gone", "manifest"])
def test_a_sum_that_was_damaged_meanwhile_is_made_anew(bench, server, tmp_path, damage):
    _, weights, asked = bench.uninterrupted("greedy")
    job = bench.job(tmp_path, "disk")
    server({**job, "point": "evaluation", "number": len(asked), "before": True})
    newest = sorted((tmp_path / "work" / "sums").glob("gen-*"))[-1]
    chunk = next(path for path in sorted(newest.rglob("c/0")) if path.stat().st_size > 100)
    if damage == "bit":
        raw = bytearray(chunk.read_bytes())
        raw[99] ^= 64
        chunk.write_bytes(raw)
    elif damage == "gone":
        chunk.unlink()
    else:
        (newest / "zarr.json").write_text("{")
    answer = server(job)
    assert answer["code"] == 0, answer["errors"]
    assert weights_bytes(tmp_path / "soup") == weights


def test_a_torn_line_in_the_book_is_asked_for_again(bench, server, tmp_path):
    _, weights, asked = bench.uninterrupted("greedy")
    job = bench.job(tmp_path, "host")
    server({**job, "point": "enter", "number": 7, "before": False})
    path = tmp_path / "work" / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    answer = server(job)
    assert answer["code"] == 0, answer["errors"]
    assert answer["evaluations"] == len(asked) - 6
    assert weights_bytes(tmp_path / "soup") == weights


def test_a_destination_that_appeared_meanwhile_is_never_replaced(bench, server, tmp_path):
    job = bench.job(tmp_path, "host")
    server({**job, "point": "enter", "number": 6, "before": False})
    (tmp_path / "soup").mkdir()
    (tmp_path / "soup" / "thesis.txt").write_text("years of work")
    answer = server(job)
    assert answer["code"] == 1
    assert "soup" in answer["errors"]
    assert (tmp_path / "soup" / "thesis.txt").read_text() == "years of work"


def test_unfinished_work_of_a_plain_soup_is_not_deleted_in_silence(tmp_path):
    runs = make_runs(tmp_path / "runs", 3, bad=())
    partial = tmp_path / "soup.partial"
    partial.mkdir()
    (partial / "job.json").write_text("{}")
    with pytest.raises(streamsoup.StreamsoupError, match=r"soup\.partial"):
        streamsoup.greedy(runs, tmp_path / "soup", score=lambda c: pytest.fail("scored"), budget_bytes=1 << 28)
    assert (partial / "job.json").exists()


def killed_in_the_middle(bench, server, tmp_path):
    """A work folder of its own, with ingredients of its own that a test may change."""
    runs = make_runs(tmp_path / "runs")
    job = {**bench.job(tmp_path, "host"), "runs": runs}
    assert server({**job, "point": "enter", "number": 6, "before": False})["code"] == -signal.SIGKILL
    return runs, job


def test_an_ingredient_whose_data_alone_changed_is_refused_by_name(bench, server, tmp_path):
    runs, job = killed_in_the_middle(bench, server, tmp_path)
    file = sorted(Path(runs[3]).glob("*.safetensors"))[1]
    stat, raw = file.stat(), bytearray(file.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header + (len(raw) - header) // 2] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = diary(tmp_path)
    answer = server(job)
    assert answer["code"] == 1
    assert ChangedIngredientError.__name__ in answer["errors"]
    assert "run3" in answer["errors"]
    assert diary(tmp_path) == before, "nothing was scored"
    raw[header + (len(raw) - header) // 2] ^= 1
    file.write_bytes(raw)  # put back, it goes on
    assert server(job)["code"] == 0


@pytest.mark.parametrize("change", ["header", "gone", "shards"])
def test_an_ingredient_that_is_another_now_is_refused_by_name(bench, server, tmp_path, change):
    runs, job = killed_in_the_middle(bench, server, tmp_path)
    tensors = read_checkpoint(Path(runs[1]))
    for path in Path(runs[1]).glob("*.safetensors*"):
        path.unlink()
    if change == "header":
        write_checkpoint(Path(runs[1]), tensors, shards=2, metadata={"epoch": "2"})
    elif change == "shards":
        write_checkpoint(Path(runs[1]), tensors, shards=3)
    answer = server(job)
    assert answer["code"] == 1
    assert "run1" in answer["errors"]
    assert "Error" in answer["errors"].splitlines()[-1] or "note" in answer["errors"]


def test_a_change_outside_the_samples_is_noticed_when_a_run_goes_on(bench, server, tmp_path):
    runs, job = killed_in_the_middle(bench, server, tmp_path)
    scored = [json.loads(line) for line in (tmp_path / "work" / "scores.jsonl").read_text().splitlines()]
    used = next(path for row in reversed(scored) if len(row["members"]) > 1 for path, _ in row["members"])
    file = sorted(Path(used).glob("*.safetensors"))[0]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # the last byte of a tensor: samples are taken from the middle
    file.write_bytes(raw)
    answer = server(job)
    assert answer["code"] != 0
    assert used in answer["errors"]
    assert "changed" in answer["errors"]
    assert runs


def test_ingredients_that_were_only_copied_or_touched_are_the_same(bench, server, tmp_path):
    runs, job = killed_in_the_middle(bench, server, tmp_path)
    for file in Path(runs[0]).glob("*.safetensors"):
        raw = file.read_bytes()
        file.unlink()
        file.write_bytes(raw)
    answer = server(job)
    assert answer["code"] == 0, answer["errors"]
    assert weights_bytes(tmp_path / "soup") == bench.uninterrupted("greedy")[1]


def test_a_work_folder_of_another_soup_is_not_taken(bench, server, tmp_path):
    runs, _ = killed_in_the_middle(bench, server, tmp_path)
    with pytest.raises(ResumeError, match="--resume"):
        streamsoup.greedy(
            runs, tmp_path / "other", score=lambda c: 1.0, workdir=tmp_path / "work", budget_bytes=1 << 28
        )


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"greedy": 99}', '{"greedy": 1}', '{"greedy": 1, "rule": 3}']
)
def test_a_job_that_cannot_be_read_is_a_sentence(tmp_path, text):
    (tmp_path / "greedy.json").write_text(text)
    with pytest.raises(ResumeError, match=str(tmp_path)):
        streamsoup.resume_greedy(tmp_path, score=lambda c: 1.0)


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    runs = make_runs(tmp_path / "runs", 3, bad=())

    def score(soup):
        with pytest.raises(ResumeError, match="another process"):
            streamsoup.resume_greedy(tmp_path / "work", score=lambda c: 1.0)
        return 1.0

    streamsoup.greedy(runs, score=score, workdir=tmp_path / "work", budget_bytes=1 << 28)


if __name__ == "__main__":
    main()
