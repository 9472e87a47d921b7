"""`-9` at many points, Ctrl-C, a full disk, files that vanish: the destination is whole or not there, and resuming
ends with the same bits."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dying import serving
from factory import fine_tunes, read_checkpoint, realistic, weights_bytes, write_checkpoint, write_sparse

import streamsoup
from streamsoup.errors import DiskSpaceError, ResumeError

DRIVER = Path(__file__).resolve().parent / "crash_driver.py"
SHAPES = {f"layer.{i}.weight": (30_000 + i,) for i in range(12)} | {"norm": (7,)}
OPTIONS = {"weights": [1.0, 2.0, 3.0], "shard_size": "300kB", "budget_bytes": "40MiB", "read_mode": "plain"}

KILLS = [
    *(("tile", n, before) for n in (1, 2, 5, 9, 13) for before in (False, True)),
    *(("sync", n, False) for n in (1, 2)),
    *(("journal", n, before) for n in (1, 2, 3) for before in (False, True)),
    ("workspace", 1, False),
    ("job", 1, True),
    ("job", 1, False),
    ("shards reserved", 1, False),
    *(("pwrite", n, before) for n in (1, 2, 3, 4, 11) for before in (False, True)),
    *(("fsync", n, False) for n in (1, 2, 4, 6)),
    *(("side file", n, before) for n in (1, 2, 4) for before in (False, True)),
    *(("replace", n, before) for n in (1, 2, 3) for before in (False, True)),
    ("publish", 1, True),
    ("renameat2", 1, True),
    ("renameat2", 1, False),
    *(("unlink", n, False) for n in (1, 2)),
    ("rmdir", 1, True),
    ("workspace removed", 1, True),
    ("workspace removed", 1, False),
]


@pytest.fixture(scope="module")
def drive():
    """Runs a job of `crash_driver.py`, and returns whether it was killed; anything but a kill or success is a fault."""
    with serving(DRIVER) as ask:

        def drive(**job: object) -> bool:
            answer = ask(job)
            assert answer["code"] in (-signal.SIGKILL, 0), answer["errors"]
            return answer["code"] != 0

        yield drive


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Three ingredients, an old soup's bits, and the bits of the uninterrupted new one."""
    folder = tmp_path_factory.mktemp("kitchen")
    runs = [str(write_checkpoint(folder / f"run{i}", realistic(i, SHAPES))) for i in range(3)]
    streamsoup.soup(runs, folder / "new", **OPTIONS)
    streamsoup.soup(runs[:2], folder / "old", shard_size="100kB")
    streamsoup.soup(runs, folder / "new.safetensors", **OPTIONS)
    streamsoup.soup(runs[:2], folder / "old.safetensors")
    bits = {name: weights_bytes(folder / name) for name in ("new", "old")}
    bits["new.file"] = list(weights_bytes(folder / "new.safetensors").values())
    bits["old.file"] = list(weights_bytes(folder / "old.safetensors").values())
    return runs, bits


def assert_whole_or_absent(out: Path, *allowed: dict[str, bytes]) -> bool:
    """The destination is one of the allowed soups, complete with all side files, or not there at all."""
    if not os.path.lexists(out):
        return False
    assert weights_bytes(out) in allowed
    assert {"streamsoup.json", "recipe.yaml", "README.md"} <= {p.name for p in out.iterdir()}
    json.loads((out / "streamsoup.json").read_text())
    return True


def finish(runs: list[str], out: Path) -> None:
    """Do what a person would do: resume, or begin again where nothing had been begun or all was done."""
    partial = out.with_name(f"{out.name}.partial")
    if (partial / "job.json").exists():
        streamsoup.resume(out, streamsoup.Execution(workers=2))
    elif partial.exists():  # it died while making or removing the folder: resume must not claim to have done anything
        with pytest.raises(ResumeError, match="no unfinished work"):
            streamsoup.resume(out, streamsoup.Execution(workers=2))
    if not out.exists():
        streamsoup.soup(runs, out, **OPTIONS)
    assert not partial.exists()


