"""Checkpoints written by torch itself, and what stands in the equal safetensors files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import DTYPES, dtype_name, read_checkpoint

import streamsoup
from streamsoup.checkpoints import Checkpoint, open_checkpoints
from streamsoup.checkpoints.torch_file import open_torch_file
from streamsoup.errors import CheckpointError
from streamsoup.read import open_sources

SHAPES = {"layers.0.w": (70, 300), "layers.1.w": (5, 7, 11), "layers.1.b": (300,), "empty": (0, 4), "one": ()}
TORCH = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH.items()}


def some_tensors(seed: int, dtype: str = "F32") -> dict[str, torch.Tensor]:
    """The tensors of a small fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(TORCH[dtype]) for name, shape in SHAPES.items()}


def some_strided(seed: int, dtype: str = "F32") -> dict[str, torch.Tensor]:
    """Tensors that do not lie in one piece, and one that does."""
    generator = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(TORCH[dtype])

    whole = new(40, 90)
    return {
        "whole": whole,
        "transposed": new(300, 70).t(),
        "permuted": new(9, 5, 13).permute(2, 0, 1),
        "expanded": new(1, 33).expand(17, 33),
        "scalar.expanded": new(1).squeeze(0).expand(6, 7),
        "every.third": new(10, 60)[:, 1::3],
        "left": whole[:, :37],
        "right": whole[3:, 37:],
        "channels.last": new(2, 3, 8, 8).to(memory_format=torch.channels_last),
        "diagonal": new(50, 50).diagonal(),
    }


def some_sharded(seed: int) -> dict[str, torch.Tensor]:
    """Tensors for two processes to cut up; one of them is too short for both."""
    shapes = {"rows": (40, 90), "uneven": (7, 3), "short": (1, 5), "columns": (60, 50), "deep": (3, 4, 6), "one": ()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def to_numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same tensors, in order, as a safetensors file has them."""
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().clone(memory_format=torch.contiguous_format)
        raw = plain.reshape(-1).view(torch.uint8).numpy() if plain.numel() else np.empty(0, np.uint8)
        found[name] = raw.view(DTYPES[_NAMES[tensor.dtype]]).reshape(tuple(tensor.shape))
    return found


def save(where: Path, what: Any, **options: Any) -> str:
    """Save with torch, in a folder that may not be there yet."""
    where.parent.mkdir(parents=True, exist_ok=True)
    torch.save(what, where, **options)
    return str(where)


def save_distributed(where: Path, what: Any) -> str:
    """Save with `torch.distributed.checkpoint`, as one process does."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(what, checkpoint_id=str(where))
    return str(where)


def open_one(path: Any) -> Checkpoint:
    """Open one ingredient."""
    return open_checkpoints([str(path)])[0]


def held(checkpoint: Checkpoint, mode: str = "map") -> dict[str, tuple]:
    """All tensors of a checkpoint, read through its source."""
    table, found = checkpoint.table, {}
    with open_sources([checkpoint], mode) as (source,):
        for position, name in enumerate(table.names):
            nbytes = int(table.nbytes[position])
            room = np.zeros(max(1, nbytes), np.uint8)
            if nbytes:
                source.fetch(position, 0, nbytes, room[:nbytes].data)
            found[name] = (table.dtype(position).name, table.shape(position), room[:nbytes].tobytes())
    return found


def expected(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple]:
    """What `held` has to return for tensors."""
    return {n: (dtype_name(a), a.shape, a.tobytes()) for n, a in to_numpy(tensors).items()}


def soup_of(tmp_path, paths, name, **options):
    streamsoup.soup([str(p) for p in paths], tmp_path / name, **options)
    return read_checkpoint(tmp_path / name)


def refused(path, match, kind=CheckpointError, **options):
    with pytest.raises(kind, match=match) as caught:
        open_torch_file(str(path), **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def sharded(folder, tensors, index=None):
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[:2], "pytorch_model-00002-of-00002.bin": names[2:]}
    for file, inside in files.items():
        save(folder / file, {name: tensors[name] for name in inside})
    weight_map = {name: file for file, inside in files.items() for name in inside} | (index or {})
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text('{"hidden_size": 3}')
    torch.save({"x": 1}, folder / "training_args.bin")
    return folder
