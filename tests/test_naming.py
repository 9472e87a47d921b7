"""How tensors are named and found: stripped, renamed, and those that all share; what is left out is listed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import SHAPES, fine_tunes, read_checkpoint, realistic, same_bits, write_checkpoint
from learning_pools import Net, make_batches, stored_states, write_states
from numpy.testing import assert_array_equal
from test_cli import assert_one_sentence
from test_derived import halved

import streamsoup
from streamsoup.checkpoints import Opening, open_checkpoints, open_together, select
from streamsoup.checkpoints.sliced import Part, SlicedCheckpoint, join_parts
from streamsoup.errors import CheckpointError, MismatchError, RecipeError
from streamsoup.recipe import read_recipe, recipe_from_mapping, recipe_to_mapping, recipe_to_yaml
from streamsoup.sums import RunningSoup
from streamsoup.workspace import Workspace


def named(folder, seed, change=str, *, more=None, without=(), **options):
    """Write a fine-tune with names of its own."""
    tensors = {change(name): array for name, array in realistic(seed, SHAPES).items() if name not in without}
    return str(write_checkpoint(folder, {**tensors, **(more or {})}, **options))


def prefixed(name):
    return f"module.{name}"


@pytest.fixture
def runs(tmp_path):
    """Three alike, and the second and third again under other names."""
    plain = fine_tunes(tmp_path, 3)
    named(tmp_path / "b", 1, prefixed, shards=2)
    named(tmp_path / "c", 2, lambda name: name.replace("layer.0.", "blocks.0.ff."), pad=1)
    return plain


def interrupted(monkeypatch, make):
    """Make a soup, and stop when all its tiles are there."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Workspace, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            make()


RULES = {"strip_prefix": "module.", "rename": {r"^blocks\.(\d+)\.ff\.": r"layer.\1."}}


# -- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_mode", ["map", "plain"])
def test_other_names_make_the_soup_of_the_same_bits(tmp_path, runs, read_mode):
    streamsoup.soup(runs, tmp_path / "expected")
    others = [runs[0], str(tmp_path / "b"), str(tmp_path / "c")]
    streamsoup.soup(others, tmp_path / "found", read_mode=read_mode, **RULES)
    assert same_bits(read_checkpoint(tmp_path / "found"), read_checkpoint(tmp_path / "expected"))


def test_the_recipe_of_a_soup_has_the_names_and_makes_it_again(tmp_path, runs):
    others = [runs[0], str(tmp_path / "b"), str(tmp_path / "c")]
    streamsoup.soup(others, tmp_path / "soup", **RULES)
    recipe = read_recipe(tmp_path / "soup" / "recipe.yaml")
    assert recipe.opening == Opening(strip_prefix=("module.",), rename=((r"^blocks\.(\d+)\.ff\.", r"layer.\1."),))
    assert recipe_from_mapping(json.loads(json.dumps(recipe_to_mapping(recipe))), where="here") == recipe
    streamsoup.cook.cook(recipe, tmp_path / "again", streamsoup.Execution())
    assert same_bits(read_checkpoint(tmp_path / "again"), read_checkpoint(tmp_path / "soup"))


def test_an_interrupted_soup_goes_on_under_the_same_names(tmp_path, runs, monkeypatch):
    others = [runs[0], str(tmp_path / "b"), str(tmp_path / "c")]
    streamsoup.soup(runs, tmp_path / "expected")

    interrupted(monkeypatch, lambda: streamsoup.soup(others, tmp_path / "soup", **RULES))
    streamsoup.resume(tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))


def test_rules_are_applied_in_order_and_prefixes_before_names(tmp_path):
    named(tmp_path / "a", 0, lambda name: f"x.y.{name}")
    opening = Opening(strip_prefix=["x.", "y."], rename=[("^layer", "stage"), ("^stage", "block")])
    (found,) = open_checkpoints([str(tmp_path / "a")], opening)
    assert set(found.table.names) == {"embed.weight", "block.0.weight", "block.0.bias", "norm.scale"}


