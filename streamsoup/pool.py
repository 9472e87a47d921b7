"""Ingredients that are worked on together again and again: opened once, aligned with the first, one layout for all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.backends import open_backend
from streamsoup.backends.protocol import Backend
from streamsoup.budget import default_budget_bytes
from streamsoup.checkpoints import (
    Checkpoint,
    DerivedCheckpoint,
    LeftOut,
    Opened,
    Opening,
    adapter_notes,
    arranged_like,
    name_and_choose_like,
    notes_of,
    open_checkpoints,
    open_like,
    open_together,
    opening_of_some,
    prepare_derived,
)
from streamsoup.devices import check_device_budget, choose_means
from streamsoup.dtypes import DTYPES, PAIR, SUM32, SUM64, DType
from streamsoup.engine import Engine
from streamsoup.errors import RecipeError
from streamsoup.findings import check_copied, check_finite
from streamsoup.layout import Layout
from streamsoup.merging import reduce_all
from streamsoup.methods import Coefficients, Linear, Method
from streamsoup.methods.looking import Looking
from streamsoup.outcome import Outcome, Progress
from streamsoup.plan import Plan
from streamsoup.planner import make_plan, tensor_bytes
from streamsoup.read import choose_mode
from streamsoup.recipe import DEFAULT_SHARD_BYTES
from streamsoup.sinks import Nowhere
from streamsoup.source import Source
from streamsoup.units import parse_bytes
from streamsoup.write import Sink

_log = logging.getLogger(__name__)
SUM_DTYPES = ("float64", "float32")
SUM_PLACES = ("auto", "device", "host", "disk")


@dataclass(frozen=True)
class PoolOptions:
    """What all soups of a pool have in common; see `Recipe` and `Execution` for most.

    Attributes
    ----------
    sums_dtype : {"float64", "float32"}
        Of running sums; float32 halves them, and publishing then reads the kept ingredients again.
    sums : {"auto", "device", "host", "disk"}
        Where running sums are kept; ``auto``: on a GPU while they take at most half of its budget, else in memory while
        they take at most half of that.
    key, strip_prefix, rename, only_shared, leave_out
        How tensors are named and found, see `streamsoup.checkpoints.opening.Opening`.
    """

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    buffers: str = "identical"
    nonfinite: str = "error"
    sums_dtype: str = "float64"
    sums: str = "auto"
    budget_bytes: int | None = None
    device: str = "cpu"
    device_budget_bytes: int | None = None
    workers: int | None = None
    read_mode: str = "auto"
    key: str | None = None
    strip_prefix: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    only_shared: bool = False
    leave_out: tuple[str, ...] = ()

    @staticmethod
    def of(options: Mapping[str, Any]) -> PoolOptions:
        """Make a value of options as they were given.

        Raises
        ------
        RecipeError
            If one is unknown: what a soup alone may be asked for, such as `accumulate`, included.
        """
        if unknown := sorted(options.keys() - {one.name for one in fields(PoolOptions)}):
            raise RecipeError(f"{unknown[0]}: running sums have no such option. Leave it out.")
        return PoolOptions(**options)

    def __post_init__(self) -> None:
        self.opening.put_into(self)
        if self.workers is not None and self.workers < 1:
            raise RecipeError(f"workers: {self.workers} threads, but at least one is needed.")
        for name in ("budget_bytes", "device_budget_bytes", "shard_bytes"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_bytes(value))
        check_device_budget(self.device, self.device_budget_bytes)

    @property
    def opening(self) -> Opening:
        """How tensors are named and found."""
        return Opening.of(self)


@dataclass
class Pool:
    """Checkpoints of one network and the means to combine some of them.

    Parameters
    ----------
    paths : sequence of str or Checkpoint
        The first gives names, order, dtypes and configuration files. A `Checkpoint` is known by its `path` afterwards.
    options : PoolOptions

    Attributes
    ----------
    checkpoints : dict of str to Checkpoint
    backend : Backend
    budget_bytes : int
    shares : tuple of DeviceShare
        What all of them together take of each device's memory.
    notes : tuple of str
        What a reader of their soups should know.
    touched : tuple of (str, int)
        Rules by name, and how many tensors each touched.
    left_out : tuple of LeftOut
        Tensors of the checkpoints that get into no soup of the pool.
    """

    paths: Sequence[Any]
    options: PoolOptions = field(default_factory=PoolOptions)
    progress: Callable[[Progress], None] | None = None

    def __post_init__(self) -> None:
        if self.options.sums_dtype not in SUM_DTYPES:
            raise RecipeError(f"sums dtype {self.options.sums_dtype!r} is not one of {', '.join(SUM_DTYPES)}.")
        if self.options.sums not in SUM_PLACES:
            raise RecipeError(f"sums: {self.options.sums!r} is not one of {', '.join(SUM_PLACES)}.")
        if self.options.sums == "device" and self.options.device == "cpu":
            raise RecipeError("sums: the cpu has no memory but the host's. Give --sums host, or --device cuda.")
        self.backend: Backend = open_backend(self.options.device, self.options.device_budget_bytes)
        together = open_together(self.paths, self.options.opening)
        opened, self.touched = together.checkpoints, together.touched
        self.left_out: tuple[LeftOut, ...] = together.left_out
        self.notes = (*adapter_notes(opened), *notes_of(opened))
        for note in self.notes:
            _log.warning(note)
        objects = [given.path for given in self.paths if not isinstance(given, str)]
        self.paths = [given if isinstance(given, str) else given.path for given in self.paths]
        if twice := next((path for path in objects if self.paths.count(path) > 1), None):
            raise RecipeError(
                f"{twice}: several were given under this name. Give one live state, and open checkpoints with paths of "
                "their own."
            )
        # One layout serves all plans of the pool, whichever checkpoint comes first in them.
        self.checkpoints: dict[str, Checkpoint] = {
            path: arranged_like(checkpoint, opened[0]) for path, checkpoint in zip(self.paths, opened, strict=True)
        }
        self.mode = choose_mode(list(self.checkpoints.values()), self.options.read_mode)
        self.budget_bytes = self.options.budget_bytes or default_budget_bytes()
        self._whole = self._plan(
            list(self.checkpoints.values()), Linear("linear", Coefficients((1.0,) * len(self.paths)))
        )
        dtypes = {DTYPES[i] for c in self.checkpoints.values() for i in set(c.table.dtypes.tolist())}
        dtypes |= {DTYPES[i] for i in set(self.out_dtypes.tolist())}
        self.is_wide = any(d.is_wide for d in dtypes)
        self._is_fp8 = any(d.is_fp8 for d in dtypes)
        self._prepared = False
        self.shares = self.backend.shares(self._whole.tiling, self._whole.needs)

    @property
    def first(self) -> Checkpoint:
        """The checkpoint that gives names and configuration."""
        return self._whole.checkpoints[0]

    @property
    def out_dtypes(self) -> npt.NDArray[np.uint8]:
        """Output dtypes of all soups of the pool."""
        return self._whole.out_dtypes

    @property
    def layout(self) -> Layout:
        """Layout of all soups of the pool."""
        return self._whole.layout

    @cached_property
    def sum_dtype(self) -> DType:
        """Dtype of running sums: double-double where a dtype of the pool is float64."""
        if self.options.sums_dtype == "float32":
            return SUM32
        return PAIR if self.is_wide else SUM64

    @cached_property
    def averaged(self) -> npt.NDArray[np.bool_]:
        """Which tensors are averaged, shape (tensors,)."""
        return np.array([DTYPES[i].is_float for i in self.out_dtypes.tolist()], np.bool_)

    @cached_property
    def sum_dtypes(self) -> npt.NDArray[np.uint8]:
        """Dtypes of a running sum of all tensors; copied tensors keep theirs."""
        return np.where(self.averaged, np.uint8(self.sum_dtype.index), self.out_dtypes).astype(np.uint8)

    @cached_property
    def sum_bytes(self) -> int:
        """Bytes of one running sum."""
        return int(self.first.table.elements[self.averaged].sum()) * self.sum_dtype.itemsize

    @property
    def sum_fits(self) -> bool:
        """Whether a running sum is to be kept in memory, the host's or a device's."""
        return self.sum_place != "disk"

    @property
    def sum_place(self) -> str:
        """Where a running sum is to be kept: ``device``, ``host`` or ``disk``."""
        if self.options.sums != "auto":
            return self.options.sums
        if self.sum_bytes <= self.backend.bytes_to_hold and self.backend.bytes_to_hold:
            return "device"
        return "host" if self.sum_bytes <= self.budget_bytes // 2 else "disk"

    def open(self, path: str) -> Checkpoint:
        """Return a checkpoint of the pool, opening it if it is new.

        Raises
        ------
        RecipeError
            If the pool was made for other dtypes, or for files that are read another way.
        """
        if path not in self.checkpoints:
            opened = open_like(path, self.options.opening, self.first)
            self._enter(path, opened)
        return self.checkpoints[path]

    def opening_of(self, paths: Sequence[str]) -> Opening:
        """Say how some checkpoints of the pool are opened alone, with the names that they have here."""
        whole = self.options.opening
        raw = open_checkpoints(paths, Opening(key=whole.key))
        return opening_of_some(raw, whole, self.first.table.names)

    def enter(self, path: str, checkpoint: Checkpoint) -> None:
        """Make a checkpoint that is open one of the pool, under this name.

        Raises
        ------
        RecipeError
            If the pool was made for other dtypes, or for files that are read another way.
        CheckpointError, MismatchError
            If its names do not go with the pool's.
        """
        self._enter(path, name_and_choose_like(checkpoint, self.options.opening, self.first))

    def _enter(self, path: str, opened: Opened) -> None:
        (checkpoint,) = opened.checkpoints
        dtypes = [DTYPES[i] for i in set(checkpoint.table.dtypes.tolist())]
        mode = choose_mode([checkpoint], self.options.read_mode)
        wider = any(d.is_wide for d in dtypes) > self.is_wide
        if wider or (mode == "plain") > (self.mode == "plain"):
            what = "has float64 tensors" if wider else "lies on a network file system"
            raise RecipeError(f"{path}: {what}, unlike those named at first. Name it among the first, too.")
        is_new = isinstance(checkpoint, DerivedCheckpoint) or (any(d.is_fp8 for d in dtypes) and not self._is_fp8)
        self._prepared &= not is_new
        self._is_fp8 |= any(d.is_fp8 for d in dtypes)
        self.checkpoints[path] = arranged_like(checkpoint, self.first)
        self.left_out += tuple(one for one in opened.left_out if one not in self.left_out)

    def plan(
        self,
        checkpoints: Sequence[Checkpoint],
        numbers: Coefficients,
        *,
        to_sum: bool = False,
        reserved_bytes: int = 0,
        buffer_itemsize: int = 0,
        engines: int = 1,
    ) -> Plan:
        """Plan a combination of checkpoints (or of a running sum and checkpoints) into a soup or into a sum.

        `reserved_bytes`, `buffer_itemsize`: what of the budget a running sum takes, and its buffers; `engines`: how
        many use a device at the same time; see `TileNeeds`.
        """
        out_dtypes = self.sum_dtypes if to_sum else self.out_dtypes
        method = Linear("linear", numbers)
        return self._plan(checkpoints, method, out_dtypes, self.layout, reserved_bytes, buffer_itemsize, engines)

    def plan_to_measure(self, checkpoints: Sequence[Checkpoint], *, reserved_bytes: int = 0, engines: int = 1) -> Plan:
        """Plan to measure checkpoints (or something held, and checkpoints), and combine nothing."""
        method = Looking(len(checkpoints))
        return self._plan(checkpoints, method, self.out_dtypes, self.layout, reserved_bytes, engines=engines)

    def _plan(
        self,
        checkpoints: Sequence[Checkpoint],
        method: Method,
        out_dtypes: npt.NDArray[np.uint8] | None = None,
        layout: Layout | None = None,
        reserved_bytes: int = 0,
        buffer_itemsize: int = 0,
        engines: int = 1,
    ) -> Plan:
        options = self.options
        means = choose_means(options.device, self.mode, options.workers, tensor_bytes=tensor_bytes(checkpoints))
        # A running sum takes its copied tensors from a checkpoint that may be computed.
        means["staged"] |= any(isinstance(c, DerivedCheckpoint) for c in self.checkpoints.values())
        return make_plan(
            checkpoints,
            method,
            dtype=options.dtype,
            shard_bytes=options.shard_bytes,
            out_dtypes=out_dtypes,
            layout=layout,
            budget_bytes=self.budget_bytes,
            reserved_bytes=reserved_bytes,
            buffer_itemsize=buffer_itemsize,
            engines=engines,
            touched=self.touched,
            left_out=self.left_out,
            **means,
        )

    def prepare(self, *, measured: bool = False) -> None:
        """Import and compile what runs (and measurements) need."""
        if measured or not self._prepared:
            self.backend.prepare(wide=self.is_wide, fp8=self._is_fp8, measured=measured)
            prepare_derived(self.checkpoints.values())
            self._prepared = True

    def run_tensor(self, plan: Plan, sources: Sequence[Source], sink: Sink, tensor: int) -> Outcome:
        """Run the tiles of one tensor.

        Raises
        ------
        MismatchError, NonFiniteError
        """
        self.prepare()
        engine = Engine(plan, self.backend, sources, sink)
        engine.run(plan.tiles_of(tensor))
        check_copied(plan, engine.outcome, self.options.buffers)
        check_finite(plan, engine.outcome, self.options.nonfinite)
        return engine.outcome

    def compare_copied(self, plan: Plan, sources: Sequence[Source]) -> None:
        """Check the tensors that are only copied, and write nothing.

        Raises
        ------
        MismatchError
        """
        self.prepare()
        engine = Engine(plan, self.backend, sources, Nowhere())
        engine.run(plan.tiles(averaged=False))
        check_copied(plan, engine.outcome, self.options.buffers)

    def run(self, plan: Plan, sources: Sequence[Source], sink: Sink) -> Outcome:
        """Run a plan of this pool.

        Raises
        ------
        MismatchError, NonFiniteError
        """
        self.prepare()
        engine = Engine(plan, self.backend, sources, sink, progress=self.progress)
        engine.run(plan.tiles(averaged=False))
        check_copied(plan, engine.outcome, self.options.buffers)
        reduce_all(plan, engine)
        check_finite(plan, engine.outcome, self.options.nonfinite)
        return engine.outcome
