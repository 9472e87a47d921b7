"""Which of the tensors in a file of nested mappings are the model's, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from streamsoup.checkpoints.pickled import Made, Named
from streamsoup.errors import CheckpointError

# What training code calls the model, where it saves more than that.
_STATES = ("state_dict", "model_state_dict", "model_state", "ema_state_dict", "state_dict_ema")
_HOLDERS = ("app",)  # of the model and more, where applications of DCP save themselves
_MODELS = (
    *_STATES, *_HOLDERS, "model", "module", "net", "network", "params", "weights", "ema", "ema_model", "model_ema",
    "params_ema",
)  # fmt: skip
# What may lie beside the model and hold tensors: the state of training. All else there may be a part of the model.
_TRAINING = re.compile(
    r"(?:\w*_)?(?:optim(?:i[sz]ers?)?(?:_\w+)?|opt(?:_states?)?|sched(?:ulers?)?(?:_\w+)?|callbacks?(?:_states?)?|loops"
    r"|rngs?(?:_\w+)?|random_states?(?:_\w+)?|(?:grad_?)?scaler(?:_state(?:_dict)?)?|amp(?:_state)?|scaling_state)"
)
_MEASURED = re.compile(
    r"(?:\w*_)?(?:loss(?:es)?|best|acc(?:uracy|uracies)?|scores?|metrics?|epochs?|steps?|iter(?:ation)?s?|lrs?|seed)"
    r"|(?:rng|random)_?\w*"
)
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel, of torch.compile
_SCALARS = (type(None), bool, int, float, str, bytes)
_MAX_DEPTH = 64
_MAX_NODES = 1 << 22
_MAX_NAMES_BYTES = 1 << 27
_LONGEST_LIST = 8
_LONGEST_KEY = 80
IsTensor = Callable[[Any], bool]
Look = Callable[[Any], Any]


def model_tensors(
    top: Any, key: str | None, path: str, is_tensor: IsTensor, look: Look = lambda value: value
) -> dict[str, Any]:
    """Find the model in what a file holds.

    Parameters
    ----------
    top : object
        Nested mappings, with tensors in them.
    key : str or None
        Where the model is: keys with dots between them; ``.`` is all. None: at the top, or under one of the usual
        keys if there is only one of them.
    path : str
        For messages.
    is_tensor : callable
    look : callable, optional
        Of what is among the model's tensors and is none: what it is, where that has to be read first.

    Returns
    -------
    dict of str to object
        Tensors by name; names of nested mappings are joined with dots. What is put before all names by
        DistributedDataParallel or torch.compile is left out.

    Raises
    ------
    CheckpointError
        If it is not clear which, if there are none, or if something there may be a tensor and cannot be read.
    """
    if not isinstance(top, Mapping):
        what = f"one object ({top.name})" if isinstance(top, Made) else f"one {type(top).__name__}"
        raise CheckpointError(
            f"{path}: holds {what}, not a mapping of names to tensors. Save the model's state_dict().", path=path
        )
    chosen = _choose(top, path, is_tensor) if key is None else _follow(top, key, path)
    found: dict[str, Any] = {}
    length = 0
    for name, value in _walk(chosen, path, is_tensor, look):
        length += len(name)
        if length > _MAX_NAMES_BYTES:
            raise CheckpointError(f"{path}: its tensors have names of megabytes. Export it again.", path=path)
        if name in found:
            raise CheckpointError(f"{name}: stands for two tensors in {path}. Rename one of them.", path=path)
        found[name] = value
    if not found:
        raise CheckpointError(f"{path}: holds no tensors{f' under {key}' if key else ''}.{_advice(top)}", path=path)
    return found


def unwrapped(names: list[str]) -> list[str]:
    """Leave out what DistributedDataParallel and torch.compile put before all names."""
    while any(all(name.startswith(wrapper) and name != wrapper for name in names) for wrapper in _WRAPPERS):
        names = [name.partition(".")[2] for name in names]
    return names


def _follow(top: Mapping[Any, Any], key: str, path: str) -> Mapping[Any, Any]:
    if key == ".":
        return top
    at: Any = top
    rest = key
    while rest:
        # Keys may have dots themselves: the longest that fits.
        keys = [k for k in at if isinstance(k, str)] if isinstance(at, Mapping) else []
        fitting = [k for k in keys if f"{rest}.".startswith(f"{k}.")]
        if not fitting:
            raise CheckpointError(f"{path}: has nothing under key {key!r}.{_advice(top)}", path=path)
        step = max(fitting, key=len)
        at, rest = at[step], rest[len(step) + 1 :]
    if not isinstance(at, Mapping):
        what = f"an object ({at.name})" if isinstance(at, Made) else f"a {type(at).__name__}"
        raise CheckpointError(
            f"{path}: holds {what} under key {key!r}, not a mapping of names to tensors.{_advice(top)}", path=path
        )
    return at


def _choose(top: Mapping[Any, Any], path: str, is_tensor: IsTensor) -> Mapping[Any, Any]:
    at = top
    steps: list[str] = []
    for _ in range(_MAX_DEPTH):
        own = [k for k, v in at.items() if is_tensor(v)]
        holders = [k for k, v in at.items() if not is_tensor(v) and _holds_tensors(v, is_tensor, set())]
        inside = [k for k in holders if isinstance(at[k], Mapping)]
        if own and not inside:
            return at
        models = [k for k in inside if k in _MODELS]
        if not steps or steps[-1] in _HOLDERS:
            loose = [k for k in own if not models or not _is_of_training(k, at[k])]
            others = [k for k in holders if k not in models and (not models or not _is_of_training(k, at[k]))]
            if len(models) != 1 or loose or others:
                raise CheckpointError(_unclear(at, steps, loose, [*models, *others], path), path=path)
        elif own or inside != holders or models != inside or models[0] not in _STATES or len(models) > 1:
            return at  # a model with blocks, whose names belong to those of the tensors
        steps.append(models[0])
        at = at[models[0]]
    raise CheckpointError(f"{path}: is nested too deeply. Say where the model is with --key.", path=path)


def _is_of_training(key: Any, value: Any) -> bool:
    """Whether something beside the model is the state of training, by its name."""
    if not isinstance(key, str):
        return False
    return bool(_TRAINING.fullmatch(key) or (not isinstance(value, Mapping) and _MEASURED.fullmatch(key)))


def _unclear(at: Mapping[Any, Any], steps: list[str], own: list[Any], holders: list[Any], path: str) -> str:
    where = f"under {'.'.join(steps)}" if steps else "at its top"
    if own or not all(isinstance(at[key], Made) for key in holders):
        tensors = [f"tensors such as {_shown(own[0])}"] if own else []
        kinds = ", ".join([*tensors, *map(_shown, holders[:_LONGEST_LIST])])
        return (
            f"{path}: has {kinds} {where}, and it is not clear which is the model. Say where it is with --key "
            "(Python: key=...); '.' is all."
        )
    made = [(key, value.name) for key, value in at.items() if isinstance(value, Made)]
    if not made:
        return f"{path}: holds no tensors {where}. Name a checkpoint of a model."
    key, name = made[0]
    return (
        f"{path}: holds no tensors {where}, but under {key!r} an object ({name}), which only its own code could make. "
        "Save its state_dict()."
    )


def _shown(key: Any) -> str:
    return repr(key[:_LONGEST_KEY]) if isinstance(key, str) else repr(key) if type(key) is int else type(key).__name__


def _advice(top: Mapping[Any, Any]) -> str:
    keys = [str(key)[:_LONGEST_KEY] for key, value in top.items() if isinstance(value, Mapping)][:_LONGEST_LIST]
    return f" Its mappings are: {', '.join(keys)}." if keys else " Name another file."


def _holds_tensors(value: Any, is_tensor: IsTensor, seen: set[int]) -> bool:
    """Whether there are tensors anywhere in a value; `seen`: changed, what has been looked at and has none."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if is_tensor(value):
            return True
        if isinstance(value, _SCALARS) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, Made):
            waiting += (*value.arguments, value.state, *value.items)
    return False


