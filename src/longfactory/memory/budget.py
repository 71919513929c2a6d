"""Bytes of one step for given memory settings: what the model and the layers take by themselves,
and the sum of what each technique states of itself (`technique.Technique`).

Everything is for one GPU and its t = T / n tokens of a row. Bytes of the layer's working set come
from reading the code in `memory/decoder_layer.py` (and its docstring) and, for other layers, from
what autograd stores while one layer is recomputed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from longfactory.memory import exchange
from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.seconds import seconds
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import ModelShape, TrainingJob
from longfactory.memory.technique import Bytes, LayerMoments, StepMoments, techniques
from longfactory.memory.temporaries import temporary_bytes
from longfactory.sp import sparse
from longfactory.sp.recurrent.heads import WORKSPACE

HEAD_CHUNK_NUMBERS = 2**28  # logits that exist at once (model/token_logprobs.py)
CONTEXT = 1.5e9  # CUDA context, cuBLAS and NCCL workspaces
MARGIN = 0.92  # of the GPU's memory may be planned for: the rest is fragmentation
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


def moments(job: TrainingJob, settings: MemorySettings) -> list[dict[str, float]]:
    """Bytes on one GPU, by item, at each of `StepMoments`."""
    items = _items(job, settings, _stated_bytes(job, settings))
    return [{name: each[index] for name, each in items.items()} for index in range(3)]


def fits(job: TrainingJob, b: Budget, host_share: float) -> bool:
    """Whether a budget keeps within `MARGIN` of the GPU and `host_share` of the host."""
    return (
        b.gpu_total <= MARGIN * job.machine.gpu_bytes
        and b.host_total <= host_share * job.machine.host_bytes
    )


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


def _stated_bytes(job: TrainingJob, settings: MemorySettings) -> list[Bytes]:
    return [each.bytes(job, settings) for each in techniques() if each.bytes is not None]


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


def working_set(job: TrainingJob, settings: MemorySettings) -> float:
    """Bytes while one layer is in its backward, beyond what is stored for other layers: the largest
    of its moments.
    """
    return _working_set(job, _stated_bytes(job, settings))


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
    after += temporary_bytes(job, kind) + kind.recurrent_bytes
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
