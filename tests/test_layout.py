"""Output files: every byte's place, as other programs read it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
import safetensors.torch
from factory import DTYPES, FLOATS, read_checkpoint, realistic, same_bits, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

import streamsoup
from streamsoup.checkpoints.table import pack
from streamsoup.dtypes import BY_NAME
from streamsoup.dtypes import DTYPES as FORMAT
from streamsoup.layout import lay_out

ODD = {
    "wide": np.arange(3, dtype=np.float64),
    "half": np.ones((5, 7), np.float16),
    "brain": np.ones((3, 3), DTYPES["BF16"]),
    "byte": np.arange(5, dtype=np.uint8),
    "flag": np.array([True, False, True]),
    "scalar": np.array(3.0, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "count": np.array(7, np.int64),
    'odd/name \u00e9 "quoted"': np.zeros(1, np.float32),
}


@pytest.mark.parametrize("shard_size", ["5GB", 200, 1])
def test_the_safetensors_library_reads_every_file(tmp_path, shard_size):
    paths = [write_checkpoint(tmp_path / f"r{i}", ODD) for i in range(2)]
    streamsoup.soup(paths, tmp_path / "soup", shard_size=shard_size)
    found = {}
    for file in sorted((tmp_path / "soup").glob("*.safetensors")):
        part = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            assert set(opened.keys()) == set(part)
            assert opened.metadata()["format"] == "pt"
        found |= part
    assert set(found) == set(ODD)
    for name, tensor in found.items():
        assert tuple(tensor.shape) == ODD[name].shape
        if tensor.numel():
            raw = tensor.contiguous().reshape(-1).view(safetensors.torch.torch.uint8).numpy().tobytes()
            assert raw == ODD[name].tobytes()


def test_the_index_names_every_tensor_its_shard_and_the_total(tmp_path):
    tensors = realistic(0, {f"w{i}": (100,) for i in range(10)})
    paths = [write_checkpoint(tmp_path / f"r{i}", tensors) for i in range(2)]
    streamsoup.soup(paths, tmp_path / "soup", shard_size=500)
    index = json.loads((tmp_path / "soup" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    files = sorted(p.name for p in (tmp_path / "soup").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-00005.safetensors" for i in range(5)]
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "soup" / file, "np") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert set(index["weight_map"]) == set(tensors)


def test_one_shard_has_no_index(tmp_path):
    streamsoup.soup([write_checkpoint(tmp_path / "a", ODD)], tmp_path / "soup")
    assert not list((tmp_path / "soup").glob("*.index.json"))
    assert (tmp_path / "soup" / "model.safetensors").exists()


def test_metadata_of_the_first_ingredient_is_kept(tmp_path):
    paths = [write_checkpoint(tmp_path / n, {"w": np.zeros(2, np.float32)}, metadata={"who": n}) for n in "ab"]
    streamsoup.soup(paths, tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == {"who": "a", "format": "pt"}


tables = st.lists(
    st.tuples(
        st.sampled_from([*FLOATS, "I64", "U8", "BOOL"]), st.lists(st.integers(0, 9), max_size=3), st.text(max_size=4)
    ),
    max_size=12,
    unique_by=lambda t: t[2],
)


@given(rows=tables, shard_bytes=st.integers(1, 600), out=st.none() | st.sampled_from(FLOATS), single=st.booleans())
def test_places_are_dense_aligned_and_within_their_shards(rows, shard_bytes, out, single):
    names = [name for _, _, name in rows if name.encode("utf-8", "ignore").decode() == name and name != "__metadata__"]
    rows = [row for row in rows if row[2] in names]
    table = pack(names, [BY_NAME[d] for d, _, _ in rows], [s for _, s, _ in rows], [0] * len(rows))
    out_dtypes = table.dtypes.copy()
    if out:
        out_dtypes[[FORMAT[d].is_float for d in out_dtypes]] = BY_NAME[out].index
    layout = lay_out(table, out_dtypes, shard_bytes=shard_bytes, metadata={}, file_name="x" if single else None)
    sizes = [int(table.elements[t]) * FORMAT[out_dtypes[t]].itemsize for t in range(len(table))]
    assert layout.data_bytes == sum(sizes)
    assert len(layout.shards) == 1 or not single
    for number, shard in enumerate(layout.shards):
        members = [t for t in range(len(table)) if layout.shard_of[t] == number]
        ranges = sorted((int(layout.begins[t]), int(layout.begins[t]) + sizes[t]) for t in members)
        position = len(shard.head)
        assert position % 64 == 0
        for begin, end in ranges:
            assert begin == position
            position = end
        assert position == shard.file_bytes
        for t in members:
            assert int(layout.begins[t]) % FORMAT[out_dtypes[t]].itemsize == 0
        assert single or len([t for t in members if sizes[t]]) <= 1 or sum(sizes[t] for t in members) <= shard_bytes
        whole = shard.head + b"\0" * (shard.file_bytes - len(shard.head))
        assert {n for n, _ in safetensors.deserialize(whole)} == {table.names[t] for t in members}
    if layout.index is not None:
        assert set(json.loads(layout.index)["weight_map"]) == set(names)


def test_an_oversized_tensor_gets_a_shard_of_its_own(tmp_path):
    shapes = {"a": (10,), "big": (1000,), "b": (10,), "c": (10,)}
    paths = [write_checkpoint(tmp_path / f"r{i}", realistic(i, shapes)) for i in range(2)]
    streamsoup.soup(paths, tmp_path / "soup", shard_size=60)
    index = json.loads((tmp_path / "soup" / "model.safetensors.index.json").read_text())["weight_map"]
    assert [n for n, f in index.items() if f == index["big"]] == ["big"]


def test_sharding_changes_no_bit(tmp_path):
    paths = [write_checkpoint(tmp_path / f"r{i}", realistic(i, {f"w{k}": (50,) for k in range(9)})) for i in range(3)]
    streamsoup.soup(paths, tmp_path / "a")
    streamsoup.soup(paths, tmp_path / "b", shard_size=150)
    assert same_bits(read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b"))
