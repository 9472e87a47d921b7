"""Learned soups where something is gone, half done or no plain value: what was wrong once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from factory import read_checkpoint, same_bits
from learning_pools import Net, make_batches, stored_states, write_states
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import streamsoup
from streamsoup.errors import DestinationError, DiskSpaceError, ResumeError
from streamsoup.files import lock_folder
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


def test_a_single_file_that_was_deleted_is_not_taken_to_be_there(paths, module, tmp_path):
    """Its manifest is still there: the call returned a path at which there was nothing."""
    out, work = tmp_path / "soup.safetensors", tmp_path / "work"
    learn(paths, module, out, workdir=work)
    out.unlink()
    with pytest.raises(DestinationError, match=r"soup\.streamsoup\.json: exists already"):
        learn(paths, module, out, workdir=work)
    learn(paths, module, out, workdir=work, overwrite=True)
    assert out.exists()


@pytest.mark.parametrize("how", ["learn", "resume"])
def test_a_soup_that_replaces_an_earlier_one_of_the_same_work_is_not_taken_for_it(paths, module, tmp_path, how):
    """Interrupted, and gone on with: what was unfinished was thrown away, and what was to be replaced left there."""
    out, work = tmp_path / "soup", tmp_path / "work"
    learn(paths, module, out, workdir=work)
    expected = read_checkpoint(out)
    (out / "model.safetensors").write_bytes(b"by hand")

    def publish(*_, **__):
        raise DiskSpaceError("the disk is full.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", publish)
        with pytest.raises(DiskSpaceError):
            learn(paths, module, out, workdir=work, overwrite=True)
    if how == "learn":
        learn(paths, module, out, workdir=work, overwrite=True)
    else:
        streamsoup.resume(out)
    assert same_bits(read_checkpoint(out), expected)


def test_a_soup_of_ingredients_that_changed_is_not_taken_for_the_one_in_its_place(paths, module, tmp_path):
    """The work folder was half cleared, so that only the job tells whose soup it is."""
    out, work = tmp_path / "soup", tmp_path / "work"
    learn(paths, module, out, workdir=work)
    (work / "state.safetensors").unlink()
    write_states(tmp_path / "runs", stored_states(module, 3, seed=5))
    before = read_checkpoint(out)
    with pytest.raises(DestinationError, match="exists already"):
        learn(paths, module, out, workdir=work)
    assert same_bits(read_checkpoint(out), before)


def test_held_out_batches_of_a_loader_leave_random_numbers_alone(paths, module):
    """To ask whether they can be begun anew by beginning them drew a number of the user's."""
    held_out = DataLoader(make_batches(2), batch_size=None)
    before = torch.get_rng_state()
    learn(paths, module, held_out=held_out)
    assert torch.equal(torch.get_rng_state(), before)


TASK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from learning_pools import Net, make_batches
from torch.nn.functional import cross_entropy

class task:
    module, loss = Net().double(), staticmethod(cross_entropy)
    batches, held_out = make_batches(3), iter(make_batches(2))
"""


def test_held_out_batches_of_a_task_that_go_through_once_are_refused_at_the_beginning(paths, tmp_path, cli):
    (tmp_path / "mine.py").write_text(TASK.format(tests=str(Path(__file__).parent)), encoding="utf-8")
    done = cli("learn", *paths, "--task", "mine:task", "-o", "soup")
    assert done.returncode == 1
    assert "only once" in done.stderr
    assert not (tmp_path / "soup.work").exists(), "no step was made"


class Scheduled(torch.optim.SGD):
    """Has an object among its settings."""

    def __init__(self, rows):
        super().__init__(rows, lr=torch.tensor(0.1, dtype=torch.float64))
        self.param_groups[0]["schedule"] = object()


def test_settings_of_an_optimizer_that_are_objects_do_not_depend_on_addresses(paths, module, tmp_path):
    def stop(record):
        raise KeyboardInterrupt

    kept = []  # so that no address is used again

    def make(rows):
        kept.append(Scheduled(rows))
        return kept[-1]

    with pytest.raises(KeyboardInterrupt):
        learn(paths, module, workdir=tmp_path / "work", optimizer=make, on_step=stop)
    assert len(learn(paths, module, workdir=tmp_path / "work", optimizer=make).steps) == 3


def test_the_work_folder_goes_before_another_process_may_have_it(paths, module, tmp_path, monkeypatch):
    work, real, refused = tmp_path / "work", Path.rmdir, []

    def rmdir(path):
        if path == work:
            with pytest.raises(ResumeError, match="another process"):
                os.close(lock_folder(work))
            refused.append(path)
        real(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    learn(paths, module, tmp_path / "soup", workdir=work, keep_workdir=False)
    assert refused == [work]
    assert not work.exists()
