"""The files beside the weights: configuration, tokenizer, generation settings, of the first ingredient."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from streamsoup.dtypes import DType
from streamsoup.files import write_durably, writing_to

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
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
# What describes a training run or another soup, not the network.
_NOT_OURS = re.compile(
    r".*\.index\.json|trainer_state\.json|.*_results\.json|streamsoup\.json|decisions\.json|recipe\.ya?ml|\..*|requirements\.txt"
)
_NOT_FOLDERS = re.compile(r"checkpoint-.*|runs|logs|wandb|global_step.*|__pycache__|\..*")


def companion_files(folder: Path) -> Iterator[Path]:
    """Yield the files to copy, relative to the folder; also those of plain sub-folders such as ``1_Pooling``."""
    for entry in sorted(folder.iterdir()):
        if _is_companion(entry):
            yield entry.relative_to(folder)
        elif entry.is_dir() and not _NOT_FOLDERS.fullmatch(entry.name):
            inside = sorted(entry.iterdir())
            if not any(file.suffix in _WEIGHTS for file in inside):
                yield from (file.relative_to(folder) for file in inside if _is_companion(file))


def _is_companion(file: Path) -> bool:
    return file.is_file() and file.suffix in _SUFFIXES and not _NOT_OURS.fullmatch(file.name)


def copy_companions(source: Path, target: Path, *, dtype: DType | None) -> list[str]:
    """Copy them; with another output dtype, ``config.json`` names that one.

    Returns
    -------
    list of str
        The names of the files copied.
    """
    copied = []
    for name in companion_files(source):
        with writing_to(target / name):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)  # contents only: permissions follow the umask
        copied.append(str(name))
    config = target / "config.json"
    if dtype is not None and config.exists():
        _set_dtype(config, dtype)
    return copied


def _set_dtype(config: Path, dtype: DType) -> None:
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return  # not JSON after all: copied as it is
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(document, dict) and key in document]
    for key in keys:
        document[key] = dtype.torch_name
    if keys:
        write_durably(config, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