def test_the_plan_says_how_many_tensors_each_rule_touches_in_each_checkpoint(tmp_path, runs, cli):
    arguments = ["soup", runs[0], runs[1], tmp_path / "b", "--strip-prefix", "module.", "--rename", "scale=factor"]
    done = cli(*arguments, "--dry-run", "--json")
    assert json.loads(done.stdout)["rules"] == [
        {"rule": "strip-prefix module. in run1, run2", "tensors": 0},
        {"rule": "strip-prefix module. in b", "tensors": 4},
        {"rule": "rename scale=factor in each checkpoint", "tensors": 1},
    ]
    assert "strip-prefix module. in b (4 tensors)" in cli(*arguments, "--dry-run").stdout


@pytest.mark.parametrize("rule", [{"strip_prefix": "model."}, {"rename": {"^model": "m"}}])
def test_a_rule_that_touches_nothing_is_refused(tmp_path, runs, rule):
    with pytest.raises(RecipeError, match="touches no tensor of any ingredient"):
        streamsoup.soup(runs, tmp_path / "soup", **rule)


def test_two_tensors_of_one_name_are_named_both(tmp_path, runs):
    odd = named(tmp_path / "odd", 0, more={"module.norm.scale": np.zeros(5, np.float32)})
    with pytest.raises(CheckpointError, match=r"norm.scale and module.norm.scale: in .*odd, would both be named"):
        streamsoup.soup([runs[0], odd], tmp_path / "soup", strip_prefix="module.")


def test_a_tensor_needs_a_name(runs):
    with pytest.raises(CheckpointError, match=r"norm.scale: in .*run1, has no name left"):
        open_checkpoints(runs, Opening(rename=(("^norm.*", ""),)))


