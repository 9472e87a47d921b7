"""What ingredients share when they do not have the same tensors, and what is left out then."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.checkpoints.selected import select
from streamsoup.checkpoints.table import TensorTable
from streamsoup.errors import MismatchError

_MOST_PATHS = 3
_MOST_NAMES = 3


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors that do not get into a soup, for one reason.

    Attributes
    ----------
    names : tuple of str
    why : str
        In words.
    lacking : tuple of str
        Paths of the ingredients that have none of them.
    """

    names: tuple[str, ...]
    why: str
    lacking: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """All of it, for a reader of the soup."""
        return f"{len(self.names):,} tensor(s) left out, {self.why}: {', '.join(self.names)}."

    @property
    def in_short(self) -> str:
        """The first of them, for a line of a plan."""
        more = ", ..." if len(self.names) > _MOST_NAMES else ""
        return f"{len(self.names):,} tensor(s), {self.why}: {', '.join(self.names[:_MOST_NAMES])}{more}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"why": self.why, "missing_from": list(self.lacking), "tensors": list(self.names)}


def listed_words(words: Sequence[str], most: int) -> str:
    """Join words, and count those that are too many."""
    more = f" and {len(words) - most:,} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


_Kind = tuple[tuple[int, ...], str]


def _kind(table: TensorTable, position: int) -> _Kind:
    """What must be equal: the shape and, but for floats, the dtype."""
    dtype = table.dtype(position)
    return table.shape(position), "float" if dtype.is_float else dtype.name


def _tables(checkpoints: Sequence[Checkpoint]) -> list[TensorTable]:
    return list({id(c.table): c.table for c in checkpoints}.values())


def shared_names(checkpoints: Sequence[Checkpoint], leave_out: Sequence[str]) -> tuple[str, ...]:
    """Names of what all have alike, in the order of the first."""
    first, *others = _tables(checkpoints)
    left = set(leave_out)
    kinds = {name: _kind(first, i) for i, name in enumerate(first.names) if name not in left}
    for table in others:
        if table.same_layout(first) and np.array_equal(table.dtypes, first.dtypes):
            continue
        found = {name: _kind(table, i) for i, name in enumerate(table.names)}
        kinds = {name: kind for name, kind in kinds.items() if found.get(name) == kind}
    return tuple(kinds)


def refuse_none(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    """Refuse a soup of nothing: what is copied alone would be none."""
    table = checkpoints[0].table
    chosen = set(names)
    if any(name in chosen and table.dtype(i).is_float for i, name in enumerate(table.names)):
        return
    paths = listed_words([c.path for c in checkpoints], _MOST_PATHS)
    raise MismatchError(
        [f"{paths}: have no float tensor of one name and shape in common, so there is nothing to average."],
        prefix_advice(checkpoints) or "Leave out the one that is of another network, or give --rename.",
    )


def keep(checkpoints: Sequence[Checkpoint], names: tuple[str, ...]) -> list[Checkpoint]:
    """Pick the tensors of these names, in this order."""
    found: list[Checkpoint] = []
    tables: dict[int, TensorTable] = {}
    for checkpoint in checkpoints:
        table = checkpoint.table
        if table.names != names:
            positions = table.positions()
            chosen = np.array([positions[name] for name in names], np.int64)
            checkpoint = select(checkpoint, chosen, names, table=tables.get(id(table)))
            tables[id(table)] = checkpoint.table
        found.append(checkpoint)
    return found


def left_out(checkpoints: Sequence[Checkpoint], kept: Sequence[str], asked: Sequence[str]) -> Iterator[LeftOut]:
    """Say what is not kept, by reasons."""
    chosen, unwanted = set(kept), set(asked)
    places: dict[str, dict[int, int]] = {}  # of each name: positions by table
    for table in _tables(checkpoints):
        for position, name in enumerate(table.names):
            if name not in chosen:
                places.setdefault(name, {})[id(table)] = position
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, positions in places.items():
        lacking = tuple(c.path for c in checkpoints if id(c.table) not in positions)
        if lacking:
            why = f"missing from {listed_words(lacking, _MOST_PATHS)}"
        elif name in unwanted:
            why = "as the recipe says"
        else:
            why = _unlike(checkpoints, positions)
        groups.setdefault((why, lacking), []).append(name)
    for (why, lacking), names in groups.items():
        yield LeftOut(tuple(names), why, lacking)


def _unlike(checkpoints: Sequence[Checkpoint], positions: Mapping[int, int]) -> str:
    """Name one checkpoint for each shape."""
    found: dict[str, str] = {}
    for checkpoint in checkpoints:
        shape, kind = _kind(checkpoint.table, positions[id(checkpoint.table)])
        found.setdefault(f"{kind} {shape}", checkpoint.path)
    return listed_words([f"{text} in {path}" for text, path in found.items()], _MOST_PATHS)


def advice_on(checkpoints: Sequence[Checkpoint]) -> str:
    """Say what may be done about checkpoints whose names or shapes differ."""
    if (hint := prefix_advice(checkpoints)) != "":
        return f"{hint} Or give --only-shared for a soup of what all have alike."
    alike = len({frozenset(table.names) for table in _tables(checkpoints)}) == 1
    return f"Or give --only-shared for a soup of what all have alike{'' if alike else ', or --rename'}."


def prefix_advice(checkpoints: Sequence[Checkpoint]) -> str:
    """Say which prefix one checkpoint's names have and another's have not; nothing if the difference is another."""
    first = checkpoints[0]
    mine = set(first.table.names)
    for other in checkpoints[1:]:
        theirs = set(other.table.names)
        for odd, plain, whose in ((theirs - mine, mine - theirs, other), (mine - theirs, theirs - mine, first)):
            prefix = _prefix(odd, plain)
            if prefix:
                count = "All" if len(odd) == len(whose.table) else f"{len(odd):,}"
                return f"{count} names of {whose.path} begin with {prefix!r}: `--strip-prefix {prefix}` takes it off."
    return ""


def _prefix(odd: set[str], plain: set[str]) -> str:
    """Return the prefix without which most of the odd names are plain ones."""
    common = os.path.commonprefix(list(odd)) if plain else ""  # noqa: RUF071 - names are no paths
    prefixes = [common[: i + 1] for i, letter in enumerate(common) if letter == "."]
    matches = {prefix: sum(name[len(prefix) :] in plain for name in odd) for prefix in prefixes}
    best = max(prefixes, key=lambda prefix: matches[prefix], default="")
    return best if best and 2 * matches[best] >= min(len(odd), len(plain)) else ""
