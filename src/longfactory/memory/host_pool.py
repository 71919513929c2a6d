"""Activation offloading: tensors in host memory between forward and backward.

A tensor is *offloaded*: copied to a pinned slot on a side stream while the GPU goes on computing,
and fetched back the same way, a layer before backward needs it. The stream waits are the whole
synchronisation, no kernel waits for the CPU. Slots are locked once and reused in every step,
because locking memory is slow (about 2 GB/s) and because an allocator that rounds up to powers of
two would double what is locked. Hiding the copies needs about 13 GB/s a GPU at 32k tokens and less
above (bytes grow with T, attention with T^2).

On a CPU device the same code copies to plain memory at once, so that tests see exactly this
bookkeeping.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PAGE = 4096


class OffloadedTensors:
    """Tensors that were given to `HostPool.offload`. `fetch()` once, in backward; dropping the
    object frees its slot.
    """

    def __init__(self, pool: HostPool, tensors: list[Tensor], slot: Tensor | None) -> None:
        self._pool = pool
        self._slot = slot  # None: there was no room, the tensors stay where they are
        # on the device: until the copy is done, after a prefetch, or for good
        self._there: list[Tensor] | None = tensors
        self._back: torch.cuda.Event | None = None
        self._layout = [(t.shape, t.dtype) for t in tensors]
        if slot is not None:
            self._release = weakref.finalize(self, pool._give, slot)
            self._release.atexit = False

    @property
    def on_host(self) -> bool:
        return self._slot is not None

    def _views(self) -> list[Tensor]:
        assert self._slot is not None
        views, at = [], 0
        for shape, dtype in self._layout:
            n = shape.numel() * dtype.itemsize
            views.append(self._slot[at : at + n].view(dtype).view(shape))
            at += _padded(n)
        return views

    def prefetch(self) -> None:
        """Start the copy back to the device, if it has not started. Returns at once."""
        if self._there is not None:
            return
        pool = self._pool
        if pool.stream is None:
            self._there = [v.clone() for v in self._views()]
            return
        # Allocated on the computing stream, so that the memory is its own when the copy is done;
        # the copy waits for what used it before.
        there = [
            torch.empty(shape, dtype=dtype, device=pool.device) for shape, dtype in self._layout
        ]
        pool.stream.wait_stream(torch.cuda.current_stream(pool.device))
        with torch.cuda.stream(pool.stream):
            for t, v in zip(there, self._views(), strict=True):
                t.copy_(v, non_blocking=True)
            self._back = torch.cuda.Event()
            self._back.record(pool.stream)
        self._there = there

    def fetch(self) -> list[Tensor]:
        """The tensors, on the device. The caller owns them (may write to them); a second call is
        refused.
        """
        if self._there is None and self._slot is None:
            raise RuntimeError(
                "These activations were fetched before: a second backward through a checkpointed"
                " layer is not possible."
            )
        # it never really left; whoever writes to it must wait until it is read
        if self._pool._leaving is self:
            self._pool._leaving, self._back = None, self._pool._left
        self.prefetch()
        assert self._there is not None
        if self._back is not None:
            torch.cuda.current_stream(self._pool.device).wait_event(self._back)
        tensors, self._there, self._layout = self._there, None, []
        if self._slot is not None:
            # The next use of the slot is a copy on the same stream, hence after the copy back.
            self._slot = None
            self._release()
        self._pool._forget(self)
        return tensors


class HostPool:
    """Pinned slots for offloaded tensors, at most `limit` bytes in all.

    `expect` is the number of slots that one step will need: they are locked together, on several
    threads, when the first tensor comes. What does not fit, and what cannot be allocated, stays on
    the device; that is logged once.
    """

    def __init__(self, device: torch.device | str, limit: int, expect: int = 1) -> None:
        self.device = torch.device(device)
        self.limit = limit
        self.expect = expect
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.offloaded_bytes = 0  # all that was ever offloaded: for logs and tests
        # the most that was in use at once, of what is pinned; a reader may set it to 0
        self.peak_bytes = 0
        self._in_use: dict[int, int] = {}  # bytes in each slot that is in use
        self._bytes_in_use = 0
        self._slots: list[Tensor] = []
        self._locked: dict[int, Callable[[int], Any]] = {}  # address -> what unlocks it
        # The memory of a pool that nobody closed would be given back while it is locked: locking it
        # again, wherever it is used next, fails.
        weakref.finalize(self, _unlock, self._locked).atexit = False
        self._free: list[Tensor] = []
        self._order: list[weakref.ref[OffloadedTensors]] = []
        self._leaving: OffloadedTensors | None = None
        self._left: torch.cuda.Event | None = None
        self._warned = False

    # ---- outside

    def offload(self, tensors: Sequence[Tensor]) -> OffloadedTensors:
        """Start the copy of `tensors` to the host. Each is kept alive on the device until its copy
        is done.
        """
        self._settle()
        nbytes = sum(_padded(t.numel() * t.element_size()) for t in tensors)
        slot = self._take(nbytes)
        offloaded = OffloadedTensors(self, list(tensors), slot)
        self._order.append(weakref.ref(offloaded))
        if slot is None:
            return offloaded
        self.offloaded_bytes += nbytes
        self._in_use[slot.data_ptr()] = nbytes
        self._bytes_in_use += nbytes
        self.peak_bytes = max(self.peak_bytes, self._bytes_in_use)
        views = offloaded._views()
        if self.stream is None:
            for v, t in zip(views, tensors, strict=True):
                v.copy_(t)
            offloaded._there = None
            return offloaded
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for v, t in zip(views, tensors, strict=True):
                v.copy_(t, non_blocking=True)
            self._left = torch.cuda.Event()
            self._left.record(self.stream)
        self._leaving = offloaded
        return offloaded

    def prefetch(self, count: int = 1) -> None:
        """Start the copy back of the `count` tensors offloaded last, which are those that backward
        needs next.
        """
        self._order = [r for r in self._order if r() is not None]
        for ref in self._order[-count:] if count else []:
            offloaded = ref()
            if offloaded is not None and offloaded is not self._leaving:
                offloaded.prefetch()

    def reserve(self, nbytes: int, count: int | None = None) -> None:
        """Lock slots now, until there are `count` (by default as many as a step expects) for
        tensors, or groups of tensors offloaded together, of `nbytes`; as far as the limit allows.
        Slots for larger ones count."""
        size = -(-_padded(nbytes) // PAGE) * PAGE
        missing = (self.expect if count is None else count) - sum(
            s.numel() >= nbytes for s in self._slots
        )
        self._lock_slots(size, min(missing, max(0, self.limit - self.locked_bytes) // size))

    @property
    def locked_bytes(self) -> int:
        """Host memory that this pool holds."""
        return sum(s.numel() for s in self._slots)

    def close(self) -> None:
        """Give all host memory back. Nothing may be offloaded."""
        self._settle()
        if self.stream is not None:
            self.stream.synchronize()
        self._drop(list(self._slots))

    # ---- inside

    def _settle(self) -> None:
        """Forget the device copy of what was offloaded last. One layer's computation has passed
        since: the wait costs nothing.
        """
        offloaded, self._leaving = self._leaving, None
        if offloaded is not None and offloaded._slot is not None:
            assert self._left is not None
            torch.cuda.current_stream(self.device).wait_event(self._left)
            offloaded._there = None

    def _forget(self, offloaded: OffloadedTensors) -> None:
        self._order = [r for r in self._order if r() is not None and r() is not offloaded]

    def _take(self, nbytes: int) -> Tensor | None:
        fitting = [s for s in self._free if s.numel() >= nbytes]
        if not fitting:
            self._grow(nbytes)
            fitting = [s for s in self._free if s.numel() >= nbytes]
        if not fitting:
            self._warn(
                f"no room for {nbytes / 2**30:.2f} GiB within {self.limit / 2**30:.1f} GiB of host"
                " memory"
            )
            return None
        slot = min(fitting, key=Tensor.numel)
        self._free = [s for s in self._free if s is not slot]
        return slot

    def _give(self, slot: Tensor) -> None:
        self._bytes_in_use -= self._in_use.pop(slot.data_ptr(), 0)
        self._free.append(slot)

    def _grow(self, nbytes: int) -> None:
        """Lock as many slots of this size as the step expects and the limit allows, in place of
        free ones of other sizes.
        """
        size = -(-nbytes // PAGE) * PAGE
        want = max(1, self.expect - sum(s.numel() >= nbytes for s in self._slots))
        if self.locked_bytes + want * size > self.limit and self._free:
            if self.stream is not None:
                self.stream.synchronize()
            self._drop(list(self._free))
            want = max(1, self.expect - sum(s.numel() >= nbytes for s in self._slots))
        self._lock_slots(size, min(want, max(0, self.limit - self.locked_bytes) // size))

    def _lock_slots(self, size: int, count: int) -> None:
        if count <= 0:
            return
        with concurrent.futures.ThreadPoolExecutor(
            max(1, min(count, (os.cpu_count() or 1) // 2, 16))
        ) as threads:
            made = list(threads.map(self._lock, [size] * count))
        for slot, locked in made:
            if slot is None:
                self._warn(f"the host refused {size / 2**30:.2f} GiB")
                continue
            if not locked:
                self._warn("pinning failed, so copies will be slow", stays=False)
            self._slots.append(slot)
            self._free.append(slot)

    def _lock(self, size: int) -> tuple[Tensor | None, bool]:
        try:
            slot = torch.empty(size, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            return None, True
        if self.stream is None:
            return slot, True
        with torch.cuda.device(self.device):
            cudart = torch.cuda.cudart()
            failed = int(cudart.cudaHostRegister(slot.data_ptr(), size, 0)) != 0
            if failed:
                _forget_error(self.device)
        if not failed:
            self._locked[slot.data_ptr()] = cudart.cudaHostUnregister
        return slot, not failed

    def _drop(self, slots: list[Tensor]) -> None:
        gone = {s.data_ptr() for s in slots}
        _unlock({address: self._locked.pop(address) for address in gone & self._locked.keys()})
        self._slots = [s for s in self._slots if s.data_ptr() not in gone]
        self._free = [s for s in self._free if s.data_ptr() not in gone]

    def _warn(self, why: str, stays: bool = True) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "Activation offload: %s.%s", why, " The rest stays on the GPU." if stays else ""
            )


def _unlock(locked: dict[int, Callable[[int], Any]]) -> None:
    for address, unlock in locked.items():
        unlock(address)


def _forget_error(device: torch.device) -> None:
    """CUDA holds the last error for whoever asks next: the check after some kernel, which did
    nothing wrong.
    """
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        log.debug("pinning failed", exc_info=True)


def _padded(nbytes: int) -> int:
    """Tensors in a slot start at multiples of 256 bytes."""
    return -(-nbytes // 256) * 256
