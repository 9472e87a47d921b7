"""Methods against dense float64 computations, on every way to run them."""

from __future__ import annotations

import hashlib
import itertools
import json
import subprocess
import sys

import dense
import numpy as np
import pytest
from factory import read_checkpoint, write_checkpoint

import streamsoup
import streamsoup.cook
import streamsoup.recipe
from streamsoup.errors import NonFiniteError, RecipeError
from streamsoup.tiling import BLOCK_ELEMENTS
from streamsoup.write import FileSink

COUNT = 3
SHAPES = {
    "layers.0.w": (70, 300),
    "layers.1.w": (40, 3, 5, 7),
    "layers.2.w": (9000,),
    "head.w": (33, 1001),
    "one": (1,),
}
WEIGHTS = (0.5, 0.3, 0.4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base and checkpoints that differ from it, float32: paths and float64 arrays."""
    folder = tmp_path_factory.mktemp("methods")
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    all_of_them = [base]
    for _ in range(COUNT):
        spread = {name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in SHAPES}
        all_of_them.append({name: base[name] + np.float32(0.6) * spread[name] for name in SHAPES})
    paths = [str(write_checkpoint(folder / f"run{i}", {**t, "ids": np.arange(3)})) for i, t in enumerate(all_of_them)]
    return paths, [{k: v.astype(np.float64) for k, v in t.items()} for t in all_of_them]


def merged(tmp_path, paths, name="soup", **options):
    options = {"dtype": "float64", "budget_bytes": "1GiB", **options}
    streamsoup.soup(paths, tmp_path / name, **options)
    return read_checkpoint(tmp_path / name)


def deltas_of(tensors, name):
    return [t[name] - tensors[0][name] for t in tensors[1:]]


def _between_two(function):
    return lambda tensors, name: function(tensors[1][name], tensors[2][name])


def _from_base(function):
    return lambda tensors, name: tensors[0][name] + function(*deltas_of(tensors, name))


SHARES = np.array(WEIGHTS) / sum(WEIGHTS)
T = WEIGHTS[1] / (WEIGHTS[0] + WEIGHTS[1])
# Name, how many ingredients, whether a base, parameters, what it should give.
CASES = {
    "slerp": ("slerp", 2, False, {"t": 0.3}, _between_two(lambda a, b: dense.slerp(a, b, 0.3))),
    "slerp from the base": ("slerp", 1, True, {"t": 0.3}, lambda t, n: dense.slerp(t[0][n], t[1][n], 0.3)),
    "nuslerp": ("nuslerp", 2, False, {}, _between_two(lambda a, b: dense.nuslerp(a, b, T))),
    "nuslerp of differences": ("nuslerp", 2, True, {}, _from_base(lambda a, b, _: dense.nuslerp(a, b, T))),
    "nuslerp of rows": (
        "nuslerp", 2, False, {"row_wise": True},
        _between_two(lambda a, b: dense.by_row(lambda x, y: dense.nuslerp(x, y, T), a, b)),
    ),
    "multislerp": ("multislerp", 3, True, {}, _from_base(lambda *d: dense.multislerp(d, SHARES))),
    "multislerp, no base": (
        "multislerp", 3, False, {}, lambda t, n: dense.multislerp([x[n] for x in t[1:]], SHARES)
    ),
    "karcher": (
        "karcher", 3, False, {},
        # Of single numbers of unlike signs, which are antipodal, there is no Karcher mean to compare with.
        lambda t, n: dense.karcher([x[n] for x in t[1:]], SHARES) if t[0][n].size > 1 else None,
    ),
    "model_stock": (
        "model_stock", 3, True, {}, lambda t, n: dense.model_stock(t[0][n], [x[n] for x in t[1:]], "moments")
    ),
    "model_stock, pairs": (
        "model_stock", 3, True, {"cosine": "pairs"},
        lambda t, n: dense.model_stock(t[0][n], [x[n] for x in t[1:]], "pairs"),
    ),
    "model_stock of rows": (
        "model_stock", 3, True, {"filter_wise": True},
        lambda t, n: dense.by_row(lambda *rows: dense.model_stock(rows[0], rows[1:], "moments"), *(x[n] for x in t)),
    ),
    "model_stock of rows, pairs": (
        "model_stock", 3, True, {"filter_wise": True, "cosine": "pairs"},
        lambda t, n: dense.by_row(lambda *rows: dense.model_stock(rows[0], rows[1:], "pairs"), *(x[n] for x in t)),
    ),
    "task_arithmetic": (
        "task_arithmetic", 3, True, {"lambda": 0.7},
        lambda t, n: dense.mix(t[0][n], deltas_of(t, n), WEIGHTS, elect=False, normalize=False, scale=0.7),
    ),
    "ties": (
        "ties", 3, True, {"density": 0.3, "lambda": 1.1},
        lambda t, n: dense.mix(
            t[0][n], [d * dense.keep_largest(d, 0.3) for d in deltas_of(t, n)], WEIGHTS,
            elect=True, normalize=True, scale=1.1,
        ),
    ),
    "breadcrumbs": (
        "breadcrumbs", 3, True, {"density": 0.5, "gamma": 0.1},
        lambda t, n: dense.mix(
            t[0][n], [d * dense.keep_middle(d, 0.5, 0.1) for d in deltas_of(t, n)], WEIGHTS,
            elect=False, normalize=False,
        ) if t[0][n].size > 1 else t[0][n],
    ),
    "breadcrumbs_ties": (
        "breadcrumbs_ties", 3, True, {"density": 0.5, "gamma": 0.1},
        lambda t, n: dense.mix(
            t[0][n], [d * dense.keep_middle(d, 0.5, 0.1) for d in deltas_of(t, n)], WEIGHTS,
            elect=True, normalize=False,
        ) if t[0][n].size > 1 else t[0][n],
    ),
    "sce": ("sce", 3, True, {}, lambda t, n: dense.sce(t[0][n], [x[n] for x in t[1:]], 1.0)),
    "sce, the most varying": (
        "sce", 3, True, {"select_topk": 0.4},
        lambda t, n: dense.sce(t[0][n], [x[n] for x in t[1:]], 0.4) if t[0][n].size > 1 else t[0][n],
    ),
}  # fmt: skip


@pytest.fixture(params=["whole", "tiles"])
def _tiles(request, monkeypatch):
    """Each tensor in one tile, and tensors in many."""
    if request.param == "tiles":
        small_tiles(monkeypatch, 8)


def small_tiles(patch, blocks):
    """Tiles of some blocks, where the method does not want whole rows."""
    patch.setattr("streamsoup.tiling._preferences", lambda workers: [(blocks * BLOCK_ELEMENTS, workers)])
    patch.setattr("streamsoup.tiling._whole_tensors", lambda whole, workers: [])


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("case", CASES)
def test_method_gives_what_the_dense_computation_gives(tmp_path, runs, case):
    method, count, has_base, parameters, reference = CASES[case]
    paths, tensors = runs
    takes_weights = method not in ("slerp", "model_stock", "sce")
    found = merged(
        tmp_path,
        paths[1 : 1 + count],
        weights=WEIGHTS[:count] if takes_weights else None,
        method=method,
        base=paths[0] if has_base else None,
        parameters=parameters,
    )
    for name in SHAPES:
        expected = reference(tensors, name)
        if expected is not None:
            np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-11, err_msg=name)
    assert found["ids"].tolist() == [0, 1, 2]


# -- the same bits on every way ----------------------------------------------------------------------------------

EVERY_RULE = {
    "karcher": {},
    "nuslerp": {"row_wise": True},
    "geometric_median": {},
    "model_stock": {},
    "ties": {"density": 0.3},
    "ties of the model": {"density": 0.3, "scope": "model"},
    "dare_ties": {"density": 0.4, "rescale": "l1", "seed": 7},
    "della": {"density": 0.4, "epsilon": 0.2},
    "della_linear": {"density": 0.4, "epsilon": 0.2, "rescale": "l1"},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "sce": {"select_topk": 0.4},
}
WAYS = [
    ("map", 1, "cpu", 64), ("map", 3, "cpu", 8), ("ahead", 2, "cpu", 8), ("plain", 2, "cpu", 16),
    ("map", 1, "torch:cpu", 8), ("plain", 2, "torch:cpu", 64), ("map", 2, "torch:cpu,torch:cpu", 64),
]  # fmt: skip


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_bits_do_not_depend_on_tiles_threads_reading_or_device(tmp_path, runs, monkeypatch, rule):
    paths, _ = runs
    method = rule.split()[0]
    count = 2 if method == "nuslerp" else 3
    found = []
    for number, (mode, workers, device, blocks) in enumerate(WAYS):
        with monkeypatch.context() as patch:
            small_tiles(patch, blocks)
            soup = merged(
                tmp_path, paths[1 : 1 + count], f"way{number}", method=method, dtype="float32",
                base=None if method in ("karcher", "geometric_median") else paths[0], parameters=EVERY_RULE[rule],
                read_mode=mode, workers=workers, device=device,
                device_budget_bytes="24MiB" if "," in device else None,
            )  # fmt: skip
        found.append({name: soup[name].tobytes() for name in SHAPES})
    assert all(soup == found[0] for soup in found)
    assert len(set(found[0].values())) == len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["linear", *EVERY_RULE])
def test_a_gpu_gives_the_bits_of_the_cpu(tmp_path, runs, monkeypatch, rule):
    paths, _ = runs
    method = rule.split()[0]
    small_tiles(monkeypatch, 8)
    found = []
    for device in ("cpu", "cuda"):
        soup = merged(
            tmp_path, paths[1 : 3 if method == "nuslerp" else 4], device, method=method, dtype="float32", device=device,
            base=None if method in ("karcher", "geometric_median", "linear") else paths[0],
            parameters=EVERY_RULE.get(rule, {}),
        )  # fmt: skip
        found.append({name: soup[name].tobytes() for name in SHAPES})
    assert found[0] == found[1]


# -- chance ------------------------------------------------------------------------------------------------------


def _numbers(seed, stream, tensor, count):
    """SplitMix64, one number at a time, as the paper has it."""
    raw = hashlib.blake2b(f"{seed}\0{stream}\0{tensor}".encode(), digest_size=8).digest()
    state, found = int.from_bytes(raw, "little"), []
    for _ in range(count):
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        found.append(((z ^ (z >> 31)) >> 11) * 2.0**-53)
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    return np.array(found)


def _chances(method, delta, density, epsilon):
    if method.startswith("dare"):
        return np.full(delta.shape, density)
    rows = np.abs(delta).reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
    ranks = rows.astype(np.float32).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return (density - epsilon + 2 * epsilon * ranks / max(rows.shape[1] - 1, 1)).reshape(delta.shape)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("rescale", ["none", "probability", "l1"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_methods_drop_what_their_numbers_say(tmp_path, runs, method, rescale):
    paths, tensors = runs
    density, epsilon, seed = 0.4, 0.2, 5
    parameters = {"density": density, "seed": seed, "rescale": rescale}
    if method.startswith("della"):
        parameters["epsilon"] = epsilon
    found = merged(tmp_path, paths[1:], weights=WEIGHTS, method=method, base=paths[0], parameters=parameters)
    for name in SHAPES:
        deltas = []
        for i, delta in enumerate(deltas_of(tensors, name)):
            chances = _chances(method, delta, density, epsilon)
            kept = delta * (_numbers(seed, i, name, delta.size).reshape(delta.shape) < chances)
            if rescale == "probability":
                kept = kept / chances
            elif rescale == "l1" and np.abs(kept).sum() >= 1e-7:
                kept = kept * (np.abs(delta).sum() / np.abs(kept).sum())
            deltas.append(kept)
        expected = dense.mix(
            tensors[0][name], deltas, WEIGHTS, elect=method in ("dare_ties", "della"), normalize=method == "della"
        )
        np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-11, err_msg=name)


def test_another_seed_drops_others_and_names_of_tensors_matter(tmp_path, runs):
    paths, _ = runs
    options = {"method": "dare_linear", "base": paths[0]}
    soups = [merged(tmp_path, paths[1:], f"seed{s}", parameters={"density": 0.5, "seed": s}, **options) for s in (0, 1)]
    assert not np.array_equal(soups[0]["layers.0.w"], soups[1]["layers.0.w"])


# -- the rest of the family --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_tiles")
def test_ties_of_the_whole_model_has_one_threshold(tmp_path, runs):
    paths, tensors = runs
    parameters = {"density": 0.2, "scope": "model"}
    found = merged(tmp_path, paths[1:], method="ties", base=paths[0], parameters=parameters)
    deltas = [{name: t[name] - tensors[0][name] for name in SHAPES} for t in tensors[1:]]
    keeps = []
    for delta in deltas:
        everything = np.concatenate([d.ravel() for d in delta.values()])
        sizes = np.abs(everything).astype(np.float32)
        keeps.append(np.sort(sizes)[-int(0.2 * sizes.size)])
    for name in SHAPES:
        thinned = [d[name] * (np.abs(d[name]).astype(np.float32) >= k) for d, k in zip(deltas, keeps, strict=True)]
        expected = dense.mix(tensors[0][name], thinned, (1, 1, 1), elect=True, normalize=True)
        np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.usefixtures("_tiles")
def test_no_point_nearby_has_a_smaller_sum_of_distances_than_the_geometric_median(tmp_path, runs):
    paths, tensors = runs
    found = merged(tmp_path, paths[1:], method="geometric_median")
    rng = np.random.default_rng(1)
    for name in ("layers.0.w", "layers.2.w"):
        points = [t[name] for t in tensors[1:]]
        least = dense.distances_to(found[name], points).sum()
        mean = np.mean(points, axis=0)
        assert least < dense.distances_to(mean, points).sum()
        for _ in range(20):
            step = 1e-3 * sum(c * (p - mean) for c, p in zip(rng.standard_normal(3), points, strict=True))
            assert least <= dense.distances_to(found[name] + step, points).sum() + 1e-9


@pytest.mark.usefixtures("_tiles")
def test_fisher_weighs_by_importance_and_by_weight_where_nothing_matters(tmp_path, runs):
    paths, tensors = runs
    rng = np.random.default_rng(2)
    importances = []
    for _ in range(2):
        one = {name: rng.random(shape).astype(np.float32) for name, shape in SHAPES.items()}
        one["layers.2.w"][:100] = 0
        importances.append({**one, "ids": np.arange(3)})
    beside = [str(write_checkpoint(tmp_path / f"fisher{i}", one)) for i, one in enumerate(importances)]
    found = merged(tmp_path, paths[1:3], weights=[1, 3], method="fisher", importances=beside)
    for name in SHAPES:
        factors = [w * f[name].astype(np.float64) for w, f in zip((1, 3), importances, strict=True)]
        total = factors[0] + factors[1]
        mean = (tensors[1][name] + 3 * tensors[2][name]) / 4
        with np.errstate(invalid="ignore"):
            weighted = (factors[0] * tensors[1][name] + factors[1] * tensors[2][name]) / total
        np.testing.assert_allclose(found[name], np.where(total == 0, mean, weighted), rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("method", "parameters", "weights"),
    [
        ("ema", {"decay": 0.75}, [0.75**2, 0.25 * 0.75, 0.25]),
        ("swa", {"start": 1}, [0, 1, 1]),
        ("lawa", {"window": 1}, [0, 0, 1]),
        ("linear", {"weight": 2.5}, [1, 1, 1]),
    ],
)
def test_averages_over_a_run_are_weighted_soups(tmp_path, runs, method, parameters, weights):
    paths, _ = runs
    found = merged(tmp_path, paths[1:], method=method, parameters=parameters, dtype="float32")
    expected = merged(tmp_path, paths[1:], "same", weights=weights, dtype="float32")
    assert all(found[name].tobytes() == expected[name].tobytes() for name in SHAPES)


def test_wise_ft_and_negation_are_coefficients(tmp_path, runs):
    paths, _ = runs
    found = merged(tmp_path, paths[1:2], method="wise_ft", base=paths[0], parameters={"alpha": 0.25}, dtype="float32")
    expected = merged(tmp_path, paths[:2], "same", coefficients=[0.75, 0.25], dtype="float32")
    assert all(found[name].tobytes() == expected[name].tobytes() for name in SHAPES)
    less = merged(tmp_path, paths[1:2], "less", method="task_arithmetic", base=paths[0], weights=[-1.0])
    expected = merged(tmp_path, paths[:2], "minus", coefficients=[2, -1])
    assert all(less[name].tobytes() == expected[name].tobytes() for name in SHAPES)


# -- parameters --------------------------------------------------------------------------------------------------


def test_gradients_and_patterns_choose_by_depth_and_name(tmp_path, runs):
    paths, tensors = runs
    alpha = [{"pattern": "head.*", "value": 0.9}, {"value": [0.0, 1.0]}]
    found = merged(tmp_path, paths[1:2], method="wise_ft", base=paths[0], parameters={"alpha": alpha}, dtype=None)
    for name, share in (("layers.0.w", 0.0), ("layers.1.w", 0.5), ("layers.2.w", 1.0), ("head.w", 0.9), ("one", 0.0)):
        expected = ((1 - share) * tensors[0][name] + share * tensors[1][name]).astype(np.float32)
        np.testing.assert_allclose(found[name], expected, rtol=1e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("method", ["linear", "ties", "sce"])
def test_what_is_not_included_is_the_first_checkpoint_bit_for_bit(tmp_path, runs, method):
    paths, tensors = runs
    options = {} if method == "linear" else {"method": method, "base": paths[0]}
    found = merged(tmp_path, paths[1:], include=["layers.*"], exclude=["*.1.*"], dtype="float32", **options)
    first = tensors[0 if options else 1]
    for name in ("head.w", "one", "layers.1.w"):
        assert found[name].tobytes() == first[name].astype(np.float32).tobytes()
    for name in ("layers.0.w", "layers.2.w"):
        assert found[name].tobytes() != first[name].astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "tys"}, r"method 'tys' is not one of linear, "),
        ({"method": "ties"}, r"ties needs a base.*--base"),
        ({"method": "ema", "base": True}, r"ema takes no base"),
        ({"method": "slerp"}, r"slerp takes 2 ingredient\(s\), not 3"),
        ({"method": "karcher", "parameters": {"weigth": 1}}, r"weigth: method karcher has no such parameter.*weight"),
        ({"method": "ties", "base": True, "parameters": {"density": "much"}}, r"density: 'much' is not a number"),
        ({"method": "ties", "base": True, "parameters": {"density": 30}}, r"density: 30 is not from 0 to 1"),
        (
            {"method": "ties", "base": True, "parameters": {"density": [{"patern": "*", "value": 1}]}},
            r"density: unknown key 'patern' in a condition",
        ),
        (
            {"method": "ties", "base": True, "parameters": {"density": [{"pattern": "*"}]}},
            r"is neither a number of a gradient nor a condition with 'value'",
        ),
        (
            {"method": "ties", "base": True, "parameters": {"density": [0.1, 0.2], "scope": "model"}},
            r"with scope model it is one number",
        ),
        ({"method": "karcher", "weights": [1, -2, 1]}, r"karcher divides by the sum of the weights .* which cancel"),
        ({"method": "sce", "base": True, "weights": [1, 2, 1]}, r"sce takes no weights"),
        ({"method": "sce", "base": True, "also": True}, r"is the base, and an ingredient too"),
        ({"weights": [1, 2, 1], "parameters": {"weight": 1}}, r"for all ingredients and for each"),
        ({"method": "ema", "parameters": {"decay": 2}}, r"decay: 2 is not in \[0, 1\)"),
        ({"method": "dare_ties", "base": True, "parameters": {"seed": "x"}}, r"seed: 'x' is not a number"),
        ({"method": "ties", "base": True, "parameters": {"scope": "row"}}, r"scope: 'row' is not one of tensor, model"),
        ({"method": "della", "base": True, "parameters": {"density": 0.1}}, r"epsilon: 0.15 beside a density of 0.1"),
        ({"include": ["layer.*"]}, r"include layer\.\*: no tensor has such a name"),
        (
            {"parameters": {"weight": [{"pattern": "x*", "value": 1}]}},
            r"weight where x\*: 1: no tensor has such a name",
        ),
        ({"method": "ema", "coefficients": [1, 1, 1]}, r"by method linear only, not by ema"),
        ({"method": "fisher"}, r"importance: method fisher wants one of each ingredient"),
        ({"method": "lawa", "parameters": {"window": 4}}, r"3 checkpoints, but the average begins at number -1"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence_and_leaves_nothing(tmp_path, runs, options, sentence):
    paths, _ = runs
    options = {**options, **({"base": paths[0]} if options.get("base") else {})}
    if options.pop("also", False):
        paths = [*paths, paths[0]]
    with pytest.raises(RecipeError, match=sentence):
        streamsoup.soup(paths[1:], tmp_path / "soup", **options)
    assert list(tmp_path.iterdir()) == []


# -- what is found, and what a run leaves ------------------------------------------------------------------------


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("method", ["ties", "model_stock", "dare_linear", "sce", "della"])
def test_every_non_finite_element_of_every_checkpoint_is_told_of(tmp_path, runs, method):
    paths, tensors = runs
    bad = {name: t.astype(np.float32) for name, t in tensors[2].items() if name in SHAPES} | {"ids": np.arange(3)}
    bad["layers.0.w"][3, 7] = np.nan
    bad["head.w"][0, :5] = np.inf
    broken = str(write_checkpoint(tmp_path / "broken", bad))
    with pytest.raises(NonFiniteError) as caught:
        streamsoup.soup([paths[1], broken], tmp_path / "soup", method=method, base=paths[0])
    text = str(caught.value)
    assert f"layers.0.w: 1 NaN or infinite element(s) in {broken}" in text
    assert f"head.w: 5 NaN or infinite element(s) in {broken}" in text
    assert text.count("NaN or infinite") == 2


def test_the_manifest_and_the_recipe_say_what_was_done(tmp_path, runs):
    paths, _ = runs
    parameters = {"density": [{"pattern": "head.*", "value": 0.5}, {"value": 0.2}]}
    streamsoup.soup(paths[1:], tmp_path / "soup", method="ties", base=paths[0], parameters=parameters, exclude=["one"])
    manifest = json.loads((tmp_path / "soup" / "streamsoup.json").read_text())
    assert manifest["method"] == "ties"
    assert manifest["base"]["path"] == paths[0]
    assert [i["path"] for i in manifest["ingredients"]] == paths[1:]
    assert len({manifest["base"]["content_digest"], *(i["content_digest"] for i in manifest["ingredients"])}) == 4
    card = (tmp_path / "soup" / "README.md").read_text()
    assert "density where head.*: 0.5 (1 tensors)" in card
    recipe = streamsoup.read_recipe(tmp_path / "soup" / "recipe.yaml")
    again = streamsoup.cook.cook(recipe, tmp_path / "again", streamsoup.Execution())
    assert again.tensors == len(SHAPES) + 1
    first, second = (read_checkpoint(tmp_path / name) for name in ("soup", "again"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in SHAPES)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "karcher"])
def test_an_interrupted_merge_goes_on_to_the_same_bits(tmp_path, runs, monkeypatch, method):
    paths, _ = runs
    monkeypatch.setattr("streamsoup.engine._COMMIT_SECONDS", 0.001)
    options = {} if method == "karcher" else {"base": paths[0], "parameters": {"density": 0.3}}
    if method == "della":
        options["parameters"]["epsilon"] = 0.1
    if method == "dare_ties":
        options["parameters"]["rescale"] = "l1"
    streamsoup.soup(paths[1:], tmp_path / "whole", method=method, **options)
    for last in (1, 3, 4):
        out = tmp_path / f"soup{last}"
        calls = itertools.count()
        write = FileSink.write

        def failing(self, *args, calls=calls, last=last, write=write):
            if next(calls) == last:
                raise KeyboardInterrupt
            write(self, *args)

        with monkeypatch.context() as patch:
            small_tiles(patch, 8)
            patch.setattr(FileSink, "write", failing)
            with pytest.raises(KeyboardInterrupt):
                streamsoup.soup(paths[1:], out, method=method, **options)
        streamsoup.resume(out, streamsoup.Execution(workers=2))
        first, second = (read_checkpoint(folder) for folder in (tmp_path / "whole", out))
        assert all(first[name].tobytes() == second[name].tobytes() for name in SHAPES)


def test_each_byte_is_read_once_where_a_tensor_fits_the_budget(tmp_path, runs):
    paths, _ = runs
    result = streamsoup.soup(
        paths[1:], tmp_path / "soup", method="ties", base=paths[0], parameters={"density": 0.3}, read_mode="map"
    )
    size = sum(int(np.prod(shape)) * 4 for shape in SHAPES.values()) + 3 * 8
    assert result.bytes_read == 4 * size
    assert result.bytes_written == size


@pytest.mark.parametrize("nonfinite", ["allow", "error"])
def test_what_is_not_included_stays_whatever_the_others_have_there(tmp_path, nonfinite):
    first = np.array([-0.0, 0.0, 1.0, -2.0], np.float32)
    other = np.array([1.0, -0.0, np.nan if nonfinite == "allow" else 3.0, 5.0], np.float32)
    paths = [
        str(write_checkpoint(tmp_path / f"in{i}", {"a.w": t, "b.w": np.ones(3, np.float32)}))
        for i, t in enumerate((first, other))
    ]
    found = merged(tmp_path, paths, include=["b.*"], nonfinite=nonfinite, dtype=None)
    assert found["a.w"].tobytes() == first.tobytes()


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "ties", "model_stock"])
def test_a_plan_has_the_same_fingerprint_in_every_process(runs, method):
    """Else nothing could be resumed: a function's repr, say, has its address."""
    paths, _ = runs
    base = repr(paths[0]) if method in ("ties", "model_stock") else None
    code = (
        "from streamsoup.soup_plan import plan_soup; from streamsoup.execution import Execution\n"
        "from streamsoup.recipe import make_recipe\n"
        f"recipe = make_recipe({paths[1:3]}, method={method!r}, base={base})\n"
        "print(plan_soup(recipe, None, Execution())[0].fingerprint)"
    )
    found = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "12"
    }
    assert len(found) == 1
    assert len(found.pop().strip()) == 32


