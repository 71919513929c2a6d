"""The value head of reward models: one number a token, trained with the model, the vocabulary's
layer left alone.
"""

from __future__ import annotations

import copy

import pytest
import torch

from longfactory.model.value_head import TokenValues
from longfactory.testing import tiny_model

IDS = torch.randint(3, 97, (1, 11), generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(11, dtype=torch.int64)


def make(tied: bool = False) -> tuple[object, TokenValues]:
    torch.manual_seed(0)
    model = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=tied)
    head = TokenValues(model)
    head.value.double()
    return model, head


@pytest.mark.parametrize("tied", [False, True])
def test_values_are_a_linear_function_of_the_last_hidden_states(tied: bool) -> None:
    model, head = make(tied)
    plain = copy.deepcopy(model)
    hidden = plain.model(input_ids=IDS).last_hidden_state[0]
    want = hidden @ plain.v_head.weight[0] + plain.v_head.bias
    want.square().sum().backward()
    with head.labels(LABELS):
        out = model(input_ids=IDS)
        got = head.outputs(out.logits).logps
    assert out.logits.shape == (1, 11, 1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if expected[name].grad is not None:
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-10, atol=1e-12)
        else:
            assert p.grad is None or not p.grad.any(), name


def test_the_head_is_a_part_of_the_model_and_begins_the_same_everywhere() -> None:
    (a, first), (b, _) = make(), make()
    names = dict(a.named_parameters())
    assert {"v_head.weight", "v_head.bias"} <= set(names)
    assert names["v_head.weight"] is first.value.weight and first.value.weight.shape == (1, 64)
    assert torch.equal(a.v_head.weight, b.v_head.weight)
    assert not a.v_head.bias.any()


def test_an_untied_output_layer_is_frozen_and_a_tied_one_trained_as_embedding() -> None:
    untied, tied = make()[0], make(tied=True)[0]
    assert not untied.lm_head.weight.requires_grad
    assert (
        untied.get_input_embeddings().weight.requires_grad
        and tied.get_input_embeddings().weight.requires_grad
    )


def test_logits_outside_of_labels_are_the_models_own() -> None:
    model, head = make()
    want = tiny_model("llama", dtype=torch.float64, tie_word_embeddings=False)(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, want)
    with pytest.raises(RuntimeError, match="did not call its output layer"):
        head.outputs()


def test_values_are_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    head = TokenValues(model)
    with torch.autocast("cpu", torch.bfloat16), head.labels(LABELS):
        model(input_ids=IDS)
        values = head.outputs().logps
    assert values.dtype == torch.float32
    # More digits than bf16 has: the last product was made in fp32.
    assert not torch.equal(values, values.bfloat16().float())


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no output layer"):
        TokenValues(tiny_model("llama").model)
