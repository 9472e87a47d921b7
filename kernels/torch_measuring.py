"""What `measuring` does, in plain torch operations: the same bits on any device."""

import torch
from torch import Tensor

from .codes import BLOCK
from .measuring import BINS, ROUNDS, STRIP

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


def _strips(rows: Tensor) -> Tensor:
    """Add the elements of each block as `survey_products` does; shape (..., n) becomes (..., blocks)."""
    length = rows.shape[-1]
    rows = torch.nn.functional.pad(rows, (0, -length % BLOCK))
    steps = rows.reshape(*rows.shape[:-1], -1, BLOCK // STRIP, STRIP // 4, 4)
    sums = torch.zeros_like(steps[..., 0, :])
    for step in range(STRIP // 4):
        sums += steps[..., step, :]
    while (half := sums.shape[-2] // 2) > 0:
        sums = sums[..., :half, :] + sums[..., half:, :]
    lanes = sums[..., 0, :2] + sums[..., 0, 2:]
    return lanes[..., 0] + lanes[..., 1]


def survey(rows: Tensor, *, based: bool) -> Tensor:
    """See `measuring.survey`; of decoded rows, and without digests and counts of what is not finite."""
    first, compared = rows[0].clone(), rows[1:] if based else rows
    low, high = compared.amin(0), compared.amax(0)
    below, above = low < first, high > first
    counts = halves(torch.stack([low < high, below | above, below & above]).double())
    rows[1:] -= first
    products = torch.cat([_strips(rows[: k + 1] * rows[k]) for k in range(len(rows))])
    squares = products[[k * (k + 3) // 2 for k in range(len(rows))]]
    counts[:, ~squares.isfinite().all(0)] = 0.0
    return torch.cat([products, counts]).movedim(-1, 0).contiguous()


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
