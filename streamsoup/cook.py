"""The main job as one call: find the ingredients, plan, run, publish."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamsoup.backends import open_backend
from streamsoup.checkpoints import (
    expand_paths,
    expect_identity,
    given_paths,
    identify,
    identity_to_json,
)
from streamsoup.errors import ChangedIngredientError, DestinationError, RankError, ResumeError
from streamsoup.execution import Execution, SoupResult
from streamsoup.files import boot_id, existing_parent, require_space
from streamsoup.making import NO_EXTRAS, Extras, Making, keep_or_remove
from streamsoup.outcome import Progress
from streamsoup.plan import Plan
from streamsoup.ranks import Ranks, join_ranks, keep_first
from streamsoup.recipe import (
    Recipe,
    make_recipe,
    recipe_from_mapping,
    recipe_to_mapping,
    with_absolute_paths,
    with_pinned_ids,
)
from streamsoup.soup_plan import plan_together
from streamsoup.units import parse_bytes
from streamsoup.workspace import Workspace, destination_of

_SIDE_FILES_BYTES = 16_000_000  # room for configuration, tokenizer, manifest and journal


def soup(
    ingredients: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    method: str = "linear",
    base: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    importances: Sequence[str | Path] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    key: str | None = None,
    strip_prefix: str | Sequence[str] = (),
    rename: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    only_shared: bool = False,
    dtype: str | None = None,
    quantize: str | None = None,
    shard_size: int | str = "5GB",
    buffers: str = "identical",
    nonfinite: str = "error",
    accumulate: str = "float64",
    budget_bytes: int | str | None = None,
    device: str = "cpu",
    device_budget_bytes: int | str | None = None,
    workers: int | None = None,
    read_mode: str = "auto",
    overwrite: bool = False,
    keep: bool = True,
    restart: bool = False,
    durable: bool = True,
    distributed: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> SoupResult:
    """Average checkpoints into one, tile by tile, under a byte budget.

    Parameters
    ----------
    ingredients : path, pattern, or sequence of paths and patterns
        ``.safetensors`` files or folders of them, any sharding, any mix of float dtypes, files of `torch.save` and
        `torch.distributed.checkpoint`, and ids of the Hugging Face Hub, ``org/name`` or ``org/name@revision``. The
        first gives the names, their order, the configuration files and, unless `dtype` is given, the output dtypes.
    out : path
        A new folder, or a ``.safetensors`` file.
    weights : sequence of float, optional
        One for each ingredient, divided by their sum; by default all are equal.
    coefficients : sequence of float, optional
        Applied as given, instead of weights.
    method : str
        How to combine them: ``linear`` (uniform or weighted), ``slerp``, ``model_stock``, ``ties`` ...; see
        docs/methods.md.
    base : path, optional
        What they were fine-tuned from, where the method wants it. It then stands in the first one's place: it gives
        names, dtypes and configuration files.
    parameters : mapping, optional
        Of the method, such as ``{"density": 0.3}``; by name pattern, and by layer, as in
        `streamsoup.methods.parameters`.
    importances : sequence of path, optional
        One for each ingredient, for the method ``fisher``.
    include, exclude : sequence of str
        Shell patterns of tensor names; the others are taken from the first checkpoint as they are.
    key : str, optional
        Which entry of nested files of torch holds the tensors.
    strip_prefix : str or sequence of str
        Taken off the beginning of tensor names that have it, such as ``"module."``.
    rename : mapping of str to str, or pairs
        Regular expressions, and what their matches in tensor names become, as in `re.sub`; in order, after
        `strip_prefix`.
    only_shared : bool
        Soup the tensors that all ingredients have with one shape. The soup has only these; `SoupResult.notes` and the
        manifest list all others.
    dtype : str, optional
        Float dtype of the output, such as ``bfloat16``.
    quantize : {"fp8-block"}, optional
        Of one ingredient, which is a soup already: write its linear weights as 8-bit floats with a scale for each block
        of 128 × 128; `dtype` is that of the other tensors. See docs/ingredients.md.
    shard_size : int or str
        Largest output shard.
    buffers : {"identical", "first"}
        Refuse non-float tensors that differ, or take the first ingredient's.
    nonfinite : {"error", "warn", "allow"}
        What to do about NaN or infinity.
    accumulate : {"float64", "float32"}
        In what sums are kept; see `Recipe`.
    budget_bytes : int or str, optional
        What the engine may own, such as ``"512MiB"``; by default a quarter of what is free, at most 2 GiB.
    device, device_budget_bytes, workers, read_mode, overwrite, keep, restart, durable, distributed, progress
        See `Execution`.

    Returns
    -------
    SoupResult

    Raises
    ------
    StreamsoupError
        See `streamsoup.errors`.

    Notes
    -----
    Memory: at most `budget_bytes`, for any number and size of ingredients. Each byte of them is read once; of methods
    that look at the numbers first, see docs/methods.md

    Source: Wortsman et al. 2022, arXiv 2203.05482.
    """
    given = given_paths(ingredients)
    paths = expand_paths(given) if weights is None and coefficients is None else given
    recipe = make_recipe(
        paths,
        weights=weights,
        coefficients=coefficients,
        method=method,
        base=None if base is None else str(base),
        parameters=dict(parameters or {}),
        importances=importances,
        include=tuple(include),
        exclude=tuple(exclude),
        key=key,
        strip_prefix=strip_prefix,
        rename=rename,
        only_shared=only_shared,
        dtype=dtype,
        quantize=quantize,
        shard_bytes=parse_bytes(shard_size),
        buffers=buffers,
        nonfinite=nonfinite,
        accumulate=accumulate,
    )
    execution = Execution(
        budget_bytes=None if budget_bytes is None else parse_bytes(budget_bytes),
        device=device,
        device_budget_bytes=None if device_budget_bytes is None else parse_bytes(device_budget_bytes),
        workers=workers,
        read_mode=read_mode,
        overwrite=overwrite,
        keep=keep,
        restart=restart,
        durable=durable,
        distributed=distributed,
        progress=progress,
    )
    return cook(recipe, out, execution)


def cook(recipe: Recipe, out: str | Path, execution: Execution, extras: Extras = NO_EXTRAS) -> SoupResult:
    """Make the soup of a recipe. See `soup` for what it promises.

    Parameters
    ----------
    recipe : Recipe
    out : path
    execution : Execution
    extras : Extras
        For those who chose the recipe by looking at the ingredients.

    Raises
    ------
    StreamsoupError
    """
    began = time.perf_counter()
    with join_ranks(execution.distributed) as ranks:
        return ranks.telling(lambda: _cook(ranks, recipe, out, execution, extras, began))


def _cook(
    ranks: Ranks, recipe: Recipe, out: str | Path, execution: Execution, extras: Extras, began: float
) -> SoupResult:
    if ranks.count > 1:
        recipe, out = ranks.first(lambda: (with_absolute_paths(recipe), destination_of(out).path))
    recipe = with_pinned_ids(recipe)
    workspace = Workspace(destination_of(out))
    backend = open_backend(ranks.device(execution.device), execution.device_budget_bytes)
    plan, execution = plan_together(ranks, recipe, out, execution)
    ranks.fold(lambda: len(backend.shares(plan.tiling, plan.needs)), keep_first)  # is there room, on every rank?

    def begin() -> dict[str, Any]:
        if execution.restart:
            workspace.remove()
        require_space(existing_parent(workspace.folder), plan.bytes_to_write + _SIDE_FILES_BYTES)
        workspace.refuse_unfinished()
        job = {
            "id": uuid.uuid4().hex,
            "recipe": recipe_to_mapping(with_absolute_paths(recipe)),
            "fingerprint": plan.fingerprint,
            "overwrite": execution.overwrite,
            "boot": None if execution.durable else boot_id() if ranks.count == ranks.local_count else "several",
            "identities": [identity_to_json(identify(c)) for c in plan.checkpoints],
            "extras": extras.to_json(),
        }
        workspace.create()
        return job

    try:
        job = ranks.first(begin)
    except RankError:  # another one failed meanwhile
        if workspace.is_ours:
            workspace.remove()
        raise
    with _kept_by_first(ranks, workspace, execution):
        ranks.first(lambda: workspace.write_job(job))
        if not ranks.is_first:
            _expect_same(workspace, plan, job)
        return Making(plan, execution.read_mode, recipe, workspace, job, backend, execution, began, extras, ranks).run()


def _kept_by_first(ranks: Ranks, workspace: Workspace, execution: Execution) -> contextlib.AbstractContextManager[None]:
    return keep_or_remove(workspace, keep=execution.keep) if ranks.is_first else contextlib.nullcontext()


def _expect_same(workspace: Workspace, plan: Plan, job: Mapping[str, Any]) -> None:
    """Check that a rank sees the first one's work, and the same ingredients."""
    if not workspace.shows(job["id"]):
        raise DestinationError(
            f"{workspace.folder}: is not what rank 0 has there. The soup must go to a file system that all ranks share."
        )
    for checkpoint, identity in zip(plan.checkpoints, job["identities"], strict=True):
        expect_identity(checkpoint, identity, what="the work began")


