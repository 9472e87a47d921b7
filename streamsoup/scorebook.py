"""Scores that were given, on disk as soon as they are: nothing is evaluated twice, whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import threading
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

    The bits of a soup may depend on the way of its making, too, and whoever asks first decides for all later ones. So
    a score that was got ahead of its turn is kept under its way as well, and is found only by one that would have made
    the soup the same way; from then on it is the score of these members. What is decided is then what would have been
    decided without looking ahead.

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
    _ahead: dict[tuple[str, str], Entry] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

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
                self._keep(row["key"], row.get("ahead"), entry)
                self.content_digests |= row.get("content_digests", {})
                whole += len(line)
        os.truncate(self.path, whole)

    def key(self, members: Sequence[Member]) -> str:
        """Hash of what is scored."""
        parts: list[object] = [(self.identities[m.path], m.weight) for m in members]
        if self.evaluator:
            parts.append(self.evaluator)
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def _keep(self, key: str, way: str | None, entry: Entry) -> None:
        if way is None:
            self._entries[key] = entry
        else:
            self._ahead[key, way] = entry

    def find(self, members: Sequence[Member], way: str | None = None) -> Entry | None:
        """Return the score of these members if it is known; one that was got ahead is theirs from now on.

        `way`: how they would be made; None takes nothing that was got ahead.
        """
        found = self.look(members, way)
        if found is not None:
            self._entries[self.key(members)] = found
        return found

    def look(self, members: Sequence[Member], way: str | None = None) -> Entry | None:
        """Return what `find` would, and leave everything as it is."""
        key = self.key(members)
        return self._entries.get(key) or (None if way is None else self._ahead.get((key, way)))

    def enter(
        self,
        members: Sequence[Member],
        entry: Entry,
        content_digests: Mapping[str, str] | None = None,
        *,
        way: str | None = None,
    ) -> None:
        """Write a score down, durably, and content digests that became known.

        `way`: how they were made, if it is not their turn yet. May be called by several threads.
        """
        with self._lock:
            self._enter(members, entry, content_digests or {}, way)

    def _enter(
        self, members: Sequence[Member], entry: Entry, content_digests: Mapping[str, str], way: str | None
    ) -> None:
        news = {p: d for p, d in content_digests.items() if self.content_digests.get(p) != d}
        self.content_digests |= news
        key = self.key(members)
        if self.path is None:
            self._keep(key, way, entry)
            return
        row = {
            "key": key,
            "members": [[m.path, m.weight] for m in members],
            "value": entry.scores.value,
            "also": dict(entry.scores.also),
            "seconds": entry.seconds,
            "bytes_read": entry.bytes_read,
            "content_digests": news,
            **({} if way is None else {"ahead": way}),
        }
        with writing_to(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                append_whole(fd, json.dumps(row).encode() + b"\n")
            finally:
                os.close(fd)
        self._keep(key, way, entry)  # no sooner: what decides is on the disk