@pytest.mark.parametrize(
    "options",
    [
        {"rename": (("(", ""),)},
        {"rename": (("a", r"\1"),)},
        {"rename": (("a",),)},
        {"rename": "ab"},
        {"rename": 3},
        {"strip_prefix": 3},
        {"strip_prefix": [""]},
        {"only_shared": "yes"},
        {"key": ""},
        {"leave_out": ("a",)},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        Opening(**options)
    with pytest.raises(RecipeError, match=f"here: {next(iter(options))}"):
        recipe_from_mapping({"ingredients": ["/a"], **options}, where="here")


def test_patterns_see_the_new_names(tmp_path, runs):
    others = [str(tmp_path / "b"), named(tmp_path / "d", 2, prefixed)]
    for name, paths, options in (
        ("expected", runs[1:], {}),
        ("found", others, {"strip_prefix": "module."}),
    ):
        streamsoup.soup(paths, tmp_path / name, include=["layer.*"], **options)
    assert same_bits(read_checkpoint(tmp_path / "found"), read_checkpoint(tmp_path / "expected"))


def test_equal_headers_share_a_table_under_new_names_too(tmp_path):
    paths = [named(tmp_path / str(i), i, prefixed, more={f"only.{i // 2}": np.zeros(1, np.float32)}) for i in range(4)]
    opened = open_checkpoints(paths, Opening(strip_prefix=("module.",), only_shared=True))
    assert opened[0].table is opened[1].table
    assert opened[2].table is opened[3].table
    assert opened[0].table is not opened[2].table
    assert all(a is b for a, b in zip(opened[0].table.names, opened[2].table.names, strict=True))


def test_picked_layers_stay_picked_under_new_names(tmp_path):
    tensors = {f"model.layers.{i}.w": np.zeros(3, np.float32) for i in range(4)}
    run = write_checkpoint(tmp_path / "run", tensors)
    path = join_parts([Part(str(run), 0, 1), Part(str(run), 2, 4)])
    (found,) = open_checkpoints([path], Opening(strip_prefix=("model.",)))
    assert isinstance(found, SlicedCheckpoint)
    assert found.layers == (0, 2, 3)
    assert found.table.names == ("layers.0.w", "layers.1.w", "layers.2.w")


def nested(path, seed):
    """Write a file of torch with two models in it; returns the second."""
    generator = torch.Generator().manual_seed(seed)
    models = [{"module.w": torch.randn(3, 4, generator=generator)} for _ in range(2)]
    torch.save({"model": models[0], "ema": {"best": models[1]}}, path)
    return models[1]["module.w"]


def test_a_key_says_which_entry_of_files_of_torch(tmp_path, cli):
    paths = [tmp_path / "one.pt", tmp_path / "two.pt"]
    mean = (sum(nested(path, i).double() for i, path in enumerate(paths)) / 2).float()
    options = ["--key", "ema.best", "--rename", "^w=weight"]
    done = cli("soup", *paths, "-o", "soup.safetensors", *options)
    assert done.returncode == 0, done.stderr
    assert_array_equal(read_checkpoint(tmp_path / "soup.safetensors")["weight"], mean.numpy())
    recipe = read_recipe(tmp_path / "soup.recipe.yaml")
    assert recipe.key == "ema.best"
    streamsoup.cook.cook(recipe, tmp_path / "again.safetensors", streamsoup.Execution())
    assert_array_equal(read_checkpoint(tmp_path / "again.safetensors")["weight"], mean.numpy())
    found = streamsoup.greedy(
        paths, tmp_path / "greedy", score=lambda candidate: 1.0, key="ema.best", budget_bytes="200MiB"
    )
    assert len(found.members) == 2
    assert read_recipe(tmp_path / "greedy" / "recipe.yaml").key == "ema.best"
    assert "weight" in cli("inspect", *paths, *options, "--tensors").stdout
    assert_one_sentence(cli("inspect", *paths, "--key", "nothing"), "one.pt", "nothing")


def test_a_key_is_for_files_of_torch(runs):
    with pytest.raises(CheckpointError, match=r"run1: has no entries of which ema could be one.*Leave --key out"):
        streamsoup.soup(runs, "soup", key="ema")


# -- what all share ----------------------------------------------------------------------------------------------


@pytest.fixture
def unlike(tmp_path):
    """Three that share two tensors: names, shapes and kinds of the others differ."""
    extra = {"head": np.ones((2, 3), np.float32), "ids": np.arange(3)}
    one = named(tmp_path / "one", 0, more=extra)
    two = named(tmp_path / "two", 1, more={**extra, "head": np.ones((2, 4), np.float32)}, without=["norm.scale"])
    three = named(tmp_path / "three", 2, more={**extra, "ids": np.zeros(3, np.int32), "new": np.ones(2, np.float32)})
    return [one, two, three]


SHARED = ["embed.weight", "layer.0.weight", "layer.0.bias"]


def test_only_what_all_have_is_souped_and_all_else_is_listed(tmp_path, unlike):
    result = streamsoup.soup(unlike, tmp_path / "soup", only_shared=True)
    parts = [
        str(write_checkpoint(tmp_path / "parts" / str(i), {n: read_checkpoint(Path(path))[n] for n in SHARED}))
        for i, path in enumerate(unlike)
    ]
    streamsoup.soup(parts, tmp_path / "expected")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))
    one, two, three = unlike
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert manifest["left_out"] == [
        {"why": f"missing from {two}", "missing_from": [two], "tensors": ["norm.scale"]},
        {"why": f"float (2, 3) in {one}, float (2, 4) in {two}", "missing_from": [], "tensors": ["head"]},
        {"why": f"I64 (3,) in {one}, I32 (3,) in {three}", "missing_from": [], "tensors": ["ids"]},
        {"why": f"missing from {one}, {two}", "missing_from": [one, two], "tensors": ["new"]},
    ]
    assert len(result.notes) == 4
    assert list(result.notes) == manifest["notes"]
    assert result.notes[0] == f"1 tensor(s) left out, missing from {two}: norm.scale."
    assert result.bytes_read == sum(3 * a.nbytes for n, a in read_checkpoint(Path(one)).items() if n in SHARED)


