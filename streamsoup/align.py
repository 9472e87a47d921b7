"""Do ingredients fit together? Settles names, shapes and dtypes of all of them against the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint, TensorTable, advice_on
from streamsoup.dtypes import DTYPES
from streamsoup.errors import MismatchError

_FLOAT = np.array([d.is_float for d in DTYPES])


@dataclass(frozen=True)
class Alignment:
    """Which tensor of each ingredient goes with which of the first.

    Attributes
    ----------
    table : TensorTable
        The first ingredient's: positions in it number the tensors of the soup.
    orders : tuple of int32 arrays or None, one for each ingredient
        Position in the ingredient's own table of each tensor; None where the orders are equal.
    """

    table: TensorTable
    orders: tuple[npt.NDArray[np.int32] | None, ...]

    def position(self, ingredient: int, tensor: int) -> int:
        """Position of a tensor in the table of an ingredient."""
        order = self.orders[ingredient]
        return tensor if order is None else int(order[tensor])


def align(checkpoints: Sequence[Checkpoint]) -> Alignment:
    """Match the tensors of all checkpoints with those of the first.

    Raises
    ------
    MismatchError
        With one sentence for each name, shape or kind that does not fit.
    """
    problems: list[str] = []
    orders = tuple(_order(checkpoints[0], other, problems) for other in checkpoints)
    if problems:
        raise MismatchError(problems, advice_on(checkpoints))
    return Alignment(checkpoints[0].table, orders)


def find_mismatches(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Say where two checkpoints do not fit; an empty list where they do."""
    problems: list[str] = []
    _order(first, other, problems)
    return problems


def _order(first: Checkpoint, other: Checkpoint, problems: list[str]) -> npt.NDArray[np.int32] | None:
    mine, theirs = first.table, other.table
    if mine is theirs or (mine.same_layout(theirs) and _same_kinds(mine, theirs)):
        return None
    found_at = theirs.positions()
    positions = [found_at.get(name, -1) for name in mine.names]
    _report_names(first, other, positions, problems)
    for position in _suspects(mine, theirs, np.array(positions, np.int64)):
        found = positions[position]
        if (a := mine.shape(position)) != (b := theirs.shape(found)):
            problems.append(
                f"{mine.names[position]}: shape {b} in {_file(other, found)}, but {a} in {first.path}. "
                f"Leave {other.path} out or fix its export."
            )
        p, q = mine.dtype(position), theirs.dtype(found)
        if p is not q and not (p.is_float and q.is_float):
            problems.append(
                f"{mine.names[position]}: {q.name} in {_file(other, found)}, but {p.name} in {first.path}; only "
                f"float dtypes may differ. Leave {other.path} out or convert it."
            )
    if positions == list(range(len(mine))):
        return None
    return np.array(positions, np.int32)


def _suspects(mine: TensorTable, theirs: TensorTable, positions: npt.NDArray[np.int64]) -> list[int]:
    """Tensors whose shape or kind differs, found with a few array operations: there may be millions in all."""
    present = np.flatnonzero(positions >= 0)
    found = positions[present]
    ranks, other_ranks = np.diff(mine.dim_starts)[present], np.diff(theirs.dim_starts)[found]
    differs = ranks != other_ranks
    for axis in range(int(ranks.max(initial=0))):
        both = (ranks > axis) & (other_ranks > axis)
        a = mine.dims[mine.dim_starts[:-1][present[both]] + axis]
        differs[both] |= a != theirs.dims[theirs.dim_starts[:-1][found[both]] + axis]
    dtypes, other_dtypes = mine.dtypes[present], theirs.dtypes[found]
    differs |= (dtypes != other_dtypes) & ~(_FLOAT[dtypes] & _FLOAT[other_dtypes])
    return [int(i) for i in present[differs]]


def _same_kinds(mine: TensorTable, theirs: TensorTable) -> bool:
    floats = _FLOAT[mine.dtypes] & _FLOAT[theirs.dtypes]
    return bool((floats | (mine.dtypes == theirs.dtypes)).all())


def _report_names(first: Checkpoint, other: Checkpoint, positions: list[int], problems: list[str]) -> None:
    names = first.table.names
    missing = [names[i] for i, found in enumerate(positions) if found < 0]
    known = set(names)
    extra = [name for name in other.table.names if name not in known]
    for which, has, lacks in ((missing, first, other), (extra, other, first)):
        if which:
            more = f" (and {len(which) - 1} more)" if len(which) > 1 else ""
            problems.append(
                f"{which[0]}{more}: in {has.path}, but missing from {lacks.path}. "
                f"Leave {other.path} out or fix its export."
            )


def _file(checkpoint: Checkpoint, position: int) -> str:
    shards = checkpoint.shards
    return shards[int(checkpoint.table.shards[position])].path if shards else checkpoint.path
