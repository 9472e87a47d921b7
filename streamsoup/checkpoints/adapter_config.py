"""What the ``adapter_config.json`` of a PEFT adapter says of its factors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsoup.checkpoints.adapter_patterns import check_pattern, first_match
from streamsoup.checkpoints.beside import read_config
from streamsoup.checkpoints.protocol import Shard
from streamsoup.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
# What was decided for the training, or repeats what the tensors say.
_HARMLESS = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "peft_type",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"),
    *("lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
}
_SCALING = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights"}
# Other ways to begin take what they begin with out of the base's weights.
_BEGINNINGS = ("true", "false", "none", "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How the factors of an adapter are scaled.

    Attributes
    ----------
    path : str
    r : int
    lora_alpha : float
    use_rslora : bool
        Divide by the root of the rank.
    rank_pattern, alpha_pattern : mapping of str to number
        Instead of `r` and `lora_alpha`, for modules whose names end like a pattern; the first one that fits.
    fan_in_fan_out : bool
        Whether weights of linear modules are stored transposed, as those of GPT-2 are.
    """

    path: str
    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    fan_in_fan_out: bool

    def rank_of(self, module: str) -> int:
        """Rank of a module's factors."""
        return self.rank_pattern.get(first_match(self.rank_pattern, module, self.path), self.r)

    def scale_of(self, module: str) -> float:
        """What a module's product is multiplied by."""
        rank = self.rank_of(module)
        pattern = first_match(self.alpha_pattern, module, self.path)
        alpha = self.alpha_pattern.get(pattern, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def config_beside(path: str) -> Path | None:
    """Return the adapter_config.json of an adapter's folder or file; None: there is none."""
    folder = Path(path) if os.path.isdir(path) else Path(path).parent
    config = folder / CONFIG_NAME
    return config if config.is_file() else None


def read_document(path: Path) -> tuple[dict[str, Any], Shard]:
    """Read a configuration, and say which file it was: what it holds decides bits, so it belongs to the identity.

    Raises
    ------
    CheckpointError
    """
    raw, stat = read_config(path)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: is no JSON object. Save the adapter again.", path=str(path))
    return document, Shard(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, hashlib.sha256(raw).hexdigest())


def parse_config(document: Mapping[str, Any], path: str) -> AdapterConfig:
    """Check a configuration, and refuse what more than ``W + s·B·A`` would be needed for.

    Raises
    ------
    CheckpointError
    """
    kind = document.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {kind!r}, but only LORA adapters can be added to a base. Merge it with peft first.",
            path=path,
        )
    _refuse_other_kinds(document, path)
    beginning = document.get("init_lora_weights", True)
    if str(beginning).lower() not in _BEGINNINGS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {beginning!r}, which begins by changing the base. Save the adapter with "
            "path_initial_model_for_weight_conversion, or merge it with peft first.",
            path=path,
        )
    ranks = _patterns(document, "rank_pattern", path)
    return AdapterConfig(
        path=path,
        r=_whole(document.get("r", 8), "r", path),
        lora_alpha=_number(document.get("lora_alpha", 8), "lora_alpha", path),
        use_rslora=_flag(document, "use_rslora", path),
        rank_pattern={p: _whole(v, f"rank_pattern[{p!r}]", path) for p, v in ranks.items()},
        alpha_pattern={
            p: _number(v, f"alpha_pattern[{p!r}]", path) for p, v in _patterns(document, "alpha_pattern", path).items()
        },
        fan_in_fan_out=_flag(document, "fan_in_fan_out", path),
    )


def _refuse_other_kinds(document: Mapping[str, Any], path: str) -> None:
    for key, value in document.items():
        if value and key not in _HARMLESS and key not in _SCALING:
            what = "DoRA, whose weights are not W + s·B·A" if key == "use_dora" else f"{key}: {value!r}"
            raise CheckpointError(
                f"{path}: uses {what:.200}, which is not supported. Merge the adapter with peft first.", path=path
            )


def _patterns(document: Mapping[str, Any], key: str, path: str) -> Mapping[str, Any]:
    found = document.get(key) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: {key} is {found!r}, not an object of patterns. Correct it.", path=path)
    for pattern in found:
        try:
            check_pattern(pattern)
        except ValueError as error:
            raise CheckpointError(
                f"{path}: {key} has {pattern[:120]!r}, which {error}. Correct it.", path=path
            ) from None
    return found


def _whole(value: object, what: str, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {what} is {value!r}, not a whole number above zero. Correct it.", path=path)
    return value


def _number(value: object, what: str, path: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            if math.isfinite(number := float(value)):
                return number
        except OverflowError:
            pass
    raise CheckpointError(f"{path}: {what} is {value!r}, not a finite number. Correct it.", path=path)


def _flag(document: Mapping[str, Any], key: str, path: str) -> bool:
    value = document.get(key, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} is {value!r}, neither true nor false. Correct it.", path=path)
    return value
