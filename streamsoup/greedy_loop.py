"""Greedy soups: keep what helps, with one read of an ingredient and of the running sum a trial.

The loop is a pure function of the scores (see `streamsoup.rules`), and every score is on disk as soon as it is known.
So resuming is running again: what was scored is not evaluated again, and the running sum is taken up from disk or made
anew from the ingredients kept so far.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streamsoup.budget import PeakSampler
from streamsoup.candidate import Candidate
from streamsoup.evaluator import Evaluator
from streamsoup.files import write_durably
from streamsoup.forecast import sum_on_disk
from streamsoup.greedy_job import GreedyJob, GreedyResult, TrialRecord
from streamsoup.greedy_output import publish_soup
from streamsoup.pool import Pool
from streamsoup.recheck import written_again
from streamsoup.reread import ReadPlanner
from streamsoup.rules import Accept, Begin, Search, Trial
from streamsoup.score import Scores
from streamsoup.scorebook import Entry
from streamsoup.sinks import Nowhere
from streamsoup.sums import Member, RunningSoup, merge
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
            nbytes = {path: int(checkpoint.table.nbytes.sum()) for path, checkpoint in pool.checkpoints.items()}
            self.reads = ReadPlanner(nbytes, pool.sum_bytes)
            if job.candidates is not None:
                stack.callback(shutil.rmtree, self.evaluator.candidate_folder, ignore_errors=True)
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
                evaluations=self.evaluator.evaluations,
                reads=dict(self.running.reads),
                bytes_read=self.running.bytes_read,
                bytes_written=self.running.bytes_written,
                rebuilt=self.running.rebuilt,
                peak_bytes=sampler.peak_bytes,
                seconds=time.perf_counter() - began,
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
        for i in wanted:
            if own[i] is None:
                own[i] = value = self.evaluator.alone(job.ingredients[i]).scores.value
                if self.on_score is not None:
                    self.on_score(job.ingredients[i], value)
        return search

    def _search(self, search: Search, number: int) -> tuple[float, tuple[Member, ...]]:
        """Do one run of the rule; returns its score and what it kept."""
        steps = search.steps(number)
        current: tuple[Member, ...] = ()
        best = 0.0
        answer: float | None = None
        trial_members: tuple[Member, ...] = ()
        entry: Entry | None = None
        while True:
            try:
                step = steps.send(answer) if answer is not None else next(steps)
            except StopIteration:
                return best, current
            if isinstance(step, Accept):
                current, best = trial_members, entry.scores.value if entry else best
                answer = 0.0
                continue
            if isinstance(step, Begin):
                current = tuple(Member(self.job.ingredients[i], 1.0) for i in step.ingredients)
                entry = self._begin(search, current)
                best = answer = entry.scores.value
                self._note(step, search, entry, best_before=None, accepted=True, size=len(current))
                continue
            path = self.job.ingredients[step.ingredient]
            trial_members = merge(current, path, step.change)
            reread = self.reads.reread([m.path for m in current], path, may_reread=step.change > 0)
            entry = self.evaluator.book.find(trial_members) or self._try(current, step, reread=reread)
            answer = entry.scores.value
            accepted = self.job.rule.accepts(answer, best)
            size = len(trial_members if accepted else current)
            self._note(step, search, entry, best_before=best, accepted=accepted, size=size)

    def _begin(self, search: Search, members: tuple[Member, ...]) -> Entry:
        if len(members) == 1:
            path = members[0].path
            i = self.job.ingredients.index(path)
            own = search.own_scores[i]
            found = self.evaluator.book.find(members)
            return found or (self.evaluator.alone(path) if own is None else Entry(Scores(own), 0.0, 0))
        if (found := self.evaluator.book.find(members)) is not None:
            return found
        began = time.perf_counter()
        self._bring(members)
        return self.evaluator.candidate(self.running.mean(), began=began)

    def _try(self, current: tuple[Member, ...], trial: Trial, *, reread: bool) -> Entry:
        began = time.perf_counter()
        path = self.job.ingredients[trial.ingredient]
        if reread:
            return self.evaluator.candidate(self.running.candidate_of(merge(current, path, trial.change)), began=began)
        self._bring(current)
        return self.evaluator.candidate(self.running.candidate(path, trial.change), began=began)

    def _bring(self, members: tuple[Member, ...]) -> None:
        """Make the running sum that of these members, by the shortest way."""
        running = self.running
        if running.members == members:
            return
        before = {m.path: m.weight for m in running.members}
        changes = [(m.path, m.weight - before.pop(m.path, 0.0)) for m in members]
        changes += [(path, -weight) for path, weight in before.items()]
        changes = [(path, change) for path, change in changes if change]
        if running.members and len(changes) == 1:
            path, change = changes[0]
            if merge(running.members, path, change) == members:
                if change > 0:
                    running.add(path, change)
                else:
                    running.remove(path, -change)
                return
        if not running.restore(members):
            running.rebuild(members)

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
            written=None if self.evaluator.changes_candidates else self.evaluator.written,
            before=self.evaluator.run_before_command if self.job.before_command is not None else None,
            bring=self._bring,
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
