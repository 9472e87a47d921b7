"""Soups of one recipe with a parameter that takes several values: each is made and scored, and the best is kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import identify, identity_to_json, open_checkpoints
from streamsoup.cook import cook, resume
from streamsoup.errors import RecipeError, ResumeError
from streamsoup.execution import Execution, SoupResult
from streamsoup.files import write_durably
from streamsoup.recipe import Recipe, recipe_to_mapping, with_absolute_paths, with_pinned_ids
from streamsoup.score import read_scores
from streamsoup.soup_plan import plan_soup
from streamsoup.workspace import Workspace, destination_of

_NAME = "sweep.json"
_MOST_VALUES = 1000


@dataclass(frozen=True, slots=True)
class Trial:
    """One value, and the soup that it makes.

    Attributes
    ----------
    value : float
    path : Path
        Where the soup lies while it is scored.
    """

    value: float
    path: Path


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep found.

    Attributes
    ----------
    name : str
        The parameter.
    scores : dict of float to float
        By value, in the order of the sweep.
    best : float
        The first value with the best score.
    soup : SoupResult
        The soup of that value.
    """

    name: str
    scores: dict[float, float]
    best: float
    soup: SoupResult


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """Read ``alpha=0:1:0.1`` (the name is ``alpha`` if none is given): both ends count.

    Raises
    ------
    RecipeError
    """
    name, equals, numbers = text.rpartition("=")
    try:
        start, stop, step = (Decimal(part) for part in numbers.split(":"))
        count = int((stop - start) / step) + 1
    except (InvalidOperation, ValueError, ArithmeticError):
        raise RecipeError(f"sweep {text}: write it as NAME=START:STOP:STEP, such as alpha=0:1:0.1.") from None
    if not 1 <= count <= _MOST_VALUES:
        raise RecipeError(f"sweep {text}: has {count} values, not 1 to {_MOST_VALUES}.")
    return name if equals else "alpha", [float(start + k * step) for k in range(count)]


def sweep(
    recipe: Recipe,
    out: str | Path,
    score: Callable[[Trial], Any],
    *,
    name: str = "alpha",
    values: Sequence[float],
    execution: Execution | None = None,
    metric: str | None = None,
    minimize: bool = False,
    said: str = "",
    on_trial: Callable[[float, float], None] | None = None,
) -> SweepResult:
    """Make and score the soup of each value of a parameter, then make the best one to stay.

    Scores are kept in ``OUT.work`` until the soup is published: the same call again goes on where it ended.

    Parameters
    ----------
    recipe : Recipe
    out : path
    score : callable taking a Trial
        Returns a number, or a mapping with `metric`.
    name : str
        A parameter of the recipe's method.
    values : sequence of float
    execution : Execution, optional
    metric : str, optional
    minimize : bool
        Lower is better.
    said : str
        What scores, in words: scores of another evaluator are not taken over.
    on_trial : callable taking a value and its score, optional

    Raises
    ------
    StreamsoupError

    Notes
    -----
    Every soup is read from its ingredients. Source: Wortsman et al. 2021, arXiv 2109.01903, for ``alpha``.
    """
    execution = execution or Execution()
    recipe = with_pinned_ids(recipe)
    values = [float(value) for value in values]
    if not values:
        raise RecipeError("A sweep needs at least one value.")
    recipes = {value: replace(recipe, parameters={**recipe.parameters, name: value}) for value in values}
    for one in recipes.values():  # what cannot work is told of before anything is scored
        plan_soup(one, out, execution)
    folder = Path(f"{os.path.abspath(out)}.work")
    book = _Book(folder, recipe, name, said)
    candidate = folder / ("candidate.safetensors" if destination_of(out).is_file else "candidate")
    hasty = replace(execution, overwrite=True, durable=False, keep=False, restart=True)
    for value, one in recipes.items():
        if value not in book.scores:
            cook(one, candidate, hasty)
            book.enter(value, read_scores(score(Trial(value, candidate)), metric, ()).value)
        if on_trial is not None:
            on_trial(value, book.scores[value])
    best = (min if minimize else max)(values, key=lambda value: book.scores[value])
    begun = Workspace(destination_of(out)).exists and not execution.restart
    soup = resume(out, execution) if begun else cook(recipes[best], out, execution)
    shutil.rmtree(folder)
    return SweepResult(name, {value: book.scores[value] for value in values}, best, soup)


class _Book:
    """Scores by value, on disk as soon as they are given."""

    def __init__(self, folder: Path, recipe: Recipe, name: str, said: str) -> None:
        self._path = folder / _NAME
        self._asked = {
            "recipe": recipe_to_mapping(with_absolute_paths(recipe)),
            "identities": [identity_to_json(identify(c)) for c in open_checkpoints(recipe.checkpoints, recipe.opening)],
            "name": name,
            "said": said,
        }
        self.scores: dict[float, float] = {}
        if self._path.exists():
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if found["asked"] != json.loads(json.dumps(self._asked)):
                raise ResumeError(
                    f"{folder}: holds a sweep of another recipe, of other checkpoints or with another score. Remove it."
                )
            self.scores = dict(found["scores"])
        elif folder.exists() and any(folder.iterdir()):
            raise ResumeError(f"{folder}: is there already, and is no sweep of ours. Move it away.")
        folder.mkdir(parents=True, exist_ok=True)

    def enter(self, value: float, score: float) -> None:
        """Write a score down."""
        self.scores[value] = score
        write_durably(self._path, json.dumps({"asked": self._asked, "scores": list(self.scores.items())}))
