"""Settings as mergekit writes them: numbers, gradients over the layers, conditions by parts of names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from streamsoup.errors import RecipeError

Settings: TypeAlias = dict[str, Any]


def read_settings(given: object, where: str) -> Settings:
    """Check a mapping of names to numbers, gradients and conditions; numbers become floats."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where}: a mapping of names to numbers, gradients or conditions, not {given!r}.")
    return {str(name): _setting(value, f"{where}: {name}") for name, value in given.items()}


def _setting(given: object, where: str) -> Any:
    if isinstance(given, Mapping):
        given = [given]
    if not isinstance(given, list | tuple):
        return _scalar(given, where)
    if not given:
        raise RecipeError(f"{where}: an empty list. Leave it out.")
    if not any(isinstance(one, Mapping) for one in given):
        return [_scalar(one, where) for one in given]
    conditions = []
    for one in given:
        if not isinstance(one, Mapping) or "value" not in one or set(one) - {"filter", "value"}:
            raise RecipeError(f"{where}: {one!r} is not a condition with 'value' and, perhaps, 'filter'.")
        part = one.get("filter")
        if not isinstance(part, str | None) or isinstance(one["value"], Mapping):
            raise RecipeError(f"{where}: {one!r} has a filter that is no text, or a value that is a condition.")
        value = _setting(one["value"], where)
        conditions.append({"value": value} if part in (None, "*") else {"filter": part, "value": value})
    return joined(conditions, None)


def _scalar(given: object, where: str) -> Any:
    """Return a number or a flag; YAML reads 1e-5 as text, which mergekit takes as a number."""
    if isinstance(given, bool):
        return given
    try:
        found = float(given) if isinstance(given, int | float | str) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RecipeError(f"{where}: {given!r} is not a number.")
    return found


def read_flag(name: str, given: object) -> bool:
    """Return true or false."""
    if isinstance(given, bool):
        return given
    if given in (0.0, 1.0):
        return bool(given)
    raise RecipeError(f"parameters: {name} is true or false for all tensors, not {given!r}.")


def joined(own: Any, shared: Any) -> Any:
    """Put the settings of two places into one: the second counts where no condition of the first fits."""
    conditions: list[Any] = []
    for setting in (own, shared):
        if setting is None or covers(conditions):
            continue
        if isinstance(setting, list) and isinstance(setting[0], Mapping):
            covering = [i for i, one in enumerate(setting) if "filter" not in one]
            conditions += setting[: covering[0] + 1] if covering else setting
        else:
            conditions.append({"value": setting})
    if not conditions:
        return None
    return conditions[0]["value"] if "filter" not in conditions[0] else conditions


def covers(setting: Any) -> bool:
    """Whether a setting has a value for every tensor."""
    if isinstance(setting, list) and (not setting or isinstance(setting[0], Mapping)):
        return any("filter" not in one for one in setting)
    return setting is not None
