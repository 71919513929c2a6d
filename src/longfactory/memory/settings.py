"""What the memory engine does, as data, and the user's keys for it: every key changes bytes or
seconds, none changes a gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from longfactory.errors import ConfigError


def _field(default: Any, technique: str) -> Any:
    """A field, and the `module.OBJECT` of `longfactory.memory` that states what it takes (see
    `technique.Technique`).
    """
    return dataclasses.field(default=default, metadata={"technique": technique})


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """How activations and optimizer states are kept during a step.

    Attributes:
        checkpoint: "full" stores one hidden state a layer and recomputes the layer in backward;
            "none" stores everything.
        keep_attention: fraction of the layers (the last ones) whose attention output and
            log-sum-exp are saved, so that their attention kernel never runs twice. 0 saves none, 1
            all.
        keep_mlp: fraction of the layers (the last ones) for which the hand-written function saves
            the outputs of gate and up (for a mixture of experts all that autograd stores) and of
            attention's output projection, so that backward does not recompute them.
        offload: what is offloaded to pinned host memory between forward and backward: nothing, the
            layer inputs, or the layer inputs and the saved attention outputs.
        pool_bytes: limit of that host memory for this process. What does not fit stays on the GPU.
        last_layers_on_gpu: number of last layers whose tensors stay on the GPU, because a round
            trip to the host is not worthwhile.
        layer: "auto" uses one hand-written function per decoder layer if the architecture is known
            (`layer.recognise`) and its linear layers are plain, else the Hugging Face layer;
            "generic" always uses the Hugging Face layer.
        mlp_chunk: tokens in one chunk of the layer (MLP, norms, projections); None is the whole
            local sequence at once.
        attention_groups: the hand-written layer's backward runs attention this many groups of heads
            at a time.
        segment_layers: store the input of every k-th layer only; the layers between are run forward
            once more. 1 stores all.
        late_prefetch: fetch the tensors of the next layer only when this layer's attention is done:
            less memory, a little time.
        optimizer: where AdamW's fp32 states are kept and updated.
        gradients: where they wait for the update; "host" (only with the optimizer on the host)
            offloads them during backward.
        keep_weights: under FSDP2, whether layers keep their gathered weights from forward until
            backward instead of gathering them again.
    """

    checkpoint: Literal["none", "full"] = _field("full", "checkpointed.CHECKPOINTING")
    segment_layers: int = _field(1, "offload.SEGMENTS")
    keep_attention: float = _field(0.0, "checkpointed.SAVED_ATTENTION")
    keep_mlp: float = _field(0.0, "decoder_layer.SAVED_MLP")
    offload: Literal["none", "inputs", "inputs+attention"] = _field("none", "offload.OFFLOAD")
    pool_bytes: int = 0
    last_layers_on_gpu: int = _field(1, "offload.LAST_LAYERS")
    layer: Literal["auto", "generic"] = "auto"
    mlp_chunk: int | None = _field(None, "chunked.CHUNKS")
    attention_groups: int = _field(1, "decoder_layer.ATTENTION_GROUPS")
    late_prefetch: bool = _field(False, "offload.LATE_PREFETCH")
    optimizer: Literal["gpu", "host"] = _field("gpu", "optimizer_techniques.PLACEMENT")
    gradients: Literal["gpu", "host"] = _field("gpu", "optimizer_techniques.GRADIENTS")
    keep_weights: bool = _field(False, "gathered.KEPT")

    def __post_init__(self) -> None:
        if self.checkpoint not in ("none", "full"):
            raise ConfigError(
                f"memory: checkpoint: got {self.checkpoint!r}, expected none or full."
            )
        for name in ("keep_attention", "keep_mlp"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"memory: {name}: got {getattr(self, name)}, expected a fraction of the"
                    " layers, from 0 to 1."
                )
        if self.offload not in ("none", "inputs", "inputs+attention"):
            raise ConfigError(
                f"memory: offload: got {self.offload!r}, expected none, inputs or inputs+attention."
            )
        if self.layer not in ("auto", "generic"):
            raise ConfigError(f"memory: layer: got {self.layer!r}, expected auto or generic.")
        for name in ("optimizer", "gradients"):
            if getattr(self, name) not in ("gpu", "host"):
                raise ConfigError(
                    f"memory: {name}: got {getattr(self, name)!r}, expected gpu or host."
                )
        for name, least in (
            ("attention_groups", 1),
            ("segment_layers", 1),
            ("last_layers_on_gpu", 0),
            ("pool_bytes", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"memory: {name}: got {getattr(self, name)}, expected >= {least}."
                )
        if self.mlp_chunk is not None and self.mlp_chunk < 1:
            raise ConfigError(f"memory: mlp_chunk: got {self.mlp_chunk} tokens, expected >= 1.")
        if self.checkpoint == "none" and (
            self.offload != "none"
            or self.segment_layers > 1
            or self.keep_attention > 0
            or self.keep_mlp > 0
        ):
            raise ConfigError(
                "memory: offload, segments, saved attention outputs and saved MLP activations "
                "are parts of activation checkpointing. Set checkpoint: full."
            )


# Keys that are parts of checkpointing, and the value that turns each of them off.
PARTS_OF_CHECKPOINTING: dict[str, Any] = {
    "keep_attention": 0.0,
    "keep_mlp": 0.0,
    "offload_activations": False,
    "segment_layers": 1,
    "mlp_chunk": 0,
}


def _key(default: Any, help: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A key of the YAML file, as `config.fields.arg` declares one."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryArguments:
    """What is saved, recomputed or offloaded. Nothing here changes the result."""

    memory: Literal["auto", "fast", "long"] = _key(
        "auto",
        "auto: the fastest settings that fit; fast: nothing is offloaded; long: "
        "settings for the longest sequences.",
    )
    disable_gradient_checkpointing: bool = _key(
        False, "Keep every activation instead of recomputing layers in the backward pass."
    )
    keep_attention: float | Literal["auto"] = _key(
        "auto",
        "Fraction of layers whose attention outputs are saved, so that attention is not "
        "recomputed (selective checkpointing).",
        low=0.0,
        high=1.0,
    )
    keep_mlp: float | Literal["auto"] = _key(
        "auto",
        "Fraction of layers whose MLP activations (gate and up outputs; for experts all that "
        "autograd stores) and attention output projections are saved instead of recomputed "
        "(hand-written layers).",
        low=0.0,
        high=1.0,
    )
    offload_activations: bool | Literal["auto"] = _key(
        "auto",
        "Activation offloading: layer inputs (and saved attention outputs, where it helps) "
        "wait in host memory for the backward pass.",
    )
    mlp_chunk: int | Literal["auto"] = _key(
        "auto", "Tokens per chunk of a layer (MLP, norms, projections); 0: all.", low=0, high=10**9
    )
    segment_layers: int | Literal["auto"] = _key(
        "auto", "Layers between two activation checkpoints.", low=1, high=10**4
    )
    optimizer_placement: Literal["auto", "gpu", "host"] = _key(
        "auto", "Where the optimizer states are kept."
    )
    offload_gradients: bool | Literal["auto"] = _key(
        "auto",
        "Offload gradients to host memory during the backward pass, when the optimizer states "
        "are there.",
    )
    optimizer_overlap: bool = _key(
        False, "AdamW on the host updates weights while backward runs. Needs max_grad_norm: 0."
    )
    reshard_after_forward: bool | Literal["auto"] = _key(
        "auto",
        "FSDP2: free a layer's gathered weights after its forward pass and gather them again "
        "for its backward.",
    )
    logprob_chunk: int | Literal["auto"] = _key(
        "auto", "Number of tokens whose logits are computed at a time.", low=1, high=10**9
    )
