"""Rotary embeddings that depend on the length of the row."""

import torch

from longfactory import sp
from longfactory.sp import hf, rope
from longfactory_dev.families import VARIANTS
from longfactory_dev.tiny_models import tiny_model

ONE = sp.SequenceParallel.create(1)
SEGMENTS = [
    sp.Segment(0, 6),
    sp.Segment(6, 10, 0),
    sp.Segment(10, 10),
    sp.Segment(10, 13, 1),
    sp.Segment(13, 16),
]


def test_positions_of_branches() -> None:
    plan = sp.plan(16, SEGMENTS, ONE)
    assert rope.positions(plan, torch.device("cpu")).tolist() == [
        *range(6),
        *range(6, 10),
        *range(10, 13),
        *range(3),
    ]
    assert rope.longest_document(plan) == 13


def test_a_row_does_not_depend_on_the_rows_before_it() -> None:
    family, _, fields = VARIANTS["llama with dynamic NTK"]
    model = tiny_model(family, **fields)
    hf.prepare(model, ONE)

    def logits(n: int) -> torch.Tensor:
        ids = torch.arange(3, 3 + n)
        row = {"input_ids": ids, "position_ids": torch.arange(n)}
        with torch.no_grad():
            return model(**hf.inputs(row, sp.plan(n, None, ONE))).logits

    first = logits(40)
    grown = logits(100)
    assert torch.equal(logits(40), first)
    assert not torch.allclose(grown[:, :40], first)  # the longer row has other frequencies


def test_without_a_plan_the_embedding_is_its_own() -> None:
    family, _, fields = VARIANTS["phi3 with longrope"]
    model, plain = tiny_model(family, **fields), tiny_model(family, **fields)
    hf.prepare(model, ONE)
    x, positions = torch.zeros(1, 50, 64), torch.arange(50)[None]
    for a, b in zip(
        model.model.rotary_emb(x, positions), plain.model.rotary_emb(x, positions), strict=True
    ):
        assert torch.equal(a, b)
