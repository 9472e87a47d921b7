"""Soups in transformers: straight into a live model, and an average of a `Trainer`'s checkpoints as they are saved."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, TypeVar

from transformers import TrainerCallback

from streamsoup import viewing
from streamsoup.errors import RecipeError
from streamsoup.sums import RunningSoup
from streamsoup.sums.generations import GenerationStore

_log = logging.getLogger(__name__)
_STEP = re.compile(r"checkpoint-(\d+)")
Model = TypeVar("Model", bound=Any)


def load_soup(model: Model, ingredients: Any, *, strict: bool = True, **options: Any) -> Model:
    """Write a soup straight into a model, tile by tile: no file, no second copy.

    Parameters
    ----------
    model : transformers.PreTrainedModel, or any torch.nn.Module
        Changed; its tensors keep their dtypes and devices. Tied tensors need be in the soup under one name, as
        transformers saves them.
    ingredients
        See `streamsoup.open`.
    strict : bool
        Refuse names that only one side has. Without it, what is not in the soup stays as it is.
    **options
        See `streamsoup.open`.

    Returns
    -------
    the model

    Raises
    ------
    MismatchError
        If names or shapes do not fit; the model is then unchanged.
    StreamsoupError
        If an ingredient cannot be read or has NaN; the model is then partly overwritten.
    """
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()  # a name that the files leave out is then the memory of one that they have
    with viewing.open(ingredients, **options) as soup:
        soup.load_into(model, strict=strict)
    return model


class SoupCallback(TrainerCallback):
    """Averages the checkpoints of a run as the `Trainer` saves them.

    Parameters
    ----------
    folder : path
        Keeps the running sum, so that a run may be resumed.
    window : int, optional
        Average the latest so many checkpoints (LAWA); by default all of them. They must be there still, and the one
        that leaves: ``save_total_limit`` is then at least one more.
    out : path, optional
        Where the average is written when training ends: a new folder.
    load_at_end : bool
        Write the average into the model when training ends.
    **options
        See `RunningSoup`.

    Notes
    -----
    Each checkpoint is read once when it is saved and, with a window, once when it leaves. Only the first process works.

    Source: Kaddour 2022, arXiv 2209.14981.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        window: int | None = None,
        out: str | Path | None = None,
        load_at_end: bool = False,
        **options: Any,
    ) -> None:
        if window is not None and window < 1:
            raise RecipeError(f"window: {window} checkpoints, but at least one is needed.")
        self.folder = Path(folder)
        self.window = window
        self.out = out
        self.load_at_end = load_at_end
        self._options = options
        self._running: RunningSoup | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what cannot work, and take up the sum of a run that is resumed.

        Raises
        ------
        RecipeError
        """
        limit = args.save_total_limit
        if self.window is not None and limit is not None and limit <= self.window:
            raise RecipeError(
                f"window: {self.window}, but save_total_limit keeps {limit} checkpoints, and the one that leaves the "
                f"window is read once more. Give save_total_limit={self.window + 1}."
            )
        if self.load_at_end and args.world_size > 1:
            raise RecipeError("load_at_end: several processes train, and only one has the average. Give out= instead.")
        if not state.is_world_process_zero or not (rows := GenerationStore.members_in(self.folder)):
            return
        later = [str(row[0]) for row in rows if _step_of(str(row[0])) > state.global_step]
        if later:
            raise RecipeError(
                f"{self.folder}: holds {later[0]}, but training begins at step {state.global_step}. Name another "
                "folder, or remove this one."
            )
        self._take_up(str(rows[-1][0]))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take a checkpoint that was just saved into the average.

        Raises
        ------
        StreamsoupError
        """
        if not state.is_world_process_zero:
            return
        path = str(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self._running is None:
            self._running = RunningSoup(path, folder=self.folder, **self._options)
        if path in {member.path for member in self._running.members}:
            return  # saved twice at one step
        self._running.add(path)
        while self.window is not None and len(self._running.members) > self.window:
            self._running.remove(self._running.members[0].path)
        _log.info("%s: average of %d checkpoints", path, len(self._running.members))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Write the average, or load it.

        Raises
        ------
        StreamsoupError
        """
        if self._running is None:
            return
        self._running.close()
        # The first checkpoint, which gave configuration files, may be gone by now; the latest is not.
        running = self._take_up(self._running.members[-1].path)
        try:
            if self.out is not None:
                running.mean().save(self.out)
            if self.load_at_end:
                running.mean().load_into(model)
        finally:
            running.close()
            self._running = None

    def _take_up(self, like: str) -> RunningSoup:
        self._running = RunningSoup.open(self.folder, like=like, gone="keep", **self._options)
        return self._running


def _step_of(path: str) -> int:
    found = _STEP.fullmatch(Path(path).name)
    return int(found[1]) if found else 0
