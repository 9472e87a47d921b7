"""Ingredients by their ids on the Hugging Face Hub, ``org/name`` and ``org/name@revision``: cached, or fetched.

What a branch points to may move. So an id is pinned to a commit, ``org/name@<commit>``, before it is written down.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamsoup.checkpoints.beside import WEIGHTS, companion_names
from streamsoup.errors import CheckpointError, CheckpointNotFoundError, DiskSpaceError, StreamsoupError
from streamsoup.files import existing_parent, require_space

_log = logging.getLogger(__name__)
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(\w[\w.-]*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PIECE = re.compile(r"-\d{5}-of-\d{5}\.\w+")
# By suffix, the first that there is, with the name that most have: it is taken where there are others beside it.
_USUAL = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
# Of a training run, with the suffix of weights.
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "scaler.bin", "rng_state.bin"}
_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository of the Hub at one commit, on this disk.

    Attributes
    ----------
    pinned : str
        ``org/name@<commit>``.
    folder : Path
    weights : tuple of str
        The files of `folder` that hold its tensors, and their index.
    """

    pinned: str
    folder: Path
    weights: tuple[str, ...]

    @property
    def place(self) -> str:
        """What to open: the folder, or its file of weights if there are others beside it."""
        others = [n for n in os.listdir(self.folder) if n not in self.weights and n.endswith(".safetensors")]
        return str(self.folder / self.weights[0] if others and len(self.weights) == 1 else self.folder)


def is_hub_id(path: str) -> bool:
    """Whether a path is the id of a repository; what exists here under that name, or looks local, is none."""
    found = _ID.fullmatch(path)
    if found is None or "--" in found[1] or ".." in found[1] or os.path.splitext(path)[1] in WEIGHTS:
        return False
    # A slip of the pen below a folder that is here asks nobody.
    return not os.path.lexists(path) and not os.path.isdir(path.partition("/")[0])


def resolve(path: str) -> str:
    """Return the local folder of an id, fetching what is missing; another path stays as it is.

    Raises
    ------
    CheckpointError
        In one sentence, if there is no such repository, it may not be read, or the Hub cannot be reached.
    DiskSpaceError
    """
    return str(find_snapshot(path).folder) if is_hub_id(path) else path


def pinned(path: str) -> str:
    """Return an id with its commit; another path stays as it is. Raises as `resolve` does."""
    found = _ID.fullmatch(path)
    if found is None or not is_hub_id(path) or (found[2] and _COMMIT.fullmatch(found[2])):
        return path
    return find_snapshot(path).pinned


def is_there(path: str) -> bool:
    """Whether a path names something: a file or folder here, or an id."""
    return os.path.exists(path) or is_hub_id(path)


def absolute(path: str) -> str:
    """Make a path mean the same from any folder, and an id the same at any time. Raises as `resolve` does."""
    return pinned(path) if is_hub_id(path) else os.path.abspath(path)


def real(path: str) -> str:
    """Return an absolute path without links, or an id with its commit: equal for equal ingredients."""
    return pinned(path) if is_hub_id(path) else os.path.realpath(path)


