"""Small networks, ingredients of them, and learned soups made in memory with torch alone, to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch
from factory import DTYPES, write_checkpoint
from torch import nn

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
NAME = {kind: name for name, kind in TORCH.items()}


class Net(nn.Module):
    """Two numbered layers between an entrance and an exit."""

    def __init__(self, width=9, inputs=6, classes=4):
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.tanh(self.enter(x))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.leave(self.norm(x))


class Dropping(Net):
    """Forgets some of its inputs in training."""

    def forward(self, x):
        return super().forward(torch.nn.functional.dropout(x, 0.4, self.training))


class Statistics(nn.Module):
    """Has running statistics (float buffers), a counter (integer buffer), and a layer that nobody asks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.idle = nn.Linear(3, 3)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def as_array(tensor):
    """A tensor as the array of the same bits."""
    kind = DTYPES[NAME[tensor.dtype]]
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.view(kind).reshape(tuple(tensor.shape)).copy()


def as_tensors(arrays):
    """Arrays of a checkpoint as tensors of the same bits."""
    found = {}
    for name, array in arrays.items():
        kind = TORCH[next(k for k, v in DTYPES.items() if v == array.dtype)]
        raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        found[name] = raw.view(kind).reshape(array.shape)
    return found


def stored_states(module, count, *, dtype="F64", seed=0, spread=0.3, names=None):
    """State dicts of `count` fine-tunes of a module; integer buffers are all the same."""
    generator = torch.Generator().manual_seed(seed)
    states = []
    for _ in range(count):
        state = {}
        for name, value in module.state_dict().items():
            if names is not None and name not in names:
                continue
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                moved = value.double() + spread * noise
                state[name] = (moved.abs() + 0.5 if "var" in name else moved).to(TORCH[dtype])
            else:
                state[name] = value
        states.append(state)
    return states


def write_states(folder, states, **options):
    """Write state dicts as checkpoints `run1` ...; returns their paths."""
    options = {"companions": {"config.json": "{}"}, **options}
    return [
        str(write_checkpoint(folder / f"run{i + 1}", {n: as_array(t) for n, t in state.items()}, **options))
        for i, state in enumerate(states)
    ]


def make_batches(count, *, examples=8, inputs=6, classes=4, seed=1, dtype=torch.float64):
    """Batches of random numbers and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(examples, inputs, generator=generator, dtype=dtype),
            torch.randint(0, classes, (examples,), generator=generator),
        )
        for _ in range(count)
    ]


class Restartable:
    """Batches in an order of their own, each time the same; no sequence, so that nobody sorts them."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def groups_of(by, names):
    """Names that share coefficients, in the order of their first ones: written anew, not taken from the library."""

    def key(name):
        if by == "model":
            return "model"
        if by == "tensor":
            return name
        if by == "layer":
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
            return ".".join(parts[:-1]) or name if number is None else ".".join(parts[: number + 1])
        return next((pattern for pattern in by if fnmatchcase(name, pattern)), "others")

    found = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


@dataclass
class Learned:
    """What a learned soup in memory came to."""

    groups: dict
    losses: list = field(default_factory=list)
    temperatures: list = field(default_factory=list)
    held_out: list = field(default_factory=list)  # at the beginning, then after each epoch
    paths: list = field(default_factory=list)  # coefficients after each step
    coefficients: object = None
    temperature: float | None = None
    best_step: int = 0
    best_loss: float | None = None


def learn_in_memory(
    module, states, loss_fn, epochs_of_batches, *, by="model", init=None, parametrisation="softmax", temperature=True,
    optimizer="adamw", lr=0.1, weight_decay=0.0, accumulate=1, held_out=None, patience=None,
):  # fmt: skip
    """Learn as a person would who can hold all ingredients: autograd through Σ αθ, one optimiser over all numbers.

    `epochs_of_batches`: for each epoch, its batches in order. Statistics (float buffers) are mixed without a gradient.
    """
    parameters = {name for name, _ in module.named_parameters()}
    names = [n for n, t in states[0].items() if t.is_floating_point()]
    groups = groups_of(by, names)
    stacks = {name: torch.stack([s[name].double() for s in states]) for name in names}
    start = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
    if init is not None:
        start = torch.tensor(init, dtype=torch.float64) / sum(init)
    start = start.log() if parametrisation == "softmax" else start
    raw = nn.Parameter(start.repeat(len(groups), 1))
    beta = nn.Parameter(torch.ones((), dtype=torch.float64)) if temperature else None
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
    rows = [{"params": [raw]}] + ([{"params": [beta], "weight_decay": 0.0}] if temperature else [])
    mover = kind(rows, lr=lr, weight_decay=weight_decay)
    row_of = {name: row for row, members in enumerate(groups.values()) for name in members}

    def mixed():
        return raw.softmax(dim=1) if parametrisation == "softmax" else raw

    def loss_of(batch):
        alpha = mixed()
        theta = {name: torch.tensordot(alpha[row_of[name]], stacks[name], 1) for name in names}
        theta = {name: t if name in parameters else t.detach() for name, t in theta.items()}
        logits = torch.func.functional_call(module, theta, (batch[0],))
        return loss_fn(logits if beta is None else logits * beta, batch[1])

    def evaluate(step):
        with torch.no_grad():
            loss = float(np.mean([float(loss_of(batch)) for batch in held_out]))
        found.held_out.append(loss)
        if found.best_loss is None or loss < found.best_loss:
            found.best_loss, found.best_step = loss, step
            found.coefficients, found.temperature = now()
            return 0
        return 1

    def now():
        return mixed().detach().clone().numpy(), None if beta is None else float(beta.detach())

    found = Learned(groups)
    in_vain = 0
    if held_out is not None:
        evaluate(0)
    for batches in epochs_of_batches:
        for first in range(0, len(batches), accumulate):
            chunk = batches[first : first + accumulate]
            mover.zero_grad()
            total = 0.0
            for batch in chunk:
                loss = loss_of(batch) / len(chunk)
                loss.backward()
                total += float(loss.detach())
            mover.step()
            found.losses.append(total)
            coefficients, number = now()
            found.temperatures.append(number)
            found.paths.append(coefficients)
        if held_out is not None:
            in_vain = in_vain + 1 if evaluate(len(found.losses)) else 0
            if patience is not None and in_vain >= patience:
                break
    if held_out is None:
        found.coefficients, found.temperature = now()
        found.best_step = len(found.losses)
    return found


class Recorder(torch.optim.Optimizer):
    """Stays where it is and writes down every gradient it is given."""

    def __init__(self, groups, seen):
        super().__init__(groups, {"lr": 0.0})
        self.seen = seen

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.seen.append(parameter.grad.detach().clone().numpy())
