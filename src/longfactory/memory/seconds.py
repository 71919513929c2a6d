"""Seconds of a step for given memory settings, at the machine's measured rates.

Causal attention counts 2 * T * heads * D forward and 2.5 times that backward. What is recomputed is
added; what is copied counts where it takes longer than what hides it.
"""

from __future__ import annotations

from longfactory.memory import exchange
from longfactory.memory.gathered import are_gathered
from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.products import backward_products, head_flop
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Work, techniques
from longfactory.memory.traffic import (
    chunked_experts_bytes,
    exchanged_bytes,
    moved_bytes,
    sent_bytes,
    sent_messages,
    staged_bytes,
)

# Of the machine's rates, what products of linear layers and attention reach within a step.
LINEAR_SHARE, ATTENTION_SHARE = 0.92, 0.97
# Of the time of FSDP2's messages, what the layers' kernels beside them lose: experts' products and
# order take 70 ms where one GPU's take 53, beside 87 ms of messages (moe-6-layers-16k on two H200,
# benchmarks/results/step_parts.md).
BESIDE_MESSAGES = 0.2
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
# Of the rate of attention, what a tower's reaches: heads of 72 and the like, a call for each image;
# and how often the numbers that autograd would store are read or written by separate operations.
# Qwen3-VL-8B's takes 0.068 s for 16,384 patches in images of 2,048 on a H200; this says 0.063.
TOWER_ATTENTION, TOWER_PASSES = 0.4, 5.0


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
    compute += chunked_experts_bytes(job, settings) / machine.memory
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
    if work is not None:
        plain += 2.0 * work.again_output * kind.outputs * kind.hidden
    if not kind.experts:
        return plain / machine.gemm
    rate = machine.gemm * (GROUPED if width == 2 else 1.0)
    # with few tokens an expert, reading its weights takes longer
    read = width * kind.expert_parameters / machine.memory / job.local
    routed = max(2.0 * kind.active_expert_parameters / rate, read)
    return plain / machine.gemm + mlp * routed


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
