"""Make adapters with peft and merge them with it; runs in an environment that has it.

    python tests/peft_driver.py FOLDER

For each case FOLDER gets CASE/base.safetensors, CASE/lora (as peft saves it) and CASE/merged.safetensors, all float64
but for cases of another dtype.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D


class Network(nn.Module):
    """A module of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 16)
        self.q = nn.Linear(16, 24)
        self.square = nn.Linear(24, 24, bias=False)
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 5, 1)
        self.line = nn.Conv1d(4, 7, 5)
        self.solid = nn.Conv3d(2, 3, 2)
        self.layers = nn.ModuleList([nn.ModuleDict({"k": nn.Linear(24, 12), "v": nn.Linear(24, 8)}) for _ in range(2)])
        self.head = nn.Linear(12, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.q(self.embed(ids))


class Transposed(nn.Module):
    """Linear modules as GPT-2 stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = Conv1D(36, 12)
        self.square = Conv1D(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(self.square(x))


_LINEAR = ["q", "square", "k", "v"]
_ALL = [*_LINEAR, "embed", "conv", "point", "line", "solid"]
CASES: dict[str, tuple[type[nn.Module], torch.dtype, dict]] = {
    "linear": (Network, torch.float64, {"r": 4, "lora_alpha": 6, "target_modules": _LINEAR}),
    "all": (Network, torch.float64, {"r": 3, "lora_alpha": 5, "target_modules": _ALL}),
    "rslora": (Network, torch.float64, {"r": 5, "lora_alpha": 7, "use_rslora": True, "target_modules": _ALL}),
    "patterns": (
        Network,
        torch.float64,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": _ALL,
            "rank_pattern": {"0.k": 2, "k": 6, "^q": 1, "yers.1.v": 7},
            "alpha_pattern": {"v": 1, r"\d\.k": 3, "layers.0.v": 9},
        },
    ),
    "saved": (
        Network,
        torch.float64,
        {"r": 2, "target_modules": ["q", "k"], "modules_to_save": ["head"], "bias": "all"},
    ),
    "biases": (Network, torch.float64, {"r": 2, "target_modules": ["q", "k"], "bias": "lora_only"}),
    "transposed": (
        Transposed,
        torch.float64,
        {"r": 3, "target_modules": ["attend", "square"], "fan_in_fan_out": True},
    ),
    "float32": (Network, torch.float32, {"r": 4, "lora_alpha": 6, "target_modules": _ALL}),
}


def make(folder: Path, kind: type[nn.Module], dtype: torch.dtype, config: dict) -> None:
    """Write a case: all that an adapter trains is drawn at random."""
    folder.mkdir(parents=True)
    network = kind().to(dtype)
    save_file({n: t.contiguous().clone() for n, t in network.state_dict().items()}, folder / "base.safetensors")
    adapted = get_peft_model(network, LoraConfig(**config)).to(dtype)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(folder / "lora")
    # From the files, as others load it: peft sorts patterns when it saves them, and the first that fits counts.
    fresh = kind().to(dtype)
    fresh.load_state_dict(load_file(folder / "base.safetensors"))
    merged = PeftModel.from_pretrained(fresh, folder / "lora").to(dtype).merge_and_unload().state_dict()
    save_file({n: t.contiguous().clone() for n, t in merged.items()}, folder / "merged.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, case in CASES.items():
        make(Path(sys.argv[1]) / name, *case)
