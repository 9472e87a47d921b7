"""Running sums: Σ wᵢθᵢ with its weight, never the average."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.candidate import Candidate
from streamsoup.checkpoints import (
    Checkpoint,
    LiveCheckpoint,
    Opening,
    held_like,
    identify,
    identity_key,
    identity_to_json,
    is_live_name,
    is_state,
    open_checkpoints,
    pinned_path,
)
from streamsoup.errors import (
    BudgetError,
    ChangedIngredientError,
    CheckpointError,
    CheckpointNotFoundError,
    DestinationError,
    RecipeError,
    ResumeError,
)
from streamsoup.files import lock_folder
from streamsoup.manifest import content_digests
from streamsoup.methods import Coefficients
from streamsoup.open_files import OpenFiles
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.pool import Pool, PoolOptions
from streamsoup.read import open_source
from streamsoup.recipe import Ingredient, Recipe
from streamsoup.saving import Origin
from streamsoup.sinks import Nowhere
from streamsoup.source import Source
from streamsoup.sums.exactness import Entered, Extent, MeasuringSource, is_exact, is_plain
from streamsoup.sums.generations import GenerationStore
from streamsoup.sums.live_members import LiveMembers, checkpoint_like, matching
from streamsoup.sums.members import Member, checked_weight, divisor_of, is_multiple, merge, numbers_of
from streamsoup.sums.store import MemoryStore, SumStore, WithBuffers
from streamsoup.units import format_binary

_DIGITS = {"SUM64": 53, "SUM32": 24}


class RunningSoup:
    """A soup that grows and shrinks one ingredient at a time.

    The sum is always, bit for bit, what adding its members in order (of first entry, with merged weights) would give:
    `mean` is the soup that ``streamsoup soup`` makes of that recipe, whatever was tried, added or removed before.
    Where float64 rounding would make a difference, the sum is made anew from its members. Give weights 1 rather than
    0.3 each: a soup of equal weights is their plain mean, and mostly not the sum of multiples that was kept, so that
    its members are read again.

    A live state (a dict of tensors, a module) is folded in before `add` returns, and nothing of it is kept but the sum:
    it is a member that cannot be read again. Added once each, such members have the same bits as files. What would be
    made anew for exactness is taken from the sum instead, which then is off by the float64 roundings of what was added
    and taken out: before its own rounding an element is within K·2⁻⁵³·Σ|wᵢθᵢ|/Σwᵢ, over all K terms that ever
    entered or left. `notes` says so.

    Parameters
    ----------
    like : path, Checkpoint, module or dict of tensors, or sequence of paths and Checkpoints
        The first gives names, dtypes and configuration files; nothing is added yet.
    folder : path, optional
        Keep the sum there, as a zarr store; by default it is in memory, and counts against the budget.
    existing : bool
        Take up a sum that lies in the folder, where it fits, instead of refusing the folder.
    only_grows : bool
        Nothing will be removed or added twice, so that nothing need be measured for it. If it is all the same, the sum
        is made anew.
    **options
        See `PoolOptions`.

    Attributes
    ----------
    members : tuple of Member
    reads : dict of str to int
        How often each ingredient was read.
    content_digests : dict of str to str
        Of the ingredients read so far.
    bytes_read, bytes_written : int
        Of ingredients and sums, in all.
    rebuilt : int
        How often the sum was made anew.

    Raises
    ------
    BudgetError
        If the sum fits neither the budget nor a folder was given.
    DestinationError
        If the folder holds a sum already.
    ResumeError
        If another process is at work in the folder.
    """

    def __init__(
        self,
        like: Any,
        *,
        folder: str | Path | None = None,
        pool: Pool | None = None,
        existing: bool = False,
        only_grows: bool = False,
        **options: Any,
    ) -> None:
        self.pool = pool or Pool(_checkpoints_of(like), PoolOptions.of(options))
        self._live = LiveMembers(self.pool)
        self._sum = held_like(self.pool.first, self.pool.sum_dtypes, "the running sum")
        self._reserved_bytes = self._buffer_itemsize = 0
        self._give_back: Callable[[], object] | None = None
        self._store = self._make_store(folder, existing=existing)
        self._in_store: tuple[Member, ...] | None = ()  # what it is the sum of; None after a failure half-way
        self._measures = not only_grows or self.pool.sum_dtype.name != "SUM64"
        self._extents: dict[str, Extent] = {}
        self._entered: dict[str, Entered] = {}
        self._keys: dict[str, str] = {}
        self.members: tuple[Member, ...] = ()
        self.reads: dict[str, int] = {}
        self.content_digests: dict[str, str] = {}
        self.bytes_read = 0
        self.bytes_written = 0
        self.rebuilt = 0
        self.furnished: set[Path] = set()  # folders with configuration files, for candidates

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

    def __enter__(self) -> RunningSoup:
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

    def save(self, folder: str | Path) -> None:
        """Copy the sum into a folder, from which `open` takes it up.

        Raises
        ------
        RecipeError
            If nothing was added.
        DestinationError
            If the folder holds a sum already.
        """
        if not self.members:
            raise RecipeError("The running soup is empty. Add an ingredient first.")
        with RunningSoup([self.pool.first.path], folder=folder, pool=self.pool) as copy:
            plan = self.plan((self._sum,), Coefficients((1.0,)), to_sum=True)
            with self.sources((self._sum,)) as sources:
                self.pool.run(plan, sources, copy._store.begin())
            copy._store.commit(self._rows(self.members), self.content_digests)

    @property
    def weight(self) -> float:
        """The running weight Σ wᵢ."""
        return float(sum((Fraction(m.weight) for m in self.members), Fraction(0)))

    @property
    def is_exact(self) -> bool:
        """Whether `mean` can be taken from the sum: mostly in float64, seldom in float32."""
        if self.pool.sum_dtype.name == "PAIR":
            paths = [m.path for m in self.members]
            narrow = self._narrow(paths)
            return is_plain(paths, self._extents) and (
                not narrow.any() or is_exact(self._entered, self._extents, digits=53, only=narrow)
            )
        if self.pool.sum_dtype.name == "SUM64":
            return True
        return is_exact(self._entered, self._extents, digits=24)

    def _narrow(self, paths: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Averaged tensors that a soup of these sums in float64, though the pool's sums are double-double."""
        checkpoints = [self.pool.open(path) for path in paths]
        plan = self.plan(checkpoints, Coefficients((1.0,) * len(checkpoints)))
        return self.pool.averaged & ~plan.wide

    def add(self, ingredient: Any, weight: float = 1.0) -> RunningSoup:
        """Add an ingredient, or more of one that is in; returns itself.

        Parameters
        ----------
        ingredient : path, Checkpoint, module or dict of tensors
            Tensors may be of torch, on any device and of any strides, or arrays of numpy. They are read before this
            returns, must not be changed meanwhile, and are not kept.
        weight : float

        Raises
        ------
        MismatchError, NonFiniteError, CheckpointError
            The soup is then what it was.
        """
        if is_state(ingredient):
            return self._add_live(self._live.open(ingredient), checked_weight(weight))
        return self._change(self._named(ingredient), checked_weight(weight))

    def remove(self, ingredient: Any, weight: float | None = None) -> RunningSoup:
        """Take an ingredient out again, or some of its weight; returns itself.

        Parameters
        ----------
        ingredient : path, Checkpoint, module or dict of tensors
            Of a live state the very numbers that were added: they are read twice, once to be known again.
        weight : float, optional
            By default all of it.

        Raises
        ------
        RecipeError
            If there is not so much of it.
        """
        present = {m.path: m.weight for m in self.members}
        live = self._live.open(ingredient, "this state") if is_state(ingredient) else None
        name = self._known_again(live) if live is not None else self._named(ingredient)
        if name not in present:
            raise RecipeError(f"{name}: is not in the running soup. Remove what was added.")
        change = -(present[name] if weight is None else checked_weight(weight))
        if live is None:
            return self._change(name, change)
        self._live.lend(replace(live, path=name))
        try:
            return self._change(name, change)
        finally:
            self._live.forget(name)

    def recipe(self) -> Recipe:
        """Return the recipe whose soup this is.

        Raises
        ------
        RecipeError
            If a member is a live state: no recipe makes such a soup again.
        """
        self._live.refuse_recipe(self.members)
        return self._recipe_of(self.members)

    def _recipe_of(self, members: tuple[Member, ...]) -> Recipe:
        options, named = self.pool.options, Opening()
        if options.opening != named and not self._live.among(members):
            named = self.pool.opening_of([m.path for m in members])
        return Recipe(
            tuple(Ingredient(m.path, m.weight) for m in members),
            dtype=options.dtype,
            shard_bytes=options.shard_bytes,
            buffers=options.buffers,
            nonfinite=options.nonfinite,
            **named.to_options(),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the soup should know: members that are not on disk, and what that means for its bits."""
        return self._live.notes(self.members)

    def origin(self, members: tuple[Member, ...], *, is_exact: bool) -> Origin:
        """Gather what a soup of some members, which was just made, says of itself."""
        live = self._live.among(members)
        recipe = self._recipe_of(members)
        identities = [[] if m.path in live else identity_to_json(identify(self.pool.open(m.path))) for m in members]
        digests = [self.content_digests.get(m.path, "") for m in members]
        repeatable = is_exact and not live and members[0].path == self.pool.first.path
        return Origin(recipe, identities, digests, (*self.pool.notes, *self._live.notes(members)), repeatable)

    def candidate(self, path: str | Path, weight: float = 1.0) -> Candidate:
        """Return the soup with one more (or, with a negative weight, less) ingredient on disk; nothing is read yet."""
        if is_state(path):
            raise RecipeError("A candidate is read later than it is asked for, and so takes a path. Add the state.")
        name = self._named(path)
        members = merge(self.members, name, math.copysign(checked_weight(abs(weight)), weight))
        if not members:
            raise RecipeError(f"{path}: without it the soup would be empty. Keep one ingredient at least.")
        divides = self._divides(members, self._entering(members, name, weight))
        if not self.members or not (divides or self._live.among(members)):
            return self.candidate_of(members)
        exact = divides and self.is_exact and name not in {m.path for m in self.members} and not self._live.is_rounded
        if self.pool.sum_dtype.name == "PAIR" and self._narrow([m.path for m in members]).any():
            exact = False  # how large the new one's elements are is not known yet
        numbers = Coefficients((1.0, float(weight)), divisor_of(members))
        return Candidate(self, members, (self._sum, self.pool.open(name)), numbers, is_exact=exact)

    def mean(self) -> Candidate:
        """Return the soup as it is.

        Raises
        ------
        RecipeError
            If nothing was added.
        """
        if not self.members:
            raise RecipeError("The running soup is empty. Add an ingredient first.")
        exact = self.is_exact and self._divides(self.members, self._entered) and not self._live.is_rounded
        if not exact and not self._live.among(self.members):
            return self.candidate_of(self.members)
        return Candidate(
            self, self.members, (self._sum,), Coefficients((1.0,), divisor_of(self.members)), is_exact=exact
        )

    def alone(self, path: str | Path) -> Candidate:
        """Return the soup of one ingredient."""
        return self.candidate_of((Member(pinned_path(str(path)), 1.0),))

    def candidate_of(self, members: tuple[Member, ...]) -> Candidate:
        """Return the soup of any members, to be made from them and not from the sum.

        Raises
        ------
        ResumeError
            If one is a live state.
        """
        self._live.refuse(members, "making a soup from its members")
        checkpoints = tuple(self.pool.open(m.path) for m in members)
        return Candidate(self, members, checkpoints, numbers_of(members), is_exact=True)

    def _change(self, path: str, weight: float) -> RunningSoup:
        members = merge(self.members, path, weight)
        new = path not in {m.path for m in self.members} and weight > 0
        entered = self._entering(members, path, weight)
        rounds = bool(self.members) and not new and not self._commutes(entered)
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
        self._entered = entered
        self._live.is_rounded |= rounds
        return self

    def _named(self, ingredient: Any) -> str:
        """Name an ingredient that is on disk, or open."""
        if isinstance(ingredient, str | Path):
            name = pinned_path(str(ingredient))
            if self._live.has(name):
                raise RecipeError(f"{ingredient}: cannot be read again. Give its tensors.")
            return name
        if not hasattr(ingredient, "table"):
            raise RecipeError(
                f"A {type(ingredient).__name__} is no ingredient. Give a path, a Checkpoint, a module, or a dict of "
                "tensors."
            )
        if ingredient.path not in self.pool.checkpoints:
            self.pool.enter(ingredient.path, ingredient)
        return str(ingredient.path)

    def _add_live(self, live: LiveCheckpoint, weight: float) -> RunningSoup:
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

    def _entering(self, members: tuple[Member, ...], path: str, weight: float) -> dict[str, Entered]:
        """With which weights ingredients entered once one more has."""
        # The merged weight counts too: the recipe adds it at once. Those of the others have entered already.
        weights = (weight, *(m.weight for m in members if m.path == path))
        before = self._entered.get(path)
        return {**self._entered, path: Entered.of(*weights) if before is None else before.also(*weights)}

    def _divides(self, members: tuple[Member, ...], entered: dict[str, Entered]) -> bool:
        """Whether the sum is that of their soup, or an exact multiple with an exact divisor."""
        return not is_multiple(members) or (divisor_of(members)[1] == 0.0 and self._commutes(entered))

    def _commutes(self, entered: dict[str, Entered]) -> bool:
        digits = _DIGITS.get(self.pool.sum_dtype.name)
        return digits is not None and is_exact(entered, self._extents, digits=digits)

    def rebuild(self, members: tuple[Member, ...]) -> RunningSoup:
        """Make the sum anew from its members: each is read once."""
        self._live.refuse(members, "making the running sum anew")
        if not members:
            self.members, self._in_store, self._entered = (), (), {}
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
        self._entered = {m.path: Entered.of(m.weight) for m in members}
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
                self._extents[operand.path] = source.extent
        self.count(plan, outcome)
        self._store.commit(self._rows(members), self.content_digests)
        self.members = self._in_store = members

    def _rows(self, members: Sequence[Member]) -> list[tuple[str, float, str]]:
        return [(m.path, m.weight, self._key(m.path)) for m in members]

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
        if not store.verify():
            return False
        self.content_digests |= store.content_digests
        self.members = self._in_store = members
        self._entered = {m.path: Entered.of(m.weight) for m in members}
        return True

    @staticmethod
    def open(folder: str | Path, *, like: Any = None, gone: str = "error", **options: Any) -> RunningSoup:
        """Go on with a sum that was kept in a folder.

        Parameters
        ----------
        folder : path
        like : path, Checkpoint, module or dict of tensors, optional
            Of the same network: for a sum that was made of a live state, or whose first checkpoint is gone.
        gone : {"error", "keep"}
            What to do about members whose files are not there any more: refuse the sum, or keep them in it as what
            cannot be read again.
        **options
            See `PoolOptions`.

        Raises
        ------
        ResumeError
            If there is none, it is damaged, or it takes `like`.
        """
        if gone not in ("error", "keep"):
            raise RecipeError(f"gone: {gone!r} is not one of error, keep.")
        rows = GenerationStore.members_in(Path(folder))
        members = tuple(Member(str(path), float(weight)) for path, weight, _ in rows)
        if not members:
            raise ResumeError(f"{folder}: holds no running sum. Name the folder that was given to RunningSoup.")
        like = like or GenerationStore.like_in(Path(folder)) or members[0].path
        if isinstance(like, str) and is_live_name(like):
            raise ResumeError(
                f"{folder}: the sum is of live states, whose dtypes and copied tensors are not on disk. Give a module "
                "or a checkpoint of the same network, as like=."
            )
        files = [m.path for m in members if not is_live_name(m.path)]
        missing = [path for path in files if gone == "keep" and _is_gone(path)]
        given = _checkpoints_of(like)
        known = {*missing, *(one for one in given if isinstance(one, str))}
        paths = [*given, *(path for path in files if path not in known)]
        running = RunningSoup(paths, folder=folder, existing=True, **options)
        assert isinstance(running._store, GenerationStore)
        running._live.know_again(rows, missing, running._store.content_digests)
        for path, _, key in rows:
            if running._live.has(path):
                running._keys[path] = key
            if running._key(path) != key:
                raise ChangedIngredientError(
                    f"{path}: changed since it was added to the running sum in {folder}. Put the old files back, "
                    "or make the sum anew."
                )
        if not running.restore(members):
            raise ResumeError(f"{folder}: the running sum is damaged. Make it anew from its ingredients.")
        return running


def _checkpoints_of(like: Any) -> list[Any]:
    """Return what a pool is made of, of what a person gave."""
    several = not isinstance(like, str | Path) and not is_state(like) and not hasattr(like, "table")
    given = list(like) if several else [like]
    return [pinned_path(str(one)) if isinstance(one, str | Path) else checkpoint_like(one) for one in given]


def _is_gone(path: str) -> bool:
    try:
        open_checkpoints([path])
    except CheckpointNotFoundError:
        return True
    except CheckpointError:
        return False  # whoever opens it says what is wrong
    return False
