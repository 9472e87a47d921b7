"""The main job as one call: what comes out, what is refused, what stands beside the weights."""

from __future__ import annotations

import json
import os
import stat
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from factory import (
    DTYPES,
    SHAPES,
    bits,
    fine_tunes,
    read_checkpoint,
    realistic,
    same_bits,
    weights_bytes,
    write_checkpoint,
)
from reference import exact_bits
from simmer import least_budget

import streamsoup
from streamsoup.errors import (
    BudgetError,
    ChangedIngredientError,
    CheckpointNotFoundError,
    DestinationError,
    DiskSpaceError,
    MismatchError,
    NonFiniteError,
    RecipeError,
    StreamsoupError,
)

CONFIG = {"architectures": ["X"], "torch_dtype": "float32", "hidden_size": 4}


def assert_nothing_left(folder, *, but):
    assert {p.name for p in folder.iterdir()} == set(but)


# -- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 10])
def test_uniform_soup_of_folders_is_their_exact_mean(tmp_path, device, read_mode, n):
    runs = fine_tunes(tmp_path, n, shards=2)
    result = streamsoup.soup(runs, tmp_path / "soup", device=device, read_mode=read_mode)
    soup = read_checkpoint(tmp_path / "soup")
    parts = [read_checkpoint(tmp_path / f"run{i + 1}") for i in range(n)]
    for name in SHAPES:
        want = exact_bits([p[name] for p in parts], [1.0] * n, Fraction(n), "BF16")
        np.testing.assert_array_equal(bits(soup[name]), want)
    assert result.path == tmp_path / "soup"
    assert result.ingredients == n
    assert result.bytes_read == sum(a.nbytes for p in parts for a in p.values())
    assert result.bytes_written == sum(a.nbytes for a in soup.values())
    assert result.measured_peak_bytes <= result.projected_peak_bytes
    assert result.limited_by in result.stage_seconds
    assert result.seconds > 0
    assert result.gb_per_s > 0
    assert len(set(result.content_digests)) == n
    assert_nothing_left(tmp_path, but=[*(f"run{i + 1}" for i in range(n)), "soup"])


