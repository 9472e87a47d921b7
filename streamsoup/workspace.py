"""The folder beside the destination in which a soup grows, and how it takes its place.

::

    soup.partial/
        job.json      recipe, fingerprint of the plan, identities of the ingredients
        journal       finished tiles; those of other ranks in journal-1, journal-2 ...
        soup/         the files of the soup
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsoup.checkpoints import Checkpoint, DerivedCheckpoint
from streamsoup.checkpoints.beside import WEIGHTS
from streamsoup.errors import DestinationError, ResumeError
from streamsoup.files import is_locked, lock_folder, sync, write_durably
from streamsoup.manifest import MANIFEST_NAME, RECIPE_NAME
from streamsoup.write import move_file, move_folder

FILE_SUFFIX = ".safetensors"
JOB_FORMAT = 2
_NAMES = {"soup", "journal", "job.json", ".job.json.new"}  # all that we put into a workspace, but for
_SHOWN_SECONDS = 5.0
_JOURNAL = re.compile(r"journal(-\d+)?")
_JOB_KEYS = {"id", "recipe", "fingerprint", "overwrite", "boot", "identities", "extras"}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a soup goes: a folder, or a single ``.safetensors`` file with its manifest beside it."""

    path: Path

    @property
    def is_file(self) -> bool:
        """Whether a single file was asked for."""
        return self.path.suffix == FILE_SUFFIX

    @property
    def partial(self) -> Path:
        """The folder for unfinished work."""
        return self.path.with_name(self.path.name + ".partial")

    @property
    def companion_stem(self) -> str:
        """What the names of files beside a single file begin with."""
        return self.path.name.removesuffix(FILE_SUFFIX)

    def beside(self, name: str) -> Path:
        """Where a file lies beside the finished weights; beside a single file it has that one's name in front."""
        return self.path.with_name(f"{self.companion_stem}.{name}") if self.is_file else self.path / name


def destination_of(out: str | Path) -> Destination:
    """Make a destination of what a person wrote.

    Raises
    ------
    DestinationError
        If it is the root, or a file of another format.
    """
    path = Path(os.path.abspath(out))
    if not path.name:
        raise DestinationError(f"{out}: is the root of a file system. Name a new folder.")
    if path.suffix in WEIGHTS - {".safetensors"}:
        raise DestinationError(
            f"{out}: would be a file of another format, but safetensors are written. Name a new folder, or a file that "
            "ends in .safetensors."
        )
    return Destination(path)


def check_destination(
    destination: Destination,
    checkpoints: Sequence[Checkpoint],
    *,
    overwrite: bool,
    resuming: bool = False,
    beside: Sequence[str] = (),
) -> None:
    """Refuse a destination that exists, or that touches an ingredient.

    When `resuming`, files beside a single file may be those that the interrupted run put there. `beside`: names of
    more files that go there.

    Raises
    ------
    DestinationError
    """
    path = destination.path
    for checkpoint in checkpoints:
        _refuse_touching(path, checkpoint)
        _refuse_touching(destination.partial, checkpoint)
    if destination.is_file and not overwrite and not resuming:
        for name in (MANIFEST_NAME, RECIPE_NAME, *beside):
            if os.path.lexists(file := destination.beside(name)):
                raise DestinationError(f"{file}: exists already. Choose another place, or give --overwrite.")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise DestinationError(f"{path}: exists already. Choose another place, or give --overwrite.")
    if path.is_dir() is destination.is_file:
        kind = "folder" if path.is_dir() else "file"
        raise DestinationError(f"{path}: is a {kind}, which a soup of the other kind cannot replace. Remove it.")
    if path.is_dir() and not (path / MANIFEST_NAME).exists() and any(path.iterdir()):
        raise DestinationError(
            f"{path}: has no {MANIFEST_NAME}, so it is no soup of ours, and --overwrite would delete it. "
            "Remove it yourself, or choose another place."
        )


