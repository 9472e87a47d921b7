"""Combine a tile on a GPU in one launch: what `torch_combine.combine` does, with the same bits.

Triton is needed only where this is used; torch brings it along where it is built for CUDA.
"""

import logging
import os
import threading
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import torch_combine
from .codes import BF16, BLOCK, ITEMSIZE, PAIR

__all__ = ["ALIGNMENT", "LOCK", "aligned", "combine", "is_available", "table_of"]

ALIGNMENT = 16
"""Bytes that a source's address is a multiple of, or the source is copied first: two words are loaded at once."""

LOCK = threading.Lock()
"""Held while a kernel is launched: the interpreter has one place for its program's number, and what several threads
want is compiled once."""

_log = logging.getLogger(__name__)
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}


def is_available(device: torch.device) -> bool:
    """Tell whether `combine` runs as one kernel there: on NVIDIA GPUs since Ampere, and interpreted on the CPU.

    The first call for a GPU compiles and launches it, and logs why that failed.
    Triton's interpreter is on where TRITON_INTERPRET is 1, and was before triton was imported.
    """
    if not _is_installed():
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return device.type == "cpu"
    return device.type == "cuda" and torch.version.cuda is not None and _works(device)


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _works(device: torch.device) -> bool:
    """Try the kernel: Triton wants a C compiler and Python's headers when it launches something first."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        combine(
            [torch.zeros(2 * BLOCK, dtype=torch.uint8, device=device)] * 2,
            [BF16] * 2,
            [1.0] * 2,
            2.0,
            0,
            BF16,
            [True] * 2,
        )
    except Exception as error:  # whatever it is: the bits are the same without it
        _log.warning("%s: plain torch takes the place of the fused kernel, which cannot be used: %r", device, error)
        return False
    return True


def combine(
    sources: list[Tensor],
    codes: list[int],
    weights: list[float],
    divisor: float,
    first_block: int,
    out_code: int,
    hashed: list[bool],
    out: Tensor | None = None,
    *,
    single: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Σ weights[i]·source[i] / divisor of one tile, accumulated in float64 and rounded once.

    Nothing is waited for. Sources from the second on must share a dtype, which the first need not (it may be the sum
    of those before); any other mixture is left to `torch_combine`.

    Parameters
    ----------
    sources : list of Tensor, shape (elements * itemsize,), uint8
        The tile's bytes in every source, on one device; not changed. Copied where an address is not a multiple of
        ALIGNMENT.
    codes, weights, divisor, first_block, out_code, hashed
        As in `kernels.combine.combine`.
    out : Tensor, shape (elements * itemsize,), uint8, optional
        Changed: the result. It overlaps no source, or is exactly one of them with the same itemsize.
    single : bool
        Sum in float32, as `kernels.combine.combine_single`.

    Returns
    -------
    out : Tensor, shape (elements * itemsize,), uint8
    digests, nonfinite : Tensor, shape (N,), int64
        The digests' bits (unsigned, in an int64), and the counts of NaN and infinite elements.
    overflowed : Tensor, shape (), int64
        Output elements that are not finite although every source element there was.

    Notes
    -----
    Memory: 48 bytes a source, of which 24 are page-locked. All of it is allocated before `out` is changed: who runs out
    of memory may call again, also where `out` is a source.
    Each byte of a source is read once, each of the output written once. Source: own.
    """
    elements = sources[0].numel() // ITEMSIZE[codes[0]]
    if elements == 0 or PAIR in codes or any(one != other for one, other in pairwise(codes[1:])):
        made, *found = torch_combine.combine(
            sources, codes, weights, divisor, first_block, out_code, hashed, single=single
        )
        return made if out is None else out.copy_(made), found[0], found[1], found[2]
    device, n = sources[0].device, len(sources)
    size, blocks = ITEMSIZE[out_code], -(-elements // BLOCK)
    sources = aligned(sources)
    goal = out
    if goal is None or goal.data_ptr() % size or goal.storage_offset() % size:
        goal = torch.empty(elements * size, dtype=torch.uint8, device=device)
    counts = torch.zeros(n + 1, dtype=torch.int64, device=device)
    digests = torch.zeros(n, dtype=torch.int64, device=device)
    with LOCK, torch.cuda.device_of(goal):  # type: ignore[no-untyped-call]
        _kernel()[(blocks,)](
            table_of(sources, weights, divisor, elements, first_block, hashed),
            goal.view(_UNSIGNED[size]), counts, digests, n,
            FIRST=int(codes[0]), REST=int(codes[-1]), OUT=int(out_code),
            FIRST_HASHED=bool(hashed[0]), REST_HASHED=any(hashed[1:]), WHOLE=elements % BLOCK == 0,
            SINGLE=single,
            **_options(),
        )  # fmt: skip
    if out is None:
        out = goal
    elif out is not goal:
        out.copy_(goal)
    return out, digests, counts[1:], counts[0]


@cache
def _kernel() -> Any:
    from .triton_loops import combine_blocks

    return combine_blocks


@cache
def _options() -> dict[str, Any]:
    from .triton_loops import OPTIONS

    return OPTIONS


def aligned(sources: list[Tensor]) -> list[Tensor]:
    """Return sources whose addresses are multiples of ALIGNMENT: themselves, or copies."""
    return [raw.clone() if raw.data_ptr() % ALIGNMENT else raw for raw in sources]


def table_of(
    sources: list[Tensor], weights: list[float], divisor: float, elements: int, first_block: int, hashed: list[bool]
) -> Tensor:
    """Return the numbers that `triton_loops.combine_blocks` reads, on the device of the sources.

    Floats are passed as their bits, since Triton would round an argument to float32. Copied from page-locked memory,
    so that nothing waits; torch does not use that memory again before it was copied.
    """
    from .triton_loops import HEADER, ROW

    table = np.empty(HEADER + ROW * len(sources), np.int64)
    table[:HEADER] = elements, first_block, np.float64(divisor).view(np.int64), 0
    rows = table[HEADER:].reshape(-1, ROW)
    rows[:, 0] = [raw.data_ptr() for raw in sources]
    rows[:, 1] = np.array(weights, np.float64).view(np.int64)
    rows[:, 2] = hashed
    made = torch.from_numpy(table)
    device = sources[0].device
    return made if device.type == "cpu" else made.pin_memory().to(device, non_blocking=True)
