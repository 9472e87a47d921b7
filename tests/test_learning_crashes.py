"""A learned soup killed with -9 anywhere goes on to the same numbers and bits.

This file is two things. As a script it runs jobs, a JSON line each from standard input, each in a fork of its own that
may kill itself (so that torch and numba are imported once); as a test it judges them.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dying import die_at, serve, serving
from factory import read_checkpoint, weights_bytes, write_checkpoint
from learning_pools import Dropping, as_array, make_batches, stored_states, write_states
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup import engine, making, soup_plan, workspace, write
from streamsoup.errors import ChangedIngredientError, ResumeError, StreamsoupError
from streamsoup.learning import cooking, loop, mixture, network, passes, publishing, state

POINTS = {
    "job or state": (state, "write_durably"),
    "state": (state.StateFile, "save"),
    "begin": (state.StateFile, "begin"),
    "form": (passes.Passes, "form"),
    "step": (passes.Passes, "step"),
    "part formed": (passes.Passes, "_form"),
    "part measured": (passes.Passes, "_measure"),
    "backward": (network.Network, "backward"),
    "held out": (network.Network, "evaluate"),
    "update": (mixture.Mixture, "update"),
    "temperature": (mixture.Mixture, "update_temperature"),
    "record": (loop, "StepRecord"),
    "sweep": (engine.Engine, "_sweep"),
    "unchanged": (cooking, "verify_unchanged"),
    "cook": (publishing, "cook"),
    "resumed": (publishing, "resume"),
    "line": (state.StateFile, "_append"),
    "plan": (soup_plan, "make_plan"),
    "workspace": (workspace.Workspace, "create"),
    "job of the soup": (workspace.Workspace, "write_job"),
    "tile": (write.FileSink, "write"),
    "side files": (making, "write_side_files"),
    "publish": (workspace.Workspace, "publish"),
    "replace": (os, "replace"),
    "fsync": (os, "fsync"),
    "pwrite": (os, "pwrite"),
    "rename": (os, "rename"),
}
KINDS = {
    "plain": {"by": "model", "epochs": 3},
    "held out": {"by": "layer", "epochs": 4, "patience": 2, "lr": 0.6, "accumulate": 2},
    "free": {"by": "tensor", "epochs": 2, "parametrisation": "free", "lr": 0.05, "weight_decay": 0.1},
    "adam": {"by": ["*.bias", "layers.*"], "epochs": 2, "optimizer": "adam", "temperature": False},
    "momentum": {"by": "layer", "epochs": 2, "momentum": 0.9},
}


# -- the script ----------------------------------------------------------------------------------------------------


def die_after(seconds):
    """Have this process die at some moment."""

    def sleep_and_die():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=sleep_and_die, daemon=True).start()


def make_module():
    torch.manual_seed(0)
    return Dropping().double().train()


def learn(job):
    """Learn as the job says; returns the module and the result."""
    options = dict(job["options"])
    batches, held_out = make_batches(4), make_batches(2, seed=7)
    module = make_module()
    if "momentum" in options:
        momentum = options.pop("momentum")
        options["optimizer"] = lambda rows: torch.optim.SGD(rows, lr=0.02, momentum=momentum)
    if "patience" in options:
        options |= {"held_out": held_out, "forward": forward_without_dropout_when_judged}
    result = streamsoup.learn(
        job["runs"], module, cross_entropy, batches, job["out"], workdir=job["workdir"],
        **{"budget_bytes": "200MiB", "workers": 2, **options},
    )  # fmt: skip
    return module, result


def forward_without_dropout_when_judged(module, inputs):
    module.train(torch.is_grad_enabled())
    return module(inputs)


def run(job):
    """Start or go on; returns what the test wants to know."""
    torch.set_num_threads(1)
    torch.manual_seed(job.get("user_seed", 0))
    if job.get("point"):
        die_at(*POINTS[job["point"]], job["number"], job["before"])
    if job.get("seconds"):
        die_after(job["seconds"])
    module, result = learn(job)
    return {
        "coefficients": result.coefficients.tobytes().hex(),
        "groups": result.groups,
        "temperature": result.temperature,
        "loss": result.loss,
        "held_out": result.held_out,
        "best_step": result.best_step,
        "notes": result.notes,
        "steps": [[s.step, s.epoch, s.loss, s.temperature, s.held_out] for s in result.steps],
        "module": {n: as_array(t).tobytes().hex() for n, t in module.state_dict().items()},
        "state": state_of(Path(job["workdir"])),
    }


def state_of(folder):
    """The optimiser's state at the end."""
    from safetensors.numpy import load_file

    return {
        n: [str(a.dtype), list(a.shape), a.tobytes().hex()] for n, a in load_file(folder / "state.safetensors").items()
    }


