"""Sums in float32, by option: the same bits everywhere, refused where more was promised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from factory import read_checkpoint, realistic, same_bits, write_checkpoint

import streamsoup
from streamsoup.errors import ChangedIngredientError, NonFiniteError, RecipeError
from streamsoup.journal import Journal
from streamsoup.recipe import Ingredient, Recipe, recipe_from_mapping, recipe_to_mapping
from streamsoup.tiling import choose_tiling

SHAPES = {"a.weight": (130, 41), "b.weight": (70_001,), "b.bias": (5,)}
WEIGHTS = [0.3, 1.7, 0.9]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accumulate")
    return [str(write_checkpoint(folder / f"run{i}", realistic(i, SHAPES, "F32"))) for i in range(3)]


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "soup"
    streamsoup.soup(runs, out, weights=WEIGHTS, accumulate="float32")
    return out


def reference(runs, weights):
    """Operation by operation, as anybody would write it in float32."""
    tensors = [read_checkpoint(Path(path)) for path in runs]
    found = {}
    for name in tensors[0]:
        total = tensors[0][name] * np.float32(weights[0])
        for other, weight in zip(tensors[1:], weights[1:], strict=True):
            total = total + other[name] * np.float32(weight)
        found[name] = total / np.float32(sum(map(np.float64, weights)))
    return found


def test_it_is_what_float32_gives(runs, made, tmp_path):
    assert same_bits(read_checkpoint(made), reference(runs, WEIGHTS))
    streamsoup.soup(runs, tmp_path / "exact", weights=WEIGHTS)
    assert not same_bits(read_checkpoint(made), read_checkpoint(tmp_path / "exact"))


@pytest.mark.parametrize("device", ["cpu", "torch:cpu", "torch:cpu,torch:cpu"])
@pytest.mark.parametrize("read_mode", ["map", "plain"])
@pytest.mark.parametrize("group", [1, 3])
def test_same_bits_for_any_tiles_threads_groups_and_devices(
    runs, made, tmp_path, device, read_mode, group, monkeypatch
):
    def tiling(needs, **options):
        return replace(choose_tiling(needs, **options), tile_elements=4096, group=group)

    monkeypatch.setattr("streamsoup.planner.choose_tiling", tiling)
    streamsoup.soup(
        runs, tmp_path / "soup", weights=WEIGHTS, accumulate="float32", device=device, read_mode=read_mode, workers=3
    )
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(made))


def test_the_output_is_rounded_once_more(runs, made, tmp_path):
    streamsoup.soup(runs, tmp_path / "soup", weights=WEIGHTS, accumulate="float32", dtype="bfloat16")
    expected = {name: a.astype(ml_dtypes.bfloat16) for name, a in read_checkpoint(made).items()}
    assert same_bits(read_checkpoint(tmp_path / "soup"), expected)


def test_what_overflows_on_the_way_is_reported(tmp_path):
    paths = [write_checkpoint(tmp_path / f"r{i}", {"w": np.full(4, 3e38, np.float32)}) for i in range(2)]
    with pytest.raises(NonFiniteError, match=r"w: 4 .*or their sum was for float32.*Leave --accumulate out"):
        streamsoup.soup(paths, tmp_path / "soup", accumulate="float32")
    streamsoup.soup(paths, tmp_path / "exact")


@pytest.mark.parametrize("device", ["cpu", "torch:cpu"])
def test_nothing_is_flushed_to_zero(tmp_path, device):
    """Subnormal ingredients, products, sums and quotients."""
    numbers = np.array([1, 3, 0x7FFFFF, 0x800000, 0x800001, 0x80000001], np.uint32).view(np.float32)
    paths = [str(write_checkpoint(tmp_path / f"r{i}", {"w": np.roll(numbers, i)})) for i in range(3)]
    streamsoup.soup(paths, tmp_path / "soup", weights=WEIGHTS, accumulate="float32", device=device)
    assert same_bits(read_checkpoint(tmp_path / "soup"), reference(paths, WEIGHTS))


def test_a_soup_of_equal_numbers_may_be_another_number(tmp_path):
    """What float64 promises, float32 cannot, for outputs as fine as the sums; of 16 bits it can."""
    same = [str(write_checkpoint(tmp_path / f"r{i}", realistic(0, SHAPES, "F32"))) for i in range(7)]
    streamsoup.soup(same, tmp_path / "soup", accumulate="float32")
    assert not same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(Path(same[0])))
    same = [str(write_checkpoint(tmp_path / f"s{i}", realistic(0, SHAPES, "BF16"))) for i in range(7)]
    streamsoup.soup(same, tmp_path / "half", accumulate="float32", weights=[0.1 * i for i in range(1, 8)])
    assert same_bits(read_checkpoint(tmp_path / "half"), read_checkpoint(Path(same[0])))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "karcher"}, "fixed coefficients.*here: karcher"),
        ({"weights": [1.0, 1e-39, 1.0]}, r"run1: weight 1e-39; with sums in float32 .* 2\^-126"),
        ({"coefficients": [1.0, 1.0, 1e39]}, r"run2: weight 1e\+39; with sums in float32"),
        ({"dtype": "float64"}, "float64 soup"),
        ({"accumulate": "float16"}, "not one of float64, float32"),
    ],
)
def test_refused_where_more_was_promised(runs, tmp_path, options, words):
    with pytest.raises(RecipeError, match=words):
        streamsoup.soup(runs, tmp_path / "soup", **{"accumulate": "float32", **options})
    assert not list(tmp_path.iterdir())


def test_float64_tensors_are_named(tmp_path, runs):
    double = write_checkpoint(tmp_path / "double", realistic(3, SHAPES, "F64"))
    with pytest.raises(RecipeError, match=r"a\.weight.*float64.*double"):
        streamsoup.soup([*runs, double], tmp_path / "soup", accumulate="float32")


def test_what_has_numerics_of_its_own_has_no_such_option(runs, tmp_path):
    with pytest.raises(RecipeError, match="accumulate"):
        streamsoup.RunningSoup(runs, accumulate="float32")
    with pytest.raises(RecipeError, match="accumulate"):
        next(iter(streamsoup.sliding_averages(runs, 2, accumulate="float32")))
    with pytest.raises(RecipeError, match="accumulate"):
        streamsoup.greedy(runs, tmp_path / "soup", score=len, accumulate="float32")
    with pytest.raises(RecipeError, match="accumulate"):  # there it means batches
        streamsoup.learn(runs, None, len, [], tmp_path / "soup", accumulate="float32")
    assert not list(tmp_path.iterdir())


def test_unfinished_work_goes_on_as_it_was_begun(runs, made, tmp_path, monkeypatch, cli):
    appended = Journal.append

    def append_some(self, records):
        appended(self, records[:1])
        raise ZeroDivisionError

    def begun(out):
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", append_some)
            with pytest.raises(ZeroDivisionError):
                streamsoup.soup(runs, out, weights=WEIGHTS, accumulate="float32")

    begun(tmp_path / "soup")
    refused = cli("soup", "--resume", tmp_path / "soup", "--accumulate", "float64")
    assert refused.returncode == 2
    assert "--accumulate" in refused.stderr
    job = tmp_path / "soup.partial" / "job.json"
    told = json.loads(job.read_text())
    job.write_text(json.dumps(told | {"recipe": told["recipe"] | {"accumulate": "float64"}}))
    with pytest.raises(ChangedIngredientError, match="--restart"):
        streamsoup.resume(tmp_path / "soup")
    begun(tmp_path / "other")
    streamsoup.resume(tmp_path / "other", streamsoup.Execution(device="torch:cpu"))
    assert same_bits(read_checkpoint(tmp_path / "other"), read_checkpoint(made))


def test_it_belongs_to_the_recipe(runs, made):
    ingredients = tuple(map(Ingredient, runs))
    plain, single = Recipe(ingredients), Recipe(ingredients, accumulate="float32")
    assert "accumulate" not in recipe_to_mapping(plain)
    assert recipe_from_mapping(recipe_to_mapping(single), where="here") == single
    execution = streamsoup.Execution()
    prints = {streamsoup.plan_soup(r, None, execution)[0].fingerprint for r in (plain, single)}
    assert len(prints) == 2
    assert json.loads((made / "streamsoup.json").read_text())["accumulate"] == "float32"


def test_command_line(runs, made, tmp_path, cli):
    weighted = [f"{path}:{weight}" for path, weight in zip(runs, WEIGHTS, strict=True)]
    done = cli("soup", *weighted, "-o", tmp_path / "soup", "--accumulate", "float32", "--dry-run")
    assert "kept in float32" in done.stdout
    assert cli("soup", *weighted, "-o", tmp_path / "soup", "--accumulate", "float32").returncode == 0
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(made))


def test_recipes_of_mergekit(runs, made, tmp_path, cli):
    models = [{"model": path, "parameters": {"weight": w}} for path, w in zip(runs, WEIGHTS, strict=True)]
    config = tmp_path / "linear.yml"
    config.write_text(json.dumps({"merge_method": "linear", "models": models}))
    assert cli("mergekit", config, tmp_path / "soup", "--accumulate", "float32").returncode == 0
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(made))
    config.write_text(json.dumps({"merge_method": "karcher", "models": [{"model": path} for path in runs]}))
    refused = cli("mergekit", config, tmp_path / "other", "--accumulate", "float32")
    assert refused.returncode == 1
    assert "fixed coefficients" in refused.stderr
