"""What `measuring` does, in plain torch operations: the same bits on any device."""

import torch
from torch import Tensor

from .codes import BLOCK
from .measuring import BINS, ROUNDS

__all__ = ["gram", "halves", "histograms", "survey", "uniform"]


def halves(rows: Tensor) -> Tensor:
    """Add the elements of each block by halves; shape (..., n) becomes (..., blocks)."""
    length = rows.shape[-1]
    blocks = -(-length // BLOCK)
    if length % BLOCK:
        rows = torch.nn.functional.pad(rows, (0, blocks * BLOCK - length))
    rows = rows.reshape(*rows.shape[:-1], blocks, BLOCK)
    while (half := rows.shape[-1] // 2) > 0:
        rows = rows[..., :half] + rows[..., half:]
    return rows[..., 0]


def gram(rows: Tensor, centre: int | None) -> Tensor:
    """See `measuring.gram`."""
    if centre is not None:
        rows = rows - rows[centre]
        rows[centre] = 0.0
    products = torch.stack([halves(rows * row) for row in rows])
    return products.movedim(-1, 0).contiguous()


def survey(rows: Tensor, *, based: bool) -> Tensor:
    """See `measuring.survey`; of decoded rows, and without digests and counts of what is not finite."""
    count = len(rows)
    rows[1:] -= rows[0].clone()
    others = rows[1:] if based else torch.cat([torch.zeros_like(rows[:1]), rows[1:]])
    low = torch.full_like(rows[0], float("inf") if based else 0.0)
    high = -low
    for row in others:
        low, high = torch.where(row < low, row, low), torch.where(row > high, row, high)
    below, above = low < 0, high > 0
    counts = halves(torch.stack([low < high, below | above, below & above]).double())
    products = [halves(rows[: k + 1] * rows[k]) for k in range(count)]
    return torch.cat([*products, counts]).movedim(-1, 0).contiguous()


def histograms(keys: Tensor, number: int, prefixes: Tensor) -> Tensor:
    """See `vector_machine.to_counts`; `prefixes` of dtype int64."""
    upper, low = ROUNDS[number]
    bits = keys.contiguous().view(torch.int32).long()
    out = torch.zeros((*prefixes.shape, BINS), dtype=torch.int64, device=keys.device)
    for r, row in enumerate(bits):
        for k in range(prefixes.shape[1]):
            chosen = row if number == 0 else row[(row >> upper) == prefixes[r, k]]
            out[r, k] = torch.bincount((chosen >> low) & ((1 << (upper - low)) - 1), minlength=BINS)
    return out


def uniform(keys: list[int], start: int, count: int, device: torch.device) -> Tensor:
    """SplitMix64, as the vector machine has it; torch shifts copies of the sign in, which are masked away."""

    def shifted(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    key = torch.tensor([_signed(k) for k in keys], dtype=torch.int64, device=device)[:, None]
    x = key + index * _signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    x = x ^ shifted(x, 31)
    return shifted(x, 11).double() * 2.0**-53


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
