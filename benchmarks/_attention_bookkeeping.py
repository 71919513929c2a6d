"""What a rank of `attention.py` does beside its kernels: merges, sums, casts, copies, Python."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from _attention_rows import MIXES, mixed, segments_of
from _attention_setting import (
    Row,
    Setting,
    attempt,
    forward_backward,
    inputs,
    planned,
    synchronize,
    timed_in_turn,
)
from longfactory import sp
from longfactory.sp import backends, kernels
from longfactory.sp.kernels import Call
from longfactory.sp.schedules import ring as ring_schedule


def bookkeeping(setting: Setting) -> None:
    """Share of the time that is not inside the kernels, without messages: merges, sums, casts,
    copies, Python.
    """
    local = 16384 if not setting.smoke else 128
    # The rank of two that merges most: its second tile has all of its queries.
    plan = sp.plan(2 * local, None, sp.SequenceParallel(2, 1, device_type=setting.device.type))
    bookkeeping_rows(setting, f"one document, {local // 1024}k local tokens", plan)
    for mix in MIXES:
        segments = segments_of(mixed(setting, mix, setting.packed_length // 2))
        plan = sp.plan(setting.packed_length // 2, segments, setting.one)
        bookkeeping_rows(setting, f"{mix}, {setting.packed_length // 2048}k local tokens", plan)


def bookkeeping_rows(setting: Setting, label: str, plan: sp.RowPlan) -> None:
    """One rank, with messages that are there at once. Its whole step beside the same kernel calls
    alone, by the clock and by kernel.
    """
    name = f"merge and bookkeeping, {label}"
    shape, scale = setting.heads[0], setting.dim**-0.5
    q, k, v, dout = inputs(plan.local_length, *shape, setting.dim, setting)

    @functools.cache
    def calls() -> list[tuple]:
        call, out = Call(plan, scale), []
        cut = kernels.bulk(q, v, call)
        for tile in (t for source in call.mask.ring_order for t in call.mask.tiles(source, cut)):
            tensors = tuple(
                kernels.rows_of(x, rows) for x, rows in ((q, tile.q), (k, tile.k), (v, tile.k))
            )
            backend = backends.select("auto", tile, tensors[0], tensors[2], None)
            block, lse = backend.forward(*tensors, tile, scale, None)
            out.append(
                (
                    backend,
                    tile,
                    tensors,
                    kernels.rows_of(dout, tile.q),
                    block.contiguous(),
                    lse.contiguous(),
                )
            )
        return out

    def bare() -> None:
        for backend, tile, tensors, *_ in calls():
            backend.forward(*tensors, tile, scale, None)
        for backend, tile, tensors, grad, out, lse in calls():
            backend.backward(grad, *tensors, out, lse, tile, scale, None)

    def whole() -> None:
        forward_backward(planned(plan), q, k, v, dout)

    def by_the_clock() -> Row:
        inside, all_of_it = timed_in_turn(setting, [bare, whole], 3 * setting.repeats)
        return {
            "kernels ms": inside * 1e3,
            "all ms": all_of_it * 1e3,
            "share": 1 - inside / all_of_it,
        }

    def by_kernel() -> Row:
        inside, all_of_it = device_ms(setting, bare), device_ms(setting, whole)
        # What the attention operators fill and copy themselves is theirs.
        added = {
            kind: all_of_it.get(kind, 0.0) - inside.get(kind, 0.0)
            for kind in KINDS
            if kind != "attention"
        }
        attention = sum(all_of_it.values()) - sum(added.values())
        share = sum(added.values()) / sum(all_of_it.values())
        return {
            "kernels ms": attention,
            "all ms": sum(all_of_it.values()),
            "share": share,
            **{f"{k} ms": x for k, x in added.items()},
        }

    with messages_at_once():
        attempt(setting, name, by_the_clock)
        attempt(setting, f"{name}, by kernel", by_kernel)


class Loopback:
    """A message that is its own answer, already here."""

    def __init__(self, buffer: Tensor, *_: object) -> None:
        self.buffer = buffer

    def wait(self) -> Tensor:
        return self.buffer


@contextlib.contextmanager
def messages_at_once() -> Iterator[None]:
    original = ring_schedule.Exchange
    ring_schedule.Exchange = Loopback  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        ring_schedule.Exchange = original  # type: ignore[misc]


KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash", "sdpa", "fmha", "cudnn", "attention"),
    "merge": ("_merge",),
    "add": ("add",),
    "copy": ("copy", "memcpy", "index", "cat"),
    "fill": ("fill", "memset", "zero"),
    "other": ("",),
}
"""Parts of the names of kernels; the first kind that fits."""


def device_ms(setting: Setting, step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds on the device of a step by kind of kernel (on CPUs: of operators), mean of the
    repeats after one to warm up.
    """
    step()
    synchronize(setting)
    with torch.profiler.profile() as profile:
        for _ in range(setting.repeats):
            step()
        synchronize(setting)
    out: dict[str, float] = {}
    for event in profile.events():
        if setting.device.type == "cuda":
            ms = (
                event.time_range.elapsed_us() / 1e3
                if event.device_type == torch.autograd.DeviceType.CUDA
                else 0.0
            )
        else:
            ms = event.self_cpu_time_total / 1e3 if event.name.startswith("aten::") else 0.0
        if ms:
            kind = next(
                kind
                for kind, parts in KINDS.items()
                if any(part in event.name.lower() for part in parts)
            )
            out[kind] = out.get(kind, 0.0) + ms / setting.repeats
    if not out:
        raise RuntimeError("the profiler saw nothing on the device")
    return out
