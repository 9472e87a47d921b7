"""A sum that an earlier process kept in a folder: what it is the sum of, and what of that is still there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import is_live_name, open_checkpoints
from streamsoup.errors import CheckpointError, CheckpointNotFoundError, RecipeError, ResumeError
from streamsoup.sums.generations import GenerationStore
from streamsoup.sums.live_members import checkpoints_of
from streamsoup.sums.members import Member


@dataclass(frozen=True, slots=True)
class KeptSum:
    """A sum in a folder.

    Attributes
    ----------
    folder : path
    rows : list of (path, weight, key)
        Its members, as they were written down; the key says who an ingredient was.
    missing : list of str
        Paths of members whose files are gone.
    ingredients : list of path or Checkpoint
        What a pool for it is made of.
    """

    folder: str | Path
    rows: list[list[Any]]
    missing: list[str]
    ingredients: list[Any]

    @property
    def members(self) -> tuple[Member, ...]:
        """What it is the sum of."""
        return tuple(Member(str(path), float(weight)) for path, weight, _ in self.rows)


def find_kept(folder: str | Path, *, like: Any, gone: str) -> KeptSum:
    """Look at the sum in a folder; see `RunningSoup.open`.

    Raises
    ------
    RecipeError, ResumeError
    """
    if gone not in ("error", "keep"):
        raise RecipeError(f"gone: {gone!r} is not one of error, keep.")
    rows = GenerationStore.members_in(Path(folder))
    paths = [str(path) for path, _, _ in rows]
    if not paths:
        raise ResumeError(f"{folder}: holds no running sum. Name the folder that was given to RunningSoup.")
    like = like or GenerationStore.like_in(Path(folder)) or paths[0]
    if isinstance(like, str) and is_live_name(like):
        raise ResumeError(
            f"{folder}: the sum is of live states, whose dtypes and copied tensors are not on disk. Give a module "
            "or a checkpoint of the same network, as like=."
        )
    files = [path for path in paths if not is_live_name(path)]
    missing = [path for path in files if gone == "keep" and _is_gone(path)]
    given = checkpoints_of(like)
    known = {*missing, *(one for one in given if isinstance(one, str))}
    return KeptSum(folder, rows, missing, [*given, *(path for path in files if path not in known)])


def _is_gone(path: str) -> bool:
    try:
        open_checkpoints([path])
    except CheckpointNotFoundError:
        return True
    except CheckpointError:
        return False  # whoever opens it says what is wrong
    return False
