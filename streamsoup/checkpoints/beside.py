"""What lies beside weights and belongs to the network: configuration, tokenizer, generation settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from streamsoup.checkpoints.header import reading
from streamsoup.errors import CheckpointError

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"})
_SUFFIXES = {
    ".json",
    ".txt",
    ".model",
    ".py",
    ".jinja",
    ".tiktoken",
    ".vocab",
    ".bpe",
    ".spm",
    ".yaml",
    ".yml",
}
# What describes a training run or another soup, not the network.
_NOT_OURS = re.compile(
    r".*\.index\.json|trainer_state\.json|.*_results\.json|streamsoup\.json|decisions\.json|learned\.json|recipe\.ya?ml|\..*|requirements\.txt"
)
_NOT_FOLDERS = re.compile(r"checkpoint-.*|runs|logs|wandb|global_step.*|__pycache__|\..*")


# The largest have some 100 kB; parsed, JSON takes up to some 20 times its size.
_MAX_CONFIG_BYTES = 1 << 22


def read_config(path: Path) -> tuple[bytes, os.stat_result]:
    """Read a configuration, and say which file it was.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError
        If it is not there, cannot be read, or is larger than any configuration.
    """
    with reading(str(path), "a configuration") as (fd, stat), open(fd, "rb", closefd=False) as file:
        raw = file.read(_MAX_CONFIG_BYTES + 1)
    if len(raw) > _MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{path}: has {max(stat.st_size, len(raw)):,} bytes, but a configuration at most {_MAX_CONFIG_BYTES:,}. "
            "Take out what does not belong there.",
            path=str(path),
        )
    return raw, stat


def companion_names(files: Iterable[str]) -> Iterator[str]:
    """Choose those of a checkpoint's files that are to lie beside a soup.

    Parameters
    ----------
    files : iterable of str
        Names relative to the folder. What lies in plain sub-folders such as ``1_Pooling`` counts too, where there are
        no weights; what lies deeper does not.
    """
    paths = sorted(PurePosixPath(name) for name in files)
    with_weights = {path.parts[0] for path in paths if len(path.parts) == 2 and path.suffix in WEIGHTS}
    for path in paths:
        is_plain = len(path.parts) == 1 or (
            len(path.parts) == 2 and path.parts[0] not in with_weights and not _NOT_FOLDERS.fullmatch(path.parts[0])
        )
        if is_plain and path.suffix in _SUFFIXES and not _NOT_OURS.fullmatch(path.name):
            yield str(path)
