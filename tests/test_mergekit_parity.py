"""The same YAML through mergekit and through streamsoup.

    python benchmarks/environments.py --dir DIR
    STREAMSOUP_PEERS=DIR pytest -m peer tests/test_mergekit_parity.py

Data have no ties: of equal |θ - θ₀| at a threshold streamsoup keeps all, and mergekit some.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factory import DTYPES, bits, read_checkpoint, write_checkpoint

import streamsoup
from streamsoup.cook import cook
from streamsoup.errors import StreamsoupError

pytestmark = pytest.mark.peer

HERE = Path(__file__).resolve().parent
LAYERS, WIDTH, INNER, VOCABULARY, POSITIONS = 3, 16, 24, 40, 20
# Of the largest of a tensor: mergekit computes in float32, element by element and in norms.
FLOAT32 = 1e-6


# -- checkpoints -------------------------------------------------------------------------------------------------


def _linear(name: str, out: int, wide: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, wide), f"{name}.bias": (out,)}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def llama() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for part, shape in (("q", (WIDTH, WIDTH)), ("k", (8, WIDTH)), ("v", (8, WIDTH)), ("o", (WIDTH, WIDTH))):
            shapes[f"{layer}.self_attn.{part}_proj.weight"] = shape
        for part, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            shapes[f"{layer}.mlp.{part}_proj.weight"] = shape
        for part in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{part}.weight"] = (WIDTH,)
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def _encoder(layer: str, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("query", "key", "value", "output"):
        shapes |= _linear(f"{layer}.{names[part]}", WIDTH, WIDTH)
    shapes |= _linear(f"{layer}.{names['up']}", INNER, WIDTH) | _linear(f"{layer}.{names['down']}", WIDTH, INNER)
    return shapes | _norm(f"{layer}.{names['before']}") | _norm(f"{layer}.{names['after']}")


_BERT = {
    **{part: f"attention.self.{part}" for part in ("query", "key", "value")},
    "output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    "before": "attention.output.LayerNorm", "after": "output.LayerNorm",
}  # fmt: skip
_VIT = {
    **{part: f"attention.attention.{part}" for part in ("query", "key", "value")},
    "output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    "before": "layernorm_before", "after": "layernorm_after",
}  # fmt: skip
_CLIP = {
    **{part: f"self_attn.{part[0]}_proj" for part in ("query", "key", "value")},
    "output": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2",
    "before": "layer_norm1", "after": "layer_norm2",
}  # fmt: skip


def bert() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (VOCABULARY, WIDTH),
        "bert.embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "bert.embeddings.token_type_embeddings.weight": (2, WIDTH),
        **_norm("bert.embeddings.LayerNorm"),
    }
    for i in range(LAYERS):
        shapes |= _encoder(f"bert.encoder.layer.{i}", _BERT)
    return shapes | _linear("bert.pooler.dense", WIDTH, WIDTH) | {"cls.predictions.bias": (VOCABULARY,)}


def vit() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "vit.embeddings.cls_token": (1, 1, WIDTH),
        "vit.embeddings.position_embeddings": (1, 5, WIDTH),
        "vit.embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 4, 4),
        "vit.embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        shapes |= _encoder(f"vit.encoder.layer.{i}", _VIT)
    return shapes | _norm("vit.layernorm") | _linear("classifier", 10, WIDTH)


def clip() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (VOCABULARY, WIDTH),
        "text_model.embeddings.position_embedding.weight": (POSITIONS, WIDTH),
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 4, 4),
        "vision_model.embeddings.position_embedding.weight": (5, WIDTH),
        "text_projection.weight": (WIDTH, WIDTH),
        "visual_projection.weight": (WIDTH, WIDTH),
        "logit_scale": (),
    }
    for tower, layers in (("text", LAYERS), ("vision", LAYERS - 1)):
        for i in range(layers):
            shapes |= _encoder(f"{tower}_model.encoder.layers.{i}", _CLIP)
    for norm in ("text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"):
        shapes |= _norm(norm)
    return shapes


_SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
_VISION = {**_SIZES, "image_size": 8, "patch_size": 4}
_TOWERS = {"text_config": _TEXT, "vision_config": {**_VISION, "num_hidden_layers": LAYERS - 1}}
# Shapes, the command of mergekit that merges them, configuration. mergekit-yaml 0.1.5 with transformers 5.24 leaves out
# all layers of the ViT, and fails on CLIP.
KINDS = {
    "llama": (llama, "mergekit-yaml", "LlamaForCausalLM", {**_TEXT, "num_key_value_heads": 1}),
    "bert": (bert, "mergekit-yaml", "BertForMaskedLM", _TEXT),
    "vit": (vit, "mergekit-pytorch", "ViTForImageClassification", {**_VISION, "num_labels": 10}),
    "clip": (clip, "mergekit-pytorch", "CLIPModel", {**_TOWERS, "projection_dim": WIDTH}),
}


def float32_models(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, np.ndarray]]:
    """A base and three fine-tunes of it."""
    rng = np.random.default_rng(1)
    base = {name: (rng.standard_normal(shape) * 0.05).astype(np.float32) for name, shape in shapes.items()}
    found = [base]
    for _ in range(3):
        moved = {n: a + rng.standard_normal(a.shape).astype(np.float32) * np.float32(0.02) for n, a in base.items()}
        found.append({name: np.asarray(array, np.float32) for name, array in moved.items()})
    return found


def bfloat16_models(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, np.ndarray]]:
    """Numbers over 14 binades, so that no two differences from the base have one size."""
    rng, kind = np.random.default_rng(2), DTYPES["BF16"]

    def draw(count: int) -> np.ndarray:
        return (np.exp2(rng.uniform(-14, 0, count)) * rng.choice([-1, 1], count)).astype(kind)

    found: list[dict[str, np.ndarray]] = [{} for _ in range(4)]
    for name, shape in shapes.items():
        base = draw(int(np.prod(shape)))
        found[0][name] = base.reshape(shape)
        for model in found[1:]:
            array = draw(base.size)
            while True:
                sizes = abs(array.astype(np.float32) - base.astype(np.float32))
                _, firsts = np.unique(sizes, return_index=True)
                again = np.setdiff1d(np.arange(base.size), firsts)
                if not again.size:
                    break
                array[again] = draw(again.size)
            model[name] = array.reshape(shape)
    return found


MODELS = ("base", "a", "b", "c")


def write_models(folder: Path, kind: str, dtype: str) -> Path:
    shapes, _, architecture, sizes = KINDS[kind]
    config = {"model_type": kind, "architectures": [architecture], "torch_dtype": dtype, **sizes}
    made = float32_models(shapes()) if dtype == "float32" else bfloat16_models(shapes())
    for name, tensors in zip(MODELS, made, strict=True):
        if kind == "bert":
            tensors = {**tensors, "bert.embeddings.position_ids": np.arange(POSITIONS)[None]}
        write_checkpoint(
            folder / name, tensors, companions={"config.json": json.dumps(config)}, metadata={"format": "pt"}
        )
    return folder


# -- recipes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A recipe; `base`: whether it has one."""

    method: str
    models: tuple[dict[str, Any], ...]
    parameters: dict[str, Any]
    base: bool = True

    @property
    def has_gradients(self) -> bool:
        return "[0" in json.dumps([self.models, self.parameters]) or "[1" in json.dumps(self.parameters)

    def document(self, folder: Path, **more: Any) -> dict[str, Any]:
        file = "model.safetensors" if KINDS[folder.name.split("-")[0]][1] == "mergekit-pytorch" else ""
        rows = [
            {"model": str(folder / name / file), **({"parameters": own} if own else {})}
            for name, own in zip("abc", self.models, strict=False)
        ]
        base = {"base_model": str(folder / "base" / file)} if self.base else {}
        return {"merge_method": self.method, "models": rows, **base, "parameters": self.parameters, **more}


