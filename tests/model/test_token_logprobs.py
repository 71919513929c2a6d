"""Log-probabilities made in chunks equal those of whole logits, with every gradient, and cost no
[T, vocabulary] memory.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from largest_tensor import LargestTensor
from longfactory.model.token_logprobs import (
    LogitTransform,
    TokenLogprobs,
    check_head,
    logit_transform,
)
from longfactory.testing import tiny_model
from output_models import IDS, MODELS, T, f64, gradients, some_labels


def of_logits(model: Any, labels: Tensor) -> Tensor:
    """The specification: whole logits, log-softmax, pick."""
    logps = (
        model(input_ids=IDS).logits[0].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    )
    return torch.where(labels >= 0, logps, 0.0)


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("kind", list(MODELS))
def test_values_and_gradients_are_those_of_whole_logits(kind: str, chunk: int | None) -> None:
    model = MODELS[kind]()
    labels = some_labels()
    weights = torch.randn(T, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    want = of_logits(model, labels)
    (want * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()

    head = TokenLogprobs(model, chunk)
    with head.labels(labels):
        out = model(input_ids=IDS)
        got = head.outputs(out.logits)
    assert out.logits.shape == (1, T, 1)
    torch.testing.assert_close(got.logps, want, rtol=1e-11, atol=1e-11)
    (got.logps * weights).sum().backward()
    found = gradients(model)
    assert {n for n, g in found.items() if g is not None} == {
        n for n, g in expected.items() if g is not None
    }
    assert any(g is not None and g.abs().max() > 1e-3 for g in found.values())
    for name, g in expected.items():
        if g is not None:
            torch.testing.assert_close(
                found[name], g, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("chunk", [5, None])
@pytest.mark.parametrize("kind", ["bias", "softcap", "divided", "lora on the head"])
def test_mean_and_candidates_are_those_of_whole_logits(kind: str, chunk: int | None) -> None:
    """The mean log-probability, and those of three vocabulary entries at each token, one of them
    the label in places.
    """
    model = MODELS[kind]()
    labels = some_labels()
    g = torch.Generator().manual_seed(3)
    candidates = torch.randint(0, 90, (T, 3), generator=g)
    candidates[::2, 1] = labels.clamp(min=0)[::2]
    weights = torch.randn(T, 5, dtype=torch.float64, generator=g)
    trained = (labels >= 0)[:, None]

    logps = model(input_ids=IDS).logits[0].log_softmax(-1)
    of_labels = logps.gather(1, labels.clamp(min=0)[:, None])
    whole = torch.cat([of_labels, logps.mean(1, keepdim=True), logps.gather(1, candidates)], 1)
    want = torch.where(trained, whole, 0.0)
    (want * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad()

    head = TokenLogprobs(model, chunk, frozenset({"mean_logp", "candidates"}))
    with head.labels(labels, candidates=candidates):
        out = model(input_ids=IDS)
        made = head.outputs(out.logits)
    assert made.mean_logp is not None and made.candidates is not None
    got = torch.cat([made.logps[:, None], made.mean_logp[:, None], made.candidates], 1)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    (got * weights).sum().backward()
    for name, found in gradients(model).items():
        if expected[name] is not None:
            torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-11)


def test_whether_a_label_was_the_most_probable_token() -> None:
    model = f64("llama")
    best = model(input_ids=IDS).logits[0].argmax(-1)
    labels = best.clone()
    labels[::3] = (labels[::3] + 1) % 97
    labels[5] = -100
    head = TokenLogprobs(model, 4)
    with head.labels(labels):
        model(input_ids=IDS)
        assert head.outputs().top1.tolist() == (labels == best).tolist()


@pytest.mark.parametrize("kind", ["plain", "tied", "lora on the head", "modules to save"])
def test_a_rank_without_a_trained_token_stays_in_the_graph_with_zero_gradients(kind: str) -> None:
    model = MODELS[kind]()
    head = TokenLogprobs(model, 5)
    with head.labels(torch.full((T,), -100)):
        logps = head.outputs(model(input_ids=IDS).logits).logps
    assert logps.tolist() == [0.0] * T
    logps.sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for _, p in trained), [n for n, p in trained if p.grad is None]
    assert all((p.grad == 0).all() for _, p in trained)


def test_the_layer_is_itself_outside_of_labels_and_after_release() -> None:
    model = f64("llama")
    want = model(input_ids=IDS).logits
    head = TokenLogprobs(model)
    assert torch.equal(model(input_ids=IDS).logits, want)
    with pytest.raises(RuntimeError, match="did not call its output layer"):
        head.outputs()
    head.release()
    assert "forward" not in vars(model.get_output_embeddings()) or torch.equal(
        model(input_ids=IDS).logits, want
    )
    with head.labels(some_labels()):
        assert model(input_ids=IDS).logits.shape == want.shape


def test_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    other = copy.deepcopy(model)
    labels = some_labels()
    head = TokenLogprobs(model, 7)
    with torch.autocast("cpu", torch.bfloat16):
        with head.labels(labels):
            got = head.outputs(model(input_ids=IDS).logits).logps
        want = of_logits(other, labels)
    got.sum().backward()
    want.float().sum().backward()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=0, atol=5e-2)
    a, b = model.lm_head.weight.grad, other.lm_head.weight.grad
    assert a.dtype == torch.float32
    assert (a - b).norm() / b.norm() < 0.02


def largest(vocabulary: int, tokens: int, chunk: int, kind: str) -> int:
    """Of one forward and backward of the output layer with `tokens` trained tokens."""
    model = tiny_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=8,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    head = TokenLogprobs(model, chunk)
    hidden = torch.randn(1, tokens, 8, requires_grad=True)
    with LargestTensor() as seen, head.labels(torch.arange(tokens) % 90):
        layer = model.get_output_embeddings()
        head.outputs(layer(hidden)).logps.sum().backward()
    assert hidden.grad is not None
    return seen.numel


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_no_tensor_has_a_number_for_each_token_and_vocabulary_entry(kind: str) -> None:
    chunk = 16
    for vocabulary in (512, 1024):
        sizes = {tokens: largest(vocabulary, tokens, chunk, kind) for tokens in (256, 512)}
        # flat in length; a chunk of logits is the largest there is
        assert sizes[256] == sizes[512] == chunk * vocabulary, sizes
    # Were the chunk as long as the row, the same count would see the whole logits: the measure
    # measures.
    assert largest(512, 256, 256, kind) == 256 * 512


def test_the_chunk_follows_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    import longfactory.model.token_logprobs as module

    monkeypatch.setattr(module, "CHUNK_NUMBERS", 128 * 512)
    assert largest(512, 600, None, "plain") == 128 * 512  # type: ignore[arg-type]
    assert largest(256, 600, None, "plain") == 256 * 256  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "fields", "want"),
    [
        ("llama", {}, LogitTransform()),
        ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(1.0, 30.0)),
        ("cohere", {"logit_scale": 0.25}, LogitTransform(0.25)),
        ("granite", {"logits_scaling": 8.0}, LogitTransform(0.125)),
    ],
)
def test_the_transform_is_read_from_the_configuration(
    family: str, fields: dict[str, Any], want: LogitTransform
) -> None:
    assert logit_transform(tiny_model(family, **fields).config) == want


@pytest.mark.parametrize("kind", list(MODELS))
def test_check_head_accepts_what_is_exact(kind: str) -> None:
    model = MODELS[kind]()
    head = TokenLogprobs(model, 5)
    assert check_head(model, head, {"input_ids": IDS}, some_labels()) < 1e-5
    assert model(input_ids=IDS).logits.shape[-1] == 97


def test_check_head_refuses_an_unknown_transform() -> None:
    model = f64("gemma2", final_logit_softcapping=0.2)
    model.config.final_logit_softcapping = None  # not known to the head
    head = TokenLogprobs(model, 5)
    model.config.final_logit_softcapping = 0.2  # but done by the model
    with pytest.raises(
        ValueError, match="transforms its logits in a way that LongFactory does not know"
    ):
        check_head(model, head, {"input_ids": IDS}, some_labels())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_check_head_in_half_precision(dtype: torch.dtype, autocast: bool, known: bool) -> None:
    """A cap that rounds its logits to half precision in the model itself is exact here; one that is
    not known is still seen.
    """
    model = tiny_model("gemma2", final_logit_softcapping=30.0).to(
        torch.float32 if autocast else dtype
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # logits that the cap changes
    if not known:
        model.config.final_logit_softcapping = None
    head = TokenLogprobs(model, 5)
    model.config.final_logit_softcapping = 30.0
    refused = (
        contextlib.nullcontext()
        if known
        else pytest.raises(ValueError, match="transforms its logits in a way")
    )
    with refused, torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        assert check_head(model, head, {"input_ids": IDS}, some_labels()) < 1e-3


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="has no output layer"):
        TokenLogprobs(tiny_model("llama").model)
