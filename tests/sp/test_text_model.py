"""The class that a checkpoint is, and what of it a row of text passes through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from configurations import skip_unless_makeable
from longfactory.sp.text_model import decoder, idle, model_class
from longfactory_dev.tiny_models import tiny_model


@pytest.mark.parametrize(
    ("kind", "named", "want"),
    [
        ("llama", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("llama", None, "LlamaForCausalLM"),
        ("llama", ["SomebodysLlama"], "LlamaForCausalLM"),
        ("gemma3", None, "Gemma3ForConditionalGeneration"),
        ("qwen3_5", ["Qwen3_5ForConditionalGeneration"], "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", None, "Qwen3_5ForConditionalGeneration"),
        ("qwen3_5", ["Qwen3_5ForCausalLM"], "Qwen3_5ForCausalLM"),
        ("qwen2_vl", ["Qwen2VLForConditionalGeneration"], "Qwen2VLForConditionalGeneration"),
        ("mistral3", None, "Mistral3ForConditionalGeneration"),
        ("whisper", None, "WhisperForCausalLM"),
    ],
)
def test_the_class_of_a_configuration(kind: str, named: list[str] | None, want: str) -> None:
    config = CONFIG_MAPPING[kind](architectures=named)
    found = model_class(config)
    assert found.name == want
    # A class of text alone takes the text's configuration, as transformers' Auto classes give it.
    assert isinstance(found.config, found.kind.config_class)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", r"model_type t5: transformers .* has no class of it that continues a text"),
        (
            "blip-2",
            (
                r"type blip-2 cannot be trained here: the forward of Blip2ForConditionalGeneration"
                r" needs pixel_values beside text"
            ),
        ),
        ("idefics", "its forward needs images beside text"),
        ("florence2", "has an encoder and a decoder, and continues no text"),
        ("musicgen", "it has several text models"),
        ("shieldgemma2", "it says of images whether they break a rule"),
    ],
)
def test_what_no_text_alone_can_be_given_to(kind: str, message: str) -> None:
    skip_unless_makeable(kind)
    with pytest.raises(ValueError, match=message):
        model_class(CONFIG_MAPPING[kind]())


def without_gradient(model: Any) -> set[str]:
    ids = torch.arange(30, 60)[None]
    model(
        input_ids=ids, position_ids=torch.arange(30)[None], use_cache=False
    ).logits.sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None}


@pytest.mark.parametrize("family", ["gemma3", "phi4_multimodal", "llava_next", "llama", "mllama"])
def test_idle_is_what_text_gives_no_gradient(family: str) -> None:
    """A tower beside the decoder and one inside it, a parameter between them, layers that only
    attend to images, nothing.
    """
    model = tiny_model(family, torch.float32)
    parts = idle(model)
    assert without_gradient(model) == {
        n for n, _ in model.named_parameters() if n in parts.parameters
    }
    assert bool(parts.modules) == (family != "llama")
    assert all(n in parts for n in parts.parameters)
    layers = [n for n, m in model.named_modules() if m is decoder(model)]
    assert layers and layers[0] not in parts


def test_tied_weights_are_not_idle() -> None:
    model = tiny_model("gemma3", torch.float32, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any("embed_tokens" in n or "lm_head" in n for n in idle(model).parameters)
