"""What the ingredients are like: how large, how far apart, and where they disagree. One pass over their bytes.

Nearly all follows from the inner products of the first checkpoint (the base, if there is one) and of the differences of
the others from it, measured for each tensor in float64. They are folded into layers as they come: what is kept of a
tensor is a few numbers for each ingredient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.backends import open_backend
from streamsoup.budget import PeakSampler, default_budget_bytes
from streamsoup.checkpoints import (
    LeftOut,
    Opened,
    Opening,
    expand_paths,
    given_paths,
    open_together,
    prepare_derived,
    verify_unchanged,
)
from streamsoup.comparison_figures import Figures, Numbers, classical_map, other_lineages, plain
from streamsoup.comparison_gathering import Gathered, TensorFigures
from streamsoup.devices import choose_means
from streamsoup.dtypes import DTYPES
from streamsoup.engine import Engine
from streamsoup.errors import RecipeError
from streamsoup.execution import Execution, compile_notice
from streamsoup.labels import short_labels
from streamsoup.layers import layer_name
from streamsoup.manifest import content_digests
from streamsoup.measurement import held_bytes
from streamsoup.methods.looking import Looking
from streamsoup.outcome import Outcome, Progress
from streamsoup.plan import MOST_MEASURED, Plan
from streamsoup.planner import make_plan, tensor_bytes
from streamsoup.read import choose_mode, open_sources
from streamsoup.sinks import Nowhere
from streamsoup.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the ingredients are like.

    Attributes
    ----------
    ingredients : tuple of str
        Their paths.
    base : str or None
    parameters : int
        Float elements of an ingredient.
    whole : Figures
    layers : mapping of str to Figures
        In natural order. What belongs to no numbered layer goes by its module.
    tensors : TensorFigures
    differing_buffers : tuple of str
        Non-float tensors that are not the same in all ingredients.
    nonfinite : int64 array, shape (ingredients,)
        NaN and infinite elements.
    base_nonfinite : int
    content_digests : tuple of str
        As in a soup's manifest, one for each ingredient.
    twin_of : tuple of int or None
        The first ingredient with the same content, where that is another.
    is_base : tuple of bool
        Whether an ingredient has the content of the base.
    other_lineage : tuple of bool
        See `streamsoup.comparison_figures.other_lineages`.
    points : float64 array, shape (ingredients, 2), or with the base, last, (ingredients + 1, 2)
        See `streamsoup.comparison_figures.classical_map`.
    points_share : float
    bytes_read : int
    seconds, engine_seconds : float
        From the first header on, imports and compilation included; in which the bytes were gone through.
    projected_peak_bytes, measured_peak_bytes : int
        What the engine owned, above the level after imports and compilation.
    read_mode, device : str
    left_out : tuple of LeftOut
        Tensors that were not compared, with `only_shared`.
    """

    ingredients: tuple[str, ...]
    base: str | None
    parameters: int
    whole: Figures
    layers: Mapping[str, Figures]
    tensors: TensorFigures
    differing_buffers: tuple[str, ...]
    nonfinite: npt.NDArray[np.int64]
    base_nonfinite: int
    content_digests: tuple[str, ...]
    twin_of: tuple[int | None, ...]
    is_base: tuple[bool, ...]
    other_lineage: tuple[bool, ...]
    points: Numbers
    points_share: float
    bytes_read: int
    seconds: float
    engine_seconds: float
    projected_peak_bytes: int
    measured_peak_bytes: int
    read_mode: str
    device: str
    left_out: tuple[LeftOut, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the ingredients: the last parts of their paths that tell them apart."""
        return short_labels(self.ingredients)

    @property
    def identical_parameters(self) -> int:
        """Elements of tensors that are the same in all ingredients."""
        return int(self.tensors.elements[self.tensors.identical].sum())

    @property
    def gb_per_s(self) -> float:
        """Bytes gone through a second, in 10⁹."""
        return self.bytes_read / 1e9 / self.engine_seconds if self.engine_seconds else 0.0

    def remarks(self, ingredient: int) -> list[str]:
        """Say in words what stands out in one ingredient."""
        found = []
        twin = self.twin_of[ingredient]
        if twin is not None:
            found.append(f"identical to {self.labels[twin]}")
        if self.is_base[ingredient]:
            found.append("identical to the base")
        if self.other_lineage[ingredient]:
            found.append("looks like another lineage")
        if self.nonfinite[ingredient]:
            found.append("has NaN or infinity")
        return found

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """Plain data.

        Parameters
        ----------
        tensors : bool
            Every tensor, too.
        """
        figures = self.tensors
        return {
            "ingredients": [
                {
                    "path": path,
                    "label": self.labels[i],
                    "content_digest": self.content_digests[i],
                    "nonfinite_elements": int(self.nonfinite[i]),
                    "identical_to": None if (twin := self.twin_of[i]) is None else self.ingredients[twin],
                    "identical_to_base": self.is_base[i],
                    "other_lineage": self.other_lineage[i],
                    "remarks": self.remarks(i),
                }
                for i, path in enumerate(self.ingredients)
            ],
            "base": self.base,
            "base_nonfinite_elements": self.base_nonfinite,
            "differences_from": "base" if self.base is not None else "mean",
            "parameters": self.parameters,
            "whole": self.whole.to_json(),
            "layers": [{"name": name, **layer.to_json()} for name, layer in self.layers.items()],
            "identical_tensors": [n for n, same in zip(figures.names, figures.identical.tolist(), strict=True) if same],
            "identical_parameters": self.identical_parameters,
            "differing_buffers": list(self.differing_buffers),
            "map": {"points": plain(self.points), "share": self.points_share},
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "engine_seconds": self.engine_seconds,
            "gb_per_s": self.gb_per_s,
            "read_mode": self.read_mode,
            "device": self.device,
            "left_out": [left.to_json() for left in self.left_out],
            **({"tensors": figures.to_json()} if tensors else {}),
        }


def compare(
    ingredients: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    *,
    key: str | None = None,
    strip_prefix: str | Sequence[str] = (),
    rename: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    only_shared: bool = False,
    budget_bytes: int | str | None = None,
    device: str = "cpu",
    device_budget_bytes: int | str | None = None,
    workers: int | None = None,
    read_mode: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    on_compile: Callable[[], None] | None = None,
) -> Comparison:
    """Compare checkpoints, and see what a soup of them would be made of.

    Parameters
    ----------
    ingredients : path, pattern, or sequence of paths and patterns
        Two at least, of the same names and shapes; any sharding, any mix of float dtypes.
    base : path, optional
        What they were fine-tuned from. Differences are then taken from it, else from the mean of the ingredients.
    key, strip_prefix, rename, only_shared
        As in `streamsoup.soup`.
    budget_bytes : int or str, optional
        What the engine may own; by default a quarter of what is free, at most 2 GiB.
    device, device_budget_bytes, workers, read_mode, progress, on_compile
        See `Execution`; they change no bit of the result.

    Returns
    -------
    Comparison

    Raises
    ------
    StreamsoupError
        See `streamsoup.errors`.

    Notes
    -----
    Memory: at most `budget_bytes`, and the result. Each byte is read once.
    """
    began = time.perf_counter()
    given = given_paths(ingredients)
    paths = expand_paths(given)
    if len(paths) < 2:
        raise RecipeError(f"There is one ingredient to compare ({', '.join(paths)}); name another.")
    execution = Execution(
        budget_bytes=None if budget_bytes is None else parse_bytes(budget_bytes),
        device=device,
        device_budget_bytes=None if device_budget_bytes is None else parse_bytes(device_budget_bytes),
        workers=workers,
        read_mode=read_mode,
        progress=progress,
    )
    backend = open_backend(execution.device, execution.device_budget_bytes)
    opening = Opening(key, strip_prefix, rename, only_shared)  # type: ignore[arg-type]
    opened = open_together([*([] if base is None else [str(base)]), *paths], opening)
    checkpoints = opened.checkpoints
    plan, mode = _plan(opened, execution)
    codes = {DTYPES[i] for c in checkpoints for i in set(c.table.dtypes.tolist())}
    with compile_notice(on_compile):
        prepare_derived(checkpoints)
        backend.prepare(wide=False, fp8=any(d.is_fp8 for d in codes), surveyed=True)
    with PeakSampler() as sampler, open_sources(checkpoints, mode) as sources:
        gathered = Gathered(plan, based=base is not None)
        engine = Engine(plan, backend, sources, Nowhere(), progress=execution.progress)
        engine.run(plan.tiles(averaged=False))
        engine.measure(plan.tiles(averaged=True), dict.fromkeys(plan.averaged, gathered.measurement), keep=False)
        sampler.sample()
    for checkpoint in checkpoints:
        verify_unchanged(checkpoint)
    return _conclude(
        plan,
        gathered,
        engine.outcome,
        based=base is not None,
        seconds=time.perf_counter() - began,
        peak_bytes=sampler.peak_bytes,
        read_mode=mode,
        device=backend.name,
    )


def _plan(opened: Opened, execution: Execution) -> tuple[Plan, str]:
    checkpoints = opened.checkpoints
    mode = choose_mode(checkpoints, execution.read_mode)
    count, table = len(checkpoints), checkpoints[0].table
    layers = len(set(map(layer_name, table.names)))
    kept = 8 * (3 * count + 5) * len(table) + 2 * 8 * count * count * (layers + 1)
    plan = make_plan(
        checkpoints,
        Looking(count),
        budget_bytes=execution.budget_bytes or default_budget_bytes(),
        reserved_bytes=kept + MOST_MEASURED * held_bytes(count),
        touched=opened.touched,
        left_out=opened.left_out,
        **choose_means(execution.device, mode, execution.workers, tensor_bytes=tensor_bytes(checkpoints)),
    )
    return plan, mode


def _conclude(
    plan: Plan,
    gathered: Gathered,
    outcome: Outcome,
    *,
    based: bool,
    seconds: float,
    peak_bytes: int,
    read_mode: str,
    device: str,
) -> Comparison:
    """Draw the conclusions; `outcome` has the digests of tensors that are not floats."""
    first = int(based)
    everything = outcome.digests + gathered.digests
    contents = content_digests(plan, everything)
    own = contents[first:]
    twin_of = tuple(None if (twin := own.index(digest)) == i else twin for i, digest in enumerate(own))
    same = (everything[first:] == everything[first]).all(axis=0)
    buffers = [t for t in range(len(plan.table)) if not plan.is_averaged(t)]
    whole = gathered.whole
    odd = other_lineages(whole.distances, twin_of)
    points, share = classical_map(whole, odd)
    paths = tuple(c.path for c in plan.checkpoints)
    return Comparison(
        ingredients=paths[first:],
        base=paths[0] if first else None,
        parameters=plan.parameters,
        whole=whole,
        layers=gathered.layers,
        tensors=gathered.tensors(same),
        differing_buffers=tuple(plan.table.names[t] for t in buffers if not same[t]),
        nonfinite=gathered.nonfinite[first:],
        base_nonfinite=int(gathered.nonfinite[0]) if first else 0,
        content_digests=tuple(own),
        twin_of=twin_of,
        is_base=tuple(bool(first) and digest == contents[0] for digest in own),
        other_lineage=odd,
        points=points,
        points_share=share,
        bytes_read=outcome.bytes_read,
        seconds=seconds,
        engine_seconds=outcome.seconds,
        projected_peak_bytes=plan.projected_peak_bytes,
        measured_peak_bytes=peak_bytes,
        read_mode=read_mode,
        device=device,
        left_out=plan.left_out,
    )
