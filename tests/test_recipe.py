"""Recipes: values, YAML there and back, and every refusal."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamsoup.errors import RecipeError
from streamsoup.recipe import Ingredient, Recipe, make_recipe, read_recipe, recipe_to_yaml

recipes = st.builds(
    Recipe,
    ingredients=st.lists(
        st.builds(
            Ingredient,
            path=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(
                lambda p: str(Path(f"/{p}"))
            ),
            weight=st.floats(allow_nan=False, allow_infinity=False),
        ),
        min_size=1,
        max_size=4,
    ).map(tuple),
    normalize=st.booleans(),
    dtype=st.sampled_from([None, "bfloat16", "fp32", "F8_E4M3"]),
    shard_bytes=st.integers(1, 2**60),
    buffers=st.sampled_from(["identical", "first"]),
    nonfinite=st.sampled_from(["error", "warn", "allow"]),
)


@given(recipe=recipes)
def test_yaml_there_and_back_is_the_same_value(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    back = read_recipe(path)
    assert back == recipe
    assert [math.copysign(1, i.weight) for i in back.ingredients] == [
        math.copysign(1, i.weight) for i in recipe.ingredients
    ]


def read(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path)


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path):
    recipe = read(tmp_path, "ingredients: [a, ../b, /c]\n")
    assert [i.path for i in recipe.ingredients] == [str(tmp_path / "a"), str(tmp_path / "../b"), "/c"]
    assert [i.weight for i in recipe.ingredients] == [1.0] * 3


def test_all_keys_are_read(tmp_path):
    recipe = read(
        tmp_path,
        "streamsoup: 1\ningredients:\n- {path: /a, weight: -2}\n- {path: /b}\nnormalize: false\ndtype: bf16\n"
        "shard_bytes: 2GB\nbuffers: first\nnonfinite: warn\n",
    )
    assert recipe == Recipe((Ingredient("/a", -2.0), Ingredient("/b")), False, "bfloat16", 2 * 10**9, "first", "warn")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "mapping"),
        ("- a\n", "mapping"),
        ("just words", "mapping"),
        ("{}", "'ingredients'"),
        ("ingredients: []", "'ingredients'"),
        ("ingredients: a", "'ingredients'"),
        ("ingredients: {a: 1}", "'ingredients'"),
        ("ingredients: [3]", "neither a path"),
        ("ingredients: [null]", "neither a path"),
        ("ingredients: [{weight: 1}]", "neither a path"),
        ("ingredients: [{path: 3}]", "neither a path"),
        ("ingredients: [{path: a, wieght: 1}]", "'wieght'"),
        ("ingredients: [{path: a, weight: heavy}]", "'heavy'"),
        ("ingredients: [{path: a, weight: true}]", "not a number"),
        ("ingredients: [{path: a, weight: null}]", "not a number"),
        ("ingredients: [{path: a, weight: .nan}]", "finite"),
        ("ingredients: [{path: a, weight: .inf}]", "finite"),
        ("ingredients: [{path: a, weight: 1" + "0" * 400 + "}]", ""),
        ("ingredients: [a]\nmethdo: x", "'methdo'"),
        ("ingredients: [a]\n3: x", "3"),
        ("ingredients: [a]\nstreamsoup: 2", "format 2"),
        ("ingredients: [a]\nnormalize: maybe", "normalize"),
        ("ingredients: [a]\ndtype: int8", "float dtype"),
        ("ingredients: [a]\ndtype: [bf16]", "float dtype"),
        ("ingredients: [a]\nshard_bytes: 0", "not a size"),
        ("ingredients: [a]\nshard_bytes: null", "not a size"),
        ("ingredients: [a]\nbuffers: last", "identical, first"),
        ("ingredients: [a]\nbuffers: [first]", "identical, first"),
        ("ingredients: [a]\nnonfinite: 3", "error, warn, allow"),
        ("ingredients: [a]\ningredients: [b]", "ingredients"),
        ("ingredients: [", "YAML"),
        ("!!python/object/apply:os.system [id]", "YAML"),
        ("a: \t- b", "YAML"),
        (b"\xff\xfe\xfa", "YAML"),
        ("ingredients: " + "[" * 5000, ""),
    ],
)
def test_what_makes_no_sense_is_refused_with_file_and_reason(tmp_path, text, reason):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals_name_the_file(tmp_path):
    for text in ("ingredients: [a]\ndtype: int8", "ingredients: [a]\nbuffers: last", "ingredients: 3"):
        with pytest.raises(RecipeError, match=r"r\.yaml"):
            read(tmp_path, text)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match=str(tmp_path)):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("options", "method"),
    [({}, "uniform"), ({"weights": [2, 2]}, "uniform"), ({"weights": [1, 2]}, "weighted"),
     ({"coefficients": [1, 1]}, "coefficients")],
)  # fmt: skip
def test_the_method_in_one_word(options, method):
    assert make_recipe(["a", "b"], **options).label == method


@given(text=st.text(max_size=80))
def test_random_text_never_raises_anything_foreign(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    message = ""
    try:
        read_recipe(path)
    except RecipeError as error:
        message = str(error)
    assert "\n" not in message
