"""Bytes out: files of their final size, at known offsets, whole or not at all."""

from __future__ import annotations

import os

import numpy as np
import pytest
from factory import SHAPES, realistic, write_checkpoint
from simmer import plan_for

from streamsoup.errors import DestinationError, DiskSpaceError
from streamsoup.files import require_space, write_durably
from streamsoup.write import FileSink, move_file, move_folder


@pytest.fixture
def layout(tmp_path):
    return plan_for([write_checkpoint(tmp_path / "r", realistic(0, SHAPES))]).layout


def test_files_have_their_final_size_and_header_before_the_first_tile(tmp_path, layout):
    with FileSink(tmp_path, layout):
        (shard,) = layout.shards
        raw = (tmp_path / shard.name).read_bytes()
        assert len(raw) == shard.file_bytes
        assert raw.startswith(shard.head)
        assert os.stat(tmp_path / shard.name).st_blocks * 512 >= shard.file_bytes, "reserved, not a hole"


def test_tiles_may_come_in_any_order_and_go_to_their_places(tmp_path, layout):
    with FileSink(tmp_path, layout) as sink:
        sink.write(1, 4, memoryview(b"late"))
        sink.write(1, 0, memoryview(b"soon"))
        sink.sync()
    begin = int(layout.begins[1])
    assert (tmp_path / layout.shards[0].name).read_bytes()[begin : begin + 8] == b"soonlate"


def test_going_on_keeps_what_was_written(tmp_path, layout):
    with FileSink(tmp_path, layout) as sink:
        sink.write(0, 0, memoryview(b"kept"))
    with FileSink(tmp_path, layout, existing=True):
        pass
    begin = int(layout.begins[0])
    assert (tmp_path / layout.shards[0].name).read_bytes()[begin : begin + 4] == b"kept"


def test_short_writes_are_completed(tmp_path, layout, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, buffer, at: real(fd, bytes(buffer)[:5], at))
    with FileSink(tmp_path, layout) as sink:
        sink.write(0, 0, memoryview(b"0123456789abc"))
    begin = int(layout.begins[0])
    assert (tmp_path / layout.shards[0].name).read_bytes()[begin : begin + 13] == b"0123456789abc"


def test_a_file_that_cannot_be_made_closes_what_was_opened(tmp_path, layout):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / layout.shards[0].name).mkdir()
    with pytest.raises(DestinationError, match=r"model\.safetensors"):
        FileSink(tmp_path, layout)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_small_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_durably(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DiskSpaceError):
            write_durably(path, "new")
    assert path.read_text() == "old"
    write_durably(path, "néw")
    assert path.read_text(encoding="utf-8") == "néw"


@pytest.mark.parametrize("atomic", [True, False])
def test_moving_never_replaces_unasked(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr("streamsoup.write._renameat2", lambda *_: False)
    for kind in ("file", "folder"):
        one, two = tmp_path / f"{kind}1", tmp_path / f"{kind}2"
        for path in (one, two):
            path.write_text(path.name) if kind == "file" else path.mkdir()
        with pytest.raises(DestinationError, match="appeared"):
            (move_file if kind == "file" else move_folder)(one, two, overwrite=False)
        assert one.exists()
        assert two.exists()


@pytest.mark.parametrize("atomic", [True, False])
def test_replacing_a_folder_tells_where_the_old_one_is(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr("streamsoup.write._renameat2", lambda *_: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    aside = move_folder(tmp_path / "new", tmp_path / "old", overwrite=True)
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["new"]
    assert aside is not None
    assert [p.name for p in aside.iterdir()] == ["old"]


def test_room_is_checked_by_what_an_ordinary_user_may_use(tmp_path):
    stat = os.statvfs(tmp_path)
    require_space(tmp_path, 1)
    with pytest.raises(DiskSpaceError, match="Make room"):
        require_space(tmp_path, stat.f_bavail * stat.f_frsize + 10**12)


def test_out_of_order_tiles_of_one_tensor_meet_at_their_seams(tmp_path):
    values = np.arange(6000, dtype=np.float32)
    layout = plan_for([write_checkpoint(tmp_path / "r", {"w": values})]).layout
    with FileSink(tmp_path, layout) as sink:
        for begin, end in ((4096, 6000), (0, 2048), (2048, 4096)):
            sink.write(0, 4 * begin, memoryview(values[begin:end].tobytes()))
    assert (tmp_path / layout.shards[0].name).read_bytes().endswith(values.tobytes())
