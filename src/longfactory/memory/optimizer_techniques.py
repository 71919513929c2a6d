"""Where the optimizer's states live, and where gradients wait: bytes, seconds, keys and words of
both (`optimizer.SplitAdamW` does what is chosen).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longfactory.memory.host_jobs import AHEAD
from longfactory.memory.optimizer import BLOCK
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, StepMoments, Technique

# Of the rate of the GPU's memory, what AdamW reaches: 0.05 s for 3.8 B parameters on a H200
# (benchmarks/results/throughput_2xH200_7b.md).
UPDATE = 0.65


LEAVING = AHEAD * BLOCK  # numbers of gradients on their way to the host at once, at most


def _placement_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[str]:
    return ("gpu",) if mode == "fast" else ("gpu", "host")


def _placement_fixed(arguments: Any) -> dict[str, Any]:
    place = arguments.optimizer_placement
    return {} if place == "auto" else {"optimizer": place}


def _placement_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """States of the optimizer. Split masters: a remainder and two moments, and sums of
    micro-batches.
    """
    trained, shards = job.shape.trainable, job.shards
    split = (10 + 4 * job.accumulates) * trained / shards if job.master == 2 else None
    if settings.optimizer == "gpu":
        states = split or job.state_bytes * trained / shards
        return Bytes(gpu={"optimizer": StepMoments(states, states, states)})
    return Bytes(host={"optimizer": split or 8 * trained / shards})


def _placement_update(job: TrainingJob, settings: MemorySettings, backward: float) -> float:
    trained, machine = job.shape.trainable, job.machine
    if settings.optimizer == "gpu":
        rate = UPDATE * machine.memory  # split masters move two bytes less
        # the norm of the gradients, and clipping them: of split masters within their update
        split = job.master == 2
        clipped = (1 if split else 3) * job.gradient_bytes / machine.memory
        return (26.0 if split else 28.0) * trained / job.shards / rate + clipped
    update = (
        28.0 * trained / job.shards * machine.on_host / machine.host_memory
        + 4.0 * trained / job.shards / machine.copies
    )
    if not job.overlaps:
        return update
    # During backward, but for the last gradient, the embedding's.
    last = update * min(1.0, job.shape.head_parameters / max(trained, 1))
    return max(update - backward, last)


def _placement_words(settings: MemorySettings) -> str:
    return f"optimizer on the {settings.optimizer}"


def _placement_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    full = job.shape.trainable == job.shape.parameters
    return (4, "optimizer_placement: host") if full and settings.optimizer == "gpu" else None


PLACEMENT = Technique(
    "optimizer",
    _placement_values,
    5,
    _placement_fixed,
    _placement_bytes,
    update=_placement_update,
    words=_placement_words,
    advice=_placement_advice,
)


def gradients_leave(job: TrainingJob, settings: MemorySettings) -> bool:
    """Gradients go to the host during backward."""
    return settings.optimizer == "host" and (job.overlaps or settings.gradients == "host")


def _gradient_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[str]:
    may_leave = settings.optimizer == "host" and job.leavable and not job.overlaps
    return ("gpu", "host") if may_leave else ("gpu",)


def _gradient_fixed(arguments: Any) -> dict[str, Any]:
    wanted = arguments.offload_gradients
    if wanted == "auto":
        return {}
    return {"gradients": "host" if wanted else "gpu"}


def _gradient_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """They come layer by layer while backward gives up what is stored, so that both are never there
    together, unless gradients are there from the start (`early`).
    """
    shape, shards = job.shape, job.shards
    gradients = job.gradient_bytes
    leave = gradients_leave(job, settings)
    buckets = gradients if job.ddp else 0.0
    early = job.accumulates and job.master != 2
    if early:
        on_gpu = StepMoments(*(3 * [gradients + buckets]))
    else:
        head = shape.head_parameters if shape.head_trained else 0
        last = gradients
        if shards == 1 and not shape.adapters:
            # In the last layer's backward its own are not there yet, nor is the embedding's.
            # (FSDP2 holds the output layer's until the end, and those two would be too few.)
            coming = shape.trained_layer_parameters
            if shape.trainable == shape.parameters and not shape.tied:
                coming += shape.head_parameters
            last *= 1 - min(1.0, coming / max(shape.trainable, 1))
        if leave:
            # A matrix, or a layer's shard, is given up as a whole.
            largest = max(shape.head_parameters, shape.trained_layer_parameters) / shards
            last = min(last, job.gradient_width * (LEAVING + largest))
        on_gpu = StepMoments(buckets, buckets + job.gradient_width * head / shards, buckets + last)
    # Split ones of several micro-batches are in the sums, beside the states.
    in_sums = job.accumulates and job.master == 2
    on_host = gradients if leave and not job.overlaps and not in_sums else 0.0
    return Bytes({"gradients": on_gpu}, {"gradients": on_host})


def _gradient_update(job: TrainingJob, settings: MemorySettings, backward: float) -> float:
    """Gradients that leave are copied once more within the host, beside backward."""
    if job.overlaps or not gradients_leave(job, settings):
        return 0.0
    machine = job.machine
    return 0.05 * 4.0 * job.shape.trainable / job.shards * machine.on_host / machine.host_memory


def _gradient_words(settings: MemorySettings) -> str | None:
    leave = settings.optimizer == "host" and settings.gradients == "host"
    return (
        "gradients offloaded during backward" if leave and settings.checkpoint == "full" else None
    )


def _gradient_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    waits = settings.optimizer == "host" and settings.gradients == "gpu"
    return (5, "offload_gradients: true") if job.leavable and not job.overlaps and waits else None


GRADIENTS = Technique(
    "gradients",
    _gradient_values,
    6,
    _gradient_fixed,
    _gradient_bytes,
    update=_gradient_update,
    words=_gradient_words,
    advice=_gradient_advice,
)
