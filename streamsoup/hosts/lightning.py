"""Lightning's `WeightAveraging`, with the average in a running sum."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import WeightAveraging

from streamsoup.errors import RecipeError
from streamsoup.hosts.averaged_model import AveragedModel


class SoupAveraging(WeightAveraging):  # type: ignore[misc]  # Lightning need not be installed to check types
    """Averages the states of a run; validation and the end of training have the average.

    All of it is Lightning's but the average: override `should_update(step_idx, epoch_idx)` to say after which steps or
    epochs. Checkpoints hold the average as ``state_dict``, and the latest state beside it.

    Parameters
    ----------
    device : torch.device or str, optional
        Where the average is.
    use_buffers : bool
        Average floating point buffers, too.
    **options
        Of the `RunningSoup`, but for its device: ``budget_bytes``, ``workers`` ...
    """

    def __init__(self, device: Any = None, use_buffers: bool = True, **options: Any) -> None:
        super().__init__(device=device, use_buffers=use_buffers)
        self._options = options

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the average when fitting begins.

        Raises
        ------
        RecipeError
            If several processes train: each would have an average of its own.
        """
        if stage == "fit" and trainer.world_size > 1:
            raise RecipeError("SoupAveraging: several processes train, each with an average of its own. Use one.")
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            device = self._device or pl_module.device
            self._average_model: AveragedModel | None = AveragedModel(
                pl_module, device, use_buffers=self._use_buffers, options=self._options
            )
