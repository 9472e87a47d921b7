"""Learned soups where something is gone, half done or no plain value: what was wrong once."""

from __future__ import annotations

import pytest
import torch
from factory import read_checkpoint, same_bits
from learning_pools import Net, make_batches, stored_states, write_states
from torch.nn.functional import cross_entropy

import streamsoup
from streamsoup.errors import DestinationError, DiskSpaceError
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
