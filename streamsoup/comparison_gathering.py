"""Measured tensors are folded into layers as they come, and layers into the whole; a few numbers of each are kept.

Sums over tensors have the shape of a tree over their places, so they are the same in whatever order tensors come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import TensorTable
from streamsoup.comparison_figures import Figures, Numbers, plain
from streamsoup.layers import layer_name
from streamsoup.measurement import Surveyed, SurveyMeasurement, TreeSum
from streamsoup.plan import Plan


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """A few numbers of every float tensor; rows are tensors.

    Attributes
    ----------
    names : tuple of str
    elements, varying, moved, conflicts : int64 array, shape (tensors,)
        See `Figures`.
    norms, to_mean, to_base : float64 array, shape (tensors, ingredients)
        `to_base` is all NaN without a base.
    cosines : float64 array, shape (tensors,)
        The mean of the cosines between two ingredients' differences.
    identical : bool array, shape (tensors,)
        The same in all ingredients.
    """

    names: tuple[str, ...]
    elements: npt.NDArray[np.int64]
    varying: npt.NDArray[np.int64]
    moved: npt.NDArray[np.int64]
    conflicts: npt.NDArray[np.int64]
    norms: Numbers
    to_mean: Numbers
    to_base: Numbers
    cosines: Numbers
    identical: npt.NDArray[np.bool_]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data, one mapping a tensor."""
        names = [name for name in self.__dataclass_fields__ if name != "names"]
        columns = {name: plain(getattr(self, name)) for name in names}
        return [
            {"name": name, **{key: column[t] for key, column in columns.items()}} for t, name in enumerate(self.names)
        ]


class _Sum:
    """Figures of several tensors in the making; they come in any order, and the result is always the same."""

    def __init__(self, checkpoints: int, *, based: bool) -> None:
        self._tree = TreeSum()
        self._empty = np.zeros((checkpoints, checkpoints))
        self._based = based
        self.came = 0
        self._counts = dict.fromkeys(("elements", "left_out", "varying", "moved", "conflicts"), 0)

    def add(self, number: int, gram: Numbers, counts: Mapping[str, int]) -> None:
        """Take in one with its number."""
        self._tree.add(number, gram)
        self.came += 1
        for name, count in counts.items():
            self._counts[name] += count

    @property
    def gram(self) -> Numbers:
        """The sum."""
        return self._tree.total() if self.came else self._empty

    @property
    def counts(self) -> Mapping[str, int]:
        """Sums of counts."""
        return self._counts

    def figures(self) -> Figures:
        """Make the figures."""
        return Figures.of(self.gram, based=self._based, **self._counts)


