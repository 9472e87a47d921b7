"""The rules of greedy, pruned and repeated soups: pure functions of scores.

A rule is a generator. It yields a `Begin` or a `Trial` (a soup to be scored) and is sent the score; with `Accept` it
says that the last trial was kept. It knows nothing of files, sums or evaluators.

Source: Wortsman et al. 2022, arXiv 2203.05482, Recipe 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from streamsoup.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Rule:
    """How to decide.

    Attributes
    ----------
    accept : {"ge", "gt"}
        Keep what does not lower the score (the paper), or only what raises it (the reference code).
    tolerance : float
        How far below the best score still counts as not lower.
    minimize : bool
        Lower scores are better.
    order : {"score", "given", "random"}
    seed : int
        Of the random order.
    max_ingredients : int or None
    prune : bool
        Start from all, and drop what does not help.
    rounds : int
        How often to go through the ingredients; beyond the first round one may enter again and gets weight.
    restarts : int
        Further runs, in random order; the best soup wins.
    """

    accept: str = "ge"
    tolerance: float = 0.0
    minimize: bool = False
    order: str = "score"
    seed: int = 0
    max_ingredients: int | None = None
    prune: bool = False
    rounds: int = 1
    restarts: int = 0

    def __post_init__(self) -> None:
        if self.accept not in ("ge", "gt"):
            raise RecipeError(f"accept: {self.accept!r} is neither ge nor gt.")
        if self.order not in ("score", "given", "random"):
            raise RecipeError(f"order: {self.order!r} is not one of score, given, random.")
        if not self.tolerance >= 0:
            raise RecipeError(f"tolerance: {self.tolerance} must not be negative.")
        for name, least in (("max_ingredients", 1), ("rounds", 1), ("restarts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"{name}: {value} is too small; at least {least}.")

        if self.prune and self.max_ingredients is not None:
            raise RecipeError("prune starts from all ingredients; it cannot keep to max_ingredients. Give one of them.")

    @property
    def only_grows(self) -> bool:
        """Whether soups only ever get one more ingredient: nothing is dropped, and nothing enters twice."""
        return not self.prune and self.rounds == 1 and not self.restarts

    def accepts(self, score: float, best: float) -> bool:
        """Whether a candidate's score is good enough."""
        gain = best - score if self.minimize else score - best
        return gain >= -self.tolerance if self.accept == "ge" else gain > -self.tolerance

    def better(self, score: float, best: float) -> bool:
        """Whether a score is strictly better."""
        return score < best if self.minimize else score > best


@dataclass(frozen=True, slots=True)
class Trial:
    """A soup to be scored: the current one, with one ingredient more or less.

    Attributes
    ----------
    ingredient : int
        Which ingredient is tried.
    change : float
        +1 or −1.
    round : int
    run : int
        0, or the number of the restart.
    """

    ingredient: int
    change: float
    round: int = 0
    run: int = 0


@dataclass(frozen=True, slots=True)
class Accept:
    """The last trial was accepted: it is the current soup now."""

    trial: Trial


@dataclass(frozen=True, slots=True)
class Begin:
    """A run begins with these ingredients (each once); it is to be scored too if there are several."""

    ingredients: tuple[int, ...]
    run: int = 0


Step = Begin | Trial | Accept


@dataclass(frozen=True)
class Search:
    """Steps of a rule over ingredients with known scores of their own.

    Attributes
    ----------
    rule : Rule
    own_scores : sequence of float or None
        None where the order does not need them.
    """

    rule: Rule
    own_scores: Sequence[float | None]

    def order(self, run: int) -> list[int]:
        """Order of a run: ties keep the given order."""
        rule, numbers = self.rule, list(range(len(self.own_scores)))
        if rule.order == "random" or run > 0:
            random.Random(rule.seed + run).shuffle(numbers)
        elif rule.order == "score":
            sign = 1 if rule.minimize else -1
            numbers.sort(key=lambda i: sign * (self.own_scores[i] or 0.0))
        return numbers

    def ties(self) -> list[list[int]]:
        """Ingredients with equal scores of their own: their order is the given one, not a matter of quality."""
        groups: dict[float, list[int]] = {}
        for i, score in enumerate(self.own_scores):
            if score is not None:
                groups.setdefault(score, []).append(i)
        return [group for group in groups.values() if len(group) > 1]

    def steps(self, run: int = 0) -> Generator[Step, float, None]:
        """Yield the steps of one run; the answer to a `Begin` or a `Trial` is its score."""
        return self._prune(run) if self.rule.prune else self._grow(run)

    def ahead(self, run: int, answers: Sequence[float]) -> Iterator[Step]:
        """Yield what a run asks for after these answers, should nothing of it be accepted.

        The first is what the run waits for; those behind it are asked for in turn unless one before them is accepted.
        """
        steps = self.steps(run)
        try:
            step = next(steps)
            for answer in answers:
                step = steps.send(answer)
            while True:
                yield step
                step = steps.send(math.nan)  # which compares with nothing, whatever the tolerance
        except StopIteration:
            return

    def _grow(self, run: int) -> Generator[Step, float, None]:
        rule, order = self.rule, self.order(run)
        most = rule.max_ingredients or len(order)
        kept = {order[0]}
        best = yield Begin((order[0],), run)
        for number in range(rule.rounds):
            changed = False
            for i in order[1:] if number == 0 else order:
                if i not in kept and len(kept) >= most:
                    continue
                trial = Trial(i, 1.0, number, run)
                score = yield trial
                if rule.accepts(score, best):
                    best, changed = score, True
                    kept.add(i)
                    yield Accept(trial)
            if not changed and number > 0:  # the first round does not try the first ingredient again
                break

    def _prune(self, run: int) -> Generator[Step, float, None]:
        rule, order = self.rule, self.order(run)
        kept = list(order)
        best = yield Begin(tuple(order), run)
        for number in range(rule.rounds):
            changed = False
            for i in reversed(order):  # the worst first
                if i not in kept or len(kept) == 1:
                    continue
                trial = Trial(i, -1.0, number, run)
                score = yield trial
                if rule.accepts(score, best):
                    best, changed = score, True
                    kept.remove(i)
                    yield Accept(trial)
            if not changed:
                break
