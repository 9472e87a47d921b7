"""How long a soup by many machines should take: bytes over links, on paper. Prints the table of docs/scaling.md.

python benchmarks/scaling_model.py
"""

from __future__ import annotations

from dataclasses import dataclass

# 58 checkpoints of ViT-G/14 (1.84 billion parameters) in float32, as in the paper; the soup is one of them in size.
INGREDIENTS, EACH, TENSORS = 58, 1.84e9 * 4, 1_000
NODE = 20e9  # bytes a second that a machine combines: of a warm cache, 7.5 GB/s were measured on two cores
START = 5.0  # seconds for torchrun, imports and the process group
MESSAGE = 0.3e-3  # seconds a message between rank 0 and another
LINKS = {"10 Gb/s": 1.25e9, "100 Gb/s": 12.5e9, "400 Gb/s": 50e9}
STORAGES = {"20 GB/s": 20e9, "200 GB/s": 200e9}
NODES = (1, 8, 64)


@dataclass(frozen=True)
class Forecast:
    """Seconds, and what takes most of them."""

    seconds: float
    limit: str


def forecast(nodes: int, link: float, storage: float, *, readings: int = 1, batches: int = 0) -> Forecast:
    """Forecast a soup whose ingredients lie on shared storage.

    Parameters
    ----------
    nodes : int
    link, storage : float
        Bytes a second between one machine and the storage, and of the storage to all of them.
    readings : int
        How often each byte is read: two where a method must measure tensors that do not fit the budget.
    batches : int
        How often measurements are joined.
    """
    read = INGREDIENTS * EACH * readings
    stages = {
        "link": read / (nodes * link),
        "storage": read / storage,
        "arithmetic": read / (nodes * NODE),
    }
    limit = max(stages, key=lambda stage: stages[stage])
    write = EACH / min(storage, nodes * link)
    found = 8 * INGREDIENTS * TENSORS  # digests of each rank, which rank 0 adds up and sends back
    gram = 8 * INGREDIENTS**2
    talk = 2 * (nodes - 1) * (2 * found / link + 8 * MESSAGE + batches * (gram / link + MESSAGE))
    return Forecast(START + stages[limit] + write + talk, limit)


def main() -> None:
    print("| link of a machine | storage | machines | uniform, greedy's first pass | Gram methods, two readings |")
    print("|---|---|---|---|---|")
    for link_name, link in LINKS.items():
        for storage_name, storage in STORAGES.items():
            for nodes in NODES:
                one = forecast(nodes, link, storage)
                two = forecast(nodes, link, storage, readings=2, batches=250)
                print(
                    f"| {link_name} | {storage_name} | {nodes} | {one.seconds:.0f} s ({one.limit}) | "
                    f"{two.seconds:.0f} s ({two.limit}) |"
                )


if __name__ == "__main__":
    main()
