"""Sequence parallelism in a training loop of your own: torch and longfactory.sp, nothing else.

    torchrun --nproc_per_node 2 examples/custom_loop.py
    torchrun --nproc_per_node 2 examples/custom_loop.py --mode ulysses --steps 50

A small transformer learns to repeat: each document is a random phrase said over and over. The row
of packed documents is spread over all processes. Beside it rank 0 trains the same model on whole
rows, alone, and the two must agree: losses and parameters, in float64.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longfactory import sp

VOCAB, WIDTH, HEADS, KV_HEADS, DIM = 64, 64, 4, 2, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, positions: Tensor, plan: sp.RowPlan) -> Tensor:
        # [T/n, WIDTH] -> [T/n, heads, DIM]
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        )
        # the only line that talks to other processes
        attended = sp.attention(rotate(q, positions), rotate(k, positions), v, plan)
        x = x + self.out(attended.flatten(1))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, plan: sp.RowPlan) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, positions, plan)
        return self.head(x)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary embedding. Positions are the tokens' own, so it does not matter which rank holds
    them.
    """
    angle = positions[:, None, None] / 10000 ** (
        torch.arange(0, DIM, 2, device=x.device, dtype=x.dtype) / DIM
    )
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def packed_row(length: int, step: int) -> tuple[Tensor, Tensor, Tensor, list[sp.Segment]]:
    """tokens, labels (already shifted, -100 at the end of each document), positions, documents."""
    g = torch.Generator().manual_seed(step)
    tokens, labels, positions, segments = [], [], [], []
    while not segments or segments[-1].stop < length:
        start = segments[-1].stop if segments else 0
        size = min(length - start, int(torch.randint(30, 200, (), generator=g)))
        phrase = torch.randint(0, VOCAB, (int(torch.randint(3, 12, (), generator=g)),), generator=g)
        document = phrase.repeat(size // len(phrase) + 1)[:size]
        tokens.append(document)
        labels.append(torch.cat([document[1:], torch.tensor([-100])]))
        positions.append(torch.arange(size))
        segments.append(sp.Segment(start, start + size))
    return torch.cat(tokens), torch.cat(labels), torch.cat(positions), segments


def train(
    ctx: sp.SequenceParallel, steps: int, length: int, device: str
) -> tuple[Model, list[float]]:
    torch.manual_seed(0)
    model = Model().to(device, torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        tokens, labels, positions, segments = packed_row(length, step)
        plan = sp.plan(length, segments, ctx)
        local_tokens, local_labels, local_positions = (
            sp.shard(x, plan).to(device) for x in (tokens, labels, positions)
        )
        logits = model(local_tokens, local_positions, plan)
        # Divide by the tokens of the whole row: then the sum over ranks of gradients is the
        # gradient of the row's mean loss.
        loss = (
            F.cross_entropy(logits, local_labels, ignore_index=-100, reduction="sum")
            / (labels != -100).sum()
        )
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach()
        if ctx.group is not None:
            for p in model.parameters():
                dist.all_reduce(p.grad, group=ctx.group)
            dist.all_reduce(total, group=ctx.group)
        optimizer.step()
        losses.append(total.item())
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", default="zigzag-ring", choices=sp.MODES)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a row, over all processes"
    )
    args = parser.parse_args()

    # float64 on CPUs, so that the comparison below is sharp; use "nccl" and bfloat16 on GPUs
    dist.init_process_group("gloo")
    ctx = sp.SequenceParallel.create(
        dist.get_world_size(), mode=args.mode, heads=HEADS, kv_heads=KV_HEADS
    )
    model, losses = train(ctx, args.steps, args.length, "cpu")
    if ctx.rank == 0:
        alone, expected = train(sp.SequenceParallel(), args.steps, args.length, "cpu")
        print(f"{args.mode} over {ctx.size} processes: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
        print(
            f"one process:{' ' * (len(args.mode) + 6)} loss {expected[0]:.4f} -> {expected[-1]:.4f}"
        )
        loss_error = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        weight_error = max((a - b).abs().max().item() for a, b in pairs)
        print(f"largest difference: loss {loss_error:.1e}, parameters {weight_error:.1e}")
        if not max(loss_error, weight_error) < 1e-6:
            raise SystemExit("They differ: sequence parallelism is not exact here.")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
