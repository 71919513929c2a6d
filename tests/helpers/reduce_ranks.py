"""What the ranks of tests/gpu/test_reduce_gpu.py run."""

from __future__ import annotations

import torch
import torch.distributed as dist


def reduced_in_bf16_and_in_fp32(device: str) -> tuple[bool, bool]:
    """Whether FSDP2's reduction of bf16 numbers (of all sizes that gradients have) gives in bf16
    the bits that fp32 gives and rounds; and whether it gives the mean.
    """
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    world, n = dist.get_world_size(), 1 << 20
    generator = torch.Generator().manual_seed(dist.get_rank())
    sizes = torch.logspace(-20, 3, world * n)[torch.randperm(world * n, generator=generator)]
    mine = (torch.randn(world * n, generator=generator) * sizes).bfloat16().to(device)
    wide = torch.empty(n, device=device)
    narrow = torch.empty(n, device=device, dtype=torch.bfloat16)
    dist.reduce_scatter_tensor(wide, mine.float(), op=dist.ReduceOp.AVG)
    dist.reduce_scatter_tensor(narrow, mine, op=dist.ReduceOp.AVG)
    both = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(both, mine)
    mean = torch.stack(both).float().sum(0).div(world).chunk(world)[dist.get_rank()]
    return torch.equal(wide.bfloat16(), narrow), torch.equal(mean.bfloat16(), narrow)
