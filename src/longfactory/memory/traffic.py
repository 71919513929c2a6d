"""Bytes that a step moves: between a GPU and its memory beside the products, and between GPUs."""

from __future__ import annotations

from longfactory.memory.gathered import are_gathered, kept_weights
from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob


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


def chunked_experts_bytes(job: TrainingJob, settings: MemorySettings) -> float:
    """Each chunk but the first reads the weights of all routed experts again, in each pass, and
    adds their gradients to fp32 sums.
    """
    shape, chunk = job.shape, settings.mlp_chunk
    if chunk is None or settings.checkpoint == "none" or not shape.routed_parameters:
        return 0.0
    summed = 0.0 if shape.adapters else 8.0 + shape.width
    return (-(-job.local // chunk) - 1) * shape.routed_parameters * (3.0 * shape.width + summed)


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
