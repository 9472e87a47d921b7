"""A checkpoint or a soup as a mapping of tensors, each of which is made when it is asked for."""

from __future__ import annotations

import logging
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamsoup.backends import open_backend
from streamsoup.backends.protocol import Backend
from streamsoup.checkpoints import (
    LiveCheckpoint,
    expand_paths,
    identify,
    identity_to_json,
    is_state,
    live_name,
    open_live,
    pinned_path,
    prepare_derived,
    verify_unchanged,
)
from streamsoup.dtypes import DTYPES
from streamsoup.engine import Engine
from streamsoup.errors import RecipeError, StreamsoupError
from streamsoup.execution import Execution
from streamsoup.findings import check_copied, check_finite
from streamsoup.manifest import content_digests
from streamsoup.merging import copy_all, look_at_all, reduce_all, reduce_tensor
from streamsoup.methods import Method
from streamsoup.outcome import Outcome, Progress
from streamsoup.read import open_sources
from streamsoup.recipe import Recipe, make_recipe, read_recipe, with_pinned_ids
from streamsoup.saving import Origin, save_soup
from streamsoup.sinks import ModuleSink, PartSink, as_tensor, torch_dtype, wait_for_caller
from streamsoup.soup_plan import open_ingredients, plan_opened
from streamsoup.units import parse_bytes
from streamsoup.write import Sink

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)


def open(
    ingredients: Any,
    *,
    weights: Sequence[float] | None = None,
    coefficients: Sequence[float] | None = None,
    method: str | Method = "linear",
    base: Any = None,
    budget_bytes: int | str | None = None,
    device: str = "cpu",
    device_budget_bytes: int | str | None = None,
    workers: int | None = None,
    read_mode: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    backend: Backend | None = None,
    **options: Any,
) -> SoupView:
    """Open a checkpoint, or the soup of several, as a mapping of names to tensors. Headers alone are read for it.

    Parameters
    ----------
    ingredients : path, pattern, Recipe, recipe file, Checkpoint, module or dict of tensors, or a sequence of these
        As in `streamsoup.soup`. Also what is open already: a `Checkpoint`, or live tensors, which must then stay as
        they are for as long as the view is used. ``.yaml`` and ``.yml`` files are recipes.
    weights, coefficients, base
        As in `streamsoup.soup`.
    method : str or Method
        By name, or an object of your own: anything that satisfies `streamsoup.methods.Method`.
    budget_bytes, device, device_budget_bytes, workers, read_mode, progress
        See `Execution`.
    backend : Backend, optional
        A device of your own, instead of one by name: anything that satisfies `streamsoup.backends.protocol.Backend`.
    **options
        ``parameters``, ``importances``, ``include``, ``exclude``, ``key``, ``strip_prefix``, ``rename``,
        ``only_shared``, ``dtype``, ``quantize``, ``shard_size``, ``buffers``, ``nonfinite``, ``accumulate``: as in
        `streamsoup.soup`.

    Returns
    -------
    SoupView

    Raises
    ------
    StreamsoupError
    """
    execution = Execution(
        budget_bytes=None if budget_bytes is None else parse_bytes(budget_bytes),
        device=device,
        device_budget_bytes=None if device_budget_bytes is None else parse_bytes(device_budget_bytes),
        workers=workers,
        read_mode=read_mode,
        progress=progress,
    )
    if isinstance(ingredients, str | Path) and Path(ingredients).suffix in (".yaml", ".yml"):
        ingredients = read_recipe(ingredients)
    if isinstance(ingredients, Recipe):
        given = {"weights": weights, "coefficients": coefficients, "base": base, **options}
        if method != "linear" or (said := [name for name, value in given.items() if value is not None]):
            raise RecipeError(
                f"{said[0] if method == 'linear' else 'method'}: is the recipe's to say. Change the recipe."
            )
        return SoupView(with_pinned_ids(ingredients), execution, backend=backend)
    several = isinstance(ingredients, Sequence) and not isinstance(ingredients, str)
    named = _Named()
    paths = [named.name(one) for one in (ingredients if several else [ingredients])]
    if not named.opened and weights is None and coefficients is None:
        paths = expand_paths(paths)
    if "shard_size" in options:
        options["shard_bytes"] = parse_bytes(options.pop("shard_size"))
    options = {k: tuple(v) if k in ("include", "exclude") and not isinstance(v, str) else v for k, v in options.items()}
    own = None if isinstance(method, str) else method
    try:
        recipe = make_recipe(
            paths,
            weights=weights,
            coefficients=coefficients,
            method=method if own is None else "linear",
            base=None if base is None else named.name(base),
            **options,
        )
    except TypeError as error:
        raise RecipeError(f"{error}. See streamsoup.open for the options that there are.") from None
    return SoupView(recipe, execution, opened=named.opened, method=own, backend=backend)


class _Named:
    """Names of what is open already, for a recipe."""

    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}

    def name(self, given: Any) -> str:
        if isinstance(given, str | Path):
            return pinned_path(str(given))
        if is_state(given):
            live = open_live(given, live_name(len(self.opened) + 1))
            wait_for_caller(array for array in live.arrays if hasattr(array, "is_cuda"))
            given = live
        if not hasattr(given, "table"):
            raise RecipeError(
                f"A {type(given).__name__} is no ingredient. Give paths, Checkpoints, modules, or dicts of tensors."
            )
        self.opened[given.path] = given
        return str(given.path)


class SoupView(Mapping[str, "torch.Tensor"]):
    """A mapping of names to tensors, in the order of the first checkpoint; see `open`.

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


class TensorRows:
    """A tensor of a `SoupView` that is made when it is indexed, and as far as that.

    Integers and slices along the first axis read those rows; what comes behind them is applied to the rows that were
    made, as torch does. Any other index, and a method that must look at the whole tensor, makes all of it first.

    Attributes
    ----------
    shape : tuple of int
    dtype : torch.dtype
    """

    def __init__(self, view: SoupView, name: str) -> None:
        self.shape = view.shape(name)
        self._view = view
        self._name = name

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self._view.dtype(self._name)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{self._name}: has no rows, since it is a single number.")
        return self.shape[0]

    def __getitem__(self, index: Any) -> torch.Tensor:
        first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
        if not self.shape or isinstance(first, bool) or not (hasattr(first, "__index__") or isinstance(first, slice)):
            return self._view[self._name][index]
        if getattr(first, "ndim", 0):  # a tensor of one element passes for an integer
            return self._view[self._name][index]
        if isinstance(first, slice):
            wanted = range(*first.indices(self.shape[0]))
            if wanted.step < 0:
                raise ValueError(f"{self._name}: step {wanted.step}, but tensors take steps above zero only.")
            rows = self._view.rows(self._name, wanted.start, max(wanted.start, wanted[-1] + 1 if wanted else 0))
            return rows[(slice(None, None, wanted.step), *rest)]
        row = operator.index(first)
        if not -self.shape[0] <= row < self.shape[0]:
            raise IndexError(f"{self._name}: row {row} of {self.shape[0]}.")
        row %= self.shape[0]
        return self._view.rows(self._name, row, row + 1)[(0, *rest)]
