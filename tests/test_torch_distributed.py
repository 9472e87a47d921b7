"""Folders of torch.distributed.checkpoint: the soups of the equal safetensors files, and one sentence otherwise."""

from __future__ import annotations

import collections
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import read_checkpoint, same_bits, write_checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch_checkpoints import (
    expected,
    held,
    open_one,
    save_distributed,
    some_sharded,
    some_strided,
    some_tensors,
    to_numpy,
)

import streamsoup
from streamsoup.checkpoints import DerivedCheckpoint, StoredCheckpoint, identify
from streamsoup.checkpoints.torch_distributed import open_torch_distributed
from streamsoup.errors import ChangedIngredientError, CheckpointError, UnsupportedDTypeError

MODES = ("map", "ahead", "plain")
COUNT = 3
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Checkpoints that two processes saved together."""
    folder = tmp_path_factory.mktemp("sharded")
    driver = str(Path(__file__).parent / "distributed_driver.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, driver, str(rank), "2", str(folder / "meeting"), str(COUNT), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors
    return folder


def test_what_one_process_saved_is_read_in_place(tmp_path):
    tensors = some_tensors(0, "BF16")
    checkpoint = open_one(save_distributed(tmp_path / "run", {"model": tensors, "step": 3, "optim": {"x": tensors}}))
    assert isinstance(checkpoint, StoredCheckpoint)
    assert held(checkpoint) == expected(tensors)


@pytest.mark.parametrize("mode", MODES)
def test_shards_are_put_together(sharded, mode):
    checkpoint = open_one(sharded / "dtensor0")
    assert isinstance(checkpoint, DerivedCheckpoint)
    assert len(checkpoint.shards) == 2
    assert held(checkpoint, mode) == expected(some_sharded(0))


def test_fsdp(sharded):
    network = torch.load(sharded / "network.pt", weights_only=True)
    assert held(open_one(sharded / "fsdp")) == expected(network)


@pytest.mark.parametrize("read_mode", MODES)
def test_a_soup_has_the_bits_of_the_safetensors_files(tmp_path, sharded, read_mode, monkeypatch):
    plain = [str(write_checkpoint(tmp_path / f"run{i}", to_numpy(some_sharded(i)))) for i in range(COUNT)]
    streamsoup.soup(plain, tmp_path / "wanted")
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    runs = [str(sharded / f"dtensor{i}") for i in range(COUNT)]
    streamsoup.soup(runs, tmp_path / "found", read_mode=read_mode, workers=3)
    assert same_bits(read_checkpoint(tmp_path / "found"), read_checkpoint(tmp_path / "wanted"))
    for name in ("model-00001", "config"):
        assert not list((tmp_path / "found").glob(f"{name}*"))


@pytest.mark.parametrize("document", [lambda t: t, lambda t: {"app": {"model": t, "optim": {"x": torch.ones(2)}}}])
def test_where_the_model_is(tmp_path, document):
    tensors = some_strided(0)
    path = save_distributed(tmp_path / "run", document(tensors))
    assert held(open_one(path)) == expected(tensors)


@pytest.mark.parametrize("value", [np.ones(3), collections.deque([torch.ones(1)]), Namespace(w=torch.ones(1))])
def test_what_was_saved_as_bytes_is_not_dropped_if_it_may_be_a_part_of_the_model(tmp_path, value):
    path = save_distributed(tmp_path / "run", {"model": {"w": torch.ones(2), "q": value}})
    refused(path, r"^q: is no tensor in .*\.metadata, but (numpy|collections\.deque|argparse)")


def test_plain_values_and_what_layers_save_for_themselves_are_passed_over(tmp_path):
    plain = {"step": 3, "names": ["a", {"b": 1.0}], "options": Namespace(lr=0.1), "fc._extra_state": np.ones(2)}
    path = save_distributed(tmp_path / "run", {"w": torch.ones(2), **plain})
    assert open_one(path).table.names == ("w",)


def test_bytes_outside_the_file_are_refused(change):
    def act(metadata):
        entry = metadata.storage_data.pop(next(i for i in metadata.storage_data if i.fqn == "b"))
        metadata.state_dict_metadata["b"] = BytesStorageMetadata()
        entry.offset = 1 << 40
        metadata.storage_data[MetadataIndex("b")] = entry

    refused(change(act), r"^b: a chunk ends at byte")


def test_a_key_says_where_the_model_is(tmp_path):
    path = save_distributed(tmp_path / "run", {"model": some_tensors(0), "ema": some_tensors(1)})
    with pytest.raises(CheckpointError, match=r"\.metadata: has 'model', 'ema' at its top.*--key"):
        open_one(path)
    assert held(open_torch_distributed(path, "ema")) == expected(some_tensors(1))


def test_changed_bytes_are_noticed(tmp_path):
    path = save_distributed(tmp_path / "run", some_tensors(0))
    checkpoint = open_one(path)
    before = identify(checkpoint)
    save_distributed(tmp_path / "run", some_tensors(1))
    with pytest.raises(ChangedIngredientError):
        identify(checkpoint)
    after = identify(open_one(path))
    assert after[0].header_sha256 == before[0].header_sha256
    assert after[0].sampled_blake2b != before[0].sampled_blake2b


# -- what is wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def change(tmp_path):
    """A checkpoint whose metadata were changed by torch's own classes."""
    path = Path(save_distributed(tmp_path / "run", {"w": torch.randn(4, 6), "b": torch.randn(3)}))

    def changed(act):
        metadata = pickle.loads((path / ".metadata").read_bytes())
        act(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
        return path

    return changed


def refused(path, match, kind=CheckpointError):
    with pytest.raises(kind, match=match) as caught:
        open_one(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def info_of(metadata, name):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def sized(name, **fields):
    def act(metadata):
        for field, value in fields.items():
            setattr(metadata.state_dict_metadata[name].chunks[0], field, torch.Size(value))

    return act


def test_chunks_that_do_not_cover_are_refused(change):
    refused(change(sized("w", sizes=(3, 6))), r"has chunks for 18 of 24 elements of w")


def test_chunks_that_reach_outside_are_refused(change):
    refused(change(sized("w", sizes=(5, 6))), r"chunk of w that reaches outside its shape \(4, 6\)")


def test_chunks_that_overlap_are_refused(change):
    def twice(metadata):
        entry = metadata.state_dict_metadata["w"]
        entry.chunks.append(entry.chunks[0])

    refused(change(twice), r"chunks of w that overlap, at \(0, 0\) and \(0, 0\)")


def test_chunks_that_are_not_what_the_metadata_say_are_refused(change):
    def reshaped(metadata):
        metadata.state_dict_metadata["w"].size = torch.Size((6, 4))
        sized("w", sizes=(6, 4))(metadata)

    refused(change(reshaped), r"^w: .* does not hold F32 of shape \(6, 4\)")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("offset", 1 << 40, r"^w: a chunk ends at byte"),
        ("offset", 5, r"is not a file of torch\.save"),
        ("offset", -1, "gives no byte range for w"),
        ("length", 300, "truncated or damaged"),
        ("relative_path", "../x.distcp", "outside the folder"),
        ("transform_descriptors", ["zstd"], "^w: is compressed"),
    ],
)
def test_byte_ranges_that_make_no_sense_are_refused(change, field, value, match):
    refused(change(lambda metadata: setattr(info_of(metadata, "w"), field, value)), match)


def test_a_missing_range_is_refused(change):
    refused(change(lambda metadata: metadata.storage_data.clear()), "does not say where the chunk of")


def test_a_missing_file_is_refused(change):
    path = change(lambda metadata: None)
    (path / "__0_0.distcp").unlink()
    refused(path, "no such file")


def test_what_cannot_be_averaged_is_refused(tmp_path):
    path = save_distributed(tmp_path / "run", {"w": torch.ones(3, dtype=torch.complex128)})
    refused(path, r"^w: is of torch\.complex128", UnsupportedDTypeError)


@pytest.mark.parametrize("raw", [b"", b"{}", b"\x80\x02}.", b"\x80\x02cos\nsystem\n."])
def test_other_metadata_are_refused(tmp_path, raw):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".metadata").write_bytes(raw)
    refused(tmp_path / "run", "damaged|instruction|is not the metadata|wants to use os.system")


def test_a_folder_of_optimiser_state_is_no_checkpoint(tmp_path):
    path = save_distributed(tmp_path / "run", {"optim": {"w": torch.ones(3)}, "step": 3})
    refused(path, "has 'optim' at its top.*--key")