def resume(out: str | Path, execution: Execution | None = None, *, nonfinite: str | None = None) -> SoupResult:
    """Go on with a soup whose making was interrupted; the result has the same bits.

    Parameters
    ----------
    out : path
        The destination of the interrupted run.
    execution : Execution, optional
        May differ from the interrupted run's in everything; but what is resumed is always durable.
    nonfinite : {"error", "warn", "allow"}, optional
        Instead of the recipe's, after a run that stopped for NaN or infinity.

    Raises
    ------
    ResumeError
        If there is nothing to resume.
    ChangedIngredientError
        If an ingredient is no longer what it was.
    """
    began = time.perf_counter()
    execution = execution or Execution()
    with join_ranks(execution.distributed) as ranks, Workspace(destination_of(out)) as workspace:
        return ranks.telling(lambda: _resume(ranks, workspace, execution, nonfinite, began))


def _resume(
    ranks: Ranks, workspace: Workspace, execution: Execution, nonfinite: str | None, began: float
) -> SoupResult:
    def take_up() -> tuple[dict[str, Any], SoupResult | None]:
        workspace.hold()
        job = workspace.read_job()
        if job["boot"] not in (None, boot_id()):
            raise ResumeError(
                f"{workspace.folder}: was begun without waiting for the disk (--no-sync), and the machine has "
                "restarted since: its work may be damaged. Begin anew with --restart."
            )
        published = workspace.is_published(job["id"])
        return job, _published_result(workspace, execution, began) if published else None

    job, published = ranks.first(take_up)
    if published is not None:
        return published
    recipe = recipe_from_mapping(job["recipe"], where=str(workspace.folder))
    if nonfinite is not None:
        recipe = replace(recipe, nonfinite=nonfinite)
    backend = open_backend(ranks.device(execution.device), execution.device_budget_bytes)
    execution = replace(execution, overwrite=execution.overwrite or job["overwrite"], durable=True)
    plan, execution = plan_together(ranks, recipe, workspace.destination.path, execution, resuming=True)
    if plan.fingerprint != job["fingerprint"]:
        raise ChangedIngredientError(
            f"{workspace.folder}: was begun with ingredients of other names or shapes. Put the old files back, or "
            "begin anew with --restart."
        )
    _expect_same(workspace, plan, job)
    with _kept_by_first(ranks, workspace, execution):
        extras = Extras.from_json(job["extras"])
        return Making(plan, execution.read_mode, recipe, workspace, job, backend, execution, began, extras, ranks).run()


def _published_result(workspace: Workspace, execution: Execution, began: float) -> SoupResult:
    """Say what a soup is whose maker died after it took its place; ingredients are not needed for that."""
    manifest = workspace.read_manifest()
    workspace.remove()
    return SoupResult(
        path=workspace.destination.path,
        ingredients=len(manifest["ingredients"]),
        tensors=manifest["tensors"],
        parameters=manifest["parameters"],
        bytes_read=0,
        bytes_written=0,
        seconds=time.perf_counter() - began,
        engine_seconds=0.0,
        projected_peak_bytes=0,
        measured_peak_bytes=0,
        metadata_bytes=0,
        read_mode=execution.read_mode,
        device=manifest["device"],
        workers=0,
        stage_seconds=dict.fromkeys(("read", "reduce", "write", "sync"), 0.0),
        limited_by="sync",
        content_digests=tuple(i["content_digest"] for i in manifest["ingredients"]),
        notes=tuple(manifest["notes"]),
    )
