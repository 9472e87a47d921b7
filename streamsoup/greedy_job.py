"""What a greedy soup is to do, as a value that a work folder keeps; and what came of it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from streamsoup.candidate import is_for_candidates
from streamsoup.errors import RecipeError, ResumeError
from streamsoup.files import write_durably
from streamsoup.pool import PoolOptions
from streamsoup.rules import Rule
from streamsoup.score import CommandScore
from streamsoup.sums import Member

JOB_NAME = "greedy.json"
JOB_FORMAT = 1
# All that we put into a work folder, but for further candidates at once.
WORK_NAMES = (JOB_NAME, "scores.jsonl", "decisions.json", "sums", "candidate")


def candidate_folders(first: Path) -> dict[int, Path]:
    """Find folders for candidates that are scored at once, by number: the first, which is 0, and those beside it."""
    name = re.compile(rf"{re.escape(first.name)}-(\d{{1,9}})")
    found = {path: name.fullmatch(path.name) for path in sorted(first.parent.glob("*"))}
    return {0: first} | {int(n[1]): path for path, n in found.items() if n is not None and is_for_candidates(path)}


def work_paths(folder: Path) -> list[Path]:
    """All that a greedy soup may have put into a work folder."""
    names = [folder / name for name in WORK_NAMES]
    return list(dict.fromkeys([*names, *candidate_folders(folder / "candidate").values()]))


@dataclass(frozen=True)
class GreedyJob:
    """All that decides a greedy soup, but for an evaluator that is a Python callable.

    Attributes
    ----------
    ingredients : tuple of str
    out : str or None
        Where the soup goes; None: it is only decided.
    rule : Rule
    own_scores : mapping of path to float
        Scores of ingredients that are given and not evaluated.
    metric, also
        See `CommandScore`; for callables that return mappings too.
    score_command, before_command : str or None
    timeout_seconds : float or None
    id : str
        Tells its soup from another in the same place.
    candidates : str or None
        Folder for candidates; None: in the work folder.
    overwrite : bool
    pool : PoolOptions
    jobs : int
        How many candidates are scored at once.
    """

    ingredients: tuple[str, ...]
    out: str | None = None
    rule: Rule = field(default_factory=Rule)
    own_scores: Mapping[str, float] = field(default_factory=dict)
    metric: str | None = None
    also: tuple[str, ...] = ()
    score_command: str | None = None
    before_command: str | None = None
    timeout_seconds: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    candidates: str | None = None
    overwrite: bool = False
    pool: PoolOptions = field(default_factory=PoolOptions)
    jobs: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.jobs, bool) or not isinstance(self.jobs, int) or self.jobs < 1:
            raise RecipeError(f"jobs: {self.jobs} evaluations at once, but at least one is needed.")
        if self.timeout_seconds is not None and not self.timeout_seconds > 0:
            raise RecipeError(f"timeout_seconds: {self.timeout_seconds:g}, but an evaluation takes some time.")

    def command_score(self) -> CommandScore | None:
        """Return the evaluator, if it is a command."""
        if self.score_command is None:
            return None
        return CommandScore(self.score_command, self.metric, self.also, self.timeout_seconds)

    def candidate_folder(self, folder: Path | None, place: int = 0) -> Path:
        """Where candidates are written, each place its own; of this job alone.

        Parameters
        ----------
        folder : Path or None
            The work folder.
        place : int
            0, 1 ... where several are scored at once.

        Raises
        ------
        RecipeError
            If there is no folder for them.
        """
        number = f"-{place}" if place else ""
        if self.candidates is not None:
            return Path(self.candidates) / f"candidate-{self.id}{number}"
        if folder is None:
            raise RecipeError("A score that reads files needs a work folder. Give workdir=.")
        return folder / f"candidate{number}"


def write_job(folder: Path, job: GreedyJob, identities: Mapping[str, Any]) -> None:
    """Write a job and the identities of its ingredients into a work folder."""
    document = {"greedy": JOB_FORMAT, **asdict(job), "identities": dict(identities)}
    write_durably(folder / JOB_NAME, json.dumps(document, indent=1))


def read_job(folder: Path) -> tuple[GreedyJob, dict[str, Any]]:
    """Read a job and the identities of its ingredients.

    Raises
    ------
    ResumeError
    """
    try:
        document = json.loads((folder / JOB_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResumeError(f"{folder}: holds no greedy soup to resume. Name the work folder.") from None
    except (OSError, ValueError):
        document = None
    try:
        if document.pop("greedy", None) != JOB_FORMAT:
            raise TypeError
        identities = dict(document.pop("identities"))
        document["rule"] = Rule(**document["rule"])
        document["pool"] = PoolOptions(**document["pool"])
        for name in ("ingredients", "also"):
            document[name] = tuple(document[name])
        return GreedyJob(**document), identities
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ResumeError(f"{folder}: is not readable by this version. Begin anew in another work folder.") from None


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One decision.

    Attributes
    ----------
    path : str
        The ingredient that was tried.
    own_score : float or None
    change : float
        +1 added, −1 dropped, 0 the start of a run.
    round, run : int
    score : float
        Of the candidate.
    best_before : float or None
        What it was compared with.
    accepted, tie : bool
        Whether it was kept, and whether it equalled the best.
    size : int
        Ingredients in the soup after the decision.
    also : mapping of str to float
    seconds : float
    bytes_read : int
    """

    path: str
    own_score: float | None
    change: float
    round: int
    run: int
    score: float
    best_before: float | None
    accepted: bool
    tie: bool
    size: int
    also: Mapping[str, float]
    seconds: float
    bytes_read: int


