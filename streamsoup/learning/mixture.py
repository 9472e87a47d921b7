"""Mixing coefficients by group, how they are parametrised, and the optimiser that moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streamsoup.errors import RecipeError, ResumeError

if TYPE_CHECKING:
    import torch

Numbers: TypeAlias = npt.NDArray[np.float64]
MakeOptimizer: TypeAlias = Callable[[Any], Any]
PARAMETRISATIONS = ("softmax", "free")
OPTIMIZERS = ("adamw", "adam", "sgd")
# Less is nothing beside a sum of one, and sums of float64 tensors are not proved for it.
_LEAST = 2.0**-400


def optimizer_named(name: str | MakeOptimizer, *, lr: float, weight_decay: float) -> MakeOptimizer:
    """Return what makes an optimiser of groups of parameters.

    Raises
    ------
    RecipeError
    """
    import torch

    if not isinstance(name, str):
        return name
    if name not in OPTIMIZERS:
        raise RecipeError(f"optimizer: {name!r} is not one of {', '.join(OPTIMIZERS)}.")
    kind: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    return lambda parameters: kind(parameters, lr=lr, weight_decay=weight_decay)


class Mixture:
    """Coefficients α, shape (groups, ingredients), of logits (softmax) or of themselves (free), and a temperature β.

    Parameters
    ----------
    initial : float64 array, shape (groups, ingredients)
        Coefficients to begin with.
    parts : sequence of slice
        Groups that are updated together. An optimiser works on each number alone, so that it does not matter which.
    parametrisation : {"softmax", "free"}
    make_optimizer : callable
        Takes a list of parameter groups in torch's form: the coefficients, and the temperature, which never decays.
        The optimiser must work element by element, as SGD and Adam do.
    temperature : bool
        Learn β, by which logits are multiplied.

    Raises
    ------
    RecipeError
        If a softmax is to begin at zero, or below.

    Notes
    -----
    Source: Wortsman et al. 2022, arXiv 2203.05482, appendix I.
    """

    def __init__(
        self,
        initial: Numbers,
        *,
        parts: Sequence[slice],
        parametrisation: str,
        make_optimizer: MakeOptimizer,
        temperature: bool,
    ) -> None:
        import torch

        self._softmax = parametrisation == "softmax"
        if self._softmax and not (initial > 0).all():
            raise RecipeError(
                "A softmax cannot begin at a coefficient of zero. Give restrict=True, which leaves the ingredient out, "
                'or parametrisation="free".'
            )
        raw = torch.from_numpy(np.log(initial) if self._softmax else initial.copy())
        self._parts = [torch.nn.Parameter(raw[part].clone()) for part in parts]
        self.temperature = torch.nn.Parameter(torch.ones((), dtype=torch.float64)) if temperature else None
        groups: list[dict[str, Any]] = [{"params": self._parts}]
        if self.temperature is not None:
            groups.append({"params": [self.temperature], "weight_decay": 0.0})
        self._optimizer = make_optimizer(groups)

    @property
    def settings(self) -> list[str]:
        """The optimiser's kind and numbers, in words: another optimiser does not go on with this one's state."""
        groups = [
            ", ".join(f"{name}={_plain(value)!r}" for name, value in sorted(group.items()) if name != "params")
            for group in self._optimizer.param_groups
        ]
        return [type(self._optimizer).__qualname__, *groups]

    def coefficients(self, part: int) -> Numbers:
        """Coefficients of a part, shape (groups of the part, ingredients)."""
        found = np.asarray(self._mixed(self._parts[part]).detach().numpy()).copy()
        found[np.abs(found) < _LEAST] = 0.0
        return found

    def all_coefficients(self) -> Numbers:
        """Coefficients of all groups, shape (groups, ingredients)."""
        return np.concatenate([self.coefficients(part) for part in range(len(self._parts))])

    def _mixed(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.softmax(dim=1) if self._softmax else raw

    def update(self, part: int, products: Numbers) -> Numbers:
        """Take one step against ∂L/∂α; returns the new coefficients.

        Parameters
        ----------
        part : int
        products : float64 array, shape (groups of the part, ingredients)
            ∂L/∂αᵢ = ⟨∇L, θᵢ⟩ over the tensors of a group.
        """
        import torch

        raw = self._parts[part]
        raw.grad = None
        with torch.enable_grad():
            (self._mixed(raw) * torch.from_numpy(products)).sum().backward()  # type: ignore[no-untyped-call]
        self._step()
        raw.grad = None
        return self.coefficients(part)

    def update_temperature(self) -> None:
        """Take one step against ∂L/∂β, which a backward pass through the loss left behind."""
        if self.temperature is not None:
            self._step()
            self.temperature.grad = None

    def _step(self) -> None:
        """Move what has a gradient: the others have none, and stay."""
        self._optimizer.step()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All that the next step depends on, whatever the parts."""
        found: dict[str, list[Any]] = {"raw": [part.detach().numpy() for part in self._parts]}
        for part in self._parts:
            for key, value in self._optimizer.state.get(part, {}).items():
                if value is not None:
                    found.setdefault(f"raw.{key}", []).append(np.asarray(value))
        arrays = {name: np.concatenate(v) if v[0].ndim else v[0] for name, v in found.items()}
        if self.temperature is not None:
            arrays["temperature"] = self.temperature.detach().numpy()
            for key, value in self._optimizer.state.get(self.temperature, {}).items():
                if value is not None:
                    arrays[f"temperature.{key}"] = np.asarray(value)
        return {name: np.array(array) for name, array in arrays.items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take up a state.

        Raises
        ------
        ResumeError
            If it is that of another mixture.
        """
        import torch

        first = 0
        expected = sum(len(part) for part in self._parts), self._parts[0].shape[1]
        if state["raw"].shape != expected or ("temperature" in state) != (self.temperature is not None):
            raise ResumeError(f"The state has coefficients of shape {state['raw'].shape}, not {expected}. Begin anew.")
        with torch.no_grad():
            for part in self._parts:
                rows = slice(first, first + len(part))
                part.copy_(torch.from_numpy(state["raw"][rows]))
                self._load_state(part, "raw", state, rows)
                first += len(part)
            if self.temperature is not None:
                self.temperature.copy_(torch.from_numpy(state["temperature"]))
                self._load_state(self.temperature, "temperature", state, slice(None))

    def _load_state(
        self, parameter: torch.Tensor, name: str, state: Mapping[str, npt.NDArray[Any]], rows: slice
    ) -> None:
        import torch

        for key, array in state.items():
            stem, dot, what = key.partition(".")
            if dot and stem == name:
                value = array[rows] if array.ndim else array
                self._optimizer.state[parameter][what] = torch.from_numpy(np.array(value))


def _plain(value: Any) -> Any:
    """A setting as plain data; of an object that is none, its class, since its address is another in each process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if callable(getattr(value, "tolist", None)):
        return value.tolist()
    return type(value).__qualname__
