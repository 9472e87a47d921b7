"""What a worker does with one tile: bring its bytes into reach, measure, combine or copy it, write it and record it."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamsoup.asked import Asked
from streamsoup.backends.protocol import Backend, Blend, Combined, Portion, Room, Slot
from streamsoup.dtypes import BY_NAME, DTYPES
from streamsoup.journal import TileRecord
from streamsoup.maps import bytes_at, same_bytes
from streamsoup.measurement import Measurement
from streamsoup.methods import Coefficients
from streamsoup.methods.protocol import Rule
from streamsoup.plan import Plan, Tile
from streamsoup.source import Source
from streamsoup.tiling import BLOCK_ELEMENTS
from streamsoup.write import Sink

_MOST_BLENDS = 256
# Position in the ingredient's table, offset and bytes, as sources want them.
Place = tuple[int, int, int]
_ITEMSIZES = np.array([d.itemsize for d in DTYPES], np.int64)


@dataclass(slots=True)
class Done:
    """What was done with a tile.

    Attributes
    ----------
    record : TileRecord or None
        None: it was only measured.
    tile_bytes, swept_bytes : int
        Of ingredients: in the tile, and gone through (several times, if it was measured first).
    written_bytes : int
    read, reduced, written : float
        Seconds in each stage.
    """

    record: TileRecord | None
    tile_bytes: int
    swept_bytes: int
    written_bytes: int
    read: float
    reduced: float
    written: float = 0.0


class TileWork:
    """Works on tiles of one plan, for several threads at once, each with a slot of its own.

    Parameters
    ----------
    plan : Plan
    backend, sink : see their protocols
    sources : sequence of Source
        One for each ingredient.

    Attributes
    ----------
    readers : Executor or None
        Where to bring bytes into slots; None: the worker does it.
    drops : bool
        A tile's bytes will not be wanted again once it is done.
    known : object
        What the method measured of all tensors together.
    rules : mapping of tensor to Coefficients or Elementwise
        For other tensors the method is asked, which takes tiles that hold whole tensors.
    """

    def __init__(self, plan: Plan, backend: Backend, sources: Sequence[Source], sink: Sink) -> None:
        self.readers: Executor | None = None
        self.drops = False
        self.known: object = None
        self.rules: Mapping[int, Rule] = {}
        self._plan = plan
        self._backend = backend
        self._sources = sources
        self._sink = sink
        self._lock = threading.Lock()
        self._ones = Coefficients((1.0,) * len(plan.checkpoints))
        self._blends: dict[tuple[int, bytes, int], tuple[Coefficients, Blend]] = {}

    def load(self, tile: Tile) -> None:
        """Read the bytes of a tile ahead."""
        for source, place in zip(self._sources, self._places(tile), strict=True):
            source.load(*place)

    def tile_bytes(self, tile: Tile) -> int:
        """Bytes of a tile in all ingredients together."""
        return tile.elements * int(self._plan.bytes_each[tile.tensor])

    def do(self, slot: Slot, tile: Tile, began: float) -> Done:
        """Combine or copy a tile; `began`: when it was asked for."""
        plan, places = self._plan, self._places(tile)
        if not plan.is_averaged(tile.tensor):
            done = self._copy(slot, tile, places, began)
        elif plan.method.fixed:
            done = self._average(slot, tile, self._numbers(tile.tensor), places, began)
        else:
            done = self._merge(slot, tile, places, began)
        self._drop(places)
        return done

    def measure(self, measurements: Mapping[int, Measurement], slot: Slot, tile: Tile, began: float) -> Done:
        """Measure a tile for the measurement of its tensor."""
        places = self._places(tile)
        addresses = self._fetch_group(slot, range(len(places)), places)
        read = time.perf_counter() - began
        self._look(slot, tile, addresses, measurements[tile.tensor])
        nbytes, looked = self.tile_bytes(tile), time.perf_counter() - began - read
        self._drop(places)
        return Done(None, nbytes, nbytes, 0, read, looked)

    def _drop(self, places: Sequence[Place]) -> None:
        for source, place in zip(self._sources, places, strict=True) if self.drops else ():
            source.drop(*place)

    def _places(self, tile: Tile) -> list[Place]:
        """Where a tile lies in each ingredient."""
        sizes = _ITEMSIZES[self._plan.in_dtypes[tile.tensor]].tolist()
        position = self._plan.alignment.position
        return [(position(i, tile.tensor), tile.start * size, tile.elements * size) for i, size in enumerate(sizes)]

    def _blend(self, tensor: int, numbers: Coefficients) -> Blend:
        """See `make_blend`; equal ones are made once."""
        plan = self._plan
        # Fixed numbers are mostly the same object. It is kept, so that its id is not another's.
        key = (id(numbers), plan.in_dtypes[tensor].tobytes(), int(plan.out_dtypes[tensor]))
        found = self._blends.get(key)
        if found is None:
            if len(self._blends) >= _MOST_BLENDS:
                self._blends.clear()
            found = self._blends[key] = numbers, make_blend(plan, tensor, numbers)
        return found[1]

    def _rule_of_tile(self, slot: Slot, tile: Tile, addresses: Sequence[Any]) -> tuple[Rule, int]:
        """Measure a tensor that lies in one tile; returns how often it was looked at, too."""
        asked = Asked(self._plan.method.merge(self._plan.info(tile.tensor), self.known))
        looks = 0
        while asked.rule is None:
            self._look(slot, tile, addresses, asked.measurement)
            asked.turn()
            looks += 1
        return asked.rule, looks

    def _look(self, slot: Slot, tile: Tile, addresses: Sequence[Any], measurement: Measurement) -> None:
        part = measurement.part()
        slot.look(addresses, self._values_blend(tile.tensor), self._portion(tile), part)
        with self._lock:
            measurement.merge(tile.tensor, part)

    def _portion(self, tile: Tile) -> Portion:
        return Portion(self._plan.info(tile.tensor), tile.start, tile.elements)

    def _values_blend(self, tensor: int) -> Blend:
        """Dtypes only."""
        return self._blend(tensor, self._ones)

    def _merge(self, slot: Slot, tile: Tile, places: Sequence[Place], began: float) -> Done:
        """Combine a tile by what its tensor's numbers say; all ingredients are in the slot at once."""
        addresses = self._fetch_group(slot, range(len(places)), places)
        read = time.perf_counter() - began
        rule, looks = self.rules.get(tile.tensor), 0
        if rule is None:
            rule, looks = self._rule_of_tile(slot, tile, addresses)
        if isinstance(rule, Coefficients):
            blend = self._blend(tile.tensor, rule)
            room = self._room(slot, tile, blend)
            token = slot.combine(addresses, blend, 0, tile.elements, tile.start // BLOCK_ELEMENTS, room)
        else:
            blend = self._values_blend(tile.tensor)
            room = self._room(slot, tile, blend)
            token = slot.merge(addresses, blend, self._portion(tile), rule, room)
        assert token is not None
        done = self._store(tile, blend, token.result(), room is None, began, read)
        done.swept_bytes += looks * done.tile_bytes
        return done

    def _room(self, slot: Slot, tile: Tile, blend: Blend) -> Room | None:
        """Memory of the sink's for a tile: on the slot's device, or of the host."""
        place = tile.tensor, tile.start * blend.out_itemsize, tile.elements * blend.out_itemsize
        if slot.device is not None and (there := self._sink.resident(*place, slot.device)) is not None:
            return there
        return self._sink.room(*place)

    def _store(self, tile: Tile, blend: Blend, combined: Combined, writes: bool, began: float, read: float) -> Done:
        """Write a tile that was combined, unless it lies in the sink's own memory, and record it."""
        reduced = time.perf_counter()
        if writes:
            self._sink.write(tile.tensor, tile.start * blend.out_itemsize, combined.output)
        record = TileRecord(
            tile.tensor,
            tile.start,
            tile.elements,
            digests=combined.digests.copy(),
            nonfinite=combined.nonfinite.copy() if combined.nonfinite.any() else None,
            overflowed=combined.overflowed,
        )
        return _done(record, sum(blend.itemsizes), blend.out_itemsize, began, read, reduced)

    def _numbers(self, tensor: int) -> Coefficients:
        rule = self.rules.get(tensor)
        return rule if isinstance(rule, Coefficients) else self._plan.numbers(tensor)

    def _average(self, slot: Slot, tile: Tile, numbers: Coefficients, places: Sequence[Place], began: float) -> Done:
        """Combine a tile by numbers that are known beforehand, a group of ingredients at a time."""
        plan = self._plan
        blend = self._blend(tile.tensor, numbers)
        room = self._room(slot, tile, blend)
        token, read = None, time.perf_counter() - began
        for first in range(0, len(blend.weights), plan.tiling.group):
            group = range(first, min(first + plan.tiling.group, len(blend.weights)))
            start = time.perf_counter()
            addresses = self._fetch_group(slot, group, places)
            read += time.perf_counter() - start
            token = slot.combine(addresses, blend, first, tile.elements, tile.start // BLOCK_ELEMENTS, room)
        assert token is not None
        return self._store(tile, blend, token.result(), room is None, began, read)

    def _copy(self, slot: Slot, tile: Tile, places: Sequence[Place], began: float) -> Done:
        plan, count = self._plan, len(self._plan.checkpoints)
        itemsize = plan.out_dtype(tile.tensor).itemsize
        nbytes = tile.elements * itemsize
        output = slot.output(nbytes)
        first = np.frombuffer(output, np.uint8)
        digests = np.zeros(count, np.uint64)
        differs = np.zeros(count, np.bool_)
        for i in range(count):
            address = self._fetch(slot, i, places[i], staging_index=0)
            if i == 0:
                first[:] = bytes_at(address, nbytes)
            else:
                differs[i] = not same_bytes(output, address)
            digests[i] = self._backend.digest(address, nbytes, itemsize, tile.start // BLOCK_ELEMENTS)
        reduced = time.perf_counter()
        self._sink.write(tile.tensor, tile.start * itemsize, output)
        record = TileRecord(tile.tensor, tile.start, tile.elements, digests, differs=differs if differs.any() else None)
        return _done(record, count * itemsize, itemsize, began, reduced - began, reduced)

    def _fetch_group(self, slot: Slot, group: range, places: Sequence[Place]) -> list[Any]:
        """Bring a group of ingredients into reach.

        Readers take one piece at a time from one queue, so that each file is read nearly in order, and all files at
        once; workers that read their own tiles, several files each, got half the rate from a cold disk.
        """
        if self.readers is None or not self._plan.staged:
            return [self._fetch_operand(slot, i, places[i], staging_index=i - group.start) for i in group]
        fetch = self._fetch_operand
        pieces = [self.readers.submit(fetch, slot, i, places[i], staging_index=i - group.start) for i in group]
        wait(pieces)  # all of them, even if one fails: nothing may write into the slot later
        return [piece.result() for piece in pieces]

    def _fetch_operand(self, slot: Slot, ingredient: int, place: Place, *, staging_index: int) -> Any:
        """Bring an operand into reach, unless it lies on the slot's device."""
        if slot.device is not None:
            source = self._sources[ingredient]
            there = source.resident(*place, slot.device)
            if there is not None:
                return there
            if source.delivers and (there := slot.buffer(staging_index, place[2])) is not None:
                source.deliver(*place, there)
                return there
        return self._fetch(slot, ingredient, place, staging_index=staging_index)

    def _fetch(self, slot: Slot, ingredient: int, place: Place, *, staging_index: int) -> int:
        staging = slot.staging(staging_index, place[2])
        return self._sources[ingredient].fetch(*place, staging)


def _done(record: TileRecord, read_itemsize: int, itemsize: int, began: float, read: float, reduced: float) -> Done:
    elements, written = record.elements, time.perf_counter() - reduced
    nbytes = elements * read_itemsize
    return Done(record, nbytes, nbytes, elements * itemsize, read, reduced - began - read, written)


def make_blend(plan: Plan, tensor: int, numbers: Coefficients) -> Blend:
    """Gather the numbers with which a tensor is combined."""
    dtypes = [plan.in_dtype(i, tensor) for i in range(len(plan.checkpoints))]
    out = plan.out_dtype(tensor)
    return Blend(
        codes=np.array([d.kernel_code for d in dtypes], np.uint8),
        itemsizes=tuple(d.itemsize for d in dtypes),
        weights=np.array(numbers.weights),
        divisor=numbers.divisor,
        hashed=np.array([d.index < len(BY_NAME) for d in dtypes], np.uint8),
        out_code=out.kernel_code,
        out_itemsize=out.itemsize,
        wide=bool(plan.wide[tensor]),
        single=plan.accumulate == "float32",
    )
