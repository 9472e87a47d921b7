"""Tiles come in order, loaded before they are handed out, and not too far ahead."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from streamsoup import tile_queue
from streamsoup.plan import Tile
from streamsoup.tile_queue import TileQueue

TILES = [Tile(0, k, 1) for k in range(20)]


def take_all(queue: TileQueue) -> list[Tile]:
    return list(iter(queue.take, None))


def test_without_loading_tiles_come_in_order():
    assert take_all(TileQueue(TILES, nbytes=lambda _: 1)) == TILES


def test_without_readers_a_tile_is_loaded_when_it_is_taken():
    loaded = []
    queue = TileQueue(TILES, load=loaded.append, nbytes=lambda _: 1)
    assert queue.take() == TILES[0]
    assert loaded == TILES[:1]


def test_readers_look_ahead_by_bytes_and_every_tile_is_loaded_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(tile_queue, "AHEAD_BYTES", 50)
    loaded, may_load = [], threading.Event()

    def load(tile):
        may_load.wait(30)
        loaded.append(tile)

    with ThreadPoolExecutor(1) as readers:
        queue = TileQueue(TILES, load=load, nbytes=lambda _: 10, readers=readers)
        may_load.set()
        taken = []
        while (tile := queue.take()) is not None:
            assert tile in loaded
            taken.append(tile)
            readers.submit(lambda: None).result()  # whatever was asked for is loaded now
            assert len(loaded) - len(taken) <= 5
            assert len(loaded) - len(taken) >= min(5, len(TILES) - len(taken))
    assert taken == TILES


def test_an_error_while_loading_is_raised_with_its_tile():
    def load(tile):
        if tile.start == 3:
            raise OSError("gone")

    with ThreadPoolExecutor(2) as readers:
        queue = TileQueue(TILES, load=load, nbytes=lambda _: 1, readers=readers)
        assert [queue.take() for _ in range(3)] == TILES[:3]
        with pytest.raises(OSError, match="gone"):
            queue.take()


def test_a_cancelled_queue_loads_no_more():
    loaded, may_load = [], threading.Event()

    def load(tile):
        may_load.wait(30)
        loaded.append(tile)

    with ThreadPoolExecutor(1) as readers:
        queue = TileQueue(TILES, load=load, nbytes=lambda _: 1, readers=readers)
        thread = threading.Thread(target=queue.take)
        thread.start()
        while not queue._waiting:
            pass
        queue.cancel()
        may_load.set()
        thread.join()
    assert len(loaded) <= 2