def test_weights_are_relative_and_coefficients_are_not(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    streamsoup.soup(runs, tmp_path / "a", weights=[0.75, 0.25])
    streamsoup.soup(runs, tmp_path / "b", weights=[3, 1])
    streamsoup.soup(runs, tmp_path / "c", coefficients=[3, 1])
    a, b, c = (read_checkpoint(tmp_path / x) for x in "abc")
    assert same_bits(a, b)
    parts = [read_checkpoint(tmp_path / f"run{i + 1}") for i in range(2)]
    for name in SHAPES:
        want = exact_bits([p[name] for p in parts], [3.0, 1.0], Fraction(1), "BF16")
        np.testing.assert_array_equal(bits(c[name]), want)


def test_ingredients_may_mix_files_folders_shardings_orders_and_float_dtypes(tmp_path, device):
    tensors = [realistic(i, SHAPES, d) for i, d in enumerate(["BF16", "F16", "F32", "F64"])]
    paths = [
        write_checkpoint(tmp_path / "a.safetensors", tensors[0]),
        write_checkpoint(tmp_path / "b", dict(reversed(tensors[1].items()))),
        write_checkpoint(tmp_path / "c", tensors[2], shards=3),
        write_checkpoint(tmp_path / "d", tensors[3], shards=[[n] for n in reversed(SHAPES)]),
    ]
    streamsoup.soup(paths, tmp_path / "soup", device=device, weights=[1, 2, 3, 4])
    soup = read_checkpoint(tmp_path / "soup")
    for name in SHAPES:
        want = exact_bits([t[name] for t in tensors], [1.0, 2.0, 3.0, 4.0], Fraction(10), "BF16")
        np.testing.assert_array_equal(bits(soup[name]), want)
        assert soup[name].dtype == DTYPES["BF16"]


def test_the_first_ingredient_may_mix_dtypes_and_each_tensor_keeps_its_own(tmp_path):
    tensors = [{"a": realistic(i, {"a": (9,)}, "F32")["a"], "b": realistic(i, {"b": (9,)})["b"]} for i in range(2)]
    streamsoup.soup([write_checkpoint(tmp_path / f"r{i}", t) for i, t in enumerate(tensors)], tmp_path / "soup")
    soup = read_checkpoint(tmp_path / "soup")
    assert (soup["a"].dtype, soup["b"].dtype) == (DTYPES["F32"], DTYPES["BF16"])


@pytest.mark.parametrize("dtype", ["bfloat16", "F16", "torch.float32", "fp64"])
def test_dtype_is_that_of_the_output(tmp_path, dtype):
    runs = fine_tunes(tmp_path, 2, companions={"config.json": json.dumps(CONFIG)})
    streamsoup.soup(runs, tmp_path / "soup", dtype=dtype)
    want = {"bfloat16": "BF16", "F16": "F16", "torch.float32": "F32", "fp64": "F64"}[dtype]
    assert {a.dtype for a in read_checkpoint(tmp_path / "soup").values()} == {DTYPES[want]}
    named = json.loads((tmp_path / "soup" / "config.json").read_text())["torch_dtype"]
    assert named == {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[want]


def test_a_single_file_output_has_its_recipe_and_manifest_beside_it(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    streamsoup.soup(runs, tmp_path / "x.safetensors", shard_size=100)
    streamsoup.soup(runs, tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "x.safetensors"), read_checkpoint(tmp_path / "soup"))
    assert_nothing_left(tmp_path, but=["run1", "run2", "soup", "x.safetensors", "x.recipe.yaml", "x.streamsoup.json"])


def test_a_soup_can_be_an_ingredient(tmp_path):
    runs = fine_tunes(tmp_path, 3)
    streamsoup.soup(runs[:2], tmp_path / "soup1", shard_size=3000)
    streamsoup.soup([tmp_path / "soup1", runs[2]], tmp_path / "soup2", weights=[2, 1])
    assert read_checkpoint(tmp_path / "soup2").keys() == SHAPES.keys()


@pytest.mark.parametrize("options", [
    {"budget_bytes": "least"}, {"budget_bytes": "1GiB"}, {"workers": 1}, {"workers": 7}, {"read_mode": "plain"},
    {"read_mode": "map"}, {"device": "torch:cpu"}, {"budget_bytes": "least", "read_mode": "plain"},
])  # fmt: skip
def test_no_byte_of_a_soup_depends_on_how_it_is_made(tmp_path, options):
    shapes = {"big": (300_001,), **SHAPES}
    paths = [write_checkpoint(tmp_path / f"r{i}", realistic(i, shapes)) for i in range(12)]
    weights = np.random.default_rng(0).random(12).tolist()
    if options.get("budget_bytes") == "least":
        mode = options.get("read_mode", "auto")
        options = {**options, "budget_bytes": least_budget(paths, read_mode=mode)}
    streamsoup.soup(paths, tmp_path / "a", weights=weights, shard_size="200kB")
    streamsoup.soup(paths, tmp_path / "b", weights=weights, shard_size="200kB", **options)
    assert weights_bytes(tmp_path / "a") == weights_bytes(tmp_path / "b")


def test_patterns_are_taken_in_natural_order_and_the_first_gives_the_names(tmp_path):
    fine_tunes(tmp_path, 11)
    streamsoup.soup([str(tmp_path / "run*")], tmp_path / "soup")
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert [os.path.basename(i["path"]) for i in manifest["ingredients"]] == [f"run{i + 1}" for i in range(11)]


def test_a_list_in_python_keeps_its_order(tmp_path):
    runs = sorted(fine_tunes(tmp_path, 11))
    streamsoup.soup(runs, tmp_path / "soup")
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert [i["path"] for i in manifest["ingredients"]] == runs


def test_the_recipe_of_a_soup_makes_the_same_soup(tmp_path):
    runs = fine_tunes(tmp_path, 3)
    streamsoup.soup(runs, tmp_path / "a", weights=[0.1, 0.2, 0.7], dtype="float32", shard_size=9000)
    recipe = streamsoup.read_recipe(tmp_path / "a" / "recipe.yaml")
    from streamsoup.cook import cook

    cook(recipe, tmp_path / "b", streamsoup.Execution())
    assert weights_bytes(tmp_path / "a") == weights_bytes(tmp_path / "b")
    assert [i.weight for i in recipe.ingredients] == [0.1, 0.2, 0.7]


def test_manifest_tells_ingredients_weights_identities_digests_and_versions(tmp_path):
    runs = fine_tunes(tmp_path, 2, shards=2)
    result = streamsoup.soup(runs, tmp_path / "soup", weights=[1, 3])
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert manifest["versions"]["streamsoup"] == streamsoup.__version__
    assert manifest["method"] == "weighted"
    assert manifest["normalize"] is True
    for item, run, weight, digest in zip(
        manifest["ingredients"], runs, [1.0, 3.0], result.content_digests, strict=True
    ):
        assert (item["path"], item["weight"], item["content_digest"]) == (run, weight, digest)
        assert {s["size_bytes"] for s in item["shards"]} == {
            (tmp_path / run / s["path"]).stat().st_size for s in item["shards"]
        }
        assert {"mtime_ns", "inode", "header_sha256", "sampled_blake2b"} < item["shards"][0].keys()


def test_model_card_has_the_recipe_and_no_ones_home_folder(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    streamsoup.soup(runs, tmp_path / "soup", weights=[1, 3])
    card = (tmp_path / "soup" / "README.md").read_text()
    assert card.startswith("---\n")
    assert "run1" in card
    assert "0.75" in card
    assert str(tmp_path.parent) not in card


def test_companions_of_the_first_ingredient_are_copied_and_its_training_is_not(tmp_path):
    copied = {
        "config.json": json.dumps(CONFIG), "generation_config.json": "{}", "tokenizer.json": "{}", "vocab.txt": "a",
        "merges.txt": "b", "chat_template.jinja": "c", "modeling_x.py": "d", "1_Pooling/config.json": "{}",
        "tokenizer.model": b"\xff\0",
    }  # fmt: skip
    left = {
        "optimizer.pt": "x", "trainer_state.json": "{}", "README.md": "old card", "pytorch_model.bin": "x",
        "checkpoint-10/config.json": "{}", "runs/log.json": "{}", ".hidden.json": "{}", "all_results.json": "{}",
        "training_args.bin": "x",
    }  # fmt: skip
    first = write_checkpoint(tmp_path / "a", realistic(0, SHAPES), companions=copied | left)
    other = write_checkpoint(tmp_path / "b", realistic(1, SHAPES), companions={"special.json": "{}"})
    streamsoup.soup([first, other], tmp_path / "soup")
    soup = tmp_path / "soup"
    for name, content in copied.items():
        assert (soup / name).read_bytes() == (content.encode() if isinstance(content, str) else content)
    files = {str(p.relative_to(soup)) for p in soup.rglob("*") if p.is_file()}
    assert files == {*copied, "README.md", "recipe.yaml", "streamsoup.json", "model.safetensors"}
    assert "old card" not in (soup / "README.md").read_text()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("out", ["soup", "soup.safetensors"])
def test_permissions_follow_the_umask(tmp_path, mask, out):
    runs = fine_tunes(tmp_path, 2, companions={"config.json": json.dumps(CONFIG)})
    os.chmod(tmp_path / "run1" / "config.json", 0o400)
    before = os.umask(mask)
    try:
        streamsoup.soup(runs, tmp_path / out, shard_size=3000, dtype="float16")
    finally:
        os.umask(before)
    made = [tmp_path / out, *(tmp_path / out).rglob("*")] if out == "soup" else list(tmp_path.glob("soup*"))
    for path in made:
        want = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == want, path


def test_repeated_and_tied_tensors_keep_their_own_copies(tmp_path):
    shared = realistic(0, {"w": (4, 4)})["w"]
    paths = [write_checkpoint(tmp_path / f"r{i}", {"a": shared, "tied": shared}) for i in range(2)]
    streamsoup.soup(paths, tmp_path / "soup")
    soup = read_checkpoint(tmp_path / "soup")
    assert soup["a"].tobytes() == soup["tied"].tobytes() == shared.tobytes()


def test_one_ingredient_makes_a_copy_of_its_bits(tmp_path):
    runs = fine_tunes(tmp_path, 1)
    streamsoup.soup(runs, tmp_path / "soup", weights=[0.3])
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "run1"))


def test_a_checkpoint_without_tensors_makes_a_soup_without_tensors(tmp_path):
    paths = [write_checkpoint(tmp_path / n, {}) for n in "ab"]
    result = streamsoup.soup(paths, tmp_path / "soup")
    assert result.tensors == 0
    assert read_checkpoint(tmp_path / "soup") == {}


def test_only_empty_and_scalar_tensors_make_a_soup(tmp_path, device):
    tensors = {"none": np.zeros((0, 7), np.float32), "one": np.array(2.0, np.float32), "n": np.array(3)}
    paths = [write_checkpoint(tmp_path / n, tensors) for n in "ab"]
    streamsoup.soup(paths, tmp_path / "soup", device=device)
    assert same_bits(read_checkpoint(tmp_path / "soup"), tensors)


# -- buffers -----------------------------------------------------------------------------------------------------


def with_buffers(folder, count, **changes):
    paths = []
    for i in range(count):
        tensors = {
            **realistic(i, SHAPES),
            "step": np.array(100 + i * changes.get("step", 0)),
            "position_ids": np.arange(512)[None] + i * changes.get("ids", 0),
            "mask": np.tri(4, dtype=np.bool_),
        }
        paths.append(write_checkpoint(folder / f"run{i + 1}", tensors))
    return paths


def test_identical_buffers_are_copied(tmp_path, device):
    paths = with_buffers(tmp_path, 3)
    streamsoup.soup(paths, tmp_path / "soup", device=device)
    soup, first = read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "run1")
    for name in ("step", "position_ids", "mask"):
        assert soup[name].dtype == first[name].dtype
        assert soup[name].tobytes() == first[name].tobytes()


