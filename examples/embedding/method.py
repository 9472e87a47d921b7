"""A rule of one's own: near the middle counts more, tensor by tensor.

python examples/embedding/method.py
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import streamsoup
from streamsoup.methods import Coefficients
from streamsoup.methods.base import MethodBase
from streamsoup.methods.protocol import Elementwise, Gram, Merge, TensorInfo, Values


@dataclass(frozen=True)  # its repr is in the plan's fingerprint and in the manifest
class NearTheMiddle(MethodBase):
    """Weights that fall with the distance from the mean. All distances follow from one Gram matrix a tensor."""

    softness: float
    name = "near_the_middle"
    sweeps = 2  # one to measure, one to combine

    def merge(self, tensor: TensorInfo, known: object) -> Merge:
        gram = yield Gram()
        squares = np.diag(gram) - 2 * gram.mean(axis=1) + gram.mean()
        weights = 1 / (np.sqrt(np.maximum(squares, 0)) + self.softness)
        return Coefficients(tuple((weights / weights.sum()).tolist()))


@dataclass(frozen=True)
class Clipped(MethodBase):
    """The mean, where all signs agree; else zero. Functions use operators and what `Values` has, and run anywhere."""

    name = "clipped"

    def merge(self, tensor: TensorInfo, known: object) -> Merge:
        def of(values: Values) -> object:
            count = len(values.rows)
            agree = abs(values.total(values.sign(values.rows))) == count
            return values.where(agree, values.total(values.rows) / values.number(float(count)), 0.0)

        return Elementwise(of)


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start, paths = torch.randn(200, 300), []
        for i, noise in enumerate((0.1, 0.1, 0.1, 2.0)):
            paths.append(folder / f"run{i}.safetensors")
            save_file({"weight": start + noise * torch.randn(200, 300)}, paths[-1])

        with streamsoup.open(paths) as plain, streamsoup.open(paths, method=NearTheMiddle(0.1)) as middle:
            errors = [float((soup["weight"] - start).square().mean().sqrt()) for soup in (plain, middle)]
            print("distance from the start: uniform {:.3f}, near the middle {:.3f}".format(*errors))
            assert errors[1] < errors[0]
            middle.save(folder / "soup.safetensors")  # with a manifest that says by what it was combined

        rows = torch.stack([load_file(path)["weight"] for path in paths]).double()
        expected = torch.where(rows.sign().sum(0).abs() == 4, rows.mean(0), 0.0).float()
        with streamsoup.open(paths, method=Clipped()) as soup:
            torch.testing.assert_close(soup["weight"], expected)
            print("clipped:", f"{float((soup['weight'] == 0).double().mean()):.0%} zeros")


if __name__ == "__main__":
    main()
