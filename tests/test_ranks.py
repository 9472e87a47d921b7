"""Soups made by several processes: the same bits as by one, whatever dies."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factory import realistic, weights_bytes, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from ranks_driver import small_tiles

import streamsoup
from streamsoup import cli, cook, merging
from streamsoup.cli import guard
from streamsoup.engine import _take
from streamsoup.errors import RankError, RecipeError, ResumeError
from streamsoup.execution import Execution
from streamsoup.journal import Journal
from streamsoup.ranks import ALONE, Ranks, join_ranks
from streamsoup.recipe import make_recipe
from streamsoup.soup_plan import plan_soup
from streamsoup.write import FileSink

DRIVER = Path(__file__).resolve().parent / "ranks_driver.py"
SHAPES = {"layers.0.w": (70, 1300), "layers.1.w": (40, 3, 5, 7), "layers.2.w": (90_000,), "head.w": (33, 1001)}
METHODS = {
    "weighted": {"weights": [1.0, 2.0, 3.0]},
    "shards": {"shard_size": "100kB", "dtype": "float16"},
    "wide": {"dtype": "float64"},
    "karcher": {"method": "karcher"},
    "geometric_median": {"method": "geometric_median"},
    "nuslerp of rows": {"method": "nuslerp", "parameters": {"row_wise": True}, "count": 2},
    "model_stock": {"method": "model_stock", "based": True},
    "ties": {"method": "ties", "based": True, "parameters": {"density": 0.3}},
    "ties of the model": {"method": "ties", "based": True, "parameters": {"density": 0.3, "scope": "model"}},
    "dare_ties": {"method": "dare_ties", "based": True, "parameters": {"density": 0.4, "rescale": "l1", "seed": 7}},
    "sce": {"method": "sce", "based": True, "parameters": {"select_topk": 0.4}},
}


def run_ranks(folder, jobs, count):
    """Have some processes do jobs; returns the answers of each rank, and exit codes."""
    answers = folder / f"answers{len(list(folder.glob('answers*')))}"
    answers.mkdir()
    file = answers / "jobs.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(DRIVER), str(file), str(answers)],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    lines = [(answers / str(n)).read_text().splitlines() if (answers / str(n)).exists() else [] for n in range(count)]
    for number, rank in enumerate(ranks):
        assert rank.returncode in (0, -signal.SIGKILL), said[number]
    return [[json.loads(line) for line in of_rank] for of_rank in lines], [rank.returncode for rank in ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and three fine-tunes, with a buffer."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for number in range(4):
        tensors = {**realistic(number, SHAPES, "F32"), "ids": np.arange(5), "empty": np.zeros((0, 3), np.float32)}
        found.append(str(write_checkpoint(folder / f"run{number}", tensors, shards=2)))
    return found


def job_of(runs, options, out):
    options = dict(options)
    count = options.pop("count", 3)
    if options.pop("based", False):
        options["base"] = runs[0]
    return {"ingredients": runs[1 : 1 + count], "out": str(out), "options": {"workers": 1, **options}}


@pytest.fixture(scope="module", params=[2, 4])
def made(request, tmp_path_factory, runs):
    """Soups by every method, of one process and of several; those of several in one launch."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    (folder / "alone").mkdir()
    alone = {}
    with small_tiles(8):
        for name, options in METHODS.items():
            job = job_of(runs, options, folder / "alone" / name)
            alone[name] = streamsoup.soup(job["ingredients"], job["out"], **job["options"])
    jobs = [job_of(runs, options, folder / name) for name, options in METHODS.items()]
    answers, _ = run_ranks(folder, jobs, request.param)
    return folder, alone, {name: [a[i] for a in answers] for i, name in enumerate(METHODS)}


@pytest.mark.parametrize("method", METHODS)
def test_several_processes_give_the_bits_of_one(made, method):
    folder, alone, answers = made
    assert not any("error" in answer for answer in answers[method]), answers[method]
    assert weights_bytes(folder / method) == weights_bytes(folder / "alone" / method)
    assert not Path(f"{folder / method}.partial").exists()
    for answer in answers[method]:
        assert answer["ranks"] == len(answers[method])
        assert answer["path"] == str(folder / method)
        assert tuple(answer["digests"]) == alone[method].content_digests
    manifest = [json.loads((p / "streamsoup.json").read_text()) for p in (folder / method, folder / "alone" / method)]
    assert manifest[0]["ingredients"] == manifest[1]["ingredients"]


