"""Windows of mapped files: read ahead, dropped behind, and never what was cached before."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from factory import any_bits, fine_tunes, write_checkpoint

from streamsoup.checkpoints import identify, open_checkpoints
from streamsoup.errors import IngredientReadError
from streamsoup.maps import FileMap, bytes_at
from streamsoup.open_files import OpenFiles
from streamsoup.read import open_sources
from streamsoup.windows import LARGEST_WINDOW, SMALLEST_WINDOW, Windows, window_bytes

SIZE = LARGEST_WINDOW


def make_cold(path: Path) -> None:
    """Drop a file from the page cache; skip where the file system does not."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(path).any():
        pytest.skip("this file system keeps what it should drop")


def cached(path: Path, size: int = SIZE) -> np.ndarray:
    """Shares of a file's windows that are in the page cache."""
    mapped = FileMap(str(path), path.stat().st_size)
    shares = mapped.resident_shares(size)
    mapped.close()
    return shares


@pytest.fixture
def path(tmp_path):
    """Five windows and a half, cold."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(5 * SIZE + SIZE // 2))
    make_cold(path)
    return path


@pytest.fixture
def opened(path):
    """The windows of the cold file."""
    mapped = FileMap(str(path), path.stat().st_size)
    yield mapped, Windows(mapped, str(path), OpenFiles(), SIZE)
    mapped.close()


def test_a_window_is_loaded_whole_and_dropped_when_all_of_it_was_used(path, opened):
    mapped, windows = opened
    windows.load(2 * SIZE - 10, 20)
    windows.load(2 * SIZE, SIZE)
    assert (cached(path)[1:3] == 1).all()
    known = bytes_at(mapped.address + 2 * SIZE, SIZE).tobytes()
    windows.drop(2 * SIZE, SIZE - 1)
    assert cached(path)[2] == 1
    windows.drop(3 * SIZE - 1, 1)
    assert cached(path)[2] == 0
    assert cached(path)[1] == 1
    windows.close()
    assert cached(path)[1] == 0
    assert path.read_bytes()[2 * SIZE : 3 * SIZE] == known


def test_what_was_cached_before_stays_cached(path):
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), SIZE, SIZE)
    size = path.stat().st_size
    mapped = FileMap(str(path), size)
    windows = Windows(mapped, str(path), OpenFiles(), SIZE)
    windows.load(0, size)
    assert cached(path).all()
    windows.drop(0, size)
    windows.close()
    mapped.close()
    assert cached(path).tolist() == [0, 1, 0, 0, 0, 0]


def test_a_file_cut_short_is_an_error_and_not_a_signal(tmp_path):
    (run,) = fine_tunes(tmp_path, 1)
    checkpoints = open_checkpoints([run])
    file = Path(checkpoints[0].shards[0].path)
    with open_sources(checkpoints, "ahead") as (source,):
        source.load(0, 0, 1)
        with open(file, "rb+") as handle:
            handle.truncate(0)
        source._windows[0]._left[:] = -1
        with pytest.raises(IngredientReadError, match=r"run1.*cut short"):
            source.load(0, 0, 8)


def many_tensors(folder: Path) -> str:
    rng = np.random.default_rng(0)
    return str(write_checkpoint(folder / "r", {f"w{i}": any_bits(rng, "BF16", (30_000,)) for i in range(40)}))


def test_identifying_a_cold_checkpoint_leaves_it_cold(tmp_path):
    run = many_tensors(tmp_path)
    checkpoints = open_checkpoints([run])
    file = Path(checkpoints[0].shards[0].path)
    warm = identify(checkpoints[0])
    assert cached(file, mmap.PAGESIZE).all()
    make_cold(file)
    assert identify(checkpoints[0]) == warm
    assert not cached(file, mmap.PAGESIZE).any()


def test_windows_shrink_with_the_number_of_files():
    sizes = [window_bytes(n) for n in (1, 8, 64, 500, 100_000)]
    assert sizes[:3] == [LARGEST_WINDOW] * 3
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == SMALLEST_WINDOW
    assert 2 * 500 * window_bytes(500) <= 512 << 20
