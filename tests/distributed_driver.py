"""One of two processes that save a model's shards with `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch_checkpoints import some_sharded


def main(rank: int, world: int, meeting: str, seeds: int, out: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    placements = {"rows": Shard(0), "uneven": Shard(0), "short": Shard(0), "columns": Shard(1), "deep": Shard(2)}
    for seed in range(seeds):
        model = {
            name: distribute_tensor(tensor, mesh, [placements.get(name, Replicate())])
            for name, tensor in some_sharded(seed).items()
        }
        dcp.save({"model": model, "optim": {"moments": model["rows"]}}, checkpoint_id=f"{out}/dtensor{seed}")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
    if rank == 0:
        torch.save(network.state_dict(), f"{out}/network.pt")
    fully_shard(network, mesh=mesh)
    dcp.save(network.state_dict(), checkpoint_id=f"{out}/fsdp")
    os._exit(0)  # all is saved; torch's threads now and then abort a process that takes them down


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5])
