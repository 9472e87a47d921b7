"""The files beside the weights: configuration, tokenizer, generation settings, of the first ingredient."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import Checkpoint, DerivedCheckpoint
from streamsoup.checkpoints.beside import companion_names
from streamsoup.checkpoints.sliced import SlicedCheckpoint
from streamsoup.dtypes import DType, parse_float_dtype
from streamsoup.files import write_durably, writing_to

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def companion_files(folder: Path) -> Iterator[Path]:
    """Yield the files to copy, relative to the folder; also those of plain sub-folders such as ``1_Pooling``."""
    return map(Path, companion_names(_files_in(folder)))


def _files_in(folder: Path) -> Iterator[str]:
    """Yield the names of its files, and of those in its sub-folders."""
    for entry in folder.iterdir():
        inside = entry.iterdir() if entry.is_dir() else [entry]
        yield from (str(file.relative_to(folder)) for file in inside if file.is_file())


def copy_companions(checkpoint: Checkpoint, target: Path, *, dtype: str | None) -> list[str]:
    """Copy them, if the checkpoint is a folder, and make ``config.json`` agree with another dtype and picked layers.

    Parameters
    ----------
    checkpoint : Checkpoint
    target : Path
    dtype : str or None
        Of the output, where it was asked for.

    Returns
    -------
    list of str
        The names of the files copied.
    """
    source = checkpoint.folder
    if source is None:
        return []
    copied = []
    left_out = checkpoint.left_out if isinstance(checkpoint, DerivedCheckpoint) else frozenset()
    for name in companion_files(source):
        if str(name) in left_out:
            continue
        with writing_to(target / name):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)  # contents only: permissions follow the umask
        copied.append(str(name))
    config = target / "config.json"
    if config.exists():
        _correct(config, None if dtype is None else parse_float_dtype(dtype), checkpoint)
    return copied


def _beneath(checkpoint: Checkpoint) -> Checkpoint:
    """Return what has the layers of a checkpoint that is computed: a base, whatever is put on it."""
    while isinstance(checkpoint, DerivedCheckpoint):
        checkpoint = checkpoint.parts[0]
    return checkpoint


def copy_card(checkpoint: Checkpoint, target: Path) -> None:
    """Copy the model card, if there is one."""
    if checkpoint.folder is not None and (card := checkpoint.folder / "README.md").is_file():
        with writing_to(target / card.name):
            shutil.copyfile(card, target / card.name)


def _correct(config: Path, dtype: DType | None, checkpoint: Checkpoint) -> None:
    try:
        document = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return  # not JSON after all: copied as it is
    if not isinstance(document, dict):
        return
    right = checkpoint.configured(document) if isinstance(checkpoint, DerivedCheckpoint) else dict(document)
    if dtype is not None:
        right |= {key: dtype.torch_name for key in ("dtype", "torch_dtype") if key in right}
    stored = _beneath(checkpoint)
    if isinstance(stored, SlicedCheckpoint):
        right |= _with_layers(right, stored.layers, stored.layers_before)
    if right != document:
        write_durably(config, json.dumps(right, indent=2, ensure_ascii=False) + "\n")


def _with_layers(document: Mapping[str, Any], layers: Sequence[int], before: int) -> dict[str, Any]:
    """What a configuration says of its layers, for those that were picked."""
    changes: dict[str, Any] = {}
    for key, value in document.items():
        if key in _LAYER_COUNTS and value == before:
            changes[key] = len(layers)
        elif key == "layer_types" and isinstance(value, list) and len(value) == before:
            changes[key] = [value[layer] for layer in layers]
        elif key == "text_config" and isinstance(value, Mapping):
            changes[key] = {**value, **_with_layers(value, layers, before)}
    return changes
