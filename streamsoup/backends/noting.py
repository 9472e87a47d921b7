"""Arrays that are not there: they note what a method's function does with them. See `streamsoup.backends.tracing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.backends.rows import row_ranks, row_sums, stream_keys
from streamsoup.kernels.vector_machine import Op
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
