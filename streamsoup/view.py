"""A checkpoint or a soup as a mapping of tensors, each of which is made when it is asked for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamsoup.backends import open_backend
from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import (
    LiveCheckpoint,
    identify,
    identity_to_json,
    prepare_derived,
    verify_unchanged,
)
from streamsoup.dtypes import DTYPES
from streamsoup.engine import Engine
from streamsoup.errors import StreamsoupError
from streamsoup.execution import Execution
from streamsoup.findings import check_copied, check_finite
from streamsoup.manifest import content_digests
from streamsoup.merging import copy_all, look_at_all, reduce_all, reduce_tensor
from streamsoup.methods import Method
from streamsoup.outcome import Outcome
from streamsoup.read import open_sources
from streamsoup.recipe import Recipe
from streamsoup.saving import Origin, save_soup
from streamsoup.sinks import ModuleSink, PartSink, as_tensor, torch_dtype
from streamsoup.soup_plan import open_ingredients, plan_opened
from streamsoup.tensor_rows import TensorRows
from streamsoup.write import Sink

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


class SoupView(Mapping[str, "torch.Tensor"]):
    """A mapping of names to tensors, in the order of the first checkpoint; see `streamsoup.open`.

    What is looked up is made at once: a fresh tensor with the bits and the dtype that ``streamsoup.soup`` would write.
    Names, shapes and dtypes are known without reading. Threads may share it: one tensor is made at a time, by several
    threads of the engine's own.

    Parameters
    ----------
    recipe : Recipe
    execution : Execution
    opened : mapping of path to Checkpoint, optional
        Ingredients that are open already.
    method : Method, optional
        Instead of the recipe's.
    backend : Backend, optional
        Instead of the execution's devices.

    Attributes
    ----------
    recipe : Recipe
    plan : Plan

    Notes
    -----
    Memory: the budget, and the tensors that were asked for. A lookup reads the bytes of its tensor once, and those of a
    method that looks at numbers first as often as it says; such a method as looks at the whole network does that at the
    first lookup.
    """

    def __init__(
        self,
        recipe: Recipe,
        execution: Execution,
        *,
        opened: Mapping[str, Any] | None = None,
        method: Method | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.recipe = recipe
        self.plan, settled = plan_opened(recipe, open_ingredients(recipe, opened or {}), None, execution, own=method)
        self._mode = settled.read_mode
        self._execution = execution
        self._own_method = method
        self._opened = dict(opened or {})
        self._backend = backend or open_backend(execution.device, execution.device_budget_bytes)
        self._backend.shares(self.plan.tiling, self.plan.needs)
        self._positions = self.plan.table.positions()
        self._known: object = None
        self._has_looked = not self.plan.method.whole_sweeps
        self._is_closed = False
        self._lock = threading.RLock()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._positions[name]
        return self._part(tensor, 0, int(self.plan.table.elements[tensor]), self.plan.table.shape(tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan.table.names)

    def __len__(self) -> int:
        return len(self.plan.table)

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<SoupView of {len(self.plan.checkpoints)} checkpoint(s), {len(self)} tensors>"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.plan.table.shape(self._positions[name])

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor.

        Raises
        ------
        UnsupportedDTypeError
            If torch has none.
        """
        return torch_dtype(self.plan, self._positions[name])

    def slice(self, name: str) -> TensorRows:
        """Return a tensor to be indexed: ``view.slice("w")[10:20, :]`` reads the bytes of those rows and no others."""
        return TensorRows(self, name)

    def load_into(self, module: torch.nn.Module, *, strict: bool = True) -> None:
        """Write all of it straight into the parameters and buffers of a live module; see `Candidate.load_into`.

        Raises
        ------
        StreamsoupError
        """
        self.stream(ModuleSink(module, self.plan, strict=strict))

    def stream(self, sink: Sink) -> Outcome:
        """Make all of it, tile by tile, into any sink.

        Raises
        ------
        StreamsoupError
        """
        plan = self.plan
        with self._engine(sink) as engine:
            copy_all(plan, engine)
            check_copied(plan, engine.outcome, self.recipe.buffers)
            reduce_all(plan, engine)
        return engine.outcome

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as a soup to keep: see `Candidate.save`. ``streamsoup.soup`` can be resumed, and this cannot.

        Raises
        ------
        StreamsoupError
        """
        notes: list[str] = []

        def fill(sink: Sink) -> Origin:
            outcome = self.stream(sink)
            notes.extend(self._notes(outcome))
            return self._origin(outcome, notes)

        return save_soup(
            out,
            self.plan,
            self.plan.checkpoints,
            fill,
            device=self._backend.name,
            dtype=self.recipe.dtype,
            overwrite=overwrite,
        )

    def _origin(self, outcome: Outcome, notes: Sequence[str]) -> Origin:
        plan = self.plan
        live = [c.path for c in plan.checkpoints if isinstance(c, LiveCheckpoint)]
        own = self._own_method
        more = [f"{path}: its numbers are kept nowhere but in this soup." for path in live]
        more += [] if own is None else [f"Combined by {own!r}, a method that no recipe names."]
        return Origin(
            self.recipe,
            [identity_to_json(identify(checkpoint)) for checkpoint in plan.checkpoints],
            content_digests(plan, outcome.digests),
            (*plan.notes, *notes, *more),
            is_repeatable=own is None and not self._opened,
            method=None if own is None else own.name,
        )

    def close(self) -> None:
        """Make no more tensors; those that were made are not touched."""
        self._is_closed = True

    def __enter__(self) -> SoupView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _part(self, tensor: int, start: int, stop: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Make the elements from `start` to `stop` of a tensor."""
        plan = self.plan
        torch_dtype(plan, tensor)  # before anything is read
        itemsize = plan.out_dtype(tensor).itemsize
        sink = PartSink(start * itemsize, (stop - start) * itemsize)
        whole = int(plan.table.elements[tensor])
        with self._engine(sink) as engine:
            reduce_tensor(plan, engine, tensor, others=[(0, start), (stop, whole - stop)])
        return as_tensor(plan, tensor, sink.array, shape)

    @contextmanager
    def _engine(self, sink: Sink) -> Iterator[Engine]:
        """Lend an engine for some work, and check what it found."""
        plan = self.plan
        with self._lock:
            if self._is_closed:
                raise StreamsoupError("This view of a soup is closed. Open it again.")
            dtypes = [DTYPES[i] for i in {*np.unique(plan.in_dtypes).tolist(), *np.unique(plan.out_dtypes).tolist()}]
            self._backend.prepare(
                wide=any(d.is_wide for d in dtypes), fp8=any(d.is_fp8 for d in dtypes), measured=not plan.method.fixed
            )
            prepare_derived(plan.checkpoints)
            with open_sources(plan.checkpoints, self._mode) as sources:
                engine = Engine(plan, self._backend, sources, sink, progress=self._execution.progress)
                if not self._has_looked:
                    look_at_all(plan, engine)
                    self._known, self._has_looked = engine.work.known, True
                engine.work.known = self._known
                yield engine
            for checkpoint in plan.checkpoints:
                verify_unchanged(checkpoint)
        for note in self._notes(engine.outcome):
            _log.warning(note)

    def _notes(self, outcome: Outcome) -> list[str]:
        """Refuse what is not to be let through, and say what was."""
        notes = check_copied(self.plan, outcome, self.recipe.buffers)
        return notes + check_finite(self.plan, outcome, self.recipe.nonfinite)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Make some rows of a tensor, shape (stop - start, ...).

        Raises
        ------
        StreamsoupError
        """
        tensor = self._positions[name]
        shape = self.plan.table.shape(tensor)
        if not self.plan.is_averaged(tensor) or self.plan.method.fixed:
            width = int(self.plan.table.elements[tensor]) // max(1, shape[0])
            return self._part(tensor, start * width, stop * width, (stop - start, *shape[1:]))
        return self[name][start:stop]  # what is measured of a tensor depends on all of it
