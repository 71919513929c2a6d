"""What some stages ask the output layer for: the entropy that eaft reads, the mean logit that is
reported; and what it cannot serve.
"""

from __future__ import annotations

import pytest
import torch

from longfactory.errors import UserError
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.stages.kto import KTOStage
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.tokens import TokenStage
from longfactory.testing import tiny_model
from output_models import IDS, MODELS, gradients, some_labels


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


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("kind", list(MODELS))
def test_the_mean_of_the_logits(kind: str, chunk: int | None) -> None:
    """Over the whole vocabulary, of every trained token; and the gradient of the log-probabilities
    is what it is without.
    """
    model, labels = MODELS[kind](), some_labels()
    want = torch.where(labels >= 0, model(input_ids=IDS).logits[0].mean(-1), 0.0)
    found = []
    for needs in (frozenset(), PreferenceStage().needs):
        head = TokenLogprobs(model, chunk, needs)
        with head.labels(labels):
            out = head.outputs(model(input_ids=IDS).logits)
        out.logps.sum().backward()
        found.append(gradients(model))
        model.zero_grad()
        head.release()
    assert out.mean_logit is not None and not out.mean_logit.requires_grad
    torch.testing.assert_close(out.mean_logit, want, rtol=1e-11, atol=1e-11)
    assert want.abs().max() > 1e-3
    for name, g in found[0].items():
        assert (g is None and found[1][name] is None) or torch.equal(g, found[1][name]), name


def test_entropy_is_made_only_where_it_is_asked_for() -> None:
    model = tiny_model()
    head = TokenLogprobs(model)
    with head.labels(torch.tensor([5, -100])):
        model(input_ids=torch.tensor([[4, 5]]))
        assert head.outputs().entropy is None and head.outputs().mean_logit is None
    assert KTOStage().needs == PreferenceStage().needs == {"mean_logit"} and not TokenStage().needs


def test_a_loss_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(UserError, match="needs curvature, which the output layer does not make"):
        TokenLogprobs(tiny_model(), None, frozenset({"curvature", "top1"}))
