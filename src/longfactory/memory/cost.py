"""Bytes and seconds of one step for given memory settings, and the settings that are fastest among
those that fit.

Everything is for one GPU and its t = T / n tokens of a row. Letters: w = bytes of a number as
layers compute it (2, in fp32 4), h = hidden bytes of a token (w * hidden), a = attention output
bytes (w * heads * D), kv = bytes of keys (w * key heads * D). Bytes of the layer's working set come
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
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import Machine, ModelShape

HEAD_CHUNK_NUMBERS = 2**28  # logits that exist at once (model/token_logprobs.py)
# numbers of gradients on their way to the host at once (model/memory: host_jobs.AHEAD blocks of the
# optimizer's)
LEAVING = 2**30
CONTEXT = 1.5e9  # CUDA context, cuBLAS and NCCL workspaces
MARGIN = 0.92  # of the GPU's memory may be planned for: the rest is fragmentation
CAREFUL = 0.80  # above this share settings must be faster to be chosen
EIGHTHS = (1, 2, 4, 6)  # of the layers, the last ones, whose tensors may stay on the GPU
HOST_SHARE = 0.85  # of the host's memory, for optimizer states and offloaded activations together


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


def hidden_bytes(s: ModelShape) -> int:
    return s.width * s.hidden


def kept_bytes(s: ModelShape) -> int:
    """Attention's output and log-sum-exp, for one token and layer."""
    return s.width * s.heads * s.head_dim + 4 * s.heads


def working_set(s: ModelShape, settings: MemorySettings, tokens: int) -> float:
    """Bytes while one layer of `tokens` local tokens is in its backward, beyond what waits for
    other layers.

    The larger of two moments: attention's backward, and the backward of the pieces after it, of
    which one is there at a time.
    """
    h, a, kv = hidden_bytes(s), s.width * s.heads * s.head_dim, s.width * s.kv_heads * s.head_dim
    if s.written_layer:
        g = settings.attention_groups
        peak = 2 * h + a + 4 * kv + 5 * a / g  # of a group: q, dq, dout, and the kernel's fp32 dq
        # the pieces after attention, with the next layer's tensors on their way
        after = 2 * h + a + 2 * kv
    else:
        # x, norms' outputs, x2, dy, dx and temporaries; q, k, v and their gradients; out, dout; the
        # kernel's fp32 dq
        peak = 6 * h + 4 * a + 6 * kv + 2 * a
        after = 4 * h + 2 * a
    if s.width == 4:
        # key heads repeated for their query heads, and the gradients of those copies
        # (sp/backends/efficient.py)
        peak += 4 * a
    coming = (
        0
        if settings.offload == "none"
        else h
        + (
            kept_bytes(s)
            if settings.offload == "inputs+attention" and settings.keep_attention > 0
            else 0
        )
    )
    attention = peak + (0 if settings.late_prefetch else coming)
    if settings.segment_layers > 1:
        # what the segment's forward parked last is still on its way out
        attention = max(attention + coming, 3 * h + 2 * a + 2 * kv)
    working = max(attention * tokens, (after + coming) * tokens + chunk_bytes(s, settings, tokens))
    # cos and sin; ids, labels, positions, log-probabilities
    return working + (4 * s.head_dim + 64) * tokens


def chunk_bytes(s: ModelShape, settings: MemorySettings, tokens: int) -> float:
    """Temporaries of one piece of the layer: six MLP-wide and eight hidden-wide numbers."""
    return min(settings.mlp_chunk or tokens, tokens) * (6 * s.width * s.ffn + 8 * hidden_bytes(s))


def waiting(job: TrainingJob, settings: MemorySettings) -> tuple[float, float]:
    """Bytes of all layers' inputs and kept attention outputs on the GPU and on the host, for one
    GPU.
    """
    s = job.shape
    how = (
        settings.segment_layers,
        settings.offload,
        settings.last_layers_on_gpu,
        settings.keep_attention,
    )
    gpu, host = _waiting_of_a_token(s.layers, hidden_bytes(s), kept_bytes(s), *how)
    return gpu * job.local, host * job.local


