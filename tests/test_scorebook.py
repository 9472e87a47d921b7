"""Scores are on disk before they are used, and known by what was scored: not by where it lies or when."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading

import numpy as np
import pytest
from factory import fine_tunes, write_checkpoint

from streamsoup.checkpoints import identify, identity_key, identity_to_json, open_checkpoints
from streamsoup.errors import DiskSpaceError
from streamsoup.score import Scores
from streamsoup.scorebook import Entry, ScoreBook
from streamsoup.sums import Member

NAMES = {"a": "1a", "b": "1b", "c": "1c"}
A, B = Member("a", 1.0), Member("b", 2.0)


def entry(value, **also):
    return Entry(Scores(value, also), 0.25, 100)


def key_of(path):
    (checkpoint,) = open_checkpoints([str(path)])
    return identity_key(identity_to_json(identify(checkpoint)))


def test_keys_depend_on_order_weights_and_identity():
    book = ScoreBook(None, NAMES)
    some = [(A, B), (B, A), (A,), (B,), (Member("a", 2.0), B), (A, Member("b", 1.0)), (A, Member("c", 2.0)), (A, B, A)]
    assert len({book.key(members) for members in some}) == len(some)
    assert book.key((A, B)) != ScoreBook(None, {**NAMES, "a": "other"}).key((A, B))


def test_keys_do_not_depend_on_names_of_files():
    assert ScoreBook(None, NAMES).key((A, B)) == ScoreBook(None, {"x": "1a", "y": "1b"}).key(
        (Member("x", 1.0), Member("y", 2.0))
    )


def test_weights_are_told_apart_to_the_last_bit():
    book = ScoreBook(None, NAMES)
    assert book.key((Member("a", 0.3),)) != book.key((Member("a", 0.1 + 0.2),))


def test_an_identity_is_what_it_holds_and_not_where_or_when(tmp_path):
    one, two, _ = fine_tunes(tmp_path, 3)
    key = key_of(one)
    assert key != key_of(two)
    copy = tmp_path / "elsewhere" / "copy"
    copy.mkdir(parents=True)
    (copy / "model.safetensors").write_bytes((tmp_path / "run1" / "model.safetensors").read_bytes())
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert key_of(copy) == key


def test_entries_are_found_again_to_the_last_bit(tmp_path):
    path = tmp_path / "scores.jsonl"
    values = [0.1 + 0.2, -1e-310, 1e300, 0.0, 3]
    book = ScoreBook(path, NAMES)
    for number, value in enumerate(values):
        book.enter((A, Member("b", number + 1.0)), entry(value, loss=value / 3))
    for one in (book, ScoreBook(path, NAMES)):
        for number, value in enumerate(values):
            assert one.find((A, Member("b", number + 1.0))) == entry(value, loss=value / 3)
        assert one.find((A,)) is None


def test_a_score_is_durable_when_enter_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_size) or real(fd))
    book = ScoreBook(tmp_path / "scores.jsonl", NAMES)
    for number in range(3):
        book.enter((A, Member("b", number + 1.0)), entry(0.5))
        assert synced[-1] == (tmp_path / "scores.jsonl").stat().st_size
    assert len(synced) == 3


def test_a_score_that_could_not_be_written_is_none(tmp_path, monkeypatch):
    book = ScoreBook(tmp_path / "scores.jsonl", NAMES)

    def full(fd):
        assert book.look((A,)) is None, "it does not decide before it is on the disk"
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(DiskSpaceError):
        book.enter((A,), entry(0.5))
    assert book.find((A,)) is None


@pytest.mark.parametrize("place", [None, "file"])
def test_without_a_file_scores_are_kept_in_memory(tmp_path, place):
    path = tmp_path / "scores.jsonl" if place else None
    book = ScoreBook(path, NAMES)
    book.enter((A,), entry(0.5))
    assert book.find((A,)) == entry(0.5)
    assert (ScoreBook(path, NAMES).find((A,)) is None) is (path is None)


def test_a_line_torn_anywhere_is_forgotten_and_nothing_else(tmp_path):
    path = tmp_path / "scores.jsonl"
    book = ScoreBook(path, NAMES)
    soups = [(A,), (B,), (A, B)]
    for number, members in enumerate(soups):
        book.enter(members, entry(float(number)))
    raw = path.read_bytes()
    ends = list(itertools.accumulate(len(line) for line in raw.splitlines(keepends=True)))
    for cut in range(len(raw) + 1):
        path.write_bytes(raw[:cut])
        whole = sum(end <= cut for end in ends)
        again = ScoreBook(path, NAMES)
        assert [again.find(members) for members in soups] == [
            entry(float(i)) if i < whole else None for i in range(len(soups))
        ]
        if cut % 29 == 0:  # and what is entered next is not glued to the torn line
            again.enter((B, A), entry(9.0))
            assert ScoreBook(path, NAMES).find((B, A)) == entry(9.0)
            assert all(json.loads(line) for line in path.read_text().splitlines())


def test_bytes_of_a_disk_that_lost_power_are_no_scores(tmp_path):
    path = tmp_path / "scores.jsonl"
    ScoreBook(path, NAMES).enter((A,), entry(0.5))
    for tail in (b"\0" * 40, b"\xff\xfe\n", b"{}\n", b"7\n", b'{"key": 1, "value": "x"}\n'):
        whole = path.read_bytes()
        path.write_bytes(whole + tail)
        again = ScoreBook(path, NAMES)
        assert again.find((A,)) == entry(0.5)
        again.enter((B,), entry(0.25))
        assert ScoreBook(path, NAMES).find((B,)) == entry(0.25)
        path.write_bytes(whole)


def test_the_book_can_be_read_by_a_person(tmp_path):
    path = tmp_path / "scores.jsonl"
    ScoreBook(path, NAMES).enter((A, B), entry(0.5, loss=1.0))
    row = json.loads(path.read_text())
    assert row["members"] == [["a", 1.0], ["b", 2.0]]
    assert (row["value"], row["also"]) == (0.5, {"loss": 1.0})


def test_ingredients_with_equal_headers_and_other_data_have_other_keys(tmp_path):
    keys = set()
    for byte in range(0, 200, 9):  # a small tensor is hashed whole
        array = np.zeros(200, np.uint8)
        array[byte] = 1
        keys.add(key_of(write_checkpoint(tmp_path / f"run{byte}", {"w": array})))
    assert len(keys) == len(range(0, 200, 9))


def test_a_score_got_ahead_is_that_of_who_would_have_made_it_so_and_of_all_after_it(tmp_path):
    path = tmp_path / "scores.jsonl"
    for again in (False, True):
        book = ScoreBook(path, NAMES)
        if not again:
            book.enter((A, B), entry(1.0), way="sum")
            book.enter((A, B), entry(2.0), way="members")
        assert book.find((A, B)) is None
        assert book.find((A, B), "another") is None
        assert book.look((A, B), "members").scores.value == 2.0
        assert book.find((A, B)) is None, "looking decides nothing"
        assert book.find((A, B), "sum").scores.value == 1.0
        assert book.find((A, B), "members").scores.value == 1.0
        assert book.find((A, B)).scores.value == 1.0


def test_several_threads_may_enter_scores(tmp_path):
    path = tmp_path / "scores.jsonl"
    book = ScoreBook(path, NAMES)
    weights = [float(n + 1) for n in range(200)]

    def enter(part):
        for weight in part:
            book.enter((Member("a", weight),), entry(weight), {"a": str(weight)})

    threads = [threading.Thread(target=enter, args=(weights[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = ScoreBook(path, NAMES)
    assert [again.find((Member("a", weight),)).scores.value for weight in weights] == weights
