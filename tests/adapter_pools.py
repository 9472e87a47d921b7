"""Bases and PEFT adapters, written by hand, and what comes of them by plain loops over float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from factory import DTYPES, write_checkpoint

# Odd sizes: rows, panels and strips end anywhere.
SHAPES = {
    "embed.weight": (61, 33),
    "layers.0.q.weight": (48, 70),
    "layers.0.q.bias": (48,),
    "layers.0.k.weight": (48, 48),
    "layers.1.q.weight": (96, 2100),
    "conv.weight": (9, 5, 3, 3),
    "norm.weight": (48,),
    "head.weight": (7, 48),
}
TARGETS = ("embed", "layers.0.q", "layers.0.k", "layers.1.q", "conv")
PREFIX = "base_model.model."


def write_base(folder: Path, dtype: str = "BF16", *, seed: int = 0, **options: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors = {n: np.asarray(rng.standard_normal(s) * 0.02).astype(DTYPES[dtype]) for n, s in SHAPES.items()}
    tensors["ids"] = np.arange(5)
    write_checkpoint(folder, tensors, companions={"config.json": '{"dtype": "bfloat16"}'}, **options)
    return tensors


def factors(module: str, shape: tuple[int, ...], rank: int, rng: Any, dtype: str) -> dict[str, np.ndarray]:
    """A and B of a module by PEFT's names and shapes."""
    rows, columns = shape[0], shape[1:]
    kind = "lora_embedding_" if module == "embed" else "lora_"
    end = "" if module == "embed" else ".weight"
    a, b = ((rank, rows), (*columns, rank)) if module == "embed" else ((rank, *columns), (rows, rank))
    b = (*b, *(1,) * (len(shape) - 2))
    made = (np.asarray(rng.standard_normal(s) * 0.1).astype(DTYPES[dtype]) for s in (a, b))
    return {f"{PREFIX}{module}.{kind}{factor}{end}": array for factor, array in zip("AB", made, strict=True)}


def write_adapter(
    folder: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    dtype: str = "F32",
    targets: tuple[str, ...] = TARGETS,
    ranks: dict[str, int] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    **config: Any,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for module in targets:
        tensors |= factors(module, SHAPES[f"{module}.weight"], (ranks or {}).get(module, rank), rng, dtype)
    tensors |= extra or {}
    write_files(folder, tensors, {"r": rank, "lora_alpha": 6, **config})
    return tensors


def write_files(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    document = {"peft_type": "LORA", **config}
    write_checkpoint(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(document))


def low_rank(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """U·V in float64, products added one by one in the order of the rank."""
    u, v = u.astype(np.float64), v.astype(np.float64)
    total = u[:, :1] * v[:1]
    for k in range(1, u.shape[1]):
        total = total + u[:, k : k + 1] * v[k : k + 1]
    return total


def moved(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, *, transposed: bool = False) -> np.ndarray:
    """W + s·B·A, rounded once."""
    left, right = (a.T, b.T) if transposed else (b.reshape(len(b), -1), a.reshape(len(a), -1))
    out = np.float64 if weight.dtype == np.float64 else np.float32
    found = weight.astype(np.float64) + scale * low_rank(left, right).reshape(weight.shape)
    return found.astype(out)


def merged(
    base: dict[str, np.ndarray],
    adapter: dict[str, np.ndarray],
    scale: float = 1.5,
    *,
    scales: dict[str, float] | None = None,
    transposed: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
    """What the file of a base with an adapter on it would hold."""
    found = dict(base)
    names = [name.removeprefix(PREFIX) for name in adapter]
    for name in names:
        module, _, rest = name.partition(".lora_")
        if not rest:
            found[name] = adapter[PREFIX + name]
        elif rest.split(".")[0] in ("A", "embedding_A"):
            a, b = adapter[PREFIX + name], adapter[PREFIX + name.replace("_A", "_B")]
            flip = "embedding" in rest or module in transposed
            weight = found[f"{module}.weight"]
            found[f"{module}.weight"] = moved(weight, a, b, (scales or {}).get(module, scale), transposed=flip)
    return found
