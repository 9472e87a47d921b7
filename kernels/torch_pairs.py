"""Double-double arithmetic on torch tensors, operation by operation what `pairs` does; sources are named there."""

import torch
from torch import Tensor

__all__ = ["add_pairs", "divide_pairs", "round_scaled", "scale_of", "times", "to_odd"]


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def quick_two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    return s, b - (s - a)


def times(x: Tensor, w: float) -> tuple[Tensor, Tensor]:
    """Return x*w as a pair."""
    t = 134217729.0 * w
    w_high = t - (t - w)
    w_low = w - w_high
    p = x * w
    x_high = (x.view(torch.int64) & ~0x7FFFFFF).view(torch.float64)
    x_low = x - x_high
    a, a_error = two_sum(x_high * w_high - p, x_high * w_low)
    b, b_error = two_sum(a, x_low * w_high)
    return p, b + ((a_error + b_error) + x_low * w_low)


def add_pairs(a: Tensor, a_low: Tensor, b: Tensor, b_low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of two pairs."""
    s, e = two_sum(a, b)
    t, f = two_sum(a_low, b_low)
    s, e = quick_two_sum(s, e + t)
    return quick_two_sum(s, e + f)


def divide_pairs(a: Tensor, a_low: Tensor, by: Tensor, d: float, d_low: float) -> tuple[Tensor, Tensor]:
    """Return the quotient of the pairs (a, a_low) and (d, d_low); `by` is d as a tensor."""
    q1 = a / by
    p, e = times(q1, d)
    r, r_low = add_pairs(a, a_low, -p, -(e + q1 * d_low))
    q2 = r / by
    p, e = times(q2, d)
    r, r_low = add_pairs(r, r_low, -p, -(e + q2 * d_low))
    q3 = r / by
    q1, q2 = quick_two_sum(q1, q2)
    return add_pairs(q1, q2, q3, torch.zeros_like(q3))


def scale_of(largest: Tensor) -> Tensor:
    """Return the power of two that keeps products and sums in range."""
    scale = torch.where(largest > 2.0**500, 2.0**-512, torch.ones_like(largest))
    return torch.where(largest < 2.0**-500, 2.0**512, scale)


def to_odd(high: Tensor, low: Tensor) -> Tensor:
    """Round a pair to odd."""
    bits = high.view(torch.int64)
    step = torch.where((low > 0.0) == (high > 0.0), 1, -1)
    return torch.where((low != 0.0) & (bits & 1 == 0), bits + step, bits).view(torch.float64)


def round_scaled(high: Tensor, low: Tensor, scale: Tensor) -> Tensor:
    """Return the pair over `scale`, rounded once."""
    step = 2.0**-562
    large = torch.copysign(torch.full_like(high, 2.0**-510), high)
    s, e = two_sum(large, high)
    r = s - large
    r = torch.where((e == 0.5 * step) & (low > 0.0), r + step, r)
    r = torch.where((e == -0.5 * step) & (low < 0.0), r - step, r)
    small = torch.copysign(r * 2.0**-512, high)
    return torch.where((scale == 2.0**512) & (high.abs() < 2.0**-510), small, high / scale)