def _walk(chosen: Mapping[Any, Any], path: str, is_tensor: IsTensor, look: Look) -> Iterator[tuple[str, Any]]:
    """Yield tensors with their names, in order; refuse what may be one and cannot be read."""
    seen: set[int] = set()
    waiting: list[Iterator[tuple[str, Any]]] = [_named("", chosen, path, is_tensor)]
    for _ in range(_MAX_NODES):
        if not waiting:
            return
        name, value = next(waiting[-1], ("", waiting))
        if value is waiting:
            waiting.pop()
        elif is_tensor(value):
            yield name, value
        elif isinstance(value, Mapping):
            waiting.append(_named(f"{name}.", value, path, is_tensor))
            if len(waiting) > _MAX_DEPTH:
                raise CheckpointError(f"{path}: is nested too deeply under {name[:100]}. Save it flat.", path=path)
        elif _may_be_tensors(value := look(value), is_tensor, seen):
            what = value.name if isinstance(value, Made) else f"{type(value).__name__} with tensors"
            raise CheckpointError(
                f"{name}: is no tensor in {path}, but {what}. Leave it out of the state dict, or say with --key where "
                "the model is.",
                path=path,
            )
    raise CheckpointError(f"{path}: has more than {_MAX_NODES:,} values. Save the model alone.", path=path)


def _named(prefix: str, values: Mapping[Any, Any], path: str, is_tensor: IsTensor) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if type(key) is str or type(key) is int:
            yield f"{prefix}{key}", value
        elif is_tensor(value) or _may_be_tensors(value, is_tensor, set()):
            kind = key.name if isinstance(key, Made | Named) else type(key).__name__
            raise CheckpointError(
                f"{path}: a tensor{f' under {prefix[:-1]:.100}' if prefix else ''} has a key that is no text, but "
                f"{kind:.100}. Rename it.",
                path=path,
            )


def _may_be_tensors(value: Any, is_tensor: IsTensor, seen: set[int]) -> bool:
    if isinstance(value, (*_SCALARS, Named)):
        return False
    return _holds_tensors(value, lambda inner: is_tensor(inner) or _is_array(inner), seen)


def _is_array(value: Any) -> bool:
    """Whether it is an array of numpy."""
    is_numpy = isinstance(value, Made) and value.name.startswith("numpy.")
    return is_numpy and value.name.endswith(("_reconstruct", "_frombuffer"))
