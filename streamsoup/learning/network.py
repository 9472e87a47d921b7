"""The live module: forward, loss, gradient, and its gradient as something that can be measured beside ingredients."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import HeldCheckpoint, held_like
from streamsoup.dtypes import DTYPES
from streamsoup.errors import MismatchError, NonFiniteError, RecipeError
from streamsoup.maps import address_of
from streamsoup.plan import Plan
from streamsoup.sinks import wait_for_caller
from streamsoup.source import Source

if TYPE_CHECKING:
    import torch

Forward = Callable[["torch.nn.Module", Any], Any]
LossFunction = Callable[[Any, Any], "torch.Tensor"]
_INDEX_OF = {dtype.torch_name: dtype.index for dtype in DTYPES if dtype.torch_name}


def call_module(module: torch.nn.Module, inputs: Any) -> Any:
    """Call a module with the inputs of a batch: a tensor, a tuple or a mapping; returns its logits.

    Of an output with an attribute ``logits``, as models of transformers have it, that is taken.
    """
    if isinstance(inputs, Mapping):
        output = module(**inputs)
    elif isinstance(inputs, tuple | list):
        output = module(*inputs)
    else:
        output = module(inputs)
    return getattr(output, "logits", output)


class Network:
    """A module that holds the soup while its mixing coefficients are learned.

    Parameters
    ----------
    module : torch.nn.Module
        Its mode (``train`` or ``eval``) is left as it is.
    loss_fn : callable taking logits and targets
        Returns a scalar tensor.
    forward : callable taking the module and the inputs of a batch
        Returns logits.
    plan : Plan
        Of the soup.

    Attributes
    ----------
    tied : dict of int to int
        Tensors of the soup that are the same parameter as an earlier one.

    Raises
    ------
    MismatchError
        If a tensor that is averaged has no gradient in the module, because none of its parameters goes by that name.
    """

    def __init__(self, module: torch.nn.Module, loss_fn: LossFunction, forward: Forward, plan: Plan) -> None:
        self.module = module
        self._loss_fn = loss_fn
        self._forward = forward
        state = module.state_dict(keep_vars=True)
        parameters = {id(p) for p in module.parameters()}
        self._of: dict[int, torch.nn.Parameter] = {}
        self.tied: dict[int, int] = {}
        first_of: dict[int, int] = {}
        for tensor in plan.averaged:
            parameter = state.get(plan.table.names[tensor])
            if parameter is None or id(parameter) not in parameters:
                continue  # a buffer, such as a running statistic: mixed like its group, without a say in it
            if (first := first_of.setdefault(id(parameter), tensor)) != tensor:
                self.tied[tensor] = first
            else:
                self._of[tensor] = parameter
        if not self._of:
            raise MismatchError(["No averaged tensor of the ingredients is a parameter of the module."])
        if quiet := [plan.table.names[t] for t, p in self._of.items() if not p.is_floating_point()]:
            raise MismatchError([f"{quiet[0]}: is no float in the module, so that it has no gradient."])

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """Have every parameter of the soup take part in the gradient, and leave none behind."""
        flags = {tensor: p.requires_grad for tensor, p in self._of.items()}
        try:
            for parameter in self._of.values():
                parameter.requires_grad_(True)
            self.module.zero_grad(set_to_none=True)
            yield
        finally:
            self.module.zero_grad(set_to_none=True)
            for tensor, parameter in self._of.items():
                parameter.requires_grad_(flags[tensor])

    def backward(self, batches: Sequence[Any], temperature: torch.Tensor | None, seed: Sequence[int]) -> float:
        """Gather the gradient of the mean loss over batches; returns that loss.

        Random numbers that the module draws (dropout) depend on `seed` alone.

        Raises
        ------
        NonFiniteError
            If the loss is NaN or infinite.
        """
        import torch

        self.module.zero_grad(set_to_none=True)
        total = 0.0
        for number, batch in enumerate(batches):
            with _seeded(*seed, number), torch.enable_grad():
                loss = self._loss(batch, temperature) / len(batches)
                if not loss.requires_grad:
                    raise RecipeError("The loss has no gradient: it does not depend on the network's parameters.")
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not np.isfinite(total):
            raise NonFiniteError([f"The loss is {total}."], "Lower the learning rate, or begin from a better soup.")
        return total

    def evaluate(self, batches: Any, temperature: torch.Tensor | None, seed: int) -> float:
        """Return the mean loss over batches, without a gradient.

        Raises
        ------
        NonFiniteError
            If it is NaN or infinite.
        """
        import torch

        with _seeded(seed), torch.no_grad():
            losses = [float(self._loss(batch, temperature)) for batch in batches]
        if not losses:
            raise RecipeError("There are no held-out batches. Give some, or leave them out altogether.")
        loss = float(np.mean(losses))
        if not np.isfinite(loss):
            raise NonFiniteError([f"The held-out loss is {loss}."], "Lower the learning rate, or look at the batches.")
        return loss

    @property
    def may_change(self) -> bool:
        """Whether a forward pass may change what the soup has: buffers, in ``train`` mode."""
        return any(m.training and next(m.buffers(recurse=False), None) is not None for m in self.module.modules())

    def _loss(self, batch: Any, temperature: torch.Tensor | None) -> torch.Tensor:
        try:
            inputs, targets = batch
        except (TypeError, ValueError):
            raise RecipeError("A batch is a pair of inputs and targets; one of these is not.") from None
        logits = self._forward(self.module, inputs)
        loss = self._loss_fn(logits if temperature is None else logits * temperature, targets)
        if getattr(loss, "ndim", None) != 0:
            shape = tuple(getattr(loss, "shape", ()))
            raise RecipeError(f"loss_fn returned {type(loss).__name__} {shape}, not a scalar tensor. Take the mean.")
        return loss

    def gradient_like(self, plan: Plan) -> HeldCheckpoint:
        """Describe the gradient as an ingredient of a plan."""
        dtypes: npt.NDArray[np.uint8] = plan.out_dtypes.copy()
        for tensor, parameter in self._of.items():
            dtypes[tensor] = _INDEX_OF[str(parameter.dtype).removeprefix("torch.")]
        return held_like(plan.checkpoints[0], dtypes, "the gradient")

    def gradient(self) -> Gradient:
        """Return the gradient that `backward` gathered."""
        return Gradient({t: p.grad for t, p in self._of.items() if p.grad is not None})


@contextlib.contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Have torch's random numbers depend on these alone, and leave its generators as they were."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
        yield


class Gradient(Source):
    """A gradient as an ingredient: see `Source`.

    Parameters
    ----------
    gradients : mapping of int to torch.Tensor
        By tensor of the soup; others are zero.

    Notes
    -----
    Memory: none; of a module on a GPU, one copy of its gradient if it is measured on another device.
    """

    def __init__(self, gradients: Mapping[int, torch.Tensor]) -> None:
        self._there = {tensor: _dense(gradient.detach()).contiguous() for tensor, gradient in gradients.items()}
        wait_for_caller(self._there.values())
        self._here: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __contains__(self, tensor: int) -> bool:
        return tensor in self._there

    def resident(self, position: int, offset: int, nbytes: int, device: Any) -> torch.Tensor | None:
        """See `Source`."""
        import torch

        there = self._there[position]
        if there.device != device:
            return None
        return there.view(-1).view(torch.uint8)[offset : offset + nbytes]

    def fetch(self, position: int, offset: int, nbytes: int, staging: memoryview | None) -> int:
        """See `Source`."""
        address = self._on_host(position).data_ptr() + offset
        if staging is None:
            return address
        target = address_of(staging)
        ctypes.memmove(target, address, nbytes)
        return target

    def _on_host(self, tensor: int) -> torch.Tensor:
        if self._there[tensor].device.type == "cpu":
            return self._there[tensor]
        with self._lock:
            if tensor not in self._here:
                self._here[tensor] = self._there[tensor].cpu()
            return self._here[tensor]


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    """A sparse gradient, as embeddings may have, is no contiguous memory."""
    return gradient.to_dense() if gradient.is_sparse or gradient.is_sparse_csr else gradient
