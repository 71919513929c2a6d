"""Where a layer's tensors are stored between its forward and its backward: on the device, on the
host, or nowhere (computed again).

`Activations` serves one model. Each layer call gives it the layer's input and, if it is saved, its
attention's output, and gets a handle whose `get()` in backward returns them. Which of the three
places it is, is decided here and known to nobody else.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longfactory.errors import ConfigError
from longfactory.memory.host_pool import HostPool, OffloadedTensors
from longfactory.memory.layer_ops import autocast_as_now
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, LayerMoments, StepMoments, Technique, Work

Pair = tuple[Tensor, Tensor]  # attention output and log-sum-exp


class OnDevice:
    """Tensors that stay on the device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)

    def fetch(self) -> list[Tensor]:
        return list(self._tensors)


Stored = OnDevice | OffloadedTensors


class LayerInput:
    """The input of one layer call and, after `set_attention`, what its attention returned."""

    def __init__(
        self, stored: Stored | None, segment: CheckpointSegment | None = None, position: int = 0
    ) -> None:
        self._stored = stored
        self._segment = segment
        self._position = position
        self._saved: Stored | None = None

    @property
    def last_in_segment(self) -> bool:
        return self._segment is None or self._segment.is_last(self._position)

    def input(self) -> Tensor:
        """The layer's input. It may be written to if `owned`."""
        if self._segment is not None:
            return self._segment.input(self._position)
        assert self._stored is not None
        return self._stored.fetch()[0]

    def attention(self) -> list[Pair] | None:
        """What the layer's attention calls returned, in their order; None if it was not saved. Ask
        after `input()`.
        """
        saved = self._saved
        if self._segment is not None:
            saved = self._segment.attention(self._position) or saved
        if saved is None:
            return None
        tensors = saved.fetch()
        return list(zip(tensors[::2], tensors[1::2], strict=True))

    def set_attention(self, saved: Stored | None) -> None:
        self._saved = saved