@pytest.mark.parametrize("method", ["weighted", "shards", "wide"])
def test_each_byte_is_read_by_one_rank_and_each_has_about_as_many(made, method):
    _, alone, answers = made
    count = len(answers[method])
    assert {answer["bytes_read"] for answer in answers[method]} == {alone[method].bytes_read}
    shares = [answer["share"] for answer in answers[method]]
    assert sum(shares) == alone[method].bytes_read
    assert max(shares) - min(shares) <= 4 * 8 * 2048 * 4 * 3, shares  # some tiles
    assert all(abs(answer["share_of"] - alone[method].bytes_read // count) <= 1 for answer in answers[method])


class Pretended(Ranks):
    def __init__(self, number, count):
        self.number, self.count = number, count


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64])
def test_shares_are_disjoint_whole_and_even(runs, count):
    with small_tiles(1):
        plan, _ = plan_soup(make_recipe(runs), None, Execution(budget_bytes=1 << 28))
    tiles = [t for averaged in (False, True) for t in plan.tiles(averaged=averaged)]
    shares = [list(merging.share(Pretended(n, count), plan, lambda: iter(tiles))) for n in range(count)]
    assert [t for share in shares for t in share] == tiles, "one after the other, so that each reads in order"
    largest = max(t.elements for t in tiles)
    sizes = [sum(t.elements for t in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2 * largest


# -- what goes wrong -----------------------------------------------------------------------------------------------


def test_what_goes_wrong_is_said_by_all_ranks(tmp_path, runs):
    """In one launch: NaN, buffers that differ, a file that only rank 1 lacks, other bytes there, an option of one."""
    bad = realistic(9, SHAPES, "F32")
    bad["head.w"][3, 5] = np.nan
    nan = str(write_checkpoint(tmp_path / "nan", {**bad, "ids": np.arange(5), "empty": np.zeros((0, 3), np.float32)}))
    good = {**realistic(8, SHAPES, "F32"), "ids": np.arange(5) + 1, "empty": np.zeros((0, 3), np.float32)}
    other = str(write_checkpoint(tmp_path / "other", good))
    for number in range(3):
        tensors = realistic(10 + (number == 1), SHAPES, "F32")
        write_checkpoint(tmp_path / f"node{number}" / "run", tensors)
        write_checkpoint(tmp_path / f"whole{number}" / "run", realistic(10, SHAPES, "F32"))
    (tmp_path / "whole1" / "run" / "model.safetensors").unlink()
    plain = [str(write_checkpoint(tmp_path / f"plain{i}", realistic(i, SHAPES, "F32"))) for i in range(2)]
    local = ["/proc/self/cwd/run", plain[0]]
    jobs = [
        {"ingredients": [*runs, nan], "out": str(tmp_path / "a"), "options": {"keep": False}},
        {"ingredients": [*runs, other], "out": str(tmp_path / "b")},
        {"ingredients": local, "out": str(tmp_path / "c"), "here": [str(tmp_path / f"whole{n}") for n in range(3)]},
        {"ingredients": local, "out": str(tmp_path / "d"), "here": [str(tmp_path / f"node{n}") for n in range(3)]},
        {"ingredients": plain, "out": str(tmp_path / "e"), "of_rank": {"1": {"device": "nonsense"}}},
        {"ingredients": [*runs, other], "out": str(tmp_path / "f"), "options": {"buffers": "first"}},
        {"ingredients": plain, "out": str(tmp_path / "f")},
    ]
    answers, _ = run_ranks(tmp_path, jobs, 3)
    kinds = [[answers[rank][i].get("error") for rank in range(3)] for i in range(len(jobs))]
    said = [[answers[rank][i].get("said", "") for rank in range(3)] for i in range(len(jobs))]
    assert kinds[0] == ["NonFiniteError", "RankError", "RankError"], said[0]
    assert kinds[1] == ["MismatchError", "RankError", "RankError"], said[1]
    assert all("ids" in text for text in said[1])
    assert kinds[2][0] == kinds[2][2] == "RankError", said[2]
    assert kinds[2][1] == "CheckpointNotFoundError", said[2]
    assert all("rank 1 (" in text and "failed" in text for text in (said[2][0], said[2][2]))
    assert kinds[3] == ["RankError", "ChangedIngredientError", "RankError"], said[3]
    assert kinds[4] == ["RankError", "RecipeError", "RankError"], said[4]
    assert kinds[5] == [None] * 3, said[5]
    assert kinds[6] == ["DestinationError", "RankError", "RankError"], said[6]
    left = {path.name for path in tmp_path.iterdir() if path.name[0] in "abcdef" and len(path.name.split(".")[0]) == 1}
    assert left == {"f"}, "nothing but the one that was made"


DEATHS = [
    (1, "tile", 1, True), (1, "tile", 3, False), (0, "tile", 4, False), (2, "journal", 1, True),
    (2, "journal", 1, False), (1, "sync", 1, False), (0, "journal", 1, False), (1, "copies", 1, False),
    (1, "sums", 1, False), (0, "sums", 1, False), (0, "side files", 2, True), (0, "publish", 1, True),
    (1, "plan", 1, True), (0, "workspace", 1, False), (0, "job", 1, False), (0, "publish", 1, False),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DEATHS)))
