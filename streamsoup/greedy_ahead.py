"""Scores several candidates at once: the next ones of a greedy run, should none before them be accepted.

The engine makes candidates one after the other, with all cores and one running sum, each into a folder of its own.
Their commands run at once, each waited for by a thread, which writes the score down as soon as it is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Event

from streamsoup.evaluator import Evaluator, Wanted
from streamsoup.greedy_job import AtOnce
from streamsoup.score import Place
from streamsoup.scorebook import Entry
from streamsoup.sums import Member
from streamsoup.threads import insist, start

_Key = tuple[tuple[Member, ...], str | None]


def _nothing_to_wait_for() -> Event:
    event = Event()
    event.set()
    return event


@dataclass(eq=False)
class _Evaluation:
    """One evaluation that was begun, and what came of it."""

    place: Place
    began: float  # seconds, of time.perf_counter
    entry: Entry | None = None
    error: BaseException | None = None
    over: float | None = None  # when it was; None: it runs
    beside: bool = False
    used: bool = False
    ended: Event = field(default_factory=_nothing_to_wait_for)  # of its thread


class Ahead:
    """Has the score of what is wanted, and meanwhile those of what may be wanted next.

    What runs and can no longer be wanted is ended, where it is a command; a callable's end is waited for when its place
    is needed. An error counts only when it is that of something wanted now.

    Parameters
    ----------
    evaluator : Evaluator
    jobs : int
        How many at once.
    """

    def __init__(self, evaluator: Evaluator, jobs: int) -> None:
        self._evaluator = evaluator
        self._jobs = jobs
        self._known: dict[_Key, _Evaluation] = {}  # not ended, and with no error that counts no longer
        self._all: list[_Evaluation] = []
        self._unmade: set[_Key] = set()  # to be made again when their turn comes
        self._news = Event()

    def score(self, window: Callable[[], Sequence[Wanted]]) -> Entry:
        """Return the score of the first in the window, and keep all of the window running, as far as places allow.

        Parameters
        ----------
        window : callable
            Returns what is wanted now and what may be wanted next, given the scores known by then.

        Raises
        ------
        StreamsoupError
            What making or evaluating the first one raised.
        """
        while True:
            self._news.clear()
            wanted = window()
            self._end_others(wanted)
            if (entry := self._take(wanted[0])) is not None:
                return entry
            if not self._begin_next(wanted):
                self._news.wait()

    def _take(self, wanted: Wanted) -> Entry | None:
        evaluation = self._known.get(_key(wanted))
        if evaluation is not None and evaluation.error is not None:
            raise evaluation.error
        entry = self._evaluator.book.find(wanted.members, wanted.way)
        for each in self._all:
            each.used |= entry is not None and each.entry is entry
        return entry

    def _end_others(self, window: Sequence[Wanted]) -> None:
        """End what runs and is not in the window, and forget errors of what is not."""
        wanted = {_key(each) for each in window}
        for key, evaluation in list(self._known.items()):
            if key not in wanted and evaluation.entry is None:
                evaluation.place.end()
                del self._known[key]

    def _begin_next(self, window: Sequence[Wanted]) -> bool:
        """Begin the first of the window that is neither known nor running; returns whether there may be another."""
        for number, each in enumerate(window):
            key = _key(each)
            if key in self._known or self._evaluator.book.look(each.members, each.way) is not None:
                continue
            free = sorted({*range(self._jobs)} - {e.place.job for e in self._all if e.over is None})
            if not free or (number and key in self._unmade):
                return False
            try:
                self._begin(each, free[0])
            except Exception:
                if number == 0:
                    raise
                self._unmade.add(key)  # perhaps it is never wanted; if it is, this is raised then
            return True
        return False

    def _begin(self, wanted: Wanted, job: int) -> None:
        """Make a candidate, here, and have it evaluated by a thread."""
        evaluator, running = self._evaluator, self._evaluator.running
        began = time.perf_counter()
        candidate = wanted.make()
        read = running.bytes_read
        evaluator.write(candidate, wanted, job)
        bytes_read, digests = running.bytes_read - read, dict(running.content_digests)
        evaluation = _Evaluation(Place(job), time.perf_counter())
        made_seconds = evaluation.began - began

        def evaluate() -> None:
            try:
                scores = evaluator.ask(candidate, wanted, evaluation.place)
                seconds = made_seconds + time.perf_counter() - evaluation.began
                evaluation.entry = Entry(scores, seconds, bytes_read)  # before it can be found in the book
                evaluator.book.enter(wanted.members, evaluation.entry, digests, way=wanted.way)
            except BaseException as error:  # raised where it is waited for, if it is
                evaluation.entry, evaluation.error = None, error
            evaluation.over = time.perf_counter()
            self._news.set()

        for other in self._all:
            if other.over is None:
                other.beside = evaluation.beside = True
        self._all.append(evaluation)
        self._known[_key(wanted)] = evaluation
        evaluation.ended = start(f"streamsoup-score-{job}", evaluate)

    def close(self) -> None:
        """End what runs, and wait until it has."""
        running = [evaluation for evaluation in self._all if evaluation.over is None]
        insist([*(each.place.end for each in running), *(each.ended.wait for each in running)])

    @property
    def evaluations(self) -> int:
        """How many evaluations came to a score."""
        return sum(evaluation.entry is not None for evaluation in self._all)

    def tally(self) -> AtOnce:
        """What it was good for, once nothing runs."""
        used = [(e.over or e.began) - e.began for e in self._all if e.used]
        saved = sum(used) - _covered([(e.began, e.over or e.began) for e in self._all])
        return AtOnce(
            jobs=self._jobs,
            beside=sum(e.beside for e in self._all),
            wasted=sum(not e.used for e in self._all),
            saved_seconds=saved,
            saved_evaluations=saved * len(used) / sum(used) if sum(used) else 0.0,
        )


def _key(wanted: Wanted) -> _Key:
    return wanted.members, wanted.way


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of some spans was under way."""
    covered, reached = 0.0, float("-inf")
    for began, over in sorted(spans):
        covered += max(0.0, over - max(began, reached))
        reached = max(reached, over)
    return covered
