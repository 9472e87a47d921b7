"""What a soup is made of, for trust: the manifest, the recipe beside it, and a model card."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup._version import __version__
from streamsoup.checkpoints import TensorTable, short_path
from streamsoup.dtypes import DTYPES
from streamsoup.plan import Plan
from streamsoup.recipe import Recipe
from streamsoup.units import format_bytes, format_count

MANIFEST_NAME = "streamsoup.json"
RECIPE_NAME = "recipe.yaml"
LEARNED_NAME = "learned.json"
MANIFEST_FORMAT = 1


def content_digests(plan: Plan, digests: npt.NDArray[np.uint64]) -> list[str]:
    """Digests of all that the ingredients of a plan hold, whatever their shards and the order of their tensors.

    Parameters
    ----------
    plan : Plan
    digests : uint64 array, shape (ingredients, tensors)
        Digests of the bytes of their tensors.

    Notes
    -----
    A digest tells an ingredient apart from any other by accident, not against an attacker: that of a tensor's bytes is
    64 bits of a sum that runs at the speed of memory (see ``streamsoup.kernels.hashing``).
    """
    by_name = sorted(range(len(plan.table)), key=lambda i: plan.table.names[i])
    described: dict[bytes, Any] = {}  # mostly all ingredients have the same dtypes: that takes longer than their bytes
    found = []
    for i in range(len(plan.checkpoints)):
        key = plan.in_dtypes[:, i].tobytes()
        if key not in described:
            described[key] = _description(plan.table, plan.in_dtypes[:, i], by_name)
        digest = described[key].copy()
        digest.update(digests[i, by_name].astype("<u8").tobytes())
        found.append(digest.hexdigest())
    return found


def _description(table: TensorTable, dtypes: npt.NDArray[np.uint8], by_name: Sequence[int]) -> Any:
    digest = hashlib.blake2b(digest_size=16)
    for i in by_name:
        digest.update(f"{table.names[i]}\0{DTYPES[int(dtypes[i])].name}{table.shape(i)}\0".encode())
    return digest


_SUMS = {"float64": "float64 (double-double for float64 tensors)", "float32": "float32, as asked for,"}


def build_manifest(
    plan: Plan,
    recipe: Recipe,
    identities: Sequence[Sequence[Mapping[str, Any]]],
    digests: Sequence[str],
    *,
    device: str,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Gather what is known of a soup as plain data.

    Parameters
    ----------
    plan : Plan
    recipe : Recipe
    identities : one list of shard identities for each ingredient
    digests : sequence of str
        Content digests of the ingredients.
    device : str
    notes : sequence of str
        What a reader should know, such as non-finite values that were let through.
    """
    read = [
        {"path": path, "content_digest": digests[i], "shards": list(identities[i])}
        for i, path in enumerate(recipe.checkpoints)
    ]
    first = 0 if recipe.base is None else 1
    ingredients = [
        {"path": entry["path"], "weight": ingredient.weight, **entry}
        for ingredient, entry in zip(recipe.ingredients, read[first:], strict=False)
    ]
    beside: dict[str, Any] = {} if recipe.base is None else {"base": read[0]}
    if importances := read[first + len(ingredients) :]:
        beside["importances"] = importances
    return {
        "streamsoup_manifest": MANIFEST_FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "method": recipe.label,
        "normalize": recipe.normalize,
        "buffers": recipe.buffers,
        "accumulate": recipe.accumulate,
        **({} if recipe.quantize is None else {"quantize": recipe.quantize}),
        "tensors": len(plan.table),
        "parameters": plan.parameters,
        "ingredients": ingredients,
        **beside,
        **({"left_out": [left.to_json() for left in plan.left_out]} if plan.left_out else {}),
        "shards": [{"name": s.name, "size_bytes": s.file_bytes} for s in plan.layout.shards],
        "notes": list(notes),
        "device": device,
        "versions": {"streamsoup": __version__, "python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("numpy", "numba", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def manifest_to_json(manifest: Mapping[str, Any]) -> str:
    """Write a manifest for a file."""
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def model_card(plan: Plan, recipe: Recipe, manifest: Mapping[str, Any]) -> str:
    """Write the README.md of a soup folder."""
    total = sum(i.weight for i in recipe.ingredients) if recipe.normalize and recipe.method == "linear" else 0.0
    rows = "\n".join(
        f"| {i + 1} | `{short_path(ingredient.path)}` | {ingredient.weight:g} | "
        f"{ingredient.weight / total if total else ingredient.weight:.4g} | "
        f"`{entry['content_digest']}` |"
        for i, (ingredient, entry) in enumerate(zip(recipe.ingredients, manifest["ingredients"], strict=True))
    )
    how = {
        "uniform": "the uniform average",
        "weighted": "the weighted average",
        "coefficients": "a linear combination (coefficients applied as given)",
    }.get(recipe.label, f"a merge (method {recipe.label})")
    if recipe.base is not None:
        how += f", with `{short_path(recipe.base)}` as the base,"
    dtypes = ", ".join(sorted({plan.out_dtype(t).name for t in range(len(plan.table)) if plan.is_averaged(t)}))
    notes = "".join(f"\n- {note}" for note in manifest["notes"])
    rules = "".join(f"- {rule} ({count:,} tensors)\n" for rule, count in plan.touched)
    rules = f"{rules}\n" if rules else ""
    how_exact = (
        f"Sums were accumulated in {_SUMS[plan.accumulate]} in this order and rounded once."
        if plan.method.fixed
        else "All was computed in float64 and rounded once."
    )
    return f"""---
tags:
- model-soup
- merge
- streamsoup
---

# Model soup

This checkpoint is {how} of the weights of {len(recipe.ingredients)} fine-tuned checkpoints of one network
([model soup](https://arxiv.org/abs/2203.05482)), made with streamsoup {__version__}.

| | |
|---|---|
| parameters | {format_count(plan.parameters)} |
| tensors | {len(plan.table)} |
| dtype | {dtypes or "-"} |
| size | {format_bytes(plan.bytes_to_write)} in {len(plan.layout.shards)} file(s) |

## Recipe

| # | ingredient | weight | share | content digest |
|---|---|---|---|---|
{rows}

{rules}{how_exact}
`{RECIPE_NAME}` makes the same soup again, bit for bit: `streamsoup soup --recipe {RECIPE_NAME} -o again/`.
`{MANIFEST_NAME}` records who the ingredients were.
{notes}"""
