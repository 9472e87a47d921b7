"""`torch.optim.swa_utils.AveragedModel`, with the average in a running sum: float64, rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from streamsoup.sums import RunningSoup

_BESIDE_BYTES = 512 << 20  # of a budget, beside twice the sum


class AveragedModel(nn.Module):
    """A copy of a model that holds the plain average of the states it was shown.

    Parameters
    ----------
    model : torch.nn.Module
        Copied.
    device : torch.device or str, optional
        Where the copy is; by default where the model is.
    use_buffers : bool
        Average floating point buffers, too. Other buffers, and without this all, are those of the latest state;
        `torch.optim.swa_utils.update_bn` makes new ones.
    options : mapping, optional
        Of the `RunningSoup`: ``{"device": "cuda", "budget_bytes": "2GiB"}``. The budget is by default what the sum
        needs.

    Attributes
    ----------
    module : torch.nn.Module
        The average, in the model's dtypes.
    n_averaged : Tensor
        Number of states, int64, shape ().

    Notes
    -----
    Memory: the copy, and a running sum of eight bytes a parameter. The sum itself is not in the `state_dict`, nor in a
    copy or pickle: what is loaded goes on from the rounded average, as `n_averaged` equal states. Each state is one
    member of the sum, which takes some microseconds for each member there is: thousands of updates, not millions.

    Source: Izmailov et al. 2018, arXiv 1803.05407.
    """

    n_averaged: Tensor

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int | None = None,
        *,
        use_buffers: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module = deepcopy(model)
        if device is not None:
            self.module = self.module.to(device)
        self.register_buffer("n_averaged", torch.tensor(0, dtype=torch.long, device=device))
        self.use_buffers = use_buffers
        self._options = dict(options or {})
        self._running: RunningSoup | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of the average."""
        return self.module(*args, **kwargs)

    def update_parameters(self, model: nn.Module) -> None:
        """Take a state into the average.

        Raises
        ------
        MismatchError, NonFiniteError
            The average is then what it was.
        """
        if self._running is None:
            state = self._state(self.module)
            # A running sum may take half of a budget; who averages in memory wants room for it.
            sum_bytes = sum(t.numel() * (16 if t.dtype == torch.float64 else 8) for t in state.values())
            options = {"budget_bytes": 2 * sum_bytes + _BESIDE_BYTES, **self._options}
            self._running = RunningSoup(state, only_grows=True, **options)
            if int(self.n_averaged):
                self._running.add(self._state(self.module), float(self.n_averaged))
        self._running.add(self._state(model))
        self._running.mean().load_into(self.module, strict=False)
        averaged = self._state(self.module)
        buffers = dict(model.named_buffers())
        for name, buffer in self.module.named_buffers():
            if name not in averaged:
                buffer.detach().copy_(buffers[name].detach())
        self.n_averaged += 1

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """What is averaged; tied tensors once."""
        state: dict[str, Tensor] = dict(model.named_parameters())
        if self.use_buffers:
            saved = model.state_dict(keep_vars=True)
            state |= {n: b for n, b in model.named_buffers() if n in saved and b.is_floating_point()}
        return state

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._running = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_running": None}
