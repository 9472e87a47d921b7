"""A soup that was not made of a recipe, put into its place all the same: whole, durable, and saying what it is."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import Checkpoint
from streamsoup.companions import copy_companions
from streamsoup.files import existing_parent, require_space, write_durably
from streamsoup.layout import lay_out
from streamsoup.manifest import MANIFEST_NAME, RECIPE_NAME, build_manifest, manifest_to_json
from streamsoup.plan import Plan
from streamsoup.recipe import Recipe, recipe_to_yaml, with_absolute_paths
from streamsoup.side_files import INDEX_NAME
from streamsoup.workspace import Workspace, check_destination, destination_of
from streamsoup.write import FileSink, Sink

_SIDE_FILES_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Origin:
    """What a soup was made of.

    Attributes
    ----------
    recipe : Recipe
    identities : one list of shard identities for each ingredient
    digests : sequence of str
        Content digests of the ingredients.
    notes : tuple of str
    is_repeatable : bool
        Whether `streamsoup soup` makes the same bits of the recipe, which is then written beside the weights.
    method : str or None
        Instead of the recipe's.
    """

    recipe: Recipe
    identities: Sequence[Sequence[Mapping[str, Any]]]
    digests: Sequence[str]
    notes: tuple[str, ...]
    is_repeatable: bool
    method: str | None = None


def save_soup(
    out: str | Path,
    plan: Plan,
    ingredients: Sequence[Checkpoint],
    fill: Callable[[Sink], Origin],
    *,
    device: str,
    dtype: str | None,
    overwrite: bool,
) -> Path:
    """Write a soup, and publish it once it is whole; after a failure nothing of it is left.

    Parameters
    ----------
    out : path
        A new folder, or a ``.safetensors`` file.
    plan : Plan
        Of making it.
    ingredients : sequence of Checkpoint
        What must not be overwritten; configuration files are copied from the first.
    fill : callable taking a Sink
        Makes the soup.
    device : str
    dtype : str or None
        Of the output, where it was asked for.
    overwrite : bool
        Replace a soup that stands there.

    Returns
    -------
    Path

    Raises
    ------
    DestinationError, DiskSpaceError, ResumeError
    """
    destination = destination_of(out)
    check_destination(destination, ingredients, overwrite=overwrite)
    if destination.is_file:
        metadata = {**ingredients[0].metadata, "format": "pt"}
        name = destination.path.name
        plan = replace(
            plan, layout=lay_out(plan.table, plan.out_dtypes, shard_bytes=0, metadata=metadata, file_name=name)
        )
    workspace = Workspace(destination)
    require_space(existing_parent(workspace.folder), plan.layout.file_bytes + _SIDE_FILES_BYTES)
    workspace.create()
    try:
        with FileSink(workspace.soup, plan.layout) as sink:
            origin = fill(sink)
        _write_side_files(workspace, plan, ingredients[0], origin, device=device, dtype=dtype)
        workspace.publish(overwrite=overwrite)
    except BaseException:
        workspace.remove()
        raise
    finally:
        workspace.release()
    return destination.path


def _write_side_files(
    workspace: Workspace, plan: Plan, first: Checkpoint, origin: Origin, *, device: str, dtype: str | None
) -> None:
    manifest = build_manifest(plan, origin.recipe, origin.identities, origin.digests, device=device, notes=origin.notes)
    manifest |= {"id": uuid.uuid4().hex} | ({} if origin.method is None else {"method": origin.method})
    write_durably(workspace.beside(MANIFEST_NAME), manifest_to_json(manifest))
    if origin.is_repeatable:
        write_durably(workspace.beside(RECIPE_NAME), recipe_to_yaml(with_absolute_paths(origin.recipe)))
    if workspace.destination.is_file:
        return
    if plan.layout.index is not None:
        write_durably(workspace.soup / INDEX_NAME, plan.layout.index)
    copy_companions(first, workspace.soup, dtype=dtype)
