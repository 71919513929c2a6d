"""Bytes and seconds of one step for given memory settings, and the settings that are fastest among
those that fit: what the model and the layers take by themselves, and the sum of what each technique
states of itself (`technique.Technique`).

Everything is for one GPU and its t = T / n tokens of a row. Bytes of the layer's working set come
from reading the code in `memory/decoder_layer.py` (and its docstring) and, for other layers, from
what autograd stores while one layer is recomputed.

Time counts products at the machine's measured rates: a token's linear layers cost 2 FLOP a
parameter forward and 4 backward, causal attention 2 * T * heads * D forward and 2.5 times that
backward. What is recomputed is added; what is copied counts where it takes longer than what hides
it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from longfactory.memory import exchange
from longfactory.memory.gathered import are_gathered, kept_weights
from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob
from longfactory.memory.technique import Bytes, LayerMoments, StepMoments, Technique, Work
from longfactory.sp import sparse
from longfactory.sp.recurrent.chunked import WORKSPACE

HEAD_CHUNK_NUMBERS = 2**28  # logits that exist at once (model/token_logprobs.py)
CONTEXT = 1.5e9  # CUDA context, cuBLAS and NCCL workspaces
MARGIN = 0.92  # of the GPU's memory may be planned for: the rest is fragmentation
CAREFUL = 0.80  # above this share settings must be faster to be chosen
# Of the machine's rates, what products of linear layers and attention reach within a step.
LINEAR_SHARE, ATTENTION_SHARE = 0.92, 0.97
HOST_SHARE = 0.85  # of the host's memory, for optimizer states and offloaded activations together

# The order of a budget's items, on the GPU and on the host; others come last.
ITEMS = (
    "weights",
    "optimizer",
    "layer inputs and saved attention outputs",
    "activations",
    "gradients",
    "output layer",
    "one layer's parameters and gradients",
    "working set of a layer",
    "runtime",
)
WHOLE = "random weights, before they are sharded"
HOST_ITEMS = ("optimizer", "gradients", "layer inputs and saved attention outputs")


@functools.cache
def techniques() -> tuple[Technique, ...]:
    """The objects that the fields of MemorySettings name, in the order of the fields."""
    names = [field.metadata.get("technique") for field in dataclasses.fields(MemorySettings)]
    found = []
    for name in filter(None, names):
        module, variable = name.split(".")
        found.append(getattr(importlib.import_module(f"longfactory.memory.{module}"), variable))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Bytes by item on one GPU and, for all GPUs of a host, on the host; seconds of a step."""

    gpu: dict[str, float]
    host: dict[str, float]
    seconds: float

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def bare_layer(job: TrainingJob) -> LayerMoments:
    """Bytes while one layer is in its backward, beyond what is stored for other layers and what
    techniques state: those of the kind of layer that takes most.
    """
    each = [_bare_layer(job, kind) for kind in job.shape.kinds]
    return LayerMoments(*(max(moment) for moment in zip(*each, strict=True)))


def _bare_layer(job: TrainingJob, kind: LayerKind) -> LayerMoments:
    width, hidden = job.shape.width, job.hidden_bytes
    attention, keys = width * kind.queries, width * kind.keys_values / 2
    if job.written(kind):
        # x and dx; the gradient of attention's output projection, where it is another tensor, or
        # that of the one norm of a parallel layer
        rows = 3 if kind.norms_after or kind.norms == 1 else 2
        peak = rows * hidden + attention + 4 * keys
        if kind.head_norms:  # queries and keys before their norms
            peak += attention + keys / 2
        # what comes after attention, with the next layer's tensors on their way
        after = rows * hidden + attention + 2 * keys
    else:
        # x, norms' outputs, x2, dy, dx and temporaries; q, k, v and their gradients; out, dout; the
        # kernel's fp32 dq
        peak = 6 * hidden + 4 * attention + 6 * keys + 2 * attention
        after = 4 * hidden + 2 * attention
    if width == 4:
        # key heads repeated for their query heads, and the gradients of those copies
        # (sp/backends/efficient.py)
        peak += 4 * attention
    # what a recurrence stores, and the gradients of a third of it at once; some heads' chunks
    peak += 1.3 * kind.recurrent_bytes
    chunks = min(kind.recurrent_workspace * job.local, WORKSPACE) + _masked_bytes(job, kind)
    after += job.temporary_bytes(kind) + kind.recurrent_bytes
    return LayerMoments(peak * job.local + chunks, after * job.local)


