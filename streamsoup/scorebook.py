"""Scores that were given, on disk as soon as they are: nothing is evaluated twice, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streamsoup.files import append_whole, writing_to
from streamsoup.score import Scores
from streamsoup.sums import Member


@dataclass(frozen=True, slots=True)
class Entry:
    """One evaluation.

    Attributes
    ----------
    scores : Scores
    seconds : float
        Of making and evaluating the candidate.
    bytes_read : int
        Of ingredients and sums, for making it.
    """

    scores: Scores
    seconds: float
    bytes_read: int


@dataclass
class ScoreBook:
    """Scores by what was scored: the ordered list of ingredient identities and weights.

    Parameters
    ----------
    path : Path or None
        A file of JSON lines, appended and synced at each entry; None keeps them in memory.
    identities : mapping of path to identity key
    evaluator : str
        What scores, in words: a score by another command is another score.

    Attributes
    ----------
    content_digests : dict of path to str
        Of ingredients that were read for what was scored.
    """

    path: Path | None
    identities: Mapping[str, str]
    evaluator: str = ""
    content_digests: dict[str, str] = field(default_factory=dict)
    _entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.exists():
            return
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    entry = Entry(Scores(row["value"], row["also"]), row["seconds"], row["bytes_read"])
                except (ValueError, KeyError, TypeError):
                    break  # a torn last line: what it said is evaluated again
                if not line.endswith(b"\n"):
                    break
                self._entries[row["key"]] = entry
                self.content_digests |= row.get("content_digests", {})
                whole += len(line)
        os.truncate(self.path, whole)

    def key(self, members: Sequence[Member]) -> str:
        """Hash of what is scored."""
        parts: list[object] = [(self.identities[m.path], m.weight) for m in members]
        if self.evaluator:
            parts.append(self.evaluator)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def find(self, members: Sequence[Member]) -> Entry | None:
        """Return the score of these members if it is known."""
        return self._entries.get(self.key(members))

    def enter(self, members: Sequence[Member], entry: Entry, content_digests: Mapping[str, str] | None = None) -> None:
        """Write a score down, durably, and content digests that became known."""
        news = {p: d for p, d in (content_digests or {}).items() if self.content_digests.get(p) != d}
        self.content_digests |= news
        key = self.key(members)
        self._entries[key] = entry
        if self.path is None:
            return
        row = {
            "key": key,
            "members": [[m.path, m.weight] for m in members],
            "value": entry.scores.value,
            "also": dict(entry.scores.also),
            "seconds": entry.seconds,
            "bytes_read": entry.bytes_read,
            "content_digests": news,
        }
        with writing_to(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                append_whole(fd, json.dumps(row).encode() + b"\n")
            finally:
                os.close(fd)
