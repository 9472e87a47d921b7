"""Soups of adapters alone: one configuration is written for all, so theirs must agree; and what such a soup is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamsoup.checkpoints.adapter_config import CONFIG_NAME, config_beside, read_document
from streamsoup.checkpoints.live import LiveCheckpoint
from streamsoup.checkpoints.protocol import Checkpoint
from streamsoup.errors import MismatchError

# What the factors mean, with PEFT's defaults.
_DEFAULTS: dict[str, Any] = {
    "peft_type": None,
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "target_modules": None,
}
_NOTE = (
    "These are adapters: the average of their A and of their B is not the average of their products B·A. To average "
    "what they do to a base, give base+adapter for each."
)


def adapter_notes(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Return what a reader should know of a soup of these, if they are adapters and not bases with adapters.

    Raises
    ------
    MismatchError
        If their configurations do not agree in what the factors mean.
    CheckpointError
        If one cannot be read.
    """
    first = checkpoints[0]
    if len(checkpoints) < 2 or not _has_factors(first) or config_beside(str(first.folder or first.path)) is None:
        return ()
    path, expected = _settings(first)
    for other in checkpoints[1:]:
        if not _has_factors(other):  # a base with an adapter: its names will not fit
            continue
        beside, found = _settings(other)
        for key, value in expected.items():
            if found[key] != value:
                raise MismatchError(
                    [f"{beside}: {key} is {_shown(found[key])}, but {_shown(value)} in {path}."],
                    "One configuration is written for the soup, so give base+adapter for each instead.",
                )
    return (_NOTE,)


def _has_factors(checkpoint: Checkpoint) -> bool:
    if isinstance(checkpoint, LiveCheckpoint):  # no file lies beside it
        return False
    return any(".lora_A." in name or ".lora_embedding_A" in name for name in checkpoint.table.names)


def _settings(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    config = config_beside(str(checkpoint.folder or checkpoint.path))
    if config is None:
        raise MismatchError(
            [f"{checkpoint.path}: has no {CONFIG_NAME}, but other adapters have."], "Save the adapter again."
        )
    document, _ = read_document(config)
    return str(config), {key: _plain(document, key, default) for key, default in _DEFAULTS.items()}


def _plain(document: Mapping[str, Any], key: str, default: Any) -> Any:
    value = document.get(key, default)
    if isinstance(value, list):  # a set, which PEFT writes in any order
        return sorted(value, key=str)
    return default if value is None else value


def _shown(value: Any) -> str:
    return f"{value!r:.120}"