THREE = ({"weight": 0.5}, {"weight": 0.3}, {"weight": 0.4})
THIN = tuple({**own, "density": d} for own, d in zip(THREE, (0.3, 0.5, 0.8), strict=True))
NONE3 = ({}, {}, {})
PARTS = [{"filter": ".1.", "value": 0.9}, {"filter": "q", "value": [0.1, 0.9, 0.3]}, {"value": 0.4}]
CASES = {
    "linear": Case("linear", THREE, {}, base=False),
    "linear, a base": Case("linear", THREE, {"weight": 1.5}),
    "linear, as given": Case("linear", THREE, {"normalize": False}, base=False),
    "linear, gradients": Case(
        "linear", ({"weight": [0, 1, 0.2]}, {"weight": PARTS}, {"weight": [1, 0.5]}), {}, base=False
    ),
    "slerp": Case("slerp", ({},), {"t": 0.3}),
    "slerp, gradients": Case("slerp", ({},), {"t": PARTS}),
    "nuslerp": Case("nuslerp", THREE[:2], {}, base=False),
    "nuslerp, differences": Case("nuslerp", THREE[:2], {}),
    "nuslerp, rows": Case("nuslerp", THREE[:2], {"nuslerp_flatten": False}, base=False),
    "multislerp": Case("multislerp", THREE, {}, base=False),
    "multislerp, differences": Case("multislerp", THREE, {"normalize_weights": False}),
    "karcher": Case("karcher", NONE3, {"max_iter": 30, "tol": "1e-5"}, base=False),
    "task_arithmetic": Case("task_arithmetic", THREE, {"lambda": 0.7}),
    "task_arithmetic, normalised": Case("task_arithmetic", THREE, {"normalize": True, "lambda": [1, 0.2]}),
    "ties": Case("ties", THIN, {"lambda": 1.1}),
    "ties, by part": Case("ties", THREE, {"density": PARTS, "int8_mask": True, "normalize": False}),
    "ties, rescaled": Case("ties", THIN, {"rescale": True}),
    "dare_linear, all": Case("dare_linear", THREE, {}),
    "dare_ties, all": Case("dare_ties", THREE, {"normalize": True, "lambda": 0.8}),
    "della, all": Case("della", THREE, {}),
    "della_linear, all": Case("della_linear", THREE, {"density": 1.0, "epsilon": 0.1}),
    "breadcrumbs": Case("breadcrumbs", THIN, {"gamma": 0.1}),
    "breadcrumbs, rescaled": Case("breadcrumbs", THIN, {"rescale": True}),
    "breadcrumbs_ties": Case("breadcrumbs_ties", THIN, {"gamma": [0.02, 0.3]}),
    "sce": Case("sce", NONE3, {}),
    "sce, the most varying": Case("sce", NONE3, {"select_topk": 0.4}),
    "model_stock": Case("model_stock", NONE3, {}),
    "model_stock, rows": Case("model_stock", NONE3, {"filter_wise": True}),
    "passthrough": Case("passthrough", ({"scale": PARTS},), {}, base=False),
}
# mergekit takes the last axis for a row, we all but the first: they differ in convolutions (docs/mergekit.md).
LAST_AXIS = ("nuslerp, rows", "model_stock, rows")
# mergekit-pytorch knows no layers: it takes the first value of a gradient.
RUNS = [
    (kind, case)
    for kind, (_, command, *_rest) in KINDS.items()
    for case, recipe in CASES.items()
    if command == "mergekit-yaml" or not recipe.has_gradients
]
ROUNDINGS = {"float32": {}, "bfloat16": {"dtype": "float32", "out_dtype": "bfloat16"}}


