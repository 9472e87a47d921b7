"""A recipe of mergekit as a live mapping, without mergekit and without a file for the result.

python examples/embedding/mergekit.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import streamsoup

CONFIG = """
merge_method: ties
base_model: {folder}/base
models:
  - model: {folder}/code
    parameters: {{weight: 1.0, density: 0.5}}
  - model: {folder}/maths
    parameters: {{weight: 0.5, density: [0.2, 0.8]}}
dtype: bfloat16
"""


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = {f"model.layers.{i}.mlp.weight": torch.randn(64, 64) for i in range(3)}
        for kind in ("base", "code", "maths"):
            (folder / kind).mkdir()
            moved = {key: t + (kind != "base") * 0.1 * torch.randn_like(t) for key, t in start.items()}
            save_file(moved, folder / kind / "model.safetensors")
        (folder / "ties.yml").write_text(CONFIG.format(folder=folder), encoding="utf-8")

        recipe = streamsoup.from_mergekit(folder / "ties.yml")
        with streamsoup.open(recipe) as merged:
            for key in merged:
                changed = float((merged[key].float() != start[key].bfloat16().float()).double().mean())
                print(f"{key}: {merged.dtype(key)}, {changed:.0%} of the elements moved")
            merged.save(folder / "merged")  # with the recipe that makes it again, without the mergekit file
        assert streamsoup.read_recipe(folder / "merged" / "recipe.yaml").method == "ties"


if __name__ == "__main__":
    main()
