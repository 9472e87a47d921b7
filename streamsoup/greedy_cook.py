"""Greedy soups as one call, and as one call to go on after a crash."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from streamsoup.candidate import Candidate
from streamsoup.checkpoints import expand_paths, expect_identity, given_paths, identify, identity_to_json
from streamsoup.errors import DestinationError, ResumeError
from streamsoup.evaluator import check_jobs
from streamsoup.files import lock_folder, require_space_at, writing_to
from streamsoup.forecast import Forecast, sum_on_disk
from streamsoup.greedy_job import (
    JOB_NAME,
    GreedyJob,
    GreedyResult,
    TrialRecord,
    candidate_folders,
    read_job,
    write_job,
)
from streamsoup.greedy_loop import GreedyLoop
from streamsoup.greedy_options import change_job, make_job
from streamsoup.pool import Pool
from streamsoup.workspace import Workspace, check_destination, destination_of


def greedy(
    ingredients: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    score: Callable[[Candidate], Any] | str,
    workdir: str | Path | None = None,
    before_score: Callable[[Candidate], Any] | str | None = None,
    on_trial: Callable[[TrialRecord], None] | None = None,
    on_score: Callable[[str, float], None] | None = None,
    progress: Callable[[Any], None] | None = None,
    **options: Any,
) -> GreedyResult:
    """Make a greedy soup: sort ingredients by held-out score, and keep each one that does not lower the soup's.

    Parameters
    ----------
    ingredients : sequence of paths
        As in `streamsoup.soup`.
    out : path, optional
        A new folder for the soup; None: only decide.
    score : callable taking a Candidate, or str
        Returns the held-out score: a number, or a mapping with the key `metric`. ``candidate.load_into(module)``
        streams the candidate straight into a live torch module. A string is a command (see `CommandScore`).
    workdir : path, optional
        Keeps scores and sums, so that `streamsoup.resume_greedy` can go on after a crash.
    before_score : callable taking a Candidate, or str, optional
        Run on each candidate first: the place for re-estimating BatchNorm statistics.
    on_trial : callable taking a TrialRecord, optional
        Called after each decision.
    on_score : callable taking a path and a score, optional
        Called after each ingredient was scored alone.
    progress : callable taking a Progress, optional
    **options
        Those of `Rule` (``accept``, ``tolerance``, ``minimize``, ``order``, ``seed``, ``max_ingredients``, ``prune``,
        ``rounds``, ``restarts``), of `PoolOptions` (``dtype``, ``sums_dtype``, ``budget_bytes``, ``device``, ``rename``
        ...), and of `GreedyJob` (``own_scores``, ``metric``, ``also``, ``timeout_seconds``, ``candidates``,
        ``overwrite``, ``jobs``).

    Returns
    -------
    GreedyResult

    Raises
    ------
    StreamsoupError
        What was decided so far is kept in `workdir`.

    Notes
    -----
    A trial reads the ingredient and the running sum once. Memory: the budget, and whatever the evaluator takes.

    With ``jobs=k`` the next k candidates are scored at once, as if none before them were kept; the first one that is
    kept decides, and what was behind it is thrown away. Decisions, recipe and bits are those of ``jobs=1``. A command
    finds 0 to k - 1 in ``STREAMSOUP_JOB`` and may choose its device by it. A callable is refused unless its attributes
    ``at_once`` and ``needs_files`` are True: it is then called by several threads, with ``members``, ``path`` and
    ``job`` instead of a Candidate. `GreedyResult.at_once` says what it came to.

    Source: Wortsman et al. 2022, arXiv 2203.05482, Recipe 1.
    """
    job = make_job(
        expand_paths(given_paths(ingredients)),
        None if out is None else str(out),
        score_command=score if isinstance(score, str) else None,
        before_command=before_score if isinstance(before_score, str) else None,
        options=options,
    )
    return cook_greedy(
        job,
        score=None if isinstance(score, str) else score,
        before_score=None if isinstance(before_score, str) else before_score,
        workdir=workdir,
        on_trial=on_trial,
        on_score=on_score,
        progress=progress,
    )


def cook_greedy(
    job: GreedyJob,
    *,
    score: Callable[[Candidate], Any] | None = None,
    before_score: Callable[[Candidate], Any] | None = None,
    workdir: str | Path | None = None,
    on_trial: Callable[[TrialRecord], None] | None = None,
    on_score: Callable[[str, float], None] | None = None,
    progress: Callable[[Any], None] | None = None,
) -> GreedyResult:
    """Make the greedy soup of a job. See `streamsoup.greedy` for what it promises.

    Parameters
    ----------
    job : GreedyJob
    score : callable taking a Candidate, optional
        Instead of the job's command.
    before_score : callable taking a Candidate, optional
        Instead of the job's command.
    workdir : path, optional
        Keeps scores and sums, so that the work can be resumed. None: nothing is kept on disk.
    on_trial : callable taking a TrialRecord, optional
    on_score : callable taking a path and a score, optional
    progress : callable taking a `Progress`, optional

    Raises
    ------
    StreamsoupError
    """
    folder = None if workdir is None else Path(workdir)
    check_jobs(job, score, before_score)
    pool = Pool(job.ingredients, job.pool, progress)
    if job.out is not None and destination_of(job.out).is_file:
        raise DestinationError(f"{job.out}: a greedy soup is a folder. Name one, or soup its recipe into a file.")
    if job.out is not None:
        check_destination(destination_of(job.out), list(pool.checkpoints.values()), overwrite=job.overwrite)
        Workspace(destination_of(job.out)).refuse_unfinished()
    with _locked(folder, make=True):
        if folder is not None:
            if (folder / JOB_NAME).exists():
                raise ResumeError(
                    f"{folder}: holds a greedy soup already. Go on with `streamsoup greedy --resume {folder}`, or "
                    "choose another work folder."
                )
            forecast = Forecast.of(pool, on_disk=sum_on_disk(pool, folder), jobs=job.jobs)
            candidates_bytes = forecast.candidates * forecast.candidate_bytes
            needs = [(folder, forecast.sums_bytes), (Path(job.candidates or folder), candidates_bytes)]
            require_space_at([*needs, (Path(job.out), forecast.output_bytes)] if job.out else needs)
        identities = {path: identity_to_json(identify(c)) for path, c in pool.checkpoints.items()}
        if folder is not None:
            write_job(folder, job, identities)
        return GreedyLoop(job, pool, identities, folder, score, before_score, on_trial, on_score).run()


def resume_greedy(
    workdir: str | Path,
    *,
    score: Callable[[Candidate], Any] | None = None,
    before_score: Callable[[Candidate], Any] | None = None,
    on_trial: Callable[[TrialRecord], None] | None = None,
    on_score: Callable[[str, float], None] | None = None,
    progress: Callable[[Any], None] | None = None,
    **changes: Any,
) -> GreedyResult:
    """Go on with a greedy soup whose making was interrupted: the same decisions and the same bits.

    Parameters
    ----------
    workdir : path
    score, before_score, on_trial, on_score, progress
        As in `cook_greedy`; callables must be given again.
    **changes
        Options that decide nothing may differ from the interrupted run's: ``budget_bytes``, ``device``,
        ``device_budget_bytes``, ``workers``, ``read_mode``, ``nonfinite``, ``timeout_seconds``, ``candidates``,
        ``overwrite``, ``jobs``.

    Raises
    ------
    RecipeError
        If another option is to be changed.
    ResumeError
        If there is nothing to resume.
    ChangedIngredientError
        If an ingredient is no longer what it was.
    """
    folder = Path(workdir)
    read_job(folder)  # is there one?
    with _locked(folder):
        job, identities = read_job(folder)
        job = change_job(job, changes)
        check_jobs(job, score, before_score)
        pool = Pool(job.ingredients, job.pool, progress)
        for path, checkpoint in pool.checkpoints.items():
            expect_identity(checkpoint, identities[path], what="the greedy soup began")
        if job.jobs > 1:
            first = job.candidate_folder(folder)
            more = job.jobs - len([n for n, path in candidate_folders(first).items() if n < job.jobs and path.exists()])
            require_space_at([(first.parent, more * pool.layout.file_bytes)])
        return GreedyLoop(job, pool, identities, folder, score, before_score, on_trial, on_score).run()


@contextlib.contextmanager
def _locked(folder: Path | None, *, make: bool = False) -> Iterator[None]:
    """Have a work folder for this process alone, and leave none that was made for nothing."""
    if folder is None:
        yield
        return
    if make:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
    fd = lock_folder(folder)
    try:
        yield
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty
