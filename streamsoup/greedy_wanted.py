"""Which soups a greedy run wants scored, and how each is made: from the running sum, or from its ingredients."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from streamsoup.candidate import Candidate
from streamsoup.evaluator import Wanted
from streamsoup.reread import ReadPlanner
from streamsoup.rules import Begin, Trial
from streamsoup.scorebook import ScoreBook
from streamsoup.sums import Member, RunningSoup, merge


class Wants:
    """Says what a step of a rule wants scored.

    Parameters
    ----------
    ingredients : sequence of paths
        By the numbers that a rule knows them by.
    running : RunningSoup
    book : ScoreBook
        Gives soups their keys.
    """

    def __init__(self, ingredients: Sequence[str], running: RunningSoup, book: ScoreBook) -> None:
        self._ingredients = ingredients
        self._running = running
        self._book = book

    def begin(self, step: Begin) -> Wanted:
        """What a run begins with, if there are several."""
        members = tuple(Member(self._ingredients[i], 1.0) for i in step.ingredients)
        return Wanted(members, functools.partial(self._mean, members), "mean")

    def trial(self, current: tuple[Member, ...], trial: Trial, reads: ReadPlanner) -> Wanted:
        """The current soup with one ingredient more or less; `reads` says how to make it, and counts what that reads.

        Where sums are rounded, or weights merged, the bits may depend on which of both it is, and on what was there.
        """
        path = self._ingredients[trial.ingredient]
        members = merge(current, path, trial.change)
        reread = reads.reread([m.path for m in current], path, may_reread=trial.change > 0)
        way = "members" if reread else self._book.key(current)
        return Wanted(members, functools.partial(self._tried, current, members, path, trial.change, reread), way)

    def _mean(self, members: tuple[Member, ...]) -> Candidate:
        self.bring(members)
        return self._running.mean()

    def _tried(
        self, current: tuple[Member, ...], members: tuple[Member, ...], path: str, change: float, reread: bool
    ) -> Candidate:
        if reread:
            return self._running.candidate_of(members)
        self.bring(current)
        return self._running.candidate(path, change)

    def bring(self, members: tuple[Member, ...]) -> None:
        """Make the running sum that of these members, by the shortest way."""
        running = self._running
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
