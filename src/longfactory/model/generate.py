"""Generation with a model, as the generation keys of a configuration say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from longfactory.data.template_table import TABLE
from longfactory.errors import UserError


def stop_tokens(model: Any, tokenizer: Any, template: str | None) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, those of the model's own generation settings, and the stop words of a named template."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    if template in TABLE:
        found = {word: tokenizer.convert_tokens_to_ids(word) for word in TABLE[template].stop_words}
        ids |= {i for word, i in found.items() if i is not None and tokenizer.convert_ids_to_tokens(i) == word}
    return sorted(i for i in ids if i is not None)


def generation_arguments(generating: Any, tokenizer: Any, prompt_length: int, stops: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of `generate` from the generation keys (`config.arguments.GeneratingArguments`).

    Args:
        stops: ids that end an answer (`stop_tokens`).
    Raises:
        UserError: the prompt already fills `max_length`.
    """
    g = generating
    out: dict[str, Any] = {
        "do_sample": g.do_sample and g.temperature > 0,
        "num_beams": g.num_beams,
        "repetition_penalty": g.repetition_penalty,
        "eos_token_id": list(stops) or None,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    if g.max_new_tokens > 0:
        out["max_new_tokens"] = g.max_new_tokens
    else:
        if prompt_length >= g.max_length:
            raise UserError(f"max_length: {g.max_length} leaves no room after {prompt_length} tokens. Raise it, or set max_new_tokens.")
        out["max_length"] = g.max_length
    if out["do_sample"]:
        out |= {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k}
    if g.num_beams > 1:
        out["length_penalty"] = g.length_penalty
    return out


@contextlib.contextmanager
def attention_with_cache(model: Any) -> Iterator[None]:
    """While open, a model that was prepared for rows uses PyTorch's attention, which has masks and a cache of keys and values.

    Args:
        model: a transformers model, perhaps inside PEFT.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    inner.set_attn_implementation("sdpa" if inner._supports_sdpa else "eager")
    try:
        yield
    finally:
        inner.set_attn_implementation(before)
