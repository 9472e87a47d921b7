"""Measure a tile on a GPU in one launch: what `torch_measuring.gram` does, with the same bits, from the bytes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import torch_combine, torch_measuring
from .codes import BLOCK, ITEMSIZE, PAIR
from .triton_combine import LOCK, aligned, table_of

__all__ = ["gram"]


@cache
def _kernel() -> tuple[Any, dict[str, Any]]:
    from .triton_loops import OPTIONS, gram_blocks

    return gram_blocks, OPTIONS


def gram(sources: list[Tensor], codes: list[int], centre: int | None) -> Tensor:
    """Return the inner products of sources, or of their differences from one, for each block of 2,048 elements.

    Nothing is waited for. Sources of several dtypes are left to `torch_measuring`.

    Parameters
    ----------
    sources : list of Tensor, shape (elements * itemsize,), uint8
        On one device where `triton_combine.is_available`; not changed. Copied where an address is not a multiple of
        `triton_combine.ALIGNMENT`.
    codes : list of int
    centre : int or None

    Returns
    -------
    Tensor, shape (ceil(elements / BLOCK), N, N), float64

    Notes
    -----
    Memory: the result, and 24 bytes a source that are page-locked. Each byte is read from memory once, and N / 2 times
    from cache. Source: own.
    """
    n, elements = len(sources), sources[0].numel() // ITEMSIZE[codes[0]]
    if elements == 0 or codes[0] == PAIR or len(set(codes)) > 1:
        rows = torch.stack([torch_combine.widen(raw, code) for raw, code in zip(sources, codes, strict=True)])
        return torch_measuring.gram(rows, centre)
    sources, blocks = aligned(sources), -(-elements // BLOCK)
    out = torch.empty((blocks, n, n), dtype=torch.float64, device=sources[0].device)
    kernel, options = _kernel()
    with LOCK, torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        kernel[(blocks * n,)](
            table_of(sources, [1.0] * n, 1.0, elements, 0, [False] * n), out, n, -1 if centre is None else centre,
            CODE=int(codes[0]), CENTRED=centre is not None, WHOLE=elements % BLOCK == 0, **options,
        )  # fmt: skip
    return out
