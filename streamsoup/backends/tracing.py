"""Functions of methods, traced once and run as programs of the vector machine: see `streamsoup.kernels.vector_machine`.

Where numpy would go through memory and hold Python's lock at every operation, a program runs over strips in the cache,
on all threads. A function is called once, with arrays that only note what is done with them. What needs whole rows of a
tensor, or numpy itself, cannot be noted: its operands are computed, and its result is an input of the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.kernels.vector_machine import FIELDS, Code, Op, Stretch, to_counts, to_rows, to_sums
from streamsoup.methods.protocol import TensorInfo

Numbers: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class Noted:
    """An array that is not there: what an instruction will have made, or some rows of that.

    Attributes
    ----------
    notes : Notes
    source : Instruction
    first, height : int
        Which rows of its result.
    """

    notes: Notes
    source: Instruction
    first: int
    height: int

    def __len__(self) -> int:
        return self.height

    def __getitem__(self, which: int | slice) -> Noted:
        if isinstance(which, int):
            if not -self.height <= which < self.height:
                raise IndexError(which)
            return Noted(self.notes, self.source, self.first + which % self.height, 1)
        start, stop, step = which.indices(self.height)
        if step != 1:
            raise TypeError("rows are taken one after the other")
        return Noted(self.notes, self.source, self.first + start, max(0, stop - start))

    def __iter__(self) -> Iterator[Noted]:
        return (self[k] for k in range(self.height))

    def __add__(self, other: Any) -> Noted:
        return self.notes.make(Op.ADD, self, other)

    def __radd__(self, other: Any) -> Noted:
        return self.notes.make(Op.ADD, other, self)

    def __sub__(self, other: Any) -> Noted:
        return self.notes.make(Op.SUBTRACT, self, other)

    def __rsub__(self, other: Any) -> Noted:
        return self.notes.make(Op.SUBTRACT, other, self)

    def __mul__(self, other: Any) -> Noted:
        return self.notes.make(Op.MULTIPLY, self, other)

    def __rmul__(self, other: Any) -> Noted:
        return self.notes.make(Op.MULTIPLY, other, self)

    def __truediv__(self, other: Any) -> Noted:
        return self.notes.make(Op.DIVIDE, self, other)

    def __rtruediv__(self, other: Any) -> Noted:
        return self.notes.make(Op.DIVIDE, other, self)

    def __pow__(self, power: int) -> Noted:
        if power != 2:
            raise TypeError(f"power {power}: only squares are known; see Values.sqrt and Values.apply")
        return self * self

    def __abs__(self) -> Noted:
        return self.notes.make(Op.ABSOLUTE, self)

    def __neg__(self) -> Noted:
        return self.notes.make(Op.NEGATIVE, self)

    def __invert__(self) -> Noted:
        return self.notes.make(Op.NOT, self)

    def __lt__(self, other: Any) -> Noted:
        return self.notes.make(Op.LESS, self, other)

    def __le__(self, other: Any) -> Noted:
        return self.notes.make(Op.LESS_EQUAL, self, other)

    def __gt__(self, other: Any) -> Noted:
        return self.notes.make(Op.LESS, other, self)

    def __ge__(self, other: Any) -> Noted:
        return self.notes.make(Op.LESS_EQUAL, other, self)

    def __eq__(self, other: object) -> Noted:  # type: ignore[override]
        return self.notes.make(Op.EQUAL, self, other)

    def __ne__(self, other: object) -> Noted:  # type: ignore[override]
        return ~self.notes.make(Op.EQUAL, self, other)

    def __bool__(self) -> bool:
        raise TypeError("whether elements are true is not known here: use where, & and |")

    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Noted:
        return self.notes.make(Op.BOTH, self, other)

    def __rand__(self, other: Any) -> Noted:
        return self.notes.make(Op.BOTH, other, self)

    def __or__(self, other: Any) -> Noted:
        return self.notes.make(Op.EITHER, self, other)

    def clip(self, low: float, high: float) -> Noted:
        """Return the elements held between two numbers."""
        above = self.notes.make(Op.WHERE, self < low, low, self)
        return self.notes.make(Op.WHERE, above > high, high, above)


@dataclass(eq=False, slots=True)
class Instruction:
    """One instruction; `extra` is a constant, an input's row, or a stream."""

    op: Op
    height: int
    operands: tuple[Noted, ...] = ()
    extra: Any = None