def test_notes_list_every_tensor_and_a_plan_the_first_few(tmp_path, cli):
    more = {f"x{i}": np.zeros(1, np.float32) for i in range(9)}
    paths = [named(tmp_path / "one", 0, more=more), named(tmp_path / "two", 1)]
    result = streamsoup.soup(paths, tmp_path / "soup", only_shared=True)
    assert ", ".join(more) in result.notes[0]
    done = cli("soup", *paths, "--only-shared", "--dry-run")
    assert f"9 tensor(s), missing from {paths[1]}: x0, x1, x2, ..." in done.stdout
    facts = json.loads(cli("soup", *paths, "--only-shared", "--dry-run", "--json").stdout)
    assert facts["left_out"][0]["tensors"] == list(more)
    assert facts["tensors"] == 4


def test_an_interrupted_soup_of_what_is_shared_goes_on(tmp_path, unlike, monkeypatch):
    streamsoup.soup(unlike, tmp_path / "expected", only_shared=True)

    interrupted(monkeypatch, lambda: streamsoup.soup(unlike, tmp_path / "soup", only_shared=True))
    streamsoup.resume(tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))


def test_nothing_shared_is_an_error_that_says_what_may_be_wrong(tmp_path, runs):
    with pytest.raises(MismatchError, match=r"no float tensor of one name.*/b begin with 'module.': `--strip-pr"):
        streamsoup.soup([runs[0], str(tmp_path / "b")], tmp_path / "soup", only_shared=True)
    ids = [named(tmp_path / n, 0, lambda name, n=n: f"{n}{name}", more={"ids": np.arange(3)}) for n in "pq"]
    with pytest.raises(MismatchError, match="no float tensor of one name"):
        streamsoup.soup(ids, tmp_path / "soup", only_shared=True)


def test_a_mismatch_names_the_ways_out(tmp_path, runs):
    with pytest.raises(MismatchError, match="give --only-shared for a soup of what all have alike, or --rename"):
        streamsoup.soup([runs[0], named(tmp_path / "x", 1, without=["norm.scale"])], tmp_path / "soup")


def test_where_only_shapes_differ_no_names_are_blamed(tmp_path):
    paths = [str(write_checkpoint(tmp_path / str(n), {"w": np.zeros(n, np.float32)})) for n in (3, 4)]
    with pytest.raises(MismatchError, match=r"give --only-shared for a soup of what all have alike\.$"):
        streamsoup.soup(paths, tmp_path / "soup")


@pytest.mark.parametrize("turned", [False, True])
def test_a_common_prefix_is_found(tmp_path, runs, turned):
    paths = [runs[0], str(tmp_path / "b")]
    with pytest.raises(MismatchError, match=r"All names of .*/b begin with 'module.': `--strip-prefix module.` takes"):
        streamsoup.soup(paths[::-1] if turned else paths, tmp_path / "soup")


def test_a_prefix_of_some_names_is_found_and_none_where_it_would_not_help(tmp_path, runs):
    some = named(tmp_path / "some", 1, lambda name: f"model.{name}" if name.startswith("layer") else name)
    with pytest.raises(MismatchError, match=r"2 names of .*/some begin with 'model.'"):
        streamsoup.soup([runs[0], some], tmp_path / "soup")
    odd = named(tmp_path / "odd", 1, lambda name: f"model.{name[::-1]}")
    with pytest.raises(MismatchError) as caught:
        streamsoup.soup([runs[0], odd], tmp_path / "soup")
    assert "--strip-prefix" not in str(caught.value)


def test_computed_ingredients_are_named_and_chosen_like_others(tmp_path, monkeypatch):
    before = streamsoup.checkpoints._open
    monkeypatch.setattr(
        streamsoup.checkpoints,
        "_open",
        lambda path, *more: halved(found) if "half" in (found := before(path, *more)).path else found,
    )
    tensors = {f"module.{n}": a.astype(np.float32) for n, a in realistic(0, SHAPES).items()}
    write_checkpoint(tmp_path / "half", {**tensors, "extra": np.ones(3, np.float32)})
    write_checkpoint(tmp_path / "plain", {n: a * np.float32(0.5) for n, a in tensors.items()})
    paths = [str(tmp_path / "plain"), str(tmp_path / "half")]
    streamsoup.soup(paths, tmp_path / "soup", strip_prefix="module.", only_shared=True)
    found = read_checkpoint(tmp_path / "soup")
    assert set(found) == set(SHAPES)
    for name, array in found.items():
        assert_array_equal(array, tensors[f"module.{name}"] * np.float32(0.5))


