"""A learned soup replaces nothing unasked, is known by what is its own, and is not lost when it cannot be written."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from factory import read_checkpoint, same_bits, weights_bytes
from learning_pools import Net, make_batches, stored_states, write_states
from test_learning_crashes import POINTS, at, bench, one_thread, server  # noqa: F401
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup.errors import ChangedIngredientError, DestinationError, DiskSpaceError, ResumeError, StreamsoupError
from streamsoup.learning import publishing
from streamsoup.workspace import Workspace


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def paths(tmp_path, module):
    return write_states(tmp_path / "runs", stored_states(module, 3))


def learn(paths, module, out=None, **options):
    return streamsoup.learn(paths, module, cross_entropy, make_batches(3), out, **{"epochs": 1, **options})


def fail_to_publish(patch, error=None):
    """Have what follows the writing of the weights fail, as a full disk would."""

    def publish(*_, **__):
        raise error or DiskSpaceError("the disk is full.")

    patch.setattr(Workspace, "publish", publish)


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- nothing is replaced unasked -----------------------------------------------------------------------------------


def test_a_repeated_call_leaves_the_finished_soup_as_it_is(paths, module, tmp_path):
    out, work = tmp_path / "soup", tmp_path / "work"
    first = learn(paths, module, out, workdir=work)
    (out / "my_eval.json").write_text("{}")
    (out / "model.safetensors").write_bytes(b"by hand")
    before = everything(out)
    again = learn(paths, module, out, workdir=work)
    assert everything(out) == before
    assert again.path == out
    assert again.coefficients.tobytes() == first.coefficients.tobytes()
    replaced = learn(paths, module, out, workdir=work, overwrite=True)
    assert replaced.path == out
    assert not (out / "my_eval.json").exists()
    assert read_checkpoint(out).keys() == set(module.state_dict())


def test_another_soup_in_the_place_is_not_replaced(paths, module, tmp_path):
    """Neither a copy of the result of this work in a soup of another, nor what it inherits from an ingredient."""
    out, work = tmp_path / "soup", tmp_path / "work"
    learn(paths, module, out, workdir=work)
    child = tmp_path / "child"
    streamsoup.soup([out, paths[0]], child)
    assert not (child / "learned.json").exists(), "it tells of another soup"
    shutil.copy(out / "learned.json", child / "learned.json")
    before = everything(child)
    with pytest.raises(DestinationError, match="exists already"):
        learn(paths, module, child, workdir=work)
    assert everything(child) == before


def test_restart_does_not_replace_a_soup_and_keeps_what_was_learned(paths, module, tmp_path):
    out, work = tmp_path / "soup", tmp_path / "work"
    learn(paths, module, out, workdir=work)
    before = everything(tmp_path)
    with pytest.raises(DestinationError, match="exists already"):
        learn(paths, module, out, workdir=work, restart=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["learned.json", "recipe.yaml", "streamsoup.json"])
def test_what_lies_beside_a_single_file_is_not_replaced(paths, module, tmp_path, name):
    beside = tmp_path / f"soup.{name}"
    beside.write_text("mine")
    steps = []
    with pytest.raises(DestinationError, match="exists already"):
        learn(paths, module, tmp_path / "soup.safetensors", on_step=steps.append)
    assert not steps
    assert beside.read_text() == "mine"
    learn(paths, module, tmp_path / "soup.safetensors", overwrite=True)
    assert beside.read_text() != "mine"


@pytest.mark.parametrize("number", range(1, 7))
def test_a_single_file_killed_while_it_takes_its_place_ends_well(tmp_path, bench, number):  # noqa: F811
    job = {**bench.job(tmp_path, "plain"), "out": str(tmp_path / "soup.safetensors")}
    job["options"].pop("shard_bytes")
    assert bench.server({**job, **at("publish", 1, True)})["code"] == -signal.SIGKILL
    bench.server({**job, **at("replace", number)})
    answer = bench.server(job)
    assert answer["code"] == 0, answer["errors"]
    assert answer["coefficients"] == bench.uninterrupted("plain")[0]["coefficients"]
    assert not (tmp_path / "soup.safetensors.partial").exists()
    expected = read_checkpoint(bench.folder / "plain" / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup.safetensors"), expected)
    assert json.loads((tmp_path / "soup.learned.json").read_text())["path"] == job["out"]


# -- unfinished work -----------------------------------------------------------------------------------------------


def interrupted_soup(paths, out):
    """Unfinished work of another command."""
    with pytest.MonkeyPatch.context() as patch:
        fail_to_publish(patch)
        with pytest.raises(DiskSpaceError):
            streamsoup.soup(paths, out)
    partial = Path(f"{out}.partial")
    assert partial.exists()
    return partial


def test_unfinished_work_of_another_command_is_not_thrown_away(paths, module, tmp_path):
    """Also when the work folder holds a state, and when it appears while it is learned."""
    out, work = tmp_path / "soup", tmp_path / "work"
    learn(paths, module, workdir=work)
    partial = interrupted_soup(paths, out)
    before = everything(partial)
    with pytest.raises(ResumeError, match="unfinished work"):
        learn(paths, module, out, workdir=work)
    assert everything(partial) == before

    def interfere(record):
        if record.step == 2:
            interrupted_soup(paths, tmp_path / "other")

    with pytest.raises(ResumeError, match="unfinished work"):
        learn(paths, module, tmp_path / "other", on_step=interfere)
    streamsoup.resume(out)
    assert not (out / "learned.json").exists()


@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_what_resume_publishes_is_the_learned_soup(paths, module, tmp_path, out):
    """It is what the message advises: learned.json is there, and learning takes the soup for its own."""
    place, work = tmp_path / out, tmp_path / "work"
    with pytest.MonkeyPatch.context() as patch:
        fail_to_publish(patch)
        with pytest.raises(DiskSpaceError) as caught:
            learn(paths, module, place, workdir=work)
    assert any("soup --resume" in note for note in caught.value.__notes__)
    streamsoup.resume(place)
    beside = place / "learned.json" if out == "soup" else tmp_path / "soup.learned.json"
    learned = json.loads(beside.read_text())
    result = learn(paths, module, place, workdir=work)
    assert learned["coefficients"] == {"model": result.coefficients[0].tolist()}
    assert same_bits(read_checkpoint(place), {n: t.numpy() for n, t in module.state_dict().items()})


def test_resume_refuses_ingredients_that_are_not_what_was_learned_from(paths, module, tmp_path):
    out = tmp_path / "soup"
    with pytest.MonkeyPatch.context() as patch:
        fail_to_publish(patch)
        with pytest.raises(DiskSpaceError):
            learn(paths, module, out)
    job = tmp_path / "soup.partial" / "job.json"
    document = json.loads(job.read_text())
    document["extras"]["content_digests"][1] = "0" * 32
    job.write_text(json.dumps(document))
    with pytest.raises(ChangedIngredientError, match="run2"):
        streamsoup.resume(out)
    assert not out.exists()


# -- what was learned ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DiskSpaceError("full"), KeyboardInterrupt(), RuntimeError("bad")], ids=repr)
def test_what_was_learned_survives_where_the_soup_cannot_be_written(paths, module, tmp_path, error):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "cook", lambda *_: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)) as caught:
            learn(paths, module, tmp_path / "soup", by="layer")
    assert any("`learned`" in note for note in caught.value.__notes__)
    found = caught.value.learned
    assert found.path is None
    assert found.coefficients.tobytes() == learn(paths, module, by="layer").coefficients.tobytes()
    assert len(found.steps) == 3


# -- the work folder -----------------------------------------------------------------------------------------------


def test_an_error_before_the_first_step_leaves_no_work_folder(paths, module, tmp_path):
    def loss_fn(logits, targets):
        raise KeyError("labels")

    with pytest.raises(KeyError):
        streamsoup.learn(paths, module, loss_fn, make_batches(3), tmp_path / "soup", workdir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_work_folder_that_is_not_kept_goes_while_it_is_held(paths, module, tmp_path, monkeypatch):
    work = tmp_path / "work"
    held = []
    real = Path.unlink

    def unlink(path, missing_ok=False):
        if path.parent == work and path.exists():
            with pytest.raises(ResumeError, match="another process"):
                learn(paths, module, workdir=work)
            held.append(path.name)
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    learn(paths, module, tmp_path / "soup", workdir=work, keep_workdir=False)
    assert held[-1] == "learn.json", "by which the soup is known goes last"
    assert not work.exists()
    monkeypatch.undo()

    def put(record):
        (work / "notes.txt").write_text("mine")

    learn(paths, module, tmp_path / "other", workdir=work, keep_workdir=False, on_step=put)
    assert [p.name for p in work.iterdir()] == ["notes.txt"]


def test_the_work_folder_is_kept_when_publishing_fails(paths, module, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        fail_to_publish(patch)
        with pytest.raises(StreamsoupError):
            learn(paths, module, tmp_path / "soup", workdir=tmp_path / "work", keep_workdir=False)
    steps = []
    learn(paths, module, tmp_path / "soup", workdir=tmp_path / "work", keep_workdir=False, on_step=steps.append)
    assert not steps
    assert not (tmp_path / "work").exists()


def test_killed_while_the_work_folder_is_cleared_it_ends_well(paths, module, tmp_path):
    """The soup is in its place, the state is gone and the job is not."""
    out, work = tmp_path / "soup", tmp_path / "work"
    learn(paths, module, out, workdir=work)
    (work / "state.safetensors").unlink()
    before = weights_bytes(out)
    assert learn(paths, module, out, workdir=work, keep_workdir=False).path == out
    assert weights_bytes(out) == before
    assert not work.exists()
