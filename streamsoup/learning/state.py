"""Where learning stands, on disk after each step: a run that died goes on to the same bits.

::

    work/
        learn.json          the job, who the ingredients are
        steps.jsonl         a line for each step
        state.safetensors   coefficients, the optimiser's state, and how many bytes of steps.jsonl count
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint, expect_identity
from streamsoup.errors import ResumeError
from streamsoup.files import pwrite_all, write_durably, writing_to
from streamsoup.learning.job import LearnJob, StepRecord
from streamsoup.learning.mixture import Numbers

STATE_FORMAT = 2
_JOB = "learn.json"
_STATE = "state.safetensors"
_STEPS = "steps.jsonl"
_CHANGES_NOTHING = ("budget_bytes", "device", "device_budget_bytes", "workers", "read_mode", "sums", "sums_dtype")


@dataclass
class Standing:
    """How far learning is.

    Attributes
    ----------
    epoch, chunk : int
        Where to go on: the epoch, from 0, and the step in it.
    steps : list of StepRecord
    content_digests : list of str
        Of the ingredients.
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
    content_digests: list[str] = field(default_factory=list)
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
    also : mapping of str to plain data
        What decides the bits beside the job: how many batches there are, and the optimiser's own settings.

    Attributes
    ----------
    id : str
        Tells the soup of this work from another in the same place.
    """

    def __init__(
        self, folder: Path | None, job: LearnJob, identities: Mapping[str, Any], also: Mapping[str, Any]
    ) -> None:
        self._folder = folder
        self._steps_bytes = 0
        self.id = uuid.uuid4().hex
        self._document = {
            "learn": STATE_FORMAT,
            "job": {**_decisive(job), **also},
            "identities": dict(identities),
            "id": self.id,
        }

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
        if not holds_state(folder):  # nothing was learned that could be lost; but its soup may be in its place
            found = _read(folder)
            if {**found, "id": None} == {**json.loads(json.dumps(self._document)), "id": None}:
                self.id = self._document["id"] = str(found["id"])
            write_durably(folder / _JOB, json.dumps(self._document, indent=1))
            return Standing()
        try:
            found = json.loads((folder / _JOB).read_text(encoding="utf-8"))
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

        try:
            with safe_open(path, "numpy") as file:
                document = json.loads(file.metadata()["standing"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self._steps_bytes = int(document.pop("steps_bytes"))
            raw = path.with_name(_STEPS).read_bytes()[: self._steps_bytes]
            if len(raw) < self._steps_bytes:
                raise ValueError(_STEPS)
            steps = [StepRecord(**json.loads(line)) for line in raw.splitlines()]
            best = arrays.pop("best", None)
            return Standing(**document, steps=steps, best=best, mixture=arrays)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise ResumeError(f"{path}: is damaged. Begin anew with --restart.") from None

    def save(self, standing: Standing) -> None:
        """Write down where learning stands, durably."""
        if self._folder is None:
            return
        from safetensors.numpy import save

        self._append(standing.steps[-1])
        plain = asdict(replace(standing, best=None, mixture={}, steps=[]))
        document = {name: value for name, value in plain.items() if name not in ("best", "mixture", "steps")}
        document["steps_bytes"] = self._steps_bytes
        arrays = {name: np.asarray(array, order="C") for name, array in standing.mixture.items()}
        if standing.best is not None:
            arrays["best"] = standing.best
        write_durably(self._folder / _STATE, save(arrays, {"standing": json.dumps(document)}))

    def _append(self, record: StepRecord) -> None:
        """Add a line after those that count; it counts once the state says so."""
        assert self._folder is not None
        raw = json.dumps(asdict(record)).encode() + b"\n"
        with writing_to(self._folder / _STEPS):
            fd = os.open(self._folder / _STEPS, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.ftruncate(fd, self._steps_bytes)
                pwrite_all(fd, memoryview(raw), self._steps_bytes)
                os.fdatasync(fd)
            finally:
                os.close(fd)
        self._steps_bytes += len(raw)


def holds_state(folder: Path | None) -> bool:
    """Whether something was learned that a folder keeps."""
    return folder is not None and (folder / _STATE).exists()


def id_in(folder: Path | None) -> str | None:
    """Return the id of the work that is, or was, in a folder."""
    found = {} if folder is None else _read(folder)
    return str(found["id"]) if found else None


def _read(folder: Path) -> dict[str, Any]:
    """Return what stands in the job's file; nothing if it is not readable."""
    try:
        found = json.loads((folder / _JOB).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and found.keys() >= {"id", "job"} else {}
    except (OSError, ValueError):
        return {}


def remove_state(folder: Path) -> None:
    """Remove what learning put into a work folder; what says that there is work goes first, and who it was last."""
    for name in STATE_NAMES:
        (folder / name).unlink(missing_ok=True)


def _decisive(job: LearnJob) -> dict[str, Any]:
    document = asdict(job)
    for name in _CHANGES_NOTHING:
        del document["pool"][name]
    return document


STATE_NAMES = (_STATE, _STEPS, f".{_STATE}.new", f".{_JOB}.new", _JOB)
"""All that learning puts into a work folder."""