def _refuse_touching(path: Path, checkpoint: Checkpoint) -> None:
    mine = Path(os.path.realpath(path))
    for theirs in (Path(os.path.realpath(place)) for place in _places(checkpoint)):
        if mine == theirs:
            relation = "is"
        elif mine in theirs.parents:
            relation = "contains"
        elif theirs in mine.parents:
            relation = "lies inside"
        else:
            continue
        raise DestinationError(f"{path}: {relation} the ingredient {checkpoint.path}. Choose another place.")


def _places(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield where an ingredient lies; what is put together of others, where these lie."""
    yield checkpoint.path if checkpoint.folder is None else str(checkpoint.folder)  # an id of the Hub is no path
    if isinstance(checkpoint, DerivedCheckpoint):
        for part in checkpoint.parts:
            yield from _places(part)
    else:
        yield from (shard.path for shard in checkpoint.shards)


class Workspace:
    """A ``.partial`` folder."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self.folder = destination.partial
        self.soup = self.folder / "soup"
        self._lock: int | None = None

    def journal_path(self, rank: int = 0) -> Path:
        """Where a rank writes its finished tiles down."""
        return self.folder / (f"journal-{rank}" if rank else "journal")

    def journals(self) -> list[Path]:
        """Return the journals of all ranks that have ever worked here."""
        return sorted(path for path in self.folder.iterdir() if _JOURNAL.fullmatch(path.name))

    @property
    def is_begun(self) -> bool:
        """Whether a tile was finished, as far as the journals' sizes tell."""
        return self.exists and any(path.stat().st_size > 0 for path in self.journals())

    def beside(self, name: str) -> Path:
        """Where a file beside the weights is written; beside a single file it has that one's name in front."""
        prefix = f"{self.destination.companion_stem}." if self.destination.is_file else ""
        return self.soup / f"{prefix}{name}"

    @property
    def exists(self) -> bool:
        """Whether unfinished work lies there."""
        return self.folder.exists()

    def create(self) -> None:
        """Make the folder.

        Raises
        ------
        ResumeError
            If unfinished work lies there.
        """
        self.refuse_unfinished()
        if self.exists:
            self.remove()
        try:
            self.soup.mkdir(parents=True)
        except OSError as error:
            raise DestinationError(f"{self.folder}: cannot be made ({error.strerror}).") from error
        self.hold()

    def refuse_unfinished(self) -> None:
        """Check that no unfinished work of ``streamsoup soup`` lies there.

        Raises
        ------
        ResumeError
        """
        if self.exists and not self.is_leftover:
            raise ResumeError(
                f"{self.folder}: holds the unfinished work of an earlier run. Go on with "
                f"`streamsoup soup --resume {self.destination.path}`, or begin anew with --restart."
            )

    @property
    def is_leftover(self) -> bool:
        """Whether a run died while making or removing the folder: it is ours, and holds no work."""
        if not self.exists:
            return False
        return not self._others() and not (self.folder / "job.json").exists() and not self.is_begun

    def hold(self) -> None:
        """Take the folder for this process, until `release`.

        Raises
        ------
        ResumeError
            If there is no such folder, or another process is at work on it.
        """
        if self._lock is not None:
            return
        if not self.exists:
            raise self._nothing_here()
        fd = lock_folder(self.folder)
        # Another rank of an earlier run may be at work still, though its first one has gone.
        if at_work := next((path for path in self.journals() if is_locked(path)), None):
            os.close(fd)
            raise ResumeError(f"{at_work}: another process is at work on it. Wait until it ends.")
        self._lock = fd

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_ours(self) -> bool:
        """Whether this very object has taken the folder."""
        return self._lock is not None

    @property
    def is_held(self) -> bool:
        """Whether a process, this one included, is at work on the folder."""
        if self._lock is not None:
            return True
        try:
            self.hold()
        except ResumeError:
            return True
        self.release()
        return False

    @property
    def begun_at(self) -> float:
        """When the work was begun, in seconds since 1970; 0 if none was."""
        try:
            return (self.folder / "job.json").stat().st_mtime
        except OSError:
            return 0.0

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _nothing_here(self) -> ResumeError:
        return ResumeError(
            f"{self.destination.path}: there is no unfinished work at {self.folder}. Start without --resume."
        )

    def is_of(self, owner: str) -> bool:
        """Whether unfinished work lies there that belongs to this owner; see `Extras`."""
        try:
            found = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
            return bool(found["extras"]["owner"] == owner)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def shows(self, job_id: str) -> bool:
        """Whether this job is seen here, by a process that only looks; network file systems may take a while."""
        until = time.monotonic() + _SHOWN_SECONDS
        while True:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                document = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
                if document["id"] == job_id:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(0.1)

    def write_job(self, job: dict[str, Any]) -> None:
        """Write down what is being made."""
        write_durably(self.folder / "job.json", json.dumps({"job": JOB_FORMAT, **job}))

    def read_job(self) -> dict[str, Any]:
        """Return what an earlier run wrote down.

        Raises
        ------
        ResumeError
        """
        if self.is_leftover:  # a run died while making or removing the folder: there is no work in it
            self.remove()
            raise self._nothing_here()
        try:
            job = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            job = None
        if not isinstance(job, dict) or job.get("job") != JOB_FORMAT or not job.keys() >= _JOB_KEYS:
            raise ResumeError(f"{self.folder}: is not readable by this version. Begin anew with --restart.")
        return job

    def is_published(self, job_id: str) -> bool:
        """Whether a run died after the soup took its place, but before the workspace was removed."""
        return self._is_in_place("id", job_id)

    def is_published_by(self, owner: str) -> bool:
        """Whether a soup of this owner, made by any of its runs, has taken its place."""
        return self._is_in_place("owner", owner)

    def _is_in_place(self, key: str, value: str) -> bool:
        if self.read_manifest().get(key) != value or not os.path.lexists(self.destination.path):
            return False  # another soup, perhaps the one that this job is to replace; or none any more
        # Of a single file the manifest is moved first and the weights last.
        return not self.destination.is_file or not (self.soup / self.destination.path.name).exists()

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest of the soup at the destination; empty if there is none."""
        try:
            manifest = json.loads(self.destination.beside(MANIFEST_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def publish(self, *, overwrite: bool, durable: bool = True) -> None:
        """Put the finished soup into its place and remove the workspace; if `durable`, wait for the disk before."""
        target = self.destination.path
        for path in (*self.soup.rglob("*"), self.soup) if durable else ():
            sync(path)
        if self.destination.is_file:
            # The weights last: whoever waits for them finds the files beside them complete.
            for file in sorted(p for p in self.soup.iterdir() if p.name != target.name):
                move_file(file, target.with_name(file.name), overwrite=True)
            move_file(self.soup / target.name, target, overwrite=overwrite)
        else:
            old = move_folder(self.soup, target, overwrite=overwrite)
            if old is not None and old != self.soup:
                _remove(old)
        if durable:
            sync(target.parent)
        self.remove()

    def _others(self) -> list[str]:
        """Names in the folder that are not ours."""
        names = {path.name for path in self.folder.iterdir()}
        return sorted(name for name in names - _NAMES if not _JOURNAL.fullmatch(name))

    def remove(self) -> None:
        """Delete the workspace.

        Raises
        ------
        ResumeError
            If another process is at work on it.
        """
        if self.exists:
            self.hold()
            if others := self._others():
                raise ResumeError(f"{self.folder}: holds {others[0]}, which is not ours. Move the folder away.")
            # What says that there is work goes last: a run that dies in between leaves a folder without any.
            for path in (self.soup, *self.journals(), self.folder / "job.json"):
                if os.path.lexists(path):
                    _remove(path)
            _remove(self.folder)
        self.release()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