# -- both --------------------------------------------------------------------------------------------------------


class Peer:
    """mergekit, run on many recipes at once: it takes five seconds to start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs: list[list[Any]] = []
        self._failures: dict[str, str | None] = {}

    def add(self, name: str, document: Mapping[str, Any], command: str = "mergekit-yaml", seed: int = 0) -> None:
        config = self.folder / f"{name}.yml"
        config.write_text(json.dumps(document), encoding="utf-8")
        self._jobs.append([str(config), str(self.folder / name), command, seed])

    def run(self) -> None:
        python = _python()
        jobs = self.folder / "jobs.json"
        jobs.write_text(json.dumps(self._jobs), encoding="utf-8")
        done = subprocess.run(
            [python, str(HERE / "mergekit_driver.py"), str(jobs)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results = json.loads(done.stdout.splitlines()[-1])
        self._failures = {Path(job[1]).name: why for job, why in zip(self._jobs, results, strict=True)}

    def failure(self, name: str) -> str | None:
        return self._failures[name]

    def theirs(self, name: str) -> dict[str, np.ndarray]:
        assert self.failure(name) is None, f"mergekit: {self.failure(name)}"
        return read_checkpoint(self.folder / name)

    def config(self, name: str) -> Path:
        return self.folder / f"{name}.yml"


def _python() -> str:
    folder = Path(os.environ.get("STREAMSOUP_PEERS", HERE.parent / ".bench-env"))
    python = folder / "mergekit" / "bin" / "python"
    if not python.exists():
        pytest.fail(
            f"{python}: there is no environment of mergekit. Run `python benchmarks/environments.py --dir DIR`, and "
            "the tests with STREAMSOUP_PEERS=DIR."
        )
    return str(python)


def ours(config: Path, out: Path) -> dict[str, np.ndarray]:
    cook(streamsoup.from_mergekit(config), out, streamsoup.Execution())
    return read_checkpoint(out)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Every recipe on every kind of checkpoint, and those of single tests below."""
    _python()
    folder = tmp_path_factory.mktemp("peer")
    peer = Peer(folder)
    for dtype, more in ROUNDINGS.items():
        models = {kind: write_models(folder / f"{kind}-{dtype}", kind, dtype) for kind in KINDS}
        for kind, case in RUNS:
            peer.add(f"{kind}-{dtype}-{case}", CASES[case].document(models[kind], **more), KINDS[kind][1])
    for add in SINGLE:
        add(peer)
    peer.run()
    return peer


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, as a part of the largest number."""
    a, b = (x.astype(np.float64) for x in (one, other))
    return float(np.abs(a - b).max() / np.abs(b).max())


def ulps(one: np.ndarray, other: np.ndarray) -> int:
    """Largest distance, in numbers of their dtype; where numbers cancelled, float32's error is none."""
    ordinals = []
    for array in (one, other):
        raw = bits(array).astype(np.int64)
        top = 1 << (8 * array.dtype.itemsize - 1)
        ordinals.append(np.where(raw >= top, top - raw, raw))
    a, b = (x.astype(np.float64).reshape(-1) for x in (one, other))
    close = np.abs(a - b) <= FLOAT32 * np.abs(b).max()
    return int(np.where(close, 0, np.abs(ordinals[0] - ordinals[1])).max())


