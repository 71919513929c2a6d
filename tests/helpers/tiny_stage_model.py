"""A model of two attention layers in float64, whose stages are compared with a plain loop over single
sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longfactory.data.row import Row
from oracles import (
    VOCAB,
)

WIDTH = 12


class Tiny(nn.Module):
    """Two attention layers, positions, an output layer and a value head, in float64. `allowed` is
    the [T, T] mask of who sees whom.
    """

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.place = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head, self.value = nn.Linear(WIDTH, VOCAB), nn.Linear(WIDTH, 1)
        self.double()

    def hidden(self, ids: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
        h = self.embed(ids) + self.place(positions)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(h).chunk(3, -1)
            h = h + torch.tanh(
                out(((q @ k.t()) / WIDTH**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v)
            )
        return h

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        """[T] log-probabilities of the labels (noise where there is none) and [T] values."""
        d, t = row.document_ids, torch.arange(len(row))
        parent = torch.tensor([x.parent for x in row.documents])
        h = self.hidden(
            row.input_ids,
            row.position_ids,
            ((d[:, None] == d) & (t[:, None] >= t)) | (parent[d][:, None] == d),
        )
        logps = self.head(h).log_softmax(-1).gather(1, row.labels.clamp(min=0)[:, None])[:, 0]
        return logps, self.value(h)[:, 0]

    def of_text(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """One sequence alone: [n-1, V] log-probabilities of what follows, and [n] values."""
        n = len(ids)
        h = self.hidden(torch.tensor(ids), torch.arange(n), torch.ones(n, n).tril().bool())
        return self.head(h)[:-1].log_softmax(-1), self.value(h)[:, 0]

    def answer(self, prompt: list[int], answer: list[int]) -> Tensor:
        """[n] log-probabilities of the answer's tokens."""
        lp, _ = self.of_text(prompt + answer)
        return lp[len(prompt) - 1 :].gather(1, torch.tensor(answer)[:, None])[:, 0]


def gradients(model: Tiny, loss: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, retain_graph=True
    )
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(model.named_parameters(), grads, strict=True)
    }


def assert_same(model: Tiny, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-9, atol=1e-9)
    mine, theirs = gradients(model, got), gradients(model, want)
    assert max(g.abs().max() for g in theirs.values()) > 1e-4, "the comparison is of zeros"
    for name in theirs:
        torch.testing.assert_close(
            mine[name], theirs[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )
