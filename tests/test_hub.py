"""Ids of the Hugging Face Hub: found in the cache, fetched by the real client from a Hub of ours, pinned to commits."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import SHAPES, fine_tunes, read_checkpoint, realistic, same_bits, write_checkpoint
from hub_server import MODEL, commit_of, serving
from huggingface_hub import constants
from test_cli import assert_one_sentence
from test_naming import interrupted

import streamsoup
from streamsoup.checkpoints import identify, is_hub_id, open_checkpoints, verify_unchanged
from streamsoup.checkpoints.hub import choose_weights, find_snapshot, resolve
from streamsoup.errors import (
    ChangedIngredientError,
    CheckpointError,
    CheckpointNotFoundError,
    DestinationError,
    RecipeError,
)
from streamsoup.from_mergekit_config import from_mergekit
from streamsoup.learning.options import make_learn_job
from streamsoup.recipe import read_recipe, recipe_to_yaml
from streamsoup.sums import RunningSoup

BESIDE = {"config.json": '{"a": 1}', "tokenizer.json": "{}", "1_Pooling/config.json": '{"b": 2}'}
OTHER = {"onnx/config.json": "{}", "onnx/model.onnx": "x", "README.md": "x", "model.fp16.bin": "x", "notes.pdf": "x"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache, empty; whoever runs in this folder finds no files of that name."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / "hub"


def put(cache, folder, number=1, *, branch="main"):
    """Put what is in a folder into the cache, as the client does: blobs, and links to them."""
    repository = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit_of(number)
    for file in filter(Path.is_file, folder.rglob("*")):
        raw = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(raw).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(raw)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / branch).write_text(commit_of(number))
    return snapshot


def version(tmp_path, number, **options):
    """Write what a repository has at a commit."""
    options.setdefault("companions", BESIDE)
    return write_checkpoint(tmp_path / f"version{number}", realistic(10 + number, SHAPES), **options)


# -- what is an id -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [MODEL, "org/model@main", "org/model@v1.0", "a/b", "Org-1/model_2.5", f"a/b@{'0' * 40}"]
)
def test_ids(cache, path):
    assert is_hub_id(path)


@pytest.mark.parametrize(
    "path",
    [
        *("model", "/org/model", "./model", "../model", "~/model", "org/model/", "org/model/sub", "org/model@a/b"),
        *("org/model.safetensors", "org/model.bin", "org/model.pt", "org/model.ckpt", "org/mo del", "org/model@", ""),
        *("org/mod*", "org/model[0:3]", "org/a--b", "org/a..b", "org/.model", "org/a+b/c", "-org/model", "org/model:1"),
    ],
)
def test_what_looks_local_is_no_id(cache, path):
    assert not is_hub_id(path)
    assert resolve(path) == path


def test_what_is_here_wins(cache, tmp_path):
    put(cache, version(tmp_path, 1))
    write_checkpoint(Path(MODEL), realistic(0, SHAPES))
    (found,) = open_checkpoints([MODEL])
    assert found.path == MODEL
    assert not is_hub_id(MODEL)
    assert resolve(MODEL) == MODEL
    assert not is_hub_id(f"{Path(MODEL).parent}/slip-of-the-pen")


# -- from the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, 2])
def test_a_cached_repository_is_an_ingredient_without_a_network(cache, tmp_path, shards):
    (run,) = fine_tunes(tmp_path, 1)
    snapshot = put(cache, version(tmp_path, 1, shards=shards))
    streamsoup.soup([str(tmp_path / "version1"), run], tmp_path / "expected")
    streamsoup.soup([MODEL, run], tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))
    for name, text in BESIDE.items():
        assert (tmp_path / "soup" / name).read_text() == text
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    pinned = f"{MODEL}@{commit_of(1)}"
    assert manifest["ingredients"][0]["path"] == pinned
    assert all(Path(shard["path"]).parent == snapshot for shard in manifest["ingredients"][0]["shards"])
    assert read_recipe(tmp_path / "soup" / "recipe.yaml").ingredients[0].path == pinned
    assert f"`{pinned}`" in (tmp_path / "soup" / "README.md").read_text()


def test_a_revision_is_a_branch_or_a_commit(cache, tmp_path):
    put(cache, version(tmp_path, 1), 1, branch="old")
    put(cache, version(tmp_path, 2), 2)
    for revision, number in (("old", 1), ("main", 2), (commit_of(1), 1), (commit_of(2), 2)):
        (found,) = open_checkpoints([f"{MODEL}@{revision}"])
        assert found.path == f"{MODEL}@{commit_of(number)}"
        assert found.folder == cache / "models--org--model" / "snapshots" / commit_of(number)


def test_an_interrupted_soup_goes_on_with_the_commit_that_it_began_with(cache, tmp_path, monkeypatch):
    (run,) = fine_tunes(tmp_path, 1)
    put(cache, version(tmp_path, 1), 1)
    streamsoup.soup([MODEL, run], tmp_path / "expected")
    interrupted(monkeypatch, lambda: streamsoup.soup([MODEL, run], tmp_path / "soup"))
    put(cache, version(tmp_path, 2), 2)
    streamsoup.resume(tmp_path / "soup")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))
    streamsoup.soup([MODEL, run], tmp_path / "later")
    assert not same_bits(read_checkpoint(tmp_path / "later"), read_checkpoint(tmp_path / "expected"))


def test_an_interrupted_greedy_soup_goes_on_with_the_commit_that_it_began_with(cache, tmp_path):
    runs = [*fine_tunes(tmp_path, 2), MODEL]
    put(cache, version(tmp_path, 1), 1)
    asked = []

    def stops(candidate):
        asked.append(candidate)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return 1.0

    options = {"own_scores": {MODEL: 3.0, runs[0]: 2.0, runs[1]: 1.0}, "budget_bytes": "200MiB"}
    with pytest.raises(KeyboardInterrupt):
        streamsoup.greedy(runs, tmp_path / "soup", score=stops, workdir=tmp_path / "work", **options)
    put(cache, version(tmp_path, 2), 2)
    found = streamsoup.resume_greedy(tmp_path / "work", score=lambda candidate: 5.0)
    assert found.members[0].path == f"{MODEL}@{commit_of(1)}"
    paths = [member.path for member in found.members]
    streamsoup.soup(paths, tmp_path / "again")
    assert same_bits(read_checkpoint(tmp_path / "again"), read_checkpoint(tmp_path / "soup"))


def test_a_running_soup_keeps_the_commit(cache, tmp_path):
    (run,) = fine_tunes(tmp_path, 1)
    put(cache, version(tmp_path, 1), 1)
    with RunningSoup([run], folder=tmp_path / "sum", budget_bytes="200MiB") as running:
        before = running.add(run).add(MODEL).mean().tensors()
    put(cache, version(tmp_path, 2), 2)
    with RunningSoup.open(tmp_path / "sum", budget_bytes="200MiB") as running:
        assert [m.path for m in running.members] == [run, f"{MODEL}@{commit_of(1)}"]
        assert all(torch.equal(tensor, before[name]) for name, tensor in running.mean().tensors().items())
        running.remove(f"{MODEL}@{commit_of(1)}").add(MODEL)
        assert [m.path for m in running.members] == [run, f"{MODEL}@{commit_of(2)}"]


def test_a_learned_soup_knows_ids_by_their_commits(cache, tmp_path):
    runs = fine_tunes(tmp_path, 1)
    put(cache, version(tmp_path, 1), 1)
    how = {"by": "model", "init": {MODEL: 1.0}, "restrict": False, "held_out": False, "optimizer": "sgd", "options": {}}
    job = make_learn_job([MODEL, *runs], **how)
    assert job.ingredients == (f"{MODEL}@{commit_of(1)}", runs[0])
    assert job.init == (1.0, 0.0)
    with pytest.raises(RecipeError, match="is named twice"):
        make_learn_job([MODEL, f"{MODEL}@{commit_of(1)}"], **how)


def test_a_recipe_file_may_name_ids_and_its_folder_wins(cache, tmp_path):
    put(cache, version(tmp_path, 1))
    text = recipe_to_yaml(streamsoup.Recipe((streamsoup.Ingredient(MODEL), streamsoup.Ingredient("runs/a/b"))))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.yaml").write_text(text)
    write_checkpoint(tmp_path / "two" / MODEL, realistic(0, SHAPES))
    assert [i.path for i in read_recipe(tmp_path / "one" / "r.yaml").ingredients] == [
        MODEL,
        str(tmp_path / "one" / "runs/a/b"),
    ]
    assert read_recipe(tmp_path / "two" / "r.yaml").ingredients[0].path == str(tmp_path / "two" / MODEL)
    Path(MODEL).mkdir(parents=True)  # here, but not beside the recipe: it must not be taken for that
    assert read_recipe(tmp_path / "one" / "r.yaml").ingredients[0].path == str(tmp_path / "one" / MODEL)


def test_a_recipe_of_mergekit_may_name_ids(cache, tmp_path):
    tensors = {f"model.layers.{i}.w": np.full(3, i, np.float32) for i in range(4)}
    put(cache, write_checkpoint(tmp_path / "version1", tensors, companions=BESIDE))
    pinned = f"{MODEL}@{commit_of(1)}"
    recipe = from_mergekit(
        {"merge_method": "linear", "models": [{"model": MODEL, "parameters": {"weight": 1}}], "base_model": pinned}
    )
    assert [i.path for i in recipe.ingredients] == [pinned]
    slices = [{"sources": [{"model": MODEL, "layer_range": [k, k + 1]}]} for k in (2, 0)]
    recipe = from_mergekit({"merge_method": "passthrough", "slices": slices, "base_model": MODEL})
    (found,) = open_checkpoints(recipe.checkpoints)
    assert found.table.names == ("model.layers.0.w", "model.layers.1.w")
    assert commit_of(1) in found.path


def test_an_adapter_of_the_hub_goes_on_a_base(cache, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    weights = {"w.weight": rng.standard_normal((6, 4)).astype(np.float32)}
    factors = {
        "base_model.model.w.lora_A.weight": rng.standard_normal((2, 4)).astype(np.float32),
        "base_model.model.w.lora_B.weight": rng.standard_normal((6, 2)).astype(np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w"]}
    write_checkpoint(Path("base"), weights)
    Path("lora").mkdir()
    write_checkpoint(Path("lora/adapter_model.safetensors"), factors)
    Path("lora/adapter_config.json").write_text(json.dumps(config))
    put(cache, Path("lora"))
    streamsoup.soup(["base+lora"], "expected")
    interrupted(monkeypatch, lambda: streamsoup.soup([f"base+{MODEL}"], "soup"))
    (cache / "models--org--model" / "refs" / "main").write_text(commit_of(2))
    streamsoup.resume("soup")
    assert same_bits(read_checkpoint(Path("soup")), read_checkpoint(Path("expected")))
    assert read_recipe("soup/recipe.yaml").ingredients[0].path == f"{Path('base').resolve()}+{MODEL}@{commit_of(1)}"


def test_a_blob_that_changes_is_noticed(cache, tmp_path):
    snapshot = put(cache, version(tmp_path, 1))
    (found,) = open_checkpoints([MODEL])
    verify_unchanged(found)
    before = identify(found)
    blob = (snapshot / "model.safetensors").resolve()
    write_checkpoint(tmp_path / "x.safetensors", realistic(3, SHAPES))
    blob.write_bytes((tmp_path / "x.safetensors").read_bytes())
    os.utime(blob, ns=(1, 1))
    with pytest.raises(ChangedIngredientError):
        verify_unchanged(found)
    (again,) = open_checkpoints([MODEL])
    assert identify(again)[0].sampled_blake2b != before[0].sampled_blake2b


def test_a_soup_does_not_go_into_the_cache_and_may_go_where_an_id_seems_to_lie(cache, tmp_path):
    snapshot = put(cache, version(tmp_path, 1))
    (run,) = fine_tunes(tmp_path, 1)
    with pytest.raises(DestinationError, match="lies inside"):
        streamsoup.soup([MODEL, run], snapshot / "soup")
    streamsoup.soup([MODEL, run], "org")
    assert Path("org/model.safetensors").is_file()


# -- what is not there -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["blob", "link", "index"])
def test_what_is_not_whole_in_the_cache_is_not_taken(cache, tmp_path, what):
    with pytest.raises(CheckpointNotFoundError, match=r"org/model: no such file or folder here.*HF_HUB_OFFLINE"):
        open_checkpoints([MODEL])
    snapshot = put(cache, version(tmp_path, 1, shards=2))
    open_checkpoints([MODEL])
    shard = snapshot / "model-00001-of-00002.safetensors"
    missing = {"blob": shard.resolve(), "link": shard, "index": snapshot / "model.safetensors.index.json"}[what]
    missing.unlink()
    with pytest.raises(CheckpointNotFoundError, match="not whole in the cache"):
        open_checkpoints([MODEL])


def test_a_piece_without_an_index_is_not_whole(cache, tmp_path):
    folder = version(tmp_path, 1, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    put(cache, folder)
    with pytest.raises(CheckpointNotFoundError, match="not whole in the cache"):
        open_checkpoints([MODEL])


def test_weights_alone_are_taken_with_a_warning(cache, tmp_path, caplog):
    put(cache, version(tmp_path, 1, companions={}))
    (found,) = open_checkpoints([MODEL])
    assert len(found.table) == len(SHAPES)
    assert "has no configuration" in caplog.text


def test_without_the_client_one_sentence_says_what_to_install(cache, tmp_path, monkeypatch):
    put(cache, version(tmp_path, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(CheckpointNotFoundError, match=r"org/model: no such file.*pip install 'streamsoup\[hub\]'"):
        open_checkpoints([MODEL])


# -- which files -------------------------------------------------------------------------------------------------


def chosen(*names, **indices):
    def fetch(name):
        path = Path(name)
        path.write_text(json.dumps({"weight_map": {str(i): s for i, s in enumerate(indices[name.split(".")[0]])}}))
        return path

    return choose_weights(MODEL, {*names}, fetch)


def test_weights_that_are_chosen(cache):
    assert chosen("model.safetensors", "a.bin", "config.json") == ("model.safetensors",)
    assert chosen("odd.safetensors", "sub/x.safetensors") == ("odd.safetensors",)
    assert chosen("model.safetensors", "model.fp16.safetensors") == ("model.safetensors",)
    assert chosen("pytorch_model.bin", "training_args.bin") == ("pytorch_model.bin",)
    assert chosen("adapter_model.bin", "optimizer.bin") == ("adapter_model.bin",)
    index = "model.safetensors.index.json"
    shards = ["a.safetensors", "b.safetensors"]
    assert chosen(index, *shards, "all.safetensors", model=shards[::-1]) == (index, *shards)
    index = "pytorch_model.bin.index.json"
    assert chosen(index, "p-1.bin", pytorch_model=["p-1.bin"]) == (index, "p-1.bin")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["config.json", "sub/model.safetensors"], "has no weights"),
        (["a.safetensors", "b.safetensors"], r"has 2 files of weights \(a.safetensors, b.safetensors\) and 0 indices"),
        (["a-00001-of-00002.safetensors"], "has 1 files of weights"),
        (["model.safetensors.index.json"], "names x.safetensors, which it does not have"),
    ],
)
def test_what_is_no_checkpoint_is_refused_before_it_is_fetched(cache, names, reason):
    with pytest.raises(CheckpointError, match=f"{MODEL}: .*{reason}"):
        chosen(*names, model=["x.safetensors"])


def test_an_index_that_is_none(cache):
    Path("i").write_text("[]")
    with pytest.raises(CheckpointError, match="is no index of shards"):
        choose_weights(MODEL, {"model.safetensors.index.json"}, lambda name: Path("i"))


def test_of_several_files_in_the_cache_the_usual_one_is_opened(cache, tmp_path):
    folder = version(tmp_path, 1)
    write_checkpoint(folder / "model.fp16.safetensors", realistic(0, SHAPES, "F16"))
    snapshot = put(cache, folder)
    (found,) = open_checkpoints([MODEL])
    assert [shard.path for shard in found.shards] == [str(snapshot / "model.safetensors")]
    assert found.folder == snapshot


# -- from a Hub --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and an environment in which the command line asks it."""
    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        # A command line with --quiet, run in this process by another test, sets it.
        monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
        yield hub


