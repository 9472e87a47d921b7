"""Scores of ingredients that a person has already, from a JSON or CSV file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

from streamsoup.errors import RecipeError


def read_own_scores(file: str | Path, ingredients: Sequence[str]) -> dict[str, float]:
    """Read scores and match them with ingredients, by path or by last part of the path.

    Parameters
    ----------
    file : path
        ``{"run1": 0.9, ...}`` as JSON, or lines ``run1,0.9`` as CSV, with or without a heading.
    ingredients : sequence of paths

    Raises
    ------
    RecipeError
        If the file is neither, a score is no finite number, or an ingredient has none.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}). Give --order score, given, random or a file.") from error
    rows = _from_json(text, path) if path.suffix == ".json" else _from_csv(text)
    found: dict[str, float] = {}
    for ingredient in ingredients:
        names = (ingredient, ingredient.rstrip("/"), Path(ingredient).name, Path(ingredient).stem)
        name = next((name for name in names if name in rows), None)
        if name is None:
            raise RecipeError(f"{path}: has no score for {ingredient}. Add it, or leave the ingredient out.")
        found[ingredient] = _number(rows[name], name, path)
    return found


def _from_json(text: str, path: Path) -> dict[str, object]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise RecipeError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: must be an object of ingredients and scores.")
    return document


def _from_csv(text: str) -> dict[str, object]:
    rows = [row for row in csv.reader(text.splitlines()) if len(row) >= 2]
    return {row[0].strip(): row[1].strip() for row in rows}


def _number(value: object, name: str, path: Path) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"{path}: the score of {name} is {value!r}, not a finite number.")
    return number