@functools.lru_cache(4096)
def _waiting_of_a_token(
    layers: int,
    h: int,
    o: int,
    k: int,
    offload: str,
    last_layers_on_gpu: int,
    keep_attention: float,
) -> tuple[float, float]:
    """Bytes on the GPU and on the host, with `h` and `o` of a layer's input and kept attention; `k`
    layers a segment.
    """
    # layers from here on stay on the GPU
    stays = layers - last_layers_on_gpu if offload != "none" else 0
    gpu = host = 0.0
    for i in range(0, layers, k):
        last = min(i + k, layers) - 1
        kept = o if last >= layers - round(keep_attention * layers) else 0
        there = i < stays
        host += h if there else 0
        gpu += 0 if there else h
        if there and offload == "inputs+attention":
            host += kept
        else:
            gpu += kept
    if k > 1:  # the segment that is open
        inner_gpu = min(k - 1, layers - stays)
        gpu += inner_gpu * (h + o)
        if inner_gpu < k - 1:
            host += (k - 1) * (h + (o if offload == "inputs+attention" else 0))
            gpu += (k - 1 - inner_gpu) * (0 if offload == "inputs+attention" else o)
    return gpu, host


def states(job: TrainingJob, settings: MemorySettings) -> tuple[dict[str, float], float]:
    """Bytes of weights and optimizer on one GPU, and of the optimizer on the host for each GPU."""
    s, n = job.shape, job.shards
    frozen = s.parameters - s.trainable
    weights = (s.width * frozen + job.master * s.trainable) / n
    split = (10 + 4 * job.accumulates) * s.trainable / n if job.master == 2 else None
    if settings.optimizer == "gpu":
        return {"weights": weights, "optimizer": split or job.state_bytes * s.trainable / n}, 0.0
    return {"weights": weights}, split or 8 * s.trainable / n


def leaves(job: TrainingJob, settings: MemorySettings) -> bool:
    """Gradients go to the host during backward."""
    return settings.optimizer == "host" and (job.overlaps or settings.gradients == "host")


def moments(job: TrainingJob, settings: MemorySettings) -> list[dict[str, float]]:
    """Bytes on one GPU, beside weights and states, at the three moments of backward that can be its
    peak.

    Backward gives up what waited layer by layer while gradients come layer by layer, so they are
    never there together, unless gradients are there from the start (`early`). The moments: the
    output layer; the first layer of backward, when everything waits; the last.
    """
    s, n, t = job.shape, job.shards, job.local
    waits = "layer inputs and kept attention"
    if settings.checkpoint == "none":
        stored, working = (
            t
            * s.layers
            * s.width
            / 2
            * (34.0 * s.hidden + 2 * 2 * 4 * s.ffn + 12 * s.heads * s.head_dim),
            0.0,
        )
        waits = "activations"
    else:
        stored, working = waiting(job, settings)[0], working_set(s, settings, t)
        if job.sp > 1:  # keys and values on their way, and the sums of their gradients
            working += 4 * s.width * s.kv_heads * s.head_dim * t
    gradients = job.master * s.trainable / n
    early = job.accumulates and job.master != 2
    if leaves(job, settings) and not early:
        # A matrix, or a layer's shard, is given up as a whole.
        gradients = min(
            gradients,
            job.master * (LEAVING + max(s.head_parameters, s.trained_layer_parameters) / n),
        )
    head = s.head_parameters if s.head_trained else 0
    # Sharded: the embedding and the output layer are gathered for the whole pass, and the latter's
    # gradient is reduced at its end.
    gathered = s.width * (2 * s.head_parameters + head) if n > 1 else 0
    logits = min(HEAD_CHUNK_NUMBERS, t * s.vocab) * 10
    # Gradients of one layer: fp32 sums of pieces, and the bf16 result; sharded: two gathered layers
    # and the fp32 reduction as well.
    one, trained = s.width * s.layer_parameters, s.width * s.trained_layer_parameters
    layer = {
        "one layer's parameters and gradients": (
            3 * trained + (2 * one + 2 * trained if n > 1 else 0)
        ),
        "working set of a layer": working,
    }
    # What is left for the last layer of backward: the segment that it is in, forward once more.
    open_segment = 0
    if settings.segment_layers > 1:
        there = s.layers - settings.last_layers_on_gpu > 0 and settings.offload != "none"
        kept = 0 if there and settings.offload == "inputs+attention" else kept_bytes(s)
        open_segment = (settings.segment_layers - 1) * ((0 if there else hidden_bytes(s)) + kept)
    first = gradients if early else job.master * head / n
    return [
        {
            waits: stored,
            "gradients": gradients if early else 0.0,
            "output layer": gathered + 6 * head + logits,
        },
        {waits: stored, "gradients": first, "output layer": gathered} | layer,
        {waits: open_segment * t, "gradients": gradients, "output layer": gathered} | layer,
    ]


