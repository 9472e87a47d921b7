"""The kernels in plain torch operations, on any device: the same bits as the compiled ones, counts and digests too.

Multiplication and addition are separate operations, so nothing is contracted into a fused multiply-add, and the
divisor is a tensor: on CUDA a division by a Python number multiplies by its reciprocal. Nothing here waits for the
device: what is found is returned as tensors.
"""

from functools import cache

import torch
from torch import Tensor

from .codes import (
    BF16,
    CANONICAL_NAN,
    F16,
    F32,
    F64,
    ITEMSIZE,
    NONFINITE_MASK,
    NONFINITE_VALUE,
    PAIR,
)
from .fp8 import FORMATS, decode
from .torch_digest import digest
from .torch_pairs import add_pairs, divide_pairs, round_scaled, scale_of, times, to_odd

__all__ = ["bad", "combine", "combine_wide", "digest", "encode", "widen"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_FLOATS = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32, F64: torch.float64, PAIR: torch.float64}
_INF = float("inf")


@cache
def _table(code: int, device: torch.device) -> Tensor:
    return torch.from_numpy(decode(code)).to(device)


def _typed(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """View bytes as `dtype`; bytes that are not aligned for it are copied."""
    if raw.data_ptr() % dtype.itemsize or raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype)


def widen(raw: Tensor, code: int) -> Tensor:
    """Return a tile of bytes as float64 (the high halves of a PAIR)."""
    if code in FORMATS:
        return _table(code, raw.device)[raw.long()]
    values = _typed(raw, _FLOATS[code])
    return values[::2] if code == PAIR else values.double()


def bad(raw: Tensor, code: int) -> Tensor:
    """Tell which elements are NaN or infinite."""
    bits = _typed(raw, _INTEGERS[ITEMSIZE[code]])
    if code == PAIR:
        bits = bits[::2]
    return (bits.long() & NONFINITE_MASK[code]) == NONFINITE_VALUE[code]


def _to_grid(q: Tensor, mantissa: int, smallest: float) -> Tensor:
    """Round float64 to a narrower format's grid, as `rounding.to_grid`."""
    power = (q.view(torch.int64) & 0x7FF0000000000000).view(torch.float64).clamp(smallest, 2.0**200)
    large = power * (1.5 * 2.0 ** (52 - mantissa))
    return torch.copysign((q + large) - large, q)


def _encode_f8(q: Tensor, code: int) -> Tensor:
    form = FORMATS[code]
    smallest = 2.0 ** (1 - form.bias)
    size = _to_grid(q, form.mantissa, smallest).abs()
    drop = 52 - form.mantissa
    base = int(torch.tensor(smallest, dtype=torch.float64).view(torch.int64)) >> drop
    below = size < smallest
    bits = (torch.where(below, size + smallest, size).view(torch.int64) >> drop) - base
    bits = torch.where(below, bits, bits + (1 << form.mantissa))
    sign = (q.view(torch.int64) >> 56) & 0x80
    signed = bits | sign
    if not form.signed_zero:
        signed = torch.where(bits == 0, bits, signed)
    top = form.infinity | sign if form.infinity != form.nan else torch.full_like(bits, form.nan)
    signed = torch.where(size > form.largest, top, signed)
    return torch.where(size.isnan(), form.nan, signed).to(torch.uint8)


def encode(q: Tensor, code: int) -> Tensor:
    """Round float64 once to `code` and return the bytes, NaNs canonical."""
    if code in FORMATS:
        return _encode_f8(q, code)
    if code == BF16:
        q = _to_grid(q, 7, 2.0**-126)
    elif code == F16:
        q = _to_grid(q, 10, 2.0**-14)
    out = q.to(_FLOATS[code]).contiguous()
    bits = out.view(_INTEGERS[out.element_size()]).masked_fill(out.isnan(), CANONICAL_NAN[code])
    return bits.view(torch.uint8)


