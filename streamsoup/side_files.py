"""The files that make a folder of weights a soup: manifest, recipe, model card, index, configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamsoup.checkpoints.hub import real
from streamsoup.companions import copy_card, copy_companions
from streamsoup.files import write_durably
from streamsoup.manifest import MANIFEST_NAME, RECIPE_NAME, build_manifest, manifest_to_json, model_card
from streamsoup.plan import Plan
from streamsoup.recipe import Recipe, recipe_to_yaml, with_paths
from streamsoup.workspace import Workspace

INDEX_NAME = "model.safetensors.index.json"


def write_side_files(
    workspace: Workspace,
    plan: Plan,
    recipe: Recipe,
    *,
    identities: Sequence[Sequence[Mapping[str, Any]]],
    digests: Sequence[str],
    device: str,
    notes: Sequence[str],
    job_id: str,
    owner: str | None = None,
) -> None:
    """Write all but the weights into a workspace.

    Parameters
    ----------
    workspace : Workspace
    plan : Plan
        Of the soup from its ingredients.
    recipe : Recipe
    identities, digests
        One for each ingredient.
    device : str
    notes : sequence of str
        What a reader should know.
    job_id : str
        Tells this soup from one that stood in its place before.
    owner : str, optional
        See `Extras`.
    """
    destination, folder = workspace.destination, workspace.soup
    manifest = {**build_manifest(plan, recipe, identities, digests, device=device, notes=notes), "id": job_id}
    if owner is not None:
        manifest["owner"] = owner
    resolved = with_paths(recipe, real)
    write_durably(workspace.beside(MANIFEST_NAME), manifest_to_json(manifest))
    write_durably(workspace.beside(RECIPE_NAME), recipe_to_yaml(resolved))
    if destination.is_file:
        return
    if recipe.method == "convert":
        copy_card(plan.checkpoints[0], folder)  # it is the same network still, and no soup
    else:
        write_durably(folder / "README.md", model_card(plan, recipe, manifest))
    if plan.layout.index is not None:
        write_durably(folder / INDEX_NAME, plan.layout.index)
    copy_companions(plan.checkpoints[0], folder, dtype=recipe.dtype)
