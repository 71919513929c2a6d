"""Weights that FSDP2 gathers: kept or gathered again, the gradients are those of one process; and
what is not gathered twice.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import gathered_ranks
from longfactory.testing import run_ranks

pytestmark = pytest.mark.processes

SIZE = 2


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_and_gathers(kind: str, tied: bool) -> None:
    dtype = torch.float64
    model = gathered_ranks.model_of(kind, dtype, tied)
    wanted = []
    for step in range(2):
        model.zero_grad()
        (sum(gathered_ranks.loss_of(model, r, step) for r in range(SIZE)) / SIZE).backward()  # type: ignore[union-attr]
        wanted.append({n: p.grad.clone() for n, p in model.named_parameters()})  # type: ignore[union-attr]
    layers = len(model.model.layers)  # type: ignore[arg-type, union-attr]
    for keep in (False, True):
        body = gathered_ranks.gradients_and_gathers
        for found, counts in run_ranks(SIZE, body, kind, keep, dtype, dtype, tied):
            for got, want in zip(found, wanted, strict=True):
                assert got.keys() == want.keys()
                for name in want:
                    torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-12)
            for units in counts:
                times = Counter(units)
                of_layers = [n for name, n in times.items() if ".layers." in name]
                assert of_layers == [1 if keep else 2] * layers
                # not again for a backward that does not read it
                assert tied or times["model.embed_tokens.weight"] == 1


def test_two_shards_reduce_bf16_to_the_same_bits() -> None:
    """What fp32 sums and rounds to bf16, bf16 sums to: of two numbers there is one sum."""
    bodies = [
        run_ranks(
            SIZE, gathered_ranks.gradients_and_gathers, "llama", True, torch.bfloat16, reduced
        )
        for reduced in (torch.float32, torch.bfloat16)
    ]
    for (wide, _), (narrow, _) in zip(*bodies, strict=True):
        for one, other in zip(wide, narrow, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("uncopied_bytes", [1 << 60, 512], ids=["copied", "uncopied"])
@pytest.mark.parametrize("keep", [False, True], ids=["gathered again", "kept"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gathers_beside_the_update_are_of_updated_weights(
    tied: bool, keep: bool, uncopied_bytes: int
) -> None:
    """Those of the embedding and the first layer, where the step before updated both."""
    for races, steps in run_ranks(SIZE, gathered_ranks.races, tied, keep, uncopied_bytes):
        assert not races
        first, plain, without, *others = steps
        assert {name.partition(".layers.0.")[0] for name in plain} == (
            {"model", "model.embed_tokens.weight"} | ({"model.norm.weight"} if tied else set())
        )
        assert sum(".layers.0." in name for name in plain) == 9  # all of them
        # without the embedding nothing is gathered beside the update
        assert first == without == set()
        assert others == [plain] * 5
