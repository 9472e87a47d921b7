"""Learned soups as one call; the same call again goes on after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamsoup.budget import PeakSampler
from streamsoup.checkpoints import expand_paths, identify, identity_to_json, verify_unchanged
from streamsoup.cook import cook
from streamsoup.errors import DestinationError, ResumeError
from streamsoup.execution import Execution, compile_notice
from streamsoup.files import lock_folder, require_space_at, writing_to
from streamsoup.learning.groups import By, Group, make_groups
from streamsoup.learning.job import LearnJob, LearnResult, StepRecord, recipe_of, warnings_of
from streamsoup.learning.loop import LearningLoop
from streamsoup.learning.mixture import MakeOptimizer, Mixture, Numbers, optimizer_named
from streamsoup.learning.network import Forward, LossFunction, Network, call_module
from streamsoup.learning.options import Init, make_learn_job
from streamsoup.learning.passes import Passes
from streamsoup.learning.plans import Plans, join_groups, open_pool, plan_to_form, plan_to_measure
from streamsoup.learning.state import JOB_NAME, STATE_NAMES, StateFile
from streamsoup.making import Extras
from streamsoup.outcome import Progress
from streamsoup.plan import Plan
from streamsoup.pool import Pool
from streamsoup.read import open_sources
from streamsoup.sinks import ModuleSink
from streamsoup.workspace import Destination, Workspace, check_destination, destination_of

if TYPE_CHECKING:
    import torch

_RESULT_NAME = "learned.json"


def learn(
    ingredients: str | Sequence[str | Path],
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
    restart : bool
        Throw away what is in `workdir`.
    overwrite : bool
        Replace a soup that exists.
    on_step : callable taking a StepRecord, optional
        Called after each step.
    progress : callable taking a Progress, optional
    on_compile : callable, optional
        Called once if kernels must be compiled.
    **options
        ``parametrisation`` ("softmax" or "free"), ``temperature`` (learn β, by which logits are multiplied; default
        True), ``lr`` (0.1), ``weight_decay`` (0), ``epochs`` (3), ``accumulate`` (batches to a step, 1), ``seed`` (0),
        ``patience`` (epochs without a lower held-out loss, after which to stop); and those of `PoolOptions`:
        ``dtype``, ``budget_bytes``, ``device``, ``workers``, ``read_mode``, ``buffers``, ``nonfinite``,
        ``shard_bytes``.

    Returns
    -------
    LearnResult

    Raises
    ------
    StreamsoupError

    Notes
    -----
    Memory: module, gradient and activations, and the budget; whatever the number of ingredients. A step reads each
    ingredient once where the bytes of a group in all ingredients fit the budget, else twice.

    Source: Wortsman et al. 2022, arXiv 2203.05482, "learned soup".
    """
    paths = expand_paths([ingredients] if isinstance(ingredients, str) else [str(path) for path in ingredients])
    job = make_learn_job(
        paths,
        by=by,
        init=init,
        restrict=restrict,
        held_out=held_out is not None,
        optimizer=optimizer,
        options=options,
    )
    kitchen = _Kitchen(
        job,
        open_pool(job, progress),
        out=None if out is None else Path(out),
        workdir=None if workdir is None else Path(workdir),
        overwrite=overwrite,
    )
    with compile_notice(on_compile):
        kitchen.pool.prepare(measured=True)
    with kitchen.at_work(restart=restart):
        return kitchen.learn(module, loss_fn, forward, batches, held_out, optimizer, on_step)


@dataclass(frozen=True, slots=True)
class _Kitchen:
    """Where one learned soup is made."""

    job: LearnJob
    pool: Pool
    out: Path | None
    workdir: Path | None
    overwrite: bool

    @contextlib.contextmanager
    def at_work(self, *, restart: bool) -> Iterator[None]:
        """Check that the soup can go where it is sent, and have the work folder for this process alone."""
        pool, folder = self.pool, self.workdir
        if self.out is not None:
            destination = destination_of(self.out)
            again = self.overwrite or _is_published(destination, folder)
            check_destination(destination, list(pool.checkpoints.values()), overwrite=again)
            _refuse_nested(destination.path, folder)
            if not restart and not _holds_state(folder):
                Workspace(destination).refuse_unfinished()
            require_space_at([(self.out, pool.layout.file_bytes)])
        if folder is None:
            yield
            return
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        fd = lock_folder(folder)
        try:
            _own(folder, restart=restart)
            yield
        except BaseException as error:
            if _holds_state(folder):
                error.add_note(f"What was learned so far is kept in {folder}; the same command goes on from there.")
            raise
        finally:
            os.close(fd)
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty

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
        plan = plan_to_form(job, pool)
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
        state = StateFile(self.workdir, job, identities)
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
            path=None if self.out is None else destination_of(self.out).path,
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
            notes=(*warnings_of(job, standing.examples, job.free(passes.varying_groups)), *passes.notes),
        )
        self._publish(result, state.id, passes.content_digests)
        return result

    def _publish(self, result: LearnResult, job_id: str, digests: Sequence[str]) -> None:
        if result.path is None:
            return
        options = self.pool.options
        cook(
            result.recipe,
            result.path,
            Execution(
                budget_bytes=self.pool.budget_bytes,
                device=options.device,
                workers=options.workers,
                read_mode=options.read_mode,
                overwrite=self.overwrite or _is_published(destination_of(result.path), self.workdir),
                restart=True,
                progress=self.pool.progress,
            ),
            Extras({_RESULT_NAME: json.dumps({"id": job_id, **result.to_json()}, indent=1)}, tuple(digests)),
        )


def _by_tensor(plan: Plan, groups: Sequence[Group], coefficients: Numbers) -> Mapping[str, Numbers] | Numbers:
    if len(groups) == 1:
        only: Numbers = coefficients[0]
        return only
    return {plan.table.names[t]: row for g, row in zip(groups, coefficients, strict=True) for t in g.tensors}


def _holds_state(folder: Path | None) -> bool:
    return folder is not None and (folder / STATE_NAMES[0]).exists()


def _is_published(destination: Destination, folder: Path | None) -> bool:
    """Whether a run died after its soup took its place: making it again replaces it with the same."""
    if folder is None or not _holds_state(folder):
        return False
    target = destination.path
    beside = target.with_name(f"{destination.companion_stem}.{_RESULT_NAME}")
    result = beside if destination.is_file else target / _RESULT_NAME
    try:
        ids = [json.loads(path.read_text(encoding="utf-8"))["id"] for path in (result, folder / JOB_NAME)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(ids[0] == ids[1])


def _refuse_nested(target: Path, folder: Path | None) -> None:
    if folder is None:
        return
    work = Path(os.path.realpath(folder))
    place = Path(os.path.realpath(target))
    if work == place or work in place.parents or place in work.parents:
        raise DestinationError(f"{target}: and the work folder {folder} lie in one another. Choose another place.")


def _own(folder: Path, *, restart: bool) -> None:
    """Refuse a folder with other things in it; when restarting, remove what is ours."""
    if others := sorted({path.name for path in folder.iterdir()} - set(STATE_NAMES)):
        raise ResumeError(f"{folder}: holds {others[0]}, which is not ours. Choose another work folder.")
    for name in STATE_NAMES if restart else ():
        (folder / name).unlink(missing_ok=True)
