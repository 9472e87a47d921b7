"""Learned soups as one call; the same call again goes on after a crash."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsoup.budget import PeakSampler
from streamsoup.checkpoints import expand_paths, given_paths, identify, identity_to_json, verify_unchanged
from streamsoup.errors import RecipeError, ResumeError
from streamsoup.execution import compile_notice
from streamsoup.files import lock_folder, writing_to
from streamsoup.learning.groups import By, Group, make_groups
from streamsoup.learning.job import LearnJob, LearnResult, StepRecord, recipe_of, warnings_of
from streamsoup.learning.loop import LearningLoop
from streamsoup.learning.mixture import MakeOptimizer, Mixture, Numbers, optimizer_named
from streamsoup.learning.network import Forward, LossFunction, Network, call_module
from streamsoup.learning.options import Init, make_learn_job
from streamsoup.learning.passes import Passes
from streamsoup.learning.plans import Plans, join_groups, open_pool, plan_to_measure
from streamsoup.learning.publishing import Publisher
from streamsoup.learning.state import STATE_NAMES, StateFile, holds_state, id_in, remove_state
from streamsoup.outcome import Progress
from streamsoup.plan import Plan
from streamsoup.pool import Pool
from streamsoup.read import open_sources
from streamsoup.sinks import ModuleSink

if TYPE_CHECKING:
    import torch


def learn(
    ingredients: str | Path | Sequence[str | Path],
    module: torch.nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    out: str | Path | None = None,
    *,
    by: By = "model",
    init: Init = "uniform",
    restrict: bool = False,
    held_out: Iterable[Any] | None = None,
    optimizer: str | MakeOptimizer = "adamw",
    forward: Forward = call_module,
    workdir: str | Path | None = None,
    keep_workdir: bool = True,
    restart: bool = False,
    overwrite: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_compile: Callable[[], None] | None = None,
    **options: Any,
) -> LearnResult:
    """Learn mixing coefficients on held-out data by gradient descent, and make the soup of them.

    Parameters
    ----------
    ingredients : path, pattern, or sequence of paths and patterns
        As in `streamsoup.soup`.
    module : torch.nn.Module
        The network, on any device; its parameters are overwritten, and at the end are those of the soup. It is run in
        the mode (``train`` or ``eval``) that it is in.
    loss_fn : callable taking logits and targets
        Returns a scalar tensor: ``torch.nn.functional.cross_entropy``.
    batches : iterable of (inputs, targets)
        Gone through once an epoch: a list in an order that `seed` decides, anything else (a ``DataLoader``) in its own,
        which has to be the same each time if the work is to be resumed to the same bits.
    out : path, optional
        A new folder, or a ``.safetensors`` file, for the soup.
    by : {"model", "layer", "tensor"} or sequence of shell patterns
        Which tensors have coefficients of their own.
    init : "uniform", path, GreedyResult, mapping of paths to weights, or sequence of weights
        Where to begin: a path is that of a soup whose recipe has weights, such as a greedy soup. Weights are divided by
        their sum.
    restrict : bool
        Leave out ingredients whose weight is zero at the beginning: the last polish of a greedy soup.
    held_out : iterable of (inputs, targets), optional
        Evaluated at the beginning and after each epoch: the soup is then that of the least loss.
    optimizer : str or callable taking a list of parameter groups
        ``adamw``, ``adam``, ``sgd``, or what makes an optimiser of torch that works element by element.
    forward : callable taking the module and the inputs of a batch, optional
        Returns logits. By default inputs are one argument, or several as a tuple or mapping.
    workdir : path, optional
        Keeps coefficients and the optimiser's state after each step: the same call again goes on after a crash, and
        ends with the same bits.
    keep_workdir : bool
        False: remove it once the soup is in its place.
    restart : bool
        Throw away what is in `workdir`.
    overwrite : bool
        Replace a soup that exists. Not needed for the soup of `workdir`: where that is in its place already, it is left
        as it is.
    on_step : callable taking a StepRecord, optional
        Called after each step.
    progress : callable taking a Progress, optional
    on_compile : callable, optional
        Called once if kernels must be compiled.
    **options
        ``parametrisation`` ("softmax" or "free"), ``temperature`` (learn β, by which logits are multiplied; default
        True), ``lr`` (0.1) and ``weight_decay`` (0) of an optimiser by name, ``epochs`` (3), ``accumulate`` (batches
        to a step, 1), ``seed`` (0), ``patience`` (epochs without a lower held-out loss, after which to stop); and of
        `PoolOptions`
        ``dtype``, ``budget_bytes``, ``device``, ``device_budget_bytes``, ``workers``, ``read_mode``, ``buffers``,
        ``nonfinite``, ``shard_bytes``, ``key``, ``strip_prefix``, ``rename``, ``only_shared``.

    Returns
    -------
    LearnResult

    Raises
    ------
    StreamsoupError
        If the soup cannot be written, the error has what was learned as attribute `learned`.

    Notes
    -----
    Memory: module, gradient and activations, and the budget; whatever the number of ingredients. A step reads each
    ingredient once where the bytes of a group in all ingredients fit the budget, else twice.

    Source: Wortsman et al. 2022, arXiv 2203.05482, "learned soup".
    """
    paths = expand_paths(given_paths(ingredients))
    job = make_learn_job(
        paths,
        by=by,
        init=init,
        restrict=restrict,
        held_out=held_out is not None,
        optimizer=optimizer,
        options=options,
    )
    _refuse_one_shot(held_out)
    pool, plans = open_pool(job, progress)
    publisher = None if out is None else Publisher(Path(out), overwrite)
    kitchen = _Kitchen(job, pool, plans.forming, publisher, None if workdir is None else Path(workdir))
    with compile_notice(on_compile):
        pool.prepare(measured=True)
    with kitchen.at_work(restart=restart, keep=keep_workdir):
        return kitchen.learn(module, loss_fn, forward, batches, held_out, optimizer, on_step)


def _refuse_one_shot(held_out: Iterable[Any] | None) -> None:
    # Of other iterables no iterator is made: that of a DataLoader draws the user's random numbers, or starts processes.
    if isinstance(held_out, Iterator) and iter(held_out) is held_out:
        raise RecipeError(
            "held_out can be gone through only once, but is evaluated after each epoch. Give a list, or an iterable "
            "that can be begun anew."
        )


@dataclass(frozen=True, slots=True)
class _Kitchen:
    """Where one learned soup is made."""

    job: LearnJob
    pool: Pool
    plan: Plan
    publisher: Publisher | None
    workdir: Path | None

    @contextlib.contextmanager
    def at_work(self, *, restart: bool, keep: bool) -> Iterator[None]:
        """Check that the soup can go where it is sent, and have the work folder for this process alone."""
        pool, folder = self.pool, self.workdir
        if self.publisher is not None:
            self.publisher.check(pool, folder, id_in(folder), restart=restart)
        if folder is None:
            yield
            return
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        fd = lock_folder(folder)
        try:
            _own(folder, restart=restart)
            with _said_what_is_kept(folder):
                yield
            if not keep:
                remove_state(folder)
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty; before another process may have it
            os.close(fd)

    def learn(
        self,
        module: torch.nn.Module,
        loss_fn: LossFunction,
        forward: Forward,
        batches: Iterable[Any],
        held_out: Iterable[Any] | None,
        optimizer: str | MakeOptimizer,
        on_step: Callable[[StepRecord], None] | None,
    ) -> LearnResult:
        """Learn, and write the soup."""
        began = time.perf_counter()
        job, pool = self.job, self.pool
        plan = self.plan
        sink = ModuleSink(module, plan, strict=True)
        network = Network(module, loss_fn, forward, plan)
        plans = Plans(plan, plan_to_measure(pool, network.gradient_like(plan)))
        groups = make_groups(job.by, plan.table.names, plan.averaged, network.tied)
        parts = join_groups(plan, groups)
        mixture = Mixture(
            job.start[None].repeat(len(groups), axis=0),
            parts=parts,
            parametrisation=job.parametrisation,
            make_optimizer=optimizer_named(optimizer, lr=job.lr, weight_decay=job.weight_decay),
            temperature=job.temperature,
        )
        identities = {path: identity_to_json(identify(c)) for path, c in pool.checkpoints.items()}
        also = {"batches": _count(batches), "held_out": _count(held_out), "optimizer_settings": mixture.settings}
        state = StateFile(self.workdir, job, identities, also)
        standing = state.begin(pool.checkpoints)
        with open_sources(plan.checkpoints, pool.mode) as sources, network.learning():
            passes = Passes(pool, plans, groups, parts, network.tied, sources, sink)
            loop = LearningLoop(job, network, passes, mixture, state, standing, batches, held_out, on_step)
            with PeakSampler() as sampler:  # the first optimiser of a process imports 70 MB
                coefficients, temperature = loop.run()
                sampler.sample()
        for checkpoint in plan.checkpoints:
            verify_unchanged(checkpoint)
        result = LearnResult(
            path=None if self.publisher is None else self.publisher.path,
            ingredients=job.ingredients,
            groups=tuple(group.name for group in groups),
            coefficients=coefficients,
            temperature=temperature,
            loss=standing.steps[-1].loss,
            first_held_out=standing.first_loss,
            held_out=standing.best_loss,
            best_step=len(standing.steps) if standing.best is None else standing.best_step,
            steps=tuple(standing.steps),
            recipe=recipe_of(job, _by_tensor(plan, groups, coefficients)),
            bytes_read=passes.bytes_read,
            projected_peak_bytes=plans.projected_peak_bytes,
            measured_peak_bytes=sampler.peak_bytes,
            seconds=time.perf_counter() - began,
            notes=(
                *(left.sentence for left in pool.left_out),
                *warnings_of(job, standing.examples, job.free(passes.varying_groups)),
                *passes.notes,
            ),
        )
        if self.publisher is not None:
            self._publish(self.publisher, result, state.id, passes.content_digests)
        return result

    def _publish(self, publisher: Publisher, result: LearnResult, job_id: str, digests: Sequence[str]) -> None:
        try:
            publisher.publish(result, job_id, digests, self.pool)
        except BaseException as error:
            error.learned = replace(result, path=None)  # type: ignore[attr-defined]
            if self.workdir is None:
                error.add_note(
                    "What was learned is in this exception's attribute `learned`, a LearnResult; its recipe makes the "
                    "soup."
                )
            raise


def _count(batches: Iterable[Any] | None) -> int | str:
    """How many batches there are, as far as they tell."""
    if batches is None:
        return "none"
    return len(batches) if isinstance(batches, Sequence) else "some"


def _by_tensor(plan: Plan, groups: Sequence[Group], coefficients: Numbers) -> Mapping[str, Numbers] | Numbers:
    if len(groups) == 1:
        only: Numbers = coefficients[0]
        return only
    return {plan.table.names[t]: row for g, row in zip(groups, coefficients, strict=True) for t in g.tensors}


@contextlib.contextmanager
def _said_what_is_kept(folder: Path) -> Iterator[None]:
    """On a failure say where the work is, if there is any."""
    try:
        yield
    except BaseException as error:
        if holds_state(folder):
            error.add_note(f"What was learned so far is kept in {folder}; the same command goes on from there.")
        else:
            remove_state(folder)
        raise


def _own(folder: Path, *, restart: bool) -> None:
    """Refuse a folder with other things in it; when restarting, remove what is ours."""
    if others := sorted({path.name for path in folder.iterdir()} - set(STATE_NAMES)):
        raise ResumeError(f"{folder}: holds {others[0]}, which is not ours. Choose another work folder.")
    if restart:
        remove_state(folder)