def main():
    from streamsoup.backends import open_backend

    importlib.import_module("torch._dynamo")  # what the first optimiser imports, once for all forks
    open_backend("cpu").prepare(wide=True, fp8=False, measured=True)
    serve(run)


# -- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the forks: what torch adds up in several threads it may add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server():
    with serving(__file__) as ask:
        yield ask


class Bench:
    """A pool, and one uninterrupted soup for each kind of job."""

    def __init__(self, folder, server):
        self.runs = write_states(folder, stored_states(make_module(), 4), shards=2)
        self.folder, self.server, self.done = folder, server, {}

    def job(self, folder, kind, **options):
        return {
            "runs": self.runs,
            "out": str(folder / "soup"),
            "workdir": str(folder / "work"),
            "options": {**KINDS[kind], "shard_bytes": 2000, **options},
        }

    def uninterrupted(self, kind):
        if kind not in self.done:
            folder = self.folder / kind
            folder.mkdir()
            began = time.perf_counter()
            answer = self.server(self.job(folder, kind))
            assert answer["code"] == 0, answer["errors"]
            self.done[kind] = answer, weights_bytes(folder / "soup"), time.perf_counter() - began
        return self.done[kind]


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    return Bench(tmp_path_factory.mktemp("learning"), server)


def kill_and_go_on(bench, folder, kind, *deaths, **changed):
    """Die each way in turn, then go on to the end; checks all that was promised. Returns how often it died."""
    expected, weights, _ = bench.uninterrupted(kind)
    job, answer, died = bench.job(folder, kind), None, 0
    for turn, death in enumerate((*deaths, {})):
        options = job["options"] | (changed if turn else {})
        answer = bench.server({**job, **death, "options": options, "user_seed": turn})
        assert answer["code"] in (0, -signal.SIGKILL), answer["errors"]
        assert answer["code"] == 0 or death
        if (folder / "soup").exists():
            assert weights_bytes(folder / "soup") == weights, "a soup that is in its place is whole"
        if answer["code"] == 0:
            break  # it was not to die there
        died += 1
    assert weights_bytes(folder / "soup") == weights
    for what in (
        "coefficients",
        "groups",
        "temperature",
        "loss",
        "held_out",
        "best_step",
        "steps",
        "notes",
        "module",
        "state",
    ):
        assert answer[what] == expected[what], what
    learned = json.loads((folder / "soup" / "learned.json").read_text())
    assert [s["loss"] for s in learned["steps"]] == [s[2] for s in expected["steps"]]
    assert not (folder / "soup.partial").exists()
    return died


def at(point, number, before=False):
    return {"point": point, "number": number, "before": before}