def _masked_bytes(job: TrainingJob, kind: LayerKind) -> float:
    """Of attention over keys that an indexer chose: gathered keys and values of some heads with
    their fp32 gradients, and a chunk's scores.
    """
    if not kind.chooses(job.tokens):
        return 0.0
    every = job.tokens * job.shape.width * kind.keys_values
    gathered = min(every, max(sparse.GATHERED, every / kind.kv_heads))
    return gathered * (1 + 4 / job.shape.width) + 4 * sparse.WORKSPACE


def working_set(job: TrainingJob, settings: MemorySettings) -> float:
    """Bytes while one layer is in its backward, beyond what is stored for other layers: the largest
    of its moments.
    """
    return _working_set(job, _stated_bytes(job, settings))


def _stated_bytes(job: TrainingJob, settings: MemorySettings) -> list[Bytes]:
    return [each.bytes(job, settings) for each in techniques() if each.bytes is not None]


def _working_set(job: TrainingJob, stated: list[Bytes]) -> float:
    shape, tokens = job.shape, job.local
    attention, after, segment = bare_layer(job)
    for _, _, layer in stated:
        attention += layer[0]
        after += layer[1]
        segment += layer[2]
    # cos and sin; ids, labels, positions, log-probabilities
    working = max(attention, after, segment) + (4 * shape.head_dim + 64) * tokens
    return working + exchange.held_bytes(job)


@functools.lru_cache(64)
def bare_model(job: TrainingJob) -> dict[str, StepMoments]:
    """Bytes on one GPU of the model itself: weights, output layer, one layer's parameters."""
    shape, shards, tokens = job.shape, job.weight_shards, job.local
    weights = job.weight_bytes
    head = shape.head_parameters if shape.head_trained else 0
    gathered = _gathered_head(job)
    logits = min(HEAD_CHUNK_NUMBERS, tokens * shape.vocab) * 10
    # Gradients of one layer: fp32 sums of chunks, and the bf16 result; sharded: two gathered layers
    # and the fp32 reduction as well.
    one, trained = shape.layer_bytes, shape.width * shape.trained_layer_parameters
    layer = 3 * trained + (2 * one + 2 * trained if shards > 1 else 0)
    if shape.quantized:  # made whole: the widest map, or all of the hand-written layer's
        whole = shape.linear_parameters // shape.layers
        if not job.written_layer:
            whole = max(_widest_map(shape, kind) for kind in shape.kinds)
        layer += shape.width * whole
    tower: dict[str, StepMoments] = {}
    if job.tower is not None:
        held, batch = job.tower.bytes(tokens, shape.width, shards > 1)
        tower["vision tower"] = StepMoments(held, held, held + batch)
    return {
        **tower,
        "weights": StepMoments(weights, weights, weights),
        "output layer": gathered._replace(output_layer=gathered.output_layer + 6 * head + logits),
        "one layer's parameters and gradients": StepMoments(0.0, layer, layer),
        "runtime": StepMoments(CONTEXT, CONTEXT, CONTEXT),
    }


def _gathered_head(job: TrainingJob) -> StepMoments:
    """Bytes on one GPU of what is gathered of a sharded embedding and output layer.

    FSDP2 has the output layer (with a tied embedding) whole from the forward pass until its
    gradient is reduced: a tied one's is at the end of backward. The embedding alone is fetched
    while the last layer is in its backward. ZeRO-3 is taken to hold both all the time.
    """
    shape = job.shape
    if job.weight_shards == 1:
        return StepMoments(0.0, 0.0, 0.0)
    one = float(shape.width * shape.head_parameters)
    if job.zero:
        both = one * (3 if shape.head_trained else 2)
        return StepMoments(both, both, both)
    if not shape.tied:
        return StepMoments(one, 0.0, one)
    until_the_end = one * (2 if shape.head_trained else 1)
    return StepMoments(one, until_the_end, until_the_end)


