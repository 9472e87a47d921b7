"""Σ wᵢθᵢ with its members: folded in one by one, made anew where a rounding would show, kept in a store."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from streamsoup.checkpoints import (
    Checkpoint,
    LiveCheckpoint,
    held_like,
    identify,
    identity_key,
    identity_to_json,
    is_live_name,
)
from streamsoup.errors import BudgetError, ChangedIngredientError, DestinationError, RecipeError, ResumeError
from streamsoup.files import lock_folder
from streamsoup.manifest import content_digests
from streamsoup.methods import Coefficients
from streamsoup.open_files import OpenFiles
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.pool import Pool
from streamsoup.read import open_source
from streamsoup.sinks import Nowhere
from streamsoup.source import Source
from streamsoup.sums.exactness import Entered, MeasuringSource
from streamsoup.sums.generations import GenerationStore
from streamsoup.sums.kept import KeptSum
from streamsoup.sums.live_members import LiveMembers, matching
from streamsoup.sums.members import Member, merge
from streamsoup.sums.roundings import Roundings
from streamsoup.sums.store import MemoryStore, SumStore, WithBuffers
from streamsoup.units import format_binary


class RunningSum:
    """A sum, and what it is the sum of: below `RunningSoup`, which says what its parameters and attributes are."""

    def __init__(self, pool: Pool, *, folder: str | Path | None, existing: bool, only_grows: bool) -> None:
        self.pool = pool
        self._live = LiveMembers(pool)
        self._sum = held_like(pool.first, pool.sum_dtypes, "the running sum")
        self._reserved_bytes = self._buffer_itemsize = 0
        self._give_back: Callable[[], object] | None = None
        self._store = self._make_store(folder, existing=existing)
        self._in_store: tuple[Member, ...] | None = ()  # what it is the sum of; None after a failure half-way
        self._measures = not only_grows or pool.sum_dtype.name != "SUM64"
        self._roundings = Roundings(pool.sum_dtype)
        self._keys: dict[str, str] = {}
        self.members: tuple[Member, ...] = ()
        self.reads: dict[str, int] = {}
        self.content_digests: dict[str, str] = {}
        self.bytes_read = 0
        self.bytes_written = 0
        self.rebuilt = 0

    def _make_store(self, folder: str | Path | None, *, existing: bool) -> SumStore:
        pool = self.pool
        if folder is None and not pool.sum_fits:
            if pool.options.sums == "disk":
                raise RecipeError("A running sum on disk needs a folder. Give it one, or keep it elsewhere (--sums).")
            raise BudgetError(
                f"The running sum takes {format_binary(pool.sum_bytes)}, more than half the budget of "
                f"{format_binary(pool.budget_bytes)}. Give it a folder, or a larger budget.",
                least_bytes=2 * pool.sum_bytes,
            )
        if folder is None and pool.sum_place == "device":
            from streamsoup.sums.device_store import DeviceStore

            return DeviceStore(self._sum.table, pool.averaged, pool.backend)
        if folder is None:
            self._reserved_bytes = pool.sum_bytes
            return MemoryStore(self._sum.table, pool.averaged)
        self._buffer_itemsize = pool.sum_dtype.itemsize  # a tile of the sum is read into a buffer for each worker
        if not existing and GenerationStore.members_in(Path(folder)):
            raise DestinationError(
                f"{folder}: holds a running sum already. Go on with it by RunningSoup.open, or choose another folder."
            )
        store = GenerationStore(
            Path(folder), self._sum.table, pool.averaged, pool.sum_dtype, pool.backend, like=pool.first.path
        )
        self._give_back = weakref.finalize(self, os.close, lock_folder(Path(folder)))
        return store

    def close(self) -> None:
        """Give the folder back to other processes; the sum must not be used afterwards."""
        if self._give_back is not None:
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plan(self, operands: Sequence[Checkpoint], numbers: Coefficients, *, to_sum: bool = False) -> Plan:
        """Plan a combination of the sum and ingredients, beside the memory that the sum takes."""
        return self.pool.plan(
            operands,
            numbers,
            to_sum=to_sum,
            reserved_bytes=self._reserved_bytes + self._live.kept_bytes,
            buffer_itemsize=self._buffer_itemsize,
        )

    @contextlib.contextmanager
    def sources(
        self, operands: Sequence[Checkpoint], *, first: str | None = None, measure: bool = False
    ) -> Iterator[list[Source]]:
        """Open the bytes of ingredients and of the sum, whose copied tensors are those of the soup's first member."""
        if any(operand is self._sum for operand in operands):
            self._repair()
        files = OpenFiles()
        sources: list[Source] = []
        opened: list[Source] = []
        try:
            for operand in operands:
                if operand is self._sum:
                    unknown = first is None or self._live.is_gone(first)
                    giver = self.pool.first if first is None or unknown else self.pool.open(first)
                    buffers = open_source(giver, self.pool.mode, files, beside=len(operands))
                    opened.append(buffers)
                    sources.append(WithBuffers(self._store.source(), buffers, self.pool.averaged))
                else:
                    source = open_source(operand, self.pool.mode, files, beside=len(operands))
                    sources.append(MeasuringSource(source, operand.table) if measure else source)
            opened += sources
            yield sources
        finally:
            for source in opened:
                source.close()
            files.close()

    def _change(self, path: str, weight: float) -> Self:
        """Add (or, below zero, take out) weight of an ingredient that the pool can open."""
        members = merge(self.members, path, weight)
        new = path not in {m.path for m in self.members} and weight > 0
        entered = self._roundings.entering(members, path, weight)
        rounds = bool(self.members) and not new and not self._roundings.commutes(entered)
        if rounds and not self._live.among(members):
            return self.rebuild(members)
        self._repair()
        checkpoint = self.pool.open(path)
        if self.members:
            operands: tuple[Checkpoint, ...] = (self._sum, checkpoint)
            numbers = Coefficients((1.0, weight))
        else:
            operands, numbers = (checkpoint,), Coefficients((weight,))
        self._fold(operands, numbers, members)
        self._roundings.entered = entered
        self._live.is_rounded |= rounds
        return self

    def rebuild(self, members: tuple[Member, ...]) -> Self:
        """Make the sum anew from its members: each is read once."""
        self._live.refuse(members, "making the running sum anew")
        if not members:
            self.members, self._in_store, self._roundings.entered = (), (), {}
            self._live.is_rounded = False
            return self
        # A float32 sum is rounded at each addition: it has to go the way it went when its members came one by one.
        steps = range(1, len(members) + 1) if self.pool.sum_dtype.name == "SUM32" else [len(members)]
        before, done = self.members, 0
        try:
            for stop in steps:
                more = members[done:stop]
                operands: list[Checkpoint] = [self.pool.open(m.path) for m in more]
                weights = [m.weight for m in more]
                if done:
                    operands, weights = [self._sum, *operands], [1.0, *weights]
                self._fold(tuple(operands), Coefficients(tuple(weights)), members[:stop])
                done = stop
        except BaseException:
            self.members = before
            raise
        self._roundings.entered = {m.path: Entered.of(m.weight) for m in members}
        self._live.is_rounded = False
        self.rebuilt += 1
        return self

    def _repair(self) -> None:
        """Make the sum anew if a failure left it half-written, or the sum of something else."""
        if self._in_store != self.members:
            self.rebuild(self.members)

    def _fold(self, operands: tuple[Checkpoint, ...], numbers: Coefficients, members: tuple[Member, ...]) -> None:
        plan = self.plan(operands, numbers, to_sum=True)
        with self.sources(operands, measure=self._measures) as sources:
            sink = self._store.begin()
            if self._store.in_place:
                self._in_store = None
            outcome = self.pool.run(plan, sources, sink)
        for source, operand in zip(sources, operands, strict=True):
            if isinstance(source, MeasuringSource):
                self._roundings.extents[operand.path] = source.extent
        self.count(plan, outcome)
        self._store.commit(self._rows(members), self.content_digests)
        self.members = self._in_store = members

    def _add_live(self, live: LiveCheckpoint, weight: float) -> Self:
        """Fold in a live state, and let go of it."""
        self._live.lend(live)
        try:
            if self.members and self._store.in_place:
                self._look_at(live.path)  # what is refused half-way would spoil a sum that cannot be made anew
            is_first = not self.members
            self._change(live.path, weight)
        except BaseException:
            self._live.forget(live.path)
            raise
        self._live.keep(live.path, is_first=is_first)
        return self

    def _look_at(self, path: str) -> str:
        """Refuse what cannot be folded in, before it is; returns the content digest."""
        live = self.pool.open(path)
        both = (self._sum, live)
        beside = self.plan(both, Coefficients((1.0, 1.0)), to_sum=True)
        with self.sources(both, first=self.members[0].path) as sources:
            self.pool.compare_copied(beside, sources)
        plan = self.plan((live,), Coefficients((1.0,)), to_sum=True)
        with self.sources((live,)) as sources:
            outcome = self.pool.run(plan, sources, Nowhere())
        return content_digests(plan, outcome.digests)[0]

    def _known_again(self, live: LiveCheckpoint) -> str:
        """Find the member whose numbers these are."""
        if not self.members:
            raise RecipeError("The running soup is empty. Remove what was added.")
        self._live.lend(live)
        try:
            digest = self._look_at(live.path)
        finally:
            self._live.forget(live.path)
        return matching(digest, self.content_digests, self._live.among(self.members))

    def count(self, plan: Plan, outcome: Outcome) -> None:
        """Count what was read and written, and note who the ingredients were."""
        for operand, digest in zip(plan.checkpoints, content_digests(plan, outcome.digests), strict=True):
            if operand is not self._sum:
                self.reads[operand.path] = self.reads.get(operand.path, 0) + 1
                if self.content_digests.setdefault(operand.path, digest) != digest:
                    raise ChangedIngredientError(
                        f"{operand.path}: its data changed since it was first read. Put it back, or begin anew."
                    )
        self.bytes_read += outcome.bytes_read
        self.bytes_written += outcome.bytes_written

    def _rows(self, members: Sequence[Member]) -> list[tuple[str, float, str]]:
        return [(m.path, m.weight, self._key(m.path)) for m in members]

    def _key(self, path: str) -> str:
        """Who an ingredient is; looked up once."""
        if path not in self._keys and is_live_name(path):
            self._keys[path] = self.content_digests[path]
        if path not in self._keys:
            self._keys[path] = identity_key(identity_to_json(identify(self.pool.open(path))))
        return self._keys[path]

    def restore(self, members: tuple[Member, ...]) -> bool:
        """Take up a sum that an earlier process left on disk, if it is whole and of these members."""
        store = self._store
        if not isinstance(store, GenerationStore):
            return False
        if store.members != [list(row) for row in self._rows(members)]:
            return False
        if not store.fits or not store.verify():
            return False
        self.content_digests |= store.content_digests
        self.members = self._in_store = members
        self._roundings.entered = {m.path: Entered.of(m.weight) for m in members}
        return True

    def _take_up(self, kept: KeptSum) -> None:
        """Go on with a sum that was found in this one's folder."""
        assert isinstance(self._store, GenerationStore)
        if not self._store.fits:
            raise ResumeError(
                f"{kept.folder}: the running sum there is of tensors with other names, shapes or order, or is kept in "
                "another dtype. Give a checkpoint or a module of the same network as like=, and the same options."
            )
        self._live.know_again(kept.rows, kept.missing, self._store.content_digests)
        for path, _, key in kept.rows:
            if self._live.has(path):
                self._keys[path] = key
            if self._key(path) != key:
                raise ChangedIngredientError(
                    f"{path}: changed since it was added to the running sum in {kept.folder}. Put the old files back, "
                    "or make the sum anew."
                )
        if not self.restore(kept.members):
            raise ResumeError(f"{kept.folder}: the running sum is damaged. Make it anew from its ingredients.")
