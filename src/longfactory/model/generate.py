"""Generation with a model, as the generation keys of a configuration say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel

from longfactory.data.template_table import TABLE
from longfactory.errors import UserError
from longfactory.sp import hf


def stop_tokens(model: Any, tokenizer: Any, template: str | None) -> list[int]:
    """Ids that end an answer: the tokenizer's eos, those of the model's own generation settings,
    and the stop words of a named template.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])}
    if template in TABLE:
        found = {word: tokenizer.convert_tokens_to_ids(word) for word in TABLE[template].stop_words}
        ids |= {
            i
            for word, i in found.items()
            if i is not None and tokenizer.convert_ids_to_tokens(i) == word
        }
    return sorted(i for i in ids if i is not None)


def generation_arguments(
    generating: Any, tokenizer: Any, prompt_length: int, stops: Sequence[int]
) -> dict[str, Any]:
    """Keyword arguments of `generate` from the generation keys
    (`config.arguments.GeneratingArguments`).

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
        "pad_token_id": (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ),
    }
    if g.max_new_tokens > 0:
        out["max_new_tokens"] = g.max_new_tokens
    else:
        if prompt_length >= g.max_length:
            raise UserError(
                f"max_length: {g.max_length} leaves no room after {prompt_length} tokens. Raise it,"
                " or set max_new_tokens."
            )
        out["max_length"] = g.max_length
    if out["do_sample"]:
        out |= {"temperature": g.temperature, "top_p": g.top_p, "top_k": g.top_k}
    if g.num_beams > 1:
        out["length_penalty"] = g.length_penalty
    return out


@contextlib.contextmanager
def attention_with_cache(model: Any) -> Iterator[None]:
    """While open, a model that was prepared for rows uses PyTorch's attention, or its own where it
    takes no other; both have masks and a cache of keys and values.

    Args:
        model: a transformers model, perhaps inside PEFT.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    text = inner.config.get_text_config()
    decoders = [m for m in inner.modules() if isinstance(m, PreTrainedModel) and m.config is text]
    can = all(m._supports_sdpa for m in decoders) and not hf.has_softcap(text)
    name = "sdpa" if can else "eager"
    inner.set_attn_implementation(hf.of_text(inner.config, name))
    try:
        yield
    finally:
        inner.set_attn_implementation(hf.of_text(inner.config, before))


# Sampling settings that mean nothing while do_sample is false, with the values that transformers
# accepts there.
SAMPLING = {
    "temperature": (None, 1.0),
    "top_p": (None, 1.0),
    "top_k": (None, 50),
    "min_p": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
}


def make_generation_config_valid(model: Any) -> list[str]:
    """Changes what transformers refuses to save in a model's generation settings; published
    checkpoints carry such settings.

    Sampling settings beside `do_sample: false` are kept, with `do_sample: true`. Whatever else is
    refused gets transformers' default.

    Args:
        model: a transformers model, perhaps inside PEFT. Changed in place.
    Returns:
        One phrase for each change; none where the settings were valid.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    generation = getattr(inner, "generation_config", None)
    if generation is None:
        return []
    changes = []
    sampling = {
        key: getattr(generation, key, None)
        for key, neutral in SAMPLING.items()
        if getattr(generation, key, None) not in neutral
    }
    if generation.do_sample is not True and sampling:
        found = ", ".join(f"{key}: {value}" for key, value in sampling.items())
        changes.append(f"do_sample: {generation.do_sample} beside {found} became do_sample: true")
        generation.do_sample = True
    default = type(generation)()
    while (refusal := _refusal(generation)) is not None:
        # The refusal names the setting in its first quoted words.
        named = [
            name
            for name in re.findall(r"`(\w+)", refusal)
            if getattr(generation, name, None) != getattr(default, name, None)
        ]
        if not named:
            kept = {
                key: getattr(generation, key, None)
                for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            }
            inner.generation_config = type(generation)(**kept)
            changes.append(
                "all settings but the token ids became transformers' defaults"
                f" ({' '.join(refusal.split())[:200]})"
            )
            break
        value = getattr(generation, named[0])
        if hasattr(default, named[0]):
            setattr(generation, named[0], getattr(default, named[0]))
        else:
            delattr(generation, named[0])
        changes.append(f"{named[0]}: {value} became {getattr(default, named[0], 'absent')}")
    return changes


def _refusal(generation: Any) -> str | None:
    """Why transformers would not save these settings; None where it would."""
    try:
        generation.validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        return str(error)
    return None
