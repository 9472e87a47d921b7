"""Straight from storage to a device, by a kvikio that is pretended: it is not installed where there is no GPU."""

from __future__ import annotations

import os
import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from device_pools import budget_for, write_runs
from factory import weights_bytes
from fake_lanes import Lane, LateLanes

import streamsoup
from streamsoup.backends import cuda
from streamsoup.cli import main
from streamsoup.errors import IngredientReadError, RecipeError
from streamsoup.read import MappedSource


class CuFile:
    """Reads with plain calls into what must be a tensor; see kvikio's documentation of the same name."""

    calls: ClassVar[list] = []
    short = 0

    def __init__(self, path, flags):
        assert flags == "r"
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, buffer, size, file_offset):
        assert isinstance(buffer, torch.Tensor)
        assert buffer.nbytes == size
        raw = os.pread(self.fd, size - self.short, file_offset)
        buffer[: len(raw)].copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        CuFile.calls.append(size)
        return len(raw)

    def close(self):
        os.close(self.fd)


@pytest.fixture
def kvikio(monkeypatch):
    found = types.ModuleType("kvikio")
    found.CuFile = CuFile
    found.__spec__ = types.SimpleNamespace(name="kvikio")
    found.defaults = types.ModuleType("kvikio.defaults")
    found.defaults.compat_mode = lambda: False
    monkeypatch.setitem(sys.modules, "kvikio", found)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", found.defaults)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found.__spec__)
    monkeypatch.setattr(CuFile, "calls", [])
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("storage"))


METHODS = [{}, {"method": "karcher"}, {"method": "ties", "parameters": {"density": 0.3}}]


@pytest.mark.usefixtures("kvikio")
@pytest.mark.parametrize("rule", METHODS, ids=str)
@pytest.mark.parametrize("when", [{}, {"eager": Lane.RUN}, {"seed": 1}], ids=str)
def test_bits_are_the_same_and_no_byte_goes_by_way_of_the_host(tmp_path, runs, monkeypatch, rule, when):
    monkeypatch.setattr(cuda, "open_lanes", lambda device: LateLanes(device, **when))
    rule = dict(rule, **({"base": runs[0]} if rule.get("method") == "ties" else {}))
    fetched = []
    real = MappedSource.fetch
    monkeypatch.setattr(
        MappedSource, "fetch", lambda self, *place: fetched.append(place[2]) or real(self, *place), raising=True
    )
    result = streamsoup.soup(runs[1:], tmp_path / "one", device="torch:cpu", read_mode="gds", **rule)
    assert result.read_mode == "gds"
    buffers = 9 * 8 * (len(runs) - 1 + ("base" in rule))
    assert sum(fetched) == buffers, "what is only copied, the host must see"
    assert sum(CuFile.calls) >= result.bytes_read - buffers > 0
    monkeypatch.undo()
    streamsoup.soup(runs[1:], tmp_path / "two", **rule)
    assert weights_bytes(tmp_path / "one") == weights_bytes(tmp_path / "two")


@pytest.mark.usefixtures("kvikio")
def test_pieces_that_are_not_whole_tiles_go_by_way_of_the_host(tmp_path, runs):
    budget = budget_for(runs, 1, workers=1, tile_blocks=4)
    streamsoup.soup(runs, tmp_path / "one", device="torch:cpu", read_mode="gds", device_budget_bytes=budget, workers=1)
    streamsoup.soup(runs, tmp_path / "two")
    assert weights_bytes(tmp_path / "one") == weights_bytes(tmp_path / "two")


@pytest.mark.usefixtures("kvikio")
@pytest.mark.parametrize("how", ["short", "error"])
def test_a_read_that_fails_is_named(tmp_path, runs, monkeypatch, how):
    if how == "short":
        monkeypatch.setattr(CuFile, "short", 1)
    else:
        monkeypatch.setattr(CuFile, "read", lambda *_: (_ for _ in ()).throw(RuntimeError("cuFile: error 5027")))
    with pytest.raises(IngredientReadError, match=r"run\d/model.safetensors: cannot be read"):
        streamsoup.soup(runs, tmp_path / "soup", device="torch:cpu", read_mode="gds")


def test_without_it_files_are_mapped_and_a_line_says_so(tmp_path, runs, cli, caplog):
    result = streamsoup.soup(runs, tmp_path / "one", device="torch:cpu", read_mode="gds")
    assert result.read_mode == "map"
    assert "kvikio is not installed" in caplog.text
    done = cli("soup", *runs, "-o", tmp_path / "two", "--device", "torch:cpu", "--read", "gds")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "  files: mapped files, since kvikio is not installed"


@pytest.mark.usefixtures("kvikio")
def test_the_cpu_has_no_use_for_it(tmp_path, runs, capfd, monkeypatch):
    with pytest.raises(RecipeError, match="--read gds"):
        streamsoup.soup(runs, tmp_path / "soup", read_mode="gds")
    monkeypatch.delattr("os.fork")
    assert main(["soup", *runs, "-o", str(tmp_path / "soup"), "--device", "torch:cpu", "--read", "gds"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "  files: kvikio, GPUDirect Storage"
    assert np.all(np.array(CuFile.calls) > 0)
