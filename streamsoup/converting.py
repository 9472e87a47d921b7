"""A checkpoint in another form: other shards, another dtype, or safetensors where it was something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamsoup.cook import soup
from streamsoup.execution import SoupResult


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    shard_size: int | str = "5GB",
    nonfinite: str | None = None,
    **making: Any,
) -> SoupResult:
    """Write a checkpoint as safetensors, in other shards or another dtype.

    It is the soup of one ingredient (method ``convert``), made the same way: under a budget, atomically, resumable.

    Parameters
    ----------
    source : path
        Anything that can be an ingredient.
    out : path
        A new folder, or a ``.safetensors`` file.
    dtype : str, optional
        Float dtype of the output, such as ``bfloat16``; what is not float keeps its dtype. Tensors whose dtype stays
        are copied bit for bit, NaN and all; others are rounded once, to nearest even.
    quantize : {"fp8-block"}, optional
        Write linear weights as 8-bit floats with a scale for each block, as of `soup`.
    shard_size : int or str
        Largest output shard.
    nonfinite : {"keep", "error", "warn", "allow"}, optional
        What to do, where a dtype changes, about NaN and infinity: by default they are kept and counted in one note, and
        numbers that are too large for the new dtype are refused; where weights are quantised, both are refused.
    **making
        `budget_bytes`, `device`, `workers`, `read_mode`, `overwrite`, `keep`, `restart`, `durable`, `distributed`,
        `progress`, as of `soup`.

    Returns
    -------
    SoupResult

    Raises
    ------
    StreamsoupError

    Notes
    -----
    Memory: at most `budget_bytes`. Each byte is read once.
    """
    return soup(
        str(source),
        out,
        method="convert",
        dtype=dtype,
        quantize=quantize,
        shard_size=shard_size,
        nonfinite=nonfinite or default_nonfinite(quantize),
        **making,
    )


def default_nonfinite(quantize: str | None) -> str:
    """Return what is done about NaN where nothing is asked for: one of them would spoil its whole block."""
    return "keep" if quantize is None else "error"
