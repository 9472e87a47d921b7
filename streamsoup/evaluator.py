"""Scores candidates, and ingredients where they lie; each once, each written down at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamsoup.candidate import Candidate
from streamsoup.checkpoints import identity_key
from streamsoup.errors import RecipeError, ScoreError
from streamsoup.greedy_job import GreedyJob
from streamsoup.score import read_scores, run_command
from streamsoup.scorebook import Entry, ScoreBook
from streamsoup.sums import RunningSoup


class Evaluator:
    """Asks for scores and remembers them.

    Parameters
    ----------
    job : GreedyJob
    running : RunningSoup
        Counts what is read.
    identities : mapping of path to shard identities
    folder : Path or None
        Where scores and candidates are kept.
    score, before_score : callable taking a Candidate, or None
        Instead of the job's commands.

    Attributes
    ----------
    book : ScoreBook
    evaluations : int
        How often the evaluator was called.
    written : Candidate or None
        The candidate whose files lie on disk.

    Raises
    ------
    RecipeError
        If there is nothing to score with.
    """

    def __init__(
        self,
        job: GreedyJob,
        running: RunningSoup,
        identities: Mapping[str, Sequence[Mapping[str, Any]]],
        folder: Path | None,
        score: Callable[[Candidate], Any] | None,
        before_score: Callable[[Candidate], Any] | None,
    ) -> None:
        found = score or job.command_score()
        if found is None:
            raise RecipeError("A greedy soup needs a score: a callable, or a command with --score.")
        self.evaluations = 0
        self.written: Candidate | None = None
        self._job = job
        self._running = running
        self._folder = folder
        self._score = found
        self._before_score = before_score
        # The place in the job too: identities sample, and two ingredients may differ elsewhere only.
        keys = {path: f"{identity_key(identities[path])}-{i}" for i, path in enumerate(job.ingredients)}
        asked = [job.score_command, job.before_command, job.metric] if job.score_command is not None else []
        self.book = ScoreBook(
            None if folder is None else folder / "scores.jsonl", keys, evaluator=json.dumps(asked) if asked else ""
        )
        running.content_digests |= self.book.content_digests

    @property
    def changed_by(self) -> str | None:
        """What changes candidates before they are scored, in words."""
        if self._job.before_command is not None:
            return self._job.before_command
        return None if self._before_score is None else "a callable given as before_score"

    @property
    def changes_candidates(self) -> bool:
        """Whether something may have changed a candidate's files, so that they are no soup to keep."""
        return self._before_score is not None or self._job.before_command is not None

    def alone(self, path: str) -> Entry:
        """Score an ingredient where it lies, uncopied."""
        candidate = self._running.alone(path)
        candidate.path = Path(path)
        reads = dict(self._running.reads)
        entry = self._entry(candidate, began=time.perf_counter(), prepare=False)
        self._running.reads = reads  # counted are reads beyond an ingredient's own scoring
        return entry

    def candidate(self, candidate: Candidate, *, began: float) -> Entry:
        """Score a candidate; `began` is when its making did."""
        return self._entry(candidate, began=began, prepare=True)

    def _entry(self, candidate: Candidate, *, began: float, prepare: bool) -> Entry:
        """Evaluate a candidate and write its score down."""
        if (found := self.book.find(candidate.members)) is not None:
            return found
        read = self._running.bytes_read
        if prepare:
            self._prepare(candidate)
        try:
            scores = read_scores(self._score(candidate), self._job.metric, self._job.also)
        except ScoreError as error:
            names = ", ".join(member.path for member in candidate.members)
            error.add_note(f"While scoring {names}. Mend the score command or leave the checkpoint out.")
            raise
        self.evaluations += 1
        entry = Entry(scores, time.perf_counter() - began, self._running.bytes_read - read)
        self.book.enter(candidate.members, entry, self._running.content_digests)
        return entry

    def _prepare(self, candidate: Candidate) -> None:
        """Write a candidate where a command can read it, and run what is to be run before scoring."""
        if getattr(self._score, "needs_files", False) or self._job.before_command is not None:
            candidate.write(self.candidate_folder)
            self.written = candidate
        if self._before_score is not None:
            self._before_score(candidate)
        elif self._job.before_command is not None:
            assert candidate.path is not None
            self.run_before_command(candidate.path)

    def run_before_command(self, checkpoint: Path) -> None:
        """Run the job's command on a checkpoint, which it may change."""
        if self._job.before_command is not None:
            run_command(self._job.before_command, checkpoint, Path(os.devnull), self._job.timeout_seconds)

    @property
    def candidate_folder(self) -> Path:
        """Where candidates are written; of this job alone."""
        if self._job.candidates is not None:
            return Path(self._job.candidates) / f"candidate-{self._job.id}"
        if self._folder is None:
            raise RecipeError("A score that reads files needs a work folder. Give workdir=.")
        return self._folder / "candidate"
