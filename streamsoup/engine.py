"""Runs a plan through a backend into a sink: the only place with threads and queues.

Each worker takes the next tile, brings the ingredients' bytes into reach, has them combined, writes the result and
records it. Workers share nothing but the list of tiles, so reads, arithmetic and writes of different tiles overlap.
One more thread makes finished tiles durable and only then enters them into the journal.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial

import numpy as np

from streamsoup.asked import Asked
from streamsoup.backends.protocol import Backend, Blend, Combined, Portion, Slot
from streamsoup.dtypes import BY_NAME, DTYPES
from streamsoup.journal import TileRecord
from streamsoup.maps import bytes_at, same_bytes
from streamsoup.measurement import Measurement
from streamsoup.methods import Coefficients
from streamsoup.methods.protocol import Rule
from streamsoup.outcome import Outcome, Progress
from streamsoup.plan import Plan, Tile
from streamsoup.read import Source
from streamsoup.threads import insist, start
from streamsoup.tile_queue import TileQueue
from streamsoup.tiling import BLOCK_ELEMENTS
from streamsoup.write import Sink

_PROGRESS_SECONDS = 0.1
# Between two commits. Finished tiles go to the disk all the time: at the end little is left to wait for, and a crash
# costs little work.
_COMMIT_SECONDS = 0.05
_MOST_BLENDS = 256
# Position in the ingredient's table, offset and bytes, as sources want them.
Place = tuple[int, int, int]
# What a worker does with a tile.
Step = Callable[[Slot, Tile, Sequence[Place], float], None]
_ITEMSIZES = np.array([d.itemsize for d in DTYPES], np.int64)


class Engine:
    """Runs tiles of one plan.

    Parameters
    ----------
    plan : Plan
    backend, sink : see their protocols
    sources : sequence of Source
        One for each ingredient.
    commit : callable taking a list of TileRecord, optional
        Enters tiles into a journal; called after the sink made them durable, from one thread at a time.
    progress : callable taking a Progress, optional
        Called about ten times a second from the thread that called `run`. An exception from it stops the run.

    Attributes
    ----------
    outcome : Outcome
    known : object
        What the method measured of all tensors together.

    Notes
    -----
    Memory: one slot for each worker (see `streamsoup.tiling`). Bytes moved: each ingredient byte is read once, each
    output byte written once.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        sources: Sequence[Source],
        sink: Sink,
        *,
        commit: Callable[[list[TileRecord]], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.outcome = Outcome.empty(plan)
        self.known: object = None
        self._plan = plan
        self._backend = backend
        self._sources = sources
        self._sink = sink
        self._commit = commit
        self._progress = progress
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._finished: list[TileRecord] = []
        self._error: BaseException | None = None
        self._sync_failed = False
        self._already_bytes = 0
        self._swept_bytes = 0
        self._again = self._drops = False
        self._rules: Mapping[int, Rule] = {}
        self._ones = Coefficients((1.0,) * len(plan.checkpoints))
        self._readers: ThreadPoolExecutor | None = None
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._blends: dict[tuple[int, bytes, int], tuple[Coefficients, Blend]] = {}
        self._slots = [self._new_slot() for _ in range(plan.tiling.workers)]

    def _new_slot(self) -> Slot:
        plan = self._plan
        return self._backend.slot(
            plan.tiling,
            in_itemsize=plan.needs.in_itemsize,
            out_itemsize=plan.needs.out_itemsize,
            ingredients=len(plan.checkpoints),
            staged=plan.staged,
        )

    def resume(self, records: Iterable[TileRecord]) -> dict[int, list[tuple[int, int]]]:
        """Take in what an earlier run finished; returns it by tensor, as `Plan.tiles` wants it."""
        done: dict[int, list[tuple[int, int]]] = {}
        for record in records:
            self.outcome.add(record)
            self._already_bytes += record.elements * int(self._plan.bytes_each[record.tensor])
            ranges = done.setdefault(record.tensor, [])
            if ranges and sum(ranges[-1]) == record.start:  # tiles come nearly in order: few ranges are left
                ranges[-1] = ranges[-1][0], ranges[-1][1] + record.elements
            else:
                ranges.append((record.start, record.elements))
        return done

    def run(self, tiles: Iterable[Tile], rules: Mapping[int, Rule] | None = None, *, again: bool = False) -> Outcome:
        """Do these tiles, and return when their bytes are durable.

        On an error or an interrupt, tiles that were finished are still committed before it is raised.

        Parameters
        ----------
        tiles : iterable of Tile
        rules : mapping of tensor to Coefficients or Elementwise, optional
            What was found by `measure`; for other tensors the method is asked, and what it wants is measured, which
            takes tiles that hold whole tensors.
        again : bool
            The bytes were read by a sweep before, and kept.
        """
        self._rules = rules or {}
        return self._sweep(tiles, self._do, again=again, last=True)

    def measure(
        self, tiles: Iterable[Tile], measurements: Mapping[int, Measurement], *, again: bool = False, keep: bool = True
    ) -> None:
        """Measure these tiles, each for the measurement of its tensor.

        Parameters
        ----------
        tiles : iterable of Tile
        measurements : mapping of tensor to Measurement
        again : bool
            The bytes were read by a sweep before, and kept.
        keep : bool
            They will be wanted again soon.
        """
        self._sweep(tiles, partial(self._measure, measurements), again=again, last=not keep)

    def _sweep(self, tiles: Iterable[Tile], step: Step, *, again: bool, last: bool) -> Outcome:
        tiling = self._plan.tiling
        self._again, self._drops = again, last and self._plan.ahead
        with contextlib.ExitStack() as stack:
            self._readers, loaders = (
                stack.enter_context(ThreadPoolExecutor(count, f"streamsoup-{name}")) if count else None
                for name, count in (("read", tiling.readers), ("load", tiling.loaders))
            )
            return self._run(tiles, step, loaders)

    def _run(self, tiles: Iterable[Tile], step: Step, loaders: ThreadPoolExecutor | None) -> Outcome:
        began = time.perf_counter()
        load = self._load if self._plan.ahead and not self._again else None
        queue = TileQueue(tiles, load=load, nbytes=self._tile_bytes, readers=loaders)
        self._stop.clear()
        self._idle.clear()
        running = [len(self._slots)]
        ended: list[threading.Event] = []
        try:
            for i, slot in enumerate(self._slots):
                ended.append(start(f"streamsoup-{i}", partial(self._work, slot, queue, step, running)))
            ended.append(start("streamsoup-sync", self._keep_syncing))
            while not self._idle.wait(_PROGRESS_SECONDS):
                self._report("reduce")
        finally:
            self._stop.set()
            queue.cancel()
            # While a thread lives it may use maps and descriptors that the caller is about to close.
            insist([*(event.wait for event in ended), queue.settle])
            waiting = time.perf_counter()
            self._commit_finished()
            self.outcome.stage_seconds["sync"] += time.perf_counter() - waiting
            self.outcome.seconds += time.perf_counter() - began
            self._report_quietly("sync")
        if self._error is not None:
            raise self._error
        return self.outcome

    def _work(self, slot: Slot, tiles: TileQueue, step: Step, running: list[int]) -> None:
        try:
            while not self._stop.is_set():
                began = time.perf_counter()
                tile = tiles.take()
                if tile is None:
                    break
                places = self._places(tile)
                step(slot, tile, places, began)
                if self._drops:
                    for source, place in zip(self._sources, places, strict=True):
                        source.drop(*place)
        except BaseException as error:  # raised again in the thread that called run
            self._fail(error)
        finally:
            with self._lock:
                running[0] -= 1
                if not running[0]:
                    self._idle.set()

    def _load(self, tile: Tile) -> None:
        for source, place in zip(self._sources, self._places(tile), strict=True):
            source.load(*place)

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

    def _tile_bytes(self, tile: Tile) -> int:
        return tile.elements * int(self._plan.bytes_each[tile.tensor])

    def _do(self, slot: Slot, tile: Tile, places: Sequence[Place], began: float) -> None:
        """Combine or copy a tile."""
        plan = self._plan
        if not plan.is_averaged(tile.tensor):
            self._copy(slot, tile, places, began)
        elif plan.method.fixed:
            self._average(slot, tile, places, began)
        else:
            self._merge(slot, tile, places, began)

    def _rule_of_tile(self, slot: Slot, tile: Tile, addresses: Sequence[int]) -> Rule:
        """Measure a tensor that lies in one tile."""
        asked = Asked(self._plan.method.merge(self._plan.info(tile.tensor), self.known))
        while asked.rule is None:
            self._look(slot, tile, addresses, asked.measurement)
            asked.turn()
            with self._lock:
                self._swept_bytes += self._tile_bytes(tile)
        return asked.rule

    def _measure(
        self, measurements: Mapping[int, Measurement], slot: Slot, tile: Tile, places: Sequence[Place], began: float
    ) -> None:
        addresses = self._fetch_group(slot, range(len(places)), places)
        read = time.perf_counter() - began
        self._look(slot, tile, addresses, measurements[tile.tensor])
        with self._lock:
            self.outcome.stage_seconds["read"] += read
            self.outcome.stage_seconds["reduce"] += time.perf_counter() - began - read
            self._count(self._tile_bytes(tile))

    def _look(self, slot: Slot, tile: Tile, addresses: Sequence[int], measurement: Measurement) -> None:
        part = measurement.part()
        slot.look(addresses, self._values_blend(tile.tensor), self._portion(tile), part)
        with self._lock:
            measurement.merge(tile.tensor, part)

    def _portion(self, tile: Tile) -> Portion:
        return Portion(self._plan.info(tile.tensor), tile.start, tile.elements)

    def _values_blend(self, tensor: int) -> Blend:
        """Dtypes only."""
        return self._blend(tensor, self._ones)

    def _merge(self, slot: Slot, tile: Tile, places: Sequence[Place], began: float) -> None:
        """Combine a tile by what its tensor's numbers say; all ingredients are in the slot at once."""
        addresses = self._fetch_group(slot, range(len(places)), places)
        read = time.perf_counter() - began
        rule = self._rules.get(tile.tensor) or self._rule_of_tile(slot, tile, addresses)
        if isinstance(rule, Coefficients):
            blend = self._blend(tile.tensor, rule)
            room = self._room(tile, blend)
            token = slot.combine(addresses, blend, 0, tile.elements, tile.start // BLOCK_ELEMENTS, room)
        else:
            blend = self._values_blend(tile.tensor)
            room = self._room(tile, blend)
            token = slot.merge(addresses, blend, self._portion(tile), rule, room)
        assert token is not None
        self._store(tile, blend, token.result(), room is None, began, read)

    def _room(self, tile: Tile, blend: Blend) -> memoryview | None:
        return self._sink.room(tile.tensor, tile.start * blend.out_itemsize, tile.elements * blend.out_itemsize)

    def _store(self, tile: Tile, blend: Blend, combined: Combined, writes: bool, began: float, read: float) -> None:
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
        self._finish(record, sum(blend.itemsizes), blend.out_itemsize, began, read, reduced)

    def _average(self, slot: Slot, tile: Tile, places: Sequence[Place], began: float) -> None:
        """Combine a tile by numbers that are known beforehand, a group of ingredients at a time."""
        plan = self._plan
        blend = self._blend(tile.tensor, plan.numbers(tile.tensor))
        room = self._room(tile, blend)
        token, read = None, time.perf_counter() - began
        for first in range(0, len(blend.weights), plan.tiling.group):
            group = range(first, min(first + plan.tiling.group, len(blend.weights)))
            start = time.perf_counter()
            addresses = self._fetch_group(slot, group, places)
            read += time.perf_counter() - start
            token = slot.combine(addresses, blend, first, tile.elements, tile.start // BLOCK_ELEMENTS, room)
        assert token is not None
        self._store(tile, blend, token.result(), room is None, began, read)

    def _copy(self, slot: Slot, tile: Tile, places: Sequence[Place], began: float) -> None:
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
        self._finish(record, count * itemsize, itemsize, began, reduced - began, reduced)

    def _fetch_group(self, slot: Slot, group: range, places: Sequence[Place]) -> list[int]:
        """Bring a group of ingredients into reach.

        Readers take one piece at a time from one queue, so that each file is read nearly in order, and all files at
        once; workers that read their own tiles, several files each, got half the rate from a cold disk.
        """
        if self._readers is None or not self._plan.staged:
            return [self._fetch(slot, i, places[i], staging_index=i - group.start) for i in group]
        pieces = [self._readers.submit(self._fetch, slot, i, places[i], staging_index=i - group.start) for i in group]
        wait(pieces)  # all of them, even if one fails: nothing may write into the slot later
        return [piece.result() for piece in pieces]

    def _fetch(self, slot: Slot, ingredient: int, place: Place, *, staging_index: int) -> int:
        staging = slot.staging(staging_index, place[2])
        return self._sources[ingredient].fetch(*place, staging)

    def _finish(
        self, record: TileRecord, read_itemsize: int, itemsize: int, began: float, read: float, reduced: float
    ) -> None:
        written = time.perf_counter()
        with self._lock:
            self._finished.append(record)
            self.outcome.add(record)
            self._count(record.elements * read_itemsize)
            self.outcome.bytes_written += record.elements * itemsize
            stages = self.outcome.stage_seconds
            stages["read"] += read
            stages["reduce"] += reduced - began - read
            stages["write"] += written - reduced

    def _count(self, nbytes: int) -> None:
        """Count what was gone through; what an earlier sweep read and kept was not read again."""
        self._swept_bytes += nbytes
        if not self._again:
            self.outcome.bytes_read += nbytes

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
        self._stop.set()

    def _keep_syncing(self) -> None:
        try:
            while not self._idle.wait(_COMMIT_SECONDS) and not self._stop.is_set():
                self._commit_finished()
        except BaseException as error:  # raised again in the thread that called run
            self._fail(error)

    def _commit_finished(self) -> None:
        with self._lock:
            batch, self._finished = self._finished, []
        if batch and not self._sync_failed:
            # The kernel reports a failed write-back once: a second sync may succeed though bytes of the first are lost.
            self._sync_failed = True
            self._sink.sync()
            self._sync_failed = False
            if self._commit is not None:
                self._commit(batch)

    def _report(self, stage: str) -> None:
        if self._progress is not None:
            seconds = time.perf_counter() - self._began
            done = self._already_bytes + self._swept_bytes
            rate = self._swept_bytes / 1e9 / seconds if seconds else 0.0
            self._progress(Progress(stage, done, self._plan.bytes_to_sweep, seconds, rate))

    def _report_quietly(self, stage: str) -> None:
        """Report while an exception may be on its way: one from the callback must not hide it."""
        try:
            self._report(stage)
        except Exception as error:
            self._fail(error)


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
    )
