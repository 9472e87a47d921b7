"""Pools of ingredients for greedy soups, and evaluators for them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from factory import DTYPES, read_checkpoint, same_bits, write_checkpoint

import streamsoup

DRIVER = Path(__file__).with_name("greedy_driver.py")
SIZE = 6000


def make_pool(folder, count, *, bad=(), seed=0):
    """Write runs around one target: `bad` ones lie far off. Returns their paths and the target."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal(SIZE)
    runs = []
    for i in range(count):
        noise = (3.0 if i in bad else 0.3 + 0.01 * i) * rng.standard_normal(SIZE)
        tensors = {"w": (target + noise).astype(ml_dtypes.bfloat16), "ids": np.arange(4)}
        path = write_checkpoint(folder / f"run{i:02d}", tensors)
        (folder / f"run{i:02d}" / "config.json").write_text("{}")
        runs.append(str(path))
    return runs, target


def scorer(target, asked=None):
    """Score a candidate by its distance to the target, and note what was asked."""

    def score(candidate):
        if asked is not None:
            asked.append(tuple((m.path, m.weight) for m in candidate.members))
        return -float(np.square(candidate.tensors()["w"].double().numpy() - target).sum())

    return score


def recipe_of(soup):
    manifest = json.loads((soup / "streamsoup.json").read_text())
    return [(entry["path"], entry["weight"]) for entry in manifest["ingredients"]]


def equals_its_recipe(soup, tmp_path):
    recipe = streamsoup.read_recipe(soup / "recipe.yaml")
    again = tmp_path / "again"
    paths, weights = [i.path for i in recipe.ingredients], [i.weight for i in recipe.ingredients]
    streamsoup.soup(paths, again, weights=weights, buffers=recipe.buffers, overwrite=True)
    return same_bits(read_checkpoint(soup), read_checkpoint(again))


SMALL = {"w": ("BF16", (8, 12)), "head": ("F32", (20,)), "half": ("F16", (5,))}


def small_pool(folder, count, seed=0, spread=60):
    """Tiny runs on a grid of 1/64, where sums of squares are whole numbers and so have no rounding of their own."""
    rng = np.random.default_rng(seed)
    target = {name: rng.integers(-100, 100, shape) for name, (_, shape) in SMALL.items()}
    runs = []
    for i in range(count):
        reach = 6 if i in (1, 3) else 1
        tensors = {
            name: ((target[name] + reach * rng.integers(-spread, spread + 1, shape)) / 64).astype(DTYPES[dtype])
            for name, (dtype, shape) in SMALL.items()
        }
        runs.append(str(write_checkpoint(folder / f"run{i:02d}", tensors)))
    return runs, target


class FileScore:
    """Reads files as a command does, in this process."""

    needs_files = True

    def __init__(self, function):
        self.function = function

    def __call__(self, candidate):
        return self.function(candidate)


def quality(tensors, target):
    """Minus the distance to the target, of whole numbers: the same in any order of adding."""
    return -float(
        sum(
            np.abs(np.rint(tensors[name].astype(np.float64) * 4096).astype(np.int64) - target[name] * 64).sum()
            for name in target
        )
    )


def as_arrays(candidate):
    tensors = candidate.tensors()
    kinds = {name: DTYPES[dtype] for name, (dtype, _) in SMALL.items()}
    return {name: tensors[name].flatten().view(torch.uint8).numpy().view(kinds[name]) for name in SMALL}


def flat(target):
    return {name: array.reshape(-1) for name, array in target.items()}
