"""Make checkpoints that look like fine-tunes of one network, near the speed of the disk.

    python benchmarks/synthetic.py vit-g-463m --ingredients 8 --dtype bf16 OUT

One block of normal values is made once; each tensor is a stretch of it, and each ingredient flips low mantissa bits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 22
ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}
NAMES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def vit(width: int, mlp: int, depth: int, patch: int = 14, tokens: int = 257, classes: int = 1000) -> Shapes:
    """Yield names and shapes of a vision transformer."""
    yield "patch_embed.proj.weight", (width, 3, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    yield "pos_embed", (1, tokens, width)
    for layer in range(depth):
        for name, shape in (
            ("norm1.weight", (width,)),
            ("norm1.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)),
            ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)),
            ("attn.proj.bias", (width,)),
            ("norm2.weight", (width,)),
            ("norm2.bias", (width,)),
            ("mlp.fc1.weight", (mlp, width)),
            ("mlp.fc1.bias", (mlp,)),
            ("mlp.fc2.weight", (width, mlp)),
            ("mlp.fc2.bias", (width,)),
        ):
            yield f"blocks.{layer}.{name}", shape
    yield "norm.weight", (width,)
    yield "norm.bias", (width,)
    yield "head.weight", (classes, width)
    yield "head.bias", (classes,)


PRESETS: dict[str, Callable[[], Shapes]] = {
    "vit-50m": lambda: vit(768, 3072, 7),
    # ViT-g's width and MLP, with 18 of its 40 layers and a head of 5,000 classes.
    "vit-g-463m": lambda: vit(1408, 6144, 18, classes=5000),
    "vit-g": lambda: vit(1664, 8192, 48),
    "one-tensor-8gb": lambda: iter([("weight", (1_000_000, 4000))]),
    "many-tensors": lambda: ((f"layers.{i}.expert.weight", (8, 16)) for i in range(50_000)),
    "small-20mb": lambda: vit(384, 1536, 5, classes=100),
}


def make_checkpoints(
    preset: str, folder: Path, *, ingredients: int, dtype: str = "bf16", shards: int = 1
) -> list[Path]:
    """Write checkpoints ``run00``, ``run01`` ... and return their folders.

    Parameters
    ----------
    preset : str
        A key of `PRESETS`.
    folder : Path
    ingredients : int
    dtype : {"bf16", "f16", "f32"}
    shards : int
        Files of each checkpoint.
    """
    tensors = list(PRESETS[preset]())
    total = sum(math.prod(shape) for _, shape in tensors) * ITEMSIZE[dtype] * ingredients
    folder.mkdir(parents=True, exist_ok=True)
    if total + 2**30 > shutil.disk_usage(folder).free:
        raise SystemExit(
            f"{folder}: {total / 1e9:.1f} GB are needed, {shutil.disk_usage(folder).free / 1e9:.1f} are free."
        )
    base = _base(dtype)
    paths = []
    for number in range(ingredients):
        path = folder / f"run{number:02d}"
        path.mkdir(exist_ok=True)
        noise = np.random.default_rng(number + 1).integers(0, 8, BLOCK, dtype=base.dtype)
        _write(path, tensors, base ^ noise, dtype, shards)
        paths.append(path)
    os.sync()  # the write-back of what was made must not disturb what is measured
    return paths


def _base(dtype: str) -> npt.NDArray[np.unsignedinteger]:
    normal = np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * np.float32(0.02)
    if dtype == "f32":
        return normal.view(np.uint32)
    if dtype == "f16":
        return normal.astype(np.float16).view(np.uint16)
    return (normal.view(np.uint32) >> 16).astype(np.uint16)


def _write(
    path: Path,
    tensors: list[tuple[str, tuple[int, ...]]],
    block: npt.NDArray[np.unsignedinteger],
    dtype: str,
    shards: int,
) -> None:
    parts = [tensors[i::shards] for i in range(shards)]
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    for name, part in zip(names, parts, strict=True):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor, shape in part:
            begin, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
            header[tensor] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        raw = memoryview(block).cast("B")
        with open(path / name, "wb", buffering=0) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            while end > 0:
                end -= file.write(raw[: min(end, len(raw))])
    if shards > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor, _ in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ingredients", type=int, default=8)
    parser.add_argument("--dtype", choices=ITEMSIZE, default="bf16")
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    paths = make_checkpoints(args.preset, args.out, ingredients=args.ingredients, dtype=args.dtype, shards=args.shards)
    print(f"{len(paths)} checkpoints in {args.out}")


if __name__ == "__main__":
    main()
