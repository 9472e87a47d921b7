"""A method for some tensors only; the others are the first checkpoint's."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from streamsoup.errors import RecipeError
from streamsoup.methods.parameters import matches
from streamsoup.methods.protocol import Array, Elementwise, Measure, Merge, Method, TensorInfo, Values


def _first(values: Values) -> Array:
    return values.rows[0]


_FIRST = Elementwise(_first)


@dataclass(frozen=True, slots=True)
class Selected:
    """See `Method`.

    Attributes
    ----------
    method : Method
    include, exclude : tuple of str
        Shell patterns of names: of those included (all, if there are none), not those excluded.
    """

    method: Method
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @property
    def name(self) -> str:
        """See `Method`."""
        return self.method.name

    @property
    def fixed(self) -> bool:
        """See `Method`: that others' numbers do not matter, not even as zeros and NaN, is no linear combination."""
        return False

    @property
    def sweeps(self) -> int:
        """See `Method`."""
        return self.method.sweeps

    @property
    def whole_sweeps(self) -> int:
        """See `Method`."""
        return self.method.whole_sweeps

    @property
    def by_row(self) -> bool:
        """See `Method`."""
        return self.method.by_row

    @property
    def verbatim(self) -> bool:
        """See `Method`."""
        return self.method.verbatim

    def takes(self, name: str) -> bool:
        """See `Method`."""
        included = not self.include or any(matches(p, name) for p in self.include)
        return included and not any(matches(p, name) for p in self.exclude)

    def whole(self, tensors: Sequence[TensorInfo]) -> Generator[Measure, Any, Any]:
        """See `Method`."""
        return (yield from self.method.whole(tensors))

    def merge(self, tensor: TensorInfo, known: Any) -> Merge:
        """See `Method`."""
        return self.method.merge(tensor, known) if self.takes(tensor.name) else _FIRST


def select(
    method: Method, include: Sequence[str], exclude: Sequence[str], names: Sequence[str]
) -> tuple[Method, list[tuple[str, int]]]:
    """Limit a method to some tensors, and say how many each pattern fits.

    Raises
    ------
    RecipeError
        If a pattern fits none.
    """
    touched = []
    for what, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            count = sum(matches(pattern, name) for name in names)
            if not count:
                raise RecipeError(f"{what} {pattern}: no tensor has such a name. Correct the pattern or leave it out.")
            touched.append((f"{what} {pattern}", count))
    if not touched:
        return method, []
    return Selected(method, tuple(include), tuple(exclude)), touched
