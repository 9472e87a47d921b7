"""Pickles are read as data: what Python itself reads, and nothing that does anything."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import struct
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.checkpoints import pickles
from streamsoup.checkpoints.pickled import Made, Named
from streamsoup.checkpoints.pickles import read_pickle
from streamsoup.errors import CheckpointError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(value=VALUES, protocol=st.integers(2, 5), raw=st.binary())
def test_plain_values_come_back_equal(value, protocol, raw):
    if protocol > 2:  # before, bytes were calls of a codec
        value = [value, raw]
    assert read_pickle(pickle.dumps(value, protocol), "x") == value


def test_mappings_of_python_are_dicts():
    value = collections.OrderedDict(a=1, b=collections.OrderedDict(c=(2, 3)))
    value.attribute = "lost"
    assert read_pickle(pickle.dumps(value, 2), "x") == {"a": 1, "b": {"c": (2, 3)}}
    assert read_pickle(pickle.dumps(collections.defaultdict(list, {"a": [1]}), 2), "x") == {"a": [1]}


def test_shared_and_recursive_values_are_kept():
    value = [1]
    value.append(value)
    found = read_pickle(pickle.dumps([value, value]), "x")
    assert found[0] is found[1]
    assert found[0][1] is found[0]


def test_objects_are_records_of_names():
    found = read_pickle(pickle.dumps(argparse.Namespace(lr=0.1), 4), "x")
    assert isinstance(found, Made)
    assert (found.name, found.arguments, found.state) == ("argparse.Namespace", (), {"lr": 0.1})
    function = read_pickle(pickle.dumps(pytest.raises, 2), "x")
    assert isinstance(function, Named)
    assert function.name == "_pytest.raises.raises" or function.name.endswith(".raises")


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = [
    Call(os.system, "touch mark"),
    Call(eval, "open('mark', 'w')"),
    Call(exec, "open('mark', 'w')"),
    Call(open, "mark", "w"),
    {"a": [({"b": Call(os.mkdir, "mark")},)]},
]


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_only_a_hostile_file_does_is_refused_and_not_done(tmp_path, what, protocol, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"run\.pt: wants to use (posix|builtins|__builtin__|io)\.\w+ when"):
        read_pickle(pickle.dumps(what, protocol), "run.pt")
    assert not list(tmp_path.iterdir())


def test_a_call_of_anything_else_is_not_made(tmp_path, monkeypatch):
    """Not even of what is harmless, or is not known to be harmful."""
    monkeypatch.chdir(tmp_path)
    marks = []
    globals()["_mark"] = marks.append
    found = read_pickle(b"\x80\x02c" + __name__.encode() + b"\n_mark\nK\x01\x85R.", "x")
    assert isinstance(found, Made)
    assert found.name == f"{__name__}._mark"
    assert not marks


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02}q\x00",
        b"\x80\x02h\x07.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02X" + struct.pack("<I", 2**31) + b"a.",
        b"\x80\x02]N(K\x01e.",
        b"\x80\x02}](K\x01K\x02u.",
        b"\x80\x04}]K\x01s.",
        b"\x80\x02K\x01\x87.",
        b"\x80\x04K\x01K\x02\x93.",
    ],
)
def test_damaged_pickles_are_one_sentence(raw):
    with pytest.raises(CheckpointError, match=r"run\.pt: its pickle is damaged at byte"):
        read_pickle(raw, "run.pt")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw):
    with contextlib.suppress(CheckpointError):
        read_pickle(b"\x80\x02" + raw, "x")


@given(st.data())
def test_any_change_is_read_or_refused(data):
    raw = bytearray(pickle.dumps({"a": [1, (2.0, "x")], "b": argparse.Namespace(c=b"d")}, data.draw(st.integers(2, 5))))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        read_pickle(bytes(raw), "x")


@pytest.mark.parametrize("raw", [b"I1\n.", b"\x82\x01.", b"\x80\x02\x98."])
def test_instructions_that_torch_does_not_write_are_refused(raw):
    with pytest.raises(CheckpointError, match=r"Save it again with torch\.save"):
        read_pickle(raw, "x")


def test_a_memo_far_away_takes_no_memory():
    """Python's own unpickler makes room for as many entries as the index says."""
    assert read_pickle(b"\x80\x02K\x01r" + struct.pack("<I", 2**32 - 1) + b".", "x") == 1


def test_deep_nesting_does_not_overflow_the_stack():
    depth = 200_000
    assert read_pickle(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", "x")
    with pytest.raises(CheckpointError, match="damaged"):  # such a key could not be hashed
        read_pickle(b"\x80\x02}N" + b"\x85" * depth + b"K\x01s.", "x")


def test_what_an_object_is_filled_with_is_kept():
    for protocol in (2, 4):
        for value in (Filled(a=1.5), collections.deque([1.5])):
            assert list(read_pickle(pickle.dumps(value, protocol), "x").items) == [1.5]
        for kind in (dict, collections.OrderedDict, collections.Counter):
            found = read_pickle(pickle.dumps(Call(kind, [("a", 1.5)]), protocol), "x")
            assert found.arguments == ([("a", 1.5)],)


class Filled(dict):
    pass


def test_states_and_keywords_do_not_replace_each_other():
    found = read_pickle(b"\x80\x04cm\nn\n)}K\x01K\x02s\x92K\x03bK\x04b.", "x")
    assert (found.state, found.items) == (4, [{1: 2}, 3])


def test_what_a_made_maker_was_made_of_is_kept():
    found = read_pickle(b"\x80\x04cm\nn\nK\x01\x85R)R.", "x")
    assert found.items[0].arguments == (1,)


@pytest.mark.parametrize("name", [b"]" + b"2\x86" * 18, b")" + b"\x85" * 100_000], ids=["shared", "deep"])
@pytest.mark.parametrize("first", [True, False])
def test_names_that_are_no_text_are_not_made_text(name, first):
    text = b"\x8c\x01a"
    raw = b"\x80\x04" + (name + text if first else text + name) + b"\x93."
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(raw, "x")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 64 * len(raw) + 100_000


@pytest.mark.parametrize("wrap", [lambda key: key, lambda key: ("a", key)])
def test_numbers_that_could_all_have_one_hash_are_no_keys(wrap):
    kept = {wrap(sign * (2**64 - 1)): 1 for sign in (-1, 1)}
    assert read_pickle(pickle.dumps(kept), "x") == kept
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(pickle.dumps({wrap(k * (2**61 - 1)): k for k in range(1, 50)}), "x")


@pytest.mark.parametrize(
    "steps",
    [
        *([b"}"], [b"}", b"\x94"], [b"\x94"], [b"\x8f"], [b"2", b"\x86"], [b"}", b"N", b"N", b"s"]),
        *([b"2", b")", b"R", b"]", b"a"], [b"X\x04\0\0\0\xf0\x9f\x98\x80"], [b"r%i"], [b"cm\n%s\n"]),
    ],
)
def test_a_step_takes_no_more_memory_than_is_said(steps):
    count, step = 150_000 // len(steps), b"".join(steps)
    body = b"".join(step.replace(b"%s", b"%08x" % i).replace(b"%i", i.to_bytes(4, "little")) for i in range(count))
    tracemalloc.start()
    read_pickle(b"\x80\x02cm\nn\n" + body + b".", "x")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes <= 220 * count * len(steps)


def test_no_more_is_made_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(pickles, "_MAX_STEPS", 100)
    with pytest.raises(CheckpointError, match="more than 100 instructions"):
        read_pickle(b"\x80\x02" + b"]" * 200 + b".", "x")
