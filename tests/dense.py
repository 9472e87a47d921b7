"""Merges of whole tensors in float64 with numpy, straight from the papers: what methods are compared with.

Every function takes arrays of one tensor, float64, and returns the merged tensor.
"""

from __future__ import annotations

import itertools

import numpy as np


def slerp(a, b, t):
    cosine = np.dot(a.ravel(), b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(a, b, t):
    cosine = np.dot(a.ravel(), b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b))
    if 1 - cosine**2 <= 1e-16:
        return (1 - t) * a + t * b
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def by_row(function, *tensors):
    if tensors[0].ndim < 2:
        return function(*tensors)
    return np.stack([function(*rows) for rows in zip(*tensors, strict=True)])


def multislerp(vectors, weights):
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - np.sum(u * mean) * mean) for w, u in zip(weights, units, strict=True))
    size = np.linalg.norm(tangent)
    on_sphere = np.cos(size) * mean + np.sin(size) * tangent / size if size else mean
    return on_sphere * sum(w * n for w, n in zip(weights, norms, strict=True))


def karcher(vectors, weights, steps=10, tolerance=1e-5):
    norms = [np.linalg.norm(v) for v in vectors]
    units = [v / n for v, n in zip(vectors, norms, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(steps):
        tangent = np.zeros_like(mean)
        for w, u in zip(weights, units, strict=True):
            cosine = np.clip(np.sum(mean * u), -1, 1)
            angle = np.arccos(cosine)
            if angle >= tolerance:
                tangent += w * angle / np.sin(angle) * (u - cosine * mean)
        size = np.linalg.norm(tangent)
        if size < tolerance:
            break
        mean = np.cos(size) * mean + np.sin(size) * tangent / size
        mean = mean / np.linalg.norm(mean)
    return mean * sum(w * n for w, n in zip(weights, norms, strict=True))


def distances_to(point, tensors):
    return np.array([np.linalg.norm(point - t) for t in tensors])


def model_stock(base, tensors, cosine):
    count = len(tensors)
    deltas = [t - base for t in tensors]
    if cosine == "pairs":
        found = np.mean(
            [np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in itertools.combinations(deltas, 2)]
        )
    else:
        found = np.mean([np.sum(a * b) for a, b in itertools.permutations(deltas, 2)])
        found /= np.mean([np.sum(d * d) for d in deltas])
    t = count * found / (1 + (count - 1) * found)
    return t * np.mean(tensors, axis=0) + (1 - t) * base


def keep_largest(delta, density):
    """Every element at least as large, in float32, as the k-th largest."""
    if density >= 1:
        return np.ones(delta.shape, bool)
    sizes = np.abs(delta).astype(np.float32)
    count = max(1, int(density * delta.size))
    return sizes >= np.sort(sizes.ravel())[-count]


def keep_middle(delta, density, gamma):
    sizes = np.abs(delta).astype(np.float32)
    kept = int(density * delta.size)
    lowest = max(0, delta.size - kept - int(gamma * delta.size))
    order = np.sort(sizes.ravel())
    return (sizes >= order[lowest]) & (sizes <= order[lowest + kept - 1])


def mix(base, deltas, weights, *, elect, normalize, scale=1.0):
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    if not elect:
        total = sum(weights) if normalize else 1.0
        return base + scale * sum(weighted) / total
    sign = np.where(sum(weighted) >= 0, 1, -1)
    mixed, divisor = np.zeros_like(base), np.zeros_like(base)
    for w, d in zip(weights, weighted, strict=True):
        agrees = np.sign(d) == sign
        mixed += np.where(agrees, d, 0)
        divisor += np.where(agrees, w, 0)
    return base + scale * (mixed / np.where(divisor == 0, 1, divisor) if normalize else mixed)


def sce(base, tensors, share):
    deltas = np.stack([t - base for t in tensors])
    if share < 1:
        variance = deltas.var(axis=0).astype(np.float32)
        chosen = int(np.count_nonzero(variance) * share)
        deltas = np.where((variance >= np.sort(variance.ravel())[-chosen]) & (variance > 0), deltas, 0)
    weights = (deltas**2).reshape(len(deltas), -1).sum(axis=1)
    weights = weights / weights.sum()
    sign = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    factors = np.stack([np.where(np.sign(d) == sign, w, 0) for d, w in zip(deltas, weights, strict=True)])
    return base + (deltas * factors).sum(axis=0) / np.maximum(factors.sum(axis=0), 1e-6)
