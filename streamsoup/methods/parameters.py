"""Parameters of a method: for all tensors, by name, by depth in the network, and for each ingredient.

A setting is a number (or true, false, a word); a list of numbers, a gradient over the layers of the network, between
which values are interpolated; or a list of conditions, of which the first that fits a tensor's name counts:
``{pattern: "*.mlp.*", value: 0.3}`` (a shell pattern for the whole name), ``{filter: mlp, value: 0.3}`` (a part of the
name, as mergekit writes it), ``{value: 0.5}`` (for all others).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from streamsoup.errors import RecipeError
from streamsoup.methods.protocol import TensorInfo

Setting: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Parameters:
    """The settings of a recipe.

    Attributes
    ----------
    shared : mapping of name to setting
    each : tuple of mappings
        For each ingredient, without the base: they come before `shared`.
    """

    shared: Mapping[str, Setting] = field(default_factory=dict)
    each: tuple[Mapping[str, Setting], ...] = ()

    def value(self, name: str, tensor: TensorInfo, default: Any, ingredient: int | None = None) -> Any:
        """Return what is set for a tensor (and an ingredient), or the default."""
        sources = [self.shared] if ingredient is None else [self.each[ingredient], self.shared]
        for source in sources:
            if name in source and (found := _evaluate(name, source[name], tensor)) is not None:
                return found
        return default

    def number(self, name: str, tensor: TensorInfo, default: float, ingredient: int | None = None) -> float:
        """Return a number.

        Raises
        ------
        RecipeError
            If it is none.
        """
        found = self.value(name, tensor, default, ingredient)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise RecipeError(f"{name}: {found!r} is not a number.")
        return float(found)

    def numbers(self, name: str, tensor: TensorInfo, defaults: Sequence[float]) -> tuple[float, ...]:
        """Return a number for each ingredient."""
        return tuple(self.number(name, tensor, default, i) for i, default in enumerate(defaults))

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false, set for all tensors."""
        return bool(self.word(name, default, (True, False)))

    def word(self, name: str, default: Any, allowed: Sequence[Any]) -> Any:
        """Return one of some words, set for all tensors."""
        found = self.shared.get(name, default)
        if found not in allowed:
            raise RecipeError(f"{name}: {found!r} is not one of {', '.join(map(str, allowed))}.")
        return found

    def check(self, shared: Sequence[str], each: Sequence[str], method: str) -> None:
        """Refuse names that a method does not know.

        Raises
        ------
        RecipeError
        """
        for names, known, whose in (
            (self.shared, {*shared, *each}, ""),
            ({name for source in self.each for name in source}, {*each}, " of an ingredient"),
        ):
            for name in names:
                if name not in known:
                    said = ", ".join(sorted(known)) or "none"
                    raise RecipeError(f"{name}: method {method} has no such parameter{whose}. Known: {said}.")

    def touched(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Say of each condition how many tensors it fits.

        Raises
        ------
        RecipeError
            If one fits none.
        """
        found = []
        for name, condition in self._conditions():
            count = sum(_fits(condition, tensor) for tensor in names)
            text = f"{name} {_describe(condition)}: {condition['value']}"
            if not count:
                raise RecipeError(f"{text}: no tensor has such a name. Correct the pattern or leave it out.")
            found.append((text, count))
        return found

    def _conditions(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for source in (self.shared, *self.each):
            for name, setting in source.items():
                for condition in setting if isinstance(setting, list | tuple) else ():
                    if isinstance(condition, Mapping) and ("pattern" in condition or "filter" in condition):
                        yield name, condition


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern fits a whole name."""
    return fnmatchcase(name, pattern)


def _describe(condition: Mapping[str, Any]) -> str:
    return f"where {condition['pattern']}" if "pattern" in condition else f"where the name has {condition['filter']}"


def _fits(condition: Mapping[str, Any], name: str) -> bool:
    if "pattern" in condition:
        return matches(str(condition["pattern"]), name)
    part = condition.get("filter")
    return part in (None, "*") or str(part) in name


def _evaluate(name: str, setting: Setting, tensor: TensorInfo) -> Any:
    if not isinstance(setting, list | tuple):
        return setting
    if setting and all(isinstance(value, int | float) and not isinstance(value, bool) for value in setting):
        scaled = tensor.depth * (len(setting) - 1)
        low = int(scaled)
        high = min(low + 1, len(setting) - 1)
        return (1 - (scaled - low)) * setting[low] + (scaled - low) * setting[high]
    for condition in setting:
        if not isinstance(condition, Mapping) or "value" not in condition:
            raise RecipeError(
                f"{name}: {condition!r} is neither a number of a gradient nor a condition with 'value' and 'pattern'."
            )
        if _fits(condition, tensor.name):
            return _evaluate(name, condition["value"], tensor)
    return None