def is_comparable(case: str, array: np.ndarray) -> bool:
    # Single numbers of unlike signs are antipodal: they have no Karcher mean.
    return (array.ndim <= 2 or case not in LAST_AXIS) and (array.size > 1 or case != "karcher")


@pytest.mark.parametrize(("kind", "case"), RUNS)
def test_float32_is_the_same_within_its_rounding(peer, tmp_path, kind, case):
    name = f"{kind}-float32-{case}"
    found, theirs = ours(peer.config(name), tmp_path / "soup"), peer.theirs(name)
    assert found.keys() == theirs.keys()
    worst = max(difference(found[n], a) for n, a in theirs.items() if a.dtype == np.float32 and is_comparable(case, a))
    assert worst <= FLOAT32


@pytest.mark.parametrize(("kind", "case"), RUNS)
def test_bfloat16_is_the_same_within_one_ulp(peer, tmp_path, kind, case):
    name = f"{kind}-bfloat16-{case}"
    found, theirs = ours(peer.config(name), tmp_path / "soup"), peer.theirs(name)
    assert found.keys() == theirs.keys()
    worst = max(ulps(found[n], a) for n, a in theirs.items() if a.dtype == DTYPES["BF16"] and is_comparable(case, a))
    assert worst <= 1


# -- at random ---------------------------------------------------------------------------------------------------

RANDOM = {
    "dare_linear": {"density": 0.3},
    "dare_ties": {"density": 0.3},
    "della": {"density": 0.4, "epsilon": 0.2},
    "della_linear": {"density": 0.4, "epsilon": 0.2},
}


def _add_random(peer: Peer) -> None:
    models = peer.folder / "llama-float32"
    for method, own in RANDOM.items():
        case = Case(method, ({"weight": 1.0, **own},), {"rescale": True})
        peer.add(f"random-{method}", case.document(models))


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_keep_the_share_that_they_say_and_rescale_alike(peer, tmp_path, method):
    start, tuned = (read_checkpoint(peer.folder / "llama-float32" / name) for name in ("base", "a"))
    density = RANDOM[method]["density"]
    name = f"random-{method}"
    for merged in (ours(peer.config(name), tmp_path / "soup"), peer.theirs(name)):
        kept = total = 0
        for tensor, array in merged.items():
            kept += int((array != start[tensor]).sum())
            total += array.size
            moved, full = (np.abs(x[tensor].astype(np.float64) - start[tensor]).sum() for x in (merged, tuned))
            assert moved == pytest.approx(full, rel=1e-4)  # Σ|δ| is what it was: mergekit's rescaling
        assert kept / total == pytest.approx(density, abs=4 * np.sqrt(density * (1 - density) / total))


