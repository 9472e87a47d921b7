"""Scores that a person has already: JSON or CSV, matched with ingredients and never guessed."""

from __future__ import annotations

import json

import pytest

from streamsoup.errors import RecipeError
from streamsoup.own_scores import read_own_scores

RUNS = ["runs/one", "runs/two/", "runs/three.safetensors"]
EXPECTED = {"runs/one": 0.5, "runs/two/": 0.25, "runs/three.safetensors": -1e-3}


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return tmp_path / name


@pytest.mark.parametrize(
    "names",
    [
        ("one", "two", "three"),
        ("one", "two", "three.safetensors"),
        ("runs/one", "runs/two", "runs/three.safetensors"),
        ("runs/one", "runs/two/", "three"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "csv", "csv with a heading", "csv with spaces", "txt"])
def test_names_may_be_paths_or_their_last_part(tmp_path, names, kind):
    rows = dict(zip(names, EXPECTED.values(), strict=True))
    if kind == "json":
        file = write(tmp_path, "scores.json", json.dumps({**rows, "another": 7}))
    else:
        heading = "run,accuracy\n" if "heading" in kind else ""
        space = " " if "spaces" in kind else ""
        lines = [f"{name}{space},{space}{score}" for name, score in rows.items()]
        file = write(tmp_path, f"scores.{kind[:3]}", heading + "\n".join(lines) + "\n\n")
    assert read_own_scores(file, RUNS) == EXPECTED
    assert list(read_own_scores(file, RUNS[::-1])) == RUNS[::-1]


def test_a_full_path_wins_over_its_last_part(tmp_path):
    file = write(tmp_path, "scores.json", '{"one": 0.1, "runs/one": 0.9}')
    assert read_own_scores(file, ["runs/one"]) == {"runs/one": 0.9}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wrong.json", '{"one": 1, "two": 2}'),
        ("wrong.json", "[1, 2, 3]"),
        ("wrong.json", "{"),
        ("wrong.json", '{"one": 1, "two": null, "three": 1}'),
        ("wrong.json", '{"one": 1, "two": {"acc": 1}, "three": 1}'),
        ("wrong.json", '{"one": 1, "two": NaN, "three": 1}'),
        ("wrong.csv", "one,1\ntwo,2\n"),
        ("wrong.csv", "one,1\ntwo,high\nthree,3\n"),
        ("wrong.csv", "one,1\ntwo,inf\nthree,3\n"),
        ("wrong.csv", "one 1\ntwo 2\nthree 3\n"),
        ("wrong.csv", ""),
    ],
)
def test_what_is_no_score_for_each_is_refused_by_name(tmp_path, name, text):
    with pytest.raises(RecipeError, match=name) as caught:
        read_own_scores(write(tmp_path, name, text), RUNS)
    assert "\n" not in str(caught.value)


def test_the_ingredient_without_a_score_is_named(tmp_path):
    with pytest.raises(RecipeError, match="runs/two"):
        read_own_scores(write(tmp_path, "scores.csv", "one,1\nthree,3\n"), RUNS)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("nowhere.json", "binary.csv"):
        with pytest.raises(RecipeError, match=name):
            read_own_scores(tmp_path / name, RUNS)


def test_one_name_for_two_ingredients_is_not_guessed(tmp_path):
    file = write(tmp_path, "scores.json", '{"one": 0.5}')
    with pytest.raises(RecipeError, match="one"):
        read_own_scores(file, ["a/one", "b/one"])


def test_two_scores_for_one_ingredient_are_not_chosen_from(tmp_path):
    for file in (
        write(tmp_path, "scores.csv", "one,0.5\none,0.75\n"),
        write(tmp_path, "scores.json", '{"one": 0.5, "one": 0.75}'),
    ):
        with pytest.raises(RecipeError, match="one"):
            read_own_scores(file, ["runs/one"])
