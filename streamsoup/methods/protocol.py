"""What a method says: the numbers with which ingredients are added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


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


class Method(Protocol):
    """Turns what it knows of a tensor into coefficients; knows nothing of files, threads or devices."""

    @property
    def name(self) -> str: ...

    def coefficients(self, tensor_name: str) -> Coefficients:
        """Return the numbers for one tensor."""
        ...
