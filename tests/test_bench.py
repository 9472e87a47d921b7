"""Ceilings and the engine against them: figures that hang together, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factory import fine_tunes

import streamsoup
from streamsoup.bench import BenchOptions, ceilings, machine, run_bench
from streamsoup.bench.presets import PRESETS
from streamsoup.bench.scratch import scratch_folder
from streamsoup.bench.synthetic import checkpoint_bytes
from streamsoup.cli import main
from streamsoup.errors import DiskSpaceError, RecipeError, StreamsoupError
from streamsoup.kernels.stream import STREAM_BYTES, stream_loops


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small arrays and writes: what is tested is not how fast this machine is."""
    monkeypatch.setattr("streamsoup.bench.run.last_level_cache_bytes", lambda: 1 << 10)
    monkeypatch.setattr("streamsoup.bench.run._LEAST_ARRAY_BYTES", 1 << 16)
    monkeypatch.setattr("streamsoup.bench.run._WRITE_BYTES", 3 << 20)
    monkeypatch.setattr("streamsoup.bench.run._DEVICE_BYTES", 3 << 20)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).rglob("*") if p.is_file()}


def test_the_loops_do_what_their_names_say():
    a, b, c = (np.arange(1000.0) + k for k in (0, 10, 20))
    loops = stream_loops()
    loops["copy"](a, b, c)
    assert np.array_equal(c, a)
    loops["scale"](a, b, c)
    assert np.array_equal(b, 3 * c)
    loops["add"](a, b, c)
    assert np.array_equal(c, a + b)
    loops["triad"](a, b, c)
    assert np.array_equal(a, b + 3 * c)
    assert {*loops, "read"} == STREAM_BYTES.keys()


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("vit-b32", 88.2e6), ("vit-l14", 304e6), ("vit-g", 1.845e9), ("llama-7b", 6.738e9), ("moe-many-tensors", 6.4e6)],
)
def test_presets_have_the_sizes_of_the_networks(preset, parameters):
    assert checkpoint_bytes(preset, "bf16") / 2 == pytest.approx(parameters, rel=0.01)
    assert len(dict(PRESETS[preset]())) == len(list(PRESETS[preset]())), "a name comes twice"


def test_there_are_many_tensors_in_the_preset_of_that_name():
    assert len(list(PRESETS["moe-many-tensors"]())) == 50_000


def test_every_piece_of_every_file_is_read_once():
    sizes = [5 << 20, 0, 1, 2 << 20]
    pieces = ceilings.interleaved(sizes)
    assert len(pieces) == len(set(pieces))
    for k, size in enumerate(sizes):
        offsets = sorted(o for file, o in pieces if file == k)
        assert offsets == list(range(0, size, ceilings.PIECE_BYTES))


def test_an_error_in_a_thread_is_not_lost(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"1" * 100)

    def fail():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        ceilings.plain_read_seconds([path], 2, beside=fail)

    def broken(mine):
        for _ in mine:
            raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        ceilings.in_threads(3, broken, [(0, 0)] * 9)


def test_a_report_hangs_together_and_nothing_is_left(tmp_path):
    steps = []
    options = BenchOptions(preset="tiny", ingredients=3, folder=str(tmp_path), budget_bytes=64 << 20)
    report = run_bench(options, step=steps.append)
    assert list(tmp_path.iterdir()) == []
    assert steps
    names = [ceiling.name for ceiling in report.ceilings]
    assert names[:7] == [*(f"memory {n}" for n in STREAM_BYTES), "mapped read, warm", "preadv, warm"]
    assert {"page cache write", "disk write"} <= set(names)
    assert len([n for n in names if n.startswith("disk read")]) + len(report.skipped) == 3
    for ceiling in report.ceilings:
        rate = ceiling.gb_per_s
        assert 0 < rate.least <= rate.median <= rate.most
        assert len(rate.samples) == 5
    engine = report.engine
    assert engine.input_bytes == 3 * engine.output_bytes == 3 * checkpoint_bytes("tiny", "bf16")
    assert engine.gb_per_s.median == pytest.approx(engine.input_bytes / engine.seconds.median / 1e9)
    assert engine.limit.name == max(engine.stages, key=lambda stage: stage.seconds).name
    assert engine.projected_peak_bytes <= engine.budget_bytes == 64 << 20
    by_name = {ceiling.name: ceiling.gb_per_s.median for ceiling in report.ceilings}
    for stage in engine.stages:
        if stage.share is not None:
            assert stage.share == pytest.approx(stage.gb_per_s / by_name[stage.ceiling])
    assert engine.cache.startswith("warm")
    assert json.loads(json.dumps(report.to_json()))["engine"]["result_hash"] == engine.result_hash