def budget(job: TrainingJob, settings: MemorySettings, timed: bool = True) -> Budget:
    """What a choice takes: the moment of backward that has most on the GPU. Without `timed`,
    seconds are 0: they take longest to count.
    """
    gpu, host_optimizer = states(job, settings)
    gpu |= max(moments(job, settings), key=lambda items: sum(items.values())) | {"runtime": CONTEXT}
    on_host = job.machine.on_host
    host = {"optimizer": host_optimizer * on_host}
    # else they are in the sums of micro-batches
    if leaves(job, settings) and not job.overlaps and not (job.accumulates and job.master == 2):
        host["gradients"] = job.master * job.shape.trainable / job.shards * on_host
    if settings.checkpoint != "none":
        host["layer inputs and kept attention"] = waiting(job, settings)[1] * on_host
    return Budget(
        gpu, {k: v for k, v in host.items() if v}, seconds(job, settings) if timed else 0.0
    )


def seconds(job: TrainingJob, settings: MemorySettings) -> float:
    """One step, one row a sequence-parallel group."""
    s, m, t = job.shape, job.machine.computing(job.shape.width), job.local
    full = s.trainable == s.parameters
    mlp = s.active_layer_parameters - s.attention_parameters
    backward = 2.0 if full else 1.2
    again = 0.0 if settings.checkpoint == "none" else 1.0
    extra = (
        (settings.segment_layers - 1) / settings.segment_layers
        if settings.segment_layers > 1
        else 0.0
    )
    recomputed_mlp = again * (2 / 3 if s.written_layer else 1.0)
    linear = (
        2.0
        * s.layers
        * (
            s.attention_parameters * (1 + again + backward + extra)
            + mlp * (1 + recomputed_mlp + backward + extra)
        )
    )
    linear += 2.0 * s.head_parameters * (2 + backward)
    attention = 2.0 * job.tokens * s.heads * s.head_dim * s.layers
    if settings.checkpoint == "none":
        runs = 1.0
    elif settings.segment_layers > 1:
        runs = 2.0 - settings.keep_attention / settings.segment_layers
    else:
        runs = 2.0 - settings.keep_attention
    penalty = (
        1.0
        + 0.01 * (settings.attention_groups.bit_length() - 1)
        + (0.01 if settings.late_prefetch else 0.0)
    )
    penalty += (0.004 if settings.offload != "none" else 0.0) + (
        0.002 if settings.offload == "inputs+attention" else 0.0
    )
    penalty += (
        min(0.05, 40.0 / settings.mlp_chunk)
        if settings.mlp_chunk and settings.mlp_chunk < t
        else 0.0
    )
    compute = t * (
        linear / m.gemm * penalty
        + attention * (runs / m.attention_forward + 2.5 / m.attention_backward)
    )
    compute /= 0.925  # norms, rotary, launches: measured 0.88 to 0.92 of the products alone
    _, host_waiting = waiting(job, settings)
    copied = host_waiting / m.copies
    gathered = (2 * 3 * s.parameters / m.links) if job.shards > 1 else 0.0
    forward = compute * 0.3
    backward_seconds = max(compute - forward, copied, gathered * 2 / 3)
    step = max(forward, copied, gathered / 3) + backward_seconds
    # nothing is hidden wholly; and of two ways as fast, the one with less to do
    step += 0.005 * (compute + copied)
    if settings.optimizer == "host":
        update = (
            28.0 * s.trainable / job.shards * m.on_host / m.host_memory
            + 4.0 * s.trainable / job.shards / m.copies
        )
        # During backward, but for the last gradient, the embedding's.
        last = update * min(1.0, s.head_parameters / max(s.trainable, 1))
        step += max(update - backward_seconds, last) if job.overlaps else update
        if (
            leaves(job, settings) and not job.overlaps
        ):  # copied once more within the host, beside backward
            step += 0.05 * 4.0 * s.trainable / job.shards * m.on_host / m.host_memory
    else:
        step += 28.0 * s.trainable / job.shards / 2e12
    return step


def roofline(job: TrainingJob) -> float:
    """Seconds of a step that keeps attention, recomputes two thirds of the MLP and does nothing but
    products, at the machine's rates.
    """
    s, m = job.shape, job.machine.computing(job.shape.width)
    mlp = s.active_layer_parameters - s.attention_parameters
    linear = 2.0 * (s.layers * (4 * s.attention_parameters + 3.67 * mlp) + 3 * s.head_parameters)
    attention = 2.0 * job.tokens * s.heads * s.head_dim * s.layers
    return job.local * (
        linear / m.gemm + attention * (1 / m.attention_forward + 2.5 / m.attention_backward)
    )


