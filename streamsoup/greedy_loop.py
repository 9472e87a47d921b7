"""Greedy soups: keep what helps, with one read of an ingredient and of the running sum a trial.

The loop is a pure function of the scores (see `streamsoup.rules`), and every score is on disk as soon as it is known.
So resuming is running again: what was scored is not evaluated again, and the running sum is taken up from disk or made
anew from the ingredients kept so far.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamsoup.budget import PeakSampler
from streamsoup.candidate import Candidate
from streamsoup.evaluator import Evaluator, Wanted
from streamsoup.files import write_durably
from streamsoup.forecast import sum_on_disk
from streamsoup.greedy_ahead import Ahead
from streamsoup.greedy_job import GreedyJob, GreedyResult, TrialRecord
from streamsoup.greedy_output import publish_soup
from streamsoup.greedy_wanted import Wants
from streamsoup.pool import Pool
from streamsoup.recheck import written_again
from streamsoup.reread import ReadPlanner
from streamsoup.rules import Accept, Begin, Search, Trial
from streamsoup.score import Scores
from streamsoup.scorebook import Entry
from streamsoup.sinks import Nowhere
from streamsoup.sums import Member, RunningSoup
from streamsoup.workspace import Workspace, destination_of


@dataclass
class GreedyLoop:
    """One greedy soup in the making."""

    job: GreedyJob
    pool: Pool
    identities: dict[str, Any]
    folder: Path | None
    score: Callable[[Candidate], Any] | None
    before_score: Callable[[Candidate], Any] | None
    on_trial: Callable[[TrialRecord], None] | None
    on_score: Callable[[str, float], None] | None = None
    records: list[TrialRecord] = field(default_factory=list)

    def run(self) -> GreedyResult:
        """Decide, and write the soup. The work folder is the caller's, and locked.

        Raises
        ------
        StreamsoupError
        """
        job, pool, folder = self.job, self.pool, self.folder
        with contextlib.ExitStack() as stack:
            sums = folder / "sums" if folder is not None and sum_on_disk(pool, folder) else None
            self.running = stack.enter_context(
                RunningSoup(job.ingredients, pool=pool, folder=sums, existing=True, only_grows=job.rule.only_grows)
            )
            self.evaluator = Evaluator(job, self.running, self.identities, folder, self.score, self.before_score)
            self._recheck()
            self.wants = Wants(job.ingredients, self.running, self.evaluator.book)
            nbytes = {path: int(checkpoint.table.nbytes.sum()) for path, checkpoint in pool.checkpoints.items()}
            self.reads = ReadPlanner(nbytes, pool.sum_bytes)
            self.evaluator.remove_candidates(least=job.jobs)  # of a run with more at once
            if job.candidates is not None:
                stack.callback(self.evaluator.remove_candidates)
            self.ahead = None
            if job.jobs > 1:
                self.ahead = stack.enter_context(contextlib.closing(Ahead(self.evaluator, job.jobs)))
            return self._run()

    def _recheck(self) -> None:
        """Read ingredients again that were written since they went into what was scored: samples are only samples.

        Raises
        ------
        ChangedIngredientError
        """
        running = self.running
        for path, checkpoint in self.pool.checkpoints.items():
            if path in running.content_digests and written_again(checkpoint, self.identities[path]):
                reads = dict(running.reads)
                running.alone(path).stream(Nowhere())
                running.reads = reads

    def _run(self) -> GreedyResult:
        began = time.perf_counter()
        self.pool.prepare()
        with self._said_where_to_resume(), PeakSampler() as sampler:
            search = self._score_ingredients()
            best: tuple[float, tuple[Member, ...]] | None = None
            for number in range(self.job.rule.restarts + 1):
                found = self._search(search, number)
                if best is None or self.job.rule.better(found[0], best[0]):
                    best = found
            assert best is not None
            if self.ahead is not None:
                self.ahead.close()
            sampler.sample()
            result = GreedyResult(
                path=None,
                members=best[1],
                score=best[0],
                ingredients=len(self.job.ingredients),
                rule=self.job.rule,
                own_scores={
                    p: s for p, s in zip(self.job.ingredients, search.own_scores, strict=True) if s is not None
                },
                ties=[[self.job.ingredients[i] for i in group] for group in search.ties()],
                trials=tuple(self.records),
                evaluations=self.evaluator.evaluations + (self.ahead.evaluations if self.ahead else 0),
                reads=dict(self.running.reads),
                bytes_read=self.running.bytes_read,
                bytes_written=self.running.bytes_written,
                rebuilt=self.running.rebuilt,
                peak_bytes=sampler.peak_bytes,
                seconds=time.perf_counter() - began,
                at_once=self.ahead.tally() if self.ahead else None,
                notes=(*self.running.pool.notes, *(left.sentence for left in self.running.pool.left_out)),
            )
            result = self._publish(result)
        if self.folder is not None:
            write_durably(self.folder / "decisions.json", json.dumps(result.to_json(), indent=1))
        return result

    @contextlib.contextmanager
    def _said_where_to_resume(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self.folder is not None:
                error.add_note(
                    f"Scores and decisions so far are kept in {self.folder}; go on with "
                    f"`streamsoup greedy --resume {self.folder}`."
                )
            raise

    def _score_ingredients(self) -> Search:
        """Score the ingredients on their own: all where their order depends on it, else the one that begins."""
        job, rule = self.job, self.job.rule
        own: list[float | None] = [job.own_scores.get(path) for path in job.ingredients]
        search = Search(rule, own)
        if rule.order == "score":
            wanted = list(range(len(own)))
        else:  # the one that begins; pruning begins with all of them together
            wanted = [] if rule.prune else [search.order(n)[0] for n in range(rule.restarts + 1)]
        missing = [i for i in dict.fromkeys(wanted) if own[i] is None]
        alone = [self.evaluator.alone(job.ingredients[i]) for i in missing]
        for n, i in enumerate(missing):
            own[i] = value = self._score_first(alone[n:]).scores.value
            if self.on_score is not None:
                self.on_score(job.ingredients[i], value)
        return search

    def _score_first(self, wanted: Sequence[Wanted]) -> Entry:
        """Return the score of the first; all others will be asked for too."""
        return self.ahead.score(lambda: wanted) if self.ahead is not None else self.evaluator.score(wanted[0])

    def _search(self, search: Search, number: int) -> tuple[float, tuple[Member, ...]]:
        """Do one run of the rule; returns its score and what it kept."""
        steps = search.steps(number)
        current: tuple[Member, ...] = ()
        best = 0.0
        answers: list[float] = []
        trial_members: tuple[Member, ...] = ()
        entry: Entry | None = None
        while True:
            try:
                step = steps.send(answers[-1]) if answers else next(steps)
            except StopIteration:
                return best, current
            if isinstance(step, Accept):
                current, best = trial_members, entry.scores.value if entry else best
                answers.append(0.0)
                continue
            if isinstance(step, Begin):
                current = tuple(Member(self.job.ingredients[i], 1.0) for i in step.ingredients)
                entry = self._begin(step, search, current)
                best = entry.scores.value
                answers.append(best)
                self._note(step, search, entry, best_before=None, accepted=True, size=len(current))
                continue
            wanted = self.wants.trial(current, step, self.reads)
            trial_members = wanted.members
            entry = self._score(wanted, search, number, answers, current, best)
            answers.append(entry.scores.value)
            accepted = self.job.rule.accepts(entry.scores.value, best)
            size = len(trial_members if accepted else current)
            self._note(step, search, entry, best_before=best, accepted=accepted, size=size)

    def _begin(self, step: Begin, search: Search, current: tuple[Member, ...]) -> Entry:
        """Return the score of what a run begins with."""
        if len(current) > 1:
            return self._score(self.wants.begin(step), search, step.run, [], current, math.nan)
        own = search.own_scores[step.ingredients[0]]
        found = self.evaluator.book.find(current)
        return found or (
            self.evaluator.score(self.evaluator.alone(current[0].path)) if own is None else Entry(Scores(own), 0.0, 0)
        )

    def _score(
        self,
        wanted: Wanted,
        search: Search,
        run: int,
        answers: Sequence[float],
        current: tuple[Member, ...],
        best: float,
    ) -> Entry:
        """Return the score of what a run waits for after these answers; look ahead meanwhile, if that is asked for."""
        if self.ahead is None:
            return self.evaluator.score(wanted)

        def window() -> list[Wanted]:
            found, reads = [wanted], self.reads.copy()
            for step in itertools.islice(search.ahead(run, answers), 1, self.job.jobs):
                known = self.evaluator.book.look(found[-1].members, found[-1].way)
                if not isinstance(step, Trial) or (
                    known is not None and self.job.rule.accepts(known.scores.value, best)
                ):
                    break  # from there on other soups are tried
                found.append(self.wants.trial(current, step, reads))
            return found

        return self.ahead.score(window)

    def _note(
        self,
        step: Begin | Trial,
        search: Search,
        entry: Entry,
        *,
        best_before: float | None,
        accepted: bool,
        size: int,
    ) -> None:
        i = step.ingredients[0] if isinstance(step, Begin) else step.ingredient
        record = TrialRecord(
            path=self.job.ingredients[i],
            own_score=search.own_scores[i],
            change=0.0 if isinstance(step, Begin) else step.change,
            round=0 if isinstance(step, Begin) else step.round,
            run=step.run,
            score=entry.scores.value,
            best_before=best_before,
            accepted=accepted,
            tie=entry.scores.value == best_before,
            size=size,
            also=dict(entry.scores.also),
            seconds=entry.seconds,
            bytes_read=entry.bytes_read,
        )
        self.records.append(record)
        if self.on_trial is not None:
            self.on_trial(record)

    def _publish(self, result: GreedyResult) -> GreedyResult:
        if self.job.out is None:
            return result
        workspace = Workspace(destination_of(self.job.out))
        if workspace.is_published(self.job.id):  # and then it died, before it could say so
            workspace.remove()
            return replace(result, path=workspace.destination.path)
        destination = publish_soup(
            self.job,
            self.running,
            result,
            identities=self.identities,
            written=self.evaluator.written_as(result.members),
            before=self.evaluator.run_before_command if self.job.before_command is not None else None,
            bring=self.wants.bring,
            changed_by=self.evaluator.changed_by,
        )
        return replace(
            result,
            path=destination,
            reads=dict(self.running.reads),
            bytes_read=self.running.bytes_read,
            bytes_written=self.running.bytes_written,
            rebuilt=self.running.rebuilt,
        )
