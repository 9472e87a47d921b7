"""Bytes in: maps and plain reads bring the same, and say what is wrong with a file."""

from __future__ import annotations

import ctypes
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from factory import SHAPES, any_bits, fine_tunes, write_checkpoint

from streamsoup import open_files, read
from streamsoup.checkpoints import open_checkpoints
from streamsoup.errors import IngredientReadError, RecipeError
from streamsoup.maps import FileMap, bytes_at
from streamsoup.read import choose_mode, open_sources


@pytest.mark.parametrize("staged", [True, False])
def test_every_part_of_every_tensor_is_found(tmp_path, read_mode, staged):
    if read_mode == "plain" and not staged:
        pytest.skip("plain reads need a buffer")
    rng = np.random.default_rng(0)
    tensors = {f"w{i}": any_bits(rng, "BF16", (101 + i,)) for i in range(6)}
    checkpoints = open_checkpoints([str(write_checkpoint(tmp_path / "r", tensors, shards=3, pad=1))])
    table = checkpoints[0].table
    with open_sources(checkpoints, read_mode) as (source,):
        for position, name in enumerate(table.names):
            raw = tensors[name].tobytes()
            for offset, nbytes in ((0, len(raw)), (1, 7), (len(raw) - 1, 1)):
                buffer = bytearray(nbytes)
                address = source.fetch(position, offset, nbytes, memoryview(buffer) if staged else None)
                assert bytes_at(address, nbytes).tobytes() == raw[offset : offset + nbytes]
                if staged:
                    assert address == ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_threads_may_read_more_files_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "_MOST", 2)
    rng = np.random.default_rng(0)
    tensors = [{f"w{i}": any_bits(rng, "F32", (50,)) for i in range(8)} for _ in range(3)]
    paths = [str(write_checkpoint(tmp_path / f"r{i}", t, shards=8)) for i, t in enumerate(tensors)]
    checkpoints = open_checkpoints(paths)
    before = len(os.listdir("/proc/self/fd"))
    failures = []

    def work(seed):
        order = np.random.default_rng(seed)
        for _ in range(100):
            i, position = int(order.integers(3)), int(order.integers(8))
            buffer = bytearray(200)
            sources[i].fetch(position, 0, 200, memoryview(buffer))
            if bytes(buffer) != tensors[i][checkpoints[i].table.names[position]].tobytes():
                failures.append((i, position))

    with open_sources(checkpoints, "plain") as sources:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/proc/self/fd")) - before <= 6
    assert not failures
    assert len(os.listdir("/proc/self/fd")) == before


def test_maps_hold_no_descriptor(tmp_path):
    checkpoints = open_checkpoints(fine_tunes(tmp_path, 5, shards=4))
    before = len(os.listdir("/proc/self/fd"))
    with open_sources(checkpoints, "map") as sources:
        for source in sources:
            for position in range(len(SHAPES)):
                source.fetch(position, 0, 1, None)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_kernel_without_dontcache_is_served_too(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 1)
    real = os.preadv

    def old_kernel(fd, buffers, offset, flags=0):
        if flags:
            raise OSError(95, "Operation not supported")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", old_kernel)
    with open_sources(open_checkpoints(runs), "plain") as (source,):
        source.fetch(0, 0, 8, memoryview(bytearray(8)))


def test_short_reads_are_completed(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 1)
    checkpoints = open_checkpoints(runs)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at, flags=0: real(fd, [buffers[0][:3]], at))
    buffer = bytearray(20)
    with open_sources(checkpoints, "plain") as (source,):
        source.fetch(0, 0, 20, memoryview(buffer))
    begin = int(checkpoints[0].table.begins[0])
    with open(checkpoints[0].shards[0].path, "rb") as file:
        assert file.read()[begin : begin + 20] == bytes(buffer)


def test_a_failing_disk_is_a_sentence(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 1)

    def broken(*_args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with (
        open_sources(open_checkpoints(runs), "plain") as (source,),
        pytest.raises(IngredientReadError, match=r"run1.*Input/output error"),
    ):
        source.fetch(0, 0, 8, memoryview(bytearray(8)))


def test_a_map_checks_the_size_at_open(tmp_path):
    (tmp_path / "x").write_bytes(b"1234")
    with pytest.raises(OSError, match="4 bytes, expected 5"):
        FileMap(str(tmp_path / "x"), 5)
    mapped = FileMap(str(tmp_path / "x"), 4)
    assert bytes_at(mapped.address, 4).tobytes() == b"1234"
    mapped.close()
    mapped.close()


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "9p", "cifs", "virtiofs"])
def test_network_file_systems_are_read_plainly(tmp_path, monkeypatch, kind):
    import psutil

    checkpoints = open_checkpoints(fine_tunes(tmp_path, 1))
    mounts = [SimpleNamespace(mountpoint=m, fstype=f) for m, f in (("/", "ext4"), (str(tmp_path), kind))]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert choose_mode(checkpoints) == "plain"


def test_what_is_local_is_mapped_and_read_ahead_if_it_is_cold(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(fine_tunes(tmp_path, 1))
    monkeypatch.setattr(read, "_is_network", lambda _: False)
    monkeypatch.setattr(FileMap, "resident", lambda *_: True)
    assert choose_mode(checkpoints) == "map"
    monkeypatch.setattr(FileMap, "resident", lambda *_: False)
    assert choose_mode(checkpoints) == "ahead"
    assert choose_mode(checkpoints, "map") == "map"


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="auto, map, ahead, plain"):
        choose_mode([], "quick")
