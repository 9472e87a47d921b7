"""Tiles in order, the bytes of those to come being read meanwhile."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait

from streamsoup.plan import Tile

# How far to read ahead: enough to keep a disk busy, little enough to stay in the page cache until it is used.
AHEAD_BYTES = 64 << 20


class TileQueue:
    """Hands out tiles, each once its bytes have been loaded. Threads may share it.

    Parameters
    ----------
    tiles : iterable of Tile
    load : callable taking a Tile, optional
        Reads the bytes of a tile ahead.
    nbytes : callable taking a Tile
        How many they are.
    readers : Executor, optional
        Where to load; without it, a tile is loaded when it is taken.
    """

    def __init__(
        self,
        tiles: Iterable[Tile],
        *,
        load: Callable[[Tile], None] | None = None,
        nbytes: Callable[[Tile], int],
        readers: Executor | None = None,
    ) -> None:
        self._tiles = iter(tiles)
        self._load = load
        self._nbytes = nbytes
        self._readers = readers
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Tile, Future[None]]] = deque()
        self._ahead_bytes = 0
        self._cancelled = False
        self._loading: list[Future[None]] = []

    def take(self) -> Tile | None:
        """Return the next tile, or None after the last.

        Raises
        ------
        IngredientReadError
        """
        if self._load is None or self._readers is None:
            with self._lock:
                tile = next(self._tiles, None)
            if tile is not None and self._load is not None:
                self._load(tile)
            return tile
        with self._lock:
            self._look_ahead(self._load, self._readers)
            if not self._waiting:
                return None
            tile, loaded = self._waiting.popleft()
            self._ahead_bytes -= self._nbytes(tile)
            self._look_ahead(self._load, self._readers)
        loaded.result()
        return tile

    def _look_ahead(self, load: Callable[[Tile], None], readers: Executor) -> None:
        while not self._cancelled and (not self._waiting or self._ahead_bytes < AHEAD_BYTES):
            tile = next(self._tiles, None)
            if tile is None:
                return
            self._waiting.append((tile, readers.submit(load, tile)))
            self._ahead_bytes += self._nbytes(tile)

    def cancel(self) -> None:
        """Load no more."""
        with self._lock:
            self._cancelled = True
            self._loading = [loaded for _, loaded in self._waiting if not loaded.cancel()]
            self._waiting.clear()

    def settle(self) -> None:
        """After `cancel`, wait until nothing is being loaded any more."""
        wait(self._loading)
