"""`rope_scaling`: rotary positions that are stretched beyond the length a model was trained for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from longfactory.config.folder import keys_beside
from longfactory.errors import UserError

STRETCHES = (
    *("factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
)
"""Parameters of one kind of stretching, which another kind does not take over."""


def reach(config: Any) -> tuple[int, int] | None:
    """For how many positions a model was made, at the least and at the most; None where its
    configuration does not say.

    Checkpoints differ in whether `max_position_embeddings` counts a stretch: Qwen's model cards add
    YaRN and leave it, Gemma 3 counts its linear factor, which does not say from where it stretches.
    Llama 3's factor is of wavelengths, not of lengths: 8 over 8,192 for 131,072, or 32.
    """
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if not own:
        return None
    rope = _turned(text)
    before = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "llama3" and before and own > before:
        return own, own
    most = max(own, int((before or own) * (rope.get("factor") or 1)))
    unknown = before is None and rope.get("rope_type") == "linear"
    return (own if unknown else most), most


def stretch(config: Any, kind: str, cutoff_len: int) -> None:
    """Stretches the positions of a configuration to `cutoff_len`, by LLaMA-Factory's rule: factor =
    ceil(cutoff_len / trained length). Nothing is done where the model reaches as far.

    The trained length is that from before an earlier stretch: a model that YaRN took from 4,096 to
    8,192 has for 16,384 a factor of 4 over 4,096. 2 over 8,192 would be other positions than it was
    trained with, also for short texts.

    Where each kind of layer has its own rotary parameters, those of full attention are stretched; a
    window does not grow.

    Raises:
        UserError: this kind is not for this model.
    """
    text = config.get_text_config()
    far = reach(config)
    if far is None or cutoff_len <= far[0]:
        return
    given = dict(getattr(text, "rope_parameters", None) or {})
    if not given:
        raise UserError(
            f"rope_scaling: models of type {config.model_type} have no rotary positions. Leave it"
            f" out, and set cutoff_len: {far[0]}."
        )
    by_layer = any(isinstance(v, dict) for v in given.values())
    if by_layer and not isinstance(given.get("full_attention"), dict):
        raise UserError(
            f"rope_scaling: models of type {config.model_type} have rotary parameters for"
            f" {', '.join(given)}, of which none is full_attention. Leave rope_scaling out and edit"
            " the model's config.json."
        )
    rope = dict(given["full_attention"]) if by_layer else given
    own = rope.get("rope_type", "default")
    if own == "linear" and "original_max_position_embeddings" not in rope:
        raise UserError(
            f"rope_scaling: the model's positions are already stretched {rope.get('factor'):g}"
            " times, and its config.json does not say from which length"
            " (original_max_position_embeddings). Leave rope_scaling out and edit rope_parameters"
            " and max_position_embeddings there."
        )
    trained = original = rope.get("original_max_position_embeddings") or (
        text.max_position_embeddings
    )
    if own == kind == "llama3":
        trained = far[0] / rope["factor"]  # from where its factor would be one of lengths
    if own != kind:
        rope = {name: value for name, value in rope.items() if name not in STRETCHES}
    rope.update(rope_type=kind, factor=float(math.ceil(cutoff_len / trained)))
    if kind in ("yarn", "llama3", "dynamic"):
        rope["original_max_position_embeddings"] = original
    if kind == "llama3":
        rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | rope
    text.rope_parameters = {**given, "full_attention": rope} if by_layer else rope
    text.max_position_embeddings = int(trained * rope["factor"])
    try:
        text.validate()
    except Exception as error:  # of huggingface_hub, without a public name
        why = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"rope_scaling: {kind} is not for models of type {config.model_type}: {why}"
        ) from error


def in_words(before: Any, after: Any, kind: str, cutoff_len: int) -> tuple[str, bool]:
    """What `rope_scaling` made of a configuration, and whether that is a warning.

    Args:
        before: without the run's rope_scaling.
        after: with it.
    """
    own, now = _turned(before.get_text_config()), _turned(after.get_text_config())
    if not differ(before, after):
        far = reach(before)
        has = f"has {far[0]:,} positions" if far else "does not say how many positions it has"
        says = f"rope_scaling: {kind} has no effect: the model {has}"
        return f"{says}, and cutoff_len is {cutoff_len:,}.", True
    says = f"rope_scaling: {kind} stretches the model's positions {now['factor']:g} times"
    if (was := own.get("rope_type", "default")) not in ("default", kind):
        return f"{says}, in the place of its own {was}, with which it was trained.", True
    return f"{says}.", False


@dataclasses.dataclass(frozen=True)
class Trained:
    """The keys that an adapter's positions follow from."""

    rope_scaling: Any
    cutoff_len: int


def of_adapter(adapter: str) -> Trained | None:
    """What the run of an adapter's folder, or of a checkpoint's, was given; None where its keys are
    not there. The adapter's own files say nothing of positions.
    """
    given = keys_beside(adapter)
    cutoff = given.get("cutoff_len")
    return Trained(given.get("rope_scaling"), cutoff) if isinstance(cutoff, int) else None


def differ(before: Any, after: Any) -> bool:
    """Whether two configurations turn positions differently."""
    return _turned(before.get_text_config()) != _turned(after.get_text_config())


def _turned(text: Any) -> dict[str, Any]:
    """Rotary parameters of full attention; empty where no positions are turned."""
    rope = getattr(text, "rope_parameters", None) or {}
    return rope.get("full_attention", rope) or {}