def candidates(job: TrainingJob, mode: str) -> Iterator[MemorySettings]:
    """Settings to consider. `fast`: nothing leaves the GPU. `long`: the leanest layer. `auto`:
    all. Their `pool_bytes` is 0: the budget of the settings says what the pool must hold.
    """
    shape = job.shape
    groups = [
        g for g in (1, 2, 4, 8) if shape.kv_heads % g == 0 and (g == 1 or shape.written_layer)
    ]
    chunks: list[int | None] = [None, 32768, 16384, 8192, 4096, 2048]
    segments = [1, 2, 4, 6]
    offloads = ["none", "inputs+attention", "inputs"]
    places = [("gpu", "gpu"), ("host", "gpu")]  # of the optimizer and of gradients that wait for it
    if job.leavable and not job.overlaps:
        places.append(("host", "host"))
    if mode == "fast":
        segments, offloads, places = [1], ["none"], places[:1]
    if mode == "long":
        groups, chunks, offloads = groups[-1:], [4096], ["inputs+attention", "inputs"]
    chunks = [chunk for chunk in chunks if chunk is None or chunk < job.local] or [None]
    if mode == "auto":
        yield MemorySettings(checkpoint="none")
    for segment_layers, offload, group, chunk, (place, gradients) in itertools.product(
        segments, offloads, groups, chunks, places
    ):
        for late in (False, True) if offload != "none" and mode != "fast" else (False,):
            if mode == "long" and not late:
                continue
            for saved in (1.0, 0.75, 0.5, 0.25, 0.0):
                if offload == "inputs+attention" and saved == 0.0:
                    continue
                eighths = (
                    (1,) if offload == "none" else (1, *(n * shape.layers // 8 for n in EIGHTHS))
                )
                for stay in sorted({n for n in eighths if 1 <= n < shape.layers}) or [1]:
                    yield MemorySettings(
                        keep_attention=saved,
                        offload=offload,  # type: ignore[arg-type]
                        last_layers_on_gpu=stay,
                        mlp_chunk=chunk,
                        attention_groups=group,
                        segment_layers=segment_layers,
                        late_prefetch=late,
                        optimizer=place,  # type: ignore[arg-type]
                        gradients=gradients,  # type: ignore[arg-type]
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
    for candidate in candidates(job, mode):
        settings = with_fixed(candidate, fixed, mode) if fixed else candidate
        if settings is None:
            continue
        needs = budget(job, settings, timed=False)
        if fits(job, needs, host_share):
            needs = dataclasses.replace(needs, seconds=seconds(job, settings))
            # Of equals, the one that leaves more room. The last eighth is taken for a gain of some
            # percent, not for less: peaks are planned within an eighth, and what a first step
            # leaves free is used from the second on (`corrected`).
            full = needs.gpu_total / job.machine.gpu_bytes
            key = needs.seconds * (
                1 + 0.002 * full + 0.03 * max(0.0, full - CAREFUL) / (MARGIN - CAREFUL)
            )
            if best is None or key < best[0]:
                best = (key, settings, needs)
        else:
            short = needs.gpu_total / (MARGIN * job.machine.gpu_bytes)
            if job.machine.host_bytes:
                short = max(short, needs.host_total / (host_share * job.machine.host_bytes))
            if least is None or short < least[0]:
                least = (short, settings)
    if best is not None:
        return best[1], best[2], True
    assert least is not None
    return least[1], budget(job, least[1]), False


def longest(
    job: TrainingJob, mode: str = "auto", host_share: float = HOST_SHARE, unit: int = 8192
) -> int:
    """Tokens of the longest row, in multiples of `unit`, for which some settings fit. 0 if none
    do.
    """
    most = 2**14

    def fit(settings: MemorySettings, units: int) -> bool:
        longer = dataclasses.replace(job, tokens=units * unit)
        return fits(longer, budget(longer, settings, timed=False), host_share)

    low = 0
    # A chunk that is longer than a row is the whole row: the candidates of the longest row are all
    # that there are. The leanest come last. A candidate is looked at further only where it fits a
    # longer row than those before it.
    of_longest = list(candidates(dataclasses.replace(job, tokens=most * unit), mode))
    for settings in reversed(of_longest):
        high = low + 1
        while high < most and fit(settings, high):
            low, high = high, min(high * 2, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fit(settings, middle) else (low, middle)
    return low * unit
