"""The tables of the README are those of the committed results, and the generator makes what it says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamsoup.bench.synthetic import make_checkpoints
from streamsoup.checkpoints import open_checkpoints

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def rounding(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("rounding")


def test_tables_of_the_readme_agree_with_the_results():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "<!-- bench:soup-warm -->" in (BENCHMARKS.parent / "README.md").read_text(encoding="utf-8")


def test_the_page_on_scaling_has_the_numbers_of_its_model():
    done = subprocess.run([sys.executable, BENCHMARKS / "scaling_model.py"], capture_output=True, text=True, check=True)
    page = (BENCHMARKS.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert done.stdout.strip() in page


@pytest.mark.parametrize(("shards", "dtype"), [(1, "bf16"), (3, "f32"), (1, "f16")])
def test_synthetic_checkpoints_open_and_differ(tmp_path, shards, dtype):
    make_checkpoints("small-20mb", tmp_path, ingredients=2, dtype=dtype, shards=shards)
    first, second = open_checkpoints([str(tmp_path / "run00"), str(tmp_path / "run01")])
    assert len(first.shards) == shards
    assert first.table.names == second.table.names
    assert Path(first.shards[0].path).read_bytes() != Path(second.shards[0].path).read_bytes()


def test_rounding_of_the_benchmarks_is_that_of_rationals(rounding):
    random = np.random.default_rng(3)
    for dtype, kind in (("bf16", np.uint16), ("f16", np.uint16), ("f32", np.uint32)):
        # All exponents, subnormals too, and neighbours, whose means are ties; no infinities and no NaN.
        bits = random.integers(0, np.iinfo(kind).max, (3, 4000), dtype=kind, endpoint=True)
        bits[1, ::2] = bits[0, ::2] + kind(1)
        with np.errstate(invalid="ignore"):  # a signalling NaN is cast
            bits = bits[:, np.isfinite(rounding.decode(bits, dtype)).all(axis=0)]
        for inputs in (list(bits[:2]), list(bits)):
            values = np.stack([rounding.decode(one, dtype) for one in inputs])
            correct = rounding.correct_bits(inputs, dtype)
            assert np.array_equal(rounding.nearest(values, correct, dtype), correct)
            gaps = np.abs(rounding.decode(correct, dtype) - values.mean(axis=0))
            spacing = np.abs(rounding.decode(correct, dtype) - rounding.decode(correct ^ kind(1), dtype))
            assert np.all(gaps <= spacing)


@pytest.mark.parametrize(
    ("peer", "dtype"),
    [("torch-sum", "bf16"), ("torch-sum", "f32"), ("torch-stack", "f16"), ("torch-averagedmodel", "bf16")],
)
def test_torch_peers_give_the_mean(tmp_path, rounding, peer, dtype):
    paths = make_checkpoints("tiny", tmp_path / "runs", ingredients=2, dtype=dtype)
    files = [path / "model.safetensors" for path in paths]
    before = [file.read_bytes() for file in files]
    command = [sys.executable, BENCHMARKS / "peers.py", peer, tmp_path / "out", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["engine_seconds"] > 0
    soup = rounding.load_bits(tmp_path / "out", dtype)
    ingredients = [rounding.load_bits(path, dtype) for path in paths]
    assert soup.keys() == ingredients[0].keys()
    for name, bits in soup.items():
        mean = sum(rounding.decode(one[name], dtype) for one in ingredients) / 2
        coarsest = {"bf16": 2.0**-7, "f16": 2.0**-10, "f32": 2.0**-22}[dtype]
        np.testing.assert_allclose(rounding.decode(bits, dtype), mean, rtol=coarsest, atol=2.0**-24)
    shares = rounding.shares_correct(ingredients, {"soup": soup}, dtype)
    assert 0 < shares["soup"] <= 1
    assert [file.read_bytes() for file in files] == before


def test_table_of_the_peers_renders_figures_and_failures(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    case_peers = importlib.import_module("case_peers")

    def tool(seconds: float, share: float) -> dict:
        keys = ("process_seconds", "engine_seconds")
        medians = {key: {"median": seconds / (1 + number)} for number, key in enumerate(keys)}
        sizes = {"owned_bytes": 3 << 20, "resident_bytes": 5 << 20}
        return {**medians, **sizes, "share_correctly_rounded": share, "share_equal_to_ours": share}

    peers = {peer: tool(3.0, 0.9999999) for peer in case_peers.PEERS if peer != "sd-mecha"}
    case = {"ingredients": 8, "dtype": "bf16", "preset": "tiny", "read_bytes": 2_000_000_000}
    case |= {
        "failures": {"sd-mecha": "exit code -9"},
        "tools": {"ours": tool(2.5, 1.0), "ours-unsynced": tool(1.5, 1.0), **peers},
    }
    rows = dict(case_peers.table({"versions": {"torch": "2.13.0"}, "cases": [case]}))
    assert rows["**8 x bf16**"] == "tiny, 2.00 GB, warm"
    sizes = "owned 3 MiB (resident 5)"
    assert rows["8 x bf16: ours, durable"] == f"2.50 s; engine 1.25 s; {sizes}; 100 % correct"
    assert rows["8 x bf16: ours, not synced"] == f"1.50 s; engine 0.75 s; {sizes}; 100 % correct"
    assert rows["8 x bf16: torch.stack().mean()"] == (
        f"3.00 s = 2.0 x ours; engine 1.50 s = 2.0 x; {sizes}; 99.999 % correct"
    )
    assert rows["8 x bf16: sd-mecha, n_average"] == "failed: exit code -9"


def test_missing_environment_of_a_peer_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    environments = importlib.import_module("environments")
    with pytest.raises(SystemExit, match=rf"Run python benchmarks/environments.py --dir {tmp_path}"):
        environments.python_of(tmp_path, "mergekit")
    for name in environments.ENVIRONMENTS | environments.HOSTS:
        assert all("==" in line for line in environments.pins(name).split())
        assert "torch==2.13.0" in environments.pins(name).split()
