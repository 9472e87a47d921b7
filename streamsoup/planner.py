"""From ingredients, a method and a budget to a plan: pure functions that read nothing but headers.

Executing a plan cannot discover a missing tensor, an unequal shape or a file that does not fit: all that is
refused here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from streamsoup.align import align
from streamsoup.asked import Asked
from streamsoup.checkpoints import Checkpoint, DerivedCheckpoint, LeftOut, LiveCheckpoint, TensorTable, out_dtypes_of
from streamsoup.dtypes import DTYPES, parse_float_dtype
from streamsoup.errors import RecipeError
from streamsoup.layout import Layout, lay_out
from streamsoup.measurement import held_bytes
from streamsoup.methods import Method
from streamsoup.methods.protocol import TensorInfo
from streamsoup.plan import MOST_MEASURED, Plan
from streamsoup.recipe import DEFAULT_SHARD_BYTES
from streamsoup.tiling import BLOCK_ELEMENTS, READERS, TileNeeds, choose_tiling, piece_bytes, row_unit

# Of exponents of weights: within the first, double-double arithmetic was proved; beyond the second, a float32 has fewer
# bits, or none.
_MOST_WIDE, _MOST_SINGLE = 400, 126
_FLOAT = np.array([d.is_float for d in DTYPES])
_WIDE = np.array([d.is_wide for d in DTYPES])
_ITEMSIZE = np.array([d.itemsize for d in DTYPES], np.int64)


def make_plan(
    checkpoints: Sequence[Checkpoint],
    method: Method,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    file_name: str | None = None,
    out_dtypes: npt.NDArray[np.uint8] | None = None,
    layout: Layout | None = None,
    budget_bytes: int,
    workers: int,
    staged: bool,
    ahead: bool = False,
    locked: bool = False,
    readers: int = READERS,
    engines: int = 1,
    reserved_bytes: int = 0,
    buffer_itemsize: int = 0,
    touched: Sequence[tuple[str, int]] = (),
    accumulate: str = "float64",
    notes: Sequence[str] = (),
    left_out: Sequence[LeftOut] = (),
) -> Plan:
    """Plan a soup.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint
        The first gives names, order and (unless `dtype` is given) output dtypes.
    method : Method
    dtype : str, optional
        Float dtype of the output.
    shard_bytes : int
        Largest output shard.
    file_name : str, optional
        Write a single file of this name.
    out_dtypes : uint8 array, shape (tensors,), optional
        Output dtypes, instead of the first checkpoint's and `dtype`.
    layout : Layout, optional
        Of an earlier plan, instead of a new one.
    budget_bytes : int
        What the engine may own.
    workers : int
        Most threads.
    staged : bool
        Whether ingredients are read into buffers, though none of them is computed, or live and in pieces.
    ahead : bool
        Whether what is mapped is read ahead.
    locked : bool
        Whether a device reads the buffers.
    readers : int
        Most threads that bring bytes into buffers.
    engines : int
        Engines that use a device at the same time.
    reserved_bytes : int
        What of the budget is taken already.
    buffer_itemsize : int
        See `TileNeeds`; not needed where ingredients are read into buffers anyway.
    touched : sequence of (str, int)
        Rules by name, and how many tensors each fits.
    accumulate : {"float64", "float32"}
        In what sums are kept.
    notes : sequence of str
        What a reader of the soup should know of its ingredients.
    left_out : sequence of LeftOut
        Tensors of the checkpoints that do not get into the soup.

    Raises
    ------
    MismatchError, BudgetError, RecipeError

    Notes
    -----
    Memory: packed arrays, at most 64 bytes an ingredient and tensor.
    """
    alignment = align(checkpoints)
    table = alignment.table
    if out_dtypes is None:
        out_dtypes = out_dtypes_of(checkpoints[0], None if dtype is None else parse_float_dtype(dtype))
    if layout is None:
        metadata = {**checkpoints[0].metadata, "format": "pt"}
        layout = lay_out(table, out_dtypes, shard_bytes=shard_bytes, metadata=metadata, file_name=file_name)
    in_dtypes = {i for c in checkpoints for i in set(c.table.dtypes.tolist())}
    wide = any(DTYPES[i].is_wide for i in in_dtypes.union(out_dtypes.tolist()))
    derived = [c for c in checkpoints if isinstance(c, DerivedCheckpoint)]
    staged = staged or bool(derived) or any(isinstance(c, LiveCheckpoint) and c.needs_buffers for c in checkpoints)
    reserved_bytes += max((c.scratch_bytes for c in derived), default=0) * (workers + readers)
    held = _held_bytes(method, table, out_dtypes, len(checkpoints))
    needs = TileNeeds(
        ingredients=len(checkpoints),
        in_itemsize=int(_ITEMSIZE[list(in_dtypes)].max(initial=1)),
        out_itemsize=int(_ITEMSIZE[out_dtypes].max(initial=1)),
        staged=staged,
        ahead=ahead,
        reserved_bytes=reserved_bytes,
        buffer_itemsize=0 if staged else buffer_itemsize,
        largest_elements=int(table.elements.max(initial=0)),
        held_bytes=held,
        whole_tensors=method.sweeps > 1,
        least_elements=_least_elements(method, table, out_dtypes),
        groupable=not wide and method.fixed,
        wide=wide,
        locked=locked,
        readers=readers,
        engines=engines,
    )
    tiling = choose_tiling(needs, budget_bytes=budget_bytes, workers=workers)
    plan = Plan(
        tuple(checkpoints),
        method,
        alignment,
        out_dtypes,
        layout,
        needs,
        budget_bytes,
        tiling,
        staged,
        ahead,
        tuple(touched),
        accumulate,
        tuple(notes),
        tuple(left_out),
    )
    if accumulate == "float32":
        _refuse_single(plan)
        _refuse_extreme(plan, _MOST_SINGLE, "sums in float32")
    if wide:
        _refuse_extreme(plan, _MOST_WIDE, "float64 tensors")
    for tensor in plan.averaged:  # parameters that cannot be are told of now, not when the tensor comes
        if method.fixed:
            plan.numbers(tensor)
        else:
            Asked(method.merge(plan.info(tensor), None))
    return plan


def _held_bytes(method: Method, table: TensorTable, out_dtypes: npt.NDArray[np.uint8], checkpoints: int) -> int:
    """Bytes that a worker holds beside its tile: pieces, and measurements of the tensors that are under way."""
    if method.fixed:
        return 0
    measures = method.sweeps + method.whole_sweeps > 1
    widest = 0
    if method.by_row:
        infos = [TensorInfo("", table.shape(t)) for t in np.flatnonzero(_FLOAT[out_dtypes]).tolist()]
        widest = max((row_unit(t) if measures else t.width for t in infos), default=0)
    return piece_bytes(checkpoints, widest) + measures * (1 + MOST_MEASURED) * held_bytes(checkpoints)


def _least_elements(method: Method, table: TensorTable, out_dtypes: npt.NDArray[np.uint8]) -> int:
    if not method.by_row:
        return 0
    averaged = np.flatnonzero(_FLOAT[out_dtypes]).tolist()
    whole = -(-table.elements // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    return max((min(row_unit(TensorInfo("", table.shape(t))), int(whole[t])) for t in averaged), default=0)


def _refuse_single(plan: Plan) -> None:
    """Refuse sums in float32 where more was promised."""
    if not plan.method.fixed:
        raise RecipeError(
            "accumulate: only fixed coefficients of all tensors are summed in float32: no method that measures, no "
            f"include or exclude (here: {plan.method.name}). Leave accumulate out."
        )
    for checkpoint in plan.checkpoints:
        if (found := np.flatnonzero(_WIDE[checkpoint.table.dtypes])).size:
            raise RecipeError(
                f"{checkpoint.table.names[int(found[0])]}: is float64 in {checkpoint.path}, but sums were asked for in "
                "float32. Leave accumulate out."
            )
    if _WIDE[plan.out_dtypes].any():
        raise RecipeError("accumulate: a float64 soup is not summed in float32. Leave accumulate or dtype out.")


def _refuse_extreme(plan: Plan, most: int, what: str) -> None:
    """Refuse weights beyond 2^-most and 2^most, for which the arithmetic of `what` is not made."""
    previous = None
    checkpoints = plan.checkpoints
    for tensor in plan.averaged if plan.method.fixed else ():
        numbers = plan.numbers(tensor)
        if numbers is previous:  # mostly the same object for every tensor
            continue
        previous = numbers
        for number, where in [
            *((w, c.path) for w, c in zip(numbers.weights, checkpoints, strict=True)),
            (numbers.divisor[0], "their sum"),
        ]:
            if number and not 2.0**-most <= abs(number) <= 2.0**most:
                raise RecipeError(
                    f"{where}: weight {number:g}; with {what} they lie between 2^-{most} and 2^{most}. Scale them."
                )


def tensor_bytes(checkpoints: Sequence[Checkpoint]) -> float:
    """Bytes of an average tensor, in all of these checkpoints together."""
    table = checkpoints[0].table
    sizes = sum(float(_ITEMSIZE[c.table.dtypes].mean()) if len(c.table) else 0.0 for c in checkpoints)
    return sizes * float(table.elements.mean()) if len(table) else 0.0
