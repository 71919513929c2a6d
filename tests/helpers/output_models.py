"""Models of every kind of output layer, and the tokens that they are compared on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longfactory.testing import tiny_model

T = 23


IDS = torch.randint(3, 97, (1, T), generator=torch.Generator().manual_seed(0))


def some_labels() -> Tensor:
    labels = torch.cat([IDS[0, 1:], torch.tensor([-100])])
    labels[4:9] = -100
    return labels


def lora(model: Any, **kwargs: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=3, **kwargs))
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator).to(p) * 0.1
    return model.double()


def with_bias(model: Any) -> Any:
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.linspace(-1, 1, head.out_features, dtype=torch.float64))
    return model


def f64(family: str, **overrides: Any) -> Any:
    return tiny_model(family, dtype=torch.float64, **overrides)


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: f64("llama", tie_word_embeddings=False),
    "bias": lambda: with_bias(f64("llama", tie_word_embeddings=False)),
    "tied": lambda: f64("llama", tie_word_embeddings=True),
    "softcap": lambda: f64("gemma2", final_logit_softcapping=2.0),
    "multiplied": lambda: f64("cohere", logit_scale=0.3),
    "divided": lambda: f64("granite", logits_scaling=3.0),
    "lora on the head": lambda: lora(
        f64("llama", tie_word_embeddings=False), target_modules=["q_proj", "lm_head"]
    ),
    "modules to save": lambda: lora(
        f64("llama", tie_word_embeddings=False),
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
    ),
    "lora elsewhere": lambda: lora(
        f64("llama", tie_word_embeddings=True), target_modules=["q_proj"]
    ),
    "lora, softcap": lambda: lora(
        f64("gemma2", final_logit_softcapping=2.0, tie_word_embeddings=False),
        target_modules=["lm_head"],
    ),
}


def gradients(model: Any) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
