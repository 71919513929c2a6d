"""The entropy that the eaft loss reads, and a loss that the output layer cannot serve."""

from __future__ import annotations

import pytest
import torch

from longfactory.errors import UserError
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.testing import tiny_model
from longfactory.train.stages import TokenStage


@pytest.mark.parametrize("chunk", [3, 1000])
def test_entropy_of_the_twenty_most_probable_tokens(chunk: int) -> None:
    model = tiny_model("gemma2", final_logit_softcapping=3.0, dtype=torch.float64)
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([ids[0, 1:], torch.tensor([-100])])
    labels[2:5] = -100
    p = model(input_ids=ids).logits[0].detach().softmax(-1).topk(20).values
    p = p / p.sum(-1, keepdim=True)
    want = torch.where(labels >= 0, -(p * p.log()).sum(-1), 0.0)
    head = TokenLogprobs(model, chunk, TokenStage("eaft", 0.5).needs)
    with head.labels(labels):
        model(input_ids=ids)
        out = head.outputs()
    assert out.entropy is not None and not out.entropy.requires_grad
    torch.testing.assert_close(out.entropy, want, rtol=1e-9, atol=1e-9)


def test_entropy_is_made_only_where_it_is_asked_for() -> None:
    model = tiny_model()
    head = TokenLogprobs(model)
    with head.labels(torch.tensor([5, -100])):
        model(input_ids=torch.tensor([[4, 5]]))
        assert head.outputs().entropy is None


def test_a_loss_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(UserError, match="needs curvature, which the output layer does not make"):
        TokenLogprobs(tiny_model(), None, frozenset({"curvature", "top1"}))
