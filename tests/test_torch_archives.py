"""The archives that files of torch.save are: read in place, or refused in one sentence."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_checkpoints import (
    expected,
    held,
    open_one,
    refused,
    save,
    some_tensors,
)

from streamsoup.checkpoints.torch_file import open_torch_file
from streamsoup.errors import (
    CheckpointError,
    CheckpointNotFoundError,
)


def rewritten(source, target, change=lambda name, raw: raw, compression=zipfile.ZIP_STORED):
    """The same archive, written by another hand; entries that become None are left out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            raw = change(name, old.read(name))
            if raw is not None:
                new.writestr(name, raw)
    return target


@pytest.fixture
def run(tmp_path):
    return save(tmp_path / "run.pt", some_tensors(0))


def test_archives_of_any_hand_are_read(tmp_path, run):
    assert held(open_one(rewritten(run, tmp_path / "other.pt"))) == expected(some_tensors(0))


def test_a_large_archive_has_wide_offsets(tmp_path, run, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = rewritten(run, tmp_path / "wide.pt")
    assert b"PK\x06\x06" in path.read_bytes()
    monkeypatch.undo()
    assert held(open_one(path)) == expected(some_tensors(0))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_cannot_be_read_in_place(tmp_path, run):
    def renamed(name, new):
        return lambda old, raw: new if old.endswith(name) else raw

    deflated = rewritten(run, tmp_path / "deflated.pt", compression=zipfile.ZIP_DEFLATED)
    refused(deflated, "is compressed or encrypted")
    refused(rewritten(run, tmp_path / "big.pt", renamed("byteorder", b"big")), "big-endian")
    refused(rewritten(run, tmp_path / "gone.pt", renamed("data/0", None)), r"^layers\.0\.w: its numbers .* are missing")
    refused(rewritten(run, tmp_path / "short.pt", renamed("data/0", b"abc")), r"^layers\.0\.w: needs 84,000 bytes")
    refused(rewritten(run, tmp_path / "none.pt", renamed("data.pkl", None)), "not one that torch.save wrote")
    twice = rewritten(run, tmp_path / "twice.pt")
    with zipfile.ZipFile(twice, "a") as archive:
        archive.writestr("run/data/0", b"")
    refused(twice, "two entries of one name")


def test_a_script_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "run.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"run/{name}", b"\x80\x02}.")
    refused(tmp_path / "run.pt", "TorchScript archive")


def test_what_is_no_archive(tmp_path):
    old = save(tmp_path / "old.pt", some_tensors(0), _use_new_zipfile_serialization=False)
    refused(old, r'before PyTorch 1\.6.*torch\.save\(torch\.load\("old\.pt", weights_only=True\), "new\.pt"\)')
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(100))
    refused(tmp_path / "other.bin", "is not a file of torch.save")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "is not a file of torch.save")
    refused(tmp_path / "gone.pt", "no such file", CheckpointNotFoundError)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointNotFoundError):
        open_one(tmp_path / "folder.pt")


def test_a_file_cut_anywhere_is_refused(tmp_path, run):
    whole = Path(run).read_bytes()
    for size in [*range(1, 80, 7), *range(80, len(whole), len(whole) // 50), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refused(tmp_path / "cut.pt", "truncated|is not a file of")


def test_any_changed_byte_of_what_describes_it_is_read_or_refused(tmp_path):
    path = save(tmp_path / "run.pt", {"a": torch.ones(2)})
    whole = bytearray(Path(path).read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(600):
        changed = whole.copy()
        changed[rng.integers(len(whole))] = rng.integers(256)
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            checkpoint = open_torch_file(str(tmp_path / "changed.pt"))
        except CheckpointError:
            continue
        ends = checkpoint.table.begins + checkpoint.table.nbytes
        assert (ends <= len(whole)).all()
