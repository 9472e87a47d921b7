"""Paths of ingredients: files and folders, layers put together (see `sliced`), bases with adapters: ``base+lora``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from streamsoup.checkpoints.hub import absolute, is_there, pinned, real
from streamsoup.checkpoints.sliced import split_parts
from streamsoup.errors import RecipeError


def split_path(path: str, exists: Callable[[str], bool] = is_there) -> tuple[str, ...]:
    """Return a base and its adapters, in order; a path with none of them is the only one.

    What exists with a "+" in its name wins, the longest first.

    Parameters
    ----------
    path : str
    exists : callable taking a path
        Whether there is such a file or folder, or id of the Hub.

    Raises
    ------
    CheckpointError
        If layers are picked by paths that would not mean the same from another folder.
    """
    pieces = path.split("+")
    if len(pieces) == 1:
        return (path,)
    found: list[str] = []
    while pieces:
        heads = ["+".join(pieces[:count]) for count in range(len(pieces), 0, -1)]
        head = next((head for head in heads if exists(head) or split_parts(head)), pieces[0])
        found.append(head)
        pieces = pieces[head.count("+") + 1 :]
    # An empty piece names nothing, and would become a folder: the name as it is will be said to be missing.
    return tuple(found) if all(found) else (path,)


def change_path(path: str, change: Callable[[str], str], exists: Callable[[str], bool] = is_there) -> str:
    """Change each path of a base and its adapters, if there are such; else the whole, as any name with a plus.

    `exists` is asked before a path is changed: ``base+x/../y`` is not ``y``.
    """
    parts = split_path(path, exists)
    if not all(exists(part) or split_parts(part) for part in parts):
        return change(path)
    return "+".join(map(change, parts))


def absolute_path(path: str) -> str:
    """Make a path mean the same from any folder, and at any time: ids of the Hub are pinned to their commits.

    Raises
    ------
    CheckpointError
        If there is no such repository, or it cannot be reached.
    """
    return change_path(path, absolute)


def real_path(path: str) -> str:
    """Return an absolute path without links: two paths of one ingredient are equal then. Raises as `absolute_path`."""
    return change_path(path, real)


def pinned_path(path: str) -> str:
    """Pin the ids of the Hub in a path to their commits; all else stays as it is. Raises as `absolute_path`."""
    return change_path(path, pinned)


def given_paths(ingredients: str | Path | Sequence[str | Path]) -> list[str]:
    """One path or several, as a person gives them, as a list.

    Raises
    ------
    RecipeError
        If one is no path: a live state, such as a mapping of tensors, would be a name of megabytes.
    """
    given = [ingredients] if isinstance(ingredients, str | Path) else list(ingredients)
    for one in given:
        if not isinstance(one, str | Path):
            raise RecipeError(
                f"An ingredient is a path, not a {type(one).__name__}. Give live tensors to streamsoup.open or "
                "streamsoup.RunningSoup."
            )
    return [str(path) for path in given]


def short_path(path: str) -> str:
    """The last two parts of each path in it: enough to know it, and no one's home folder."""
    return "+".join("/".join(Path(part).parts[-2:]) for part in split_path(path))
