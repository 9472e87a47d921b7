"""What stands in a pickle that was read as data, where it wants more than plain containers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Named:
    """A class or function that a pickle names; `name` is its module and name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What a pickle wants made by a class or function.

    Attributes
    ----------
    name : str
        Of the class or function.
    arguments : tuple
    state : object
        What it is to be given afterwards.
    items : list, or () if there are none
        What it is to be filled with: values of a mapping, members of a list, what it is made by.
    """

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items: list[Any] | tuple[()] = ()  # a list for each of a million tensors would take 56 MB

    def fill(self, items: Sequence[Any]) -> None:
        """Remember more of what it is to be filled with."""
        if isinstance(self.items, tuple):
            self.items = []
        self.items.extend(items)


class Elsewhere:
    """What a pickle says lies outside it; `place` says where."""

    __slots__ = ("place",)

    def __init__(self, place: Any) -> None:
        self.place = place


def expect_key(key: Any) -> None:
    """Refuse what cannot be hashed in time and within the stack.

    A tuple in a tuple in a tuple ... overflows the stack. Any number of whole numbers of more than 64 bits have one
    hash, and a dict of them takes the square of the time.

    Raises
    ------
    TypeError
    """
    plain = str, int, float, bytes, type(None), Made, Named
    for part in key if isinstance(key, tuple) else (key,):
        if not isinstance(part, plain) or (isinstance(part, int) and part.bit_length() > 64):
            raise TypeError
