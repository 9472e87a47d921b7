"""Where learning stands, on disk after each step: a run that died goes on to the same bits."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint, expect_identity
from streamsoup.errors import ResumeError
from streamsoup.files import write_durably
from streamsoup.learning.job import LearnJob, StepRecord
from streamsoup.learning.mixture import Numbers

STATE_FORMAT = 1
JOB_NAME = "learn.json"
_STATE = "state.safetensors"
_CHANGES_NOTHING = ("budget_bytes", "device", "workers", "read_mode", "sums", "sums_dtype")


@dataclass
class Standing:
    """How far learning is.

    Attributes
    ----------
    epoch, chunk : int
        Where to go on: the epoch, from 0, and the step in it.
    steps : list of StepRecord
    best : float64 array, shape (groups, ingredients), or None
        Coefficients with the least held-out loss.
    first_loss, best_loss, best_temperature : float or None
        `first_loss`: held-out, at the beginning.
    best_step : int
    without_progress : int
        Evaluations since then.
    examples : int or None
        Of the first epoch, as far as the batches tell.
    mixture : mapping of str to arrays
        Of the optimiser; see `streamsoup.learning.mixture`.
    """

    epoch: int = 0
    chunk: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    best: Numbers | None = None
    first_loss: float | None = None
    best_loss: float | None = None
    best_temperature: float | None = None
    best_step: int = 0
    without_progress: int = 0
    examples: int | None = 0
    mixture: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


class StateFile:
    """The state of one job in a work folder; without a folder, nothing is kept.

    Parameters
    ----------
    folder : Path or None
    job : LearnJob
    identities : mapping of path to shard identities

    Attributes
    ----------
    id : str
        Tells the soup of this work from another in the same place.
    """

    def __init__(self, folder: Path | None, job: LearnJob, identities: Mapping[str, Any]) -> None:
        self._folder = folder
        self.id = uuid.uuid4().hex
        self._document = {"learn": STATE_FORMAT, "job": _decisive(job), "identities": dict(identities), "id": self.id}

    def begin(self, checkpoints: Mapping[str, Checkpoint]) -> Standing:
        """Take up what lies in the folder, or write down what is begun.

        Raises
        ------
        ResumeError
            If the folder holds another job's work.
        ChangedIngredientError
        """
        folder = self._folder
        if folder is None:
            return Standing()
        if not (folder / _STATE).exists():  # nothing was learned that could be lost
            write_durably(folder / JOB_NAME, json.dumps(self._document, indent=1))
            return Standing()
        try:
            found = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
            same = found["learn"] == STATE_FORMAT and found["job"] == json.loads(json.dumps(self._document["job"]))
            identities, self.id = found["identities"], str(found["id"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ResumeError(f"{folder}: is not readable by this version. Begin anew with --restart.") from None
        if not same:
            raise ResumeError(
                f"{folder}: holds the work of a learned soup with other ingredients or options. Give the same to go "
                "on, --restart to throw it away, or another work folder."
            )
        for path, checkpoint in checkpoints.items():
            expect_identity(checkpoint, identities[path], what="learning began")
        return self._load(folder / _STATE)

    def _load(self, path: Path) -> Standing:
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return Standing()
        try:
            with safe_open(path, "numpy") as file:
                document = json.loads(file.metadata()["standing"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            steps = [StepRecord(**row) for row in document.pop("steps")]
            best = arrays.pop("best", None)
            return Standing(**document, steps=steps, best=best, mixture=arrays)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise ResumeError(f"{path}: is damaged. Begin anew with --restart.") from None

    def save(self, standing: Standing) -> None:
        """Write down where learning stands, durably."""
        if self._folder is None:
            return
        from safetensors.numpy import save

        plain = asdict(replace(standing, best=None, mixture={}))
        document = {name: value for name, value in plain.items() if name not in ("best", "mixture")}
        arrays = {name: np.asarray(array, order="C") for name, array in standing.mixture.items()}
        if standing.best is not None:
            arrays["best"] = standing.best
        write_durably(self._folder / _STATE, save(arrays, {"standing": json.dumps(document)}))


def _decisive(job: LearnJob) -> dict[str, Any]:
    document = asdict(job)
    for name in _CHANGES_NOTHING:
        del document["pool"][name]
    return document


STATE_NAMES = (_STATE, JOB_NAME, f".{_STATE}.new", f".{JOB_NAME}.new")
"""All that learning puts into a work folder."""