CHOSEN = [
    ("plain", at("begin", 1)), ("plain", at("job or state", 1, True)), ("plain", at("job or state", 1)),
    ("plain", at("form", 1, True)), ("plain", at("form", 1)),
    ("plain", at("backward", 1)), ("plain", at("temperature", 1)), ("plain", at("update", 1)),
    ("plain", at("part measured", 1)), ("plain", at("part formed", 2)),
    ("plain", at("step", 1)), ("plain", at("state", 1, True)), ("plain", at("state", 1)),
    ("plain", at("line", 1)), ("plain", at("line", 5)),
    ("plain", at("state", 4, True)), ("plain", at("state", 4)), ("plain", at("step", 5)),
    ("plain", at("state", 12, True)), ("plain", at("state", 12)),
    ("plain", at("unchanged", 1)), ("plain", at("cook", 1, True)), ("plain", at("plan", 1)),
    ("plain", at("workspace", 1, True)), ("plain", at("workspace", 1)), ("plain", at("job of the soup", 1)),
    ("plain", at("tile", 1)), ("plain", at("tile", 5)), ("plain", at("side files", 1, True)),
    ("plain", at("side files", 1)), ("plain", at("publish", 1, True)),
    ("held out", at("held out", 1)), ("held out", at("held out", 2)), ("held out", at("state", 2, True)),
    ("held out", at("state", 2)), ("held out", at("state", 3)), ("held out", at("held out", 3, True)),
    ("held out", at("form", 2, True)), ("held out", at("form", 2)), ("held out", at("cook", 1, True)),
    ("free", at("state", 3)), ("free", at("step", 4)),
    ("adam", at("state", 3)), ("adam", at("update", 5)),
    ("momentum", at("state", 3)), ("momentum", at("state", 4, True)),
    ("plain", at("line", 1, True)), ("plain", at("line", 1)), ("plain", at("line", 5)), ("held out", at("line", 3)),
    ("plain", at("publish", 1)), ("plain", at("cook", 1)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "death"), CHOSEN)
def test_killed_anywhere_it_goes_on_to_the_same_bits(tmp_path, bench, kind, death):
    assert kill_and_go_on(bench, tmp_path, kind, death) == 1, "the point was passed"


def random_deaths(seed):
    rng = random.Random(seed)
    names = sorted(set(POINTS) - {"publish", "rename", "replace", "fsync"})
    return [at(rng.choice(names), rng.randint(1, 12), rng.random() < 0.5) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again_it_goes_on_to_the_same_bits(tmp_path, bench, kind, seed):
    kill_and_go_on(bench, tmp_path, kind, *random_deaths(f"{seed} {kind}"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("seed", range(2, 60))
def test_killed_at_many_points_it_goes_on_to_the_same_bits(tmp_path, bench, kind, seed):
    kill_and_go_on(bench, tmp_path, kind, *random_deaths(f"{seed} {kind}"))


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path, bench, seed):
    """By the clock, also in the middle of a system call; where does not matter to what is asserted."""
    rng = random.Random(seed)
    kind = sorted(KINDS)[seed % len(KINDS)]
    seconds = bench.uninterrupted(kind)[2]
    # Not in the last moments: those are publishing's own.
    kill_and_go_on(bench, tmp_path, kind, *({"seconds": seconds * rng.uniform(0.05, 0.6)} for _ in range(3)))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_killed_while_a_state_is_written_it_goes_on(tmp_path, bench, number):
    kill_and_go_on(bench, tmp_path, "held out", at("pwrite", number), at("fsync", number), at("replace", number, True))


def test_it_goes_on_with_another_budget_other_threads_and_another_device(tmp_path, bench):
    deaths = at("step", 3), at("update", 4), at("step", 2)
    assert kill_and_go_on(
        bench, tmp_path, "free", *deaths, budget_bytes="90MiB", workers=1, read_mode="plain", device="torch:cpu"
    ) == 3  # fmt: skip


def test_nothing_is_learned_again_when_only_publishing_was_left(tmp_path, bench):
    job = bench.job(tmp_path, "plain")
    assert bench.server({**job, **at("cook", 1, True)})["code"] == -signal.SIGKILL
    answer = bench.server({**job, **at("backward", 1, True)})
    assert answer["code"] == 0, "no step was made"
    assert weights_bytes(tmp_path / "soup") == bench.uninterrupted("plain")[1]


def test_the_work_folder_tells_of_each_step(tmp_path, bench):
    """What lies there after a death at step n is n steps, durable, and no file is left of a half-written one."""
    job = bench.job(tmp_path, "plain")
    assert bench.server({**job, **at("state", 5)})["code"] == -signal.SIGKILL
    from safetensors import safe_open

    with safe_open(tmp_path / "work" / "state.safetensors", "numpy") as file:
        standing = json.loads(file.metadata()["standing"])
    lines = (tmp_path / "work" / "steps.jsonl").read_bytes()
    assert len(lines) == standing["steps_bytes"]
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2, 3, 4, 5]
    assert (standing["epoch"], standing["chunk"]) == (1, 1)
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"learn.json", "state.safetensors", "steps.jsonl"}