def test_a_table_that_was_chosen_before_is_taken(runs):
    (checkpoint,) = open_checkpoints(runs[:1])
    positions = np.array([2, 0])
    first = select(checkpoint, positions)
    assert select(checkpoint, positions, table=first.table).table is first.table


# -- greedy, learned, running, compared --------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path):
    """Two good ones that share more than what all share, and a bad one under other names."""
    more = {"head": np.ones(4, np.float32)}
    good = [named(tmp_path / n, i, more=more) for i, n in enumerate(["one", "two"])]
    return [*good, named(tmp_path / "bad", 9, prefixed)]


def keeps_good(candidate):
    return -float("bad" in {Path(m.path).name for m in candidate.members})


@pytest.mark.parametrize("workdir", [None, "work"])
def test_a_greedy_soup_is_that_of_its_recipe_though_its_members_share_more(tmp_path, pool, workdir):
    result = streamsoup.greedy(
        pool,
        tmp_path / "soup",
        score=keeps_good,
        workdir=workdir and tmp_path / workdir,
        strip_prefix="module.",
        only_shared=True,
        budget_bytes="200MiB",
    )
    assert [Path(m.path).name for m in result.members] == ["one", "two"]
    assert set(read_checkpoint(tmp_path / "soup")) == set(SHAPES)
    assert result.notes == (f"1 tensor(s) left out, missing from {pool[2]}: head.",)
    assert json.loads((tmp_path / "soup" / "streamsoup.json").read_text())["notes"] == list(result.notes)
    recipe = read_recipe(tmp_path / "soup" / "recipe.yaml")
    assert recipe.opening == Opening(only_shared=True, leave_out=("head",))
    again = streamsoup.cook.cook(recipe, tmp_path / "again", streamsoup.Execution())
    assert same_bits(read_checkpoint(tmp_path / "again"), read_checkpoint(tmp_path / "soup"))
    assert again.notes == ("1 tensor(s) left out, as the recipe says: head.",)


def test_an_interrupted_greedy_soup_goes_on_under_the_same_names(tmp_path, pool):
    options = {"strip_prefix": ["module."], "rename": {"^norm": "n"}, "only_shared": True, "budget_bytes": "200MiB"}
    expected = streamsoup.greedy(pool, tmp_path / "expected", score=keeps_good, **options)
    asked = []

    def stops(candidate):
        asked.append(candidate)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return keeps_good(candidate)

    with pytest.raises(KeyboardInterrupt):
        streamsoup.greedy(pool, tmp_path / "soup", score=stops, workdir=tmp_path / "work", **options)
    found = streamsoup.resume_greedy(tmp_path / "work", score=keeps_good)
    assert found.members == expected.members
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))


def test_a_later_ingredient_is_opened_as_the_first_were(tmp_path, pool):
    options = {"strip_prefix": "module.", "only_shared": True, "budget_bytes": "200MiB"}
    lacking = named(tmp_path / "lacking", 3, without=["norm.scale"])
    more = named(tmp_path / "more", 4, prefixed, more={"tail": np.ones(2, np.float32)})
    with RunningSoup([pool[0], pool[2]], **options) as running:
        running.add(pool[0]).add(more)
        assert [left.names for left in running.pool.left_out] == [("head",), ("tail",)]
        found = running.mean().tensors()
        with pytest.raises(MismatchError, match=r"missing from .*lacking: norm.scale. Name .*lacking among the first"):
            running.add(lacking)
    streamsoup.soup([pool[0], more], tmp_path / "expected", strip_prefix="module.", only_shared=True)
    expected = read_checkpoint(tmp_path / "expected")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert_array_equal(tensor.view(torch.uint16).numpy(), expected[name].view(np.uint16))