class Gathered:
    """Takes in tensors as they are measured.

    Parameters
    ----------
    plan : Plan
    based : bool
        The first checkpoint is the base of the others.

    Attributes
    ----------
    measurement : SurveyMeasurement
        For all averaged tensors of the plan.
    digests : uint64 array, shape (checkpoints, tensors)
    nonfinite : int64 array, shape (checkpoints,)

    Notes
    -----
    Memory: three numbers for each tensor and checkpoint, and two matrices for each layer.
    """

    def __init__(self, plan: Plan, *, based: bool) -> None:
        self._plan, self._based = plan, based
        self._first = int(based)
        count, table = len(plan.checkpoints), plan.table
        self.measurement = SurveyMeasurement(count, based=based, sizes=table.elements, found=self._found)
        self._row = {tensor: row for row, tensor in enumerate(plan.averaged)}
        self._whole = _Sum(count, based=based)
        self._layers = _Layers(table, plan.averaged)
        self._open: dict[int, _Sum] = {}
        self._done: dict[int, Figures] = {}
        rows, ingredients = len(plan.averaged), count - self._first
        self._columns = {name: np.zeros(rows, np.int64) for name in ("varying", "moved", "conflicts")}
        self._tables = {name: np.full((rows, ingredients), np.nan) for name in ("norms", "to_mean", "to_base")}
        self._cosines = np.full(rows, np.nan)
        self.digests = np.zeros((count, len(table)), np.uint64)
        self.nonfinite = np.zeros(count, np.int64)
        nothing = np.zeros(count, np.int64)
        for tensor in plan.averaged:
            if not table.elements[tensor]:
                empty = np.zeros((count, count))
                self._found(tensor, Surveyed(empty, 0, 0, 0, nothing.astype(np.uint64), nothing))

    def _found(self, tensor: int, surveyed: Surveyed) -> None:
        """Take in one tensor."""
        elements = int(self._plan.table.elements[tensor])
        # Numbers above 1e154 are finite, but not their squares.
        spoilt = bool(surveyed.nonfinite.any()) or not np.isfinite(surveyed.gram).all()
        counts = {"varying": surveyed.varying, "moved": surveyed.moved, "conflicts": surveyed.conflicts}
        self.digests[:, tensor] = surveyed.digests
        self.nonfinite += surveyed.nonfinite
        self._keep(self._row[tensor], Figures.of(
            surveyed.gram, based=self._based, elements=elements, left_out=int(spoilt), **counts
        ), counts)  # fmt: skip
        layer, number = self._layers.of[tensor]
        total = self._open.setdefault(layer, _Sum(len(surveyed.digests), based=self._based))
        if spoilt:
            total.add(number, np.zeros_like(surveyed.gram), {"left_out": 1})
        else:
            total.add(number, surveyed.gram, {"elements": elements, **counts})
        if total.came == self._layers.sizes[layer]:
            del self._open[layer]
            self._done[layer] = total.figures()
            self._whole.add(layer, total.gram, total.counts)

    def _keep(self, row: int, figures: Figures, counts: Mapping[str, int]) -> None:
        for name, count in counts.items():
            self._columns[name][row] = count
        self._tables["norms"][row] = figures.norms
        self._tables["to_mean"][row] = figures.to_mean
        if figures.to_base is not None:
            self._tables["to_base"][row] = figures.to_base
        cosines = figures.mean_cosines
        known = ~np.isnan(cosines)
        self._cosines[row] = cosines[known].mean() if known.any() else np.nan

    @property
    def whole(self) -> Figures:
        """Figures of all tensors together, once all have come."""
        return self._whole.figures()

    @property
    def layers(self) -> dict[str, Figures]:
        """Figures of each layer, in natural order."""
        return {name: self._done[number] for number, name in enumerate(self._layers.names)}

    def tensors(self, same_bytes: npt.NDArray[np.bool_]) -> TensorFigures:
        """Return what is kept of each tensor; `same_bytes`, shape (tensors,): in which all ingredients are alike."""
        plan, first = self._plan, self._first
        averaged = np.array(plan.averaged, np.int64)
        # Of unlike dtypes the bytes say nothing, and of NaN the numbers.
        dtypes = plan.in_dtypes[averaged, first:]
        alike = (dtypes == dtypes[:, :1]).all(axis=1)
        unvaried = (self._columns["varying"] == 0) & np.isfinite(self._tables["norms"]).all(axis=1)
        return TensorFigures(
            names=tuple(plan.table.names[t] for t in plan.averaged),
            elements=plan.table.elements[averaged].astype(np.int64),
            varying=self._columns["varying"],
            moved=self._columns["moved"],
            conflicts=self._columns["conflicts"],
            norms=self._tables["norms"],
            to_mean=self._tables["to_mean"],
            to_base=self._tables["to_base"],
            cosines=self._cosines,
            identical=np.where(alike, same_bytes[averaged], unvaried),
        )


class _Layers:
    """Which layer each tensor belongs to, and as which of it: known before anything is measured."""

    def __init__(self, table: TensorTable, tensors: Sequence[int]) -> None:
        from natsort import natsorted

        layer = {tensor: layer_name(table.names[tensor]) for tensor in tensors}
        self.names: list[str] = natsorted(set(layer.values()))
        numbers = {name: number for number, name in enumerate(self.names)}
        self.sizes = [0] * len(self.names)
        self.of: dict[int, tuple[int, int]] = {}
        for tensor, name in layer.items():
            number = numbers[name]
            self.of[tensor] = number, self.sizes[number]
            self.sizes[number] += 1
