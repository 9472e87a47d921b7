"""What mergekit's YAML says is what the recipe says; what it cannot say is refused in one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from factory import read_checkpoint, realistic, write_checkpoint

import streamsoup
from streamsoup.cook import cook
from streamsoup.errors import ChangedIngredientError, CheckpointError, MismatchError, RecipeError
from streamsoup.from_mergekit_config import _METHODS
from streamsoup.recipe import Ingredient

LAYERS = 4
SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{f"model.layers.{i}.mlp.up_proj.weight": (12, 8) for i in range(LAYERS)},
    **{f"model.layers.{i}.input_layernorm.weight": (8,) for i in range(LAYERS)},
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
CONFIG = {"num_hidden_layers": LAYERS, "layer_types": ["full", "full", "sliding", "full"], "torch_dtype": "float32"}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Four models in the current folder: a, b, c, base."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a", "b", "c", "base")):
        companions = {"config.json": json.dumps({**CONFIG, "name": name})}
        write_checkpoint(tmp_path / name, realistic(i, SHAPES, "F32"), companions=companions)
    return tmp_path


def models(*names, **parameters):
    return [{"model": name, "parameters": dict(parameters)} if parameters else {"model": name} for name in names]


def recipe(method, rows, *, base=None, parameters=None, **more):
    document = {"merge_method": method, "models": rows, **more}
    if base is not None:
        document["base_model"] = base
    if parameters is not None:
        document["parameters"] = parameters
    return streamsoup.from_mergekit(document)


def test_ties_with_the_base_among_the_models(runs):
    (runs / "ties.yml").write_text(
        """
        merge_method: ties
        base_model: base
        models:
          - model: base
            parameters: {weight: 9, nonsense: 1}
          - model: a
            parameters: {weight: 0.6, density: 0.5}
          - model: b
            parameters: {weight: 0.4, density: [0.2, 0.8]}
        parameters: {lambda: 1.2, int8_mask: true, rescale: true}
        dtype: float32
        out_dtype: bfloat16
        tokenizer_source: base
        """
    )
    assert streamsoup.from_mergekit(runs / "ties.yml") == streamsoup.Recipe(
        (Ingredient("a", 0.6, {"density": 0.5}), Ingredient("b", 0.4, {"density": [0.2, 0.8]})),
        method="ties",
        base="base",
        dtype="bfloat16",
        parameters={"lambda": 1.2, "rescale": "l1", "normalize": True},
    )


# Method, models, base, parameters; what differs from a recipe with these ingredients: weights, base, parameters ...
WEIGHTED = {"weight": 0.5}
VECTORS = {"rescale": "none", "normalize": False}
CASES = {
    "linear": ("linear", 2, None, WEIGHTED, {}),
    "linear, as given": ("linear", 2, None, {**WEIGHTED, "normalize": False}, {"normalize": False}),
    "slerp": ("slerp", 1, "base", {"t": [0, 1]}, {"parameters": {"t": [0.0, 1.0]}}),
    "nuslerp": ("nuslerp", 2, None, {**WEIGHTED, "nuslerp_row_wise": True}, {}),
    "nuslerp of rows": ("nuslerp", 2, "base", {**WEIGHTED, "nuslerp_flatten": 0}, {"parameters": {"row_wise": True}}),
    "multislerp": ("multislerp", 3, None, {**WEIGHTED, "eps": "1e-8"}, {}),
    "multislerp, not normalised": (
        "multislerp", 3, "base", {**WEIGHTED, "normalize_weights": False}, {"parameters": {"normalize_weights": False}},
    ),
    "karcher": ("karcher", 3, None, {"max_iter": 20, "tol": "1e-9"}, {"parameters": {"max_iter": 20.0, "tol": 1e-9}}),
    "task_arithmetic": (
        "task_arithmetic", 2, "base", {**WEIGHTED, "density": 0.1, "rescale": True},
        {"parameters": {"normalize": False}},
    ),
    "dare_linear": ("dare_linear", 2, "base", WEIGHTED, {"parameters": {**VECTORS, "rescale": "l1"}}),
    "dare_ties": ("dare_ties", 2, "base", {**WEIGHTED, "rescale": False}, {"parameters": VECTORS}),
    "della": (
        "della", 2, "base", {**WEIGHTED, "density": 0.4, "epsilon": 0.1},
        {"parameters": {"density": 0.4, "epsilon": 0.1, "rescale": "l1", "normalize": True}},
    ),
    "della_linear": ("della_linear", 2, "base", WEIGHTED, {"parameters": {**VECTORS, "rescale": "l1"}}),
    "breadcrumbs": (
        "breadcrumbs", 2, "base", {**WEIGHTED, "gamma": 0.02}, {"parameters": {**VECTORS, "gamma": 0.02}}
    ),
    "breadcrumbs_ties": ("breadcrumbs_ties", 1, "base", WEIGHTED, {"parameters": VECTORS}),
    "sce": ("sce", 2, "base", {"select_topk": 0.3}, {"parameters": {"select_topk": 0.3}}),
    "model_stock": ("model_stock", 2, "base", {}, {"parameters": {"cosine": "pairs"}}),
    "model_stock of rows": (
        "model_stock", 3, "base", {"filter_wise": True}, {"parameters": {"cosine": "pairs", "filter_wise": True}}
    ),
    "passthrough": ("passthrough", 1, None, {"scale": 0.5}, {"parameters": {"scale": 0.5}}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_methods_in_our_words(runs, case):
    method, count, base, parameters, expected = CASES[case]
    found = recipe(method, models(*"abc"[:count]), base=base, parameters=parameters)
    weight = parameters.get("weight", 1.0)
    rows = tuple(Ingredient(name, weight) for name in "abc"[:count])
    assert found == streamsoup.Recipe(rows, **{"method": method, "base": base, **expected})
    streamsoup.plan_soup(found, None, streamsoup.Execution())  # our methods take what they are given


def test_every_method_is_tried_and_named_in_the_help(cli):
    assert {case[0] for case in CASES.values()} | {"ties"} == set(_METHODS)
    text = " ".join(cli("mergekit", "--help").stdout.split())
    for method in _METHODS:
        assert method in text


def test_a_base_counts_as_a_model_for_methods_without_one_and_comes_first(runs):
    rows = [*models("a", "b", weight=2), *models("c", weight=1)]
    assert [i.path for i in recipe("linear", rows, base="c").ingredients] == ["c", "a", "b"]
    rows = models("a", "b")
    assert [i.weight for i in recipe("linear", rows, base="c", parameters=WEIGHTED).ingredients] == [0.5] * 3
    assert [i.path for i in recipe("karcher", rows, base="./a").ingredients] == ["a", "b"]


def test_settings_of_a_model_come_before_those_of_all(runs):
    rows = [
        {"model": "a", "parameters": {"weight": {"filter": "mlp", "value": [0, "1e0"]}}},
        {"model": "b", "parameters": {"weight": [{"filter": "norm", "value": 2}, {"value": 3}, {"value": 4}]}},
        {"model": "c"},
    ]
    shared = {"weight": [{"filter": "lm_head", "value": 5}, {"filter": "*", "value": 6}]}
    a, b, c = recipe("linear", rows, parameters=shared).ingredients
    rest = [{"filter": "lm_head", "value": 5.0}, {"value": 6.0}]
    assert a.parameters == {"weight": [{"filter": "mlp", "value": [0.0, 1.0]}, *rest]}
    assert b.parameters == {"weight": [{"filter": "norm", "value": 2.0}, {"value": 3.0}]}
    assert c.parameters == {"weight": rest}


def test_gradients_and_filters_give_the_weights_that_they_say(runs, tmp_path):
    parameters = {"t": [{"filter": "up_proj", "value": [0, 0.5, 1]}, {"value": 0.25}]}
    document = {"merge_method": "slerp", "base_model": "a", "models": models("b"), "parameters": parameters}
    (runs / "slerp.yml").write_text(json.dumps(document))
    found = streamsoup.from_mergekit("slerp.yml")
    plan, _ = streamsoup.plan_soup(found, None, streamsoup.Execution())
    ts = {}
    for position, name in enumerate(plan.table.names):
        ts[name] = plan.method.parameters.number("t", plan.info(position), -1.0)
    layers = [ts[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(LAYERS)]
    np.testing.assert_allclose(layers, [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    assert ts["lm_head.weight"] == ts["model.layers.3.input_layernorm.weight"] == 0.25


def test_random_seed(runs):
    document = {"merge_method": "dare_ties", "base_model": "base", "models": models("a"), "parameters": WEIGHTED}
    assert streamsoup.from_mergekit(document, random_seed=3).parameters["seed"] == 3
    document["merge_method"] = "ties"
    assert "seed" not in streamsoup.from_mergekit(document, random_seed=3).parameters


@pytest.mark.parametrize(("given", "expected"), [({}, None), ({"dtype": "torch.float16"}, "float16")])
def test_dtype(runs, given, expected):
    assert recipe("linear", models("a", "b", weight=1), **given).dtype == expected


@pytest.mark.parametrize(
    "given",
    [{"tokenizer_source": "base"}, {"tokenizer_source": "base", "base_model": "a"}, {"tokenizer": {"source": "a"}}],
)
def test_a_tokenizer_that_is_copied_anyway_is_let_through(runs, given):
    given = {"base_model": "a", **given}
    assert recipe("linear", models("a", "b", weight=1), **given).checkpoints == ("a", "b")


AB = models("a", "b", weight=1)
REFUSED = {
    "a list": ([], "a mergekit recipe is a mapping"),
    "no method": ({"models": AB}, "merge_method: None is not one of linear, slerp"),
    "another method": ({"merge_method": "nearswap"}, "merge_method: 'nearswap' is not one of .* use mergekit itself"),
    "unknown key": ({"merge_method": "linear", "models": AB, "name": "x"}, "name: no key of a mergekit recipe"),
    "modules": ({"merge_method": "linear", "modules": {}}, "modules: parts of a model .* merge with 'models'"),
    "chat template": ({"merge_method": "linear", "chat_template": "auto"}, "chat_template: is not written; leave it"),
    "seed": ({"merge_method": "linear", "models": AB, "random_seed": 0}, "random_seed: is no key but an option"),
    "mixture": ({"base_model": "a", "experts": []}, "experts: building a mixture of experts .* use mergekit-moe"),
    "neither": ({"merge_method": "linear"}, "models: give 'models' or 'slices', and not both"),
    "both": ({"merge_method": "linear", "models": AB, "slices": [1]}, "models: give 'models' or 'slices'"),
    "models of text": ({"merge_method": "linear", "models": ["a"]}, "models: a list of mappings with 'model'"),
    "key of a model": (
        {"merge_method": "linear", "models": [{"model": "a", "weight": 1}]}, r"models\[0\]: weight is not supported"
    ),
    "nowhere": (
        {"merge_method": "linear", "models": models("some/where/else")},
        r"models\[0\]: some/where/else is no folder or file here, and no org/name of the Hugging Face Hub",
    ),
    "lora": (
        {"merge_method": "linear", "models": models("a+b")}, r"models\[0\]: a\+b is a model with a LoRA adapter"
    ),
    "lora in a mapping": (
        {"merge_method": "linear", "models": [{"model": {"model": "a", "lora": "b"}}]}, "lora is not supported"
    ),
    "number for a model": ({"merge_method": "linear", "models": [{"model": 3}]}, "a model is the path of a folder"),
    "twice": ({"merge_method": "linear", "models": models("a", "./a", weight=1)}, r"models\[1\]: ./a is there twice"),
    "no base": ({"merge_method": "ties", "models": AB}, "base_model: ties needs one. Name the model"),
    "too many": (
        {"merge_method": "slerp", "base_model": "a", "models": models("b", "c"), "parameters": {"t": 0.5}},
        "models: slerp takes exactly 1 beside base_model, not 2",
    ),
    "too few": (
        {"merge_method": "model_stock", "base_model": "a", "models": AB}, "takes at least 2 beside base_model, not 1"
    ),
    "passthrough of two": ({"merge_method": "passthrough", "models": models("a", "b")}, "takes exactly 1, not 2"),
    "no weight": (
        {"merge_method": "linear", "models": models("a", "b")},
        r"parameters of models\[0\]: linear needs a weight for every tensor of a. Add one",
    ),
    "a weight for some": (
        {"merge_method": "linear", "models": models("a", "b", weight=[{"filter": "mlp", "value": 1}])},
        "linear needs a weight for every tensor of a",
    ),
    "no t": ({"merge_method": "slerp", "base_model": "a", "models": models("b")}, "slerp needs t for every tensor"),
    "unknown parameter": (
        {"merge_method": "slerp", "base_model": "a", "models": models("b"), "parameters": {"t": 1, "normalize": False}},
        "parameters: normalize is no parameter of slerp. Leave it out; known: t",
    ),
    "parameter of all in a model": (
        {"merge_method": "slerp", "base_model": "a", "models": models("b", t=0.5)},
        r"parameters of models\[0\]: t is for all models together. Move it",
    ),
    "columns": (
        {"merge_method": "nuslerp", "models": AB, "parameters": {"nuslerp_row_wise": True, "nuslerp_flatten": False}},
        "nuslerp_row_wise: true interpolates columns, which is not supported",
    ),
    "eps": ({"merge_method": "multislerp", "models": AB, "parameters": {"eps": 1e-6}}, "eps 1e-06 is not supported"),
    "flag by filter": (
        {"merge_method": "linear", "models": AB, "parameters": {"normalize": [{"filter": "a", "value": True}]}},
        "normalize is true or false for all tensors",
    ),
    "a word": ({"merge_method": "linear", "models": models("a", "b", weight="much")}, "weight: 'much' is not a number"),
    "nan": ({"merge_method": "linear", "models": models("a", weight=float("nan"))}, "(nan|.NaN.) is not a number"),
    "empty": ({"merge_method": "linear", "models": models("a", "b", weight=[])}, "weight: an empty list. Leave it out"),
    "mixed": (
        {"merge_method": "linear", "models": models("a", "b", weight=[1, {"value": 2}])}, "1 is not a condition"
    ),
    "our own pattern": (
        {"merge_method": "linear", "models": models("a", "b", weight=[{"pattern": "*", "value": 2}])},
        "is not a condition with 'value' and, perhaps, 'filter'",
    ),
    "number as filter": (
        {"merge_method": "linear", "models": models("a", "b", weight=[{"filter": 3, "value": 2}])},
        "has a filter that is no text",
    ),
    "parameters of text": ({"merge_method": "linear", "models": AB, "parameters": "x"}, "parameters: a mapping of"),
    "dtype": ({"merge_method": "linear", "models": AB, "dtype": "int64"}, "dtype: 'int64' is not a float dtype"),
    "union": (
        {"merge_method": "linear", "models": AB, "tokenizer_source": "union"},
        "tokenizer_source: 'union' would rearrange embeddings, which is not supported",
    ),
    "base of none": ({"merge_method": "linear", "models": AB, "tokenizer_source": "base"}, "'base' would rearrange"),
    "another tokenizer": ({"merge_method": "linear", "models": AB, "tokenizer_source": "b"}, "'b' would rearrange"),
    "tokens": (
        {"merge_method": "linear", "models": AB, "tokenizer": {"source": "a", "tokens": {}}},
        "tokenizer: new tokens and padded vocabularies are not supported",
    ),
    "union by default": ({"merge_method": "linear", "models": AB, "tokenizer": {}}, "tokenizer: 'union' would"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(runs, case):
    document, pattern = REFUSED[case]
    with pytest.raises(RecipeError, match=pattern) as caught:
        streamsoup.from_mergekit(document)
    assert "\n" not in str(caught.value)
    (runs / "config.yml").write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=rf"config\.yml: .*{pattern}"):
        streamsoup.from_mergekit(runs / "config.yml")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (None, "no such recipe file"),
        ("a: [", "not a readable YAML file"),
        ("dtype: a\ndtype: b", "'dtype' is there twice"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, pattern):
    if text is not None:
        (tmp_path / "x.yml").write_text(text)
    with pytest.raises(RecipeError, match=rf"x\.yml: .*{pattern}"):
        streamsoup.from_mergekit(tmp_path / "x.yml")


# -- slices ------------------------------------------------------------------------------------------------------


def piece(model, start, stop, **parameters):
    row = {"model": model, "layer_range": [start, stop]}
    return {"sources": [{**row, "parameters": parameters} if parameters else row]}


def frankenmerge(*pieces, **more):
    return {"merge_method": "passthrough", "slices": list(pieces), **more}


def test_layers_are_copied_renumbered_and_scaled(runs, cli):
    scale = [{"filter": "up_proj", "value": 0.5}]
    document = frankenmerge(piece("a", 0, 3), piece("b", 2, 4, scale=scale), piece("b", 3, 4), dtype="float32")
    (runs / "frank.yml").write_text(json.dumps(document))
    done = cli("mergekit", "frank.yml", "soup")
    assert done.returncode == 0, done.stderr
    a, b, soup = (read_checkpoint(runs / name) for name in ("a", "b", "soup"))
    expected = {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}
    for new, (source, old, factor) in enumerate([(a, 0, 1), (a, 1, 1), (a, 2, 1), (b, 2, 0.5), (b, 3, 0.5), (b, 3, 1)]):
        for part, by in (("mlp.up_proj", factor), ("input_layernorm", 1)):
            expected[f"model.layers.{new}.{part}.weight"] = np.float32(by) * source[f"model.layers.{old}.{part}.weight"]
    expected |= {name: b[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert soup.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(soup[name], array), name
    config = json.loads((runs / "soup" / "config.json").read_text())
    assert config == {
        "num_hidden_layers": 6,
        "layer_types": ["full", "full", "sliding", "sliding", "full", "full"],
        "torch_dtype": "float32",
        "name": "a",
    }
    again = cli("soup", "--recipe", "soup/recipe.yaml", "-o", "again")
    assert again.returncode == 0, again.stderr
    assert (runs / "again" / "model.safetensors").read_bytes() == (runs / "soup" / "model.safetensors").read_bytes()


def test_picked_layers_are_a_checkpoint_like_any_other(runs, cli):
    path = f"{runs}/a[0:3]+{runs}/b[2:4]"
    shown = cli("inspect", path, "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["checkpoints"][0]["tensors"] == 3 + 2 * 5
    done = cli("soup", path, f"{runs}/b[0:3]+{runs}/c[2:4]", "-o", "soup")
    assert done.returncode == 0, done.stderr
    refused = cli("soup", "a[0:3]+b[2:4]", "a", "-o", "other")
    assert refused.returncode == 1
    assert "b is not an absolute path" in refused.stderr


@pytest.mark.parametrize("read_mode", ["map", "ahead", "plain"])
def test_layers_come_from_any_shard_in_any_order(runs, read_mode):
    write_checkpoint(runs / "sharded", realistic(0, SHAPES, "F32"), shards=3)
    found = {}
    for name in ("a", "sharded"):
        recipe = streamsoup.from_mergekit(frankenmerge(piece(name, 2, 4), piece(name, 0, 3)))
        execution = streamsoup.Execution(read_mode=read_mode, workers=2)
        cook(recipe, runs / f"soup-{name}", execution)
        found[name] = read_checkpoint(runs / f"soup-{name}")
    assert found["a"].keys() == found["sharded"].keys()
    assert all(np.array_equal(array, found["sharded"][name]) for name, array in found["a"].items())


@pytest.fixture
def interrupted(runs, monkeypatch):
    """A frankenmerge whose weights are written, and nothing else."""

    def stop(*_, **__):
        raise RuntimeError("stopped")

    found = streamsoup.from_mergekit(frankenmerge(piece("a", 0, 3, scale=0.5), piece("b", 1, 4)))
    with monkeypatch.context() as patch:
        patch.setattr("streamsoup.making.write_side_files", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            cook(found, runs / "soup", streamsoup.Execution())
    return found


def test_an_interrupted_frankenmerge_goes_on_to_the_same_bits(runs, interrupted):
    streamsoup.resume(runs / "soup")
    cook(interrupted, runs / "other", streamsoup.Execution())
    assert (runs / "soup/model.safetensors").read_bytes() == (runs / "other/model.safetensors").read_bytes()
    assert json.loads((runs / "soup/config.json").read_text())["num_hidden_layers"] == 6


def test_a_changed_part_is_noticed(runs, interrupted):
    write_checkpoint(runs / "b", realistic(77, SHAPES, "F32"))
    with pytest.raises(ChangedIngredientError, match=r"b/model\.safetensors: its data changed"):
        streamsoup.resume(runs / "soup")


@pytest.mark.parametrize("nested", [False, True])
def test_configuration_says_how_many_layers_were_picked(runs, nested):
    said = {"n_layer": LAYERS, "num_attention_heads": LAYERS, "layer_types": list("abcd")}
    config = {"text_config": said, "num_hidden_layers": 9} if nested else said
    (runs / "a" / "config.json").write_text(json.dumps(config))
    cook(
        streamsoup.from_mergekit(frankenmerge(piece("a", 2, 4), piece("a", 0, 3))),
        runs / "soup",
        streamsoup.Execution(),
    )
    expected = {"n_layer": 5, "num_attention_heads": LAYERS, "layer_types": list("cdabc")}
    found = json.loads((runs / "soup" / "config.json").read_text())
    assert found == ({"text_config": expected, "num_hidden_layers": 9} if nested else expected)


def test_one_slice_of_whole_models_is_a_merge_of_models(runs):
    sources = [{"model": name, "layer_range": [0, LAYERS]} for name in ("a", "base")]
    parameters = {"t": [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]}
    document = {"merge_method": "slerp", "base_model": "base", "slices": [{"sources": sources}]}
    assert streamsoup.from_mergekit({**document, "parameters": parameters}) == recipe(
        "slerp", models("a"), base="base", parameters=parameters
    )
    document["slices"] = [{"sources": sources, "parameters": {"t": {"filter": "mlp", "value": 0.1}}}]
    found = streamsoup.from_mergekit({**document, "parameters": {"t": 0.5}})
    assert found == recipe("slerp", models("a"), base="base", parameters=parameters)


AB_HALVES = [*piece("a", 0, 2)["sources"], *piece("b", 0, 2)["sources"]]
SLICED = {
    "a part of a merge": (
        {"merge_method": "linear", "slices": [{"sources": AB_HALVES}]},
        RecipeError, "slices: linear of parts of models is not supported",
    ),
    "two sources": (
        frankenmerge(piece("a", 0, 2), {"sources": AB_HALVES}),
        RecipeError, r"slices\[1\]: passthrough takes one source",
    ),
    "no range": (frankenmerge({"sources": [{"model": "a"}]}), RecipeError, "layer_range is a list of two whole"),
    "beyond the last": (frankenmerge(piece("a", 0, 9)), CheckpointError, "layers 0 to 9 of model.layers.* were asked"),
    "nothing": (frankenmerge(piece("a", 2, 2)), CheckpointError, "layers 2 to 2 of"),
    "another base": (
        frankenmerge(piece("a", 0, 2), piece("b", 0, 2), base_model="b"),
        RecipeError, "base_model: b is not the model of the first slice, a",
    ),
    "residual": (
        frankenmerge({**piece("a", 0, 2), "residual_weight": 1}), RecipeError, r"slices\[0\]: residual_weight is not"
    ),
    "text": ({"merge_method": "passthrough", "slices": ["x"]}, RecipeError, "slices: a list of mappings"),
    "base that is no source": (
        {"merge_method": "slerp", "base_model": "c", "parameters": {"t": 0.5}, "slices": [piece("a", 0, LAYERS)]},
        RecipeError, r"base_model: c is not among the sources of slices\[0\]",
    ),
    "unlike": (frankenmerge(piece("a", 0, 2), piece("wide", 0, 2)), MismatchError, r"shape \(9,\) in layer 0 of"),
    "two stacks": (frankenmerge(piece("clip", 0, 1)), CheckpointError, "has 2 stacks of layers"),
    "no layers": (frankenmerge(piece("flat", 0, 1)), CheckpointError, "has no numbered layers"),
    "before or after": (frankenmerge(piece("a", 0, 2), piece("odd", 0, 2)), CheckpointError, "mystery.weight: in .*"),
}  # fmt: skip


@pytest.mark.parametrize("case", SLICED)
def test_slices_that_are_refused(runs, case):
    rng = np.random.default_rng(0)
    write_checkpoint(runs / "wide", {name: rng.random((9,), np.float32) for name in SHAPES})
    write_checkpoint(runs / "odd", realistic(9, {**SHAPES, "mystery.weight": (3,)}, "F32"))
    write_checkpoint(runs / "flat", realistic(9, {"w": (3,)}, "F32"))
    write_checkpoint(runs / "clip", realistic(9, {"text.layers.0.w": (3,), "vision.layers.0.w": (3,)}, "F32"))
    document, kind, pattern = SLICED[case]
    with pytest.raises(kind, match=pattern):
        streamsoup.from_mergekit(document)


# -- the command line --------------------------------------------------------------------------------------------


def test_command_line_makes_the_same_soup_as_its_recipe(runs, cli):
    document = {"merge_method": "linear", "models": models("a", "b", weight=0.5), "out_dtype": "bfloat16"}
    (runs / "linear.yml").write_text(json.dumps(document))
    planned = cli("mergekit", "linear.yml", "soup", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "uniform soup of 2 checkpoints" in planned.stdout
    assert not (runs / "soup").exists()
    done = cli("mergekit", "linear.yml", "soup", "--shard-size", "1kB", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tensors"] == len(SHAPES)
    assert (runs / "soup" / "model.safetensors.index.json").exists()
    streamsoup.soup(["a", "b"], runs / "other", dtype="bfloat16")
    ours, other = read_checkpoint(runs / "soup"), read_checkpoint(runs / "other")
    assert all(np.array_equal(array, other[name]) for name, array in ours.items())


def test_command_line_refuses_in_one_line(runs, cli):
    (runs / "config.yml").write_text("merge_method: ram\n")
    done = cli("mergekit", "config.yml", "soup")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("streamsoup: config.yml: merge_method: 'ram' is not one of")
