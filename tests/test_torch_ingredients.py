"""Files of torch.save as ingredients: found, changed, resumed, put on a base, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from adapter_pools import write_adapter, write_base
from factory import read_checkpoint, same_bits, write_checkpoint
from safetensors.torch import load_file
from torch_checkpoints import (
    expected,
    held,
    open_one,
    save,
    save_distributed,
    sharded,
    some_strided,
    some_tensors,
    soup_of,
    to_numpy,
)

import streamsoup
from streamsoup.checkpoints import DerivedCheckpoint, expand_paths, identify, open_checkpoints
from streamsoup.errors import (
    ChangedIngredientError,
    CheckpointError,
    DestinationError,
    MismatchError,
)
from streamsoup.write import FileSink

MODES = ("map", "ahead", "plain")


def test_equal_pickles_are_understood_once(tmp_path, monkeypatch):
    from streamsoup.checkpoints import torch_file

    calls = []
    before = torch_file.read_pickle
    monkeypatch.setattr(torch_file, "read_pickle", lambda *a: calls.append(1) or before(*a))
    runs = [save(tmp_path / str(i) / "run.pt", some_strided(i)) for i in range(3)]
    one, two, three = open_checkpoints(runs)
    assert len(calls) == 1
    assert one.table is two.table
    assert two.pieces is three.pieces
    other = {**some_strided(1), "whole": torch.ones(40, 90)}  # the same names, but other entries
    (four,) = open_checkpoints([save(tmp_path / "4" / "run.pt", other)])
    assert held(four) == expected(other)


@pytest.mark.parametrize("make", [some_tensors, some_strided])
def test_changed_bytes_are_noticed(tmp_path, make):
    path = save(tmp_path / "run.pt", make(0))
    checkpoint = open_one(path)
    before = identify(checkpoint)
    save(tmp_path / "run.pt", make(1))
    with pytest.raises(ChangedIngredientError):
        identify(checkpoint)
    after = identify(open_one(path))
    assert after[0].header_sha256 == before[0].header_sha256
    assert after[0].sampled_blake2b != before[0].sampled_blake2b
    save(tmp_path / "run.pt", {f"x.{n}": t for n, t in make(0).items()})
    assert identify(open_one(path))[0].header_sha256 != before[0].header_sha256


@pytest.mark.parametrize("make", [some_tensors, some_strided])
def test_an_interrupted_soup_goes_on_to_the_same_bits(tmp_path, make, monkeypatch):
    runs = [save(tmp_path / f"run{i}.pt", make(i)) for i in range(3)]
    wanted = soup_of(tmp_path, runs, "wanted")
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(4096, workers)])
    writes, before = [], FileSink.write

    def write(self, *arguments):
        writes.append(1)
        if len(writes) == 8:
            raise OSError("No space")
        return before(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FileSink, "write", write)
        with pytest.raises(OSError, match="No space"):
            streamsoup.soup(runs, tmp_path / "soup", workers=1)
    streamsoup.resume(tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), wanted)


@pytest.mark.parametrize("nested_in", [None, "model"])
def test_layers_are_picked_as_of_safetensors_files(tmp_path, nested_in):
    def slices(one, other):
        return [f"{one}[0:1]+{other}[1:2]"]

    tensors = [
        {
            "embed.w": torch.randn(4, 3),
            **{f"layers.{n}.w": torch.randn(5, 3) for n in range(3)},
            "norm.w": torch.ones(3),
        }
        for _ in range(2)
    ]
    plain = [write_checkpoint(tmp_path / f"plain{i}", to_numpy(t)) for i, t in enumerate(tensors)]
    files = [save(tmp_path / f"run{i}.pt", {"model": t, "ema": t} if nested_in else t) for i, t in enumerate(tensors)]
    wanted = soup_of(tmp_path, slices(*plain), "wanted")
    assert set(wanted) == {"embed.w", "layers.0.w", "layers.1.w", "norm.w"}
    assert same_bits(soup_of(tmp_path, slices(*files), "found", key=nested_in), wanted)
    if not nested_in:
        assert same_bits(soup_of(tmp_path, slices(plain[0], files[1]), "mixed"), wanted)
        first = expected(tensors[0])["layers.0.w"]
        made = save_distributed(tmp_path / "dcp", tensors[0])
        assert held(open_one(slices(made, made)[0]))["layers.0.w"] == first


def test_layers_that_do_not_lie_in_one_piece_are_not_picked(tmp_path):
    path = save(tmp_path / "run.pt", {f"layers.{n}.w": torch.randn(5, 3).t() for n in range(2)})
    with pytest.raises(CheckpointError, match=rf"^{path}: has tensors that are transposed, .* streamsoup convert"):
        open_one(f"{path}[0:1]+{path}[1:2]")
    plain = write_checkpoint(tmp_path / "plain", {"layers.0.w": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"has no entries of which model could be one"):
        streamsoup.soup([f"{plain}[0:1]"], tmp_path / "soup", key="model")


def test_patterns_are_in_natural_order(tmp_path):
    for i in (10, 2, 1):
        save(tmp_path / "runs" / f"epoch{i}.pt", some_tensors(i))
    found = expand_paths([str(tmp_path / "runs" / "*.pt")])
    assert [os.path.basename(path) for path in found] == ["epoch1.pt", "epoch2.pt", "epoch10.pt"]
    assert len(open_checkpoints(found)) == 3


def test_inspect_shows_them(tmp_path):
    def inspect(*words):
        script = [sys.executable, "-m", "streamsoup", "inspect", *words]
        return subprocess.run(script, capture_output=True, text=True, check=False)

    path = save(tmp_path / "run.pt", {"state_dict": some_strided(0)})
    (facts,) = json.loads(inspect(path, "--json", "--tensors").stdout)["checkpoints"]
    assert facts["tensors"] == 10
    rows = {row["name"]: row for row in facts["tensor_list"]}
    assert (rows["transposed"]["shape"], rows["transposed"]["file"]) == ([70, 300], path)
    done = inspect(save(tmp_path / "two.pt", {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}}))
    assert done.returncode == 1
    assert "'model', 'ema'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_output_in_an_ingredient_is_refused(tmp_path):
    sharded(tmp_path / "run", some_tensors(0))
    with pytest.raises(DestinationError):
        streamsoup.soup([str(tmp_path / "run")], tmp_path / "run" / "soup")
    path = save(tmp_path / "run.pt", some_tensors(0))
    with pytest.raises(DestinationError):
        streamsoup.soup([path], path, overwrite=True)


MEMORY = """
import resource, sys
import streamsoup
from streamsoup.checkpoints import open_checkpoints
paths, out, mode = sys.argv[1:-2], sys.argv[-2], sys.argv[-1]
streamsoup.soup(paths[:1], out + "-warm", workers=2, read_mode=mode, nonfinite="allow", include=["small*"])
open_checkpoints(paths)
def data():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
limit = data() + (96 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
streamsoup.soup(paths, out, workers=2, read_mode=mode, budget_bytes=64 << 20)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("mode", ["map", "plain"])
def test_neither_opening_nor_souping_loads_the_storages(tmp_path, mode):
    """256 MiB of ingredients, half of it transposed, where no more than 96 MiB of memory may be had."""
    big = torch.arange(64 << 18, dtype=torch.float32).reshape(4096, 4096)
    paths = [save(tmp_path / f"{i}.pt", {"big": (big + i).t(), "whole": big, "small": torch.ones(2)}) for i in (0, 2)]
    script = [sys.executable, "-c", MEMORY, *paths, str(tmp_path / "soup"), mode]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    soup = read_checkpoint(tmp_path / "soup")
    assert np.array_equal(soup["big"], (big + 1).t().numpy())


def test_a_base_and_an_adapter_may_be_files_of_torch(tmp_path):
    names = ("base", "lora")
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    wanted = soup_of(tmp_path, ["+".join(str(tmp_path / name) for name in names)], "wanted")
    for name, file in zip(names, ("pytorch_model.bin", "adapter_model.bin"), strict=True):
        (old,) = (tmp_path / name).glob("*.safetensors")
        torch.save(load_file(old), tmp_path / name / file)
        old.unlink()
    found = soup_of(tmp_path, ["+".join(str(tmp_path / name) for name in names)], "found")
    assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in wanted.items()}