@pytest.mark.parametrize(("point", "number", "before"), KILLS)
def test_killed_anywhere_the_destination_is_not_half_made_and_resume_gives_the_same_bits(
    kitchen, drive, tmp_path, point, number, before
):
    runs, bits = kitchen
    out = tmp_path / "soup"
    killed = drive(ingredients=runs, out=str(out), options=OPTIONS, point=point, number=number, before=before)
    assert killed or out.exists()
    assert_whole_or_absent(out, bits["new"])
    finish(runs, out)
    assert weights_bytes(out) == bits["new"]
    assert {p.name for p in tmp_path.iterdir()} == {"soup"}


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(
    ("point", "number", "before"),
    [
        ("tile", 5, False),
        ("journal", 1, False),
        ("publish", 1, True),
        ("renameat2", 1, True),
        ("renameat2", 1, False),
        ("rename", 1, True),
        ("rename", 1, False),
        ("rename", 2, False),
        ("unlink", 1, False),
        ("unlink", 3, False),
        ("rmdir", 1, True),
        ("rmdir", 1, False),
        ("workspace removed", 1, True),
    ],
)
def test_killed_while_overwriting_the_old_soup_is_never_lost(kitchen, drive, tmp_path, point, number, before, exchange):
    runs, bits = kitchen
    out = tmp_path / "soup"
    streamsoup.soup(runs[:2], out, shard_size="100kB")
    drive(
        ingredients=runs, out=str(out), options={**OPTIONS, "overwrite": True}, point=point, number=number,
        before=before, no_exchange=not exchange,
    )  # fmt: skip
    if not assert_whole_or_absent(out, bits["old"], bits["new"]):
        assert not exchange, "with an exchange there is no moment without a soup"
        kept = [p for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith("soup.old")]
        assert [weights_bytes(p) for p in kept] == [bits["old"]]
    if (tmp_path / "soup.partial" / "job.json").exists():
        streamsoup.resume(out, streamsoup.Execution())
    elif weights_bytes(out) != bits["new"]:
        streamsoup.soup(runs, out, overwrite=True, restart=True, **OPTIONS)
    assert weights_bytes(out) == bits["new"]
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"soup"} or (not exchange and all(n.startswith("soup") for n in left))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("point", "number", "before"),
    [("tile", 3, False), ("replace", 3, False), ("replace", 4, False), ("replace", 5, False), ("publish", 1, True),
     ("renameat2", 1, True), ("renameat2", 1, False), ("workspace removed", 1, True)],
)  # fmt: skip
def test_killed_single_file_soups_are_whole_or_absent_and_resume(
    kitchen, drive, tmp_path, point, number, before, overwrite
):
    runs, bits = kitchen
    out = tmp_path / "soup.safetensors"
    if overwrite:
        streamsoup.soup(runs[:2], out)
    options = {**OPTIONS, "overwrite": overwrite}
    drive(ingredients=runs, out=str(out), options=options, point=point, number=number, before=before)
    if out.exists():
        assert list(weights_bytes(out).values()) in ([bits["old.file"]] if overwrite else []) + [bits["new.file"]]
    else:
        assert not overwrite
    if (tmp_path / "soup.safetensors.partial" / "job.json").exists():
        streamsoup.resume(out, streamsoup.Execution())
    assert list(weights_bytes(out).values()) == bits["new.file"]
    assert {p.name for p in tmp_path.iterdir()} == {"soup.safetensors", "soup.recipe.yaml", "soup.streamsoup.json"}
    manifest = json.loads((tmp_path / "soup.streamsoup.json").read_text())
    assert [i["weight"] for i in manifest["ingredients"]] == [1.0, 2.0, 3.0]


def test_killed_while_resuming_again_and_again_it_ends_with_the_same_bits(kitchen, drive, tmp_path):
    runs, bits = kitchen
    out = tmp_path / "soup"
    assert drive(ingredients=runs, out=str(out), options=OPTIONS, point="journal", number=1)
    for point, number in (("tile", 1), ("tile", 2), ("journal", 1), ("fsync", 1), ("side file", 2), ("publish", 1)):
        if not (tmp_path / "soup.partial" / "job.json").exists():
            break
        drive(out=str(out), resume=True, point=point, number=number, before=point == "publish")
        assert_whole_or_absent(out, bits["new"])
    finish(runs, out)
    assert weights_bytes(out) == bits["new"]
    fresh = tmp_path / "fresh"
    streamsoup.soup(runs, fresh, **OPTIONS)
    assert [i["content_digest"] for i in json.loads((out / "streamsoup.json").read_text())["ingredients"]] == [
        i["content_digest"] for i in json.loads((fresh / "streamsoup.json").read_text())["ingredients"]
    ]


def test_killed_at_random_moments_resume_gives_the_same_bits(kitchen, tmp_path):
    """The command line itself: parent and child die together or the parent says so; either way nothing is half-made."""
    runs, bits = kitchen
    chance = random.Random(4)
    for trial in range(8):
        out = tmp_path / f"soup{trial}"
        weighted = [f"{run}:{weight}" for run, weight in zip(runs, (1, 2, 3), strict=True)]
        command = [sys.executable, "-m", "streamsoup", "soup", *weighted, "-o",
                   str(out), "--shard-size", "300kB", "--budget", "40MiB", "--read", "plain"]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (tmp_path / f"soup{trial}.partial").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.25)
        child = _child(process)
        process.kill()
        process.wait()
        _await_death(child)
        assert_whole_or_absent(out, bits["new"])
        finish(runs, out)
        assert weights_bytes(out) == bits["new"]