def test_numbers_of_numpy_and_exponents_of_yaml_are_numbers_in_a_recipe(tmp_path, runs):
    paths, _ = runs
    parameters = {"max_iter": np.int64(7), "tol": "1e-7"}
    recipe = streamsoup.recipe.make_recipe(paths[1:], method="karcher", parameters=parameters)
    assert recipe.parameters == {"max_iter": 7, "tol": 1e-7}
    assert isinstance(recipe.parameters["max_iter"], int)
    streamsoup.soup(paths[1:], tmp_path / "soup", method="karcher", parameters=parameters)
    assert streamsoup.read_recipe(tmp_path / "soup" / "recipe.yaml").parameters == recipe.parameters


@pytest.mark.parametrize("method", ["ties", "sce", "dare_linear", "model_stock", "karcher"])
@pytest.mark.parametrize("mode", ["map", "plain"])
def test_the_plan_says_how_many_bytes_will_be_read(tmp_path, runs, monkeypatch, method, mode):
    paths, _ = runs
    small_tiles(monkeypatch, 8)
    parameters = {"ties": {"density": 0.3}, "sce": {"select_topk": 0.3}, "dare_linear": {"density": 0.3}}.get(
        method, {}
    )
    # Of a tensor with one element nothing need be searched.
    options = {"method": method, "base": None if method == "karcher" else paths[0], "parameters": parameters}
    options["exclude"] = ["one"]
    execution = streamsoup.Execution(read_mode=mode)
    plan, _ = streamsoup.plan_soup(streamsoup.recipe.make_recipe(paths[1:], **options), None, execution)
    seen = []
    result = streamsoup.soup(paths[1:], tmp_path / "soup", read_mode=mode, progress=seen.append, **options)
    assert result.bytes_read == plan.bytes_to_read
    assert seen[-1].done_bytes == seen[-1].total_bytes == plan.bytes_to_sweep
