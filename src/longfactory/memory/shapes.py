"""Numbers that describe a model, the machines it runs on, and what is trained on them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from longfactory.memory.layer_kinds import LayerKind, plain_kinds


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A decoder model. Counts of parameters are whole numbers; heads and widths are those of its
    widest layers; `ffn` is the width of what one token's MLP computes at once.
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
    written_layer: bool  # some layers have a hand-written function (see docs/memory.md)
    head_trained: bool = True  # the output layer's weight
    adapters: bool = False  # what is trained is spread over all layers, not some layers whole
    adapted_experts: bool = False  # routed experts have adapters too
    tied: bool = False  # the embedding is the output layer's weight
    width: int = 2  # bytes of a number as layers compute it: 2 in bf16 and fp16, 4 in fp32
    quantized: int = 0  # frozen parameters that are held in fewer bits
    quantized_bytes: float = 0.5  # of one of them, with its share of the scales
    kinds: tuple[LayerKind, ...] = ()  # of its layers, each once
    order: tuple[int, ...] = ()  # the place in `kinds` of each layer's

    @property
    def frozen_bytes(self) -> float:
        """Of the weights that are not trained: with adapters of all that the model has, as those,
        and modules that are trained beside them, are copies.
        """
        frozen = self.parameters - (0 if self.adapters else self.trainable)
        quantized = min(self.quantized, frozen)
        return self.width * (frozen - quantized) + self.quantized_bytes * quantized

    @property
    def layer_bytes(self) -> float:
        """Of one layer's weights, as they are held."""
        quantized = min(self.quantized / self.layers, self.layer_parameters)
        return self.width * (self.layer_parameters - quantized) + self.quantized_bytes * quantized

    @functools.cached_property
    def layers_of_kinds(self) -> tuple[tuple[LayerKind, int], ...]:
        """The kinds of layers, and how many there are of each."""
        return tuple((kind, self.order.count(place)) for place, kind in enumerate(self.kinds))

    @functools.cached_property
    def linear_parameters(self) -> int:
        """Of the layers' linear maps, but for routed experts."""
        each = (
            (kind.mixer_parameters + kind.dense_parameters) * n for kind, n in self.layers_of_kinds
        )
        return sum(each)

    @functools.cached_property
    def routed_parameters(self) -> int:
        """Of the layers' routed experts."""
        return sum(kind.expert_parameters * count for kind, count in self.layers_of_kinds)

    @functools.cached_property
    def saved_of_layers(self) -> tuple[int, ...]:
        """Bytes of one token's attention output and log-sum-exp, in each layer."""
        each = [self.width * kind.outputs + 4 * kind.heads for kind in self.kinds]
        return tuple(each[place] for place in self.order)

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def hidden_bytes(self) -> int:
        """Of one token's hidden state, as layers compute it."""
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
    def saved_attention_bytes(self) -> int:
        """Of one token's attention output and log-sum-exp, in the layer that has most."""
        return max(self.saved_of_layers)

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
        quantized: int = 0,
        quantized_bytes: float = 0.5,
        layers: Sequence[LayerKind] | None = None,
        written: bool = True,
        adapted_experts: bool = False,
    ) -> ModelShape:
        """From a transformers configuration.

        Args:
            trainable: parameters that are trained; by default all, or a hundredth with `lora`.
            parameters: all parameters, where known; else counted from the configuration.
            lora: adapters sit in the layers.
            head_trained: the output layer is; by default where all parameters are.
            width: bytes of a number as layers compute it.
            quantized, quantized_bytes: parameters that are held in fewer bits, and bytes of one.
            layers: the kind of each layer (`kinds_of`); without it those of Llama's shape.
            written: the hand-written layer may be used, where the family has one.
            adapted_experts: routed experts have adapters too.
        """
        c = config.get_text_config() if hasattr(config, "get_text_config") else config
        layers = plain_kinds(c) if layers is None else layers
        kinds = tuple(dict.fromkeys(layers))
        widest = max(kinds, key=lambda kind: kind.queries)
        layer = max(kind.parameters for kind in kinds)
        tied = bool(getattr(c, "tie_word_embeddings", False))
        total = parameters or sum(kind.parameters for kind in layers) + (
            c.vocab_size * c.hidden_size * (1 if tied else 2)
        )
        written &= any(kind.written for kind in kinds)
        if lora and trainable is None:
            trainable, head_trained = total // 100, bool(head_trained)
        return cls(
            layers=len(layers),
            hidden=c.hidden_size,
            ffn=max(kind.dense_width + kind.expert_width for kind in kinds),
            heads=widest.heads,
            kv_heads=max(kind.kv_heads for kind in kinds),
            head_dim=widest.head_dim,
            vocab=c.vocab_size,
            parameters=total,
            layer_parameters=layer,
            active_layer_parameters=max(
                kind.mixer_parameters + kind.mlp_parameters for kind in kinds
            ),
            trainable=total if trainable is None else trainable,
            written_layer=written,
            head_trained=trainable in (None, total) if head_trained is None else head_trained,
            adapters=lora,
            adapted_experts=adapted_experts,
            tied=tied,
            width=width,
            quantized=quantized,
            quantized_bytes=quantized_bytes,
            kinds=kinds,
            order=tuple(kinds.index(kind) for kind in layers),
        )


