"""What a person gives the command line to learn from: a network, a loss and batches, by the name of a Python object."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from streamsoup.errors import RecipeError, ScoreError
from streamsoup.learning.network import LossFunction

if TYPE_CHECKING:
    import torch


class Task(Protocol):
    """What coefficients are learned from.

    Two more attributes are optional: ``held_out``, an iterable like `batches`, and ``forward``, a callable taking the
    module and the inputs of a batch, which returns logits.

    Attributes
    ----------
    module : torch.nn.Module
        The network, on any device, in the mode in which it is to be run (mostly ``eval``).
    loss : callable taking logits and targets
        Returns a scalar tensor.
    batches : iterable of (inputs, targets)
        See `streamsoup.learn`.
    """

    @property
    def module(self) -> torch.nn.Module: ...
    @property
    def loss(self) -> LossFunction: ...
    @property
    def batches(self) -> Iterable[Any]: ...


def load_task(name: str) -> Task:
    """Import a task: ``package.module:object``, or ``:function`` that makes one. The current folder is looked in, too.

    Raises
    ------
    RecipeError
        If there is none, or it lacks something.
    ScoreError
        If importing or making it fails.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise RecipeError(f"task {name}: write it as package.module:object.")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        task: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ScoreError(f"task {name}: cannot be imported ({error}).") from error
        raise RecipeError(
            f"task {name}: there is no Python module {error.name}. Run from the folder in which it lies, or put that "
            "on PYTHONPATH."
        ) from error
    except Exception as error:
        raise ScoreError(f"task {name}: importing it failed with {_said(error)}.") from error
    try:
        for part in attribute.split("."):
            task = getattr(task, part)
    except AttributeError:
        raise RecipeError(f"task {name}: {module_name} has no {attribute}.") from None
    if callable(task) and not hasattr(task, "batches"):
        task = blaming("the task", task)()
    for needed in ("module", "loss", "batches"):
        if not hasattr(task, needed):
            raise RecipeError(f"task {name}: has no attribute {needed!r}. A task has module, loss and batches.")
    found: Task = task
    return found


def blaming(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Make errors of a person's function speak of it, and not of us."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise ScoreError(f"{what} failed with {_said(error)}. See it with --debug.") from error

    return call


def batches_of(batches: Iterable[Any], what: str) -> Iterable[Any]:
    """Return batches whose errors speak of them.

    A sequence stays one, since its order is ours to choose; and so does an iterator, which is gone through only once.
    """
    if isinstance(batches, Sequence):
        return batches
    blamed = _Blamed(batches, what)
    return iter(blamed) if isinstance(batches, Iterator) else blamed


class _Blamed:
    """Goes through batches as often as they can be begun anew."""

    def __init__(self, batches: Iterable[Any], what: str) -> None:
        self._batches = batches
        self._what = what

    def __iter__(self) -> Iterator[Any]:
        found = blaming(self._what, iter)(self._batches)
        step = blaming(self._what, lambda: next(found, _END))
        while (batch := step()) is not _END:
            yield batch


_END = object()


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
