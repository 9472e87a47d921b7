"""A BERT encoder with mean pooling and a linear head, with the names of tensors that `transformers` gives them.

A hundred lines of torch instead of importing `transformers`, which would cost each scoring three more CPU seconds. The
folders are usual ones: ``AutoModel.from_pretrained`` opens the encoder of a run or of a soup.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from data import TOKENIZER_FILES, pretrained_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

TRAINING_NAME = "trainer_state.json"


class Classifier(nn.Module):
    """Classify sequences of tokens.

    Parameters
    ----------
    config
        The ``config.json`` of a BERT.
    classes
        Outputs of the head.
    """

    def __init__(self, config: Mapping[str, Any], classes: int) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(_Layer(config) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layer": layers})
        # Unused and never trained: kept, so that `transformers` finds all that it expects.
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})
        self.classifier = nn.Linear(width, classes)

    def features(self, tokens: Tensor) -> Tensor:
        """Return the mean of the last layer over the tokens, float32 (n, width), of tokens, int64 (n, length)."""
        there = tokens != 0
        hidden = self.embeddings(tokens)
        for layer in self.encoder["layer"]:
            hidden = layer(hidden, there[:, None, None])
        return (hidden * there[..., None]).sum(dim=1) / there.sum(dim=1, keepdim=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits, float32 (n, classes)."""
        return self.classifier(self.features(tokens))

    def set_dropout(self, share: float) -> None:
        """Set the share of activations and of attention weights that training leaves out."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share


class _Embeddings(nn.Module):
    position_ids: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, positions = config["hidden_size"], config["max_position_embeddings"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], width)
        self.register_buffer("position_ids", torch.arange(positions)[None])  # int64: a soup carries it over
        self.LayerNorm = nn.LayerNorm(width, config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.position_embeddings(self.position_ids[:, : tokens.shape[1]])
        return self.dropout(
            self.LayerNorm(self.word_embeddings(tokens) + positions + self.token_type_embeddings.weight[0])
        )


class _Layer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        names = ("query", "key", "value")
        attention = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.attention = nn.ModuleDict({"self": attention, "output": _Output(width, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _Output(inner, config)
        self.heads = config["num_attention_heads"]

    def forward(self, hidden: Tensor, there: Tensor) -> Tensor:
        n, length, width = hidden.shape
        query, key, value = (
            linear(hidden).view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for linear in self.attention["self"].values()
        )
        share = self.output.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=there, dropout_p=share)
        hidden = self.attention["output"](mixed.transpose(1, 2).reshape(n, length, width), hidden)
        return self.output(functional.gelu(self.intermediate["dense"](hidden)), hidden)


class _Output(nn.Module):
    """Project, drop out, add to what came in, normalise."""

    def __init__(self, inputs: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        return self.LayerNorm(hidden + self.dropout(self.dense(inner)))


def load_pretrained(classes: int) -> Classifier:
    """Return the pretrained MiniLM with a head of zeros."""
    folder = pretrained_folder()
    with torch.device("meta"):
        network = Classifier(_read_config(folder), classes)
    width = network.classifier.in_features
    head = {"classifier.weight": torch.zeros(classes, width), "classifier.bias": torch.zeros(classes)}
    network.load_state_dict(load_file(folder / "model.safetensors") | head, assign=True)
    return _trainable(network)


def load_network(path: Path) -> Classifier:
    """Load a network from a folder with ``config.json`` and one or several safetensors files."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path}: no *.safetensors file in this folder")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    with torch.device("meta"):  # no time for random weights that are replaced at once
        network = Classifier(_read_config(path), tensors["classifier.bias"].shape[0])
    network.load_state_dict(tensors, assign=True)
    return _trainable(network)


def save_network(network: Classifier, training: Mapping[str, Any], folder: Path) -> None:
    """Write weights, configuration and tokenizer as `transformers` does; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copyfile(pretrained_folder() / name, partial / name)
    # Its name is the usual one for what describes a run and not the network: streamsoup leaves it out of a soup.
    (partial / TRAINING_NAME).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
    save_file(network.state_dict(), partial / "model.safetensors", metadata={"format": "pt"})
    os.replace(partial, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _trainable(network: Classifier) -> Classifier:
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    return network.eval()
