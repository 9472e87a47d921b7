"""How the tensors of ingredients are named and found: which entry of a file, under which names, and which of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from streamsoup.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Opening:
    """What is made of the names that ingredients have. The default takes all tensors under their own names.

    Attributes
    ----------
    key : str or None
        Which entry of a nested file holds the tensors.
    strip_prefix : tuple of str
        What is taken off the beginning of a name where it is there, one after the other.
    rename : tuple of (str, str)
        Regular expressions, and what their matches become, as in `re.sub`; one after the other, after `strip_prefix`.
    only_shared : bool
        Take the tensors which all ingredients have with one shape, and list the others.
    leave_out : tuple of str
        Names that are left out beside, though all have them: what a choice of the ingredients shares may be more than
        what all of them shared.
    """

    key: str | None = None
    strip_prefix: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    only_shared: bool = False
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.key is not None and (not isinstance(self.key, str) or not self.key):
            raise RecipeError(f"key: {self.key!r} is not the name of an entry.")
        if not isinstance(self.only_shared, bool):
            raise RecipeError(f"only_shared is true or false, not {self.only_shared!r}.")
        for name in ("strip_prefix", "leave_out"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        object.__setattr__(self, "rename", _pairs(self.rename))
        if self.leave_out and not self.only_shared:
            raise RecipeError("leave_out: belongs to only_shared. Give both, or neither.")

    @staticmethod
    def of(options: Any) -> Opening:
        """Gather the fields of this name from options that have them, those that are missing aside."""
        return Opening(**{f.name: getattr(options, f.name) for f in fields(Opening) if hasattr(options, f.name)})

    def put_into(self, options: Any) -> None:
        """Write the fields, in the form that they have here, into frozen options that have them too."""
        for f in fields(self):
            if hasattr(options, f.name):
                object.__setattr__(options, f.name, getattr(self, f.name))

    def to_options(self) -> dict[str, Any]:
        """Return the fields by name, for options that have them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def rules(self) -> list[tuple[str, Callable[[str], str]]]:
        """What changes names, each with its name, in order."""
        rules: list[tuple[str, Callable[[str], str]]] = [
            (strip_rule(prefix), functools.partial(_stripped, prefix)) for prefix in self.strip_prefix
        ]
        return rules + [
            (rename_rule(old, new), functools.partial(re.compile(old).sub, new)) for old, new in self.rename
        ]


def strip_rule(prefix: str) -> str:
    """Name a rule that takes a prefix off."""
    return f"strip-prefix {prefix}"


def rename_rule(old: str, new: str) -> str:
    """Name a rule that replaces what matches."""
    return f"rename {old}={new}"


def _stripped(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _words(option: str, given: object) -> tuple[str, ...]:
    words = (given,) if isinstance(given, str) else given
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
        raise RecipeError(f"{option} is a list of words, not {given!r}.")
    return tuple(words)


def _pairs(given: object) -> tuple[tuple[str, str], ...]:
    rows: Sequence[object] = list(given.items()) if isinstance(given, Mapping) else given  # type: ignore[assignment]
    if not isinstance(rows, list | tuple):
        raise RecipeError(f"rename is a list of pairs, or a mapping, of old and new, not {given!r}.")
    pairs = []
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 2 or not all(isinstance(part, str) for part in row):
            raise RecipeError(f"rename: {row!r} is no pair of a regular expression and what its matches become.")
        old, new = row
        try:
            re.compile(old).sub(new, "")
        except (re.error, IndexError, RecursionError) as error:
            raise RecipeError(f"rename {old}={new}: is no regular expression with its replacement ({error}).") from None
        pairs.append((old, new))
    return tuple(pairs)


AS_THEY_ARE = Opening()
