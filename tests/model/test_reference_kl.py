"""KL(reference || policy) made in chunks equals that of whole logits, with every gradient, and
costs no [T, vocabulary] memory.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largest_tensor import LargestTensor
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.testing import tiny_model
from longfactory.train.reference import as_reference
from output_models import IDS, MODELS, T, f64, gradients, lora, some_labels

OTHERS = {
    "plain": lambda: f64("llama", seed=5, tie_word_embeddings=False),
    "softcap": lambda: f64("gemma2", seed=5, final_logit_softcapping=4.0),
    "divided": lambda: f64("granite", seed=5, logits_scaling=2.0),
}
ADAPTED = [kind for kind in MODELS if kind.startswith(("lora", "modules"))]
CASES = (
    [(kind, "off") for kind in ADAPTED]
    + [(kind, "plain") for kind in MODELS]
    + [("plain", "softcap"), ("lora on the head", "divided")]
)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.bfloat16 else x


def of_logits(model: Any, reference: Any, off: bool, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The specification: two whole logits."""
    with as_reference(reference, adapter_off=off):
        q = wide(reference(input_ids=IDS).logits[0]).log_softmax(-1)
    log_p = wide(model(input_ids=IDS).logits[0]).log_softmax(-1)
    logps = log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    kl = F.kl_div(log_p, q, reduction="none", log_target=True).sum(-1)
    return torch.where(labels >= 0, logps, 0.0), torch.where(labels >= 0, kl, 0.0)


def of_chunks(
    model: Any, head: TokenLogprobs, reference: Any, other: TokenLogprobs, off: bool, labels: Tensor
) -> tuple[Tensor, Tensor]:
    with as_reference(reference, adapter_off=off), other.hidden(labels) as result:
        reference(input_ids=IDS)
        hidden = result()
    with head.labels(labels, hidden):
        out = head.outputs(model(input_ids=IDS).logits)
    assert out.reference_kl is not None
    return out.logps, out.reference_kl


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize(("kind", "source"), CASES)
def test_values_and_gradients_are_those_of_whole_logits(
    kind: str, source: str, chunk: int | None
) -> None:
    model, off, labels = MODELS[kind](), source == "off", some_labels()
    reference = model if off else OTHERS[source]()
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():  # far from where it began: a small distance would prove little
        if p.requires_grad and off:
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    weights = torch.randn(2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want = of_logits(model, reference, off, labels)
    (torch.stack(want) * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()

    head = TokenLogprobs(model, chunk)
    got = of_chunks(
        model, head, reference, head if off else TokenLogprobs(reference, chunk), off, labels
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert want[1].max() > 1e-3, "the comparison is of zeros"
    (torch.stack(got) * weights).sum().backward()
    found = gradients(model)
    assert {n for n, g in found.items() if g is not None} == {
        n for n, g in expected.items() if g is not None
    }
    for name, g in expected.items():
        if g is not None:
            torch.testing.assert_close(
                found[name], g, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("kind", ["lora elsewhere", "lora on the head", "modules to save"])
def test_equal_distributions_have_no_distance_to_the_last_bit(kind: str) -> None:
    targets = {
        "lora elsewhere": {"target_modules": ["q_proj"]},
        "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    }
    model = MODELS["plain"]().float()
    fresh = lora(
        model, **targets.get(kind, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    ).float()
    for name, p in fresh.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    head = TokenLogprobs(fresh, 5)
    kl = of_chunks(fresh, head, fresh, head, True, some_labels())[1]
    assert kl.tolist() == [0.0] * T


@pytest.mark.parametrize("kind", ["lora elsewhere", "lora on the head", "modules to save"])
def test_a_rank_without_a_trained_token_stays_in_the_graph_with_zero_gradients(kind: str) -> None:
    model = MODELS[kind]()
    head = TokenLogprobs(model, 5)
    logps, kl = of_chunks(model, head, model, head, True, torch.full((T,), -100))
    assert kl.tolist() == [0.0] * T
    (logps + kl).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and (p.grad == 0).all() for p in trained)


@pytest.mark.parametrize("adapted", [False, True])
def test_autocast_multiplies_in_bf16_and_sums_in_fp32(adapted: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    if adapted:
        model = lora(model, target_modules=["q_proj", "lm_head"]).float()
    other = tiny_model("llama", seed=5, tie_word_embeddings=False, dtype=torch.bfloat16)
    labels = some_labels()
    with torch.autocast("cpu", torch.bfloat16):
        want = of_logits(model, other, False, labels)[1]
        head = TokenLogprobs(model, 7)
        kl = of_chunks(model, head, other, TokenLogprobs(other, 7), False, labels)[1]
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, want, rtol=1e-4, atol=1e-6)
    kl.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def largest(vocabulary: int, tokens: int, chunk: int | None, adapted: bool) -> int:
    """Numbers of the largest tensor in one forward of the reference, and one forward and backward
    of the output layer.
    """
    model = tiny_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=8,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    if adapted:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    head, labels = TokenLogprobs(model, chunk), torch.arange(tokens) % 90
    layer, hidden = model.get_output_embeddings(), torch.randn(1, tokens, 8, requires_grad=True)
    with LargestTensor() as seen:
        with torch.no_grad(), head.hidden(labels) as result:
            layer(torch.randn(1, tokens, 8))
            reference = result()
        with head.labels(labels, reference):
            layer(hidden)
            out = head.outputs()
            assert out.reference_kl is not None
            (out.logps + out.reference_kl).sum().backward()
    assert hidden.grad is not None
    return seen.numel


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
def test_no_tensor_has_a_number_for_each_token_and_vocabulary_entry(
    adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import longfactory.model.token_logprobs as module

    for vocabulary in (512, 1024):
        assert (
            largest(vocabulary, 256, 16, adapted)
            == largest(vocabulary, 512, 16, adapted)
            == 16 * vocabulary
        )
    monkeypatch.setattr(module, "CHUNK_NUMBERS", 256 * 512)
    assert largest(512, 600, None, adapted) == 128 * 512  # half of what one distribution would take


def test_the_layer_is_itself_afterwards_and_forgets_the_reference() -> None:
    model = MODELS["lora elsewhere"]()
    want = model(input_ids=IDS).logits
    head = TokenLogprobs(model, 5)
    of_chunks(model, head, model, head, True, some_labels())
    assert torch.equal(model(input_ids=IDS).logits, want)
    with head.labels(some_labels()):
        model(input_ids=IDS)
        assert head.outputs().reference_kl is None
    with head.hidden(some_labels()) as result, contextlib.suppress(RuntimeError):
        result()
        pytest.fail("no forward was made")


def test_a_reference_of_other_tokens_is_refused() -> None:
    model = MODELS["lora elsewhere"]()
    head = TokenLogprobs(model, 5)
    with head.hidden(some_labels()) as result:
        model(input_ids=IDS)
        hidden = result()
    labels = some_labels()
    labels[10] = -100
    with (
        pytest.raises(RuntimeError, match="hidden states of 17 tokens, the labels 16"),
        head.labels(labels, hidden),
    ):
        pass
