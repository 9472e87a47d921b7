"""Turns the decision of a greedy run into a soup on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamsoup.candidate import Candidate
from streamsoup.checkpoints import verify_unchanged
from streamsoup.files import write_durably
from streamsoup.greedy_job import GreedyJob, GreedyResult
from streamsoup.methods import Coefficients
from streamsoup.recipe import Ingredient, Recipe
from streamsoup.side_files import write_side_files
from streamsoup.sums import Member, RunningSoup, merge
from streamsoup.workspace import Workspace, destination_of
from streamsoup.write import FileSink


def publish_soup(
    job: GreedyJob,
    running: RunningSoup,
    result: GreedyResult,
    *,
    identities: Mapping[str, Sequence[Mapping[str, Any]]],
    written: Candidate | None,
    before: Callable[[Path], None] | None,
    bring: Callable[[tuple[Member, ...]], None],
    changed_by: str | None,
) -> Path:
    """Write the soup of a result's members beside its destination, and put it there.

    Parameters
    ----------
    job, running, result
    identities : mapping of path to shard identities
    written : Candidate or None
        The soup as a candidate whose files may lie on disk untouched; they are moved then.
    before : callable taking a Path, optional
        Run on the finished files, as it was on each candidate.
    bring : callable taking members
        Makes the running sum that of these members.
    changed_by : str or None
        What changed candidates before they were scored.

    Returns
    -------
    Path
    """
    assert job.out is not None
    with Workspace(destination_of(job.out)) as workspace:
        workspace.create()  # over what a crash while publishing left: the decision is not in it
        _write_weights(workspace, running, result.members, written, bring)
        notes = [*result.notes]
        if before is not None:
            before(workspace.soup)
            notes.append(f"Changed after averaging by: {job.before_command}")
        elif changed_by is not None:
            notes.append(f"Candidates were changed before they were scored by {changed_by}; this soup was not.")
        _describe(workspace, job, running, result.members, identities, notes)
        write_durably(workspace.soup / "decisions.json", json.dumps(result.to_json(), indent=1))
        workspace.publish(overwrite=job.overwrite)
        return workspace.destination.path


def _write_weights(
    workspace: Workspace,
    running: RunningSoup,
    members: tuple[Member, ...],
    written: Candidate | None,
    bring: Callable[[tuple[Member, ...]], None],
) -> None:
    moved = written is not None and _move(written, workspace)
    with FileSink(workspace.soup, running.pool.layout, existing=moved) as sink:
        if not moved:
            _exact(running, members, bring).stream(sink)
        sink.sync()
    for member in members:  # the sum may hold what a file no longer does
        verify_unchanged(running.pool.open(member.path))


def _describe(
    workspace: Workspace,
    job: GreedyJob,
    running: RunningSoup,
    members: tuple[Member, ...],
    identities: Mapping[str, Sequence[Mapping[str, Any]]],
    notes: Sequence[str],
) -> None:
    """Write recipe, manifest and model card beside the weights."""
    pool = running.pool
    opening = pool.opening_of([m.path for m in members])
    recipe = Recipe(
        tuple(Ingredient(m.path, m.weight) for m in members),
        dtype=job.pool.dtype,
        shard_bytes=job.pool.shard_bytes,
        buffers=job.pool.buffers,
        nonfinite=job.pool.nonfinite,
        **opening.to_options(),
    )
    checkpoints = [pool.open(m.path) for m in members]
    write_side_files(
        workspace,
        pool.plan(checkpoints, Coefficients(tuple(m.weight for m in members))),
        recipe,
        identities=[identities[m.path] for m in members],
        digests=[running.content_digests.get(m.path, "") for m in members],
        device=pool.backend.name,
        notes=notes,
        job_id=job.id,
    )


def _exact(running: RunningSoup, members: tuple[Member, ...], bring: Callable[[tuple[Member, ...]], None]) -> Candidate:
    """Find the cheapest way to the bits of the recipe's soup."""
    if running.members == members:
        return running.mean()
    if len(members) == 1:
        return running.candidate_of(members)
    if running.members != members and running.members:
        last = members[-1]
        if merge(running.members, last.path, last.weight) == members:
            candidate = running.candidate(last.path, last.weight)
            if candidate.is_exact:
                return candidate
    bring(members)
    return running.mean()


def _move(written: Candidate, workspace: Workspace) -> bool:
    """Move a candidate's shards into a workspace, where that is a rename."""
    if written.path is None or os.stat(written.path).st_dev != os.stat(workspace.folder).st_dev:
        return False
    files = written.untouched_files()
    for file in files:
        os.rename(file, workspace.soup / file.name)
    return bool(files)
