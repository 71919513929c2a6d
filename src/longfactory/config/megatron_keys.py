"""Files for LLaMA-Factory's Megatron back ends (mcore_adapter, Megatron-Bridge), read as runs: how
many devices share a sample stays, what places weights and chooses kernels has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longfactory.config.fields import coerce, plain
from longfactory.errors import ConfigError

SHARING = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)
"""By each of these a sample lies on so many devices."""
NO_EFFECT = (
    *("virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "sequence_parallel"),
    *("use_distributed_optimizer", "overlap_param_gather", "overlap_grad_reduce"),
    *("moe_grouped_gemm", "moe_token_dispatcher_type", "recompute_granularity"),
    *("recompute_method", "recompute_num_layers", "bias_activation_fusion", "apply_rope_fusion"),
    *("masked_softmax_fusion", "cross_entropy_loss_fusion", "export_hf_on_finish"),
)
"""Where weights lie, what is recomputed, which kernels run, and that a folder of Hugging Face's is
written at the end (it always is)."""
MIXED = {"bf16_mixed": "bf16", "bf16": "bf16", "16_mixed": "fp16", "fp16_mixed": "fp16"}
KEYS = frozenset(
    {
        *(name for name in SHARING if name != "context_parallel_size"),
        *(name for name in NO_EFFECT if name != "sequence_parallel"),
        *("use_packed_sequences", "megatron_pretrained_checkpoint"),
    }
)
"""Keys that no other file has; one of them makes a file Megatron's."""


def is_megatron(values: Mapping[str, Any]) -> bool:
    """Whether a file has Megatron's keys."""
    return any(name in KEYS for name in values)


def translated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A Megatron file's keys under the names that they have here, and what the user should know.

    Raises:
        ConfigError: it asks for what there is not, a sentence each.
    """
    out = {
        name: value
        for name, value in values.items()
        if name not in (*KEYS, *SHARING, *NO_EFFECT, "mixed_precision")
    }
    notes = [
        "This is a file for LLaMA-Factory's Megatron back ends: it is read as a run of Hugging"
        " Face's model."
    ]
    sizes = {name: coerce(values[name], int, name) for name in SHARING if values.get(name)}
    together = math.prod(sizes.values())
    if together > 1:
        shown = ", ".join(f"{name}: {size}" for name, size in sizes.items() if size > 1)
        kept = out.setdefault("sequence_parallel_size", together)
        notes.append(
            f"{shown}: as many devices share a sample here, by sequence parallelism"
            f" (sequence_parallel_size: {plain(str(kept))})."
        )
    if unused := [name for name in NO_EFFECT if name in values]:
        notes.append(f"{', '.join(unused)}: no effect here.")
    problems: list[str] = []
    precision = values.get("mixed_precision")
    if precision is not None and str(precision) in MIXED:
        out.setdefault(MIXED[str(precision)], True)
    elif precision is not None:
        problems.append(
            f"mixed_precision: got {plain(str(precision))}, expected one of {', '.join(MIXED)}."
        )
    if values.get("use_packed_sequences") is not None:
        out.setdefault("packing", values["use_packed_sequences"])
    if values.get("megatron_pretrained_checkpoint") is not None:
        problems.append(
            "megatron_pretrained_checkpoint is refused: Megatron's checkpoints are not read. Give"
            " model_name_or_path a folder that transformers reads."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return out, notes