@dataclass(eq=False)
class Notes:
    """What a function did with arrays that are not there. It stands for `Values` while the function is traced."""

    tensor: TensorInfo
    checkpoints: int
    keys: list[int] = field(default_factory=list)
    outside: list[tuple[Noted, Callable[[Numbers], Numbers]]] = field(default_factory=list)
    outside_rows: int = 0

    @cached_property
    def rows(self) -> Noted:
        """The checkpoints."""
        return self._noted(Instruction(Op.LOAD, self.checkpoints, extra=(0, 0)))

    def _noted(self, instruction: Instruction) -> Noted:
        return Noted(self, instruction, 0, instruction.height)

    def make(self, op: Op, *operands: Any) -> Noted:
        """Note an instruction; numbers become constants."""
        found = tuple(o if isinstance(o, Noted) else self.column((float(o),)) for o in operands)
        height = max(o.height for o in found)
        if any(o.height not in (1, height) for o in found):
            raise TypeError(f"arrays of {' and '.join(str(o.height) for o in found)} rows do not fit together")
        return self._noted(Instruction(op, height, found))

    def number(self, value: float) -> Noted:
        """See `Values`."""
        return self.column((value,))

    def column(self, numbers: tuple[float, ...]) -> Noted:
        """See `Values`."""
        return self._noted(Instruction(Op.MOVE, len(numbers), extra=tuple(map(float, numbers))))

    def where(self, condition: Noted, yes: Any, no: Any) -> Noted:
        """See `Values`."""
        return self.make(Op.WHERE, condition, yes, no)

    def sign(self, array: Noted) -> Noted:
        """See `Values`."""
        return self.make(Op.SIGN, array)

    def sqrt(self, array: Noted) -> Noted:
        """See `Values`."""
        return self.make(Op.SQRT, array)

    def single(self, array: Noted) -> Noted:
        """See `Values`."""
        return self.make(Op.SINGLE, array)

    def stack(self, arrays: Sequence[Noted]) -> Noted:
        """See `Values`."""
        return self._noted(Instruction(Op.MOVE, sum(a.height for a in arrays), tuple(arrays)))

    def total(self, array: Noted | Sequence[Noted]) -> Noted:
        """See `Values`."""
        whole = array if isinstance(array, Noted) else self.stack(array)
        return self._noted(Instruction(Op.TOTAL, 1, (whole,)))

    def uniform(self, seed: int, streams: int) -> Noted:
        """See `Values`."""
        first = len(self.keys)
        self.keys += stream_keys(seed, streams, self.tensor.name)
        return self._noted(Instruction(Op.UNIFORM, streams, extra=first))

    def row_ranks(self, array: Noted) -> Noted:
        """See `Values`."""
        return self._outside(array, array.height, lambda rows: row_ranks(rows, self.tensor.width))

    def row_dot(self, a: Noted, b: Noted) -> Noted:
        """See `Values`."""
        return self._outside(a * b, 1, lambda rows: row_sums(rows, self.tensor.width))

    def apply(self, function: Callable[[Any], Any], array: Noted) -> Noted:
        """See `Values`; one row in, any number out."""
        height = len(np.atleast_2d(function(np.zeros(1))))
        return self._outside(array, height, lambda rows: np.atleast_2d(function(rows[0])))

    def _outside(self, operand: Noted, height: int, function: Callable[[Numbers], Numbers]) -> Noted:
        self.outside.append((operand, function))
        first, self.outside_rows = self.outside_rows, self.outside_rows + height
        return self._noted(Instruction(Op.LOAD, height, extra=(1, first)))


def stream_keys(seed: int, streams: int, name: str) -> list[int]:
    """Keys of random numbers: of a seed, each stream, and a tensor's name."""
    texts = (f"{seed}\0{stream}\0{name}" for stream in range(streams))
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]


def row_ranks(rows: Numbers, width: int) -> Numbers:
    """Place of each element, as float32 and not negative, among those of its row of the tensor; shape of `rows`.

    Equal ones by position. The bits of a float32 and the place make one whole number, which numpy sorts fastest.
    """
    by_row = rows.reshape(-1, width)
    bits = by_row.astype(np.float32).view(np.uint32).astype(np.int64)
    order = np.sort((bits << 32) | np.arange(width), axis=1) & 0xFFFFFFFF
    ranks = np.empty(by_row.shape)
    np.put_along_axis(ranks, order, np.arange(width, dtype=np.float64)[None, :], axis=1)
    return ranks.reshape(rows.shape)


def row_sums(rows: Any, width: int) -> Any:
    """Σ over each row of a tensor, at each of its elements, in an order that depends on the width alone: shape (1, n).

    For arrays of numpy and of torch.
    """
    parts = rows.reshape(-1, width)
    while (length := parts.shape[-1]) > 1:
        half = length // 2
        added = parts[..., :half] + parts[..., half : 2 * half]
        if length % 2:
            added[..., 0] += parts[..., -1]
        parts = added
    repeated = parts[..., 0].repeat(width) if isinstance(parts, np.ndarray) else parts[..., 0].repeat_interleave(width)
    return repeated[None, :]


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