@dataclass(frozen=True, slots=True)
class AtOnce:
    """What scoring several candidates at once came to, in this process.

    Attributes
    ----------
    jobs : int
        How many at once at most.
    beside : int
        Evaluations that ran beside another.
    wasted : int
        Evaluations that decided nothing, those that were ended before they had a score included.
    saved_seconds : float
        What those that decided took, one after the other, less the time in which any ran.
    saved_evaluations : float
        The same, in evaluations of mean length.
    """

    jobs: int
    beside: int
    wasted: int
    saved_seconds: float
    saved_evaluations: float


@dataclass(frozen=True, slots=True)
class GreedyResult:
    """What a greedy soup came to.

    Attributes
    ----------
    path : Path or None
        Where the soup is, if one was written.
    members : tuple of Member
        What was kept, in order of acceptance, with merged weights.
    score : float
        Of the soup, on the held-out set.
    ingredients : int
        How many there were to choose from.
    rule : Rule
    own_scores : dict of path to float
    ties : list of lists of paths
        Ingredients whose own scores are equal.
    trials : tuple of TrialRecord
    evaluations : int
        How often the evaluator was called in this process.
    reads : dict of path to int
        How often each ingredient was read in this process, beyond its own scoring.
    bytes_read, bytes_written : int
    rebuilt : int
        How often the running sum was made anew from its members.
    peak_bytes : int
        What was owned at most, evaluators in this process included.
    seconds : float
    at_once : AtOnce or None
        None where candidates were scored one after the other.
    notes : tuple of str
        What a reader should know of the ingredients, tensors that are left out among it.
    """

    path: Path | None
    members: tuple[Member, ...]
    score: float
    ingredients: int
    rule: Rule
    own_scores: dict[str, float]
    ties: list[list[str]]
    trials: tuple[TrialRecord, ...]
    evaluations: int
    reads: dict[str, int]
    bytes_read: int
    bytes_written: int
    rebuilt: int
    peak_bytes: int
    seconds: float
    at_once: AtOnce | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_best_single(self) -> bool:
        """Whether the soup is the best single ingredient because no other helped it."""
        rule = self.rule
        tried = any(trial.change > 0 for trial in self.trials)
        return len(self.members) == 1 and rule.order == "score" and not rule.prune and not rule.restarts and tried

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``decisions.json``."""
        document = asdict(self)
        document["path"] = None if self.path is None else str(self.path)
        return document
