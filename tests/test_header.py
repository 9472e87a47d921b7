"""Headers: what is read, and every hostile one refused with a sentence."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from factory import DTYPES, FLOATS, any_bits, entry, file_bytes, raw_file, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamsoup.checkpoints.header import MAX_HEADER_BYTES, read_header
from streamsoup.errors import CheckpointError, CheckpointNotFoundError, HeaderError, StreamsoupError

F32 = ("F32", [2])


def one(**changes: object) -> dict[str, object]:
    return {**entry("F32", [2], 0, 8), **changes}


def two(first: dict, second: dict) -> dict:
    return {"a": first, "b": second}


HOSTILE = {
    "overlap": (two(entry("F32", [2], 0, 8), entry("F32", [2], 4, 12)), 12, "overlaps"),
    "same range twice": (two(entry("F32", [2], 0, 8), entry("F32", [2], 0, 8)), 8, "overlaps"),
    "hole": (two(entry("F32", [2], 0, 8), entry("F32", [2], 12, 20)), 20, "hole"),
    "hole at the start": ({"a": entry("F32", [2], 4, 12)}, 12, "hole"),
    "out of range": ({"a": entry("F32", [4], 0, 16)}, 8, "truncated"),
    "trailing bytes": ({"a": entry("F32", [2], 0, 8)}, 9, "trailing"),
    "trailing bytes and no tensor": ({}, 1, "trailing"),
    "truncated data": ({"a": entry("F32", [2], 0, 8)}, 7, "truncated"),
    "wrong size": ({"a": entry("F32", [3], 0, 8)}, 8, "12 bytes"),
    "wrong size of a scalar": ({"a": entry("F32", [], 0, 8)}, 8, "4 bytes"),
    "unknown dtype": ({"a": one(dtype="F33")}, 8, "unknown dtype"),
    "running sum dtype": ({"a": one(dtype="SUM32")}, 8, "unknown dtype"),
    "pair dtype": ({"a": entry("PAIR", [1], 0, 16)}, 16, "unknown dtype"),
    "dtype of another type": ({"a": one(dtype=["F32"])}, 8, "dtype"),
    "lower-case dtype": ({"a": one(dtype="f32")}, 8, "unknown dtype"),
    "unknown field": ({"a": one(extra=1)}, 8, "extra"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
    "entry is a list": ({"a": [1, 2]}, 8, "entry"),
    "entry is null": ({"a": None}, 8, "entry"),
    "float offsets": ({"a": one(data_offsets=[0.0, 8.0])}, 8, "data_offsets"),
    "negative offsets": ({"a": one(data_offsets=[-8, 0])}, 8, "data_offsets"),
    "bool offsets": ({"a": one(dtype="U8", shape=[1], data_offsets=[False, True])}, 1, "data_offsets"),
    "descending offsets": ({"a": one(data_offsets=[8, 0])}, 8, "data_offsets"),
    "three offsets": ({"a": one(data_offsets=[0, 4, 8])}, 8, "data_offsets"),
    "offsets beyond 64 bits": ({"a": one(data_offsets=[0, 2**64 + 8])}, 8, "data_offsets"),
    "offsets are an object": ({"a": one(data_offsets={"0": 1})}, 8, "data_offsets"),
    "float shape": ({"a": one(shape=[2.0])}, 8, "shape"),
    "negative shape": ({"a": one(shape=[-1, -2])}, 8, "shape"),
    "bool shape": ({"a": one(dtype="F64", shape=[True])}, 8, "shape"),
    "giant shape": ({"a": one(shape=[2**62, 2**62])}, 8, "shape"),
    "product of sizes overflows": ({"a": one(shape=[2**32, 2**32, 0, 2])}, 8, "bytes"),
    "shape is a string": ({"a": one(shape="2")}, 8, "shape"),
    "metadata is no mapping": ({"__metadata__": [], "a": one()}, 8, "__metadata__"),
    "metadata is not text": ({"__metadata__": {"a": 1}, "a": one()}, 8, "__metadata__"),
}
RAW = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too short"),
    "length zero": (raw_file(b"", length=0), "too short"),
    "length one": (raw_file(b"{", length=1), "too short"),
    "giant length": (raw_file(b"{}", length=2**63), f"{MAX_HEADER_BYTES:,}"),
    "largest length": (raw_file(b"{}", length=2**64 - 1), f"{MAX_HEADER_BYTES:,}"),
    "length beyond the limit": (raw_file(b"{}", length=MAX_HEADER_BYTES + 1), f"{MAX_HEADER_BYTES:,}"),
    "length beyond the file": (raw_file(b"{}", length=MAX_HEADER_BYTES), "truncated"),
    "bad UTF-8": (raw_file(b'{"\xff":1}'), "UTF-8"),
    "overlong UTF-8": (raw_file(b'{"\xc0\xaf":1}'), "UTF-8"),
    "byte order mark": (raw_file(b"\xef\xbb\xbf{}"), "JSON object"),
    "UTF-16": (raw_file("{}".encode("utf-16-le")), "JSON"),
    "a list": (raw_file(b"[1,2]"), "JSON object"),
    "leading space": (raw_file(b" {}"), "JSON object"),
    "not closed": (raw_file(b'{"a":'), "JSON"),
    "two documents": (raw_file(b"{}{}"), "JSON"),
    "NaN": (raw_file(b'{"a":NaN}'), "NaN"),
    "Infinity as offset": (
        raw_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', b"x" * 8),
        "Infinity",
    ),
    "nested without end": (raw_file(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested"),
    "nested objects": (raw_file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
    "number of a million digits": (
        raw_file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}', b"x" * 8),
        "",
    ),
    "duplicate tensor": (
        raw_file('{"a":%s,"a":%s}' % ((json.dumps(entry("F32", [2], 0, 8)),) * 2), b"x" * 8),
        "duplicate key 'a'",
    ),
    "duplicate field": (
        raw_file(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"x" * 8),
        "duplicate key 'dtype'",
    ),
    "duplicate metadata": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate key '__metadata__'"),
    "duplicate metadata key": (raw_file(b'{"__metadata__":{"k":"1","k":"2"}}'), "duplicate key 'k'"),
    "a zip file": (b"PK\x03\x04" + b"\0" * 100, ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused_with_file_and_reason(tmp_path, case):
    header, size, reason = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(header, b"\0" * size))
    with pytest.raises(HeaderError) as caught:
        read_header(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert message.endswith("Export or download the file again.")
    assert caught.value.path == str(path)


@pytest.mark.parametrize("case", RAW)
def test_hostile_bytes_are_refused_with_file_and_reason(tmp_path, case):
    raw, reason = RAW[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(HeaderError) as caught:
        read_header(str(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert len(message) < 2000, "a message is a sentence, not the file"
    assert "\n" not in message


def test_a_giant_header_length_allocates_nothing(tmp_path):
    import tracemalloc

    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(b"{}", length=2**60))
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError):
            read_header(str(path))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_shapes_and_names_in_messages_are_cut_short(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"n" * 50_000: one(shape=[1.5] * 50_000)}, b"\0" * 8))
    with pytest.raises(HeaderError) as caught:
        read_header(str(path))
    assert len(str(caught.value)) < 2000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match=r"x\.safetensors: no such file"):
        read_header(str(tmp_path / "x.safetensors"))


def test_a_folder_in_place_of_a_file_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(str(tmp_path))


def test_lone_surrogates_in_names_are_refused(tmp_path):
    # The format is UTF-8; a lone surrogate cannot be written back, and would fail only when the soup is laid out.
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8))
    with pytest.raises(HeaderError):
        read_header(str(path))


def test_valid_header_gives_names_shapes_places_and_metadata(tmp_path):
    tensors = {
        "ö": np.zeros((2, 3), np.float32),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(1.0, np.float64),
        "": np.zeros(3, np.int8),
    }
    path = write_checkpoint(tmp_path / "x.safetensors", tensors, metadata={"format": "pt", "k": "v"})
    header, stat = read_header(str(path))
    table = header.table
    assert set(table.names) == set(tensors)
    for position, name in enumerate(table.names):
        assert table.shape(position) == tensors[name].shape
        assert DTYPES[table.dtype(position).name] == tensors[name].dtype
        begin = int(table.begins[position])
        assert path.read_bytes()[begin : begin + tensors[name].nbytes] == tensors[name].tobytes()
    assert header.metadata == {"format": "pt", "k": "v"}
    assert header.data_start + header.data_bytes == stat.st_size == path.stat().st_size


def test_tensors_are_ordered_by_place_not_by_mention(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"late": entry("U8", [1], 4, 5), "early": entry("F32", [1], 0, 4)}, b"\0" * 5))
    assert read_header(str(path))[0].table.names == ("early", "late")


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [2, 3], 3), ("F6_E2M3", [4], 3), ("F8_E8M0", [3], 3)])
def test_packed_dtypes_have_their_packed_size(tmp_path, dtype, shape, size):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"a": entry(dtype, shape, 0, size)}, b"\0" * size))
    assert read_header(str(path))[0].table.nbytes.tolist() == [size]


def test_equal_headers_are_parsed_once_and_share_their_table(tmp_path):
    for name in "ab":
        write_checkpoint(tmp_path / f"{name}.safetensors", {"w": np.zeros(3, np.float32)})
    cache: dict = {}
    first, second = (read_header(str(tmp_path / f"{n}.safetensors"), cache)[0] for n in "ab")
    assert first is second


def test_a_known_header_does_not_hide_a_truncated_file(tmp_path):
    for name in "ab":
        write_checkpoint(tmp_path / f"{name}.safetensors", {"w": np.zeros(3, np.float32)})
    cache: dict = {}
    read_header(str(tmp_path / "a.safetensors"), cache)
    with open(tmp_path / "b.safetensors", "r+b") as file:
        file.truncate((tmp_path / "b.safetensors").stat().st_size - 1)
    with pytest.raises(HeaderError, match="truncated"):
        read_header(str(tmp_path / "b.safetensors"), cache)


# -- fuzz --------------------------------------------------------------------------------------------------------


def _reads(raw: bytes) -> bool:
    """Whether our parser takes a file; anything but a StreamsoupError fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(raw)
        try:
            read_header(str(path))
        except StreamsoupError:
            return False
        return True