Rates = tuple[float, float, float]
"""FLOP/s of matrix products, of attention forward and of attention backward."""


FLASH = 0.57
"""Of the rates of cuDNN's attention on Hopper, what FlashAttention 2 reaches (attention.md in
benchmarks/results: 334 of 596 TFLOP/s forward, 317 of 554 in all). It computes windows and heads
above 128 dims there, and everything on other GPUs. The engine's own kernels, which compute
soft-caps, are taken to be as fast, and were not measured."""
WIDE_FLASH = 0.33
"""The same with heads above 192 dims: two runs of Gemma 3's shape on a H200 (plan_accuracy.md)."""
CUDNN_WIDE = 0.79
"""What cuDNN reaches with heads of 256 dims and no window: 433 of 549 TFLOP/s (kernels.md)."""
CHOSEN = 0.08
"""The same of attention over keys that an indexer chose, all earlier ones with a mask: 16 heads of
192 and 128 dims on one H200 took 12 times full attention's time at 32,768 tokens (share 0.081),
14 times at 16,384 (0.072); docs/sequence_parallelism.md."""


LAYER_START = 17e-3
"""Seconds that a process takes to start all kernels and collectives of one layer of a step whose
parameters FSDP2 shards, with its share of the optimizer's: steps of 28 layers on two H200 took 0.48
s with rows of 4,096 tokens and 0.50 s with 16,384, where products take 0.06 and 0.3
(benchmarks/results/plan_accuracy.md). Without FSDP2 it was not measured, and is left out."""
LATENCY, NETWORK_LATENCY = 10e-6, 25e-6
"""Seconds until a message arrives, beside its bytes, with what NCCL takes to send it: over NVLink
or PCIe, and over InfiniBand. Taken, not measured; `plan --network-latency-us` sets the latter."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """One kind of GPU, how many of them share a host, and measured rates.

    Rates are what long sequences reach, in FLOP/s and bytes/s: matrix products, attention forward
    and backward, pinned copies each way, host memory as the optimizer uses it, a GPU's own memory
    as norms and activations use it, and gathering parameters over the links between GPUs.
    """

    gpu_bytes: int
    host_bytes: int
    gpus: int = 1  # of the run
    gpus_per_host: int = 1
    gemm: float = 650e12
    attention_forward: float = 570e12
    attention_backward: float = 530e12
    copies: float = 50e9
    host_memory: float = 40e9
    memory: float = 2.3e12
    flash: float = FLASH  # of attention's rates, what tiles reach that cuDNN does not compute
    wide_flash: float = WIDE_FLASH  # and those of them with heads above 192 dims
    wide_heads: float = CUDNN_WIDE  # tiles with heads of 256 dims that cuDNN computes
    links: float = 200e9
    network: float = 40e9  # of one GPU to those of other hosts
    layer_start: float = LAYER_START
    # seconds until a message arrives, beside its bytes: within a host, and between hosts
    latency: float = LATENCY
    network_latency: float = NETWORK_LATENCY
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

    def attention_share(self, kind: LayerKind, tokens: int) -> float:
        """Of attention's rates, what a kind of layer reaches in a row of `tokens`."""
        if kind.chooses(tokens):
            return CHOSEN * self.flash / FLASH
        window = kind.reach and not kind.within_chunk
        if kind.head_dim > 192:
            plain = kind.head_dim == kind.value_dim == 256 and not window and not kind.softcap
            return self.wide_heads if plain else self.wide_flash
        latent = (kind.head_dim, kind.value_dim) == (192, 128)
        wide = kind.head_dim > 128 and not latent
        return self.flash if window or kind.softcap or wide else 1.0

    @property
    def flop_per_byte(self) -> float:
        """FLOP of attention in the time of a byte between two GPUs of a host: what `auto` weighs
        messages by.
        """
        return self.attention_forward / self.links

    def between(self, gpus: int) -> float:
        """Bytes a second that each of a group of GPUs receives from the others: where the group
        spans hosts, what its slowest link gives.
        """
        return self.links if gpus <= self.gpus_per_host else min(self.links, self.network)

    def waits(self, gpus: int) -> float:
        """Seconds until a message arrives within a group of GPUs: where it spans hosts, the
        slowest link's.
        """
        return self.latency if gpus <= self.gpus_per_host else self.network_latency

    @property
    def on_host(self) -> int:
        """GPUs of the run that share one host's memory."""
        return min(self.gpus, self.gpus_per_host)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A kind of GPU, from its vendor's data sheet: bytes of memory; FLOP/s without sparsity in
    bf16 (fp16 where it has no bf16), outside the tensor cores in fp32, and in TF32; bytes/s one way
    to the host and to another GPU, and of its own memory.
    """

    memory: float
    bf16: float
    fp32: float
    tf32: float
    host: float
    link: float
    own: float = 2e12
    cudnn: bool = False  # its attention is cuDNN's, where that computes a tile
    cudnn_wide: bool = False  # also with heads of 256 dims

    def rate(self, width: int, tf32: bool) -> float:
        """FLOP/s of products by the data sheet, for numbers of so many bytes."""
        if width == 2:
            return self.bf16
        return self.tf32 if tf32 else self.fp32


PCIE3, PCIE4, PCIE5 = 15.75e9, 31.5e9, 63e9

# NVLink's rates are half of the data sheets', which count both ways.
GPUS: dict[str, Gpu] = {
    "H100": Gpu(80e9, 989e12, 67e12, 495e12, PCIE5, 450e9, 3.35e12, True, True),
    "H200": Gpu(141e9, 989e12, 67e12, 495e12, PCIE5, 450e9, 4.8e12, True, True),
    "GH200": Gpu(96e9, 989e12, 67e12, 495e12, 450e9, 450e9, 4.0e12, True, True),
    "H800": Gpu(80e9, 989e12, 67e12, 495e12, PCIE5, 200e9, 3.35e12, True, True),
    "H20": Gpu(96e9, 148e12, 44e12, 74e12, PCIE5, 450e9, 4.0e12, True, True),
    "B200": Gpu(180e9, 2250e12, 75e12, 1100e12, PCIE5, 900e9, 8.0e12, True),
    "B300": Gpu(270e9, 2250e12, 77e12, 1100e12, PCIE5, 900e9, 8.0e12, True),
    "A100": Gpu(80e9, 312e12, 19.5e12, 156e12, PCIE4, 300e9, 2.039e12),
    "A800": Gpu(80e9, 312e12, 19.5e12, 156e12, PCIE4, 200e9, 2.039e12),
    "A10": Gpu(24e9, 125e12, 31.2e12, 62.5e12, PCIE4, PCIE4, 0.6e12),
    "A40": Gpu(48e9, 149.7e12, 37.4e12, 74.8e12, PCIE4, PCIE4, 0.696e12),
    "A6000": Gpu(48e9, 154.8e12, 38.7e12, 77.4e12, PCIE4, PCIE4, 0.768e12),
    "L4": Gpu(24e9, 121e12, 30.3e12, 60e12, PCIE4, PCIE4, 0.3e12),
    "L40": Gpu(48e9, 181e12, 90.5e12, 90.5e12, PCIE4, PCIE4, 0.864e12),
    "L40S": Gpu(48e9, 362e12, 91.6e12, 183e12, PCIE4, PCIE4, 0.864e12),
    "3090": Gpu(24e9, 71e12, 35.6e12, 35.6e12, PCIE4, PCIE4, 0.936e12),
    "4090": Gpu(24e9, 165e12, 82.6e12, 82.6e12, PCIE4, PCIE4, 1.008e12),
    "5090": Gpu(32e9, 209.5e12, 104.8e12, 104.8e12, PCIE5, PCIE5, 1.792e12),
    "V100": Gpu(32e9, 125e12, 15.7e12, 15.7e12, PCIE3, 150e9, 0.9e12),
    "T4": Gpu(16e9, 65e12, 8.1e12, 8.1e12, PCIE3, PCIE3, 0.32e12),
    "MI300X": Gpu(192e9, 1307e12, 163.4e12, 653.7e12, PCIE5, 448e9, 5.3e12),
}
"""By names as `torch.cuda.get_device_name` has them: a whole word, or the head of one that letters
end."""

# What long sequences reach of a data sheet's rates. Measured on Hopper (products, attention,
# copies, gathering; fp32 attention: benchmarks/results/attention_fp32.md); others are taken to
# reach as much. Of its own memory's rate a GPU is taken to reach 0.7. Attention in fp32 is
# PyTorch's memory-efficient kernel, three TF32 products for one of fp32. Products in fp32: a share
# that was not measured.
REACHED = {
    "gemm": 650 / 989,
    "attention_forward": 570 / 989,
    "attention_backward": 530 / 989,
    "host": 50 / 63,
    "link": 200 / 450,
    "own": 0.7,
    "fp32": 0.65,
    "fp32_attention_forward": 0.095,
    "fp32_attention_backward": 0.077,
}


# Bytes of host memory that AdamW reads and writes a second, for each core at work and for each
# process at most: 5.3 s for 7.62 B parameters beside one H200 with 16 cores, 3.6 s with 64
# (benchmarks/results/plan_accuracy.md), 2.7 s for half of them in each of two processes of 16
# threads (length_2xH200_7b.md). One host was at a third of that (length_1xH100_7b.md);
# `plan --calibrate` measures a host's own.
HOST_OF_A_CORE, HOST_OF_A_PROCESS = 2.5e9, 60e9
CORES_OF_A_GPU = 16  # where a host's cores are not known


def host_rate(processes: int, cores: int = 0) -> float:
    """Bytes/s of host memory that AdamW on the host reaches, all processes of a host together."""
    cores = cores or CORES_OF_A_GPU * processes
    return min(HOST_OF_A_CORE * cores, HOST_OF_A_PROCESS * processes)


def kind_of(name: str) -> str | None:
    """The name in `GPUS` of a GPU that its driver or a person calls so; None for one that is not
    known.
    """
    for known in sorted(GPUS, key=len, reverse=True):
        if re.search(rf"(?<![A-Za-z0-9]){known}(?![0-9A-Z])", name, re.IGNORECASE):
            return known
    return None


def machine(
    gpu: str | Gpu,
    gpus: int,
    host_bytes: float,
    gpus_per_host: int | None = None,
    gpu_bytes: float | None = None,
    tf32: bool = False,
    network: float = 40e9,
    cores: int = 0,
    network_latency: float = NETWORK_LATENCY,
) -> Machine:
    """The machines of a run with `gpus` of a kind: a name that contains one of `GPUS`, or the
    kind's own numbers. Rates of an A100 where the name is unknown (`kind_of`).

    Args:
        gpu_bytes: of one GPU's memory, where it is not the kind's usual one.
        network: bytes/s that one GPU receives from other hosts.
        network_latency: seconds until a message from another host arrives.
        cores: of one host; 0 where they are not known.
    """
    kind = gpu if isinstance(gpu, Gpu) else GPUS[kind_of(gpu) or "A100"]
    products = kind.tf32 if tf32 else kind.fp32
    wide_heads = WIDE_FLASH if kind.cudnn else WIDE_FLASH / FLASH
    if kind.cudnn_wide:
        wide_heads = CUDNN_WIDE
    return Machine(
        int(kind.memory if gpu_bytes is None else gpu_bytes),
        int(host_bytes),
        gpus,
        gpus_per_host or min(gpus, 8),
        REACHED["gemm"] * kind.bf16,
        REACHED["attention_forward"] * kind.bf16,
        REACHED["attention_backward"] * kind.bf16,
        REACHED["host"] * kind.host,
        host_memory=host_rate(min(gpus, gpus_per_host or 8), cores),
        memory=REACHED["own"] * kind.own,
        flash=FLASH if kind.cudnn else 1.0,
        wide_flash=WIDE_FLASH if kind.cudnn else WIDE_FLASH / FLASH,
        wide_heads=wide_heads,
        links=REACHED["link"] * kind.link,
        network=network,
        network_latency=network_latency,
        float32=(
            REACHED["fp32"] * products,
            REACHED["fp32_attention_forward"] * kind.tf32,
            REACHED["fp32_attention_backward"] * kind.tf32,
        ),
    )


@dataclasses.dataclass(frozen=True)
class Tower:
    """The vision tower that rows with images pass through.

    Attributes:
        parameters: of tower and projector.
        of_a_patch: numbers that autograd stores of one patch, in all layers of the tower.
        levels: features that a placeholder gets: its embedding's, and those of deeper layers.
        hidden: of the text model.
        batch: patches that are computed at a time.
        trained: tower or projector is trained: a batch is stored while its backward runs.
        linear: products of one patch in the tower's linear maps, in FLOP, once forward.
        attention: the same in its attention, for each patch that the patch sees.
        patches: of a token of the rows, on average.
        seen: patches that a patch sees, on average.
    """

    parameters: int
    of_a_patch: int
    levels: int
    hidden: int
    batch: int
    trained: bool
    linear: float = 0.0
    attention: float = 0.0
    patches: float = 0.0
    seen: float = 0.0

    def passes(self, references: int) -> float:
        """Forward passes that a step's work is as long as: of what is trained each batch is run,
        run again and differentiated; a reference model runs the tower once more.
        """
        return (4.0 if self.trained else 1.0) + references

    def bytes(self, local: int, width: int, gathered: bool) -> tuple[float, float]:
        """(all the time, while a batch is in its backward) on one GPU.

        Args:
            local: tokens of a rank, all of which may be of images.
            width: bytes of a number in a layer.
            gathered: weights are sharded, and whole during a step.
        """
        held = width * self.parameters * (1 + self.trained) if gathered else 0
        features = local * self.levels * self.hidden * width
        batch = self.batch * self.of_a_patch * width if self.trained else 0
        return held + features, batch


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
            micro-batches, or the buffers of ZeRO. Those of split masters go where the states are,
            and are summed there in fp32.
        state_bytes: of the optimizer's states of a trained weight on the GPU, where masters are not
            split.
        leavable: gradients are final when backward gives them, so that they can leave during
            backward where states are on the host. DDP's are not.
        overlaps: nothing is clipped either, so that states on the host are updated while backward
            runs, and gradients leave with that.
        pure: trained weights are in the width that layers compute in, without masters.
        reference_passes: forward passes of a step without adapters, for the reference's
            log-probabilities.
        zero: DeepSpeed's stage, 0 without it. Its weights have the width that layers compute in,
            their fp32 copies are among the states (`state_bytes` 12); whole weights are on each GPU
            but in stage 3, whole gradients in stage 1.
        mode, ulysses_degree: the schedule of sequence parallelism (`sp.context.Mode`), and GPUs
            that exchange heads where `usp` says how many.
        tower: of rows with images; None of rows of text.
        made_here: weights are random ones, which each GPU makes whole: FSDP2 shards them before the
            first step.
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
    zero: int = 0
    pure: bool = False
    reference_passes: int = 0
    mode: str = "zigzag-ring"
    ulysses_degree: int | None = None
    tower: Tower | None = None
    made_here: bool = False

    def __post_init__(self) -> None:
        if self.ddp:
            object.__setattr__(self, "leavable", False)

    @property
    def ddp(self) -> bool:
        """Several GPUs have all parameters each: DDP, whose buckets are a second copy of the
        gradients.
        """
        return self.machine.gpus > 1 and not self.sharded

    @property
    def autocast(self) -> bool:
        """All weights are fp32 and layers compute with copies of them that autocast makes, in half
        precision: one process, or DDP. FSDP2 gathers such copies. Where some layers alone are
        trained, most layers and what comes into them are in half precision.
        """
        return (
            self.shape.width == 2
            and self.master == 4
            and not (self.sharded or self.zero or self.pure)
            and self.shape.trainable == self.shape.parameters
        )

    @property
    def written_layer(self) -> bool:
        """Hand-written layers compute, where there are some: they step aside under autocast."""
        return self.shape.written_layer and not self.autocast

    def written(self, kind: LayerKind) -> bool:
        """The hand-written function computes layers of this kind."""
        return self.written_layer and kind.written

    @property
    def hidden_bytes(self) -> int:
        """Of one token's hidden state between layers: fp32 beside an fp32 embedding."""
        return self.shape.hidden * (4 if self.wide_hidden else self.shape.width)

    @property
    def wide_hidden(self) -> bool:
        """Hidden states between layers are fp32, whatever the layers compute in."""
        return self.shape.width == 4 or self.autocast

    @property
    def cast_bytes(self) -> float:
        """Of the copies of all trained weights that autocast makes, routed experts' too."""
        return float(self.shape.width * self.shape.parameters) if self.autocast else 0.0

    @property
    def held_cast_bytes(self) -> float:
        """Of those that live as long as autocast does. Those of routed experts go with what their
        layer stores.
        """
        if not self.autocast:
            return 0.0
        return self.cast_bytes - self.shape.width * self.shape.routed_parameters

    def router_bytes(self, kind: LayerKind) -> int:
        """Of one token's hidden state in fp32, which autograd stores for a trained router that
        computes with it; none where hidden states are fp32 themselves.
        """
        copies = kind.wide_router and not self.shape.adapters and not self.wide_hidden
        return 4 * kind.hidden if copies else 0

    @property
    def local(self) -> int:
        return -(-self.tokens // self.sp)

    @property
    def shards(self) -> int:
        """GPUs that the states of the optimizer are spread over."""
        return self.machine.gpus if self.sharded else 1

    @property
    def weight_shards(self) -> int:
        """GPUs that the weights are spread over."""
        return self.shards if self.zero in (0, 3) else 1

    @property
    def weight_bytes(self) -> float:
        """Of the weights on one GPU."""
        whole = self.shape.frozen_bytes + self.gradient_width * self.shape.trainable
        return whole / self.weight_shards

    @property
    def made_whole_bytes(self) -> float:
        """Of random weights that are whole on one GPU while FSDP2 shards them."""
        sharded_here = self.made_here and self.weight_shards > 1 and not self.zero
        return self.weight_bytes * self.weight_shards if sharded_here else 0.0

    @property
    def gradient_width(self) -> int:
        """Bytes of a trained weight on the GPU, and of its gradient."""
        return self.shape.width if self.zero or self.pure else self.master

    @property
    def reduced_width(self) -> int:
        """Bytes of a gradient on its way between GPUs that shard it: fp32, or bf16 between two of
        split masters (`shard.settings.fix_fsdp2_plugin`).
        """
        return 2 if self.master == 2 and self.machine.gpus == 2 and not self.zero else 4

    @property
    def gradient_bytes(self) -> float:
        """Of all gradients on one GPU."""
        return self.gradient_width * self.shape.trainable / (1 if self.zero == 1 else self.shards)
