"""Tiny checkpoints, written as plain bytes: no library decides what a file may look like, so hostile ones are easy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "I16": np.int16,
        "U16": np.uint16,
        "I32": np.int32,
        "U32": np.uint32,
        "I64": np.int64,
        "U64": np.uint64,
        "C64": np.complex64,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
Tensors = Mapping[str, np.ndarray]


def dtype_name(array: np.ndarray) -> str:
    """Return the format's name of an array's dtype."""
    return _NAME_OF[array.dtype]


def bits(array: np.ndarray) -> np.ndarray:
    """View an array as unsigned integers, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))


def entry(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """One header entry."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def raw_file(header: bytes | str | Mapping[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """Bytes of a file with any header, right or wrong."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def file_bytes(tensors: Tensors, *, metadata: Mapping[str, str] | None = None, pad: int = 8) -> bytes:
    """Bytes of a valid file: tensors in the order given, the header padded to a multiple of `pad`."""
    document: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        document[name] = entry(dtype_name(array), array.shape, len(data), len(data) + len(raw))
        data += raw
    text = json.dumps(document).encode()
    return raw_file(text + b" " * (-len(text) % pad), data)


def write_checkpoint(
    where: Path,
    tensors: Tensors,
    *,
    shards: int | Iterable[Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    pad: int = 8,
    companions: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a checkpoint: a `.safetensors` path is one file, any other a folder.

    `shards` is a number (names dealt out in turn) or lists of names; with it come an index and numbered files.
    """
    where.parent.mkdir(parents=True, exist_ok=True)
    if where.suffix == ".safetensors":
        where.write_bytes(file_bytes(tensors, metadata=metadata, pad=pad))
        return where
    where.mkdir(exist_ok=True)
    if shards is None:
        (where / "model.safetensors").write_bytes(file_bytes(tensors, metadata=metadata, pad=pad))
    else:
        names = list(tensors)
        groups = [names[i::shards] for i in range(shards)] if isinstance(shards, int) else [list(s) for s in shards]
        files = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
        weight_map = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        for file, group in zip(files, groups, strict=True):
            part = {name: tensors[name] for name in group}
            (where / file).write_bytes(file_bytes(part, metadata=metadata, pad=pad))
        total = sum(a.nbytes for a in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (where / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, content in (companions or {}).items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return where


def write_sparse(path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> Path:
    """Write a file whose data are a hole: large, all zeros, and free of disk."""
    document, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        document[name] = entry(dtype, shape, end, end + size)
        end += size
    path.parent.mkdir(parents=True, exist_ok=True)
    head = raw_file(document)
    path.write_bytes(head)
    os.truncate(path, len(head) + end)
    return path


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Read a file back, by the format's page and nothing else."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    document = json.loads(raw[8:start])
    document.pop("__metadata__", None)
    found = {}
    for name, item in document.items():
        begin, end = item["data_offsets"]
        array = np.frombuffer(raw[start + begin : start + end], DTYPES[item["dtype"]])
        found[name] = array.reshape(item["shape"])
    return found


def read_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Read a checkpoint back, with or without an index."""
    if path.is_file():
        return read_file(path)
    found: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= read_file(file)
    return found


def weights_bytes(path: Path) -> dict[str, bytes]:
    """All weight files of a soup, byte for byte."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors*"))
    return {file.name: file.read_bytes() for file in files}


def same_bits(one: Tensors, other: Tensors) -> bool:
    """Whether two checkpoints hold the same names, dtypes, shapes and bytes."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].shape == other[n].shape and one[n].tobytes() == other[n].tobytes()
        for n in one
    )


def realistic(seed: int, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16", *, base: int = 0) -> dict:
    """Weights of one of many fine-tunes of one start: about 0.02 large, about 0.001 apart."""
    start, rng = np.random.default_rng(base), np.random.default_rng([base, seed, 1])
    tensors = {}
    for name, shape in shapes.items():
        values = start.standard_normal(shape) * 0.02 + rng.standard_normal(shape) * 1e-3
        tensors[name] = np.asarray(values).astype(DTYPES[dtype])
    return tensors


def any_bits(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Random bit patterns, so all exponents, subnormals and both zeros; what is not finite becomes zero."""
    kind = DTYPES[dtype]
    count = int(np.prod(shape, dtype=np.int64))
    raw = rng.integers(0, 256, count * kind.itemsize, dtype=np.uint8).view(kind).copy()
    with np.errstate(invalid="ignore"):  # signalling NaNs
        raw[~np.isfinite(raw.astype(np.float64))] = 0
    return raw.reshape(shape)


SHAPES = {"embed.weight": (61, 33), "layer.0.weight": (48, 70), "layer.0.bias": (70,), "norm.scale": (5,)}


def fine_tunes(folder: Path, count: int, *, dtype: str = "BF16", **options: Any) -> list[str]:
    """Write `run1` .. `runN`, alike but for their numbers, and return their paths."""
    return [str(write_checkpoint(folder / f"run{i + 1}", realistic(i, SHAPES, dtype), **options)) for i in range(count)]