def test_what_is_missing_is_fetched_once_and_no_more_than_is_needed(tmp_path, cli, hub):
    (run,) = fine_tunes(tmp_path, 1)
    commit = hub.commit(version(tmp_path, 1, shards=2, companions={**BESIDE, **OTHER}))
    done = cli("soup", MODEL, run, "-o", "soup")
    assert done.returncode == 0, done.stderr
    weights = {"model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))}
    assert "Fetching" in done.stderr
    assert set(hub.sent) == weights | BESIDE.keys()
    assert len(hub.sent) == len(set(hub.sent))
    streamsoup.soup([str(tmp_path / "version1"), run], tmp_path / "expected")
    assert same_bits(read_checkpoint(tmp_path / "soup"), read_checkpoint(tmp_path / "expected"))
    assert read_recipe(tmp_path / "soup" / "recipe.yaml").ingredients[0].path == f"{MODEL}@{commit}"
    hub.sent.clear()
    hub.status = (500, "down")
    done = cli("inspect", MODEL)
    assert f"{MODEL}@{commit}" in done.stdout
    assert hub.sent == []


def test_quiet_is_quiet_while_fetching_too(tmp_path, cli, hub):
    hub.commit(version(tmp_path, 1))
    done = cli("soup", MODEL, "-o", "soup", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_where_there_are_no_safetensors_files_of_torch_are_fetched(tmp_path, cli, hub):
    version1 = tmp_path / "version1"
    version1.mkdir()
    torch.save({"w": torch.arange(6.0)}, version1 / "pytorch_model.bin")
    torch.save({"lr": 0.1}, version1 / "training_args.bin")
    (version1 / "config.json").write_text("{}")
    commit = hub.commit(version1)
    done = cli("soup", MODEL, "-o", "soup")
    assert done.returncode == 0, done.stderr
    assert set(hub.sent) == {"pytorch_model.bin", "config.json"}
    assert read_checkpoint(tmp_path / "soup")["w"].tolist() == list(range(6))
    assert read_recipe(tmp_path / "soup" / "recipe.yaml").ingredients[0].path == f"{MODEL}@{commit}"


def test_an_older_commit_is_fetched_where_a_recipe_names_it(tmp_path, cli, hub):
    for number in (1, 2):
        hub.commit(version(tmp_path, number))
    done = cli("inspect", f"{MODEL}@{commit_of(1)}", f"{MODEL}@main", "--json")
    assert [c["path"] for c in json.loads(done.stdout)["checkpoints"]] == [f"{MODEL}@{commit_of(i)}" for i in (1, 2)]


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        ((403, "GatedRepo"), ["is gated", "Accept its terms at https://huggingface.co/org/model", "hf auth login"]),
        ((401, "RepoNotFound"), ["no such file or folder here", "no such repository on the Hub", "hf auth login"]),
        ((500, "down"), ["not whole in the cache", "status 500", "Connect"]),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(cli, hub, status, parts):
    hub.status = status
    assert_one_sentence(cli("inspect", MODEL), f"{MODEL}: ", *parts)


def test_what_the_hub_does_not_have_is_one_sentence(tmp_path, cli, hub):
    hub.commit(version(tmp_path, 1))
    assert_one_sentence(cli("inspect", "runs/typo"), "runs/typo: no such file or folder here", "no such repository")
    assert_one_sentence(cli("inspect", f"{MODEL}@nope"), "has no revision nope")
    assert_one_sentence(cli("inspect", MODEL, env={"HF_HUB_OFFLINE": "1"}), "HF_HUB_OFFLINE forbids")


def test_no_network_is_one_sentence(cli, hub):
    with socket.socket() as taken:  # a port where nobody answers
        taken.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = cli("inspect", MODEL, env={"HF_ENDPOINT": nowhere})
    assert_one_sentence(done, f"{MODEL}: ", "the Hub cannot be reached", "Connect, or download it elsewhere")


@pytest.mark.parametrize("files", [{"config.json": "{}"}, {"a.safetensors": "x", "b.safetensors": "x"}])
def test_a_repository_that_is_no_checkpoint_is_refused_before_it_is_fetched(tmp_path, cli, hub, files):
    (tmp_path / "version1").mkdir()
    for name, text in files.items():
        (tmp_path / "version1" / name).write_text(text)
    hub.commit(tmp_path / "version1")
    assert_one_sentence(cli("inspect", MODEL), f"{MODEL}: has ")
    assert hub.sent == []


def test_what_does_not_fit_the_disk_is_refused_before_it_is_fetched(tmp_path, cli, hub):
    hub.commit(version(tmp_path, 1))
    hub.sizes["model.safetensors"] = 10**17
    assert_one_sentence(cli("inspect", MODEL), f"{MODEL}: does not fit the cache", "are needed", "HF_HOME")
    assert hub.sent == []


def test_configuration_that_the_cache_lacks_is_fetched(tmp_path, cli, hub):
    hub.commit(version(tmp_path, 1))
    bare = write_checkpoint(tmp_path / "bare", realistic(11, SHAPES))
    put(tmp_path / "home" / "hub", bare)
    assert cli("inspect", MODEL).returncode == 0
    assert set(hub.sent) == BESIDE.keys()


def test_a_snapshot_says_where_it_is(cache, tmp_path):
    snapshot = put(cache, version(tmp_path, 1))
    found = find_snapshot(MODEL)
    assert (found.folder, found.place, found.weights) == (snapshot, str(snapshot), ("model.safetensors",))
    assert resolve(MODEL) == resolve(found.pinned) == str(snapshot)
