"""Greedy soups by a command, of every kind of ingredient: it is given files that it can read, always."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_pools import write_adapter, write_base
from factory import read_checkpoint, same_bits, write_checkpoint

import streamsoup

SCORER = """
import json, sys
from pathlib import Path
from safetensors import safe_open

folder = Path(sys.argv[1])
names = {}
for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
    with safe_open(file, "pt") as opened:
        names |= {name: str(opened.get_tensor(name).dtype) for name in opened.keys()}
with open(sys.argv[2], "a") as log:
    print(json.dumps([str(folder), names]), file=log)
print(1.0)
"""


@pytest.fixture
def pool(tmp_path):
    """One network as safetensors, as a file of torch, with an adapter on it, and with a prefix."""
    base = write_base(tmp_path / "base")
    write_base(tmp_path / "plain", seed=5)
    write_adapter(tmp_path / "lora")
    tensors = {
        name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if name != "ids" else torch.from_numpy(array)
        for name, array in base.items()
    }
    torch.save(tensors, tmp_path / "saved.pt")
    write_checkpoint(tmp_path / "prefixed", {f"module.{name}": array for name, array in base.items()})
    return tmp_path, base


def scored(folder, ingredients, **options):
    """Run it; returns what the command was given: paths, and dtypes by name."""
    (folder / "score.py").write_text(SCORER)
    log = folder / "log.jsonl"
    command = f"{sys.executable} {folder / 'score.py'} {{soup}} {log}"
    result = streamsoup.greedy(ingredients, folder / "soup", score=command, workdir=folder / "work", **options)
    assert len(result.members) == len(ingredients)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_command_reads_every_kind_under_the_names_and_dtypes_of_the_soup(pool):
    folder, base = pool
    ingredients = [str(folder / "plain"), f"{folder / 'base'}+{folder / 'lora'}", str(folder / "saved.pt")]
    given = scored(folder, ingredients)
    assert len(given) == 5  # each alone, and two trials
    expected = {name: "torch.int64" if name == "ids" else "torch.bfloat16" for name in base}
    assert all(names == expected for _, names in given)
    in_place = [path for path, _ in given if Path(path) == folder / "plain"]
    assert len(in_place) == 1  # what needs no copy is not copied
    streamsoup.soup(ingredients, folder / "uniform")
    assert same_bits(read_checkpoint(folder / "soup"), read_checkpoint(folder / "uniform"))


def test_what_is_renamed_is_written_for_it(pool):
    folder, base = pool
    given = scored(folder, [str(folder / "prefixed"), str(folder / "plain")], strip_prefix=["module."])
    assert all(names.keys() == base.keys() for _, names in given)


def test_two_ingredients_have_two_names_in_the_table(pool, cli):
    folder, _ = pool
    write_adapter(folder / "lora2", seed=9)
    paths = [f"{folder / 'base'}+{folder / 'lora'}", f"{folder / 'base'}+{folder / 'lora2'}"]
    done = cli("greedy", *paths, "--score", "echo 1", "-o", folder / "table")
    assert done.returncode == 0, done.stderr
    assert {"base+lora", "base+lora2"} <= set(done.stdout.split())
