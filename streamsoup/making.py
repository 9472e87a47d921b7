"""One soup in the making: reduce, check what was found, write what lies beside the weights, publish."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamsoup.backends.protocol import Backend
from streamsoup.budget import PeakSampler
from streamsoup.checkpoints import verify_unchanged
from streamsoup.engine import Engine
from streamsoup.errors import ChangedIngredientError, MismatchError
from streamsoup.execution import Execution, SoupResult, prepare
from streamsoup.files import write_durably
from streamsoup.findings import check_copied, check_finite
from streamsoup.journal import Journal, read_journals
from streamsoup.manifest import content_digests
from streamsoup.merging import copy_all, reduce_all
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.ranks import ALONE, Ranks
from streamsoup.read import open_sources
from streamsoup.recheck import recheck, written_again
from streamsoup.recipe import Recipe
from streamsoup.side_files import write_side_files
from streamsoup.source import Source
from streamsoup.workspace import Workspace
from streamsoup.write import FileSink

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Extras:
    """What a soup is made with beside its recipe.

    Attributes
    ----------
    files : mapping of str to str
        Names and texts of more files beside the weights.
    content_digests : tuple of str or None
        What the ingredients are to hold: those that the recipe was chosen by.
    owner : str or None
        Who chose the recipe, and knows the soup, finished or not, again by this. Each making has an id of its own
        beside it: one that replaces another of the same owner is not taken for that.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    content_digests: tuple[str, ...] | None = None
    owner: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: an interrupted soup is gone on with to the same files."""
        return {"files": dict(self.files), "content_digests": self.content_digests, "owner": self.owner}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Extras:
        """Read what `to_json` wrote."""
        digests = document["content_digests"]
        return Extras(dict(document["files"]), None if digests is None else tuple(digests), document["owner"])


NO_EXTRAS = Extras()


@dataclass(frozen=True, slots=True)
class Making:
    """One soup in the making."""

    plan: Plan
    mode: str
    recipe: Recipe
    workspace: Workspace
    job: dict[str, Any]
    backend: Backend
    execution: Execution
    began: float
    extras: Extras = NO_EXTRAS
    ranks: Ranks = ALONE

    def run(self) -> SoupResult:
        """Make the soup; each rank does its share, and the first one the rest."""
        outcome, peak_bytes = self.ranks.fold(self._share, _joined)
        return self.ranks.finish(lambda: self._publish(outcome, peak_bytes))

    def _share(self) -> tuple[Outcome, int]:
        """Reduce this rank's share; returns what was found, and the bytes that were owned at most."""
        plan, execution = self.plan, self.execution
        prepare(self.backend, plan, execution.on_compile)
        with PeakSampler() as sampler:
            outcome = self._reduce(sampler)
        for checkpoint in plan.checkpoints:
            verify_unchanged(checkpoint)
        return outcome, sampler.peak_bytes

    def _publish(self, outcome: Outcome, peak_bytes: int) -> SoupResult:
        plan, execution = self.plan, self.execution
        notes = [*plan.notes, *(left.sentence for left in plan.left_out)]
        notes += check_copied(plan, outcome, self.recipe.buffers)
        notes += check_finite(plan, outcome, self.recipe.nonfinite)
        for note in notes:
            _log.warning(note)
        digests = content_digests(plan, outcome.digests)
        self._refuse_others(digests)
        write_side_files(
            self.workspace,
            plan,
            self.recipe,
            identities=self.job["identities"],
            digests=digests,
            device=self.backend.name,
            notes=notes,
            job_id=self.job["id"],
            owner=self.extras.owner,
        )
        for name, text in self.extras.files.items():
            write_durably(self.workspace.beside(name), text)
        self.workspace.publish(overwrite=execution.overwrite, durable=execution.durable)
        return self.result(outcome, measured_peak_bytes=peak_bytes, digests=tuple(digests), notes=tuple(notes))

    def _refuse_others(self, digests: Sequence[str]) -> None:
        expected = self.extras.content_digests
        for checkpoint, found, wanted in zip(self.plan.checkpoints, digests, expected or digests, strict=True):
            if found != wanted:
                raise ChangedIngredientError(
                    f"{checkpoint.path}: its data changed since the recipe was chosen. Put it back, or begin anew."
                )

    def _reduce(self, sampler: PeakSampler) -> Outcome:
        plan, ranks, workspace, execution = self.plan, self.ranks, self.workspace, self.execution
        with contextlib.ExitStack() as stack:
            sources = stack.enter_context(open_sources(plan.checkpoints, self.mode))
            begun = ranks.first(lambda: self._recheck(sources))
            sink = self._open_sink(stack, begun=begun)
            journal = stack.enter_context(
                Journal(workspace.journal_path(ranks.number), durable=execution.durable, locked=True)
            )
            engine = Engine(
                plan,
                self.backend,
                sources,
                sink,
                commit=journal.append,
                progress=execution.progress,
                ranks=ranks.count,
            )
            done = engine.resume(read_journals(workspace.journals()))
            if not ranks.is_first:
                engine.outcome = Outcome.empty(plan)  # what was found earlier counts once
            ranks.first(lambda: None)  # nobody writes a journal that another still reads
            copy_all(plan, engine, done, ranks)
            copied = engine.outcome if ranks.count == 1 else ranks.fold(lambda: copy.deepcopy(engine.outcome), _join)
            ranks.first(lambda: check_copied(plan, copied, self.recipe.buffers))
            reduce_all(plan, engine, done, ranks)
            sampler.sample()
            return engine.outcome

    def _recheck(self, sources: Sequence[Source]) -> bool:
        """Whether tiles were finished by an earlier run; those of ingredients written since are compared."""
        journals = self.workspace.journals()
        begun = next(read_journals(journals), None) is not None
        for i, checkpoint in enumerate(self.plan.checkpoints):
            if begun and written_again(checkpoint, self.job["identities"][i]):
                recheck(self.plan, i, sources[i], self.backend, read_journals(journals))
        return begun

    def _open_sink(self, stack: contextlib.ExitStack, *, begun: bool) -> FileSink:
        """Open the shards, which the first rank reserves."""
        sinks: list[FileSink] = []

        def open_shards(existing: bool) -> None:
            sink = FileSink(self.workspace.soup, self.plan.layout, existing=existing, durable=self.execution.durable)
            sinks.append(stack.enter_context(sink))

        self.ranks.first(lambda: open_shards(begun))
        if not self.ranks.is_first:
            open_shards(True)
        return sinks[0]

    def result(
        self, outcome: Outcome, *, measured_peak_bytes: int, digests: tuple[str, ...], notes: tuple[str, ...]
    ) -> SoupResult:
        plan = self.plan
        stages = dict(outcome.stage_seconds)
        threads = {stage: 1 if stage == "sync" else plan.tiling.workers for stage in stages}
        waited = {stage: seconds / threads[stage] / self.ranks.count for stage, seconds in stages.items()}
        return SoupResult(
            path=self.workspace.destination.path,
            ingredients=len(plan.checkpoints),
            tensors=len(plan.table),
            parameters=plan.parameters,
            bytes_read=outcome.bytes_read,
            bytes_written=outcome.bytes_written,
            seconds=time.perf_counter() - self.began,
            engine_seconds=outcome.seconds,
            projected_peak_bytes=plan.projected_peak_bytes,
            measured_peak_bytes=measured_peak_bytes,
            metadata_bytes=plan.metadata_bytes,
            read_mode=self.mode,
            device=self.backend.name,
            workers=plan.tiling.workers,
            stage_seconds=stages,
            limited_by=max(waited, key=lambda stage: waited[stage]),
            content_digests=digests,
            notes=notes,
            ranks=self.ranks.count,
        )


def _join(one: Outcome, other: Outcome) -> Outcome:
    return one.join(other)


def _joined(one: tuple[Outcome, int], other: tuple[Outcome, int]) -> tuple[Outcome, int]:
    return one[0].join(other[0]), max(one[1], other[1])


@contextlib.contextmanager
def keep_or_remove(workspace: Workspace, *, keep: bool) -> Iterator[None]:
    """On a failure, keep the work that was done and say where it is; or leave nothing."""
    try:
        yield
    except BaseException as error:
        if keep and workspace.is_begun and not isinstance(error, MismatchError):
            error.add_note(
                f"Unfinished work is kept in {workspace.folder}; go on with "
                f"`streamsoup soup --resume {workspace.destination.path}`."
            )
        else:
            workspace.remove()
        raise
    finally:
        workspace.release()
