"""Runs real trainers of other packages with our adapters; answers with a line of JSON.

python hosts_driver.py trainer|lightning|checkpoints FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=True, max_position_embeddings=64,
        )
    )  # fmt: skip


def mean_of(folders: list[Path]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    states = [load_file(folder / "model.safetensors") for folder in folders]
    return {n: (sum(s[n].double() for s in states) / len(states)).float() for n in states[0]}


def trainer(folder: Path) -> dict[str, Any]:
    """Train a few steps with a callback, with a window and without, in one run."""
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    from streamsoup.hosts.transformers import SoupCallback

    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (32, 8))]
    model = tiny_llama()
    callbacks = [
        SoupCallback(folder / "sums", out=folder / "all", budget_bytes=1 << 27),
        SoupCallback(folder / "window", window=2, out=folder / "latest", load_at_end=True, budget_bytes=1 << 27),
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=8, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_total_limit=4, logging_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
    saved = [folder / "run" / f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    found = {}
    for name, folders in (("all", saved), ("latest", saved[-2:])):
        soup, expected = load_file(folder / name / "model.safetensors"), mean_of(folders)
        found[name] = soup.keys() == expected.keys() and all(torch.equal(soup[n], expected[n]) for n in expected)
    found["loaded"] = all(torch.equal(model.state_dict()[n], t) for n, t in mean_of(saved[-2:]).items())
    found["moved"] = not torch.equal(*(mean_of([s])["model.norm.weight"] for s in (saved[0], saved[-1])))
    return found


def lightning(folder: Path) -> dict[str, Any]:
    """Train a few epochs with our callback and Lightning's own beside it."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import WeightAveraging

    from streamsoup.hosts.lightning import SoupAveraging

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
            self.validated: list[torch.Tensor] = []

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layers(batch[0]).square().mean()

        def validation_step(self, batch: Any, index: int) -> None:
            self.validated.append(self.layers[0].weight.detach().clone())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(callback: Any, dtype: Any, name: str) -> tuple[Net, Any]:
        pl.seed_everything(0, verbose=False)
        net, data = Net().to(dtype), torch.utils.data.TensorDataset(torch.randn(32, 4, dtype=dtype))
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        runner = pl.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=callback, default_root_dir=folder / name,
        )  # fmt: skip
        runner.fit(net, loader, loader)
        return net, runner

    ours, runner = fit(SoupAveraging(budget_bytes=1 << 27), torch.float64, "ours")
    theirs, _ = fit(WeightAveraging(), torch.float64, "theirs")
    files = sorted((folder / "ours").rglob("*.ckpt"))
    kept = torch.load(files[-1], weights_only=False)
    pairs = [(ours.state_dict(), theirs.state_dict()), (kept["state_dict"], ours.state_dict())]
    close = [
        all(torch.allclose(a[n], b[n], rtol=1e-12, atol=1e-12) for n in b if "num_batches" not in n) for a, b in pairs
    ]
    validated = all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours.validated, theirs.validated, strict=True)
    )
    return {
        "same as theirs": close[0],
        "checkpoint": close[1],
        "validated": validated and len(ours.validated) > 8,
        "averaged": int(kept["averaging_state"]["n_averaged"]),
        "steps": runner.global_step,
    }


def checkpoints(folder: Path) -> dict[str, Any]:
    """Save fine-tunes with a tokenizer of words, and a task for lm-evaluation-harness."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(30)} | {"<unk>": 30, "</s>": 31}
    plain = Tokenizer(models.WordLevel(words, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    model = tiny_llama()
    for number in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / f"runs/{number}")
        tokenizer.save_pretrained(folder / f"runs/{number}")
    rows = [{"query": f"w{i} w{i + 1}", "choices": ["w1", "w2"], "gold": i % 2} for i in range(8)]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "rows.json").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "tasks" / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/tasks/rows.json\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{query}}"\ndoc_to_choice: choices\n'
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n",
        encoding="utf-8",
    )
    return {"written": 2}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
