"""A soup that does not exist yet: to be streamed into a module, taken tensor by tensor, or written."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from streamsoup.checkpoints import Checkpoint
from streamsoup.companions import copy_companions
from streamsoup.errors import DestinationError
from streamsoup.files import write_durably, writing_to
from streamsoup.layout import Layout
from streamsoup.methods import Coefficients
from streamsoup.outcome import Outcome
from streamsoup.plan import Plan
from streamsoup.saving import Origin, save_soup
from streamsoup.sinks import MemorySink, ModuleSink, as_tensor
from streamsoup.write import FileSink, Sink

if TYPE_CHECKING:
    import torch

    from streamsoup.sums.members import Member
    from streamsoup.sums.running import RunningSoup


_MARK = ".streamsoup-candidate"
_OUR_SHARDS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class Candidate:
    """A soup that can be made at once, from a running sum and an ingredient, or from ingredients.

    Nothing is read before one of its methods is called; each call reads its operands once. Nothing needs to be rolled
    back: a candidate is written from the sum and the ingredient, which it does not change.

    Attributes
    ----------
    members : tuple of Member
        Ingredients and weights, in order.
    is_exact : bool
        Whether its bits are those of ``streamsoup soup`` of these members.
    path : Path or None
        Where it lies as files: an ingredient's own place, or where `write` put it.
    """

    def __init__(
        self,
        running: RunningSoup,
        members: tuple[Member, ...],
        operands: tuple[Checkpoint, ...],
        numbers: Coefficients,
        *,
        is_exact: bool,
    ) -> None:
        self.members = members
        self.is_exact = is_exact
        self.path: Path | None = None
        self.stamps: dict[str, tuple[int, int]] = {}  # size and time of the files that were written
        self._running = running
        self._operands = operands
        self._numbers = numbers

    @property
    def plan(self) -> Plan:
        """The plan of making it."""
        return self._running.plan(self._operands, self._numbers)

    def stream(self, sink: Sink) -> Outcome:
        """Make it, tile by tile, into any sink.

        Raises
        ------
        MismatchError, NonFiniteError
        """
        plan = self.plan
        with self._running.sources(self._operands, first=self.members[0].path) as sources:
            outcome = self._running.pool.run(plan, sources, sink)
        self._running.count(plan, outcome)
        return outcome

    def load_into(self, module: torch.nn.Module, *, strict: bool = True) -> None:
        """Write it straight into the parameters and buffers of a live module: no file, no second copy.

        Parameters
        ----------
        module : torch.nn.Module
            Changed. Its tensors keep their dtypes and devices.
        strict : bool
            Refuse names that only one side has; tied tensors need be named once.

        Raises
        ------
        MismatchError
            If names or shapes do not fit; the module is then unchanged.
        StreamsoupError
            If an ingredient cannot be read, has NaN or infinity, or buffers that differ; the module is then partly
            overwritten. Load again.
        """
        self.stream(ModuleSink(module, self.plan, strict=strict))

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Return a mapping of names to tensors that are made when they are looked up."""
        return _LazyTensors(self)

    def write(self, folder: str | Path) -> Path:
        """Write it as a checkpoint folder, reusing files that an earlier candidate left there.

        Returns the folder; where the ingredients are single files, the file in it.

        The files are not made durable: for a soup to keep, use `save`.

        Raises
        ------
        DestinationError
            If the folder has files, but no candidate was ever written there.
        """
        folder = Path(os.path.abspath(folder))
        pool = self._running.pool
        layout = pool.layout
        known = folder in self._running.furnished  # by this process: an earlier one may have died half-way
        if not known:
            _claim(folder)
            _remove_other_shards(folder, layout)
        with FileSink(folder, layout, existing=known, durable=False) as sink:
            self.stream(sink)
        if not known:
            self._running.furnished.add(folder)
            if layout.index is not None:
                write_durably(folder / "model.safetensors.index.json", layout.index)
            copy_companions(pool.first, folder, dtype=pool.options.dtype)
        self.stamps = {shard.name: _stamp(folder / shard.name) for shard in layout.shards}
        files_only = pool.first.folder is None and len(layout.shards) == 1
        self.path = folder / layout.shards[0].name if files_only else folder
        return self.path

    def save(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write it as a soup to keep: durable, in its place only once it is whole, with a manifest.

        Parameters
        ----------
        out : path
            A new folder, or a ``.safetensors`` file.
        overwrite : bool
            Replace a soup that stands there.

        Returns
        -------
        Path

        Raises
        ------
        DestinationError, DiskSpaceError, MismatchError, NonFiniteError
            Nothing is left of it then.

        Notes
        -----
        It cannot be resumed: where the members are on disk, ``streamsoup.soup`` of `RunningSoup.recipe` can. If a
        member is not, the manifest says so in its notes, and there is no recipe beside the weights.
        """
        pool = self._running.pool

        def fill(sink: Sink) -> Origin:
            self.stream(sink)
            return self._running.origin(self.members, is_exact=self.is_exact)

        return save_soup(
            out,
            self.plan,
            [pool.first, *(pool.open(m.path) for m in self.members)],
            fill,
            device=pool.backend.name,
            dtype=pool.options.dtype,
            overwrite=overwrite,
        )

    def untouched_files(self) -> list[Path]:
        """Files of shards that `write` made; none if somebody changed one since."""
        if self.path is None:
            return []
        folder = self.path if self.path.is_dir() else self.path.parent
        try:
            same = all(_stamp(folder / name) == stamp for name, stamp in self.stamps.items())
        except OSError:
            same = False
        return [folder / name for name in sorted(self.stamps)] if same else []

    def tensor_bytes(self, tensor: int) -> npt.NDArray[np.uint8]:
        """Make one tensor, by position; returns its bytes as a uint8 array."""
        plan = self.plan
        sink = MemorySink(plan)
        with self._running.sources(self._operands, first=self.members[0].path) as sources:
            outcome = self._running.pool.run_tensor(plan, sources, sink, tensor)
        self._running.bytes_read += outcome.bytes_read
        return sink.arrays.get(tensor, np.empty(0, np.uint8))  # an empty tensor has no tile


class _LazyTensors(Mapping[str, "torch.Tensor"]):
    """Tensors of a candidate by name, made when they are looked up."""

    def __init__(self, candidate: Candidate) -> None:
        self._candidate = candidate
        self._plan = candidate.plan
        self._positions = self._plan.table.positions()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._positions[name]
        return as_tensor(self._plan, tensor, self._candidate.tensor_bytes(tensor))

    def __contains__(self, name: object) -> bool:
        return name in self._positions

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.table.names)

    def __len__(self) -> int:
        return len(self._plan.table)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def is_for_candidates(folder: Path) -> bool:
    """Whether a folder was made for candidates, or is an empty one."""
    return folder.is_dir() and ((folder / _MARK).exists() or not any(folder.iterdir()))


def remove_candidate(folder: Path) -> None:
    """Remove a folder that was made for candidates; its mark goes last, so that what a crash leaves is known as one."""
    if not is_for_candidates(folder):
        return
    for path in folder.iterdir():
        if path.name != _MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


def _claim(folder: Path) -> None:
    """Make a folder for candidates, or take one that was made for them."""
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _MARK).exists():
            if any(folder.iterdir()):
                raise DestinationError(
                    f"{folder}: has files that are no candidate's, which would be overwritten. Name a new folder."
                )
            (folder / _MARK).touch()


def _remove_other_shards(folder: Path, layout: Layout) -> None:
    """Remove shards and an index that another layout left in a folder for candidates."""
    names = {shard.name for shard in layout.shards}
    for file in folder.iterdir():
        if _OUR_SHARDS.fullmatch(file.name) and file.name not in names:
            file.unlink()
    if layout.index is None:
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
