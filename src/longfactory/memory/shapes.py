"""Numbers that describe a model, the machines it runs on, and what is trained on them."""

from __future__ import annotations

import dataclasses
from typing import Any

from longfactory.sp.hf import values_of_layers


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder model. Counts of parameters are whole numbers; `ffn` is the width of what one
    token's MLP computes at once.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int
    layer_parameters: int  # all parameters of one layer
    active_layer_parameters: int  # those that one token passes: fewer in a mixture of experts
    trainable: int
    written_layer: bool  # the decoder layer has a hand-written function (see docs/memory.md)
    head_trained: bool = True  # the output layer's weight
    adapters: bool = False  # what is trained is spread over all layers, not some layers whole
    width: int = 2  # bytes of a number as layers compute it: 2 in bf16 and fp16, 4 in fp32

    @property
    def attention_parameters(self) -> int:
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def hidden_bytes(self) -> int:
        """Of one token's hidden state."""
        return self.width * self.hidden

    @property
    def attention_bytes(self) -> int:
        """Of one token's queries, or of its attention output, in one layer."""
        return self.width * self.heads * self.head_dim

    @property
    def key_bytes(self) -> int:
        """Of one token's keys, or of its values, in one layer."""
        return self.width * self.kv_heads * self.head_dim

    @property
    def temporary_bytes(self) -> int:
        """Of one token's temporaries in the MLP, projections and norms of one layer: six MLP-wide
        and eight hidden-wide numbers.
        """
        return 6 * self.width * self.ffn + 8 * self.hidden_bytes

    @property
    def saved_attention_bytes(self) -> int:
        """Of one token's attention output and log-sum-exp, in one layer."""
        return self.attention_bytes + 4 * self.heads

    @property
    def trained_layer_parameters(self) -> int:
        """Trained parameters of one layer, at most."""
        return (
            self.trainable // self.layers
            if self.adapters
            else min(self.layer_parameters, self.trainable)
        )

    @classmethod
    def of(
        cls,
        config: Any,
        trainable: int | None = None,
        parameters: int | None = None,
        lora: bool = False,
        head_trained: bool | None = None,
        width: int = 2,
    ) -> ModelShape:
        """From a transformers configuration.

        Args:
            trainable: parameters that are trained; by default all, or a hundredth with `lora`.
            parameters: all parameters, where known; else counted from the configuration.
            lora: adapters sit in the layers, so that the hand-written layer is not used.
            head_trained: the output layer is; by default where all parameters are.
            width: bytes of a number as layers compute it.
        """
        c = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = c.num_attention_heads
        kv = getattr(c, "num_key_value_heads", None) or heads
        dim = max(given or c.hidden_size // heads for given in values_of_layers(c, "head_dim"))
        ffn = max(given or 4 * c.hidden_size for given in values_of_layers(c, "intermediate_size"))
        attention = c.hidden_size * dim * 2 * (heads + kv)
        experts = getattr(c, "num_experts", None) or getattr(c, "num_local_experts", None) or 0
        if experts:
            ffn = max(given or ffn for given in values_of_layers(c, "moe_intermediate_size"))
            used = getattr(c, "num_experts_per_tok", None) or 1
            layer, active, ffn = (
                attention + 3 * experts * c.hidden_size * ffn,
                attention + 3 * used * c.hidden_size * ffn,
                ffn * used,
            )
        else:
            layer = active = attention + 3 * c.hidden_size * ffn
        tied = bool(getattr(c, "tie_word_embeddings", False))
        total = parameters or c.num_hidden_layers * layer + c.vocab_size * c.hidden_size * (
            1 if tied else 2
        )
        written = c.model_type in ("llama", "mistral", "qwen2", "qwen3") and not lora
        if lora and trainable is None:
            trainable, head_trained = total // 100, bool(head_trained)
        return cls(
            c.num_hidden_layers,
            c.hidden_size,
            ffn,
            heads,
            kv,
            dim,
            c.vocab_size,
            total,
            layer,
            active,
            total if trainable is None else trainable,
            written,
            trainable in (None, total) if head_trained is None else head_trained,
            lora,
            width,
        )


Rates = tuple[float, float, float]
"""FLOP/s of matrix products, of attention forward and of attention backward."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """One kind of GPU, how many of them share a host, and measured rates.

    Rates are what long sequences reach, in FLOP/s and bytes/s: matrix products, attention forward
    and backward, pinned copies each way, host memory as the optimizer uses it, and gathering
    parameters over the links between GPUs.
    """

    gpu_bytes: int
    host_bytes: int
    gpus: int = 1  # of the run
    gpus_per_host: int = 1
    gemm: float = 650e12
    attention_forward: float = 570e12
    attention_backward: float = 530e12
    copies: float = 50e9
    host_memory: float = 14e9  # measured beside one H100, 16 cores
    links: float = 200e9
    # products, attention forward and backward where layers compute in fp32
    float32: Rates = (43e12, 25e12, 20e12)

    def computing(self, width: int) -> Machine:
        """This machine with the rates of fp32 in place of those of bf16, where numbers have 4
        bytes.
        """
        if width == 2:
            return self
        gemm, forward, backward = self.float32
        return dataclasses.replace(
            self, gemm=gemm, attention_forward=forward, attention_backward=backward
        )

    @property
    def flop_per_byte(self) -> float:
        """FLOP of attention in the time of a byte between two GPUs of a host: what `auto` weighs
        messages by.
        """
        return self.attention_forward / self.links

    @property
    def on_host(self) -> int:
        """GPUs of the run that share one host's memory."""
        return min(self.gpus, self.gpus_per_host)


# name -> (bytes of memory, GEMM, attention forward, attention backward, pinned copies, links).
# Hopper: measured; others: the vendor's peak times 0.65, and of the links times 0.45, which is what
# Hopper reaches of its 450 GB/s each way (NVLink; PCIe for the L40 and the 4090).
GPUS: dict[str, tuple[float, float, float, float, float, float]] = {
    "H100": (80e9, 650e12, 570e12, 530e12, 50e9, 200e9),
    "H200": (141e9, 650e12, 570e12, 530e12, 50e9, 200e9),
    "B200": (180e9, 1450e12, 900e12, 800e12, 50e9, 400e9),
    "A100": (80e9, 220e12, 190e12, 160e12, 20e9, 135e9),
    "A800": (80e9, 220e12, 190e12, 160e12, 20e9, 90e9),
    "L40": (48e9, 120e12, 110e12, 100e12, 20e9, 14e9),
    "4090": (24e9, 120e12, 110e12, 100e12, 20e9, 14e9),
}

# In fp32: the vendor's peak outside the tensor cores times 0.65 for products; with `tf32: true` the
# peak of TF32 times 0.65. Attention is PyTorch's memory-efficient kernel, three TF32 products for
# one of fp32: a fifth of a third of the TF32 peak forward, a sixth backward. None of these is
# measured yet; benchmarks/attention_fp32.py measures attention.
FLOAT32: dict[str, tuple[float, float]] = {  # name -> (peak of fp32, peak of TF32)
    "H100": (67e12, 495e12),
    "H200": (67e12, 495e12),
    "B200": (75e12, 1100e12),
    "A100": (19.5e12, 156e12),
    "A800": (19.5e12, 156e12),
    "L40": (91e12, 91e12),
    "4090": (83e12, 83e12),
}


def float32_rates(gpu: str, tf32: bool = False) -> Rates:
    """What layers that compute in fp32 reach on a kind of GPU; `tf32`: products may round to 10
    bits of mantissa.

    Attention: an H100 reaches 47 TFLOP/s forward and 38 backward
    (benchmarks/results/attention_fp32.md), shares of its TF32 peak that other GPUs are taken to
    reach as well. Products: a share of the peak that was not measured.
    """
    peak, peak_tf32 = next(
        (peaks for name, peaks in FLOAT32.items() if name.lower() in gpu.lower()), FLOAT32["A100"]
    )
    return 0.65 * (peak_tf32 if tf32 else peak), 0.095 * peak_tf32, 0.077 * peak_tf32


def machine(
    gpu: str,
    gpus: int,
    host_bytes: float,
    gpus_per_host: int | None = None,
    gpu_bytes: float | None = None,
    tf32: bool = False,
) -> Machine:
    """The machine with `gpus` of a kind whose name contains one of `GPUS`; rates of an A100 where
    the kind is unknown.
    """
    known = next(
        (rates for name, rates in GPUS.items() if name.lower() in gpu.lower()), GPUS["A100"]
    )
    memory, gemm, forward, backward, copies, links = known
    return Machine(
        int(memory if gpu_bytes is None else gpu_bytes),
        int(host_bytes),
        gpus,
        gpus_per_host or min(gpus, 8),
        gemm,
        forward,
        backward,
        copies,
        links=links,
        float32=float32_rates(gpu, tf32),
    )


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """What is trained, and on what.

    Args:
        tokens: T, tokens of the longest row.
        sp: GPUs that share a row.
        sharded: parameters, gradients and states are spread over all GPUs (FSDP2, ZeRO-3), else
            each GPU has all.
        master: bytes of a trained weight as it is stored: 4 for fp32 masters (FSDP2), 2 for bf16
            with a split master.
        accumulates: gradients are there from the start of a backward pass: those of earlier
            micro-batches, or the buffers of ZeRO (those of DDP, where parameters are not sharded
            over several GPUs, are seen here). Those of split masters go where the states are, and
            are summed there in fp32.
        state_bytes: of the optimizer's states of a trained weight on the GPU, where masters are not
            split.
        leavable: gradients are final when backward gives them, so that they can leave during
            backward where states are on the host. DDP's are not.
        overlaps: nothing is clipped either, so that states on the host are updated while backward
            runs, and gradients leave with that.
    """

    shape: ModelShape
    machine: Machine
    tokens: int
    sp: int = 1
    sharded: bool = True
    master: int = 4
    accumulates: bool = False
    state_bytes: float = 8
    leavable: bool = False
    overlaps: bool = False

    def __post_init__(self) -> None:
        if self.machine.gpus > 1 and not self.sharded:  # DDP
            object.__setattr__(self, "accumulates", True)
            object.__setattr__(self, "leavable", False)

    @property
    def local(self) -> int:
        return -(-self.tokens // self.sp)

    @property
    def shards(self) -> int:
        return self.machine.gpus if self.sharded else 1