class CheckpointSegment:
    """Consecutive layer calls of which only the first one's input is stored. Backward runs them
    forward once more, all but the last.
    """

    def __init__(self, store: Activations) -> None:
        self._store = store
        self._first: Stored | None = None
        self._calls: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        # backward, where they run again, is not under autocast
        self._amp = autocast_as_now(store.device.type)
        self._inputs: dict[int, Stored] = {}
        self._saved: dict[int, Stored | None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def is_last(self, position: int) -> bool:
        index, _ = self._calls[position]
        return (
            position == self._store.settings.segment_layers - 1 or index == self._store.layers - 1
        )

    def add(self, index: int, x: Tensor, call: Callable[[Tensor], Tensor]) -> LayerInput:
        if not self._calls:
            self._first = self._store.save(index, [x])
        self._calls.append((index, call))
        return LayerInput(None, self, len(self._calls) - 1)

    def input(self, position: int) -> Tensor:
        if position not in self._inputs:
            self._forward(position)
        return self._inputs.pop(position).fetch()[0]

    def attention(self, position: int) -> Stored | None:
        return self._saved.pop(position, None)

    @torch.no_grad()
    def _forward(self, position: int) -> None:
        if self._first is None:
            raise RuntimeError("A second backward through checkpointed layers is not possible.")
        (x,) = self._first.fetch()
        self._first = None
        for p, (index, call) in enumerate(self._calls[:position]):
            self._inputs[p] = self._store.save(index, [x])
            pairs: list[Pair] = []
            with self._store.recording(pairs), self._amp():
                x = call(x)
            self._saved[p] = self._store.save_attention(index, pairs)
        self._inputs[position] = OnDevice([x])
        self._calls.clear()  # they know this segment: a circle of references


class Activations:
    """Decides where the tensors of `layers` decoder layers are stored.

    `attention_share`: bytes of what one layer's attention returns, of those of its input.
    `longest`: this rank's tokens of the longest row, if known: host memory is locked for that row,
    whichever comes first.
    """

    def __init__(
        self,
        settings: MemorySettings,
        layers: int,
        device: torch.device | str,
        attention_share: float = 1.0,
        longest: int = 0,
    ) -> None:
        self.settings = _with_a_pool(settings)
        self.attention_share = attention_share
        self.longest = longest
        self.layers = layers
        self.device = torch.device(device)
        self.pool: HostPool | None = None
        self._sends = (0, 0)  # inputs and attention outputs that one step sends to the host
        self._open_pool()
        # a segment is being run forward again, and these are its attention outputs
        self.record: list[Pair] | None = None
        self._segment: CheckpointSegment | None = None

    def _open_pool(self) -> None:
        s = self.settings
        if s.offload == "none":
            return
        there = [
            i
            for i in range(0, self.layers, s.segment_layers)
            if i < self.layers - s.last_layers_on_gpu
        ]
        saving = [
            i
            for i in range(self.layers - s.last_layers_on_gpu)
            if self.saves_attention(i) and (i + 1) % s.segment_layers == 0
        ]
        outputs = len(saving) + s.segment_layers - 1 if s.offload == "inputs+attention" else 0
        self._sends = (len(there) + s.segment_layers - 1, outputs)
        expect = max(1, sum(self._sends))
        if self.pool is None:
            self.pool = HostPool(self.device, s.pool_bytes, expect)
        self.pool.limit, self.pool.expect = s.pool_bytes, expect

    def change(self, settings: MemorySettings) -> None:
        """Other settings from the next step on. Whether layers are recomputed at all, and which
        layer it is, cannot change any more.

        Raises:
            ConfigError: they would.
        """
        if (settings.checkpoint, settings.layer) != (self.settings.checkpoint, self.settings.layer):
            raise ConfigError(
                "memory: checkpoint and layer are fixed once the engine is in the model."
            )
        self.settings = _with_a_pool(settings)
        if settings.offload == "none" and self.pool is not None:
            self.pool.close()
            self.pool = None
        self._open_pool()

    def reserve(self, nbytes: int) -> None:
        """Lock the host memory of a whole step now, for tensors of `nbytes` each, instead of in its
        first forward pass.
        """
        if self.pool is not None:
            self.pool.reserve(nbytes)

    def saves_attention(self, index: int) -> bool:
        """Whether the attention output of this layer is saved in the first pass."""
        return index >= self.layers - round(self.settings.keep_attention * self.layers)

    def saves_mlp(self, index: int) -> bool:
        """Whether gate and up outputs of this layer are saved in the first pass."""
        return index >= self.layers - round(self.settings.keep_mlp * self.layers)

    def layer_input(self, index: int, x: Tensor, call: Callable[[Tensor], Tensor]) -> LayerInput:
        """`call(x)` runs the layer again, for segments; it is used under `torch.no_grad()`."""
        k = self.settings.segment_layers
        if k == 1:
            self._lock_all(x)
            return LayerInput(self.save(index, [x]))
        if index % k == 0 or self._segment is None:
            self._segment = CheckpointSegment(self)
            self._lock_all(x)
        handle = self._segment.add(index, x, call)
        if index % k == k - 1 or index == self.layers - 1:
            self._segment = None
        return handle

    def save(self, index: int, tensors: Sequence[Tensor]) -> Stored:
        if self.pool is None or index >= self.layers - self.settings.last_layers_on_gpu:
            return OnDevice(tensors)
        return self.pool.offload(tensors)

    def _lock_all(self, x: Tensor) -> None:
        """Before the first layer input [batch, tokens, hidden] is offloaded: pinning is slow, so
        all slots of a step are pinned at once. They are of two sizes, or they would need more than
        the memory planned for them."""
        if self.pool is None or self.pool.locked_bytes > 0:
            return
        nbytes = x.numel() * x.element_size() * max(x.shape[1], self.longest) // x.shape[1] + 512
        kinds = zip((nbytes, int(nbytes * self.attention_share) + 512), self._sends, strict=True)
        count = 0
        for size, more in sorted(kinds, reverse=True):
            count += more
            self.pool.reserve(size, count if more else 0)

    def save_attention(self, index: int, pairs: Sequence[Pair]) -> Stored | None:
        if not pairs:
            return None
        flat = [t for pair in pairs for t in pair]
        return (
            self.save(index, flat)
            if self.settings.offload == "inputs+attention"
            else OnDevice(flat)
        )

    def prefetch(self) -> None:
        """Start the copy back of the layer below."""
        if self.pool is not None:
            both = self.settings.offload == "inputs+attention" and self.settings.keep_attention > 0
            self.pool.prefetch(2 if both else 1)

    @contextlib.contextmanager
    def recording(self, pairs: list[Pair]) -> Iterator[None]:
        before, self.record = self.record, pairs
        try:
            yield
        finally:
            self.record = before


def _with_a_pool(settings: MemorySettings) -> MemorySettings:
    """The settings, which say how much host memory offload may pin.

    Raises:
        ConfigError: they do not.
    """
    if settings.offload != "none" and settings.pool_bytes == 0:
        raise ConfigError(
            f"memory: offload is {settings.offload} and pool_bytes is 0; expected the bytes of host"
            " memory that it may pin. Set pool_bytes."
        )
    return settings


# ---- what the planner needs to know --------------------------------------------------------------

STORED = "layer inputs and saved attention outputs"  # item of the budget


def stored_bytes(job: TrainingJob, settings: MemorySettings) -> tuple[float, float]:
    """Bytes of all layers' inputs and saved attention outputs on the GPU and on the host, for one
    GPU.
    """
    gpu, host = _stored_of_a_token(
        job.hidden_bytes,
        job.shape.saved_of_layers,
        settings.segment_layers,
        settings.offload,
        settings.last_layers_on_gpu,
        settings.keep_attention,
    )
    return gpu * job.local, host * job.local


@functools.lru_cache(4096)
def _stored_of_a_token(
    hidden: int,
    outputs: tuple[int, ...],
    segment_layers: int,
    offload: str,
    last_layers_on_gpu: int,
    keep_attention: float,
) -> tuple[float, float]:
    """Bytes on the GPU and on the host, with `hidden` of a layer's input and `outputs` of the saved
    attention output of each layer.
    """
    layers = len(outputs)
    # layers from here on stay on the GPU
    stays = layers - last_layers_on_gpu if offload != "none" else 0
    gpu = host = 0.0
    for first in range(0, layers, segment_layers):
        last = min(first + segment_layers, layers) - 1
        saved = outputs[last] if last >= layers - round(keep_attention * layers) else 0
        leaves = first < stays
        host += hidden if leaves else 0
        gpu += 0 if leaves else hidden
        if leaves and offload == "inputs+attention":
            host += saved
        else:
            gpu += saved
    if segment_layers > 1:  # the segment that is open
        inner, output = segment_layers - 1, max(outputs)
        inner_gpu = min(inner, layers - stays)
        gpu += inner_gpu * (hidden + output)
        if inner_gpu < inner:
            host += inner * (hidden + (output if offload == "inputs+attention" else 0))
            gpu += (inner - inner_gpu) * (0 if offload == "inputs+attention" else output)
    return gpu, host


def _coming_bytes(job: TrainingJob, settings: MemorySettings) -> int:
    """Of one layer's tensors, on their way from the host."""
    if settings.offload == "none":
        return 0
    both = settings.offload == "inputs+attention" and settings.keep_attention > 0
    of_a_token = job.hidden_bytes + (job.shape.saved_attention_bytes if both else 0)
    return of_a_token * job.local


def _offload_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[str]:
    if mode == "fast":
        return ("none",)
    return (
        ("inputs+attention", "inputs") if mode == "long" else ("none", "inputs+attention", "inputs")
    )


def _offload_fixed(arguments: Any) -> dict[str, Any]:
    wanted = arguments.offload_activations
    if wanted == "auto":
        return {}
    return {"offload": "none" if wanted is False else "any"}


def _offload_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    if settings.checkpoint == "none":
        return Bytes()
    shape = job.shape
    gpu, host = stored_bytes(job, settings)
    # What is left for the last layer of backward: the segment that it is in, forward once more.
    leaves = shape.layers - settings.last_layers_on_gpu > 0 and settings.offload != "none"
    outputs_leave = leaves and settings.offload == "inputs+attention"
    open_layer = (0 if leaves else job.hidden_bytes) + (
        0 if outputs_leave else shape.saved_attention_bytes
    )
    left = (settings.segment_layers - 1) * open_layer * job.local
    coming = _coming_bytes(job, settings)
    return Bytes(
        {STORED: StepMoments(gpu, gpu, left)}, {STORED: host}, LayerMoments(coming, coming)
    )


def _offload_work(job: TrainingJob, settings: MemorySettings) -> Work:
    slower = {"none": 0.0, "inputs": 0.004, "inputs+attention": 0.004 + 0.002}[settings.offload]
    return Work(slower=slower, copied_bytes=stored_bytes(job, settings)[1])


def _offload_words(settings: MemorySettings) -> str | None:
    if settings.offload == "none":
        return None
    what = STORED if settings.offload == "inputs+attention" else "layer inputs"
    count = settings.last_layers_on_gpu
    if count == 0:
        return f"{what} offloaded to the host"
    last = "layer" if count == 1 else f"{count} layers"
    return f"{what} offloaded to the host, except those of the last {last}"


def _offload_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    return (3, "offload_activations: true") if settings.offload == "none" else None


OFFLOAD = Technique(
    "offload",
    _offload_values,
    2,
    _offload_fixed,
    _offload_bytes,
    _offload_work,
    words=_offload_words,
    advice=_offload_advice,
)


def _last_layers_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[int]:
    """Some eighths of the layers."""
    layers = job.shape.layers
    if settings.offload == "none":
        return (1,)
    return sorted(
        {n for n in (1, *(n * layers // 8 for n in (1, 2, 4, 6))) if 1 <= n < layers}
    ) or (1,)


def _fewer_last_layers(job: TrainingJob, settings: MemorySettings) -> int:
    return max(1, settings.last_layers_on_gpu // 2)


# Its bytes are those of `OFFLOAD`.
LAST_LAYERS = Technique("last_layers_on_gpu", _last_layers_values, 9, leaner=_fewer_last_layers)


def _late_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[bool]:
    if settings.offload == "none" or mode == "fast":
        return (False,)
    return (True,) if mode == "long" else (False, True)


def _late_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    if not settings.late_prefetch:
        return Bytes()
    return Bytes(layer=LayerMoments(attention=-_coming_bytes(job, settings)))


def _late_work(job: TrainingJob, settings: MemorySettings) -> Work:
    return Work(slower=0.01 if settings.late_prefetch else 0.0)


def _always_late(job: TrainingJob, settings: MemorySettings) -> bool:
    return True


LATE_PREFETCH = Technique(
    "late_prefetch",
    _late_values,
    7,
    bytes=_late_bytes,
    work=_late_work,
    leaner=_always_late,
    ordered=True,
)


def _segment_values(job: TrainingJob, mode: str, settings: MemorySettings) -> Sequence[int]:
    return (1,) if mode == "fast" else (1, 2, 4, 6)


def _segment_fixed(arguments: Any) -> dict[str, Any]:
    layers = arguments.segment_layers
    return {} if layers == "auto" else {"segment_layers": int(layers)}


def _segment_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """What the segment's forward offloaded last is still on its way out."""
    if settings.segment_layers == 1:
        return Bytes()
    shape = job.shape
    forward = 3 * job.hidden_bytes + 2 * shape.attention_bytes + 2 * shape.key_bytes
    leaving = _coming_bytes(job, settings)
    return Bytes(layer=LayerMoments(attention=leaving, segment=forward * job.local))


def _segment_work(job: TrainingJob, settings: MemorySettings) -> Work:
    layers = settings.segment_layers
    return Work(again_forward=(layers - 1) / layers if layers > 1 else 0.0)


def _segment_words(settings: MemorySettings) -> str | None:
    if settings.checkpoint == "none":
        return None
    if settings.segment_layers == 1:
        return "every layer recomputed"
    return f"activation checkpoint every {settings.segment_layers} layers"


def _segment_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    helps = settings.segment_layers == 1 and settings.offload != "none"
    return (8, "segment_layers: 4") if helps else None


SEGMENTS = Technique(
    "segment_layers",
    _segment_values,
    1,
    _segment_fixed,
    _segment_bytes,
    _segment_work,
    words=_segment_words,
    advice=_segment_advice,
)
