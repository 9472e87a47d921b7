"""What a running sum knows of members whose numbers it cannot read again: live states, and files that are gone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import LiveCheckpoint, is_live_name, is_state, live_name, open_live, pinned_path
from streamsoup.errors import RecipeError, ResumeError
from streamsoup.pool import Pool
from streamsoup.sinks import wait_for_caller
from streamsoup.sums.members import Member


class LiveMembers:
    """Members that cannot be read again, by name.

    Parameters
    ----------
    pool : Pool
        Changed: members are entered there, without their numbers.

    Attributes
    ----------
    is_rounded : bool
        Something was taken out of the sum, or added again, where float64 sums keep a trace of it, and the sum could
        not be made anew.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._names: set[str] = set()
        self._gone: set[str] = set()
        self._last = 0
        # Copied tensors of one state: those of others are equal, or not wanted.
        self._kept: tuple[Any, ...] | None = pool.first.arrays if isinstance(pool.first, LiveCheckpoint) else None
        self.is_rounded = False

    @property
    def kept_bytes(self) -> int:
        """Bytes of the copied tensors that are kept."""
        return sum(array.nbytes for array in self._kept or () if array is not None)

    def has(self, path: str) -> bool:
        """Whether this is a member that cannot be read again."""
        return path in self._names

    def is_gone(self, path: str) -> bool:
        """Whether it was a file, of which not even the copied tensors are known."""
        return path in self._gone

    def among(self, members: Iterable[Member]) -> list[str]:
        """Those of some members that cannot be read again."""
        return [m.path for m in members if m.path in self._names]

    def open(self, state: Any, path: str | None = None) -> LiveCheckpoint:
        """Describe a state that somebody gives; `path`: as which member, instead of a new one.

        Raises
        ------
        CheckpointError, UnsupportedDTypeError
        """
        if path is None:
            self._last += 1
            path = live_name(self._last)
        like = None if self._pool.options.opening.rules else self._pool.first.table
        found = open_live(state, path, like=like)
        wait_for_caller(array for array in found.arrays if hasattr(array, "is_cuda"))
        return found

    def lend(self, live: LiveCheckpoint) -> None:
        """Let the pool find the numbers of a state, until `keep` or `forget`.

        Raises
        ------
        RecipeError
            If it has dtypes that the pool was not made for.
        """
        self._pool.enter(live.path, live)

    def keep(self, path: str, *, is_first: bool) -> None:
        """Take note of a new member, and let go of its numbers; of the first one the copied tensors are kept."""
        live = self._pool.checkpoints[path]
        assert isinstance(live, LiveCheckpoint)
        husk = live.without(self._pool.averaged, None if is_first else self._kept)
        self._kept = husk.arrays
        self._pool.checkpoints[path] = husk
        self._names.add(path)

    def forget(self, path: str) -> None:
        """Let go of the numbers of a state that did not become a member, or was one before."""
        live = self._pool.checkpoints.pop(path, None)
        if path in self._names and isinstance(live, LiveCheckpoint):
            self._pool.checkpoints[path] = live.without(self._pool.averaged, self._kept)

    def know_again(self, rows: Sequence[Sequence[Any]], gone: Iterable[str], digests: Iterable[str]) -> None:
        """Take up members of a sum that was kept in a folder: live ones, and those whose files are gone."""
        first = self._pool.first
        self._gone = set(gone)
        for path in [str(row[0]) for row in rows]:
            if is_live_name(path) or path in self._gone:
                self._names.add(path)
                arrays = self._kept or (None,) * len(first.table)
                self._pool.checkpoints[path] = LiveCheckpoint(path, first.table, arrays)
                if self._kept is None:
                    self._gone.add(path)  # its copied tensors are those of the first checkpoint
        numbers = [path for path in (*self._names, *digests) if is_live_name(path)]
        self._last = max((int(path.split()[2].rstrip(",")) for path in numbers), default=0)

    def refuse(self, members: Iterable[Member], what: str) -> None:
        """Refuse what takes the numbers of members that cannot be read again.

        Raises
        ------
        ResumeError
        """
        if found := self.among(members):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ResumeError(
                f"{found[0]}{more}: cannot be read again, which {what} takes. Take the average as it is, by mean()."
            )

    def refuse_recipe(self, members: Iterable[Member]) -> None:
        """Refuse to write a recipe of members that are not all on disk.

        Raises
        ------
        RecipeError
        """
        if found := self.among(members):
            raise RecipeError(
                f"{found[0]}: a recipe names files, and this one is not on disk, so that no recipe makes this soup "
                "again. Save the soup itself, by mean().save()."
            )

    def notes(self, members: Sequence[Member]) -> tuple[str, ...]:
        """What a reader of the soup should know, in sentences."""
        notes = [f"{path}: its numbers are kept nowhere but in the sum." for path in self.among(members)]
        if self.is_rounded:
            notes.append(
                "The sum may differ from that of its members added once, by the float64 roundings of what was added "
                "and taken out before."
            )
        return tuple(notes)


def checkpoints_of(like: Any) -> list[Any]:
    """Return what a pool is made of, of what a person gave."""
    several = not isinstance(like, str | Path) and not is_state(like) and not hasattr(like, "table")
    given = list(like) if several else [like]
    return [pinned_path(str(one)) if isinstance(one, str | Path) else _checkpoint_like(one) for one in given]


def _checkpoint_like(like: Any) -> Any:
    """Return what a pool is made of: a state without its floats, and anything else as it is."""
    if not is_state(like):
        return like
    import numpy as np

    from streamsoup.dtypes import DTYPES

    live = open_live(like, live_name(0))
    floats = np.array([DTYPES[i].is_float for i in live.table.dtypes.tolist()], np.bool_)
    return replace(live.without(floats))


def matching(digest: str, digests: Mapping[str, str], names: Iterable[str]) -> str:
    """Find the member that held these numbers.

    Raises
    ------
    RecipeError
    """
    for name in names:
        if digests.get(name) == digest:
            return name
    raise RecipeError(
        "This state is none that was added, or its numbers have changed since. Give the very numbers that were added."
    )
