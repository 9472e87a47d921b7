"""Which elements of a soup are the correctly rounded mean, on a sample; and which equal those of another soup."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.unsignedinteger[Any]]
Floats = npt.NDArray[np.float64]

SAMPLE = 2_000_000
CHECKED_EXACTLY = 20_000
_UNSIGNED = {"bf16": np.uint16, "f16": np.uint16, "f32": np.uint32}


def load_bits(folder: Path, dtype: str) -> dict[str, Bits]:
    """Map all tensors of a checkpoint, flat, as unsigned integers."""
    import torch
    from safetensors.torch import load_file

    expected = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    tensors: dict[str, Bits] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.dtype != expected:
                raise SystemExit(f"{name}: dtype {tensor.dtype} in the output, but {expected} in the checkpoints.")
            tensors[name] = tensor.flatten().view(torch.uint8).numpy().view(_UNSIGNED[dtype])
    return tensors


def decode(bits: Bits, dtype: str) -> Floats:
    """Values of bits, exactly."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.float16 if dtype == "f16" else np.float32).astype(np.float64)


def rounded(values: Floats, dtype: str) -> Bits:
    """Round float64 values once, to nearest, ties to even."""
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    single = values.astype(np.float32)
    if dtype == "f32":
        return single.view(np.uint32)
    # To odd first, so that the second rounding cannot see a tie that was none.
    wide = np.where(np.abs(single.astype(np.float64)) > np.abs(values), np.nextafter(single, np.float32(0)), single)
    odd = wide.view(np.uint32) | (wide.astype(np.float64) != values)
    return ((odd + np.uint32(0x7FFF) + ((odd >> 16) & 1)) >> 16).astype(np.uint16)


def correct_bits(inputs: Sequence[Bits], dtype: str) -> Bits:
    """Bits of the correctly rounded mean: by float64, and by rationals wherever float64 cannot decide."""
    values = np.stack([decode(bits, dtype) for bits in inputs])
    count = len(inputs)
    total = values[0]
    inexact = np.full(total.shape, count & (count - 1) != 0)  # the division is exact for powers of two
    for addend in values[1:]:
        before, total = total, total + addend
        inexact |= (before - (total - (total - before))) + (addend - (total - before)) != 0  # Knuth's two-sum
    mean = total / count
    slack = np.abs(values).sum(axis=0) * 2.0**-51
    undecided = inexact & (rounded(mean - slack, dtype) != rounded(mean + slack, dtype))
    bits = rounded(mean, dtype)
    places = np.flatnonzero(undecided)
    bits[places] = nearest(values[:, places], bits[places], dtype)
    return bits


def nearest(values: Floats, candidates: Bits, dtype: str) -> Bits:
    """Correct candidates by at most one place, with the exact mean of each column of values."""
    sign = 1 << (8 * candidates.dtype.itemsize - 1)
    found = candidates.copy()
    for column, candidate in enumerate(candidates.tolist()):
        mean = sum(map(Fraction, values[:, column].tolist()), Fraction(0)) / len(values)
        magnitude = candidate & (sign - 1)
        around = np.array([max(magnitude - 1, 0), magnitude, magnitude + 1], candidates.dtype)
        decoded = map(Fraction, decode(around, dtype).tolist())
        gaps = [(abs(abs(mean) - value), bits % 2, bits) for value, bits in zip(decoded, around.tolist(), strict=True)]
        negative = candidate & sign if mean == 0 else sign * (mean < 0)
        found[column] = min(gaps)[2] | negative
    return found


def shares_correct(
    ingredients: Sequence[Mapping[str, Bits]], outputs: Mapping[str, Mapping[str, Bits]], dtype: str
) -> dict[str, float]:
    """Share of correctly rounded elements of each output, on a sample of all tensors; the reference checks itself."""
    total = sum(bits.size for bits in ingredients[0].values())
    random = np.random.default_rng(0)
    right, sampled = dict.fromkeys(outputs, 0), 0
    for name, first in ingredients[0].items():
        wanted = math.ceil(SAMPLE * first.size / total)
        places = np.arange(first.size) if wanted >= first.size else np.sort(random.integers(0, first.size, wanted))
        inputs = [ingredient[name][places] for ingredient in ingredients]
        correct = correct_bits(inputs, dtype)
        some = random.integers(0, len(places), math.ceil(CHECKED_EXACTLY * first.size / total))
        exact = nearest(np.stack([decode(bits[some], dtype) for bits in inputs]), correct[some], dtype)
        if not np.array_equal(exact, correct[some]):
            raise SystemExit(f"{name}: the float64 reference is not the exact one. This is a bug of the benchmark.")
        for output, tensors in outputs.items():
            right[output] += int(np.count_nonzero(tensors[name][places] == correct))
        sampled += len(places)
    return {output: number / sampled for output, number in right.items()}


def share_equal(one: Mapping[str, Bits], other: Mapping[str, Bits]) -> float:
    """Share of equal elements, of all."""
    if one.keys() != other.keys():
        raise SystemExit(f"{next(iter(one.keys() ^ other.keys()))}: a tensor of one output, but not of the other.")
    equal = sum(int(np.count_nonzero(bits == other[name])) for name, bits in one.items())
    return equal / sum(bits.size for bits in one.values())
