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
    rows = _from_json(text, path) if path.suffix == ".json" else _from_csv(text, path)
    found: dict[str, float] = {}
    used: dict[str, str] = {}
    for ingredient in ingredients:
        names = (ingredient, ingredient.rstrip("/"), Path(ingredient).name, Path(ingredient).stem)
        name = next((name for name in names if name in rows), None)
        if name is None:
            raise RecipeError(f"{path}: has no score for {ingredient}. Add it, or leave the ingredient out.")
        if name in used:
            raise RecipeError(f"{path}: {name!r} may be {used[name]} or {ingredient}. Give their whole paths.")
        used[name] = ingredient
        found[ingredient] = _number(rows[name], name, path)
    return found


def _from_json(text: str, path: Path) -> dict[str, object]:
    try:
        document = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, path))
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{path}: is not JSON ({error}).") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: must be an object of ingredients and scores.")
    return document


def _from_csv(text: str, path: Path) -> dict[str, object]:
    rows = [row for row in csv.reader(text.splitlines()) if len(row) >= 2]
    return _once([(row[0].strip(), row[1].strip()) for row in rows], path)


def _once(pairs: Sequence[tuple[str, object]], path: Path) -> dict[str, object]:
    """Refuse a name that is there twice, instead of taking the last."""
    rows: dict[str, object] = {}
    for name, value in pairs:
        if name in rows:
            raise RecipeError(f"{path}: {name!r} is there twice. Keep one score for each ingredient.")
        rows[name] = value
    return rows


def _number(value: object, name: str, path: Path) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(f"{path}: the score of {name} is {value!r}, not a finite number.")
    return number
