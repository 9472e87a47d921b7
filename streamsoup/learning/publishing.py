"""Where a learned soup goes, and how it gets there: once, and over nothing that is not its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streamsoup.cook import cook, resume
from streamsoup.errors import DestinationError, ResumeError
from streamsoup.execution import Execution
from streamsoup.files import require_space_at
from streamsoup.learning.job import LearnResult
from streamsoup.making import Extras
from streamsoup.manifest import LEARNED_NAME
from streamsoup.pool import Pool
from streamsoup.workspace import Workspace, check_destination, destination_of


@dataclass(frozen=True, slots=True)
class Publisher:
    """Sends a learned soup to its place.

    Attributes
    ----------
    out : Path
    overwrite : bool
        Replace a soup that exists.
    """

    out: Path
    overwrite: bool

    @property
    def path(self) -> Path:
        """Where the soup is to be."""
        return destination_of(self.out).path

    def check(self, pool: Pool, workdir: Path | None, job_id: str | None, *, restart: bool) -> None:
        """Refuse a place where the soup cannot go, before anything is learned.

        Parameters
        ----------
        pool : Pool
        workdir : Path or None
        job_id : str or None
            Of the work that is gone on with, which may have put its soup there already.
        restart : bool
            That work is thrown away, and with it what it left unfinished.

        Raises
        ------
        DestinationError, DiskSpaceError
        ResumeError
            If unfinished work of another run lies beside it.
        """
        workspace = self._workspace
        ours = job_id is not None and workspace.is_of(job_id)
        if workspace.exists and not ours and not workspace.is_leftover:
            raise ResumeError(
                f"{workspace.folder}: holds the unfinished work of another run. Go on with that by "
                f"`streamsoup soup --resume {self.path}`, remove it, or choose another place."
            )
        finished = job_id is not None and not restart and (ours or workspace.is_published_by(job_id))
        check_destination(
            workspace.destination,
            list(pool.checkpoints.values()),
            overwrite=self.overwrite or finished,
            beside=(LEARNED_NAME,),
        )
        _refuse_nested(self.path, workdir)
        require_space_at([(self.out, pool.layout.file_bytes)])
        if restart and ours:
            workspace.remove()

    def publish(self, result: LearnResult, job_id: str, digests: Sequence[str], pool: Pool) -> None:
        """Write the soup, go on writing it, or leave it where an earlier run of this very job has put it.

        Raises
        ------
        StreamsoupError
        """
        options, workspace = pool.options, self._workspace
        execution = Execution(
            budget_bytes=pool.budget_bytes,
            device=options.device,
            device_budget_bytes=options.device_budget_bytes,
            workers=options.workers,
            read_mode=options.read_mode,
            overwrite=self.overwrite,
            progress=pool.progress,
        )
        document = json.dumps({"id": job_id, **result.to_json()}, indent=1)
        if workspace.is_of(job_id):
            resume(self.out, execution)
        elif self.overwrite or not workspace.is_published_by(job_id):
            cook(result.recipe, self.out, execution, Extras({LEARNED_NAME: document}, tuple(digests), job_id))

    @property
    def _workspace(self) -> Workspace:
        return Workspace(destination_of(self.out))


def _refuse_nested(target: Path, folder: Path | None) -> None:
    if folder is None:
        return
    work = Path(os.path.realpath(folder))
    place = Path(os.path.realpath(target))
    if work == place or work in place.parents or place in work.parents:
        raise DestinationError(f"{target}: and the work folder {folder} lie in one another. Choose another place.")
