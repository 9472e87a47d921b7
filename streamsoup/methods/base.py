"""What most methods have in common."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

from streamsoup.errors import RecipeError
from streamsoup.methods.protocol import Measure, Merge, TensorInfo


class MethodBase:
    """A method that measures tensors one at a time; inherit from it."""

    fixed: ClassVar[bool] = False
    sweeps: ClassVar[int] = 1
    whole_sweeps: ClassVar[int] = 0
    by_row: ClassVar[bool] = False
    verbatim: ClassVar[bool] = False

    def takes(self, name: str) -> bool:
        """See `Method`."""
        return True

    def whole(self, tensors: Sequence[TensorInfo]) -> Generator[Measure, Any, Any]:
        """See `Method`: nothing is measured of all tensors together."""
        return
        yield

    def merge(self, tensor: TensorInfo, known: Any) -> Merge:
        """See `Method`."""
        raise NotImplementedError


def refuse_cancelling(method: str, weights: Sequence[float]) -> None:
    """Refuse weights whose sum means nothing.

    Raises
    ------
    RecipeError
    """
    if abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
        raise RecipeError(
            f"Method {method} divides by the sum of the weights {list(weights)}, which cancel. Change them."
        )
