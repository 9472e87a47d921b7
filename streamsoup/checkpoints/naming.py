"""Names tensors anew, and keeps those that ingredients share: what an `Opening` makes of open checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from streamsoup.checkpoints.opening import Opening, rename_rule, strip_rule
from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.checkpoints.selected import select
from streamsoup.checkpoints.shared import LeftOut, keep, left_out, listed_words, refuse_none, shared_names
from streamsoup.checkpoints.table import TensorTable
from streamsoup.errors import CheckpointError, MismatchError, RecipeError
from streamsoup.labels import short_labels

_MOST_LABELS = 8


@dataclass(frozen=True, slots=True)
class Opened:
    """Checkpoints that were opened together, and what became of their names.

    Attributes
    ----------
    checkpoints : list of Checkpoint
    touched : tuple of (str, int)
        Rules by name and the checkpoints where they do so much, and how many tensors each touches there.
    left_out : tuple of LeftOut
    """

    checkpoints: list[Checkpoint]
    touched: tuple[tuple[str, int], ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def name_and_choose(checkpoints: Sequence[Checkpoint], opening: Opening) -> Opened:
    """Give tensors their new names, and keep the shared ones, if that is wanted.

    Raises
    ------
    RecipeError
        If a rule touches no tensor of any.
    CheckpointError
        If two tensors get one name.
    MismatchError
        If there is nothing that all of them share.
    """
    if not opening.rules and not opening.only_shared:
        return Opened(list(checkpoints))
    found, touched = _renamed(checkpoints, opening)
    for rule, counts in touched.items():
        if not any(counts):
            raise RecipeError(f"{rule}: touches no tensor of any ingredient. Correct it or leave it out.")
    labels = short_labels([c.path for c in checkpoints])
    rows = tuple(row for rule, counts in touched.items() for row in _rows(rule, counts, labels))
    if not opening.only_shared:
        return Opened(found, rows)
    names = shared_names(found, opening.leave_out)
    refuse_none(found, names)
    return Opened(keep(found, names), rows, tuple(left_out(found, names, opening.leave_out)))


def name_and_choose_like(checkpoint: Checkpoint, opening: Opening, first: Checkpoint) -> Opened:
    """Do to one more checkpoint what was done to those before it, of which `first` is one.

    Raises
    ------
    CheckpointError
        If two tensors get one name.
    MismatchError
        If it lacks a tensor that they share, or has it in another shape.
    """
    (found,), _ = _renamed([checkpoint], opening)
    if not opening.only_shared:
        return Opened([found])
    names = first.table.names
    both = shared_names([first, found], ())
    wanted = set(names)
    lost = [left for left in left_out([first, found], both, ()) if not wanted.isdisjoint(left.names)]
    if lost:
        problems = [f"{left.in_short}." for left in lost]
        raise MismatchError(problems, f"Name {checkpoint.path} among the first, so that what all share is known.")
    return Opened(keep([found], names), (), tuple(left_out([first, found], names, ())))


def opening_of_some(checkpoints: Sequence[Checkpoint], opening: Opening, kept: Sequence[str]) -> Opening:
    """Say how some of several ingredients are opened alone, with the names that they had among the others.

    Rules that touch none of them go, and what they share beyond what all shared is left out.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint
        Under their own names.
    opening : Opening
        Of all.
    kept : sequence of str
        Names that all of them share.
    """
    found, touched = _renamed(checkpoints, opening)
    idle = {rule for rule, counts in touched.items() if not any(counts)}
    wanted = set(kept)
    more = [name for name in shared_names(found, ()) if name not in wanted] if opening.only_shared else []
    return replace(
        opening,
        strip_prefix=tuple(p for p in opening.strip_prefix if strip_rule(p) not in idle),
        rename=tuple(pair for pair in opening.rename if rename_rule(*pair) not in idle),
        leave_out=tuple(more),
    )


def _renamed(
    checkpoints: Sequence[Checkpoint], opening: Opening
) -> tuple[list[Checkpoint], Mapping[str, Sequence[int]]]:
    """Apply the rules; returns how many tensors each touches, checkpoint by checkpoint."""
    rules = opening.rules
    if not rules:
        return list(checkpoints), {}
    found: list[Checkpoint] = []
    touched: dict[str, list[int]] = {label: [] for label, _ in rules}
    known: dict[tuple[str, ...], tuple[tuple[str, ...], Counter[str]]] = {}
    tables: dict[int, TensorTable] = {}  # of equal checkpoints, one
    shared: dict[str, str] = {}
    for checkpoint in checkpoints:
        table = checkpoint.table
        if table.names not in known:
            fresh, found_counts = _apply(rules, table.names, checkpoint.path)
            known[table.names] = tuple(shared.setdefault(name, name) for name in fresh), found_counts
        names, counts = known[table.names]
        for label in touched:
            touched[label].append(counts[label])
        if names != table.names:
            everything = np.arange(len(table), dtype=np.int64)
            checkpoint = select(checkpoint, everything, names, table=tables.get(id(table)))
            tables[id(table)] = checkpoint.table
        found.append(checkpoint)
    return found, touched


def _apply(
    rules: Sequence[tuple[str, Callable[[str], str]]], names: Sequence[str], path: str
) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    origin: dict[str, str] = {}
    for name in names:
        new = name
        for label, change in rules:
            before, new = new, change(new)
            counts[label] += new != before
        if not new:
            raise CheckpointError(f"{name}: in {path}, has no name left after all rules. Change them.", path=path)
        if new in origin:
            raise CheckpointError(
                f"{origin[new]} and {name}: in {path}, would both be named {new}. Change --rename or --strip-prefix.",
                path=path,
            )
        origin[new] = name
    return list(origin), counts


def _rows(rule: str, counts: Sequence[int], labels: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Say where a rule touches how many tensors: a row for each number."""
    if len(set(counts)) == 1:
        yield f"{rule} in each checkpoint", counts[0]
        return
    for count in dict.fromkeys(counts):
        where = [label for label, found in zip(labels, counts, strict=True) if found == count]
        yield f"{rule} in {listed_words(where, _MOST_LABELS)}", count
