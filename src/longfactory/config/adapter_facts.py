"""What a configuration knows of adapters (LoRA, OFT), without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longfactory.config.arguments import FinetuningArguments

ADAPTERS = ("lora", "oft")
"""Values of `finetuning_type` that train adapters beside frozen weights."""

LORA_KEYS = (
    "loraplus_lr_ratio",
    "pissa_init",
    "pissa_convert",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
)
"""Keys of LoRA that OFT does not have."""


def trains_adapters(method: FinetuningArguments) -> bool:
    """Whether the run trains adapters."""
    return method.finetuning_type in ADAPTERS


def moves_base_weights(method: FinetuningArguments) -> bool:
    """Whether adapters begin with a part of the base weights, which those lose: without its adapter
    the model is then not the one that training starts from.
    """
    return bool(method.pissa_init) or method.init_lora_weights == "olora"


def adapter_is_start(method: FinetuningArguments) -> bool:
    """Whether the model without its adapter is the one that training starts from."""
    return trains_adapters(method) and not moves_base_weights(method)


def problems(method: FinetuningArguments) -> Iterator[str]:
    """Contradictions among keys of adapters: a sentence each."""
    if method.use_llama_pro and method.finetuning_type not in ("freeze", "lora"):
        yield (
            "use_llama_pro trains the layers that were added, with finetuning_type: freeze, or"
            f" adapters on them, with lora; this run's is {method.finetuning_type}. Use one of"
            " these, or leave it out."
        )
    for name in LORA_KEYS:
        if getattr(method, name) and method.finetuning_type != "lora":
            yield (
                f"{name} is for finetuning_type: lora; this run's is {method.finetuning_type}."
                " Leave it out."
            )
    if method.finetuning_type == "oft" and method.oft_rank and method.oft_block_size:
        yield (
            "oft_rank and oft_block_size were both given: one follows from the other (their product"
            " is the layer's width). Set one of them to 0."
        )
    if method.finetuning_type == "oft" and not (method.oft_rank or method.oft_block_size):
        yield "oft_rank and oft_block_size are both 0. Give one of them, for example 32 (block)."
    if method.pissa_init and method.init_lora_weights is not None:
        yield "pissa_init and init_lora_weights both say how LoRA begins. Keep one of them."
    if method.pissa_convert and not method.pissa_init:
        yield "pissa_convert makes an ordinary LoRA adapter of PiSSA's. Set pissa_init: true."