# -- refused -------------------------------------------------------------------------------------------------------


def interrupted(folder, server_runs=None, *, kind="plain", steps=5, **options):
    """Learn in this process until an exception after some steps; returns the job."""
    module = make_module()
    runs = server_runs or write_states(folder, stored_states(module, 4))
    job = {
        "runs": runs,
        "out": str(folder / "soup"),
        "workdir": str(folder / "work"),
        "options": {**KINDS[kind], **options},
    }

    class EnoughError(Exception):
        pass

    def stop(record):
        if record.step == steps:
            raise EnoughError

    with pytest.raises(EnoughError) as caught:
        learn({**job, "options": {**job["options"], "on_step": stop}})
    assert any(str(folder / "work") in note for note in caught.value.__notes__), "it says where the work is"
    return job


def test_an_exception_is_gone_on_from_as_well(tmp_path, bench):
    job = interrupted(tmp_path, bench.runs, shard_bytes=2000)
    _, result = learn(job)
    expected = bench.uninterrupted("plain")
    assert result.coefficients.tobytes().hex() == expected[0]["coefficients"]
    assert weights_bytes(tmp_path / "soup") == expected[1]
    assert len(result.steps) == 12


@pytest.mark.parametrize("how", ["data", "replaced", "header"])
def test_a_changed_ingredient_is_refused(tmp_path, how):
    job = interrupted(tmp_path)
    changed = Path(job["runs"][2])
    file = changed / "model.safetensors"
    raw, stat = bytearray(file.read_bytes()), file.stat()
    raw[-3] ^= 1
    if how == "data":  # in place, and with the time put back
        with file.open("r+b") as opened:
            opened.write(raw)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "replaced":
        file.unlink()
        file.write_bytes(raw)
    else:
        state = stored_states(make_module(), 4)[2]
        write_checkpoint(changed, {n: as_array(state[n]) for n in reversed(state)})
    before = work_bytes(tmp_path / "work")
    with pytest.raises(ChangedIngredientError) as caught:
        learn(job)
    assert str(changed) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert work_bytes(tmp_path / "work") == before, "the work is kept"
    assert not (tmp_path / "soup").exists()
    learn({**job, "options": {**job["options"], "restart": True}})
    assert (tmp_path / "soup").exists()


