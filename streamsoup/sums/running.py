"""Running sums: Σ wᵢθᵢ with its weight, never the average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.candidate import Candidate
from streamsoup.checkpoints import is_state, pinned_path
from streamsoup.errors import RecipeError
from streamsoup.methods import Coefficients
from streamsoup.pool import Pool, PoolOptions
from streamsoup.recipe import Recipe
from streamsoup.saving import Origin
from streamsoup.sums.folding import RunningSum
from streamsoup.sums.kept import find_kept
from streamsoup.sums.live_members import checkpoints_of
from streamsoup.sums.members import Member, checked_weight, divisor_of, merge, numbers_of
from streamsoup.sums.origins import origin_of, recipe_of


class RunningSoup(RunningSum):
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
        pool = pool or Pool(checkpoints_of(like), PoolOptions.of(options))
        super().__init__(pool, folder=folder, existing=existing, only_grows=only_grows)
        self.furnished: set[Path] = set()  # folders with configuration files, for candidates

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
        kept = find_kept(folder, like=like, gone=gone)
        running = RunningSoup(kept.ingredients, folder=folder, existing=True, **options)
        running._take_up(kept)
        return running

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
        if self.pool.sum_dtype.name != "PAIR":
            return self._roundings.is_exact
        paths = [m.path for m in self.members]
        return self._roundings.is_exact_pair(paths, self._narrow(paths))

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

    def recipe(self) -> Recipe:
        """Return the recipe whose soup this is.

        Raises
        ------
        RecipeError
            If a member is a live state: no recipe makes such a soup again.
        """
        self._live.refuse_recipe(self.members)
        return recipe_of(self.pool, self._live, self.members)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the soup should know: members that are not on disk, and what that means for its bits."""
        return self._live.notes(self.members)

    def origin(self, members: tuple[Member, ...], *, is_exact: bool) -> Origin:
        """Gather what a soup of some members, which was just made, says of itself."""
        return origin_of(self.pool, self._live, members, self.content_digests, is_exact=is_exact)

    def candidate(self, path: str | Path, weight: float = 1.0) -> Candidate:
        """Return the soup with one more (or, with a negative weight, less) ingredient on disk; nothing is read yet."""
        if is_state(path):
            raise RecipeError("A candidate is read later than it is asked for, and so takes a path. Add the state.")
        name = self._named(path)
        members = merge(self.members, name, math.copysign(checked_weight(abs(weight)), weight))
        if not members:
            raise RecipeError(f"{path}: without it the soup would be empty. Keep one ingredient at least.")
        divides = self._roundings.divides(members, self._roundings.entering(members, name, weight))
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
        exact = self.is_exact and self._roundings.divides(self.members, self._roundings.entered)
        exact = exact and not self._live.is_rounded
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
