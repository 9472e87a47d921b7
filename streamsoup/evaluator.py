"""Scores candidates, and ingredients where they lie; each once, each written down at once."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsoup.candidate import Candidate, remove_candidate
from streamsoup.checkpoints import AS_THEY_ARE, StoredCheckpoint, identity_key
from streamsoup.errors import RecipeError, ScoreError
from streamsoup.greedy_job import GreedyJob, candidate_folders
from streamsoup.score import CommandScore, Place, Scores, read_scores, run_command
from streamsoup.scorebook import Entry, ScoreBook
from streamsoup.sums import Member, RunningSoup


@dataclass(frozen=True, slots=True)
class Wanted:
    """A soup whose score is wanted.

    Attributes
    ----------
    members : tuple of Member
    make : callable
        Returns the candidate; may change the running sum.
    way : str or None
        How it is made, as far as its bits depend on that; see `ScoreBook`. None: nobody makes it ahead of its turn.
    alone : bool
        It is an ingredient, scored as it is.
    in_place : bool
        It need not be written: it is scored where it lies.
    """

    members: tuple[Member, ...]
    make: Callable[[], Candidate]
    way: str | None = None
    alone: bool = False
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """What a callable that may be called at once is given: files alone, since only one at a time may read sums.

    Attributes
    ----------
    members : tuple of Member
    path : Path
        The checkpoint.
    job : int
        0 to ``jobs`` - 1: no two that are scored at once have the same.
    """

    members: tuple[Member, ...]
    path: Path
    job: int


def check_jobs(job: GreedyJob, score: Callable[..., Any] | None, before_score: Callable[..., Any] | None) -> None:
    """Refuse callables that cannot score several candidates at once, if a job has it so.

    Raises
    ------
    RecipeError
    """
    if job.jobs == 1:
        return
    if score is not None and not (getattr(score, "at_once", False) and getattr(score, "needs_files", False)):
        raise RecipeError(
            f"jobs: {job.jobs}, but a callable scores one candidate at a time unless its attributes at_once and "
            "needs_files are True. Set them if it may be called by several threads and reads files, or give a command."
        )
    if before_score is not None:
        raise RecipeError(f"jobs: {job.jobs}, but a callable runs before one score at a time. Give a command.")


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
    running : RunningSoup
    book : ScoreBook
    evaluations : int
        How often the evaluator was called by `score`.
    written : dict of int to Candidate
        Candidates whose files lie on disk, by the number of their place.

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
        self.written: dict[int, Candidate] = {}
        self._job = job
        self.running = running
        self._folder = folder
        self._score: Callable[[Any], Any] = found
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

    def alone(self, path: str) -> Wanted:
        """An ingredient: where it lies, if an evaluator finds there what a soup of it alone would be, else written."""
        place = self._place_of(path)

        def make() -> Candidate:
            candidate = self.running.alone(path)
            candidate.path = place
            return candidate

        return Wanted((Member(path, 1.0),), make, alone=True, in_place=place is not None)

    def _place_of(self, path: str) -> Path | None:
        """Where an ingredient lies as safetensors with the names and numbers that its soups have."""
        checkpoint, pool = self.running.pool.open(path), self.running.pool
        is_stored = type(checkpoint) is StoredCheckpoint and pool.options.opening == AS_THEY_ARE
        if not is_stored or not all(shard.path.endswith(".safetensors") for shard in checkpoint.shards):
            return None
        return Path(path) if os.path.exists(path) else checkpoint.folder or Path(checkpoint.shards[0].path)

    def score(self, wanted: Wanted) -> Entry:
        """Make and evaluate what is wanted, and write its score down; or find it."""
        if (found := self.book.find(wanted.members, wanted.way)) is not None:
            return found
        began, reads = time.perf_counter(), dict(self.running.reads)
        candidate = wanted.make()
        read = self.running.bytes_read
        self.write(candidate, wanted)
        scores = self.ask(candidate, wanted)
        if wanted.alone:
            self.running.reads = reads  # counted are reads beyond an ingredient's own scoring
        self.evaluations += 1
        entry = Entry(scores, time.perf_counter() - began, self.running.bytes_read - read)
        self.book.enter(wanted.members, entry, self.running.content_digests)
        return entry

    def write(self, candidate: Candidate, wanted: Wanted, place: int = 0) -> None:
        """Write a candidate where a command can read it, if one does."""
        reads_files = getattr(self._score, "needs_files", False) or self._job.before_command is not None
        if reads_files and not wanted.in_place:
            self.written.pop(place, None)
            candidate.write(self._job.candidate_folder(self._folder, place))
            self.written[place] = candidate

    def ask(self, candidate: Candidate, wanted: Wanted, place: Place | None = None) -> Scores:
        """Run what is to be run before scoring, and the evaluator; with a place: beside others, in any thread.

        Raises
        ------
        ScoreError
        """
        if not wanted.alone:
            if self._before_score is not None:
                self._before_score(candidate)
            elif self._job.before_command is not None:
                assert candidate.path is not None
                self.run_before_command(candidate.path, place)
        try:
            return read_scores(self._asked(candidate, place), self._job.metric, self._job.also)
        except ScoreError as error:
            names = ", ".join(member.path for member in candidate.members)
            error.add_note(f"While scoring {names}. Mend the score command or leave the checkpoint out.")
            raise

    def _asked(self, candidate: Candidate, place: Place | None) -> Any:
        if place is None:
            return self._score(candidate)
        assert candidate.path is not None
        if isinstance(self._score, CommandScore):
            return self._score.at(candidate.path, place)
        return self._score(Written(candidate.members, candidate.path, place.job))

    def run_before_command(self, checkpoint: Path, place: Place | None = None) -> None:
        """Run the job's command on a checkpoint, which it may change."""
        if self._job.before_command is not None:
            run_command(self._job.before_command, checkpoint, Path(os.devnull), self._job.timeout_seconds, place)

    def written_as(self, members: tuple[Member, ...]) -> Candidate | None:
        """Return a candidate whose untouched files are the soup of these members, if there is one on disk."""
        if self.changed_by is not None:
            return None
        return next((c for c in self.written.values() if c.is_exact and c.members == members), None)

    def remove_candidates(self, least: int = 0) -> None:
        """Remove the folders of candidates in places from a number on, whoever left them."""
        if self._job.candidates is None and self._folder is None:
            return
        for place, folder in candidate_folders(self._job.candidate_folder(self._folder)).items():
            if place >= least:
                with contextlib.suppress(OSError):
                    remove_candidate(folder)
