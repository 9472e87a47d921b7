"""Learned soups: gradients of the mixing coefficients, streamed.

At θ = Σ αᵢ θᵢ the derivative of a loss by αᵢ is ⟨∇L(θ), θᵢ⟩. A step is one forward and backward pass of the network at
the soup, and a pass over the ingredients (see `streamsoup.learning.passes`): no more than the network, its gradient and
the budget is held, however many ingredients there are.

Source: Wortsman et al. 2022, arXiv 2203.05482, appendix I.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from streamsoup.errors import ChangedIngredientError, RecipeError
from streamsoup.learning.job import LearnJob, StepRecord
from streamsoup.learning.mixture import Mixture, Numbers
from streamsoup.learning.network import Network
from streamsoup.learning.passes import Passes
from streamsoup.learning.state import Standing, StateFile


@dataclass
class LearningLoop:
    """One learned soup in the making.

    Attributes
    ----------
    job : LearnJob
    network : Network
    passes : Passes
    mixture : Mixture
    state : StateFile
    standing : Standing
    batches, held_out : iterables of pairs of inputs and targets
    on_step : callable taking a StepRecord, optional
    """

    job: LearnJob
    network: Network
    passes: Passes
    mixture: Mixture
    state: StateFile
    standing: Standing
    batches: Iterable[Any]
    held_out: Iterable[Any] | None
    on_step: Callable[[StepRecord], None] | None = None

    def run(self) -> tuple[Numbers, float | None]:
        """Learn; returns coefficients and temperature. The module then holds their soup.

        Raises
        ------
        StreamsoupError
        """
        standing = self.standing
        if standing.mixture:
            self.mixture.load(standing.mixture)
        formed = self.mixture.all_coefficients()
        self.passes.form(formed)
        standing.content_digests = self._same_as(standing.content_digests)
        if self.held_out is not None and standing.best is None:
            self._evaluate(0)
        while standing.epoch < self.job.epochs and not self._is_enough:
            self._epoch()
        formed = self.mixture.all_coefficients()
        best, temperature = standing.best, standing.best_temperature
        if best is None:
            best, temperature = formed, self._temperature
        if not np.array_equal(best, formed) or self.network.may_change:
            self.passes.form(best)
        return best, temperature

    def _same_as(self, before: Sequence[str]) -> list[str]:
        """Return the ingredients' content digests, if they are those that an earlier run found: samples are samples."""
        found = self.passes.content_digests
        for path, now, then in zip(self.job.ingredients, found, before or found, strict=True):
            if now != then:
                raise ChangedIngredientError(
                    f"{path}: its data changed since learning began. Put it back, or begin anew with --restart."
                )
        return found

    @property
    def _temperature(self) -> float | None:
        beta = self.mixture.temperature
        return None if beta is None else float(beta.detach())

    @property
    def _is_enough(self) -> bool:
        return self.job.patience is not None and self.standing.without_progress >= self.job.patience

    def _epoch(self) -> None:
        standing = self.standing
        chunks = _chunks(_in_order(self.batches, (self.job.seed, standing.epoch)), self.job.accumulate)
        first, done = standing.chunk, 0
        for chunk, last in islice(chunks, first, None):
            done += 1
            self._step(chunk, last=last)
            del chunk  # before the next one is made
        if not done:
            raise RecipeError(
                f"An epoch has no more than {first} steps of {self.job.accumulate} batches, and another is to "
                "be made. Give a list, or an iterable that can be begun anew and is the same each time."
            )

    def _step(self, chunk: Sequence[Any], *, last: bool) -> None:
        began, read = time.perf_counter(), self.passes.bytes_read
        standing, beta = self.standing, self.mixture.temperature
        if standing.epoch == 0:
            standing.examples = _more_examples(standing.examples, chunk)
        loss = self.network.backward(chunk, beta, (self.job.seed, standing.epoch, standing.chunk))
        passing = time.perf_counter()
        self.mixture.update_temperature()
        self.passes.step(self.network.gradient(), self.mixture.update)
        passing = time.perf_counter() - passing
        number = len(standing.steps) + 1
        held_out = self._evaluate(number) if last and self.held_out is not None else None
        record = StepRecord(
            step=number,
            epoch=standing.epoch + 1,
            loss=loss,
            temperature=self._temperature,
            held_out=held_out,
            seconds=(seconds := time.perf_counter() - began),
            network_seconds=seconds - passing,
            bytes_read=self.passes.bytes_read - read,
        )
        standing.steps.append(record)
        standing.epoch, standing.chunk = (standing.epoch + 1, 0) if last else (standing.epoch, standing.chunk + 1)
        standing.mixture = self.mixture.state()
        self.state.save(standing)
        if self.on_step is not None:
            self.on_step(record)

    def _evaluate(self, step: int) -> float:
        """Look at the held-out loss of the soup that is formed after a step, and remember the best."""
        standing = self.standing
        loss = self.network.evaluate(self.held_out, self.mixture.temperature, self.job.seed)
        standing.first_loss = loss if standing.first_loss is None else standing.first_loss
        if standing.best_loss is None or loss < standing.best_loss:
            standing.best, standing.best_loss = self.mixture.all_coefficients(), loss
            standing.best_temperature, standing.without_progress = self._temperature, 0
            standing.best_step = step
        else:
            standing.without_progress += 1
        return loss


def _in_order(batches: Iterable[Any], seed: tuple[int, int]) -> Iterator[Any]:
    """Go through batches: a sequence in an order of the seed and epoch, anything else in its own."""
    if not isinstance(batches, Sequence):
        yield from batches
        return
    for number in np.random.default_rng(seed).permutation(len(batches)).tolist():
        yield batches[number]


def _chunks(batches: Iterator[Any], size: int) -> Iterator[tuple[list[Any], bool]]:
    """Yield the batches of each step, and whether it is the last: one batch is looked ahead."""
    following = list(islice(batches, 1))
    while following:
        chunk = following + list(islice(batches, size - 1))
        following = list(islice(batches, 1))
        yield chunk, not following
        del chunk


def _more_examples(so_far: int | None, chunk: Sequence[Any]) -> int | None:
    try:
        return None if so_far is None else so_far + sum(len(targets) for _, targets in chunk)
    except (TypeError, ValueError):
        return None
