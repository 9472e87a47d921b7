"""Soups are compared with what their recipes make: bit for bit, however they were made, all or in part."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from factory import SHAPES, fine_tunes, realistic, write_checkpoint

import streamsoup
from streamsoup.checkpoints import open_checkpoints
from streamsoup.errors import BudgetError, CheckpointError, RecipeError
from streamsoup.tiling import BLOCK_ELEMENTS

LARGE = {**SHAPES, "big": (700, 1000)}


@pytest.fixture
def runs(tmp_path):
    return [
        str(write_checkpoint(tmp_path / f"run{i + 1}", {**realistic(i, LARGE, "BF16"), "ids": np.arange(9)}, shards=2))
        for i in range(3)
    ]


def flip(soup, name, element, bit=0):
    """Change one bit of an element of a soup."""
    (checkpoint,) = open_checkpoints([str(soup)])
    position = checkpoint.table.names.index(name)
    place = int(checkpoint.table.begins[position]) + element * checkpoint.table.dtype(position).itemsize
    with open(checkpoint.shards[int(checkpoint.table.shards[position])].path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


WAYS = {
    "uniform": {},
    "float32": {"dtype": "float32", "shard_size": "1MB"},
    "coefficients": {"coefficients": [1, -0.5, 0.25]},
    "include": {"include": ["big"], "weights": [1, 2, 3]},
    "ties": {"method": "ties", "base": 0, "parameters": {"density": 0.3}},
    "dare": {"method": "dare_linear", "base": 0, "parameters": {"density": 0.3, "seed": 3}},
    "model_stock": {"method": "model_stock", "base": 0},
    "geometric_median": {"method": "geometric_median"},
    "fisher": {"method": "fisher", "importances": (0, 1, 2)},
    "by_depth": {"method": "task_arithmetic", "base": 0, "parameters": {"lambda": [0.1, 0.9]}},
}


def cook(runs, out, options):
    options = dict(options)
    if "base" in options:
        options["base"] = runs[options["base"]]
        runs = runs[1:]
    if "importances" in options:
        options["importances"] = [runs[i] for i in options["importances"]]
        options["nonfinite"] = "allow"
    return streamsoup.soup(runs, out, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sample", [None, "200kB"], ids=["all", "sample"])
def test_a_soup_is_what_its_recipe_makes_and_one_bit_is_found(tmp_path, runs, way, sample):
    cook(runs, tmp_path / "soup", WAYS[way])
    found = streamsoup.verify(tmp_path / "soup", sample=sample)
    assert found.is_same, found
    assert found.whole is (sample is None)
    assert (found.share == 1) is (sample is None)
    assert found.bytes_compared > 0
    before = found.bytes_compared
    flip(tmp_path / "soup", "big", 699_999, bit=3)
    found = streamsoup.verify(tmp_path / "soup", sample=None)
    assert not found.is_same
    assert found.problems == ()
    assert (found.differing, found.first.tensor, found.first.index) == (1, "big", (699, 999))
    assert found.first.expected[0] ^ found.first.found[0] == 8
    assert before <= found.bytes_compared


def test_a_bit_in_the_sample_is_found_and_one_outside_is_not(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    seen = {}
    for seed in range(40):
        flip(tmp_path / "soup", "big", 300_000)
        found = streamsoup.verify(tmp_path / "soup", sample="140kB", seed=seed)
        again = streamsoup.verify(tmp_path / "soup", sample="140kB", seed=seed, workers=1)
        flip(tmp_path / "soup", "big", 300_000)
        assert found.is_same == again.is_same
        seen[found.is_same] = seed
        if len(seen) == 2:
            return
    pytest.fail(f"of 40 samples of a tenth of the soup all said the same: {seen}")


@pytest.mark.parametrize(
    "options", [{"device": "torch:cpu"}, {"read_mode": "plain"}, {"read_mode": "ahead"}, {"workers": 3}]
)
@pytest.mark.parametrize("way", ["uniform", "ties"])
def test_by_every_way(tmp_path, runs, monkeypatch, way, options):
    monkeypatch.setattr("streamsoup.tiling._preferences", lambda workers: [(2 * BLOCK_ELEMENTS, workers)])
    cook(runs, tmp_path / "soup", WAYS[way])
    assert streamsoup.verify(tmp_path / "soup", sample=None, **options).is_same
    assert streamsoup.verify(tmp_path / "soup", sample="100kB", **options).is_same
    for element in (600_000, 5, 400_000):  # the first is named whatever tile came first
        flip(tmp_path / "soup", "big", element)
    found = streamsoup.verify(tmp_path / "soup", sample=None, **options)
    assert (found.differing, found.first.element) == (3, 5)


def test_a_copied_tensor_is_compared_too(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    flip(tmp_path / "soup", "ids", 4)
    found = streamsoup.verify(tmp_path / "soup")
    assert (found.first.tensor, found.first.element) == ("ids", 4)


def test_single_files_conversions_and_what_was_moved(tmp_path, runs):
    streamsoup.soup(runs[:2], tmp_path / "soup.safetensors")
    streamsoup.convert(runs[0], tmp_path / "converted", dtype="float16")
    assert streamsoup.verify(tmp_path / "soup.safetensors", sample=None).is_same
    assert streamsoup.verify(tmp_path / "converted", sample=None).is_same
    places = [shutil.move(run, tmp_path / f"moved{i}") for i, run in enumerate(runs)]
    found = streamsoup.verify(tmp_path / "soup.safetensors")
    assert len(found.problems) == 2
    assert all("--ingredients" in p and f"run{i + 1}" in p for i, p in enumerate(found.problems))
    assert found.bytes_compared == 0
    assert streamsoup.verify(tmp_path / "soup.safetensors", ingredients=places[:2], sample=None).is_same
    swapped = streamsoup.verify(tmp_path / "soup.safetensors", ingredients=places[1::-1])
    assert len(swapped.problems) == 2
    assert "its data changed since the soup was made" in swapped.problems[0]
    with pytest.raises(RecipeError, match=r"3 place\(s\) of ingredients, but .* was made of 2 checkpoints"):
        streamsoup.verify(tmp_path / "soup.safetensors", ingredients=places)


def test_base_and_importances_that_were_moved_are_named_in_the_recipes_order(tmp_path, runs):
    cook(runs, tmp_path / "soup", WAYS["ties"])
    cook(runs, tmp_path / "fisher", WAYS["fisher"])
    places = [shutil.move(run, tmp_path / f"moved{i}") for i, run in enumerate(runs)]
    assert streamsoup.verify(tmp_path / "soup", ingredients=places, sample=None).is_same
    assert streamsoup.verify(tmp_path / "fisher", ingredients=places * 2, sample=None).is_same


def test_a_greedy_soup(tmp_path, runs):
    streamsoup.greedy(
        runs, tmp_path / "soup", score=lambda candidate: -abs(len(candidate.members) - 2), workdir=tmp_path / "work"
    )
    found = streamsoup.verify(tmp_path / "soup", sample=None)
    assert found.is_same, found
    assert found.ingredients == 2


def test_a_soup_by_groups_of_tensors_as_learned_ones_are(tmp_path, runs):
    parameters = {"weight": [{"filter": "big", "value": 0.3}, {"value": 0.7}]}
    streamsoup.soup(runs, tmp_path / "soup", parameters=parameters)
    assert streamsoup.verify(tmp_path / "soup", sample=None).is_same


def test_data_that_changed_where_no_sample_lies_is_found_with_all(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    flip(runs[1], "big", 7)
    found = streamsoup.verify(tmp_path / "soup", sample=None)
    (problem,) = found.problems
    assert problem.startswith(f"{runs[1]}: its data changed since the soup was made. Put the old file back, or name")
    assert not found.is_same


# -- files -------------------------------------------------------------------------------------------------------


def shorten(soup):
    shard = soup / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def rename(soup):
    shard = soup / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"norm.scale"', b'"norm.scalf"'))


def swap(soup):
    shard = soup / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"BF16"', b'"F16" ', 1))


def metadata(soup):
    shard = soup / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"format":"pt"', b'"format":"tf"'))


def other_size(soup):
    manifest = json.loads((soup / "streamsoup.json").read_text())
    manifest["shards"][0]["size_bytes"] += 1
    (soup / "streamsoup.json").write_text(json.dumps(manifest))


def other_dtype(soup):
    recipe = (soup / "recipe.yaml").read_text()
    (soup / "recipe.yaml").write_text(recipe.replace("dtype: null", "dtype: float32"))


def gone(soup):
    (soup / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (shorten, "model.safetensors"),
        (rename, "norm.scale: missing in the soup, but BF16 (5,) by the recipe."),
        (swap, "F16 "),
        (metadata, "its header (offsets or metadata) is not what the recipe makes"),
        (other_size, "in the manifest"),
        (other_dtype, "by the recipe"),
        (gone, "no .safetensors file"),
    ],
)
def test_files_that_do_not_agree_are_a_sentence(tmp_path, runs, change, part):
    streamsoup.soup(runs, tmp_path / "soup")
    change(tmp_path / "soup")
    found = streamsoup.verify(tmp_path / "soup")
    assert not found.is_same
    assert len(found.problems) == 1, found.problems
    assert part in found.problems[0]
    assert found.bytes_compared == 0


@pytest.mark.parametrize("name", ["streamsoup.json", "recipe.yaml"])
@pytest.mark.parametrize(
    "text", [None, "", "[]", "{", '{"streamsoup_manifest": 1}', '{"streamsoup_manifest": 1, "ingredients": [3]}']
)
def test_what_has_no_readable_manifest_and_recipe_is_refused(tmp_path, runs, name, text):
    streamsoup.soup(runs, tmp_path / "soup")
    (tmp_path / "soup" / name).unlink()
    if text is not None:
        (tmp_path / "soup" / name).write_text(text)
    with pytest.raises((CheckpointError, RecipeError), match=r"streamsoup\.json|recipe\.yaml"):
        streamsoup.verify(tmp_path / "soup")


def test_a_recipe_of_other_ingredients_is_refused(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    streamsoup.soup(runs[:2], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "recipe.yaml", tmp_path / "soup" / "recipe.yaml")
    with pytest.raises(CheckpointError, match=r"does not belong to recipe\.yaml"):
        streamsoup.verify(tmp_path / "soup")


@pytest.mark.parametrize("options", [{"sample": 0}, {"seed": -1}, {"sample": "many"}])
def test_options_that_make_no_sense_are_refused(tmp_path, runs, options):
    streamsoup.soup(runs, tmp_path / "soup")
    with pytest.raises((RecipeError, ValueError), match=r"not a size|many|negative"):
        streamsoup.verify(tmp_path / "soup", **options)


def test_the_budget_holds_what_compares(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    with pytest.raises(BudgetError):
        streamsoup.verify(tmp_path / "soup", budget_bytes="1MB")
    found = streamsoup.verify(tmp_path / "soup", budget_bytes="64MiB", sample=None)
    assert found.is_same
    assert found.projected_peak_bytes <= 64 << 20


def test_progress_ends_at_its_total(tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    seen = []
    streamsoup.verify(tmp_path / "soup", sample="100kB", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes > 0


# -- command line ------------------------------------------------------------------------------------------------


def test_command_line_same_and_different(cli, tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    done = cli("verify", "soup")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'soup'}: uniform, made of 3 checkpoints\n")
    assert "(100.0%)" in done.stdout
    assert done.stdout.splitlines()[-1].split(maxsplit=1) == ["verdict", "the same, bit for bit"]
    assert cli("verify", "soup", "--all", "--quiet").stdout == ""
    sampled = cli("verify", "soup", "--sample", "100kB", "--seed", "3").stdout
    assert "as far as it was compared" in sampled
    flip(tmp_path / "soup", "big", 1234, bit=7)
    done = cli("verify", "soup", "--all", "--quiet")
    assert done.returncode == 1
    assert "big[1, 234], element 1,234: BF16 " in done.stdout
    assert "differs: 1 element(s)" in done.stdout
    document = json.loads(cli("verify", "soup", "--json").stdout)
    assert document["is_same"] is False
    expected, found = document["first"]["expected"], document["first"]["found"]
    assert int(expected["bits"], 16) ^ int(found["bits"], 16) == 0x80
    assert float(expected["value"]) != float(found["value"])


def test_command_line_with_missing_ingredients(cli, tmp_path, runs):
    streamsoup.soup(runs, tmp_path / "soup")
    shutil.move(runs[1], tmp_path / "moved")
    done = cli("verify", "soup")
    assert done.returncode == 1
    assert len([line for line in done.stdout.splitlines() if line.startswith("  problem ")]) == 1
    assert "cannot be compared" in done.stdout
    assert cli("verify", "soup", "--ingredients", "run1", "moved", "run3").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["run1"], 1, "has no streamsoup.json"),
        (["nowhere"], 1, "has no streamsoup.json"),
        (["soup", "--all", "--seed", "1"], 2, "Give one of them"),
        (["soup", "--sample", "much"], 1, "is not a size"),
        (["soup", "--ingredients", "run1"], 1, "1 place(s) of ingredients"),
    ],
)
def test_an_error_is_one_sentence(cli, tmp_path, runs, arguments, code, part):
    streamsoup.soup(runs, tmp_path / "soup")
    done = cli("verify", *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["ingredients"][0].update(weight=9.0),
        lambda m: m.update(method="greedy"),
        lambda m: m.update(notes=3),
        lambda m: m["ingredients"][0].update(shards=[3]),
    ],
    ids=["weight", "method", "notes", "shards"],
)
def test_a_manifest_that_says_other_things_than_the_recipe_is_refused(tmp_path, change):
    streamsoup.soup(fine_tunes(tmp_path / "runs", 2), tmp_path / "soup")
    file = tmp_path / "soup" / "streamsoup.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not belong to"):
        streamsoup.verify(tmp_path / "soup")