def _inspect(
    sources: list[Tensor], codes: list[int], first_block: int, hashed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the digests, the counts of non-finite elements, and where any source has one."""
    device = sources[0].device
    digests, counts = (torch.zeros(len(sources), dtype=torch.int64, device=device) for _ in range(2))
    elements = sources[0].numel() // ITEMSIZE[codes[0]]
    marks = torch.zeros(elements, dtype=torch.bool, device=device)
    for k, (raw, code) in enumerate(zip(sources, codes, strict=True)):
        if hashed[k]:
            digests[k] = digest(raw, ITEMSIZE[code], first_block)
        found = bad(raw, code)
        counts[k] = found.sum()
        marks |= found
    return digests, counts, marks


def combine(
    sources: list[Tensor],
    codes: list[int],
    weights: list[float],
    divisor: float,
    first_block: int,
    out_code: int,
    hashed: list[bool],
    *,
    single: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Σ weights[i]·source[i] / divisor of one tile, accumulated in float64 and rounded once.

    Parameters
    ----------
    sources : list of Tensor, shape (elements * itemsize,), uint8
        The tile's bytes in every source, on one device; not changed.
    codes, weights, divisor, first_block, out_code, hashed
        As in `kernels.combine.combine`.
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
    Memory: about ten float64 tiles. Source: own.
    """
    digests, counts, marks = _inspect(sources, codes, first_block, hashed)
    real = torch.float32 if single else torch.float64
    total: Tensor | None = None
    for raw, code, weight in zip(sources, codes, torch.tensor(weights, dtype=torch.float64).to(real), strict=True):
        product = widen(raw, code).to(real) * weight.item()
        total = product if total is None else total + product
    if total is None:
        raise ValueError("combine: no sources; pass at least one")
    out = encode((total / torch.full_like(total, divisor)).double(), out_code)
    overflowed = (bad(out, out_code) & ~marks).sum()
    return out, digests, counts, overflowed


def combine_wide(
    sources: list[Tensor],
    codes: list[int],
    weights: list[float],
    divisor: float,
    divisor_low: float,
    first_block: int,
    out_code: int,
    hashed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `combine` does in double-double; see `kernels.combine.combine_wide`.

    Notes
    -----
    Memory: about twenty float64 tiles. Source: see `pairs`.
    """
    digests, counts, marks = _inspect(sources, codes, first_block, hashed)
    values = [widen(raw, code) for raw, code in zip(sources, codes, strict=True)]
    largest = values[0].abs()
    for value in values[1:]:
        largest = torch.fmax(largest, value.abs())
    scale = scale_of(largest)
    del largest
    plain = values[0] * weights[0]
    if codes[0] == PAIR:
        high, low = values[0] * scale, _typed(sources[0], torch.float64)[1::2] * scale
    else:
        high, low = times(values[0] * scale, weights[0])
    for value, weight in zip(values[1:], weights[1:], strict=True):
        high, low = add_pairs(high, low, *times(value * scale, weight))
        plain = plain + value * weight
    by = torch.full_like(high, divisor)
    q, q_low = divide_pairs(high, low, by, divisor, divisor_low)
    zero = high == 0.0
    q = torch.where(zero, torch.where(plain == 0.0, plain, 0.0) / by, q)
    q = torch.where(marks, plain / by, q)
    q_low = torch.where(zero | marks, 0.0, q_low)
    scale = torch.where(zero | marks, 1.0, scale)
    if out_code == PAIR:
        value = q / scale
        rest = torch.where(value.isfinite(), q_low / scale, 0.0)
        out = encode(torch.stack([value, rest], dim=1).reshape(-1), F64)
    elif out_code == F64:
        out = encode(round_scaled(q, q_low, scale), F64)
    else:
        out = encode(to_odd(q, q_low) / scale, out_code)
    overflowed = (bad(out, out_code) & ~marks).sum()
    return out, digests, counts, overflowed
