"""Chunks of a recurrence in Triton: what `within` and `states` compute with PyTorch.

Tokens are read where they lie; nothing is laid out in chunks but what is computed. Products are of
TF32, rounded to the nearest, with sums in fp32; the inverse is of three TF32 products. A bf16
model's own rounding is four times as large. Kernels that a decay of each channel needs of its own
are `channel_kernels`; the others serve both.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from longfactory.sp.shared_memory import run_what_fits

from . import backward_kernels, channel_kernels, forward_kernels
from .fragments import Chunks

SETTINGS: dict[str, tuple[int, int, int]] = {
    "lower": (4, 1, 32),
    "invert": (1, 1, 16),
    "merge": (1, 1, 16),
    "solve": (4, 1, 16),
    "scan": (8, 2, 32),
    "outputs": (4, 1, 32),
    "output_gradients": (4, 1, 64),
    "reverse": (4, 1, 32),
    "value_gradients": (8, 1, 32),
    "key_gradients": (4, 2, 16),
    "channel_sums": (4, 1, 32),
    "channel_products": (4, 1, 16),
    "channel_squares": (4, 1, 32),
    "channel_gradients": (4, 1, 16),
    "channel_decays": (4, 1, 32),
}
"""Warps and stages of each kernel, and the columns of values (from key_gradients on: of keys) that
it takes at once: the fastest of those that `benchmarks/recurrent.py tune` tried on a H200. With two
stages `reverse` would load a chunk ahead, as `scan` does (not timed; 121 KB of shared memory in
place of 56, so that a multiprocessor has one program, not two).
"""

SMALLER: dict[str, tuple[tuple[int, int, int], ...]] = {
    "scan": ((8, 1, 32), (8, 1, 16)),
    "outputs": ((4, 1, 16),),
    "output_gradients": ((4, 1, 16),),
    "reverse": ((4, 1, 16),),
    "key_gradients": (),
}
"""The same for GPUs whose shared memory is too small for `SETTINGS`, from the fastest on; in
float32 the last of all is without tensor cores (`Job._fitting`). `key_gradients` needs that only in
the machine code of Hopper, whose GPUs have more: 112 KB in float32, and 64 KB without tensor cores
(68 and 56 KB for compute capability 8.9). Of the other kernels those of every head fit in 99 KB
(tests/sp/test_shared_memory.py compiles them).
"""

Choice = tuple[tuple[int, int, int], str]
"""Settings, and the precision of products."""

IN_PARTS = (8, 1, 16), 3, (128, 64)
"""Where products are `from_registers`: settings of `value_gradients`, the parts that it takes its
sums in, and the keys that it takes at once (of a plain recurrence, of a delta rule). Without parts
the sums take more registers than there are: ptxas kept 6 KB of each thread in local memory (compute
capability 8.9, bf16, heads of 128), so it is 16 bytes. Not timed.
"""


def runs_on(device: torch.device) -> bool:
    """Whether Triton computes on this device: a CUDA device, or any where it interprets."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def from_registers(device: torch.device) -> bool:
    """Whether tensor cores take all that they multiply from registers: those of Ampere, Ada and RTX
    50; Hopper's read shared memory.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (8, 12)


@dataclasses.dataclass
class Job:
    """Some heads of a recurrence, and their chunks.

    Attributes:
        q, k: [T, hk, Dk], normalised and scaled.
        v: [T, h, Dv]. g: [T, h] or [T, h, Dk]. beta: [T, h].
        delta: the kind of recurrence.
        precision: of products: tf32, tf32x3, which is near that of float32, or ieee, which is that
            of float32, without tensor cores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    chunks: Chunks
    delta: bool
    precision: str = "tf32"

    def __post_init__(self) -> None:
        self.v = self.v if self.v.stride(2) == 1 else self.v.contiguous()
        self.beta = self.beta if self.beta.stride(1) == 1 else self.beta.contiguous()
        self.g = self.g if self.g.stride(-1) == 1 else self.g.contiguous()
        if self.q.stride() != self.k.stride() or self.q.stride(2) != 1:
            self.q, self.k = self.q.contiguous(), self.k.contiguous()
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        nothing = self._new(1)
        self.w = self._new(n, h, c, self.key_dim) if self.delta else nothing
        self.u = self._new(n, h, c, self.value_dim) if self.delta else nothing
        self.t = self._new(n, h, c, c) if self.delta else nothing
        self.p = self._new(n, h, c, c) if self.channels else nothing
        self.sums = self._new(n, h, c, *self.g.shape[2:])
        if self.channels:
            self._channel_products()
        else:
            settings = self._settings("lower")
            del settings["BV"]
            forward_kernels.chunk_lower[(n, h)](
                self.k, self.g, self.beta, *self._chunk_rows, self.sums, self.t,
                *self.k.stride()[:2], self.g.stride(0), self.beta.stride(0), *self._sizes[:3],
                **settings, DELTA=self.delta,
            )  # fmt: skip
        if self.delta:
            self._solve()

    def _channel_products(self) -> None:
        """Sums of decays, scores, and what is to be inverted."""
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        settings = self._columns("channel_sums")
        channel_kernels.channel_sums[(n, h, triton.cdiv(self.key_dim, settings["BD"]))](
            self.g, *self._chunk_rows, self.sums, *self.g.stride()[:2], h, self.key_dim, C=c,
            **settings,
        )  # fmt: skip
        channel_kernels.channel_products[(n, h, c // 16)](
            self.q, self.k, self.beta, *self._chunk_rows, self.sums, self.p, self.t,
            *self.k.stride()[:2], self.beta.stride(0), *self._sizes[:3], C=c,
            BK=max(16, triton.next_power_of_2(self.key_dim)), DELTA=self.delta,
            PRECISION=self.precision, **self._columns("channel_products"),
        )  # fmt: skip

    def _solve(self) -> None:
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        warps = SETTINGS["invert"][0], SETTINGS["merge"][0]
        forward_kernels.chunk_invert[(n, h, c // 16)](self.t, h, C=c, num_warps=warps[0])
        forward_kernels.chunk_merge[(n, h)](self.t, h, C=c, num_warps=warps[1])
        settings = self._settings("solve")
        settings["BK"] = min(settings["BK"], 2 * settings["BV"])
        forward_kernels.chunk_solve[(n, h)](
            self.k, self.v, self.beta, *self._chunk_rows, self.sums, self.w, self.u, self.t,
            *self.k.stride()[:2], *self.v.stride()[:2], self.beta.stride(0), *self._sizes,
            **settings, CHANNELS=self.channels,
        )  # fmt: skip

    @property
    def channels(self) -> bool:
        """Whether each key channel has a decay of its own."""
        return self.g.dim() == 3

    @property
    def heads(self) -> int:
        return self.v.shape[1]

    @property
    def key_dim(self) -> int:
        return self.k.shape[2]

    @property
    def value_dim(self) -> int:
        return self.v.shape[2]

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        return self.heads, self.heads // self.k.shape[1], self.key_dim, self.value_dim

    def _settings(self, kernel: str) -> dict[str, Any]:
        return self._options((SETTINGS[kernel], self.precision))

    def _options(self, choice: Choice) -> dict[str, Any]:
        (warps, stages, columns), precision = choice
        return {
            "C": self.chunks.size,
            "BK": max(16, triton.next_power_of_2(self.key_dim)),
            "BV": min(max(16, triton.next_power_of_2(self.value_dim)), columns),
            "PRECISION": precision,
            "num_warps": warps,
            "num_stages": stages,
        }

    def _fitting(self, kernel: str, launch: Callable[[Choice], None], *form: bool) -> None:
        """Launches with the fastest settings that the GPU has room for. Three products of TF32
        hold their factors twice: in float32 the last choice is without tensor cores.

        Args:
            form: flags that the kernel is compiled for besides. Each form has its own choice: it
                runs with the settings with which it was compared before the first step.
        """
        every = (SETTINGS[kernel], *SMALLER[kernel])
        if kernel == "scan" and self.precision == "tf32x3" and self.key_dim > 128:
            every = every[1:]  # two chunks of a delta rule would fit in no GPU's shared memory
        choices = [(settings, self.precision) for settings in every]
        if self.precision == "tf32x3":
            choices.append((every[-1], "ieee"))
        compiled_for = (self.v.device, self.v.dtype, self.key_dim, self.value_dim)
        call = (f"chunk_{kernel}", *compiled_for, self.delta, self.channels, *form)
        run_what_fits(call, choices, launch, OutOfResources)

    def _columns(self, kernel: str) -> dict[str, int]:
        """Of kernels that take some columns of keys at once."""
        return self._columns_of(SETTINGS[kernel])

    def _columns_of(self, settings: tuple[int, int, int]) -> dict[str, int]:
        warps, stages, columns = settings
        most = min(columns, max(16, triton.next_power_of_2(self.key_dim)))
        return {"BD": most, "num_warps": warps, "num_stages": stages}

    @property
    def _chunk_rows(self) -> tuple[Tensor, Tensor]:
        return self.chunks.first_rows, self.chunks.lengths

    def _new(self, *shape: int) -> Tensor:
        return self.v.new_empty(*shape, dtype=torch.float32)

    def scan(
        self, start: Tensor, keep: bool = True, counts: Tensor | None = None, values: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States before the chunks, what is written, and states after the fragments.

        Args:
            start: [F, h, Dk, X], in the order of the chunks' fragments.
            keep: else only the last are returned.
            counts: chunks of each fragment that are gone through; by default all.
            values: X is Dv; else nothing new is written, and X is any width.
        """
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        wide = start.shape[3]
        states = self._new(n, h, self.key_dim, wide) if keep else start
        written = self._new(n, h, c, wide) if keep and self.delta else start
        ends = torch.empty_like(start)

        def launch(choice: Choice) -> None:
            options = self._options(choice)
            forward_kernels.chunk_scan[(len(start), h, triton.cdiv(wide, options["BV"]))](
                self.k, self.v, self.beta, *self._chunk_rows, self.sums, self.w, self.u, start,
                states, written, ends, self.chunks.step_starts,
                self.chunks.step_counts if counts is None else counts,
                *self.k.stride()[:2], *self.v.stride()[:2], self.beta.stride(0),
                *self._sizes[:3], wide, **options, DELTA=self.delta,
                CHANNELS=self.channels, KEEP=keep, VALUES=values,
            )  # fmt: skip

        self._fitting("scan", launch, keep, values)
        return states, written, ends

    def outputs(
        self, states: Tensor, written: Tensor, out: Tensor, skip: Tensor | None = None
    ) -> None:
        """Writes [T, h, Dv].

        Args:
            skip: [h], times which values are added.
        """

        def launch(choice: Choice) -> None:
            options = self._options(choice)
            forward_kernels.chunk_outputs[(self.chunks.count, self.heads)](
                self.q, self.k, self.v, self.beta, *self._chunk_rows, self.sums, self.p, states,
                written, self.beta if skip is None else skip, out, *self.k.stride()[:2],
                *self.v.stride()[:2], self.beta.stride(0), *out.stride()[:2], *self._sizes,
                **options, DELTA=self.delta, CHANNELS=self.channels, SKIP=skip is not None,
            )  # fmt: skip

        self._fitting("outputs", launch, skip is not None)

    def output_gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of the states before the chunks and of what is written, by the outputs alone."""
        n, h, c = self.chunks.count, self.heads, self.chunks.size
        d_states = self._new(n, h, self.key_dim, self.value_dim)
        d_written = self._new(n, h, c, self.value_dim)

        def launch(choice: Choice) -> None:
            options = self._options(choice)
            backward_kernels.chunk_output_gradients[(n, h)](
                self.q, self.k, grad, *self._chunk_rows, self.sums, self.p, d_states, d_written,
                *self.k.stride()[:2], *grad.stride()[:2], *self._sizes, **options,
                CHANNELS=self.channels,
            )  # fmt: skip

        self._fitting("output_gradients", launch)
        return d_states, d_written

    def reverse(
        self, d_states: Tensor, d_written: Tensor, d_ends: Tensor, keep: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states after the chunks, of all that is written, and of the fragments'
        first states; without `keep` the last alone.
        """
        d_start = torch.empty_like(d_ends)
        after, d_values = d_start, d_start
        if keep:
            after = torch.empty_like(d_states)
            # Of deltas what the tokens write without the state is not read any more.
            d_values = self.u if self.delta else torch.empty_like(d_written)

        def launch(choice: Choice) -> None:
            options = self._options(choice)
            columns = triton.cdiv(self.value_dim, options["BV"])
            backward_kernels.chunk_reverse[(len(d_ends), self.heads, columns)](
                self.k, *self._chunk_rows, self.sums, self.w, d_states, d_written, d_ends, d_start,
                after, d_values, self.chunks.step_starts, self.chunks.step_counts,
                *self.k.stride()[:2], *self._sizes, **options, DELTA=self.delta,
                CHANNELS=self.channels, KEEP=keep,
            )  # fmt: skip

        self._fitting("reverse", launch, keep)
        return after, d_values, d_start

    def input_gradients(
        self,
        grad: Tensor,
        states: Tensor,
        written: Tensor,
        after: Tensor,
        d_written: Tensor,
        skip: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Of q, k [T, h, Dk], v [T, h, Dv], g (of its shape), beta [T, h], skip [h], fp32 but for
        v's. That of `skip` is left out where there is none.
        """
        tokens, h = self.v.shape[:2]
        dq, dk = self._new(tokens, h, self.key_dim), self._new(tokens, h, self.key_dim)
        dv = self.v.new_empty(tokens, h, self.value_dim)
        dg, d_beta = self._new(*self.g.shape), self._new(tokens, h)
        n, c = self.chunks.count, self.chunks.size
        d_scores, d_last = self._new(n, h, c, c), self._new(n, h, *self.g.shape[2:])
        d_solved = torch.empty_like(self.t)
        # What is taken out of the states is not read any more.
        d_w = self.w
        d_skip = d_last if skip is None else self._new(n, h)
        more = () if skip is None else (d_skip,)
        options, parts = self._settings("value_gradients"), 1
        in_blocks = from_registers(self.v.device)
        if in_blocks:
            taken, parts, keys = IN_PARTS
            options = self._options((taken, self.precision))
            options["BK"] = min(options["BK"], keys[self.delta])
        backward_kernels.chunk_value_gradients[(n, h)](
            self.v, self.beta, grad, *self._chunk_rows, self.t, states, written, after, d_written,
            self.beta if skip is None else skip, dq, dk, dv, d_beta, d_skip, d_w, d_scores,
            d_solved, d_last, *self.v.stride()[:2], self.beta.stride(0), *grad.stride()[:2],
            *self._sizes, **options, DELTA=self.delta,
            CHANNELS=self.channels, SKIP=skip is not None, PARTS=parts,
        )  # fmt: skip
        strides = *self.k.stride()[:2], self.beta.stride(0)
        if not self.channels:

            def launch(choice: Choice) -> None:
                settings, precision = choice
                backward_kernels.chunk_key_gradients[(n, h)](
                    self.q, self.k, self.beta, *self._chunk_rows, self.sums, self.t, dq, dk, dg,
                    d_beta, d_w, d_scores, d_solved, d_last, *strides, *self._sizes[:3], C=c,
                    DELTA=self.delta, IN_BLOCKS=in_blocks, PRECISION=precision,
                    **self._columns_of(settings),
                )  # fmt: skip

            self._fitting("key_gradients", launch)
            return dq, dk, dv, dg, d_beta, *(x.sum(0) for x in more)
        shared = {"C": c, "DELTA": self.delta, "PRECISION": self.precision}
        channel_kernels.channel_squares[(n, h)](
            self.k, self.beta, *self._chunk_rows, self.sums, self.t, dk, d_w, d_solved, d_last,
            *strides, *self._sizes[:3], **self._columns("channel_squares"), **shared,
            IN_BLOCKS=in_blocks,
        )  # fmt: skip
        channel_kernels.channel_gradients[(n, h, c // 16)](
            self.q, self.k, self.beta, *self._chunk_rows, self.sums, dq, dk, dg, d_beta, d_w,
            d_scores, d_solved, *strides, *self._sizes[:3], **self._columns("channel_gradients"),
            **shared,
        )  # fmt: skip
        settings = self._columns("channel_decays")
        channel_kernels.channel_decays[(n, h, triton.cdiv(self.key_dim, settings["BD"]))](
            dg, d_last, *self._chunk_rows, h, self.key_dim, C=c, **settings
        )
        return dq, dk, dv, dg, d_beta, *(x.sum(0) for x in more)

    def changes(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        """How the fragments at these places of `chunks.order` change a state: what they add to it
        [F, h, Dk, Dv], and the matrix [F, h, Dk, Dk] or number [F, h, 1, 1] before it.
        """
        every, h = len(self.chunks.order), self.heads
        index = self.chunks.index(chosen)
        chosen_counts = self.chunks.step_counts.index_select(0, index)
        counts = torch.zeros_like(self.chunks.step_counts).index_copy_(0, index, chosen_counts)
        zero = self._new(every, h, self.key_dim, self.value_dim).zero_()
        state = self.scan(zero, keep=False, counts=counts)[2].index_select(0, index)
        if not self.delta:
            fragment = self.chunks.fragment_of
            last = self.sums[:, :, -1].reshape(len(self.sums), h, -1)
            whole = self._new(every, *last.shape[1:]).zero_()
            whole.index_add_(0, fragment, last)
            return state, whole.index_select(0, index).exp()[..., None]
        eye = torch.eye(self.key_dim, device=self.v.device).expand(every, h, -1, -1).contiguous()
        matrix = self.scan(eye, keep=False, counts=counts, values=False)[2]
        return state, matrix.index_select(0, index)
