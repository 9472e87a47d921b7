"""Average checkpoints with one peer, as its users do; runs as a whole process in the peer's environment.

    python benchmarks/peers.py PEER OUT CHECKPOINTS...

CHECKPOINTS are .safetensors files (of mergekit-config: one recipe of mergekit), OUT is a new folder. The last line of
the output is JSON with `engine_seconds`: the time without Python's start and the imports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def torch_sum(out: Path, files: list[str]) -> float:
    """Hand-written: a running sum in float32, divided and cast back."""
    import torch
    from safetensors.torch import load_file, save_file

    began = time.perf_counter()
    total: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            if name in total:
                total[name] += tensor
            else:
                dtypes[name] = tensor.dtype
                # A copy even of float32: load_file returns the mapped file, which must not be added to.
                total[name] = tensor.to(torch.float32, copy=True)
    soup = {name: tensor.div_(len(files)).to(dtypes[name]) for name, tensor in total.items()}
    save_file(soup, out / "model.safetensors")
    return time.perf_counter() - began


def torch_stack(out: Path, files: list[str]) -> float:
    """Hand-written: all checkpoints open, tensors stacked and averaged in their own dtype."""
    import torch
    from safetensors.torch import load_file, save_file

    began = time.perf_counter()
    states = [load_file(file) for file in files]
    soup = {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}
    save_file(soup, out / "model.safetensors")
    return time.perf_counter() - began


def torch_averagedmodel(out: Path, files: list[str]) -> float:
    """torch.optim.swa_utils.AveragedModel with its default average, of a live module that loads each checkpoint."""
    from safetensors.torch import load_file, save_file
    from torch.optim.swa_utils import AveragedModel

    began = time.perf_counter()
    live = _module(load_file(files[0]))
    averaged = AveragedModel(live)
    for file in files:
        live.load_state_dict(load_file(file))
        averaged.update_parameters(live)
    save_file(averaged.module.state_dict(), out / "model.safetensors")
    return time.perf_counter() - began


def _module(state: Mapping[str, Any]) -> Any:
    """Make a module with parameters of these names, shapes and dtypes; their values are not set."""
    import torch

    root = torch.nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        place = root
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, torch.nn.Parameter(torch.empty_like(tensor), requires_grad=False))
    return root


def mergekit_default(out: Path, files: list[str]) -> float:
    """mergekit-pytorch, linear, nothing said of dtypes."""
    return _mergekit(out, files, {})


def mergekit_float32(out: Path, files: list[str]) -> float:
    """mergekit-pytorch, linear, computed in float32 and stored in the checkpoints' dtype."""
    return _mergekit(out, files, {"dtype": "float32", "out_dtype": file_dtype(files[0])})


def mergekit_config(out: Path, files: list[str]) -> float:
    """mergekit-pytorch, by a recipe."""
    from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch

    began = time.perf_counter()
    mergekit_pytorch([files[0], str(out), "--random-seed", "0"], standalone_mode=False)
    return time.perf_counter() - began


def _mergekit(out: Path, files: list[str], dtypes: dict[str, str]) -> float:
    """Call the function behind the command mergekit-pytorch, as the command does."""
    import yaml
    from mergekit.scripts.merge_raw_pytorch import main as mergekit_pytorch

    began = time.perf_counter()
    models = [{"model": file, "parameters": {"weight": 1.0}} for file in files]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        text = yaml.safe_dump({"merge_method": "linear", "models": models, **dtypes})
        config.write_text(text, encoding="utf-8")
        mergekit_pytorch([str(config), str(out)], standalone_mode=False)
    return time.perf_counter() - began


def sd_mecha_n_average(out: Path, files: list[str]) -> float:
    """sd-mecha, n_average in float32 (its default), stored in the checkpoints' dtype (its default is float16)."""
    import sd_mecha
    import torch

    began = time.perf_counter()
    recipe = sd_mecha.n_average(*[sd_mecha.model(Path(file)) for file in files])
    dtype = getattr(torch, file_dtype(files[0]))
    sd_mecha.merge(recipe, output_dtype=dtype, output=out / "model.safetensors")
    return time.perf_counter() - began


def file_dtype(file: str) -> str:
    """Name, in torch, of the dtype of a file's first tensor."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return NAMES[next(iter(header.values()))["dtype"]]


PEERS: dict[str, Callable[[Path, list[str]], float]] = {
    "torch-sum": torch_sum,
    "torch-stack": torch_stack,
    "torch-averagedmodel": torch_averagedmodel,
    "mergekit-float32": mergekit_float32,
    "mergekit-default": mergekit_default,
    "mergekit-config": mergekit_config,
    "sd-mecha": sd_mecha_n_average,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    print(json.dumps({"engine_seconds": PEERS[args.peer](args.out, args.checkpoints)}))


if __name__ == "__main__":
    main()