def find_snapshot(path: str) -> Snapshot:
    """Find a repository in the cache, or fetch its weights and what belongs beside them. Raises as `resolve` does."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise CheckpointNotFoundError(
            f"{path}: no such file or folder here. If it is the id of a repository on the Hugging Face Hub, install "
            "huggingface_hub: pip install 'streamsoup[hub]'.",
            path=path,
        )
    match = _ID.fullmatch(path)
    assert match is not None
    repository, revision = match[1], match[2] or "main"
    found = _in_cache(repository, revision)
    if found is not None and any(companion_names(os.listdir(found.folder))):
        return found
    try:
        return _fetch(path, repository, revision)
    except CheckpointError as error:
        if found is None:
            raise
        _log.warning(f"{found.pinned}: weights are taken from the cache, which has no configuration. {error}")
        return found


def _cache_of(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _in_cache(repository: str, revision: str) -> Snapshot | None:
    """Find a snapshot with all of its weights, without asking the Hub."""
    cache = _cache_of(repository)
    commit = revision
    if not _COMMIT.fullmatch(revision):
        try:
            commit = (cache / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
    folder = cache / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    try:
        weights = choose_weights(repository, set(os.listdir(folder)), lambda name: folder / name)
    except (CheckpointError, OSError):
        return None
    if not all((folder / name).is_file() for name in weights):
        return None
    return Snapshot(f"{repository}@{commit}", folder, weights)


def choose_weights(path: str, names: set[str], fetch: Callable[[str], Path]) -> tuple[str, ...]:
    """Choose the files that hold the tensors of a repository, and their index before them.

    Parameters
    ----------
    path : str
        For messages.
    names : set of str
        All its files.
    fetch : callable taking a name
        Returns where an index can be read.

    Raises
    ------
    CheckpointError
        If there are none, or several to choose from.
    """
    top = sorted(name for name in names if "/" not in name and name not in _NOT_WEIGHTS)
    for suffix, usual in _USUAL.items():
        files = [name for name in top if name.endswith(suffix)]
        indices = [name for name in top if name.endswith(f"{suffix}.index.json")]
        if f"{usual}.index.json" in indices:
            indices = [f"{usual}.index.json"]
        elif usual in files:
            files, indices = [usual], []
        if len(indices) == 1:
            return (indices[0], *_shards_of(path, names, indices[0], fetch(indices[0])))
        if len(files) == 1 and not indices and not _PIECE.search(files[0]):
            return (files[0],)
        if files:
            raise CheckpointError(
                f"{path}: has {len(files)} files of weights ({', '.join(files[:3])}) and {len(indices)} indices, not "
                "one checkpoint. Download the files that you want, and name their folder.",
                path=path,
            )
    raise CheckpointError(
        f"{path}: has no weights ({' or '.join(_USUAL)} files) on the Hub. Name a repository that has.", path=path
    )


def _shards_of(path: str, names: set[str], index: str, place: Path) -> list[str]:
    try:
        weight_map = json.loads(place.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not shards:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: its {index} is no index of shards. Name another revision.", path=path) from None
    if missing := [shard for shard in shards if shard not in names]:
        raise CheckpointError(
            f"{path}: its {index} names {missing[0]}, which it does not have. Name another revision.", path=path
        )
    return shards


def _fetch(path: str, repository: str, revision: str) -> Snapshot:
    """Check all that can be checked, then download what is missing."""
    import huggingface_hub

    with _in_our_words(path, repository, revision):
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_SECONDS)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        weights = choose_weights(
            path,
            set(sizes),
            lambda name: Path(huggingface_hub.hf_hub_download(repository, name, revision=info.sha)),
        )
        wanted = [*weights, *companion_names(sizes)]
        cache = _cache_of(repository)
        present = cache / "snapshots" / str(info.sha)
        _require_space(path, cache, sum(sizes[name] for name in wanted if not (present / name).exists()))
        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=[glob.escape(name) for name in wanted]
            )
        )
    return Snapshot(f"{repository}@{folder.name}", folder, weights)


def _require_space(path: str, cache: Path, needed_bytes: int) -> None:
    try:
        require_space(existing_parent(cache), needed_bytes)
    except DiskSpaceError as error:
        raise DiskSpaceError(f"{path}: does not fit the cache. {error} HF_HOME says where the cache is.") from None


@contextlib.contextmanager
def _in_our_words(path: str, repository: str, revision: str) -> Iterator[None]:
    """Put what the Hub's client raises into one sentence."""
    from huggingface_hub import errors

    network: Any = errors.HfHubHTTPError.__bases__[0]  # of the client's own library, whichever it is
    try:
        yield
    except StreamsoupError:
        raise
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{path}: is gated. Accept its terms at https://huggingface.co/{repository}, and log in with "
            "`hf auth login`.",
            path=path,
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointNotFoundError(
            f"{path}: the repository has no revision {revision}. Name a branch, a tag or a commit of it.", path=path
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointNotFoundError(
            f"{path}: no such file or folder here, and no such repository on the Hub, or none that you may see. "
            "Correct the name, or log in with `hf auth login`.",
            path=path,
        ) from None
    except (OSError, network) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DiskSpaceError(f"{path}: the disk of the cache is full. Make room, or set HF_HOME.") from error
        raise CheckpointNotFoundError(
            f"{path}: no such file or folder here, not whole in the cache of the Hub, and {_why_not(error)}. Connect, "
            "or download it elsewhere and name the folder.",
            path=path,
        ) from error


def _why_not(error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to ask the Hub"
    response = getattr(error, "response", None)
    if isinstance(error, errors.HfHubHTTPError) and response is not None:
        return f"the Hub answers with status {response.status_code}"
    return f"the Hub cannot be reached ({type(error).__name__})"
