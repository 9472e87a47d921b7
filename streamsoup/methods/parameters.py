"""Parameters of a method: for all tensors, by name, by depth in the network, and for each ingredient.

A setting is a number (or true, false, a word); a list of numbers, a gradient over the layers of the network, between
which values are interpolated; or a list of conditions, of which the first that fits a tensor's name counts:
``{pattern: "*.mlp.*", value: 0.3}`` (a shell pattern for the whole name), ``{filter: mlp, value: 0.3}`` (a part of the
name, as mergekit writes it), ``{tensors: {lm_head.weight: 0.3, ...}}`` (values by whole names), ``{value: 0.5}`` (for
all others).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from streamsoup.errors import RecipeError
from streamsoup.methods.protocol import TensorInfo

Setting: TypeAlias = Any
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
# The least and the largest that parameters may be, where not any number will do.
_RANGES = {
    "density": (0.0, 1.0),
    "gamma": (0.0, 1.0),
    "epsilon": (0.0, 1.0),
    "select_topk": (0.0, 1.0),
    "tol": (0.0, math.inf),
    "smoothing": (0.0, math.inf),
    "max_iter": (1, math.inf),
}


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
        low, high = _RANGES.get(name, (-math.inf, math.inf))
        if not low <= found <= high:
            raise RecipeError(f"{name}: {found:g} is not from {low:g} to {high:g}.")
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
        """Refuse names that a method does not know, and settings that are none.

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
        for source in (self.shared, *self.each):
            for name, setting in source.items():
                _check(name, setting)

    def touched(self, names: Sequence[str]) -> list[tuple[str, int]]:
        """Say of each condition how many tensors it fits.

        Raises
        ------
        RecipeError
            If one fits none.
        """
        found = []
        for name, condition in self._conditions():
            if "tensors" in condition:
                found.append((f"{name} by tensor", _count_listed(name, condition["tensors"], names)))
                continue
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
                    if isinstance(condition, Mapping) and condition.keys() & {"pattern", "filter", "tensors"}:
                        yield name, condition


def plain(name: str, setting: Any) -> Setting:
    """Make numbers, words, lists and mappings of Python of what stands for them, so that a recipe can be written.

    Raises
    ------
    RecipeError
    """
    if isinstance(setting, Mapping):
        return {str(key): plain(name, value) for key, value in setting.items()}
    if isinstance(setting, list | tuple):
        return [plain(name, value) for value in setting]
    if isinstance(setting, str):
        return float(setting) if _EXPONENT.fullmatch(setting) else setting  # YAML 1.1 takes 1e-5 for a word
    if isinstance(setting, bool | int | float | None):
        return setting
    if hasattr(setting, "tolist"):  # a number or an array of numpy or torch
        return plain(name, setting.tolist())
    raise RecipeError(f"{name}: {setting!r} is neither a number, a word nor a list.")


def _check(name: str, setting: Setting) -> None:
    if isinstance(setting, Mapping):
        raise RecipeError(f"{name}: conditions stand in a list, as in [{{pattern: ..., value: ...}}].")
    if not isinstance(setting, list) or _is_gradient(setting):
        return
    if not setting:
        raise RecipeError(f"{name}: an empty list says nothing. Give a number or conditions.")
    for condition in setting:
        if isinstance(condition, Mapping) and "tensors" in condition:
            _check_table(name, condition)
            continue
        if not isinstance(condition, Mapping) or "value" not in condition:
            raise RecipeError(
                f"{name}: {condition!r} is neither a number of a gradient nor a condition with 'value' and 'pattern'."
            )
        if unknown := sorted(set(condition) - {"value", "pattern", "filter"}):
            raise RecipeError(f"{name}: unknown key {unknown[0]!r} in a condition. Known: filter, pattern, value.")
        if "pattern" in condition and "filter" in condition:
            raise RecipeError(f"{name}: a condition has a pattern or a filter, not both.")
        if isinstance(condition["value"], list) and not _is_gradient(condition["value"]):
            raise RecipeError(f"{name}: the value of a condition is a number, a word or a gradient of numbers.")


def _check_table(name: str, condition: Mapping[str, Any]) -> None:
    table = condition["tensors"]
    if len(condition) > 1 or not isinstance(table, Mapping) or not table:
        raise RecipeError(f"{name}: 'tensors' stands alone in a condition, with values by the names of tensors.")
    for tensor, value in table.items():
        if isinstance(value, list | Mapping):
            raise RecipeError(f"{name}: the value for {tensor} is a number or a word, not {value!r}.")


def _count_listed(name: str, table: Mapping[str, Any], names: Sequence[str]) -> int:
    if unknown := sorted(table.keys() - set(names)):
        raise RecipeError(f"{name} by tensor: there is no tensor {unknown[0]}. Correct the name or leave it out.")
    return len(table)


def _is_gradient(setting: Setting) -> bool:
    numbers = isinstance(setting, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in setting)
    return bool(setting) and numbers


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
    if not isinstance(setting, list):
        return setting
    if _is_gradient(setting):
        scaled = tensor.depth * (len(setting) - 1)
        low = int(scaled)
        high = min(low + 1, len(setting) - 1)
        return (1 - (scaled - low)) * setting[low] + (scaled - low) * setting[high]
    for condition in setting:
        if "tensors" in condition:
            if (found := condition["tensors"].get(tensor.name)) is not None:
                return found
        elif _fits(condition, tensor.name):
            return _evaluate(name, condition["value"], tensor)
    return None
