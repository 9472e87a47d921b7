"""Checkpoints as they lie on disk: which reader takes which file or folder."""

from __future__ import annotations

from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.checkpoints.safetensors import Parsed, open_safetensors
from streamsoup.checkpoints.torch_distributed import is_torch_distributed, open_torch_distributed
from streamsoup.checkpoints.torch_file import is_torch_file, open_torch_file
from streamsoup.errors import CheckpointError


def open_stored(path: str, parsed: Parsed | None = None, key: str | None = None) -> Checkpoint:
    """Open a file or folder of safetensors or of PyTorch; no tensor is read.

    Raises
    ------
    CheckpointError
    """
    if is_torch_distributed(path):
        return open_torch_distributed(path, key, parsed)
    if is_torch_file(path):
        return open_torch_file(path, key, parsed)
    if key is not None:
        raise CheckpointError(
            f"{path}: has no entries of which {key} could be one: only files of torch have. Leave --key out.", path=path
        )
    return open_safetensors(path, parsed)
