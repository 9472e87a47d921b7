"""Runs a plan through a backend into a sink: the only place with threads and queues.

Each worker takes the next tile and does its work (see `streamsoup.tile_work`). Workers share nothing but the list of
tiles, so reads, arithmetic and writes of different tiles overlap.
One more thread makes finished tiles durable and only then enters them into the journal.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from streamsoup.backends.protocol import Backend, Slot
from streamsoup.journal import TileRecord
from streamsoup.measurement import Measurement
from streamsoup.methods.protocol import Rule
from streamsoup.outcome import Outcome, Progress
from streamsoup.plan import Plan, Tile
from streamsoup.source import Source
from streamsoup.threads import insist, start
from streamsoup.tile_queue import TileQueue
from streamsoup.tile_work import Done, TileWork
from streamsoup.write import Sink

_PROGRESS_SECONDS = 0.1
# Between two commits. Finished tiles go to the disk all the time: at the end little is left to wait for, and a crash
# costs little work.
_COMMIT_SECONDS = 0.05
# What a worker does with a tile; the number is when it was asked for.
Step = Callable[[Slot, Tile, float], Done]


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
    ranks : int
        How many share the work: each has about as much to do as the others.

    Attributes
    ----------
    outcome : Outcome
    work : TileWork

    Notes
    -----
    Memory: one slot for each worker (see `streamsoup.tiling`). Bytes moved: those of its tiles once a sweep.
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
        ranks: int = 1,
    ) -> None:
        self.outcome = Outcome.empty(plan)
        self.work = TileWork(plan, backend, sources, sink)
        self._plan = plan
        self._sink = sink
        self._commit = commit
        self._progress = progress
        self._ranks = ranks
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._finished: list[TileRecord] = []
        self._error: BaseException | None = None
        self._sync_failed = False
        self._already_bytes = 0
        self._swept_bytes = 0
        self._again = self._measuring = False
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._slots = [backend.slot(plan.tiling, plan.needs) for _ in range(plan.tiling.workers)]

    def resume(self, records: Iterable[TileRecord]) -> dict[int, list[tuple[int, int]]]:
        """Take in what an earlier run finished; returns it by tensor, as `Plan.tiles` wants it."""
        done: dict[int, list[tuple[int, int]]] = {}
        for record in records:
            if not _take(done.setdefault(record.tensor, []), record.start, record.elements):
                continue  # two processes did it: it counts once
            self.outcome.add(record)
            self._already_bytes += record.elements * int(self._plan.bytes_each[record.tensor])
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
        self.work.rules = rules or {}
        return self._sweep(tiles, self.work.do, again=again, last=True)

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
        self._measuring = True
        try:
            self._sweep(tiles, partial(self.work.measure, measurements), again=again, last=not keep)
        finally:
            self._measuring = False

    def _sweep(self, tiles: Iterable[Tile], step: Step, *, again: bool, last: bool) -> Outcome:
        tiling = self._plan.tiling
        self._again, self.work.drops = again, last and self._plan.ahead
        with contextlib.ExitStack() as stack:
            self.work.readers, loaders = (
                stack.enter_context(ThreadPoolExecutor(count, f"streamsoup-{name}")) if count else None
                for name, count in (("read", tiling.readers), ("load", tiling.loaders))
            )
            return self._run(tiles, step, loaders)

    def _run(self, tiles: Iterable[Tile], step: Step, loaders: ThreadPoolExecutor | None) -> Outcome:
        began = time.perf_counter()
        load = self.work.load if self._plan.ahead and not self._again else None
        queue = TileQueue(tiles, load=load, nbytes=self.work.tile_bytes, readers=loaders)
        self._stop.clear()
        self._idle.clear()
        running = [len(self._slots)]
        ended: list[threading.Event] = []
        try:
            for i, slot in enumerate(self._slots):
                ended.append(start(f"streamsoup-{i}", partial(self._work, slot, queue, step, running)))
            ended.append(start("streamsoup-sync", self._keep_syncing))
            while not self._idle.wait(_PROGRESS_SECONDS):
                self._report("measure" if self._measuring else "reduce")
        finally:
            self._stop.set()
            queue.cancel()
            # While a thread lives it may use maps and descriptors that the caller is about to close.
            insist([*(event.wait for event in ended), queue.settle])
            waiting = time.perf_counter()
            self._commit_finished()
            self.outcome.stage_seconds["sync"] += time.perf_counter() - waiting
            self.outcome.seconds += time.perf_counter() - began
            self._report_quietly("measure" if self._measuring else "sync")
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
                self._finish(step(slot, tile, began))
        except BaseException as error:  # raised again in the thread that called run
            self._fail(error)
        finally:
            with self._lock:
                running[0] -= 1
                if not running[0]:
                    self._idle.set()

    def _finish(self, done: Done) -> None:
        with self._lock:
            self._swept_bytes += done.swept_bytes
            if done.record is not None:
                self._finished.append(done.record)
                self.outcome.add(done.record)
            if not self._again:  # what an earlier sweep read and kept is not read again
                self.outcome.bytes_read += done.tile_bytes
            self.outcome.bytes_written += done.written_bytes
            stages = self.outcome.stage_seconds
            stages["read"] += done.read
            stages["reduce"] += done.reduced
            stages["write"] += done.written

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
            total = self._already_bytes + (self._plan.bytes_to_sweep - self._already_bytes) // self._ranks
            self._progress(Progress(stage, done, total, seconds, rate))

    def _report_quietly(self, stage: str) -> None:
        """Report while an exception may be on its way: one from the callback must not hide it."""
        try:
            self._report(stage)
        except Exception as error:
            self._fail(error)


def _take(ranges: list[tuple[int, int]], start: int, elements: int) -> bool:
    """Add a range to sorted ones; False if it overlaps one of them. Tiles come nearly in order: few ranges are left."""
    place = bisect.bisect_left(ranges, (start, 0))
    if place < len(ranges) and ranges[place][0] < start + elements:
        return False
    if place and sum(ranges[place - 1]) > start:
        return False
    if place and sum(ranges[place - 1]) == start:
        ranges[place - 1] = ranges[place - 1][0], ranges[place - 1][1] + elements
    else:
        ranges.insert(place, (start, elements))
    return True