def _library_reads(raw: bytes) -> bool:
    import safetensors

    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


@settings(max_examples=300)
@given(raw=st.binary(max_size=200))
@example(raw=raw_file(b"{}"))
def test_random_bytes_never_raise_anything_foreign(raw):
    _reads(raw)


@settings(max_examples=300)
@given(text=st.text(max_size=60).map(str.encode) | st.binary(max_size=60), data=st.binary(max_size=9))
def test_random_headers_never_raise_anything_foreign(text, data):
    _reads(raw_file(b"{" + text, data))
    _reads(raw_file(b'{"a":{' + text + b"}}", data))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_FIELD = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL"]) | _JSON,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | _JSON,
        "data_offsets": st.lists(st.integers(-1, 20), min_size=2, max_size=2) | _JSON,
    }
)


@settings(max_examples=300)
@given(document=st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), _FIELD | _JSON, max_size=3),
       size=st.integers(0, 24))  # fmt: skip
def test_what_we_accept_the_library_accepts(document, size):
    try:
        raw = raw_file(json.dumps(document), b"\0" * size)
    except UnicodeEncodeError:
        return
    if _reads(raw):
        assert _library_reads(raw)


@settings(max_examples=200)
@given(data=st.data())
def test_mutations_of_a_valid_file_are_read_like_the_library_reads_them_or_refused(data):
    raw = bytearray(
        file_bytes({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int8)}, metadata={"format": "pt"})
    )
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        action = data.draw(st.sampled_from(["set", "drop", "insert"]))
        byte = data.draw(st.integers(0, 255) | st.sampled_from(list(b'{}[]",:0123456789')))
        if action == "set":
            raw[place] = byte
        elif action == "drop":
            del raw[place]
        else:
            raw.insert(place, byte)
    if _reads(bytes(raw)):
        assert _library_reads(bytes(raw))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    tensors=st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from([*FLOATS, "I64", "BOOL", "U8"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    metadata=st.none() | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), st.text(
        st.characters(codec="utf-8"), max_size=4), max_size=3),
    pad=st.sampled_from([1, 8, 64]),
)  # fmt: skip
def test_valid_files_say_the_same_to_us_and_to_the_library(seed, tensors, metadata, pad):
    import safetensors

    rng = np.random.default_rng(seed)
    arrays = {
        name: any_bits(rng, dtype, shape) if dtype in FLOATS else np.zeros(shape, DTYPES[dtype])
        for name, (dtype, shape) in tensors.items()
    }
    raw = file_bytes(arrays, metadata=metadata, pad=pad)
    theirs = dict(safetensors.deserialize(raw))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(raw)
        header, _ = read_header(str(path))
    table = header.table
    assert set(table.names) == set(theirs)
    assert header.metadata == (metadata or {})
    for position, name in enumerate(table.names):
        assert list(table.shape(position)) == theirs[name]["shape"]
        assert table.dtype(position).name == theirs[name]["dtype"]
        begin = int(table.begins[position])
        assert raw[begin : begin + int(table.nbytes[position])] == bytes(theirs[name]["data"])
