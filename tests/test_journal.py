"""Journals: what was appended is read back, a torn tail is not."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.errors import DiskSpaceError
from streamsoup.journal import Journal, TileRecord


def record(tensor, **more):
    return TileRecord(tensor, 2048 * tensor, 100, np.array([tensor, 2**64 - 1, 7], np.uint64), **more)


def records():
    return [
        record(0),
        record(1, nonfinite=np.array([0, 3, 0])),
        record(2, overflowed=5),
        record(3, differs=np.array([False, False, True])),
    ]


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.tensor, a.start, a.elements, a.overflowed) == (b.tensor, b.start, b.elements, b.overflowed)
        np.testing.assert_array_equal(a.digests, b.digests)
        for x, y in ((a.nonfinite, b.nonfinite), (a.differs, b.differs)):
            assert (x is None) == (y is None)
            if x is not None:
                np.testing.assert_array_equal(x, y)


def test_what_was_appended_is_read_back(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        assert list(journal.read()) == []
        journal.append(records()[:2])
        journal.append([])
        journal.append(records()[2:])
        same(list(journal.read()), records())
    with Journal(tmp_path / "journal") as journal:
        same(list(journal.read()), records())


@given(cut=st.integers(0, 4000))
def test_a_torn_tail_is_cut_off_and_appending_goes_on_behind_it(tmp_path_factory, cut):
    path = tmp_path_factory.getbasetemp() / "torn"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        journal.append(records()[:2])
        whole = path.stat().st_size
        journal.append(records()[2:])
    raw = path.read_bytes()
    path.write_bytes(raw[: min(cut, len(raw))])
    with Journal(path) as journal:
        found = list(journal.read())
        kept = 4 if cut >= len(raw) else 2 if cut >= whole else 0
        same(found, records()[:kept])
        journal.append(records()[:1])
        same(list(journal.read()), [*records()[:kept], record(0)])


@given(place=st.integers(0, 3000), byte=st.integers(1, 255))
def test_a_damaged_frame_ends_the_journal_and_never_lies(tmp_path_factory, place, byte):
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.unlink(missing_ok=True)
    with Journal(path) as journal:
        for one in records():
            journal.append([one])
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= byte
    path.write_bytes(bytes(raw))
    with Journal(path) as journal:
        found = list(journal.read())
    same(found, records()[: len(found)])
    assert len(found) < 4


def test_zeros_after_a_power_cut_are_no_records(tmp_path):
    path = tmp_path / "journal"
    with Journal(path) as journal:
        journal.append(records())
    with open(path, "ab") as file:
        file.write(bytes(4096))
    with Journal(path) as journal:
        same(list(journal.read()), records())


@pytest.mark.parametrize("step", [1, 3, 50])
def test_short_writes_are_completed(tmp_path, monkeypatch, step):

    real = os.pwrite
    with Journal(tmp_path / "journal") as journal, monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, buffer, at: real(fd, bytes(buffer)[: max(step, 1)], at))
        journal.append(records())
    with Journal(tmp_path / "journal") as journal:
        same(list(journal.read()), records())


def test_after_a_full_disk_later_records_are_not_hidden_by_a_torn_one(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(fd, buffer, at):
        calls.append(at)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(fd, bytes(buffer)[:7], at)

    with Journal(tmp_path / "journal") as journal:
        journal.append(records()[:1])
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(DiskSpaceError):
                journal.append(records()[1:2])
        journal.append(records()[2:])
    with Journal(tmp_path / "journal") as journal:
        same(list(journal.read()), [*records()[:1], *records()[2:]])