def test_buffers_that_differ_are_all_named_and_nothing_is_left(tmp_path, device):
    paths = with_buffers(tmp_path, 3, step=1, ids=1)
    with pytest.raises(MismatchError) as caught:
        streamsoup.soup(paths, tmp_path / "soup", device=device)
    message = str(caught.value)
    for part in ("step", "position_ids", "run2", "run3", "run1", "--buffers first"):
        assert part in message
    assert_nothing_left(tmp_path, but=["run1", "run2", "run3"])


def test_buffers_first_takes_the_first_and_says_so(tmp_path):
    paths = with_buffers(tmp_path, 3, step=1)
    result = streamsoup.soup(paths, tmp_path / "soup", buffers="first")
    assert read_checkpoint(tmp_path / "soup")["step"] == 100
    assert any("step" in note for note in result.notes)
    assert any("step" in note for note in json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"])


def test_buffers_are_copied_with_dtype_untouched_by_an_output_dtype(tmp_path):
    streamsoup.soup(with_buffers(tmp_path, 2), tmp_path / "soup", dtype="float32")
    assert read_checkpoint(tmp_path / "soup")["step"].dtype == np.int64


# -- NaN and infinity --------------------------------------------------------------------------------------------


def with_nonfinite(folder):
    paths = []
    for i in range(4):
        tensors = {name: array.copy() for name, array in realistic(i, SHAPES).items()}
        if i == 1:
            tensors["embed.weight"].reshape(-1)[[5, 2000]] = np.nan
        if i == 3:
            tensors["layer.0.bias"][3] = np.inf
            tensors["embed.weight"].reshape(-1)[5] = -np.inf
        paths.append(write_checkpoint(folder / f"run{i + 1}", tensors))
    return paths


def test_every_offending_ingredient_and_tensor_is_listed_at_once(tmp_path, device):
    with pytest.raises(NonFiniteError) as caught:
        streamsoup.soup(with_nonfinite(tmp_path), tmp_path / "soup", device=device)
    findings = caught.value.findings
    assert len(findings) == 3
    assert any("embed.weight" in f and "run2" in f and "2 " in f for f in findings)
    assert any("embed.weight" in f and "run4" in f for f in findings)
    assert any("layer.0.bias" in f and "run4" in f for f in findings)
    for finding in findings:
        assert finding in str(caught.value)
    assert not (tmp_path / "soup").exists()


def test_after_nan_the_work_can_be_resumed_with_warn(tmp_path):
    paths = with_nonfinite(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        streamsoup.soup(paths, tmp_path / "soup")
    assert any("soup.partial" in note and "--resume" in note for note in caught.value.__notes__)
    result = streamsoup.resume(tmp_path / "soup", streamsoup.Execution(), nonfinite="warn")
    assert result.bytes_read == 0, "everything had been read"
    assert len(result.notes) == 3
    assert np.isnan(read_checkpoint(tmp_path / "soup")["embed.weight"].astype(np.float32).reshape(-1)[[5, 2000]]).all()


@pytest.mark.parametrize(("nonfinite", "notes"), [("warn", 3), ("allow", 0)])
def test_nonfinite_may_be_let_through(tmp_path, nonfinite, notes):
    result = streamsoup.soup(with_nonfinite(tmp_path), tmp_path / "soup", nonfinite=nonfinite)
    assert len(result.notes) == notes
    soup = read_checkpoint(tmp_path / "soup")
    assert np.isposinf(soup["layer.0.bias"][3].astype(np.float32))
    assert len(json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"]) == notes


def budget_of(text, paths):
    return least_budget(paths, read_mode="plain") if text == "least" else text


@pytest.mark.parametrize("budget", ["least", "1GiB"])
def test_a_soup_too_large_for_its_dtype_is_refused(tmp_path, budget):
    values = {"w": np.full(70_000, 1e6, np.float32)}
    paths = [write_checkpoint(tmp_path / f"r{i}", values) for i in range(40)]
    with pytest.raises(NonFiniteError, match=r"w: 70,000 .*too large for float16.*wider --dtype"):
        streamsoup.soup(
            paths, tmp_path / "soup", dtype="float16", budget_bytes=budget_of(budget, paths), read_mode="plain"
        )


@pytest.mark.parametrize("budget", ["least", "1GiB"])
def test_coefficients_that_overflow_are_refused_under_every_budget(tmp_path, budget):
    values = {"w": np.full(70_000, 3e38, np.float32)}
    paths = [write_checkpoint(tmp_path / f"r{i}", values) for i in range(40)]
    with pytest.raises(NonFiniteError, match="w: 70,000"):
        streamsoup.soup(
            paths,
            tmp_path / "soup",
            coefficients=[1e290] * 2 + [1.0] * 38,
            budget_bytes=budget_of(budget, paths),
            read_mode="plain",
        )


# -- identity ----------------------------------------------------------------------------------------------------


def digests(folder, paths, name):
    return streamsoup.soup(paths, folder / name).content_digests


def test_content_digest_is_independent_of_sharding_order_place_and_time(tmp_path):
    tensors = {**realistic(0, SHAPES), "n": np.arange(5)}
    paths = [
        write_checkpoint(tmp_path / "a", tensors),
        write_checkpoint(tmp_path / "b", dict(reversed(tensors.items())), pad=1),
        write_checkpoint(tmp_path / "c", tensors, shards=3, metadata={"x": "y"}),
        write_checkpoint(tmp_path / "d.safetensors", tensors),
    ]
    assert len(set(digests(tmp_path, paths, "soup"))) == 1
    os.utime(tmp_path / "a" / "model.safetensors", (0, 0))
    assert digests(tmp_path, paths[:1], "again") == digests(tmp_path, paths[1:2], "other")


def test_content_digest_changes_with_any_byte_name_shape_or_dtype(tmp_path):
    tensors = realistic(0, {"a": (6, 4), "b": (5000,)})
    variants = [tensors, {"a": tensors["a"], "c": tensors["b"]}, {"a": tensors["a"].reshape(4, 6), "b": tensors["b"]}]
    variants.append({"a": tensors["a"].view(np.float16), "b": tensors["b"]})
    for name, place in (("a", 0), ("a", 23), ("b", 2047), ("b", 2048), ("b", 4999)):
        changed = {k: v.copy() for k, v in tensors.items()}
        bits(changed[name])[place] ^= 0x0100
        variants.append(changed)
    swapped = {k: v.copy() for k, v in tensors.items()}
    swapped["b"][:2048], swapped["b"][2048:4096] = tensors["b"][2048:4096], tensors["b"][:2048]
    variants.append(swapped)
    found = {digests(tmp_path, [write_checkpoint(tmp_path / f"r{i}", v)], f"s{i}")[0] for i, v in enumerate(variants)}
    assert len(found) == len(variants)


def test_equal_headers_with_other_data_are_other_ingredients(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    streamsoup.soup(runs, tmp_path / "soup")
    first, second = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["ingredients"]
    assert first["shards"][0]["header_sha256"] == second["shards"][0]["header_sha256"]
    assert first["shards"][0]["sampled_blake2b"] != second["shards"][0]["sampled_blake2b"]
    assert first["content_digest"] != second["content_digest"]


def test_an_ingredient_that_changes_during_the_run_is_refused(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 2)
    from streamsoup.engine import Engine

    run = Engine.run

    def run_and_touch(self, tiles):
        outcome = run(self, tiles)
        os.utime(tmp_path / "run2" / "model.safetensors", (1, 1))
        return outcome

    monkeypatch.setattr(Engine, "run", run_and_touch)
    with pytest.raises(ChangedIngredientError, match="run2"):
        streamsoup.soup(runs, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


# -- refused before reading --------------------------------------------------------------------------------------


REFUSALS = {
    "no such ingredient": ({"ingredients": ["run1", "nope"]}, CheckpointNotFoundError, "nope"),
    "pattern that matches nothing": ({"ingredients": ["none*"]}, CheckpointNotFoundError, "matches no"),
    "no ingredients": ({"ingredients": []}, RecipeError, "at least one"),
    "weights that cancel": ({"weights": [1, -1]}, RecipeError, "cancel"),
    "weights all zero": ({"weights": [0, 0]}, RecipeError, "zero"),
    "weight NaN": ({"weights": [1, float("nan")]}, RecipeError, "finite"),
    "weight infinite": ({"weights": [1, float("inf")]}, RecipeError, "finite"),
    "coefficient infinite": ({"coefficients": [1, float("-inf")]}, RecipeError, "finite"),
    "too few weights": ({"weights": [1]}, RecipeError, "2 ingredients, but 1 weights"),
    "weights and coefficients": ({"weights": [1, 1], "coefficients": [1, 1]}, RecipeError, "not both"),
    "dtype unknown": ({"dtype": "int8"}, RecipeError, "float dtype"),
    "buffers unknown": ({"buffers": "last"}, RecipeError, "identical, first"),
    "nonfinite unknown": ({"nonfinite": "maybe"}, RecipeError, "error, warn, allow"),
    "read mode unknown": ({"read_mode": "fast"}, RecipeError, "auto, map, ahead, plain"),
    "device unknown": ({"device": "tpu"}, RecipeError, "neither cpu nor cuda"),
    "device absent": ({"device": "cuda:77"}, RecipeError, "cuda:77"),
    "torch device unknown": ({"device": "torch:nonsense"}, RecipeError, "nonsense"),
    "budget too small": ({"budget_bytes": "1MiB"}, BudgetError, "the least that would do"),
    "budget no size": ({"budget_bytes": "many"}, RecipeError, "not a size"),
    "shard size zero": ({"shard_size": 0}, RecipeError, "not a size"),
    "workers zero": ({"workers": 0}, RecipeError, "worker"),
    "workers negative": ({"workers": -3}, RecipeError, "worker"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_before_reading_leaves_nothing_behind(tmp_path, monkeypatch, case):
    options, error, reason = REFUSALS[case]
    fine_tunes(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    options = dict(options)
    ingredients = options.pop("ingredients", ["run1", "run2"])
    with pytest.raises(error, match=reason) as caught:
        streamsoup.soup(ingredients, "soup", **options)
    assert isinstance(caught.value, StreamsoupError)
    assert "\n" not in str(caught.value)
    assert_nothing_left(tmp_path, but=["run1", "run2"])


def test_the_least_budget_named_in_a_refusal_does(tmp_path):
    runs = fine_tunes(tmp_path, 3)
    for mode in ("map", "plain"):
        with pytest.raises(BudgetError) as caught:
            streamsoup.soup(runs, tmp_path / "soup", budget_bytes=1, read_mode=mode)
        result = streamsoup.soup(runs, tmp_path / f"soup-{mode}", budget_bytes=caught.value.least_bytes, read_mode=mode)
        assert result.projected_peak_bytes <= caught.value.least_bytes


def test_too_little_room_on_the_disk_is_refused_before_reading(tmp_path, monkeypatch):
    runs = fine_tunes(tmp_path, 2)
    real = os.statvfs

    def full(path):
        s = real(path)
        return os.statvfs_result((s.f_bsize, s.f_frsize, s.f_blocks, 1, 1, s.f_files, 1, 1, s.f_flag, s.f_namemax))

    monkeypatch.setattr(os, "statvfs", full)
    with pytest.raises(DiskSpaceError, match=r"are needed.*are free.*Make room"):
        streamsoup.soup(runs, tmp_path / "soup")
    assert_nothing_left(tmp_path, but=["run1", "run2"])


def test_mismatches_are_refused_before_reading(tmp_path):
    runs = fine_tunes(tmp_path, 2)
    write_checkpoint(tmp_path / "other", {"x": np.zeros(3, np.float32)})
    with pytest.raises(MismatchError):
        streamsoup.soup([*runs, tmp_path / "other"], tmp_path / "soup")
    assert_nothing_left(tmp_path, but=["run1", "run2", "other"])


def test_one_path_may_be_a_path(tmp_path):
    (one,) = fine_tunes(tmp_path / "runs", 1)
    streamsoup.soup(Path(one), tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(Path(one)))


def test_a_live_state_is_no_path(tmp_path):
    with pytest.raises(RecipeError, match=r"not a dict. Give live tensors to streamsoup\.open"):
        streamsoup.soup([{"w": np.ones(3)}], tmp_path / "soup")


@pytest.mark.parametrize("name", ["soup.pt", "soup.bin", "soup.gguf"])
def test_a_file_of_another_format_is_not_promised(tmp_path, name):
    with pytest.raises(DestinationError, match=r"ends in \.safetensors"):
        streamsoup.soup(fine_tunes(tmp_path / "runs", 2), tmp_path / name)
