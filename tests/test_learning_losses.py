"""Learned soups lose nothing: not what was learned, and nothing of anybody else's."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from factory import weights_bytes
from learning_pools import Net, make_batches, stored_states, write_states
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup.errors import (
    ChangedIngredientError,
    DiskSpaceError,
    RecipeError,
    ResumeError,
)
from streamsoup.learning import publishing
from streamsoup.write import FileSink


class StopError(Exception):
    pass


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Net(width=40).double()  # its tensors have bytes that no sample looks at


@pytest.fixture
def paths(tmp_path, module):
    return write_states(tmp_path / "runs", stored_states(module, 3))


def learn(paths, module, out=None, **options):
    options = {"epochs": 2, **options}
    batches = options.pop("batches", None) or make_batches(3)
    return streamsoup.learn(paths, module, cross_entropy, batches, out, **options)


def interrupt(paths, module, out, workdir, *, after=2, **options):
    """Learn until an exception after some steps."""

    def stop(record):
        if record.step == after:
            raise StopError

    with pytest.raises(StopError):
        learn(paths, module, out, workdir=workdir, on_step=stop, **options)


# -- what is there stays (see test_learning_publishing, too) -------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
def test_unfinished_work_of_another_command_is_kept(paths, module, tmp_path, monkeypatch, restart):
    interrupt(paths, module, tmp_path / "soup", tmp_path / "work")
    with monkeypatch.context() as patch:
        break_the_disk(patch, after=2)
        with pytest.raises(DiskSpaceError):
            streamsoup.soup(paths, tmp_path / "soup", shard_size=2000)
    before = {p.name for p in (tmp_path / "soup.partial").iterdir()}
    with pytest.raises(ResumeError, match="unfinished work of another run") as caught:
        learn(paths, module, tmp_path / "soup", workdir=tmp_path / "work", restart=restart)
    assert "--resume" in str(caught.value)
    assert {p.name for p in (tmp_path / "soup.partial").iterdir()} == before
    streamsoup.resume(tmp_path / "soup")


def break_the_disk(patch, *, after):
    real, calls = FileSink.write, [0]

    def write(self, *arguments):
        calls[0] += 1
        if calls[0] > after:
            self.sync()
            raise DiskSpaceError("the disk is full")
        return real(self, *arguments)

    patch.setattr(FileSink, "write", write)
    patch.setattr("streamsoup.engine._COMMIT_SECONDS", 0.0001)


# -- what was learned stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the same call", "soup --resume", "soup --resume, then the same call"])
def test_a_soup_that_could_not_be_written_is_gone_on_with(paths, module, tmp_path, monkeypatch, how):
    options = {"workdir": tmp_path / "work", "by": "layer", "shard_bytes": 2000}
    expected = learn(paths, module, tmp_path / "expected", **{**options, "workdir": None})
    with monkeypatch.context() as patch:
        break_the_disk(patch, after=3)
        with pytest.raises(DiskSpaceError) as caught:
            learn(paths, module, tmp_path / "soup", **options)
    notes = " ".join(caught.value.__notes__)
    assert "--resume" in notes
    assert str(tmp_path / "work") in notes
    assert (tmp_path / "soup.partial").exists()
    if "resume" in how:
        streamsoup.resume(tmp_path / "soup")
    if "same" in how:
        learn(paths, module, tmp_path / "soup", **options)
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "expected")
    learned = json.loads((tmp_path / "soup" / "learned.json").read_text())
    assert list(learned["coefficients"].values()) == expected.coefficients.tolist()
    assert not (tmp_path / "soup.partial").exists()


def test_a_resumed_soup_is_refused_ingredients_that_changed_since_learning(paths, module, tmp_path, monkeypatch):
    options = {"workdir": tmp_path / "work", "shard_bytes": 2000}
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "cook", lambda *a: change_then_cook(paths[1], *a))
        with pytest.raises(ChangedIngredientError, match="since the recipe was chosen"):
            learn(paths, module, tmp_path / "soup", **options)
    with pytest.raises(ChangedIngredientError):
        streamsoup.resume(tmp_path / "soup")


def change_then_cook(path, *arguments):
    from streamsoup.cook import cook

    change_the_tail(path)
    return cook(*arguments)


def change_the_tail(path):
    """Change bytes that identities do not sample."""
    from pathlib import Path

    file = Path(path) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    begin, end = max((e["data_offsets"] for n, e in header.items() if n[0] != "_"), key=lambda o: o[1] - o[0])
    assert end - begin > 4096
    raw[8 + length + begin + 8] ^= 1
    file.write_bytes(raw)


def test_bytes_that_no_sample_saw_are_missed_when_learning_goes_on(paths, module, tmp_path):
    interrupt(paths, module, tmp_path / "soup", tmp_path / "work")
    change_the_tail(paths[1])
    with pytest.raises(ChangedIngredientError, match="since learning began") as caught:
        learn(paths, module, tmp_path / "soup", workdir=tmp_path / "work")
    assert str(paths[1]) in str(caught.value)
    assert not (tmp_path / "soup").exists()


def test_without_a_work_folder_the_error_has_what_was_learned(paths, module, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_the_disk(patch, after=0)
        with pytest.raises(DiskSpaceError) as caught:
            learn(paths, module, tmp_path / "soup")
    assert any("attribute `learned`" in note for note in caught.value.__notes__)
    kept = caught.value.learned
    streamsoup.soup(kept.ingredients, tmp_path / "other", coefficients=kept.coefficients[0].tolist())
    learn(paths, module, tmp_path / "again")
    assert weights_bytes(tmp_path / "other") == weights_bytes(tmp_path / "again")


def test_a_work_folder_may_go_with_the_soup_in_its_place(paths, module, tmp_path):
    learn(paths, module, tmp_path / "soup", workdir=tmp_path / "work", keep_workdir=False)
    assert not (tmp_path / "work").exists()
    (tmp_path / "mine").mkdir()
    seen = []

    def look(record):
        (tmp_path / "mine" / "notes.txt").write_text("mine")
        seen.append(record)

    learn(paths, module, tmp_path / "soup2", workdir=tmp_path / "mine", keep_workdir=False, on_step=look)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_the_state_does_not_grow_with_the_steps(paths, module, tmp_path):
    sizes = []

    def look(record):
        sizes.append((tmp_path / "work" / "state.safetensors").stat().st_size)

    learn(paths, module, workdir=tmp_path / "work", epochs=40, on_step=look)
    assert max(sizes[10:]) - min(sizes[10:]) < 32, "but for the digits of numbers"
    lines = (tmp_path / "work" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 121))


@pytest.mark.parametrize("damage", ["gone", "cut", "text"])
def test_damaged_steps_are_refused_and_a_torn_tail_is_not(paths, module, tmp_path, damage):
    interrupt(paths, module, None, tmp_path / "work", after=4)
    file = tmp_path / "work" / "steps.jsonl"
    raw = file.read_bytes()
    file.write_bytes(raw + b'{"step": 5, "ep')
    interrupt(paths, module, None, tmp_path / "work", after=5)
    assert file.read_bytes().startswith(raw)
    assert len(file.read_bytes().splitlines()) == 5
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(raw[:-9] if damage == "cut" else b"x" * 10_000)
    with pytest.raises(ResumeError, match="damaged"):
        learn(paths, module, workdir=tmp_path / "work")


# -- what decides, and is not to change ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["held_out added", "held_out dropped", "held_out longer", "batches"])
def test_other_data_is_another_job(paths, module, tmp_path, change):
    first = {"held_out": make_batches(2, seed=9)} if "added" not in change else {}
    other = {
        "held_out added": {"held_out": make_batches(2, seed=9)},
        "held_out dropped": {},
        "held_out longer": {"held_out": make_batches(3, seed=9)},
        "batches": {**first, "batches": make_batches(4)},
    }[change]
    interrupt(paths, module, None, tmp_path / "work", **first)
    with pytest.raises(ResumeError, match="other ingredients or options"):
        learn(paths, module, workdir=tmp_path / "work", **other)
    learn(paths, module, workdir=tmp_path / "work", **first)


def test_another_optimiser_of_ones_own_is_another_job(paths, module, tmp_path):
    def own(lr):
        return lambda groups: torch.optim.SGD(groups, lr=lr)

    interrupt(paths, module, None, tmp_path / "work", optimizer=own(0.1))
    for other in (own(50.0), lambda groups: torch.optim.Adam(groups, lr=0.1)):
        with pytest.raises(ResumeError, match="other ingredients or options"):
            learn(paths, module, workdir=tmp_path / "work", optimizer=other)
    learn(paths, module, workdir=tmp_path / "work", optimizer=own(0.1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "lr": 3.0}, "lr and weight_decay"),
        ({"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "weight_decay": 3.0}, "lr and weight_decay"),
        ({"sums": "disk"}, "'sums'"),
        ({"sums_dtype": "float32"}, "'sums_dtype'"),
        ({"restrict": True}, "restrict"),
        ({"held_out": iter(make_batches(2))}, "only once"),
        ({"held_out": (b for b in make_batches(2))}, "only once"),
    ],
)
def test_options_that_would_do_nothing_are_refused(paths, module, options, words):
    steps = []
    with pytest.raises(RecipeError, match=words):
        learn(paths, module, on_step=steps.append, **options)
    assert not steps


def test_two_names_of_one_checkpoint_are_one_too_many(paths, module, tmp_path):
    (tmp_path / "link").symlink_to(paths[0])
    with pytest.raises(RecipeError, match="named twice"):
        learn([*paths, str(tmp_path / "link")], module)


def test_a_recipe_that_names_a_checkpoint_twice_adds_its_weights(paths, module, tmp_path):
    recipe = f"ingredients: [{{path: {paths[0]}}}, {{path: {paths[0]}}}, {{path: {paths[1]}}}, {{path: {paths[2]}}}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = learn(paths, module, init=tmp_path / "recipe.yaml", lr=1e-12, epochs=1, temperature=False)
    np.testing.assert_allclose(result.coefficients[0], [0.5, 0.25, 0.25], atol=1e-9)


# -- memory and planning -------------------------------------------------------------------------------------------


class Counted:
    """Batches of which it is known how many are alive."""

    def __init__(self, count):
        self.count, self.alive, self.most = count, 0, 0

    def __iter__(self):
        for batch in make_batches(self.count):
            inputs = batch[0].clone()
            self.alive += 1
            weakref.finalize(inputs, self._gone)
            self.most = max(self.most, self.alive)
            yield inputs, batch[1]
            del inputs, batch

    def _gone(self):
        self.alive -= 1


def test_no_more_batches_are_held_than_a_step_has_and_one(paths, module):
    batches = Counted(12)
    learn(paths, module, batches=batches, accumulate=4, epochs=1)
    assert batches.most <= 5


def test_it_is_planned_once(paths, module, monkeypatch):
    made = []
    from streamsoup import pool

    real = pool.make_plan
    monkeypatch.setattr(pool, "make_plan", lambda *a, **k: made.append(1) or real(*a, **k))
    learn(paths, module)
    assert len(made) == 4, "the pool, forming, measuring with the widest gradient, and with the module's"