def _await_death(child: int | None) -> None:
    """The guarded child dies with its parent, but not in the same instant."""
    deadline = time.monotonic() + 20
    while child is not None and _lives(child):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.01)


def _lives(process: int) -> bool:
    """Whether it may still hold files: a dead leader stays a zombie until its last thread is gone."""
    try:
        zombie = "State:\tZ" in Path(f"/proc/{process}/status").read_text()
        return not zombie or len(os.listdir(f"/proc/{process}/task")) > 1
    except OSError:
        return False


# -- Ctrl-C and other signals ------------------------------------------------------------------------------------


@pytest.fixture
def slow_runs(tmp_path):
    """One file of holes, many times over: a run that lasts long enough to be interrupted, and writes little."""
    path = write_sparse(tmp_path / "big.safetensors", {f"w{i}": ("F32", (5_000_000,)) for i in range(8)})
    return [str(path)] * 24


def start(out: Path, runs: list[str], *options: str, mode: str = "plain", **more) -> subprocess.Popen[str]:
    """Start the command line, and wait until it has finished some tiles."""
    process = subprocess.Popen(
        [sys.executable, "-m", "streamsoup", "soup", *runs, "-o", str(out), "--read", mode, "--threads", "1",
         "--as-given", "--budget", "32MiB", *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while _bytes_read(_child(process), mode) < 150_000_000:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def _child(process: subprocess.Popen[str]) -> int | None:
    """The process in which a command does its work."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _bytes_read(child: int | None, mode: str) -> int:
    file, label, unit = ("io", "rchar:", 1) if mode == "plain" else ("status", "RssFile:", 1024)
    try:
        lines = Path(f"/proc/{child}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((unit * int(line.split()[1]) for line in lines if line.startswith(label)), 0)


@pytest.mark.parametrize("whole_group", [False, True])
def test_ctrl_c_exits_130_and_names_the_partial_folder(tmp_path, slow_runs, whole_group):
    out = tmp_path / "soup"
    process = start(out, slow_runs, start_new_session=True)
    if whole_group:  # a terminal signals both processes
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert f"{tmp_path / 'soup.partial'}" in err
    assert "--resume" in err
    assert not out.exists()
    assert (tmp_path / "soup.partial" / "job.json").exists()


def test_ctrl_c_with_no_keep_leaves_nothing(tmp_path, slow_runs):
    process = start(tmp_path / "soup", slow_runs, "--no-keep")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not list(tmp_path.glob("soup*"))


def test_sigterm_keeps_the_work_and_says_so(tmp_path, slow_runs):
    process = start(tmp_path / "soup", slow_runs)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert "soup.partial" in err


def test_the_work_ends_when_its_parent_is_killed(tmp_path, slow_runs):
    process = start(tmp_path / "soup", slow_runs)
    child = _child(process)
    process.kill()
    process.communicate()
    _await_death(child)
    assert not (tmp_path / "soup").exists(), "an orphan went on to the end"
    assert (tmp_path / "soup.partial" / "job.json").exists()


def test_a_killed_child_is_reported_by_its_parent(tmp_path, slow_runs):
    process = start(tmp_path / "soup", slow_runs)
    child = _child(process)
    assert child is not None
    os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "SIGKILL" in err
    assert "--resume" in err
    assert not (tmp_path / "soup").exists()


def test_an_ingredient_truncated_under_a_map_is_one_line_and_exit_code_1(tmp_path, slow_runs):
    out = tmp_path / "soup"
    process = start(out, slow_runs, mode="map")
    os.truncate(slow_runs[0], 4096)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert "SIGBUS" in err
    assert "soup.partial" in err
    assert not out.exists()


# -- power cuts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_every_file_and_name_is_durable_before_the_soup_takes_its_place(tmp_path, monkeypatch, out):
    """`-9` keeps what the kernel holds, a power cut does not: so the calls are watched, in their order."""
    runs = fine_tunes(tmp_path / "in", 2, companions={"config.json": "{}", "1_Pooling/config.json": "{}"})
    synced: set[tuple[int, int]] = set()
    published: dict[str, set[str]] = {}
    fsync, pwrite = os.fsync, os.pwrite

    def inode(path):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino

    def note_sync(fd):
        fsync(fd)
        synced.add(inode(f"/proc/self/fd/{fd}"))

    def note_write(fd, buffer, offset):
        synced.discard(inode(f"/proc/self/fd/{fd}"))
        return pwrite(fd, buffer, offset)

    def watch(name):
        move = getattr(workspace, name)

        def moved(source, destination, **options):
            inside = [source, *(source.rglob("*") if source.is_dir() else ())]
            published[name] = {p.name for p in inside if inode(p) not in synced}
            return move(source, destination, **options)

        monkeypatch.setattr(workspace, name, moved)

    from streamsoup import workspace

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "pwrite", note_write)
    for name in ("move_folder", "move_file"):
        watch(name)
    streamsoup.soup(runs, tmp_path / out)
    assert list(published.values()) == [set()]
    assert inode(tmp_path) in synced, "the name of the soup is durable too"


@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_without_durability_no_weight_is_waited_for_and_the_bits_are_the_same(tmp_path, monkeypatch, out):
    runs = fine_tunes(tmp_path / "in", 2)
    streamsoup.soup(runs, tmp_path / "durable.safetensors")
    waited = []
    fsync, fdatasync = os.fsync, os.fdatasync
    monkeypatch.setattr(os, "fsync", lambda fd: waited.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "fdatasync", lambda fd: waited.append(os.readlink(f"/proc/self/fd/{fd}")) or fdatasync(fd))
    streamsoup.soup(runs, tmp_path / out, durable=False)
    assert not [name for name in waited if name.endswith((".safetensors", "journal"))]
    made = tmp_path / out if out.endswith("rs") else tmp_path / out / "model.safetensors"
    assert made.read_bytes() == (tmp_path / "durable.safetensors").read_bytes()


@pytest.mark.parametrize("restarted", [False, True])
def test_what_was_begun_without_durability_is_resumed_only_before_the_machine_restarts(
    tmp_path, monkeypatch, restarted
):
    runs = fine_tunes(tmp_path / "in", 2)

    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.making.write_side_files", full)
        with pytest.raises(OSError, match="No space"):
            streamsoup.soup(runs, tmp_path / "soup", durable=False)
    if restarted:
        monkeypatch.setattr("streamsoup.cook.boot_id", lambda: "another start")
        with pytest.raises(ResumeError, match=r"machine has restarted.*--restart"):
            streamsoup.resume(tmp_path / "soup")
    else:
        streamsoup.resume(tmp_path / "soup")
        streamsoup.soup(runs, tmp_path / "whole")
        same = [tmp_path / name / "model.safetensors" for name in ("soup", "whole")]
        assert same[0].read_bytes() == same[1].read_bytes()


# -- a full disk -------------------------------------------------------------------------------------------------


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_too_full_to_reserve_the_output_is_a_sentence(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskSpaceError, match=r"disk is full.*resume"):
            streamsoup.soup(runs, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate", "fdatasync"])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_disk_that_fills_up_anywhere_is_a_sentence_and_the_work_can_go_on(
    kitchen, tmp_path, monkeypatch, call, after
):
    runs, bits = kitchen
    real, left = getattr(os, call), [after]

    def fills_up(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            full()
        return real(*args, **options)

    failed = False
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fills_up)
        try:
            streamsoup.soup(runs, tmp_path / "soup", **OPTIONS)
        except DiskSpaceError as error:
            failed = "full" in str(error)
    assert failed == (not (tmp_path / "soup").exists())
    finish(runs, tmp_path / "soup")
    assert weights_bytes(tmp_path / "soup") == bits["new"]


def test_no_keep_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 2)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskSpaceError):
        streamsoup.soup(runs, tmp_path / "soup", keep=False)
    assert {p.name for p in tmp_path.iterdir()} == {"run1", "run2"}


def test_a_companion_that_does_not_fit_is_a_sentence(tmp_path, monkeypatch):
    import shutil

    runs = fine_tunes(tmp_path, 2, companions={"tokenizer.json": "{}"})
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DiskSpaceError):
        streamsoup.soup(runs, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    assert read_checkpoint(tmp_path / "run1")


@pytest.mark.parametrize("name", ["soup", "soup.safetensors"])
def test_an_old_soup_is_never_taken_for_the_new_one(kitchen, tmp_path, monkeypatch, name):
    """A run that was to replace it died early: resuming makes the new soup, or says that there is no work."""
    runs, _ = kitchen
    out, partial = tmp_path / name, tmp_path / f"{name}.partial"
    streamsoup.soup(runs[:2], out)
    old = weights_bytes(out)
    (partial / "soup").mkdir(parents=True)  # killed between making the folder and writing the job
    with pytest.raises(ResumeError, match="no unfinished work"):
        streamsoup.resume(out, streamsoup.Execution())
    assert weights_bytes(out) == old
    assert not partial.exists()
    with monkeypatch.context() as patch:  # killed after writing the job, before the first file of the soup
        patch.setattr("streamsoup.making.Making.run", lambda self: os._exit(9))
        if not (child := os.fork()):
            streamsoup.soup(runs, out, overwrite=True)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (partial / "job.json").exists()
    streamsoup.resume(out, streamsoup.Execution())
    fresh = tmp_path / f"fresh-{name}"
    streamsoup.soup(runs, fresh)
    assert list(weights_bytes(out).values()) == list(weights_bytes(fresh).values())
    assert weights_bytes(out) != old
