"""Which tensors share their mixing coefficients: all, those of a layer, each alone, or those that a pattern fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from streamsoup.errors import RecipeError
from streamsoup.layers import layer_name
from streamsoup.methods.parameters import matches

By: TypeAlias = str | Sequence[str]
WORDS = ("model", "layer", "tensor")
_OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors with the same coefficients.

    Attributes
    ----------
    name : str
    tensors : tuple of int
    """

    name: str
    tensors: tuple[int, ...]


def make_groups(
    by: By, names: Sequence[str], averaged: Sequence[int], tied: Mapping[int, int] | None = None
) -> tuple[Group, ...]:
    """Sort tensors into groups, in the order of their first tensors.

    Parameters
    ----------
    by : {"model", "layer", "tensor"} or sequence of shell patterns
        A tensor belongs to the first pattern that fits its name; what none fits makes one more group.
    names : sequence of str
        Of all tensors.
    averaged : sequence of int
        Those that are combined.
    tied : mapping of int to int, optional
        Tensors that are another one under a second name; they go where that goes.

    Raises
    ------
    RecipeError
        If `by` is none of these, or a pattern fits no tensor.
    """
    name_of = _namer(by)
    found: dict[str, list[int]] = {}
    for tensor in averaged:
        found.setdefault(name_of(names[(tied or {}).get(tensor, tensor)]), []).append(tensor)
    for number, pattern in enumerate(() if isinstance(by, str) else by):
        if pattern in by[:number] or not any(matches(pattern, names[t]) for t in found.get(pattern, ())):
            raise RecipeError(
                f"by: {pattern!r} fits no tensor that an earlier pattern does not. Correct it or leave it out."
            )
    return tuple(Group(name, tuple(tensors)) for name, tensors in found.items())


def _namer(by: By) -> Callable[[str], str]:
    if isinstance(by, str):
        if by not in WORDS:
            raise RecipeError(f"by: {by!r} is not one of {', '.join(WORDS)}, nor a list of patterns.")
        if by == "layer":
            return layer_name
        return (lambda name: name) if by == "tensor" else (lambda name: "model")
    if not by or not all(isinstance(pattern, str) for pattern in by):
        raise RecipeError(f"by: {by!r} is not a list of patterns of tensor names.")
    return lambda name: next((pattern for pattern in by if matches(pattern, name)), _OTHERS)
