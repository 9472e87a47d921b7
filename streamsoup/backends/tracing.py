"""Functions of methods, traced once and run as programs of the vector machine: see `streamsoup.kernels.vector_machine`.

Where numpy would go through memory and hold Python's lock at every operation, a program runs over strips in the cache,
on all threads. A function is called once, with arrays that only note what is done with them. What needs whole rows of a
tensor, or numpy itself, cannot be noted: its operands are computed, and its result is an input of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.backends.noting import Instruction, Noted, Notes
from streamsoup.kernels.vector_machine import FIELDS, Code, Op, Stretch, to_counts, to_rows, to_sums
from streamsoup.methods.protocol import TensorInfo

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced function of decoded checkpoints. See `trace`.

    Attributes
    ----------
    stages : tuple of (Code, callable)
        What is computed outside of the machine: from which rows, and how.
    last : Code
    keys : uint64 array, shape (streams,)
    outside_rows : int
    """

    stages: tuple[tuple[Code, Callable[[Numbers], Numbers]], ...]
    last: Code
    keys: npt.NDArray[np.uint64]
    outside_rows: int

    def to_rows(self, stretch: Stretch) -> tuple[Numbers, npt.NDArray[np.int64]]:
        """See `streamsoup.kernels.vector_machine.to_rows`."""
        result: Numbers
        result, bad = to_rows(self.last, stretch, self.keys, self._outside(stretch))
        return result, bad

    def to_sums(self, stretch: Stretch) -> Numbers:
        """See `streamsoup.kernels.vector_machine.to_sums`."""
        found: Numbers = to_sums(self.last, stretch, self.keys, self._outside(stretch))
        return found

    def to_counts(self, stretch: Stretch, number: int, prefixes: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """See `streamsoup.kernels.vector_machine.to_counts`."""
        found: npt.NDArray[np.int64] = to_counts(
            self.last, stretch, self.keys, self._outside(stretch), number, prefixes
        )
        return found

    def _outside(self, stretch: Stretch) -> Numbers:
        """Compute what is not for the machine; each may want what was computed before."""
        found = np.empty((self.outside_rows, stretch.count))
        done = 0
        with np.errstate(all="ignore"):
            for code, function in self.stages:
                operand, _ = to_rows(code, stretch, self.keys, found)
                rows = function(operand)
                found[done : done + len(rows)] = rows
                done += len(rows)
        return found


@lru_cache(maxsize=256)
def trace(function: Callable[[Any], Any], tensor: TensorInfo, checkpoints: int) -> Program:
    """Trace a function of `Values`.

    Parameters
    ----------
    function : callable taking Values
    tensor : TensorInfo
    checkpoints : int
        Rows that it gets.
    """
    notes = Notes(tensor, checkpoints)
    result = function(notes)
    stages = tuple((_compile(operand), outside) for operand, outside in notes.outside)
    return Program(stages, _compile(result), np.array(notes.keys, np.uint64), notes.outside_rows)


def _compile(result: Noted) -> Code:
    """Put the instructions behind a result in order, and give each a place among the machine's rows."""
    order: list[Instruction] = []
    last_use: dict[int, int] = {}
    seen: set[int] = set()
    pending: list[tuple[Instruction, bool]] = [(result.source, False)]
    while pending:
        one, visited = pending.pop()
        if visited:
            for operand in one.operands:
                last_use[id(operand.source)] = len(order)
            order.append(one)
        elif id(one) not in seen:
            seen.add(id(one))
            pending.append((one, True))
            pending += [(operand.source, False) for operand in one.operands]
    constants: list[float] = []
    places: dict[int, int] = {}
    for one in order:
        if isinstance(one.extra, tuple) and one.op == Op.MOVE:
            places[id(one)] = len(constants)
            constants += one.extra
    height = len(constants)
    free: dict[int, list[int]] = {}
    lines: list[list[int]] = []
    for position, one in enumerate(order):
        if id(one) in places:
            continue
        spare = free.get(one.height, [])
        place = spare.pop() if spare else height
        height = max(height, place + one.height)
        places[id(one)] = place
        lines += _lines(one, place, places)
        for used in {id(o.source): o.source for o in one.operands}.values():
            fixed = used.op == Op.MOVE and not used.operands
            if not fixed and last_use[id(used)] == position and used is not result.source:
                free.setdefault(used.height, []).append(places[id(used)])
    lines.append([Op.STORE, 0, result.height, places[id(result.source)] + result.first, 1, 0, 0, 0, 0])
    program = np.array(lines, np.int64).reshape(-1, FIELDS)
    return Code(program, np.array(constants, np.float64), height, result.height)


def _lines(one: Instruction, place: int, places: dict[int, int]) -> list[list[int]]:
    if one.op == Op.LOAD:
        which, first = one.extra
        return [[Op.LOAD, place, one.height, first, 0, which, 0, 0, 0]]
    if one.op == Op.UNIFORM:
        return [[Op.UNIFORM, place, one.height, one.extra, 0, 0, 0, 0, 0]]
    at = [(places[id(o.source)] + o.first, int(o.height > 1)) for o in one.operands]
    if one.op == Op.MOVE:  # a stack
        lines = []
        for operand, (first, _) in zip(one.operands, at, strict=True):
            lines.append([Op.MOVE, place, operand.height, first, 1, 0, 0, 0, 0])
            place += operand.height
        return lines
    height = one.operands[0].height if one.op == Op.TOTAL else one.height
    flat = [number for pair in (*at, (0, 0), (0, 0))[:3] for number in pair]
    return [[one.op, place, height, *flat]]
