"""Makes checkpoints that look like fine-tunes of one network, near the speed of the disk.

One block of normal values is made once; each tensor is a stretch of it, and each ingredient flips low mantissa bits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from streamsoup.bench.presets import PRESETS
from streamsoup.errors import RecipeError
from streamsoup.files import pwrite_all, require_space, writing_to

BLOCK = 1 << 22
ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}
_SPARE_BYTES = 1 << 30
_TURN_BYTES = 64 * 12_289
NAMES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def checkpoint_bytes(preset: str, dtype: str) -> int:
    """Bytes of the tensors of one checkpoint.

    Raises
    ------
    RecipeError
        If there is no such preset or dtype.
    """
    if preset not in PRESETS:
        raise RecipeError(f"preset {preset!r} is not one of {', '.join(PRESETS)}.")
    if dtype not in ITEMSIZE:
        raise RecipeError(f"dtype {dtype!r} is not one of {', '.join(ITEMSIZE)}.")
    return sum(math.prod(shape) for _, shape in PRESETS[preset]()) * ITEMSIZE[dtype]


def make_checkpoints(
    preset: str,
    folder: Path,
    *,
    ingredients: int,
    dtype: str = "bf16",
    shards: int = 1,
    made: Callable[[int], None] = lambda number: None,
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
    made : callable taking an int, optional
        Called with the number of checkpoints that are finished.

    Raises
    ------
    RecipeError, DiskSpaceError
    """
    total = checkpoint_bytes(preset, dtype) * ingredients
    tensors = list(PRESETS[preset]())
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, total + _SPARE_BYTES)
    base = _base(dtype)
    paths = []
    for number in range(ingredients):
        path = folder / f"run{number:02d}"
        path.mkdir(exist_ok=True)
        noise = np.random.default_rng(number + 1).integers(0, 8, BLOCK, dtype=base.dtype)
        _write(path, tensors, base ^ noise, dtype, shards)
        paths.append(path)
        made(number + 1)
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
        raw = block.view(np.uint8).data
        head = len(text).to_bytes(8, "little") + text
        with writing_to(path / name), open(path / name, "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, len(head) + end)
            pwrite_all(file.fileno(), memoryview(head), 0)
            for number, begin in enumerate(range(0, end, len(raw))):
                # Turned a little each time: disks that know repeated blocks must not look fast.
                turn = number * _TURN_BYTES % len(raw)
                stretch = bytes(raw[turn:]) + bytes(raw[:turn])
                pwrite_all(file.fileno(), memoryview(stretch)[: end - begin], len(head) + begin)
    if shards > 1:
        weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor, _ in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
