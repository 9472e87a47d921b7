"""Where a soup may go, how it takes its place, and what is left beside it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import pytest
from factory import fine_tunes, read_checkpoint, same_bits, weights_bytes

import streamsoup
from streamsoup.errors import (
    ChangedIngredientError,
    DestinationError,
    IngredientReadError,
    ResumeError,
)
from streamsoup.journal import Journal
from streamsoup.workspace import Workspace, destination_of

RESUME = streamsoup.Execution()


@pytest.fixture
def runs(tmp_path):
    return fine_tunes(tmp_path / "runs", 3)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


class BoomError(Exception):
    """A failure of our own making."""


def break_at(monkeypatch, what="streamsoup.workspace.Workspace.publish"):
    """Let a run fail once, at its very end."""

    def fail(*_args, **_options):
        raise BoomError

    monkeypatch.setattr(what, fail)


def interrupt(monkeypatch, runs, out, **options):
    """Leave an unfinished soup."""
    with monkeypatch.context() as patch:
        break_at(patch)
        with pytest.raises(BoomError) as caught:
            streamsoup.soup(runs, out, **options)
    return caught.value


# -- the destination ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link", "link to a folder"])
@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_an_existing_destination_is_refused_and_left_as_it_is(tmp_path, runs, kind, out):
    target = tmp_path / out
    if kind == "folder":
        target.mkdir()
        (target / "precious").write_text("x")
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("x")
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    with pytest.raises(DestinationError, match=r"exists already.*--overwrite"):
        streamsoup.soup(runs, target)
    assert names(tmp_path) == before


def test_overwrite_replaces_a_soup_and_leaves_nothing_of_the_old(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup", shard_size=3000)
    streamsoup.soup(runs[:2], tmp_path / "soup", overwrite=True)
    streamsoup.soup(runs[:2], tmp_path / "fresh")
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "fresh")
    assert names(tmp_path / "soup") == names(tmp_path / "fresh")
    assert names(tmp_path) == ["fresh", "runs", "soup"]


def test_overwrite_replaces_a_file(tmp_path, runs):
    out = tmp_path / "x.safetensors"
    streamsoup.soup(runs, out)
    streamsoup.soup(runs[:2], out, overwrite=True)
    streamsoup.soup(runs[:2], tmp_path / "fresh")
    assert same_bits(read_checkpoint(out), read_checkpoint(tmp_path / "fresh"))


def test_overwrite_refuses_a_folder_that_is_no_soup(tmp_path, runs):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("x")
    with pytest.raises(DestinationError, match=r"streamsoup\.json.*no soup of ours"):
        streamsoup.soup(runs, tmp_path / "thesis", overwrite=True)
    assert names(tmp_path) == ["runs", "thesis"]
    assert names(tmp_path / "thesis") == ["chapter1"]


def test_overwrite_does_not_replace_a_folder_by_a_file_nor_a_file_by_a_folder(tmp_path, runs):
    (tmp_path / "soup").write_text("x")
    (tmp_path / "soup.safetensors").mkdir()
    for out in ("soup", "soup.safetensors"):
        with pytest.raises(DestinationError, match="other kind"):
            streamsoup.soup(runs, tmp_path / out, overwrite=True)


@pytest.mark.parametrize("exchange", [True, False])
def test_the_old_soup_stands_until_the_new_one_does(tmp_path, runs, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("streamsoup.write._renameat2", lambda *_: False)
    streamsoup.soup(runs, tmp_path / "soup")
    old = weights_bytes(tmp_path / "soup")
    interrupt(monkeypatch, runs[:2], tmp_path / "soup", overwrite=True)
    assert weights_bytes(tmp_path / "soup") == old
    streamsoup.resume(tmp_path / "soup", RESUME)
    streamsoup.soup(runs[:2], tmp_path / "fresh")
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "fresh")
    assert names(tmp_path) == ["fresh", "runs", "soup"]


def test_without_exchange_the_old_soup_comes_back_when_the_new_one_cannot_be_moved(tmp_path, runs, monkeypatch):
    streamsoup.soup(runs, tmp_path / "soup")
    old = weights_bytes(tmp_path / "soup")
    monkeypatch.setattr("streamsoup.write._renameat2", lambda *_: False)
    rename = os.rename

    def only_the_old(source, destination):
        if ".partial" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", only_the_old)
    with pytest.raises(DestinationError):
        streamsoup.soup(runs[:2], tmp_path / "soup", overwrite=True)
    assert weights_bytes(tmp_path / "soup") == old


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path, runs, monkeypatch):
    from streamsoup.engine import Engine

    run = Engine.run

    def run_and_make(self, tiles):
        (tmp_path / "soup").mkdir(exist_ok=True)
        (tmp_path / "soup" / "theirs").write_text("x")
        return run(self, tiles)

    monkeypatch.setattr(Engine, "run", run_and_make)
    with pytest.raises(DestinationError, match="appeared"):
        streamsoup.soup(runs, tmp_path / "soup")
    assert names(tmp_path / "soup") == ["theirs"]


@pytest.mark.parametrize("out", ["run1", "run1/soup", "run1/deep/er", ".", "run1.safetensors/x", "link", "link/soup"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_that_is_contains_or_lies_inside_an_ingredient_is_refused(
    tmp_path, runs, monkeypatch, out, overwrite
):
    runs_folder = tmp_path / "runs"
    (runs_folder / "link").symlink_to(runs_folder / "run2")
    monkeypatch.chdir(runs_folder)
    before = {str(p): p.stat().st_mtime_ns for p in runs_folder.rglob("*.safetensors")}
    ingredients = ["run1", "run2"]
    if out.startswith("run1.safetensors"):
        (runs_folder / "run1.safetensors").write_bytes((runs_folder / "run1" / "model.safetensors").read_bytes())
        ingredients = ["run1.safetensors", "run2"]
        before = {str(p): p.stat().st_mtime_ns for p in runs_folder.rglob("*.safetensors")}
    with pytest.raises(DestinationError):
        streamsoup.soup(ingredients, out, overwrite=overwrite)
    assert {str(p): p.stat().st_mtime_ns for p in runs_folder.rglob("*.safetensors")} == before
    assert not list(runs_folder.rglob("*.partial"))


def test_a_soup_among_its_ingredients_cannot_be_overwritten(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    with pytest.raises(DestinationError, match="is the ingredient"):
        streamsoup.soup([tmp_path / "soup", *runs], tmp_path / "soup", overwrite=True)


def test_an_ingredient_behind_symlinked_shards_is_protected_too(tmp_path, runs):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (tmp_path / "runs" / "run1" / "model.safetensors").rename(blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    with pytest.raises(DestinationError, match=r"lies inside|is the|contains"):
        streamsoup.soup([snapshot, runs[1]], blobs / "abc", overwrite=True)
    streamsoup.soup([snapshot, runs[1]], tmp_path / "soup")
    assert (tmp_path / "soup" / "model.safetensors").is_file()
    assert not (tmp_path / "soup" / "model.safetensors").is_symlink()


def test_files_beside_a_single_file_soup_do_not_replace_someone_elses(tmp_path, runs):
    (tmp_path / "x.recipe.yaml").write_text("precious")
    with pytest.raises(DestinationError):
        streamsoup.soup(runs, tmp_path / "x.safetensors")
    assert (tmp_path / "x.recipe.yaml").read_text() == "precious"


@pytest.mark.parametrize("out", ["/", ""])
def test_roots_and_nothing_are_refused(tmp_path, runs, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(streamsoup.StreamsoupError):
        streamsoup.soup(runs, out)
    assert names(tmp_path) == ["runs"]
    assert not list(tmp_path.parent.glob("*.partial"))


def test_parents_of_the_destination_are_made(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "a" / "b" / "soup")
    assert names(tmp_path / "a" / "b") == ["soup"]


def test_parents_made_for_a_refused_run_are_not_left(tmp_path, runs):
    with pytest.raises(streamsoup.StreamsoupError):
        streamsoup.soup(runs, tmp_path / "a" / "b" / "soup", budget_bytes=1)
    assert names(tmp_path) == ["runs"]


def test_a_parent_that_is_a_file_is_a_sentence(tmp_path, runs):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="file"):
        streamsoup.soup(runs, tmp_path / "file" / "soup")


# -- unfinished work ---------------------------------------------------------------------------------------------


def test_a_failure_keeps_the_work_and_names_it(tmp_path, runs, monkeypatch):
    error = interrupt(monkeypatch, runs, tmp_path / "soup")
    assert names(tmp_path) == ["runs", "soup.partial"]
    (note,) = error.__notes__
    assert str(tmp_path / "soup.partial") in note
    assert f"streamsoup soup --resume {tmp_path / 'soup'}" in note


@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_no_keep_leaves_nothing(tmp_path, runs, monkeypatch, out):
    break_at(monkeypatch)
    with pytest.raises(BoomError):
        streamsoup.soup(runs, tmp_path / out, keep=False)
    assert names(tmp_path) == ["runs"]


def test_a_second_run_is_refused_where_unfinished_work_lies(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    with pytest.raises(ResumeError, match=r"unfinished work.*--resume.*--restart"):
        streamsoup.soup(runs, tmp_path / "soup")
    assert names(tmp_path) == ["runs", "soup.partial"]


def test_restart_throws_unfinished_work_away(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    result = streamsoup.soup(runs[:2], tmp_path / "soup", restart=True)
    streamsoup.soup(runs[:2], tmp_path / "fresh")
    assert result.bytes_read > 0
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "fresh")
    assert names(tmp_path) == ["fresh", "runs", "soup"]


@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_resume_ends_with_the_same_bits_and_reads_only_what_is_missing(tmp_path, runs, monkeypatch, out):
    interrupt(monkeypatch, runs, tmp_path / out, weights=[1, 2, 3], shard_size=3000)
    result = streamsoup.resume(tmp_path / out, streamsoup.Execution(workers=3, read_mode="plain"))
    assert result.bytes_read == 0
    streamsoup.soup(runs, tmp_path / f"fresh{out}", weights=[1, 2, 3], shard_size=3000)
    fresh = weights_bytes(tmp_path / f"fresh{out}")
    assert list(weights_bytes(tmp_path / out).values()) == list(fresh.values())
    assert not (tmp_path / f"{out}.partial").exists()


def test_work_begun_with_relative_paths_is_resumed_from_another_folder(tmp_path, runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupt(monkeypatch, [os.path.relpath(run) for run in runs], "soup")
    monkeypatch.chdir("/")
    streamsoup.resume(tmp_path / "soup")
    streamsoup.soup(runs, tmp_path / "fresh")
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "fresh")


def test_a_soup_that_stands_is_told_of_without_its_ingredients(tmp_path, runs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.workspace.Workspace.remove", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamsoup.soup(runs, tmp_path / "soup")
    shutil.rmtree(runs[0])
    result = streamsoup.resume(tmp_path / "soup")
    assert result.path == tmp_path / "soup"
    assert (result.ingredients, result.bytes_read) == (3, 0)
    assert result.parameters > 0
    assert not (tmp_path / "soup.partial").exists()


def test_a_folder_with_a_journal_is_never_taken_for_rubbish(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    (tmp_path / "soup.partial" / "job.json").unlink()
    with pytest.raises(ResumeError, match="--restart"):
        streamsoup.soup(runs, tmp_path / "soup")
    with pytest.raises(ResumeError, match="--restart"):
        streamsoup.resume(tmp_path / "soup")
    assert (tmp_path / "soup.partial" / "journal").stat().st_size


def test_whether_a_workspace_is_held_is_asked_without_taking_it(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    one, other = (Workspace(destination_of(tmp_path / "soup")) for _ in range(2))
    assert not one.is_held
    other.hold()
    assert one.is_held
    other.release()
    assert not one.is_held


def test_resume_on_the_other_backend_ends_with_the_same_bits(tmp_path, monkeypatch):
    from factory import realistic, write_checkpoint

    shapes = {f"w{i}": (30_000,) for i in range(8)}
    paths = [write_checkpoint(tmp_path / f"r{i}", realistic(i, shapes)) for i in range(2)]
    appended = Journal.append

    def append_half(self, records):
        appended(self, records[: len(records) // 2])
        raise BoomError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append_half)
        with pytest.raises(BoomError):
            streamsoup.soup(paths, tmp_path / "soup")
    result = streamsoup.resume(tmp_path / "soup", streamsoup.Execution(device="torch:cpu"))
    assert 0 < result.bytes_read < 2 * 8 * 60_000
    streamsoup.soup(paths, tmp_path / "fresh")
    assert weights_bytes(tmp_path / "soup") == weights_bytes(tmp_path / "fresh")
    assert result.content_digests == tuple(
        i["content_digest"] for i in json.loads((tmp_path / "fresh" / "streamsoup.json").read_text())["ingredients"]
    )


def test_nothing_to_resume_is_a_sentence(tmp_path):
    with pytest.raises(ResumeError, match="no unfinished work"):
        streamsoup.resume(tmp_path / "soup", RESUME)


@pytest.mark.parametrize("job", ["", "{", "[]", "null", '"x"', '{"job": 99}', '{"job": 1}'])
def test_unreadable_unfinished_work_is_a_sentence(tmp_path, runs, monkeypatch, job):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    (tmp_path / "soup.partial" / "job.json").write_text(job)
    with pytest.raises(ResumeError, match="--restart"):
        streamsoup.resume(tmp_path / "soup", RESUME)


@contextlib.contextmanager
def at_work_on(out):
    """Be the other process."""
    workspace = Workspace(destination_of(out))
    workspace.hold()
    yield
    workspace.release()


def test_another_run_at_work_on_the_same_place_is_refused(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    with at_work_on(tmp_path / "soup"):
        with pytest.raises(ResumeError, match="another process"):
            streamsoup.resume(tmp_path / "soup", RESUME)
        assert (tmp_path / "soup.partial" / "job.json").exists(), "the other process still needs it"
    streamsoup.resume(tmp_path / "soup", RESUME)


@pytest.mark.parametrize("action", ["resume with no keep", "restart"])
def test_the_work_of_a_running_process_is_never_removed(tmp_path, runs, monkeypatch, action):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    begin = {
        "restart": lambda: streamsoup.soup(runs, tmp_path / "soup", restart=True),
        "resume with no keep": lambda: streamsoup.resume(tmp_path / "soup", streamsoup.Execution(keep=False)),
    }[action]
    with at_work_on(tmp_path / "soup"), pytest.raises(ResumeError):
        begin()
    assert (tmp_path / "soup.partial" / "job.json").exists()


# -- identity on resume ------------------------------------------------------------------------------------------


def test_a_change_of_data_alone_is_noticed_though_size_and_time_are_restored(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    path = tmp_path / "runs" / "run2" / "model.safetensors"
    other = tmp_path / "runs" / "run3" / "model.safetensors"
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(ChangedIngredientError, match=r"run2.*data changed"):
        streamsoup.resume(tmp_path / "soup", RESUME)
    assert (tmp_path / "soup.partial").exists()


def test_one_changed_tensor_among_many_is_noticed(tmp_path, monkeypatch):
    import numpy as np
    from factory import realistic, write_checkpoint

    shapes = {f"w{i}": (700,) for i in range(40)}
    paths = [write_checkpoint(tmp_path / f"r{i}", realistic(i, shapes)) for i in range(2)]
    interrupt(monkeypatch, paths, tmp_path / "soup")
    path = paths[1] / "model.safetensors"
    before, tensors = path.stat(), dict(read_checkpoint(paths[1]))
    tensors["w17"] = np.roll(tensors["w17"], 1)
    write_checkpoint(paths[1], tensors)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChangedIngredientError, match="r1"):
        streamsoup.resume(tmp_path / "soup", RESUME)


def test_a_copy_with_the_same_bytes_passes(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    path = tmp_path / "runs" / "run2" / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw)
    streamsoup.resume(tmp_path / "soup", RESUME)


def test_an_ingredient_of_another_shape_is_refused_on_resume(tmp_path, runs, monkeypatch):
    from factory import realistic, write_checkpoint

    interrupt(monkeypatch, runs, tmp_path / "soup")
    for i in range(3):
        write_checkpoint(tmp_path / "runs" / f"run{i + 1}", realistic(i, {"other": (3,)}))
    with pytest.raises(ChangedIngredientError, match="other names or shapes"):
        streamsoup.resume(tmp_path / "soup", RESUME)


def test_a_vanished_ingredient_is_a_sentence_and_the_work_is_kept(tmp_path, runs, monkeypatch):
    interrupt(monkeypatch, runs, tmp_path / "soup")
    (tmp_path / "runs" / "run2" / "model.safetensors").unlink()
    with pytest.raises(streamsoup.StreamsoupError, match="run2"):
        streamsoup.resume(tmp_path / "soup", RESUME)
    assert (tmp_path / "soup.partial" / "job.json").exists()


@pytest.mark.parametrize("read_mode", ["map", "plain"])
def test_an_ingredient_that_vanishes_before_it_is_opened_is_a_sentence(tmp_path, runs, monkeypatch, read_mode):
    from streamsoup import cook

    identify = cook.identify

    def identify_and_remove(checkpoint):
        found = identify(checkpoint)
        if "run3" in checkpoint.path:
            os.unlink(checkpoint.shards[0].path)
        return found

    monkeypatch.setattr(cook, "identify", identify_and_remove)
    with pytest.raises(IngredientReadError, match=r"run3.*cannot be read"):
        streamsoup.soup(runs, tmp_path / "soup", read_mode=read_mode)
    assert not (tmp_path / "soup").exists()


def test_an_ingredient_that_shrinks_under_plain_reads_is_a_sentence(tmp_path, runs, monkeypatch):
    from streamsoup import cook

    identify = cook.identify

    def identify_and_truncate(checkpoint):
        found = identify(checkpoint)
        if "run3" in checkpoint.path:
            os.truncate(checkpoint.shards[0].path, checkpoint.shards[0].size_bytes - 50)
        return found

    monkeypatch.setattr(cook, "identify", identify_and_truncate)
    with pytest.raises(IngredientReadError, match=r"run3.*ends at byte"):
        streamsoup.soup(runs, tmp_path / "soup", read_mode="plain")
    assert not (tmp_path / "soup").exists()
