"""Patterns by which an adapter's configuration names modules: regular expressions that cannot keep us busy for ever.

`re` goes back and tries again, and some expressions of thirty characters make it do so for years. An expression is
tried in at most as many ways as its choices multiply to: alternatives, what may be there or not, and how often a
character is repeated. So these are counted, and groups may not be repeated.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from streamsoup.errors import CheckpointError

# A tenth of a second or so. `.*\.layers\.(0|1|...|31)\..*` and a name of 60 characters need a tenth of it.
_MOST_WAYS = 10_000_000
_CHOOSING = re.compile(r"[*+?{|(]")
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?:P<\w+>|.))?|\)|\||(?P<many>(?:[*+]|\{\d*,?\d*\})[?+]?)|\?[?+]?|.",
    re.DOTALL,
)
_GROUPS = re.compile(r"\((?:\?:|\?P<\w+>)?")


def check_pattern(pattern: str) -> None:
    """See whether a pattern is an expression whose ways can be counted.

    Raises
    ------
    ValueError
        With what it is or has, as the rest of a sentence.
    """
    try:
        re.compile(_whole(pattern))
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression ({error})") from None
    _choices(pattern)


def first_match(patterns: Iterable[str], module: str, path: str) -> str:
    """Find the first pattern that fits the end of a module's name, as PEFT does (`get_pattern_key`); empty: none.

    Raises
    ------
    CheckpointError
        If one might take very long.
    """
    for pattern in patterns:
        if _CHOOSING.search(pattern):
            choices, repeated = _choices(pattern)
            if choices * (1 + len(module)) ** repeated * (1 + module.count(".")) > _MOST_WAYS:
                raise CheckpointError(
                    f"{path}: the pattern {pattern[:120]!r} may take very long to compare with {module[:120]}. "
                    "Write it with fewer repetitions and alternatives.",
                    path=path,
                )
        if re.match(_whole(pattern), module):
            return pattern
    return ""


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _choices(pattern: str) -> tuple[int, int]:
    """Count in how many ways a pattern can be gone through, and by how many characters that are repeated besides."""
    choices, repeated, previous = 1, 0, ""
    alternatives = [1]  # of the groups that are open
    for found in _TOKEN.finditer(pattern):
        token = found[0]
        if token[0] == "(":
            if not _GROUPS.fullmatch(token):
                raise ValueError(f"has {token!r}, which is not understood")
            alternatives.append(1)
        elif token == ")":
            choices *= alternatives.pop()
        elif token == "|":
            alternatives[-1] += 1
        elif found["many"]:
            if previous == ")":
                raise ValueError("repeats a group and may take for ever")
            repeated += 1
        elif token[0] == "?":
            choices *= 2
        previous = token
    return choices * alternatives[0], repeated