@pytest.mark.parametrize("device", ["torch:cpu", "torch:cpu,torch:cpu"])
def test_a_device_is_measured_against_the_way_to_it_and_its_memory(tmp_path, device):
    options = BenchOptions(
        preset="tiny", ingredients=2, folder=str(tmp_path), device=device, device_budget_bytes=1 << 25
    )
    report = run_bench(options)
    by_name = {ceiling.name: ceiling.gb_per_s.median for ceiling in report.ceilings}
    assert {"host to device", "device to host", "device memory"} <= by_name.keys()
    figures, engine = report.device, report.engine
    assert figures.host_to_device_share == pytest.approx(engine.gb_per_s.median / by_name["host to device"])
    assert figures.host_to_device_target == 0.9
    assert figures.trial_share == pytest.approx(figures.trial_gb_per_s.median / by_name["device memory"])
    over = {stage.name: stage.ceiling for stage in engine.stages}
    assert (over["read"], over["reduce"]) == ("mapped read, warm", "host to device")
    assert json.loads(json.dumps(report.to_json()))["device"]["trial_share"] == figures.trial_share


def test_a_trial_on_a_device_has_the_bits_of_a_candidate():
    import torch

    from streamsoup.bench import device as on_device

    made = []
    real = on_device.combine_into

    def noting(out, sources, group, first_block):
        sources[0].copy_(torch.arange(len(sources[0]) // 8, dtype=torch.float64).view(torch.uint8))
        sources[1].copy_(torch.full((len(sources[1]) // 2,), 3.0, dtype=torch.bfloat16).view(torch.uint8))
        real(out, sources, group, first_block)
        made.append(out.view(torch.bfloat16).double())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_device, "combine_into", noting)
        assert len(on_device.trial_seconds("torch:cpu", 5000, 5)) == 5
    assert torch.equal(made[0], ((torch.arange(5000, dtype=torch.float64) + 3) / 2).bfloat16().double())


def test_the_command_prints_what_a_device_was_made_use_of(tmp_path, cli):
    """In a process of its own: the command forks, and torch's threads here would not be there in the child."""
    arguments = ["bench", "--preset", "tiny", "--ingredients", "2", "--dir", str(tmp_path), "--device", "torch:cpu"]
    done = cli(*arguments, "--quiet")
    assert done.returncode == 0, done.stderr
    for words in ("of host to device (target: 90% at least)", "greedy trial, resident", "of device memory"):
        assert words in done.stdout
    refused = cli(*arguments[:-2], "--device-budget", "1GiB")
    assert refused.returncode == 1
    assert "the device is the cpu" in refused.stderr


def test_checkpoints_of_ones_own_are_only_read_and_the_hash_is_that_of_their_soup(tmp_path):
    runs = fine_tunes(tmp_path / "runs", 3)
    before = snapshot(tmp_path / "runs")
    (tmp_path / "scratch").mkdir()
    report = run_bench(BenchOptions(paths=tuple(runs), folder=str(tmp_path / "scratch")))
    assert snapshot(tmp_path / "runs") == before
    assert list((tmp_path / "scratch").iterdir()) == []
    streamsoup.soup(runs, tmp_path / "soup")
    raw = (tmp_path / "soup" / "model.safetensors").read_bytes()
    assert report.engine.result_hash == hashlib.blake2b(raw, digest_size=16).hexdigest()


def test_cold_is_made_sure_or_refused(tmp_path):
    options = BenchOptions(preset="tiny", ingredients=2, folder=str(tmp_path), cold=True)
    probe = tmp_path / "probe"
    probe.write_bytes(os.urandom(4 << 20))
    try:
        machine.drop([probe])
    except StreamsoupError:
        with pytest.raises(StreamsoupError, match="page cache"):
            run_bench(options)
        return
    engine = run_bench(options).engine
    assert engine.cache == "cold: dropped before each run; 0% of the checkpoints was in the page cache"
    assert engine.read_mode in ("ahead", "plain")


def test_dropping_and_warming_say_what_came_of_it(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(os.urandom(4 << 20))
    assert machine.warm([path]) == 1.0
    monkeypatch.setattr(machine, "resident_share", lambda _: 0.5)
    with pytest.raises(StreamsoupError, match=r"50%.*--cold"):
        machine.warm([path])
    with pytest.raises(StreamsoupError, match=r"50%.*--dir"):
        machine.drop([path])


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    for wrong, words in (
        ({"preset": "vit-z"}, "vit-z.*vit-b32"),
        ({"dtype": "int4"}, "bf16"),
        ({"repeats": 2}, "at least 5"),
        ({"ingredients": 0}, "one at least"),
    ):
        with pytest.raises(RecipeError, match=words):
            BenchOptions(**wrong)
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result([*real(path)[:4], 1, *real(path)[5:]]))
    with pytest.raises(DiskSpaceError, match=r"needed.*free"):
        run_bench(BenchOptions(preset="tiny", folder=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("streamsoup.bench.run.cook", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_bench(BenchOptions(preset="tiny", ingredients=2, folder=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_table_and_writes_json_and_a_picture(tmp_path, capfd):
    pytest.importorskip("matplotlib")
    (tmp_path / "scratch").mkdir()
    arguments = ["bench", "--preset", "tiny", "--ingredients", "2", "--dir", str(tmp_path / "scratch")]
    code = main([*arguments, "--json", str(tmp_path / "o.json"), "--plot", str(tmp_path / "o.png")])
    out, err = capfd.readouterr()
    assert code == 0, err
    for word in (
        "memory triad",
        "mapped read, warm",
        "disk write",
        "2 x tiny bf16",
        "limits the run",
        "floor",
        "result",
    ):
        assert word in out
    assert "STREAM" in err
    document = json.loads((tmp_path / "o.json").read_text())
    assert document["engine"]["ingredients"] == 2
    assert (tmp_path / "o.png").stat().st_size > 10_000
    assert {p.name for p in tmp_path.iterdir()} == {"scratch", "o.json", "o.png"}
    assert list((tmp_path / "scratch").iterdir()) == []


def test_json_alone_can_be_read_by_a_machine(tmp_path, capfd):
    code = main(["bench", "--preset", "tiny", "--ingredients", "2", "--dir", str(tmp_path), "--json", "-", "--quiet"])
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    assert math.isfinite(json.loads(out)["engine"]["gb_per_s"]["median"])


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--preset", "vit-z"], "vit-z", 1),
        (["--preset", "tiny", "--ingredients-from", "x"], "--ingredients-from", 2),
        (["--json", "nowhere/o.json"], "nowhere", 2),
        (["--plot", "o.docx"], "o.docx", 1),
        (["--repeats", "1"], "at least 5", 1),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path, monkeypatch, capfd, arguments, words, code):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from streamsoup.bench.scratch import scratch_folder\n"
        "with scratch_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'large').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    mine = tmp_path / "streamsoup-bench-mine"
    mine.mkdir()
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert not left.exists()
        assert {first, second, mine} == set(tmp_path.iterdir())
    assert list(tmp_path.iterdir()) == [mine]
