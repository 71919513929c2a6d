"""NEFTune: the bound is that of each document by itself, and neither packing nor the split over
processes changes the noise.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from longfactory import sp
from longfactory.data.row import Row, TokenizedDocument, make_row
from longfactory.train import embedding_noise
from longfactory.train.embedding_noise import noisy_embeddings, token_keys, token_scales, uniform

DIM = 64
ALPHA = 5.0


def row_of(lengths: dict[int, int], **changes: Any) -> Row:
    """A row of documents: sample -> number of tokens."""
    return make_row(
        [TokenizedDocument([3] * n, [3] * n, sample=s, **changes) for s, n in lengths.items()]
    )


def noise(
    row: Row,
    seed: int = 42,
    step: int = 0,
    index: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[T, DIM] what is added to embeddings that are 0."""
    index = torch.arange(len(row)) if index is None else index
    embedding = nn.Embedding(5, DIM, dtype=dtype)
    nn.init.zeros_(embedding.weight)
    with noisy_embeddings(
        embedding, token_keys(row, seed, step)[index], token_scales(row, ALPHA)[index]
    ):
        return embedding(row.input_ids[index][None])[0].detach()


def test_each_document_has_its_own_bound() -> None:
    """A row of eight documents of which the longest has 118 tokens: 0.0575, whatever else is in the
    row.
    """
    row = row_of({i: 118 - 10 * i for i in range(8)}).padded(256, 0)
    found = noise(row)
    for d in row.documents:
        largest = found[d.start : d.stop].abs().max().item()
        if d.role == "pad":
            assert largest == 0.0
        else:
            bound = ALPHA / math.sqrt((d.stop - d.start) * DIM)
            assert 0.998 * bound < largest <= bound
    assert found.abs()[:118].max().item() == pytest.approx(0.0575, abs=1e-4)


def test_numbers_are_distributed_as_those_of_transformers() -> None:
    length = 500
    ours = noise(row_of({0: length})).double()
    embedding = nn.Embedding(5, DIM)
    nn.init.zeros_(embedding.weight)
    embedding.neftune_noise_alpha = ALPHA
    embedding.register_forward_hook(neftune_post_forward_hook)
    theirs = embedding(torch.full((1, length), 3))[0].detach().double()
    bound = ALPHA / math.sqrt(length * DIM)
    assert theirs.abs().max() == pytest.approx(bound, rel=1e-3)
    # 32,000 numbers: standard errors are 0.0032 of the bound for the mean, 0.0017 of its square for
    # the mean of squares.
    for x in (ours / bound, theirs / bound):
        assert x.mean().abs() < 0.015 and (x**2).mean() == pytest.approx(1 / 3, abs=0.01)
        counts = torch.histc(x.float(), 20, -1, 1)
        assert (counts - 1600).abs().max() < 5 * math.sqrt(1600)
    x = ours / bound
    # neighbouring tokens and channels know nothing of each other
    for other in (x.roll(1, 0), x.roll(1, 1), x.flip(0), x.flip(1)):
        assert (x * other).mean().abs() < 0.012


def test_neither_the_row_nor_the_rank_changes_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    row = row_of({7: 50, 3: 31, 9: 40}).padded(16, 0)
    whole = noise(row)
    for sample, where in ((7, slice(0, 50)), (3, slice(50, 81)), (9, slice(81, 121))):
        assert torch.equal(noise(row_of({sample: where.stop - where.start})), whole[where])
    for size in (1, 2, 4):
        for mode in ("zigzag-ring", "ulysses"):
            for rank in range(size):
                plan = sp.plan(
                    len(row), row.segments, sp.SequenceParallel(size=size, rank=rank, mode=mode)
                )
                assert torch.equal(noise(row, index=plan.index), whole[plan.index])
    monkeypatch.setattr(embedding_noise, "_ELEMENTS_AT_ONCE", 7 * DIM)
    assert torch.equal(noise(row), whole)
    assert torch.equal(noise(row, dtype=torch.bfloat16), whole.bfloat16())


def test_what_does_change_the_noise() -> None:
    first = noise(row_of({0: 20}))
    assert torch.equal(noise(row_of({0: 20})), first)
    others = [
        noise(row_of({0: 20}), seed=1),
        noise(row_of({0: 20}), step=1),
        noise(row_of({1: 20})),
        noise(row_of({0: 20}, role="chosen")),
    ]
    twice = make_row([TokenizedDocument([3] * 20, [3] * 20, sample=0)] * 2)
    others.append(noise(twice)[20:])
    assert torch.equal(noise(twice)[:20], first)
    for other in others:
        assert (
            not torch.equal(other, first) and (other * first).mean().abs() < 0.1 * (first**2).mean()
        )


def test_the_largest_and_the_least_number() -> None:
    found = uniform(torch.arange(1 << 12), 256)
    assert (
        found.dtype == torch.float32 and -1 < found.min() < -0.99999 and 0.99999 < found.max() < 1
    )


@pytest.mark.parametrize("passes", [0, 2])
def test_embeddings_elsewhere_are_noticed(passes: int) -> None:
    row, embedding = row_of({0: 4}), nn.Embedding(5, DIM)
    with (
        pytest.raises(
            RuntimeError, match=f"expected one pass through the input embeddings, found {passes}"
        ),
        noisy_embeddings(embedding, token_keys(row, 0, 0), token_scales(row, ALPHA)),
    ):
        for _ in range(passes):
            embedding(row.input_ids[None])