def work_bytes(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


OTHERS = [
    {"by": "layer"}, {"by": ["*"]}, {"parametrisation": "free"}, {"temperature": False}, {"lr": 0.2}, {"epochs": 4},
    {"weight_decay": 0.1}, {"accumulate": 2}, {"seed": 1}, {"init": [1, 2, 3, 4]}, {"optimizer": "sgd"},
    {"patience": 3}, {"dtype": "float32"}, {"buffers": "first"}, {"nonfinite": "warn"},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_options_are_refused_with_one_sentence(tmp_path, other):
    job = interrupted(tmp_path, steps=1)
    before = work_bytes(tmp_path / "work")
    with pytest.raises(ResumeError, match="other ingredients or options") as caught:
        learn({**job, "options": {**job["options"], **other}})
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "work") in str(caught.value)
    assert work_bytes(tmp_path / "work") == before
    _, result = learn(job)
    assert len(result.steps) == 12, "and with the old ones it goes on"


@pytest.mark.parametrize("how", ["fewer", "more", "order", "another"])
def test_other_ingredients_are_refused(tmp_path, how):
    job = interrupted(tmp_path, steps=1)
    runs = job["runs"]
    extra = write_states(tmp_path / "extra", stored_states(make_module(), 1, seed=5))
    other = {"fewer": runs[:3], "more": runs + extra, "order": runs[::-1], "another": runs[:3] + extra}[how]
    with pytest.raises(ResumeError, match="other ingredients or options"):
        learn({**job, "runs": other})


def test_what_changes_no_bits_may_change(tmp_path):
    job = interrupted(tmp_path, steps=3)
    other = {"budget_bytes": "150MiB", "workers": 1, "read_mode": "plain", "device": "torch:cpu"}
    learn({**job, "options": {**job["options"], **other}})


def test_restart_throws_the_work_away(tmp_path):
    job = interrupted(tmp_path, steps=5)
    seen = []
    other = {"lr": 0.3, "restart": True, "on_step": seen.append}
    _, result = learn({**job, "options": {**job["options"], **other}})
    assert len(result.steps) == len(seen) == 12
    fresh = {**job, "workdir": str(tmp_path / "fresh"), "out": str(tmp_path / "other")}
    _, expected = learn({**fresh, "options": {**fresh["options"], "lr": 0.3}})
    assert np.array_equal(result.coefficients, expected.coefficients)


@pytest.mark.parametrize("name", ["state.safetensors", "learn.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_work_is_refused_and_restart_helps(tmp_path, name, damage):
    job = interrupted(tmp_path, steps=2)
    file = tmp_path / "work" / name
    raw = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "text": b"{}"}[damage])
    with pytest.raises(ResumeError, match="--restart"):
        learn(job)
    _, result = learn({**job, "options": {**job["options"], "restart": True}})
    assert len(result.steps) == 12


def test_foreign_files_in_the_work_folder_are_refused_and_kept(tmp_path):
    runs = write_states(tmp_path, stored_states(make_module(), 4))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    job = {"runs": runs, "out": None, "workdir": str(tmp_path / "work"), "options": KINDS["plain"]}
    for options in (KINDS["plain"], {**KINDS["plain"], "restart": True}):
        with pytest.raises(ResumeError, match=r"thesis\.tex"):
            learn({**job, "options": options})
    assert work_bytes(tmp_path / "work") == {"thesis.tex": b"mine"}


def test_two_may_not_work_in_one_folder(tmp_path):
    job = interrupted(tmp_path, steps=2)
    seen = []

    def again(record):
        with pytest.raises(ResumeError, match="another process"):
            learn({**job, "out": None})
        seen.append(record.step)

    learn({**job, "options": {**job["options"], "on_step": again}})
    assert seen == list(range(3, 13))


def test_finished_work_makes_the_soup_again_without_a_step(tmp_path):
    job = interrupted(tmp_path, steps=2)
    _, first = learn(job)
    seen = []
    second = learn({**job, "out": str(tmp_path / "other"), "options": {**job["options"], "on_step": seen.append}})[1]
    assert not seen
    assert np.array_equal(first.coefficients, second.coefficients)
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "other")


def test_an_empty_work_folder_is_not_left_behind_by_an_error(tmp_path):
    runs = write_states(tmp_path, stored_states(make_module(), 4))
    job = {"runs": runs, "out": None, "workdir": str(tmp_path / "work"), "options": {"by": "nonsense"}}
    with pytest.raises(StreamsoupError):
        learn(job)
    assert not (tmp_path / "work").exists()


def test_a_soup_killed_while_it_was_published_is_not_left_half(tmp_path, bench):
    """In between, there is no soup or a whole one, and what is unfinished lies beside it."""
    job = bench.job(tmp_path, "plain")
    assert bench.server({**job, **at("tile", 3)})["code"] == -signal.SIGKILL
    assert not (tmp_path / "soup").exists()
    assert (tmp_path / "soup.partial").exists()
    answer = bench.server(job)
    assert answer["code"] == 0, answer["errors"]
    assert read_checkpoint(tmp_path / "soup").keys() == set(make_module().state_dict())


if __name__ == "__main__":
    main()
