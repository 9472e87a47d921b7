"""Recipes as YAML, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamsoup.errors import RecipeError


def read_yaml(path: Path) -> object:
    """Read a file.

    Raises
    ------
    RecipeError
        If it is missing, no YAML, or has a key twice.
    """
    import yaml

    try:
        document: object = yaml.load(path.read_text(encoding="utf-8"), Loader=_strict_loader())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file.") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path}: not a readable YAML file ({reason}).") from error
    return document


def _strict_loader() -> Any:
    """Make a loader that refuses a key that is there twice, instead of taking the last."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if isinstance(key, str) and keys.count(key) > 1:
                    raise yaml.YAMLError(f"the key {key!r} is there twice")
            return super().construct_mapping(node, deep)

    return StrictLoader