def test_killed_anywhere_any_number_of_ranks_goes_on_to_the_same_bits(tmp_path, runs, number):
    rank, point, call, before = DEATHS[number]
    options = METHODS["ties" if number % 2 else "weighted"]
    with small_tiles(8):
        alone = job_of(runs, options, tmp_path / "alone")
        streamsoup.soup(alone["ingredients"], alone["out"], **alone["options"])
    job = job_of(runs, options, tmp_path / "soup")
    job["die"] = {"rank": rank, "point": point, "number": call, "before": before}
    answers, codes = run_ranks(tmp_path, [job], 3)
    assert codes[rank] == -signal.SIGKILL, "the point was passed"
    for other in {0, 1, 2} - {rank}:
        assert answers[other][0]["error"] == "RankError", answers[other]
        assert f"rank {rank}" in answers[other][0]["said"]
        assert "has died" in answers[other][0]["said"]
    partial = tmp_path / "soup.partial"
    begun = partial.exists() and (partial / "job.json").exists()
    if (tmp_path / "soup").exists():
        assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "alone")
    with small_tiles(4):
        if not begun and not (tmp_path / "soup").exists():
            streamsoup.soup(job["ingredients"], job["out"], **job["options"])
        elif begun and number % 3 == 0:
            streamsoup.resume(tmp_path / "soup")
        elif begun:
            answers, _ = run_ranks(tmp_path, [{"out": str(tmp_path / "soup"), "resume": True}], number % 3 + 1)
            assert "error" not in answers[0][0], answers
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "alone")
    manifests = [json.loads((tmp_path / name / "streamsoup.json").read_text()) for name in ("soup", "alone")]
    assert manifests[0]["ingredients"] == manifests[1]["ingredients"], "digests of all tiles, each once"
    assert not partial.exists()


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_between_two_messages_ends_all(tmp_path, runs, rank, number):
    """Whoever was interrupted in an exchange says nothing more: it once spoke out of turn, and all waited for ever."""
    job = job_of(runs, METHODS["weighted"], tmp_path / "soup")
    job["interrupt"] = {"rank": rank, "number": number}
    answers, _ = run_ranks(tmp_path, [job], 2)
    assert answers[rank][0]["error"] == "KeyboardInterrupt", answers
    assert answers[1 - rank][0]["error"] == "RankError", answers
    assert f"rank {rank}" in answers[1 - rank][0]["said"]


def test_a_soup_that_is_in_its_place_is_a_success_whoever_dies_then(tmp_path, runs):
    job = job_of(runs, METHODS["weighted"], tmp_path / "soup")
    job["die"] = {"rank": 1, "point": "finish", "number": 1, "before": True}
    answers, codes = run_ranks(tmp_path, [job], 2)
    assert codes == [0, -signal.SIGKILL]
    assert answers[0][0]["path"] == str(tmp_path / "soup")
    assert not (tmp_path / "soup.partial").exists()


class Failing(Ranks):
    """Ranks of which another fails while this one begins."""

    def __init__(self):
        self.calls = 0

    def first(self, function):
        self.calls += 1
        value = function()
        if self.calls == 2:
            raise RankError("rank 1 has died")
        return value


def test_a_failure_of_another_while_the_work_begins_leaves_nothing(tmp_path, runs, monkeypatch):
    monkeypatch.setattr(cook, "join_ranks", lambda _: contextlib.nullcontext(Failing()))
    for _ in range(2):
        with pytest.raises(RankError):
            streamsoup.soup(runs, tmp_path / "soup")
        assert not (tmp_path / "soup.partial").exists()
    monkeypatch.undo()
    streamsoup.soup(runs, tmp_path / "soup")


def interrupted(tmp_path, runs, monkeypatch, *, after):
    """Leave unfinished work after some tiles."""
    real, calls = FileSink.write, [0]

    def write(self, *arguments):
        calls[0] += 1
        if calls[0] > after:
            raise OSError("stop")
        real(self, *arguments)

    with monkeypatch.context() as patch, small_tiles(2):
        patch.setattr(FileSink, "write", write)
        with pytest.raises(OSError, match="stop"):
            streamsoup.soup(runs, tmp_path / "soup", workers=1)


