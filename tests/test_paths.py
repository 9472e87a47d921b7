"""Paths of bases with adapters mean the same from any folder, and names that have a plus in them are names."""

from __future__ import annotations

import os

import pytest
from adapter_pools import write_adapter, write_base
from factory import fine_tunes

import streamsoup
from streamsoup.checkpoints import absolute_path, expand_paths, open_checkpoints, real_path, split_path
from streamsoup.errors import CheckpointError, CheckpointNotFoundError, DestinationError, RecipeError
from streamsoup.recipe import with_absolute_paths


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("base", "runs/lora1", "runs/lora2", "runs/lora10", "a+b", "a", "other"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("base", ("base",)),
        ("base+runs/lora1", ("base", "runs/lora1")),
        ("base+runs/lora1+runs/lora2", ("base", "runs/lora1", "runs/lora2")),
        ("a+b", ("a+b",)),
        ("a+b+runs/lora1", ("a+b", "runs/lora1")),
        ("a+runs/lora1", ("a", "runs/lora1")),
        ("base+a+b", ("base", "a+b")),
        ("missing+gone", ("missing", "gone")),
        ("missing", ("missing",)),
        ("x[0:2]", ("x[0:2]",)),
        ("/x[0:2]+/y[2:4]", ("/x[0:2]+/y[2:4]",)),
        ("/x[0:2]+/y[2:4]+runs/lora1", ("/x[0:2]+/y[2:4]", "runs/lora1")),
        ("x[0:2]+a+b", ("x[0:2]", "a+b")),
        ("base+", ("base+",)),
        ("+base", ("+base",)),
    ],
)
def test_parts(home, path, parts):
    assert split_path(path) == parts
    absolute = absolute_path(path)
    if "gone" in parts:
        assert absolute == os.path.abspath(path)
    elif len(parts) > 1:
        assert absolute == "+".join(os.path.abspath(part) for part in parts)
        os.chdir("/")
        assert split_path(absolute) == tuple(str(home / part) if part[0] != "/" else part for part in parts)


def test_links(home):
    (home / "link").symlink_to(home / "base")
    assert real_path("link+runs/lora1") == real_path(f"{home}/base+runs/../runs/lora1")


def test_patterns(home):
    assert expand_paths(["base+runs/*"]) == [f"base+runs/lora{n}" for n in (1, 2, 10)]
    assert expand_paths(["base", "base+runs/lora?"]) == ["base", "base+runs/lora1", "base+runs/lora2"]
    assert expand_paths(["[bo]*+runs/lora1"]) == ["base+runs/lora1", "other+runs/lora1"]
    assert expand_paths(["a+*"]) == ["a+b"]
    assert expand_paths(["base[0:2]+runs/lora?"]) == ["base[0:2]+runs/lora1", "base[0:2]+runs/lora2"]
    with pytest.raises(CheckpointNotFoundError, match="runs/none"):
        expand_paths(["base+runs/none*"])


def test_recipes(home):
    text = "ingredients: [base+runs/lora1, {path: base+runs/lora2, weight: 2}]\nbase: other\nmethod: task_arithmetic\n"
    (home / "runs" / "recipe.yaml").write_text(text.replace("base+", "../base+").replace("+runs/", "+"))
    recipe = streamsoup.read_recipe(home / "runs" / "recipe.yaml")
    split = [split_path(i.path) for i in recipe.ingredients]
    assert [[os.path.realpath(p) for p in parts] for parts in split] == [
        [str(home / "base"), str(home / "runs" / name)] for name in ("lora1", "lora2")
    ]
    (home / "recipe.yaml").write_text(text)
    again = with_absolute_paths(streamsoup.read_recipe(home / "recipe.yaml"))
    assert again.ingredients[0].path == f"{home}/base+{home}/runs/lora1"
    with pytest.raises(RecipeError, match="is the base, and an ingredient too"):
        streamsoup.Recipe(
            (streamsoup.Ingredient("base+runs/lora1"),), method="task_arithmetic", base=f"{home}/base+./runs/lora1"
        )


def test_a_folder_with_a_plus_is_a_checkpoint(tmp_path):
    paths = fine_tunes(tmp_path / "x+y", 2)
    streamsoup.soup(paths, tmp_path / "soup")
    assert [c.path for c in open_checkpoints(paths)] == paths


@pytest.mark.parametrize("out", ["base", "base/soup", "runs", "runs/lora/soup", "."])
def test_a_soup_never_goes_where_a_part_lies(tmp_path, monkeypatch, out):
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "runs" / "lora")
    monkeypatch.chdir(tmp_path)
    paths = ["base+runs/lora", "base+runs/lora+runs/lora"]
    with pytest.raises(DestinationError, match=r"ingredient|exists"):
        streamsoup.soup(paths, out, overwrite=True)
    with pytest.raises(DestinationError, match=r"ingredient|exists"):
        streamsoup.greedy(paths, score=lambda candidate: 1.0, out=out, overwrite=True)


def test_layers_keep_their_meaning(tmp_path):
    with pytest.raises(CheckpointError, match="is not an absolute path"):
        open_checkpoints(["a[0:2]+b[2:4]"])
