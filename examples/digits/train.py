"""Train a shared start on MNIST and fine-tune a pool of runs from it on UCI digits.

    python examples/digits/train.py --out DIR [--seed 0] [--runs 12] [--start strong|weak|separate]

Writes ``DIR/start/`` and ``DIR/runs/run01/`` ..., each with ``model.safetensors`` and ``config.json``. Finished
folders are kept, so a stopped training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from data import load_split
from fit import PRETRAINING, Hyperparameters, draw_pool, fit
from model import DigitsNet, load_network, save_network

STARTS = ("strong", "weak", "separate")


def train_pool(
    out: Path, *, seed: int = 0, runs: int = 12, start: str = "strong", norm: str = "group", workers: int = 2
) -> list[Path]:
    """Train what is missing and return the folders of the runs.

    Parameters
    ----------
    out
        Folder that receives ``start/`` and ``runs/``.
    seed
        Decides everything that is drawn: first weights, order of images, hyper-parameters.
    start
        ``"strong"``: pretrained on MNIST. ``"weak"``: one set of untrained weights for all runs. ``"separate"``:
        untrained weights of its own for every run. The last two are negative controls.
    workers
        Processes that train the runs, of one thread each; the result does not depend on their number.
    """
    folders = [out / "runs" / f"run{number + 1:02d}" for number in range(runs)]
    pool = draw_pool(seed, runs, from_scratch=start != "strong")
    jobs = [(folder, _config(norm, start, hyper), out / "start") for folder, hyper in zip(folders, pool, strict=True)]
    # Threads that spin while they wait stop each other on a busy machine: 21.9 s an epoch of pretraining beside two
    # other busy processes, 2.5 s when they sleep (1.7 and 1.9 s on a quiet one). The processes below inherit this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        if start != "separate":
            executor.submit(_train_start, out / "start", seed=seed, start=start, norm=norm).result()
        # Longest first: the workers then end at nearly the same time.
        waiting = sorted((job for job in jobs if not _is_finished(*job[:2])), key=lambda job: -_epochs(job[1]))
        for done in as_completed([executor.submit(_train_run, *job) for job in waiting]):
            print(f"  trained {done.result().name}", flush=True)
    return folders


def _config(norm: str, start: str, hyper: Hyperparameters) -> dict[str, Any]:
    network = {"architecture": "DigitsNet", "width": 32, "norm": norm}
    return network | {"start": start, "training": hyper._asdict()}


def _epochs(config: dict[str, Any]) -> int:
    return config["training"]["epochs"]


def _is_finished(folder: Path, config: dict[str, Any]) -> bool:
    if not folder.exists():
        return False
    if json.loads((folder / "config.json").read_text(encoding="utf-8")) != config:
        raise SystemExit(f"{folder}: trained with other options. Choose another --out or remove it.")
    return True


def _train_start(folder: Path, *, seed: int, start: str, norm: str) -> None:
    hyper = PRETRAINING._replace(seed=seed)
    if start == "weak":
        hyper = hyper._replace(epochs=0)
    config = _config(norm, start, hyper)
    if _is_finished(folder, config):
        return
    torch.set_num_threads(2)  # fixed, since the order of float additions depends on it
    network = _untrained(seed, norm)
    fit(network, *load_split("pretrain"), hyper)
    save_network(network, config, folder)
    print(f"  trained {folder.name}", flush=True)


def _train_run(folder: Path, config: dict[str, Any], start: Path) -> Path:
    torch.set_num_threads(1)
    hyper = Hyperparameters(**config["training"])
    separate = config["start"] == "separate"
    network = _untrained(hyper.seed, config["norm"]) if separate else load_network(start)
    fit(network, *load_split("finetune"), hyper)
    save_network(network, config, folder)
    return folder


def _untrained(seed: int, norm: str) -> DigitsNet:
    torch.manual_seed(seed)
    return DigitsNet(norm=norm)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``train.py`` and ``run.py`` share."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=12, metavar="N")
    parser.add_argument("--start", choices=STARTS, default="strong")
    parser.add_argument("--norm", choices=("group", "batch"), default="group")
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: examples/digits/out/seed0-strong-group")


def pool_options(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Return the output folder and the keyword arguments of `train_pool` for parsed options."""
    name = f"seed{options.seed}-{options.start}-{options.norm}"
    out = options.out or Path(__file__).parent / "out" / name
    return out, {key: getattr(options, key) for key in ("seed", "runs", "start", "norm", "workers")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a start and a pool of fine-tuned runs.")
    add_options(parser)
    out, keywords = pool_options(parser.parse_args())
    train_pool(out, **keywords)


if __name__ == "__main__":
    main()
