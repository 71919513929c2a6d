"""The row of the guard: documents of random tokens between paddings, and this rank's part of it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import hf, rope
from ..collectives import gather, shard
from ..context import SequenceParallel, alignment
from ..layout import Segment
from ..plan import RowPlan
from ..plan import plan as make_plan

DOCUMENTS = (48, 208)
"""Tokens of the documents that are compared, at least."""


SHORT = (16, 40)


class Row:
    """Documents one after another, between paddings; this rank's part of it.

    Attributes:
        tensors: `input_ids` and `position_ids`, [T] each.
        lengths: of the documents.
        span: where the documents are in the row.
    """

    def __init__(self, documents: list[Tensor], ctx: SequenceParallel) -> None:
        self.lengths = [len(ids) for ids in documents]
        used = sum(self.lengths)
        padding = -used % alignment(ctx)
        # The row of ranks that take 128 tokens at least is longer than the documents. Where each
        # rank has one stretch of it, so much before them puts them on two ranks; where it has two,
        # on several.
        before = min(padding, (used + padding) // ctx.size // 4) if ctx.size > 1 else 0
        self.span = slice(before, before + used)
        lengths = [n for n in (before, *self.lengths, padding - before) if n]
        ends = list(itertools.accumulate(lengths))
        device, zeros = documents[0].device, documents[0].new_zeros
        self.tensors = {
            "input_ids": torch.cat([zeros(before), *documents, zeros(padding - before)]),
            "position_ids": torch.cat([torch.arange(n, device=device) for n in lengths]),
        }
        segments = [Segment(end - n, end) for n, end in zip(lengths, ends, strict=True)]
        self.plan: RowPlan = make_plan(ends[-1], segments, ctx)

    def run(self, model: nn.Module) -> Any:
        return model(**hf.inputs(self.tensors, self.plan))


def compared_lengths(ctx: SequenceParallel) -> tuple[int, int]:
    """Tokens of the documents that are compared: the longer one is more than a rank may hold.

    A layout deals whole documents to ranks where that balances their work (`layout.whole`); nothing
    is exchanged then, and an exchange that is wrong would not be seen.
    """
    shorter, longer = DOCUMENTS
    return shorter, longer if ctx.size == 1 else max(longer, alignment(ctx) // ctx.size + 16)


def draw_documents(
    model: PreTrainedModel, wanted: tuple[int, int], device: torch.device
) -> list[Tensor]:
    """Random tokens of two documents, the same on every rank: `wanted` of each, or what the model
    can take.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or sum(wanted)
    # of a row's longest document: equal ones have the same frequencies alone
    if rope.depends_on_length(model):
        wanted = (sum(wanted) // 2,) * 2
    return [_tokens(min(n, limit), seed, model, device) for seed, n in enumerate(wanted)]


def _tokens(n: int, seed: int, model: PreTrainedModel, device: torch.device) -> Tensor:
    """Away from both ends of the vocabulary, where special tokens are."""
    embedding = model.get_input_embeddings()
    for inner in ("original_module", "base_layer"):  # with an adapter, or with trained tokens
        embedding = getattr(embedding, inner, embedding)
    vocabulary = embedding.num_embeddings
    draw = torch.Generator().manual_seed(seed)
    first, end = vocabulary // 8, max(vocabulary // 8 + 2, vocabulary // 2)
    return torch.randint(first, end, (n,), generator=draw).to(device)


def of_documents(t: Tensor, dim: int, row: Row) -> Tensor:
    """This rank's tokens in dimension `dim` -> those of the row's documents, [D, ...]."""
    return gather(t.movedim(dim, 0).contiguous(), row.plan)[row.span]


def zero_padding(t: Tensor, row: Row) -> None:
    """In place, of [T, ...]."""
    t[: row.span.start] = 0
    t[row.span.stop :] = 0


def draw_slope(row: Row, y: Tensor, dim: int) -> Tensor:
    """A random gradient of `y`, of the whole row's tokens the same however it is spread; 0 for
    padding.
    """
    shape = list(y.movedim(dim, 0).shape)
    shape[0] = row.plan.length
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    zero_padding(slope, row)
    return shard(slope, row.plan).to(y).movedim(0, dim)