def strided_adapter(folder, **config):
    """An adapter as a file of torch whose factors are transposed views."""
    write_adapter(folder, **config)
    (old,) = folder.glob("*.safetensors")
    state = {n: t.movedim(0, -1).contiguous().movedim(-1, 0) for n, t in load_file(old).items()}
    assert not all(t.is_contiguous() for t in state.values())
    torch.save(state, folder / "adapter_model.bin")
    return old


@pytest.mark.parametrize("read_mode", MODES)
def test_an_adapter_of_strided_factors_goes_on_a_base(tmp_path, read_mode):
    write_base(tmp_path / "base")
    old = strided_adapter(tmp_path / "lora")
    write_adapter(tmp_path / "stored")
    paths = [f"{tmp_path}/base+{tmp_path}/lora"]
    wanted = soup_of(tmp_path, paths, "wanted", read_mode=read_mode)
    old.unlink()
    found = soup_of(tmp_path, paths, "found", read_mode=read_mode)
    assert same_bits(found, wanted)
    (checkpoint,) = open_checkpoints(paths)
    assert isinstance(checkpoint.parts[1], DerivedCheckpoint)
    beneath = checkpoint.parts[1].scratch_bytes
    assert beneath > 0
    assert (
        checkpoint.scratch_bytes == open_checkpoints([f"{tmp_path}/base+{tmp_path}/stored"])[0].scratch_bytes + beneath
    )
    before = identify(checkpoint)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    assert identify(*open_checkpoints(paths)) != before


def test_settings_of_adapters_with_strided_factors_must_agree(tmp_path):
    paths = [tmp_path / f"lora{i}" for i in range(3)]
    for path, alpha in zip(paths, (8, 8, 64), strict=True):
        strided_adapter(path, lora_alpha=alpha).unlink()
    (note,) = streamsoup.soup(list(map(str, paths[:2])), tmp_path / "soup").notes
    assert "not the average of their products" in note
    for order in (paths, paths[::-1]):
        with pytest.raises(MismatchError, match=r"lora_alpha is (64, but 8|8, but 64)"):
            streamsoup.soup(list(map(str, order)), tmp_path / "other")
    with pytest.raises(MismatchError, match="lora_alpha"):
        streamsoup.soup(list(map(str, paths)), tmp_path / "other", strip_prefix=["base_model."])


def test_an_adapter_of_scaled_floats_is_refused_as_such(tmp_path):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    (old,) = (tmp_path / "lora").glob("*.safetensors")
    state = load_file(old)
    old.unlink()
    scales = {f"{n}_scale": torch.ones(1) for n in state}
    torch.save(
        {n: t.to(torch.float8_e4m3fn) for n, t in state.items()} | scales, tmp_path / "lora" / "adapter_model.bin"
    )
    with pytest.raises(CheckpointError, match="has 8-bit floats with scales"):
        open_checkpoints([f"{tmp_path}/base+{tmp_path}/lora"])