# -- slices ------------------------------------------------------------------------------------------------------


def _add_slices(peer: Peer) -> None:
    a, b = (str(peer.folder / "llama-float32" / name) for name in "ab")
    scale = [{"filter": "down_proj", "value": [0.0, 0.5]}, {"filter": "o_proj", "value": 0}, {"value": 1}]
    pieces = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [1, 3], "parameters": {"scale": scale}}]},
        {"sources": [{"model": b, "layer_range": [0, 1]}], "parameters": {"scale": {"filter": "lm_head", "value": 2}}},
    ]
    peer.add("frankenmerge", {"merge_method": "passthrough", "slices": pieces, "dtype": "float32"})
    both = [{"model": model, "layer_range": [0, LAYERS]} for model in (a, b)]
    parameters = {"t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.5}]}
    document = {"merge_method": "slerp", "base_model": a, "slices": [{"sources": both}], "parameters": parameters}
    peer.add("slerp-slices", document)


def test_frankenmerge_has_the_same_bits_and_layer_count(peer, tmp_path):
    found, theirs = ours(peer.config("frankenmerge"), tmp_path / "soup"), peer.theirs("frankenmerge")
    assert found.keys() == theirs.keys()
    assert all(np.array_equal(found[name], array) for name, array in theirs.items())
    counts = [json.loads((at / "config.json").read_text()) for at in (tmp_path / "soup", peer.folder / "frankenmerge")]
    assert [config["num_hidden_layers"] for config in counts] == [5, 5]


def test_slerp_of_one_slice_of_whole_models(peer, tmp_path):
    found, theirs = ours(peer.config("slerp-slices"), tmp_path / "soup"), peer.theirs("slerp-slices")
    assert found.keys() == theirs.keys()
    assert max(difference(found[name], array) for name, array in theirs.items()) <= FLOAT32


# -- where we differ on purpose (docs/mergekit.md) -----------------------------------------------------------------


PLAIN = Case("linear", ({"weight": 1.0}, {"weight": 1.0}), {}, base=False)
TIED = {"model.norm.weight": np.full(WIDTH, 0.5, np.float32)}


def _changed(peer: Peer, name: str, **more: Mapping[str, np.ndarray]) -> Path:
    """Write the Llama models with other tensors: those of all under ``every``, or of one under its name."""
    folder = peer.folder / f"llama-{name}"
    for model in MODELS:
        source = peer.folder / "llama-float32" / model
        tensors = {**read_checkpoint(source), **more.get("every", {}), **more.get(model, {})}
        companions = {"config.json": (source / "config.json").read_text()}
        write_checkpoint(folder / model, tensors, companions=companions, metadata={"format": "pt"})
    return folder


def _add_differences(peer: Peer) -> None:
    nan = {"model.norm.weight": np.full(WIDTH, np.nan, np.float32)}
    peer.add("nan", PLAIN.document(_changed(peer, "nan", b=nan)))
    cancel = Case("linear", ({"weight": 1.0}, {"weight": -1.0}), {}, base=False)
    peer.add("cancel", cancel.document(peer.folder / "llama-float32"))
    extra = {
        "model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32),
        "value_head.weight": np.ones(3, np.float32),
    }
    peer.add("extra", PLAIN.document(_changed(peer, "extra", every=extra)))
    ties = _changed(peer, "ties", base={"model.norm.weight": np.zeros(WIDTH, np.float32)}, a=TIED)
    peer.add("equal", Case("ties", ({"weight": 1.0, "density": 0.5},), {}).document(ties))
    peer.add("vit", PLAIN.document(peer.folder / "vit-float32") | {"models": _folders(peer, "vit-float32")})
    narrow = {n: a.astype(DTYPES["BF16"]) for n, a in read_checkpoint(peer.folder / "llama-float32" / "a").items()}
    peer.add("mixed", PLAIN.document(_changed(peer, "mixed", a=narrow)))
    peer.add("raw", Case("linear", ({"weight": [0.25, 1]}, {"weight": 1.0}), {}, base=False).document(
        peer.folder / "vit-float32"), "mergekit-pytorch")  # fmt: skip
    clip = PLAIN.document(peer.folder / "clip-float32")
    peer.add("clip", clip | {"models": _folders(peer, "clip-float32")})
    bare = _with_config(peer, "bert", "bert-bare", {"architectures": ["BertModel"]})
    peer.add("bare", PLAIN.document(bare))
    transform = {"cls.predictions.transform.dense.weight": np.ones((WIDTH, WIDTH), np.float32)}
    peer.add("transform", PLAIN.document(_with_config(peer, "bert", "bert-transform", {}, transform)))


def _with_config(
    peer: Peer, kind: str, name: str, changes: Mapping[str, Any], more: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Write models again with another configuration, or more tensors."""
    for model in MODELS:
        source = peer.folder / f"{kind}-float32" / model
        config = json.loads((source / "config.json").read_text()) | dict(changes)
        tensors = {**read_checkpoint(source), **(more or {})}
        companions = {"config.json": json.dumps(config)}
        write_checkpoint(peer.folder / name / model, tensors, companions=companions, metadata={"format": "pt"})
    return peer.folder / name


def _folders(peer: Peer, name: str) -> list[dict[str, Any]]:
    return [{"model": str(peer.folder / name / model), "parameters": {"weight": 1.0}} for model in "ab"]


def test_nan_passes_there_and_is_an_error_here(peer, tmp_path):
    assert np.isnan(peer.theirs("nan")["model.norm.weight"]).all()
    with pytest.raises(StreamsoupError, match=r"model\.norm\.weight"):
        ours(peer.config("nan"), tmp_path / "soup")


def test_weights_that_cancel_give_what_is_not_finite_there_and_are_an_error_here(peer, tmp_path):
    assert not any(np.isfinite(array).any() for array in peer.theirs("cancel").values())
    with pytest.raises(StreamsoupError, match="weights"):
        ours(peer.config("cancel"), tmp_path / "soup")


def test_tensors_of_no_known_architecture_vanish_there_and_are_merged_here(peer, tmp_path):
    for name, lost in (
        ("extra", {"model.layers.0.self_attn.q_norm.weight", "value_head.weight"}),
        ("transform", {"cls.predictions.transform.dense.weight"}),
        ("vit", {name for name in vit() if ".layer." in name}),
    ):
        assert ours(peer.config(name), tmp_path / name).keys() - peer.theirs(name).keys() == lost


@pytest.mark.parametrize("name", ["clip", "bare"])
def test_what_fails_there_is_merged_here(peer, tmp_path, name):
    assert peer.failure(name) is not None
    assert ours(peer.config(name), tmp_path / "soup")


def test_of_equal_differences_some_are_kept_there_and_all_here(peer, tmp_path):
    kept = [int((merged["model.norm.weight"] != 0).sum()) for merged in (
        peer.theirs("equal"), ours(peer.config("equal"), tmp_path / "soup"))]  # fmt: skip
    assert kept == [WIDTH // 2, WIDTH]


def test_without_a_dtype_the_widest_is_taken_there_and_the_first_here(peer, tmp_path):
    dtypes = [merged["model.norm.weight"].dtype for merged in (
        peer.theirs("mixed"), ours(peer.config("mixed"), tmp_path / "soup"))]  # fmt: skip
    assert dtypes == [np.float32, DTYPES["BF16"]]


def test_mergekit_pytorch_takes_the_first_value_of_a_gradient(peer, tmp_path):
    found, theirs = ours(peer.config("raw"), tmp_path / "soup"), peer.theirs("raw")
    a, b = (read_checkpoint(peer.folder / "vit-float32" / name) for name in "ab")
    last = f"vit.encoder.layer.{LAYERS - 1}.output.dense.weight"
    np.testing.assert_allclose(theirs[last], (0.25 * a[last] + b[last]) / 1.25, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[last], (a[last] + b[last]) / 2, rtol=1e-5, atol=1e-7)


SINGLE = (_add_random, _add_slices, _add_differences)
