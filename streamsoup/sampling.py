"""Which elements of a soup to look at, where not all are: some of every tensor, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from streamsoup.plan import Plan
from streamsoup.tiling import BLOCK_ELEMENTS

Ranges = Mapping[int, list[tuple[int, int]]]
# Elements that are looked at in one place: reading fewer costs a disk as much.
PIECE_ELEMENTS = 64 * BLOCK_ELEMENTS


def choose_sample(plan: Plan, sample_bytes: int, seed: int) -> Ranges:
    """Choose elements: of each tensor as large a share as of the others, in pieces spread over it at random.

    Of tensors that a method must measure whole, whole ones are chosen at random instead.

    Parameters
    ----------
    plan : Plan
    sample_bytes : int
        Of the soup, in all. It may be exceeded by one block for each tensor.
    seed : int
        Decides where the pieces lie.

    Returns
    -------
    mapping of tensor to list of (start, elements)
        Not empty, sorted, without overlap.
    """
    elements = plan.table.elements
    itemsizes = np.array([plan.out_dtype(t).itemsize for t in range(len(elements))], np.int64)
    share = min(1.0, sample_bytes / max(1, int((elements * itemsizes).sum())))
    measures = plan.method.sweeps + plan.method.whole_sweeps > 1 or plan.method.by_row
    whole = set(plan.averaged) if measures else set()
    chosen = _whole_tensors(whole, elements * itemsizes, share, seed)
    found: dict[int, list[tuple[int, int]]] = {}
    for tensor, count in enumerate(elements.tolist()):
        if tensor in whole:
            pieces = [(0, count)] if tensor in chosen else []
        else:
            pieces = _pieces(count, share, np.random.default_rng((seed, tensor)))
        if count and pieces:
            found[tensor] = pieces
    return found


def _whole_tensors(tensors: set[int], sizes: npt.NDArray[np.int64], share: float, seed: int) -> set[int]:
    """Draw tensors until their share is reached, but for those too large for what is left; one at least."""
    names = sorted(t for t in tensors if sizes[t])
    left = share * float(sizes[names].sum())
    chosen = set()
    for tensor in np.random.default_rng(seed).permutation(names).tolist():
        if sizes[tensor] <= left:
            chosen.add(int(tensor))
            left -= float(sizes[tensor])
    return chosen or set(sorted(names, key=lambda t: (sizes[t], t))[:1])


def _pieces(count: int, share: float, draw: np.random.Generator) -> list[tuple[int, int]]:
    """Cut a tensor into equal stretches, and choose a place in each."""
    blocks = -(-count // BLOCK_ELEMENTS)
    wanted = -(-int(np.ceil(count * share)) // BLOCK_ELEMENTS)
    if wanted >= blocks:
        return [(0, count)]
    pieces = -(-wanted * BLOCK_ELEMENTS // PIECE_ELEMENTS)
    edges = np.arange(pieces + 1) * blocks // pieces
    sizes = np.minimum(np.diff(np.arange(pieces + 1) * wanted // pieces), np.diff(edges))
    starts = edges[:-1] + draw.integers(0, np.diff(edges) - sizes + 1)
    found = []
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        first = start * BLOCK_ELEMENTS
        found.append((first, min(size * BLOCK_ELEMENTS, count - first)))
    return found


def others(plan: Plan, sample: Ranges) -> Ranges:
    """Return all elements but those of a sample, in the shape that `Plan.tiles` takes for what is done."""
    found = {}
    for tensor, count in enumerate(plan.table.elements.tolist()):
        gaps, position = [], 0
        for start, length in sample.get(tensor, []):
            if start > position:
                gaps.append((position, start - position))
            position = start + length
        if position < count:
            gaps.append((position, count - position))
        found[tensor] = gaps
    return found
