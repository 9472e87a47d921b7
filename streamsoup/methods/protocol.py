"""What a method is: what to measure of a tensor, and from that how to combine it.

A method knows nothing of files, threads or devices. `Method.merge` is called for each averaged tensor. It returns
`Coefficients` or an `Elementwise` rule; or, if it must look at the numbers first, it is a generator that yields what it
wants measured, gets that, and returns one of the two at the end:

    def merge(self, tensor, known):
        gram = yield Gram(centre=0)
        return Coefficients(...)

Functions of methods get `Values`, whose arrays are float64: of torch on a GPU, and on the CPU notes of what is done
with them (see `streamsoup.backends.tracing`). They use operators and the helpers of `Values` only, do not branch on
elements, and so give the same bits on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any
"""A float64 array: of torch, or one whose operations are noted."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """One linear combination: (Σ weightsᵢ · θᵢ) / divisor.

    Attributes
    ----------
    weights : tuple of float
        One for each ingredient, in order.
    divisor : tuple of two floats
        An unevaluated sum hi + lo: the exact sum of the weights to about 106 bits, or (1, 0) where none divides.
    """

    weights: tuple[float, ...]
    divisor: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a method may know of a tensor before its numbers.

    Attributes
    ----------
    name : str
    shape : tuple of int
    depth : float
        Where in the network it lies: 0 for the first layer, 1 for the last; 0 for what belongs to no layer.
    """

    name: str
    shape: tuple[int, ...]
    depth: float = 0.0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of a row: all dimensions but the first; a vector is one row."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)


class Values(Protocol):
    """Some elements of one tensor in all checkpoints.

    Attributes
    ----------
    rows : float64 array, shape (checkpoints, n)
        A row for each checkpoint, the base first where there is one.
    tensor : TensorInfo
    """

    @property
    def rows(self) -> Array: ...
    @property
    def tensor(self) -> TensorInfo: ...

    def where(self, condition: Array, yes: Array, no: Array | float) -> Array:
        """Choose element by element."""
        ...

    def sign(self, array: Array) -> Array:
        """Return -1, 0 or 1 for each element."""
        ...

    def number(self, value: float) -> Array:
        """Make an array of one number. Divide by that: by a number of Python, a GPU multiplies with the reciprocal."""
        ...

    def column(self, numbers: tuple[float, ...]) -> Array:
        """Make an array of shape (len(numbers), 1): one number for each row."""
        ...

    def total(self, array: Array) -> Array:
        """Add the rows, in their order; shape (n,)."""
        ...

    def sqrt(self, array: Array) -> Array:
        """Return square roots."""
        ...

    def stack(self, arrays: list[Array]) -> Array:
        """Make rows of arrays of shape (n,)."""
        ...

    def single(self, array: Array) -> Array:
        """Round to float32, as keys of `Ranks` are; still of dtype float64."""
        ...

    def uniform(self, seed: int, streams: int) -> Array:
        """Return random numbers in [0, 1), shape (streams, n): the same for any tiling, thread count and device.

        They depend on the seed, the number of the stream, the name of the tensor and the element's place in it.
        """
        ...

    def row_ranks(self, array: Array) -> Array:
        """Return the place of each element among those of its row of the tensor, from 0; equal ones by position.

        Only in rules with `by_row`.
        """
        ...

    def row_dot(self, a: Array, b: Array) -> Array:
        """Return Σ a·b over each row of the tensor, at each of its elements: shape (n,). Only with `by_row`."""
        ...

    def apply(self, function: Callable[[Any], Any], array: Array) -> Array:
        """Apply a function of numpy arrays to one row, on the CPU whatever the device: for what differs elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class Gram:
    """Measure all inner products of the checkpoints, or of their differences from one.

    The result is a float64 array, shape (checkpoints, checkpoints).

    Attributes
    ----------
    centre : int or None
        Which checkpoint to subtract from all.
    """

    centre: int | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """Measure Σ over the elements of some rows. The result is a float64 array, shape (rows,).

    Attributes
    ----------
    of : callable taking Values
        Returns an array of shape (rows, n).
    by_row : bool
        It must see whole rows of the tensor.
    """

    of: Callable[[Values], Array]
    by_row: bool = False


@dataclass(frozen=True, slots=True)
class Products:
    """Measure the inner product of every checkpoint but the last with the last.

    The result is a float64 array, shape (checkpoints - 1,).
    """


@dataclass(frozen=True, slots=True)
class Ranks:
    """Find order statistics of some rows, exactly. The result is a float64 array, shape (rows, ranks).

    Attributes
    ----------
    of : callable taking Values
        Returns an array of shape (rows, n), not negative; it is rounded to float32.
    ranks : tuple of tuples of int
        For each row, which elements in ascending order, from 0.
    """

    of: Callable[[Values], Array]
    ranks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Elementwise:
    """Combine element by element.

    Attributes
    ----------
    of : callable taking Values
        Returns an array of shape (n,): the elements of the soup, which are rounded once.
    by_row : bool
        It must see whole rows of the tensor.
    """

    of: Callable[[Values], Array]
    by_row: bool = False


Measure: TypeAlias = Gram | Sums | Products | Ranks
Rule: TypeAlias = Coefficients | Elementwise
Merge: TypeAlias = Rule | Generator[Measure, Any, Rule]


class Method(Protocol):
    """Turns what it knows of a tensor into coefficients or a rule. Its `repr` tells all that decides its results.

    Attributes
    ----------
    name : str
    fixed : bool
        `merge` returns `Coefficients` at once, whatever the numbers.
    sweeps, whole_sweeps : int
        How often the numbers of a tensor are gone through, the combination included; and, before that, those of all
        tensors for `whole`. `Ranks` take three sweeps.
    by_row : bool
        Its rules may be by row.
    verbatim : bool
        Where a tensor that is not computed keeps its dtype its bytes are copied, NaN and all, without a look.
    """

    @property
    def name(self) -> str: ...
    @property
    def fixed(self) -> bool: ...
    @property
    def sweeps(self) -> int: ...
    @property
    def whole_sweeps(self) -> int: ...
    @property
    def by_row(self) -> bool: ...
    @property
    def verbatim(self) -> bool: ...

    def takes(self, name: str) -> bool:
        """Whether it is used for a tensor of this name; others are those of the first checkpoint."""
        ...

    def whole(self, tensors: Sequence[TensorInfo]) -> Generator[Measure, Any, Any]:
        """Measure something of all tensors to be merged together, before any is; most methods need not.

        Returns what `merge` gets as `known`.
        """
        ...

    def merge(self, tensor: TensorInfo, known: Any) -> Merge:
        """Combine one tensor."""
        ...
