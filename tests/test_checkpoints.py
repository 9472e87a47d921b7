"""Folders, indices, patterns: what can be an ingredient, and what is refused with a sentence."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from factory import DTYPES, SHAPES, fine_tunes, realistic, write_checkpoint

from streamsoup.checkpoints import expand_paths, identify, natural_order, open_checkpoints
from streamsoup.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ShardIndexError,
    UnsupportedDTypeError,
)

INDEX = "model.safetensors.index.json"


def open_one(path):
    return open_checkpoints([str(path)])[0]


@pytest.fixture
def sharded(tmp_path):
    return write_checkpoint(tmp_path / "run", realistic(0, SHAPES), shards=2)


def change_index(folder, change):
    document = json.loads((folder / INDEX).read_text())
    change(document)
    (folder / INDEX).write_text(json.dumps(document))


@pytest.mark.parametrize("shards", [None, 1, 2, 4])
def test_all_tensors_of_a_checkpoint_are_found_whatever_its_shards(tmp_path, shards):
    tensors = realistic(0, SHAPES)
    checkpoint = open_one(write_checkpoint(tmp_path / "run", tensors, shards=shards))
    table = checkpoint.table
    assert set(table.names) == set(SHAPES)
    for position, name in enumerate(table.names):
        shard = checkpoint.shards[table.shards[position]]
        begin = int(table.begins[position])
        with open(shard.path, "rb") as file:
            assert file.read()[begin : begin + int(table.nbytes[position])] == tensors[name].tobytes()
        assert table.shape(position) == SHAPES[name]


def test_other_names_than_model_are_checkpoints_too(tmp_path):
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run" / "diffusion_pytorch_model.safetensors", realistic(0, SHAPES))
    assert len(open_one(tmp_path / "run").table) == len(SHAPES)


def test_equal_checkpoints_share_one_table(tmp_path):
    runs = fine_tunes(tmp_path, 3, shards=2)
    first, second, third = open_checkpoints(runs)
    assert first.table is second.table is third.table


# -- an index that does not describe its shards ------------------------------------------------------------------


def _missing(folder):
    os.unlink(folder / "model-00002-of-00002.safetensors")


def _outside(folder):
    (folder.parent / "x.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": "../x.safetensors"}))


def _absolute(folder):
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": "/etc/passwd"}))


def _back_slash(folder):
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": "..\\x.safetensors"}))


def _dots(folder):
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": ".."}))


def _empty_name(folder):
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": ""}))


def _zero_byte(folder):
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": "a\0b"}))


def _wrong_shard(folder):
    change_index(folder, lambda d: d["weight_map"].update({"embed.weight": "model-00002-of-00002.safetensors"}))


def _not_stored(folder):
    change_index(folder, lambda d: d["weight_map"].update({"ghost": "model-00001-of-00002.safetensors"}))


def _not_listed(folder):
    change_index(folder, lambda d: d["weight_map"].pop("layer.0.bias"))


def _stored_twice(folder):
    for file in sorted(folder.glob("*.safetensors")):
        write_checkpoint(file, realistic(0, SHAPES))


def _stray_file(folder):
    write_checkpoint(folder / "adapter.safetensors", {"w": np.zeros(3, np.float32)})


def _two_indices(folder):
    (folder / "other.safetensors.index.json").write_text((folder / INDEX).read_text())


def _write(text):
    return lambda folder: (folder / INDEX).write_bytes(text)


BROKEN = {
    "missing shard": (_missing, "model-00002-of-00002.safetensors, which is missing"),
    "shard outside": (_outside, "outside the folder"),
    "absolute shard": (_absolute, "outside the folder"),
    "back slash": (_back_slash, "outside the folder"),
    "dots": (_dots, ""),
    "empty name": (_empty_name, ""),
    "zero byte": (_zero_byte, ""),
    "wrong shard": (_wrong_shard, "embed.weight: stored in model-00001-of-00002.safetensors"),
    "name that is stored nowhere": (_not_stored, "ghost"),
    "name that is not listed": (_not_listed, "layer.0.bias"),
    "stored twice": (_stored_twice, "stored in"),
    "stray file": (_stray_file, "adapter.safetensors is not listed"),
    "two indices": (_two_indices, "2 index files"),
    "no JSON": (_write(b"{"), "weight_map"),
    "a list": (_write(b"[]"), "weight_map"),
    "no weight_map": (_write(b"{}"), "weight_map"),
    "empty weight_map": (_write(b'{"weight_map":{}}'), "weight_map"),
    "weight_map is a list": (_write(b'{"weight_map":[1]}'), "weight_map"),
    "numbers for files": (_write(b'{"weight_map":{"a":1}}'), "weight_map"),
    "bad UTF-8": (_write(b'{"weight_map":{"\xff":"a"}}'), "weight_map"),
    "nested": (_write(b'{"weight_map":' + b"[" * 100_000), "weight_map"),
    "duplicate names": (
        _write(b'{"weight_map":{"a":"model-00001-of-00002.safetensors","a":"model-00002-of-00002.safetensors"}}'),
        "",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_index_that_does_not_describe_its_shards_is_refused(sharded, case):
    breaks, reason = BROKEN[case]
    breaks(sharded)
    with pytest.raises(ShardIndexError) as caught:
        open_one(sharded)
    assert reason in str(caught.value)
    assert str(sharded) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_a_truncated_shard_is_named(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: truncated"):
        open_one(sharded)


def test_several_files_without_an_index_are_refused(tmp_path):
    for name in "ab":
        write_checkpoint(tmp_path / "run" / f"{name}.safetensors", realistic(0, SHAPES))
    with pytest.raises(ShardIndexError, match=r"2 \.safetensors files but no index"):
        open_one(tmp_path / "run")


def test_a_folder_without_weights_and_no_folder_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match=r"no \.safetensors file"):
        open_one(tmp_path / "empty")
    with pytest.raises(CheckpointNotFoundError, match="no such file or folder"):
        open_one(tmp_path / "nothing")


def test_a_file_of_another_format_is_a_sentence(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(CheckpointError, match=r"x\.bin"):
        open_one(tmp_path / "x.bin")


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "streamsoup", "inspect", str(path)], capture_output=True, text=True, timeout=8,
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Internal error" not in done.stderr


# -- fp8 and packed formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.scale", "w.scales", "w.scale_weight", "w.input_scale"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_fp8_with_scale_tensors_of_other_names_is_refused(tmp_path, name, dtype):
    tensors = {"w.weight": np.ones((4, 4), DTYPES[dtype]), name: np.ones((1, 1), np.float32)}
    with pytest.raises(UnsupportedDTypeError, match=r"scale.*Dequantise"):
        open_one(write_checkpoint(tmp_path / "run", tensors))


def test_fp8_without_scales_and_scales_without_fp8_are_fine(tmp_path):
    open_one(write_checkpoint(tmp_path / "a", {"w": np.ones(4, DTYPES["F8_E4M3"])}))
    open_one(write_checkpoint(tmp_path / "b", {"w": np.ones(4, np.float32), "layer_scale": np.ones(4, np.float32)}))


def test_block_exponents_are_refused(tmp_path):
    tensors = {"w_blocks": np.zeros(16, np.uint8), "w_exponents": np.ones(2, DTYPES["F8_E8M0"])}
    with pytest.raises(UnsupportedDTypeError, match="w_exponents"):
        open_one(write_checkpoint(tmp_path / "run", tensors))


# -- order -------------------------------------------------------------------------------------------------------


def test_what_a_shell_expands_is_put_into_natural_order(tmp_path):
    shell = sorted(f"run{i}" for i in range(1, 21))
    assert natural_order(shell) == [f"run{i}" for i in range(1, 21)]
    assert natural_order(["step-9", "step-10"]) == ["step-9", "step-10"]


def test_an_order_of_ones_own_is_kept():
    assert natural_order(["b", "a"]) == ["b", "a"]
    assert natural_order(["run10", "run9", "run11"]) == ["run10", "run9", "run11"]


def test_patterns_are_expanded_in_natural_order_and_brackets_in_names_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run10", "run9", "run[1]"):
        (tmp_path / name).mkdir()
    assert expand_paths(["run[0-9]*"]) == ["run9", "run10"]
    assert expand_paths(["start", "run[0-9]*"]) == ["start", "run9", "run10"]
    assert expand_paths(["run[1]"]) == ["run[1]"]
    with pytest.raises(CheckpointNotFoundError, match=r"none\*: matches no"):
        expand_paths(["none*"])


# -- identity ----------------------------------------------------------------------------------------------------


def _sampled(path, tensors):
    (shard,) = identify(open_one(write_checkpoint(path, tensors)))
    return shard.header_sha256, shard.sampled_blake2b


def test_identity_samples_every_tensor(tmp_path):
    shapes = {f"w{i}": (700 + 40 * i,) for i in range(25)}
    tensors = realistic(0, shapes)
    header, before = _sampled(tmp_path / "run", tensors)
    for name in shapes:
        changed = tensors | {name: np.roll(tensors[name], 1)}
        assert _sampled(tmp_path / "run", changed)[0] == header
        assert _sampled(tmp_path / "run", changed)[1] != before


def test_identity_holds_every_byte_of_small_tensors(tmp_path):
    tensors = {"scalar": np.array(1.5, np.float32), "bias": realistic(0, {"b": (128,)})["b"]}
    _, before = _sampled(tmp_path / "run", tensors)
    for name in tensors:
        for place in range(tensors[name].nbytes):
            raw = bytearray(tensors[name].tobytes())
            raw[place] ^= 1
            changed = np.frombuffer(bytes(raw), tensors[name].dtype).reshape(tensors[name].shape)
            assert _sampled(tmp_path / "run", tensors | {name: changed})[1] != before, (name, place)


def test_identity_holds_size_time_and_inode(tmp_path):
    path = write_checkpoint(tmp_path / "run", realistic(0, SHAPES), shards=2)
    for shard in identify(open_one(path)):
        stat = os.stat(shard.path)
        assert (shard.size_bytes, shard.mtime_ns, shard.inode) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