def test_a_kept_sum_goes_on_without_those_that_shared_less(tmp_path, pool):
    options = {"only_shared": True, "budget_bytes": "200MiB"}
    with RunningSoup(pool, folder=tmp_path / "sum", strip_prefix="module.", **options) as running:
        expected = running.add(pool[0]).add(pool[1]).mean().tensors()
    with RunningSoup.open(tmp_path / "sum", leave_out=["head"], **options) as again:
        found = again.mean().tensors()
    assert found.keys() == expected.keys() == SHAPES.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_learned_soup_is_that_of_its_recipe(tmp_path):
    net = Net().double()
    states = stored_states(net, 2)
    paths = [str(path) for path in write_states(tmp_path / "runs", states)]
    other = {f"module.{n}": a for n, a in read_checkpoint(Path(paths[1])).items()}
    paths[1] = str(write_checkpoint(tmp_path / "other", {**other, "more": np.ones(2, np.float64)}))
    result = streamsoup.learn(
        paths, net, torch.nn.functional.cross_entropy, make_batches(2), tmp_path / "soup",
        epochs=1, strip_prefix="module.", only_shared=True, budget_bytes="200MiB",
    )  # fmt: skip
    assert result.notes[0].startswith("1 tensor(s) left out")
    recipe = read_recipe(tmp_path / "soup" / "recipe.yaml")
    assert recipe.opening == Opening(strip_prefix=("module.",), only_shared=True)
    found = read_checkpoint(tmp_path / "soup")
    for name, value in net.state_dict().items():
        assert_array_equal(found[name], value.numpy())


def test_a_comparison_is_of_what_is_shared(pool):
    found = streamsoup.compare(pool, strip_prefix="module.", only_shared=True, budget_bytes="200MiB")
    assert set(found.tensors.names) == set(SHAPES)
    assert found.to_json()["left_out"][0]["tensors"] == ["head"]


def test_every_subcommand_names_and_lists(tmp_path, pool, cli):
    options = ["--strip-prefix", "module.", "--only-shared"]
    rows = ["strip-prefix module. in bad (4 tensors)", f"1 tensor(s), missing from {pool[2]}: head"]
    commands = [
        ["soup", *pool, "--dry-run"],
        ["greedy", *pool, "--dry-run"],
        ["learn", *pool, "--dry-run"],
        ["inspect", *pool],
    ]
    for command in commands:
        done = cli(*command, *options)
        assert done.returncode == 0, done.stderr
        for row in rows:
            assert row in done.stdout, command
    done = cli("inspect", "--compare", *pool, *options)
    assert rows[1] in done.stdout
    assert cli("inspect", *pool).returncode == 1
    assert "--only-shared" in cli("inspect", *pool).stdout


def test_usage(tmp_path, runs, cli):
    assert_one_sentence(cli("soup", *runs, "--rename", "abc", "-o", "soup"), "OLD=NEW", code=2)
    assert_one_sentence(cli("soup", "--resume", "soup", "--only-shared"), "--resume", code=2)
    assert_one_sentence(cli("greedy", "--resume", "work", "--rename", "a=b"), "--rename", code=2)
    assert_one_sentence(cli("soup", *runs, "--key", "ema", "-o", "soup"), "run1", "--key")
    done = cli("inspect", runs[0], "--tensors", "--rename", r"(?=scale)|^(layer)=\1x")
    assert "layerx.0.weight" in done.stdout


def test_options_of_the_command_line_replace_those_of_a_recipe(tmp_path, runs, cli):
    others = [runs[0], str(tmp_path / "b")]
    recipe = streamsoup.Recipe(tuple(map(streamsoup.Ingredient, others)), strip_prefix=("nothing.",))
    (tmp_path / "r.yaml").write_text(recipe_to_yaml(recipe))
    assert_one_sentence(cli("soup", "--recipe", "r.yaml", "-o", "soup"), "strip-prefix nothing.")
    done = cli("soup", "--recipe", "r.yaml", "-o", "soup", "--strip-prefix", "module.")
    assert done.returncode == 0, done.stderr


def test_what_was_opened_together_says_so(runs, tmp_path):
    opened = open_together([runs[0], str(tmp_path / "b")], Opening(strip_prefix=("module.",), only_shared=True))
    assert opened.left_out == ()
    assert opened.touched == (("strip-prefix module. in run1", 0), ("strip-prefix module. in b", 4))