def test_tiles_that_two_ranks_finished_count_once(tmp_path, runs, monkeypatch):
    interrupted(tmp_path, runs, monkeypatch, after=12)
    partial = tmp_path / "soup.partial"
    (partial / "journal-1").write_bytes((partial / "journal").read_bytes())
    streamsoup.resume(tmp_path / "soup")
    streamsoup.soup(runs, tmp_path / "alone")
    manifests = [json.loads((tmp_path / name / "streamsoup.json").read_text()) for name in ("soup", "alone")]
    assert manifests[0]["ingredients"] == manifests[1]["ingredients"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=30))
def test_ranges_are_taken_once(tiles):
    ranges, taken = [], set()
    for start, elements in tiles:
        mine = set(range(start, start + elements))
        assert _take(ranges, start, elements) is not bool(mine & taken)
        taken |= set() if mine & taken else mine
    assert taken == {i for start, elements in ranges for i in range(start, start + elements)}
    assert ranges == sorted(ranges)


def test_work_at_which_a_rank_still_is_cannot_be_gone_on_with(tmp_path, runs, monkeypatch):
    interrupted(tmp_path, runs, monkeypatch, after=3)
    with Journal(tmp_path / "soup.partial" / "journal-1", locked=True):
        with pytest.raises(ResumeError, match="another process is at work"):
            streamsoup.resume(tmp_path / "soup")
        with pytest.raises(ResumeError, match="another process is at work"):
            streamsoup.soup(runs, tmp_path / "soup", restart=True)
    streamsoup.resume(tmp_path / "soup")


def test_without_torchrun_there_is_a_sentence(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RecipeError, match="torchrun"), join_ranks(True):
        pass
    with join_ranks(False) as ranks:
        assert ranks is ALONE
        assert ranks.first(lambda: 3) == ranks.fold(lambda: 3, lambda a, b: a + b) == 3


# -- torchrun ------------------------------------------------------------------------------------------------------


def torchrun(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, *map(str, arguments)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_torchrun_makes_one_soup_and_says_so_once(tmp_path, runs):
    done = torchrun(tmp_path, "-m", "streamsoup", "soup", *runs, "-o", "soup")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" checkpoints, ") == 1, done.stdout
    assert "2 processes" in done.stdout
    streamsoup.soup(runs, tmp_path / "alone")
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "alone")
    again = torchrun(tmp_path, "-m", "streamsoup", "soup", *runs, "-o", "soup")
    assert again.returncode != 0
    assert again.stderr.count("exists already") == 1, again.stderr
    refused = torchrun(tmp_path, "-m", "streamsoup", "greedy", *runs, "--score", "echo 1", "-o", "greedy")
    assert "runs in one process" in refused.stderr
    assert not (tmp_path / "greedy").exists()


@pytest.mark.parametrize(("rank", "said"), [(0, "runs in one process"), (1, "")])
def test_torchrun_does_not_end_rank_0_before_it_has_spoken(monkeypatch, capsys, rank, said):
    """It ends all processes as soon as one of them has ended."""
    waited = []
    monkeypatch.setattr(guard.time, "sleep", waited.append)
    monkeypatch.setattr(cli, "_rank", lambda insisted: rank)
    assert cli.main(["greedy", "runs", "--score", "echo 1", "-o", "greedy"]) == 2
    assert said in capsys.readouterr().err
    assert bool(waited) == bool(rank)

    def fails(args):
        raise RankError("rank 1 failed")

    waited.clear()
    args = argparse.Namespace(run=fails, rank=rank, command="soup", debug=False)
    assert guard.run_command(args) == 1
    assert ("rank 1 failed" in capsys.readouterr().err) == (rank == 0)
    assert bool(waited) == bool(rank)


_PARENT = """
import os, subprocess, sys
child = [sys.executable, "-c", "from streamsoup.ranks import is_rank; print(is_rank())"]
print(subprocess.run(child, env={**os.environ, **RANK}, capture_output=True, text=True, check=True).stdout)
"""
_OF_TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("parent", "child", "expected"),
    [
        ({}, _OF_TORCHRUN, "True"),
        (_OF_TORCHRUN, {}, "False"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, _OF_TORCHRUN, "True"),  # a launcher that was given a rank itself
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "False"),
        ({}, {"RANK": "0", "WORLD_SIZE": "2"}, "True"),
        ({}, {"RANK": "0", "WORLD_SIZE": "1"}, "False"),
        ({}, {"RANK": "", "WORLD_SIZE": ""}, "False"),
    ],
)
def test_a_program_that_a_rank_starts_is_no_rank(parent, child, expected):
    env = {k: v for k, v in os.environ.items() if k not in _OF_TORCHRUN}
    code = _PARENT.replace("RANK}", f"{child!r}}}").replace("**{", "**{")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**env, **parent}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected
