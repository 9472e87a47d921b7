"""What a learned soup is to be, what was done at each step, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streamsoup.errors import RecipeError
from streamsoup.learning.groups import By
from streamsoup.learning.mixture import PARAMETRISATIONS, Numbers
from streamsoup.pool import PoolOptions
from streamsoup.recipe import Ingredient, Recipe

# The fewest examples for each coefficient with which a difference is more than noise.
EXAMPLES_EACH = 30


@dataclass(frozen=True, slots=True)
class LearnJob:
    """All that decides the bits of a learned soup, but for module, loss and batches.

    Attributes
    ----------
    ingredients : tuple of str
    by : {"model", "layer", "tensor"} or tuple of patterns
        See `streamsoup.learning.groups`.
    parametrisation : {"softmax", "free"}
    temperature : bool
    optimizer : str
    lr, weight_decay : float
    epochs, accumulate : int
        Passes over the batches; batches to a step.
    init : tuple of float or None
        Coefficients to begin with; None: all equal.
    seed : int
    patience : int or None
        Evaluations on held-out batches without progress, after which to stop.
    pool : PoolOptions
    """

    ingredients: tuple[str, ...]
    by: By = "model"
    parametrisation: str = "softmax"
    temperature: bool = True
    optimizer: str = "adamw"
    lr: float = 0.1
    weight_decay: float = 0.0
    epochs: int = 3
    accumulate: int = 1
    init: tuple[float, ...] | None = None
    seed: int = 0
    patience: int | None = None
    pool: PoolOptions = field(default_factory=PoolOptions)

    def __post_init__(self) -> None:
        if len(set(self.ingredients)) < len(self.ingredients):
            twice = next(path for path in self.ingredients if self.ingredients.count(path) > 1)
            raise RecipeError(f"{twice}: is named twice. Name it once.")
        if self.parametrisation not in PARAMETRISATIONS:
            raise RecipeError(f"parametrisation: {self.parametrisation!r} is not one of {', '.join(PARAMETRISATIONS)}.")
        if not 0 < self.lr < math.inf:
            raise RecipeError(f"lr: {self.lr:g}, but a step has a length. Give a positive number.")
        if not 0 <= self.weight_decay < math.inf:
            raise RecipeError(f"weight_decay: {self.weight_decay:g} is not a number from zero on.")
        for name, least in (("epochs", 1), ("accumulate", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise RecipeError(f"{name}: {value!r} is not a whole number from {least} on.")

    @property
    def start(self) -> Numbers:
        """Coefficients to begin with, shape (ingredients,)."""
        count = len(self.ingredients)
        return np.full(count, 1 / count) if self.init is None else np.array(self.init)

    def free(self, groups: int) -> int:
        """Coefficients that are free, of so many groups."""
        return groups * (len(self.ingredients) - (self.parametrisation == "softmax"))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the optimiser.

    Attributes
    ----------
    step, epoch : int
        From 1 on.
    loss : float
        Mean over the step's batches, before the step.
    temperature : float or None
        After the step.
    held_out : float or None
        Mean loss over the held-out batches after the step, where it was evaluated.
    seconds, network_seconds : float
        Of all of the step; in the network: forward, backward and evaluation.
    bytes_read : int
        Of ingredients.
    """

    step: int
    epoch: int
    loss: float
    temperature: float | None
    held_out: float | None
    seconds: float
    network_seconds: float
    bytes_read: int


@dataclass(frozen=True, slots=True)
class LearnResult:
    """What a learned soup came to.

    Attributes
    ----------
    path : Path or None
        Where the soup is, if one was written.
    ingredients : tuple of str
    groups : tuple of str
        Names of the groups of tensors.
    coefficients : float64 array, shape (groups, ingredients)
    temperature : float or None
        β, by which logits are to be multiplied; it is no part of the soup.
    loss : float
        Of the last step, before it.
    first_held_out, held_out : float or None
        Loss at the beginning and of the soup, where there are held-out batches.
    best_step : int
        After which the coefficients are those of the soup; 0: the beginning.
    steps : tuple of StepRecord
    recipe : Recipe
        Makes the same soup, bit for bit.
    bytes_read : int
        Of ingredients, in this process.
    projected_peak_bytes, measured_peak_bytes : int
        What is owned beside module and gradient; and all that was owned above the level at the beginning, module's
        gradient and activations included.
    seconds : float
    notes : tuple of str
    """

    path: Path | None
    ingredients: tuple[str, ...]
    groups: tuple[str, ...]
    coefficients: Numbers
    temperature: float | None
    loss: float
    first_held_out: float | None
    held_out: float | None
    best_step: int
    steps: tuple[StepRecord, ...]
    recipe: Recipe
    bytes_read: int
    projected_peak_bytes: int
    measured_peak_bytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "path": None if self.path is None else str(self.path),
            "ingredients": list(self.ingredients),
            "coefficients": dict(zip(self.groups, self.coefficients.tolist(), strict=True)),
            "temperature": self.temperature,
            "loss": self.loss,
            "first_held_out": self.first_held_out,
            "held_out": self.held_out,
            "best_step": self.best_step,
            "steps": [asdict(step) for step in self.steps],
            "bytes_read": self.bytes_read,
            "projected_peak_bytes": self.projected_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def recipe_of(job: LearnJob, of_tensor: Mapping[str, Numbers] | Numbers) -> Recipe:
    """Write learned coefficients as a recipe: shape (ingredients,), or by the names of tensors."""
    pool = job.pool
    if isinstance(of_tensor, Mapping):
        tables: list[dict[str, float]] = [{} for _ in job.ingredients]
        for name, row in of_tensor.items():
            for table, number in zip(tables, row.tolist(), strict=True):
                table[name] = number
        ingredients = [
            Ingredient(path, parameters={"weight": [{"tensors": table}]})
            for path, table in zip(job.ingredients, tables, strict=True)
        ]
    else:
        ingredients = [Ingredient(path, w) for path, w in zip(job.ingredients, of_tensor.tolist(), strict=True)]
    return Recipe(
        tuple(ingredients),
        normalize=False,
        dtype=pool.dtype,
        shard_bytes=pool.shard_bytes,
        buffers=pool.buffers,
        nonfinite=pool.nonfinite,
        **pool.opening.to_options(),
    )


def warnings_of(job: LearnJob, examples: int | None, coefficients: int) -> list[str]:
    """Say so if there is nothing to mix, or if there are too few examples for so many free coefficients."""
    if len(job.ingredients) == 1:
        return [f"Only {job.ingredients[0]} has a weight at the beginning: there was nothing to mix."]
    if examples is None or examples >= EXAMPLES_EACH * coefficients:
        return []
    return [
        f"{examples:,} examples are few for {coefficients:,} free coefficients: judge the soup on other data, since "
        f"what was learned may be noise. {EXAMPLES_EACH * coefficients:,} examples, fewer ingredients or coarser "
        "groups help."
    ]