def _widest_map(shape: ModelShape, kind: LayerKind) -> int:
    """Parameters of the largest quantised one that is made whole at once: gate and up of all
    experts are one.
    """
    routed = kind.expert_parameters if shape.quantized > 1.01 * shape.linear_parameters else 0
    return max(kind.hidden * kind.dense_width, kind.mixer_parameters // 4, 2 * routed // 3)


def moments(job: TrainingJob, settings: MemorySettings) -> list[dict[str, float]]:
    """Bytes on one GPU, by item, at each of `StepMoments`."""
    items = _items(job, settings, _stated_bytes(job, settings))
    return [{name: each[index] for name, each in items.items()} for index in range(3)]


def _items(
    job: TrainingJob, settings: MemorySettings, stated: list[Bytes]
) -> dict[str, StepMoments]:
    """Bytes on one GPU, by item, in the order of `ITEMS`."""
    items = dict(bare_model(job))
    if settings.checkpoint != "none":
        working = _working_set(job, stated)
        items["working set of a layer"] = StepMoments(0.0, working, working)
    for on_gpu, _, _ in stated:
        for name, each in on_gpu.items():
            if name in items:
                each = StepMoments(*(a + b for a, b in zip(items[name], each, strict=True)))
            items[name] = each
    return _ordered(items, ITEMS)


def _ordered(items: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: items[name] for name in names if name in items} | items


def budget(job: TrainingJob, settings: MemorySettings, timed: bool = True) -> Budget:
    """What settings take: the moment of backward that has most on the GPU. Without `timed`, seconds
    are 0: they take longest to count.
    """
    stated = _stated_bytes(job, settings)
    items = _items(job, settings, stated)
    totals = [sum(moment) for moment in zip(*items.values(), strict=True)]
    peak = totals.index(max(totals))
    gpu = {name: each[peak] for name, each in items.items() if each[peak]}
    if job.made_whole_bytes + job.weight_bytes + CONTEXT > totals[peak]:
        gpu = {WHOLE: job.made_whole_bytes, "weights": job.weight_bytes, "runtime": CONTEXT}
    host: dict[str, float] = {}
    for _, on_host, _ in stated:
        for name, value in on_host.items():
            if value:
                host[name] = host.get(name, 0.0) + value * job.machine.on_host
    return Budget(
        _ordered(gpu, ITEMS),
        _ordered(host, HOST_ITEMS),
        seconds(job, settings) if timed else 0.0,
    )


def seconds(job: TrainingJob, settings: MemorySettings) -> float:
    """One step, one row a sequence-parallel group."""
    shape, machine = job.shape, job.machine.computing(job.shape.width)
    stated = [each.work(job, settings) for each in techniques() if each.work is not None]
    work = Work(*map(sum, zip(*stated, strict=True)))
    runs = 1.0 + work.again_attention
    linear = attention = moved = ahead = scoring = 0.0
    for kind, count in shape.layers_of_kinds:
        linear += count * _products(job, kind, work)
        attention += (
            count * kind.attention_flop(job.tokens) / machine.attention_share(kind, job.tokens)
        )
        forward, backward = moved_bytes(job, settings, kind)
        fused = job.written(kind) and settings.checkpoint == "full"
        again = work.again_forward + (0.0 if fused else work.again_projections)
        moved += count * ((1 + again) * forward + backward)
        ahead += count * forward
        scoring += count * kind.scoring_flop(job.tokens) / machine.float32[0]
    linear += head_flop(job) / machine.gemm
    moved += HEAD_PASSES * shape.vocab
    attending = job.local * attention
    attending *= runs / machine.attention_forward + 2.5 / machine.attention_backward
    attending = exchange.attention_seconds(job, attending, exchanged_bytes(job, runs), runs)
    products = job.local * linear * (1.0 + work.slower) / LINEAR_SHARE
    compute = products + attending / ATTENTION_SHARE + job.local * moved / machine.memory
    compute += job.local * scoring * (1.0 + work.again_projections)
    compute += (CAST_PASSES + 3 * work.again_mlp) * job.cast_bytes / machine.memory
    compute += _chunked_experts_bytes(job, settings) / machine.memory
    compute += staged_bytes(job, settings) / machine.memory
    if job.reference_passes:
        once = sum(count * _products(job, kind, ONCE) for kind, count in shape.layers_of_kinds)
        reference = once / LINEAR_SHARE + ahead / machine.memory
        reference += attention / machine.attention_forward / ATTENTION_SHARE
        compute += job.reference_passes * job.local * reference
    if job.tower is not None:
        compute += job.tower.passes(job.reference_passes) * tower_seconds(job)
    copied = work.copied_bytes / machine.copies
    between = machine.between(machine.gpus)
    sent = [
        received / between + messages * machine.waits(machine.gpus)
        for received, messages in zip(
            sent_bytes(job, settings), sent_messages(job, settings), strict=True
        )
    ]
    if are_gathered(job):
        compute += BESIDE_MESSAGES * sum(sent)
    forward = compute * 0.3
    backward_seconds = max(compute - forward, copied, sent[1])
    step = max(forward, copied, sent[0]) + backward_seconds
    # nothing is hidden wholly; and of two ways as fast, the one with less to do
    step += 0.005 * (compute + copied)
    for technique in techniques():
        if technique.update is not None:
            step += technique.update(job, settings, backward_seconds)
    # of two ways that both wait for it, the one with less to do
    step = max(step, starting_seconds(job) + 0.1 * step)
    # quantised weights are widened before each use: read and written once
    widened = shape.quantized * (shape.quantized_bytes + shape.width)
    return step + (2.0 + work.again_forward + work.again_mlp) * widened / machine.memory


# Of the rate of attention, what a tower's reaches: heads of 72 and the like, a call for each image;
# and how often the numbers that autograd would store are read or written by separate operations.
# Qwen3-VL-8B's takes 0.068 s for 16,384 patches in images of 2,048 on a H200; this says 0.063.
TOWER_ATTENTION, TOWER_PASSES = 0.4, 5.0


def tower_seconds(job: TrainingJob) -> float:
    """One forward pass of a rank's part of the images through the tower; 0 without any."""
    tower, machine = job.tower, job.machine.computing(job.shape.width)
    if tower is None:
        return 0.0
    products = tower.linear / machine.gemm / LINEAR_SHARE
    attending = tower.attention * tower.seen / machine.attention_forward / TOWER_ATTENTION
    moved = TOWER_PASSES * job.shape.width * tower.of_a_patch / machine.memory
    return job.local * tower.patches * (products + attending + moved)


def starting_seconds(job: TrainingJob) -> float:
    """What a step takes at least: short rows wait for the process that starts their kernels."""
    sharded = job.weight_shards > 1 and not job.zero
    return job.shape.layers * job.machine.layer_start if sharded else 0.0


# Of the rate of products, what grouped products of experts in 16 bit reach: 585 TFLOP/s with 1,024
# tokens an expert on a H200, 667 with 4,096 (benchmarks/results/models.md). In fp32, where a run
# has no half precision, they are products of one expert after the other.
GROUPED = 0.9
# Bytes of each of a token's logits that are read and written, in 16 bit: made, and read twice for
# the log-sum-exp and the greatest; made again in backward, and turned into their gradient.
HEAD_PASSES = 14.0
# Copies of weights that autocast makes read 4 bytes and write 2, three times their own; their
# gradients are widened alike.
CAST_PASSES = 6.0


def _chunked_experts_bytes(job: TrainingJob, settings: MemorySettings) -> float:
    """Each chunk but the first reads the weights of all routed experts again, in each pass, and
    adds their gradients to fp32 sums.
    """
    shape, chunk = job.shape, settings.mlp_chunk
    if chunk is None or settings.checkpoint == "none" or not shape.routed_parameters:
        return 0.0
    summed = 0.0 if shape.adapters else 8.0 + shape.width
    return (-(-job.local // chunk) - 1) * shape.routed_parameters * (3.0 * shape.width + summed)


def head_flop(job: TrainingJob) -> float:
    """Of one token's logits: made twice, and differentiated."""
    return 2.0 * job.shape.head_parameters * (2 + (2.0 if job.shape.head_trained else 1.0))


def document_flop(
    shape: ModelShape, tokens: int, before: int = 0, heads: float | None = None
) -> float:
    """What the model needs for a document, forward and backward: products of causal attention by
    each kind of layer, without what is computed again and without a reference's pass.

    Args:
        tokens: of the document.
        before: tokens that all of them see besides: a shared prompt's.
        heads: tokens whose logits are made, the trained ones; by default all.
    """
    back = backward_products(shape)
    flop = 2.0 * (1 + back) * shape.head_parameters * (tokens if heads is None else heads)
    end = before + tokens
    for kind, count in shape.layers_of_kinds:
        maps = 2.0 * (1 + back) * (kind.mixer_parameters + kind.mlp_parameters)
        attention = end * kind.needed_flop(end)
        scoring = end * kind.scoring_flop(end) / 2  # causal, and without a backward pass
        if before:
            attention -= before * kind.needed_flop(before)
            scoring -= before * kind.scoring_flop(before) / 2
        flop += count * (tokens * (maps + 3 * kind.recurrent_flop) + 3 * attention + scoring)
    return flop


ONCE: Work | None = None  # a forward pass alone


def _products(job: TrainingJob, kind: LayerKind, work: Work | None) -> float:
    """Seconds of one token's linear maps in one layer, at the machine's rates: of a forward pass
    alone, or of all that a step computes.
    """
    width = job.shape.width
    machine = job.machine.computing(width)
    projections = mlp = recurrences = 1.0
    if work is not None:
        back = backward_products(job.shape)
        # forward passes; what layers compute again in their own backward comes first
        projections += work.again_projections + back + work.again_forward
        mlp += work.again_mlp + back + work.again_forward
        recurrences += 2 + work.again_projections + work.again_forward
    recurrent = recurrences * kind.recurrent_flop
    plain = 2.0 * (kind.mixer_parameters * projections + kind.dense_parameters * mlp) + recurrent
    if not kind.experts:
        return plain / machine.gemm
    rate = machine.gemm * (GROUPED if width == 2 else 1.0)
    # with few tokens an expert, reading its weights takes longer
    read = width * kind.expert_parameters / machine.memory / job.local
    routed = max(2.0 * kind.active_expert_parameters / rate, read)
    return plain / machine.gemm + mlp * routed


def moved_bytes(job: TrainingJob, settings: MemorySettings, kind: LayerKind) -> tuple[float, float]:
    """Bytes of one token that one layer reads and writes beside its products, in its forward and in
    its backward (of the hand-written layer with what it computes again): norms, residuals,
    rotary, activations, dispatch to experts. Counted in the code of `decoder_layer` (its kernels
    are fused) and of transformers' layers (theirs are not, and norms compute in fp32).
    """
    width, hidden = job.shape.width, kind.hidden
    turned = kind.queries + kind.kv_heads * kind.head_dim  # numbers that rotary turns
    given = 5 * hidden + kind.queries + kind.dense_width  # numbers that adapted maps take
    got = 2 * hidden + kind.queries + kind.keys_values + 2 * kind.dense_width
    forward: float
    backward: float
    dispatch, gradients = _dispatched_bytes(job, kind)
    if job.written(kind) and settings.checkpoint == "full":
        more = 2 if kind.norms_after else 0  # norms
        forward = (12 + 3 * more) * hidden + 3 * kind.dense_width + 2 * turned + 2 * kind.queries
        backward = (27 + 7 * more) * hidden + 6 * kind.dense_width + 6 * turned + 4 * kind.queries
        if job.shape.adapters:
            forward += given + 2 * got
            backward += 4 * given + 4 * got
        # experts run again before they are differentiated, where they are not saved
        again = (1.0 - settings.keep_mlp) * dispatch
        return width * forward + dispatch, width * backward + again + gradients
    wide = job.wide_hidden and width == 2
    residuals, rotary = (20.0, 40.0) if wide else (12.0, 20.0)
    if any(k.recurrent_flop for k in job.shape.kinds):  # norms in one kernel
        norms = (8.0 if wide else 4.0) * kind.norms
    else:
        norms = (28.0 if wide else 36.0) * kind.norms
    if wide:  # a cast for each linear map but those behind attention and the MLP's gate
        norms += 36 if kind.recurrent_flop else 30
    turned *= 2 if kind.head_norms else 1
    forward = (norms + residuals) * hidden + rotary * turned + 4 * width * kind.queries
    forward += 5 * width * kind.dense_width
    backward = (2 * norms + residuals) * hidden + rotary * turned + 8 * width * kind.queries
    backward += 9 * width * kind.dense_width
    if job.shape.adapters:
        # an adapter's input is widened and narrowed again; its output is scaled and added
        forward += 12 * given + 12 * got
        backward += 16 * given + 12 * got
    forward += 2 * kind.recurrent_bytes + kind.recurrent_workspace
    backward += 4 * kind.recurrent_bytes + 3 * kind.recurrent_workspace
    return forward + dispatch, backward + gradients


def _dispatched_bytes(job: TrainingJob, kind: LayerKind) -> tuple[float, float]:
    """Of one token, on its way to its experts and back, and of the gradients: gathered, weighted,
    summed, by compiled kernels; 17 ms a step of six layers of Qwen3-30B-A3B and 16,384 tokens.
    """
    sent = kind.used * kind.hidden if kind.experts else 0
    dispatch, gradients = 5 * sent + 5 * kind.expert_width, 7 * sent + 9 * kind.expert_width
    if job.shape.adapted_experts:
        dispatch += 5 * sent + 9 * kind.expert_width
        gradients += 7 * sent + 10 * kind.expert_width
    width = job.shape.width
    return width * dispatch, width * gradients


def backward_products(shape: ModelShape) -> float:
    """Products of a linear layer's backward, in those of its forward: one for the input and one for
    the weight where it is trained.
    """
    return 1.0 if shape.adapters else 1.0 + shape.trainable / shape.parameters


def sent_bytes(job: TrainingJob, settings: MemorySettings) -> tuple[float, float]:
    """Bytes of parameters and gradients that one GPU receives in forward and in backward."""
    shape, gpus = job.shape, job.machine.gpus
    if gpus == 1:
        return 0.0, 0.0
    of_others = (gpus - 1) / gpus
    gradients = shape.width * shape.trainable
    if job.weight_shards == 1:
        return 0.0, of_others * 2.0 * gradients
    weights = shape.frozen_bytes + gradients
    again = 0.0 if kept_weights(job, settings) else weights
    return of_others * weights, of_others * (again + job.reduced_width * shape.trainable)


def sent_messages(job: TrainingJob, settings: MemorySettings) -> tuple[int, int]:
    """Messages, one after the other, in which these come: each layer's parameters in forward and
    again in backward, and its gradients, each in a ring over all GPUs (NCCL's trees take fewer).
    """
    gpus, layers = job.machine.gpus, job.shape.layers
    if gpus == 1:
        return 0, 0
    hops = min(gpus - 1, 2 * (gpus - 1).bit_length())
    if job.weight_shards == 1:
        return 0, hops
    return layers * hops, (1 if kept_weights(job, settings) else 2) * layers * hops


# Of the time of FSDP2's messages, what the layers' kernels beside them lose: experts' products and
# order take 70 ms where one GPU's take 53, beside 87 ms of messages (moe-6-layers-16k on two H200,
# benchmarks/results/step_parts.md).
BESIDE_MESSAGES = 0.2


def staged_bytes(job: TrainingJob, settings: MemorySettings) -> float:
    """Bytes that FSDP2 reads and writes on each GPU around its messages: a shard of fp32 masters is
    cast before it is sent, and copied; each gathered weight is copied out of the buffer that it
    came in, each gradient into the one that is reduced.
    """
    if not are_gathered(job):
        return 0.0
    shape, width = job.shape, job.shape.width
    times = 1 if settings.keep_weights else 2
    cast = shape.trained_layer_parameters * (job.master + width if job.master != width else 0)
    held = 2 * shape.layer_bytes
    gathers = times * shape.layers * (held + (held + cast) / job.weight_shards)
    return gathers + (width + job.reduced_width) * shape.trainable


def exchanged_bytes(job: TrainingJob, forward_runs: float = 1.0) -> float:
    """Bytes of keys, values and their fp32 gradients that one GPU receives in a step from the
    others of its sequence-parallel group: those of a ring, whatever the schedule. A window's keys
    come from its neighbours alone.
    """
    width = job.shape.width
    received = 0.0
    for kind, count in job.shape.layers_of_kinds:
        others = (job.sp - 1) * job.local
        if kind.reach:
            others = min(others, kind.reach)
        received += count * others * width * kind.keys_values
    return received * (forward_runs + 1 + 4 / width)


def roofline(job: TrainingJob) -> float:
    """Seconds of a step that keeps attention, recomputes two thirds of the MLP and does nothing but
    products, at the machine's rates.
    """
    m = job.machine.computing(job.shape.width)
    back = backward_products(job.shape)
    linear, attention = head_flop(job), 0.0
    for kind, count in job.shape.layers_of_kinds:
        maps = (2 + back) * kind.mixer_parameters + (1.67 + back) * kind.mlp_parameters
        linear += count * (2.0 * maps + 3 * kind.recurrent_flop)
        attention += count * kind.attention_flop(job.tokens)
    return job.local * (
        linear / m.gemm + attention * (1 / m.attention_forward + 2.5 / m.attention_backward)
    )


def candidates(
    job: TrainingJob, mode: str, which: Literal["all", "first", "last"] = "all"
) -> Iterator[MemorySettings]:
    """Settings to consider. `fast`: nothing leaves the GPU. `long`: the leanest layer. `auto`:
    all. Their `pool_bytes` is 0: the budget of the settings says what the pool must hold.

    Args:
        which: values of techniques that are `ordered`: all; or the first one alone, the fastest;
            or the last one alone, the leanest.
    """
    nested = sorted(techniques(), key=lambda technique: technique.depth)
    return _nested(job, mode, MemorySettings(), nested, which)


def _nested(
    job: TrainingJob,
    mode: str,
    settings: MemorySettings,
    rest: list[Technique],
    which: Literal["all", "first", "last"],
) -> Iterator[MemorySettings]:
    """`settings` with every combination of the values of the other techniques."""
    if not rest or settings.checkpoint == "none":
        yield settings
        return
    technique = rest[0]
    values = technique.values(job, mode, settings)
    if technique.ordered and which != "all":
        values = values[:1] if which == "first" else values[-1:]
    for value in values:
        yield from _nested(job, mode, _with_value(settings, technique.key, value), rest[1:], which)


def _with_value(settings: MemorySettings, key: str, value: Any) -> MemorySettings:
    return (
        dataclasses.replace(settings, **{key: value})
        if getattr(settings, key) != value
        else settings
    )


def fits(job: TrainingJob, b: Budget, host_share: float) -> bool:
    """Whether a budget keeps within `MARGIN` of the GPU and `host_share` of the host."""
    return (
        b.gpu_total <= MARGIN * job.machine.gpu_bytes
        and b.host_total <= host_share * job.machine.host_bytes
    )


def with_fixed(
    settings: MemorySettings, fixed: Mapping[str, Any], mode: str
) -> MemorySettings | None:
    """A candidate with what the user fixed in place of its own values; None where the two
    contradict each other.

    Args:
        fixed: fields of MemorySettings; `offload: "any"` is any but none.
    """
    keys = dict(fixed)
    if keys.get("offload") == "any":
        if settings.offload == "none" and mode != "fast":
            return None
        keys["offload"] = settings.offload if settings.offload != "none" else "inputs"
    if keys.get("checkpoint", settings.checkpoint) == "none" and (
        keys.get("keep_attention", settings.keep_attention)
        or keys.get("keep_mlp", settings.keep_mlp)
        or keys.get("offload", settings.offload) != "none"
        or keys.get("segment_layers", settings.segment_layers) > 1
    ):
        return None
    return dataclasses.replace(settings, **keys)


def choose(
    job: TrainingJob,
    mode: str = "auto",
    host_share: float = HOST_SHARE,
    fixed: Mapping[str, Any] | None = None,
) -> tuple[MemorySettings, Budget, bool]:
    """The fastest settings that fit and agree with what the user fixed.

    Args:
        mode: "auto", "fast" or "long" (see `candidates`).
        host_share: share of the host's memory that may be used.
        fixed: as in `with_fixed`.

    Returns:
        The settings (their `pool_bytes` is 0), their budget, and True. Where none fits: those that
        need the least of what is short, and False.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("auto", "fast", "long"):
        raise ValueError(f"memory: got {mode!r}, expected auto, fast or long.")
    best: tuple[float, MemorySettings, Budget] | None = None
    least: tuple[float, MemorySettings] | None = None
    ordered = sorted((t for t in techniques() if t.ordered), key=lambda technique: technique.depth)
    found = _agreeing(candidates(job, mode, "first"), fixed, mode)
    first = [(seconds(job, settings), settings) for settings in found]
    for least_seconds, fastest in sorted(first, key=lambda each: each[0]):
        if best is not None and least_seconds >= best[0]:
            break  # nothing that is only leaner is faster, nor are the others
        for leanest in _agreeing(_nested(job, mode, fastest, ordered, "last"), fixed, mode):
            needs = budget(job, leanest, timed=False)
            if fits(job, needs, host_share):
                break
            short = needs.gpu_total / (MARGIN * job.machine.gpu_bytes)
            if job.machine.host_bytes:
                short = max(short, needs.host_total / (host_share * job.machine.host_bytes))
            if least is None or short < least[0]:
                least = (short, leanest)
        else:
            continue  # nor does anything that takes more fit
        for settings in _agreeing(_nested(job, mode, fastest, ordered, "all"), fixed, mode):
            taken = seconds(job, settings)
            if best is not None and taken >= best[0]:
                continue
            needs = budget(job, settings, timed=False)
            if not fits(job, needs, host_share):
                continue
            # Of equals, the one that leaves more room. The last eighth is taken for a gain of some
            # percent, not for less: peaks are planned within an eighth, and what a first step
            # leaves free is used from the second on (`corrected`).
            # The host's counts alike: pinning it takes a second for some gigabytes.
            full = needs.gpu_total / job.machine.gpu_bytes
            pinned = needs.host_total / job.machine.host_bytes if job.machine.host_bytes else 0.0
            room = 0.002 * (full + pinned)
            key = taken * (1 + room + 0.03 * max(0.0, full - CAREFUL) / (MARGIN - CAREFUL))
            if best is None or key < best[0]:
                best = (key, settings, dataclasses.replace(needs, seconds=taken))
    if best is not None:
        return best[1], best[2], True
    assert least is not None
    return least[1], budget(job, least[1]), False


def _agreeing(
    found: Iterator[MemorySettings], fixed: Mapping[str, Any] | None, mode: str
) -> Iterator[MemorySettings]:
    """Candidates with what the user fixed, each once; without those that contradict it."""
    if not fixed:
        yield from found
        return
    changed = (with_fixed(settings, fixed, mode) for settings in found)
    yield from dict.fromkeys(settings for settings in changed if settings is not None)


def longest(
    job: TrainingJob,
    mode: str = "auto",
    host_share: float = HOST_SHARE,
    unit: int = 8192,
    fixed: Mapping[str, Any] | None = None,
) -> int:
    """Tokens of the longest row, in multiples of `unit`, for which some settings that agree with
    what the user fixed fit. 0 if none do.
    """
    most = 2**14

    def fit(settings: MemorySettings, units: int) -> bool:
        longer = dataclasses.replace(job, tokens=units * unit)
        return fits(longer, budget(longer, settings, timed=False), host_share)

    low = 0
    # A chunk that is longer than a row is the whole row: the candidates of the longest row are all
    # that there are. The leanest come last. A candidate is looked at further only where it fits a
    # longer row than those before it.
    leanest = candidates(dataclasses.replace(job, tokens=most * unit), mode, "last")
    of_longest = list(_agreeing(leanest, fixed, mode))
    for settings in reversed(of_longest):
        high = low + 1
        while high < most and fit(settings, high):
            low, high = high, min(high * 2, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fit(settings, middle) else (low, middle)
    return low * unit
