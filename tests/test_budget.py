"""What memory may be used, and what is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from streamsoup import budget
from streamsoup.budget import default_budget_bytes, free_bytes, owned_bytes

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("free", "want"),
    [(100 * GIB, 2 * GIB), (4 * GIB, GIB), (512 * MIB, 128 * MIB), (0, 32 * MIB), (64 * MIB, 32 * MIB)],
)
def test_default_is_a_quarter_of_what_is_free_within_limits(monkeypatch, free, want):
    monkeypatch.setattr(budget, "free_bytes", lambda: free)
    assert default_budget_bytes() == want


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{value}\n")


def test_headroom_of_a_container_counts_reclaimable_file_pages_as_free(tmp_path):
    group(tmp_path, memory_max=GIB, memory_current=900 * MIB,
          memory_stat=f"anon 1\ninactive_file {300 * MIB}\nactive_file {100 * MIB}\nslab 5")  # fmt: skip
    assert budget._headroom(tmp_path, "memory.max", "memory.current") == GIB - 500 * MIB


@pytest.mark.parametrize("limit", ["max", 9223372036854771712, "", "nonsense"])
def test_no_limit_is_no_headroom_of_its_own(tmp_path, limit):
    group(tmp_path, memory_max=limit, memory_current=5, memory_stat="anon 1")
    assert budget._headroom(tmp_path, "memory.max", "memory.current") is None


def test_a_missing_cgroup_is_no_limit(tmp_path):
    assert budget._headroom(tmp_path / "none", "memory.max", "memory.current") is None


def test_the_tightest_limit_counts(monkeypatch):
    monkeypatch.setattr(budget, "_cgroup_v2", lambda: 300 * MIB)
    monkeypatch.setattr(budget, "_cgroup_v1", lambda: 200 * MIB)
    assert free_bytes() == 200 * MIB
    monkeypatch.setattr(budget, "_cgroup_v1", lambda: -5)
    assert free_bytes() == 0


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_what_a_process_owns_grows_with_private_and_shared_memory(kind):
    import mmap

    before = owned_bytes()
    held = bytearray(40 * MIB) if kind == "private" else mmap.mmap(-1, 40 * MIB)
    for at in range(0, len(held), 4096):
        held[at] = 1
    assert owned_bytes() - before > 35 * MIB
    del held


def test_a_file_map_is_the_kernels_and_not_ours(tmp_path):
    from streamsoup.maps import FileMap, bytes_at

    (tmp_path / "x").write_bytes(bytes(40 * MIB))
    before = owned_bytes()
    mapped = FileMap(str(tmp_path / "x"), 40 * MIB)
    assert int(bytes_at(mapped.address, 40 * MIB).sum()) == 0
    assert owned_bytes() - before < 10 * MIB
    mapped.close()


def test_the_sampler_sees_a_peak_that_is_gone():
    """In a process of its own: in this one, what other tests left may be given back meanwhile."""
    code = (
        "from streamsoup.budget import PeakSampler\n"
        "with PeakSampler() as sampler:\n"
        "    held = bytearray(64 << 20)\n"
        "    for at in range(0, len(held), 4096):\n"
        "        held[at] = 1\n"
        "    sampler.sample()\n"
        "    del held\n"
        "print(sampler.peak_bytes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 55 * MIB < int(done.stdout) < 120 * MIB
