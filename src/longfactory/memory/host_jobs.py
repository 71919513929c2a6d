"""Computing on the host with blocks of GPU tensors: they come to pinned memory on side streams
and go back, one block ahead.

A job's blocks come over while the job before is computed, so that the host never waits for a copy
that it could have begun. `Worker` does the same in a thread, for jobs that are found while the GPU
goes on with a backward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

AHEAD = 64  # jobs queued for a worker; who gives more blocks


@dataclasses.dataclass(frozen=True)
class HostJob:
    """Work on flat blocks of a parameter and its gradient. `compute` is given them, or copies of
    them on the host; it changes the first `changed` of them. `ready`: the blocks are complete, and
    what is changed is read no more, once this has come to pass."""

    tensors: tuple[Tensor, ...]
    compute: Callable[..., None]
    changed: int
    ready: torch.cuda.Event | None = None


class PinnedBuffers:
    """Pinned room for the blocks of one job, with a stream of its own."""

    def __init__(self, device: torch.device, room: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.ready = torch.cuda.Event()
        self.room = [torch.empty(room, dtype=torch.uint8, pin_memory=True) for _ in range(2)]

    def _views(self, job: HostJob) -> list[Tensor]:
        return [
            room[: t.numel() * t.element_size()].view(t.dtype)
            for room, t in zip(self.room, job.tensors, strict=False)
        ]

    def bring(self, job: HostJob) -> None:
        self.stream.synchronize()  # what went back from this room is there
        if job.ready is not None:
            self.stream.wait_event(job.ready)
        with torch.cuda.stream(self.stream):
            for here, there in zip(self._views(job), job.tensors, strict=True):
                here.copy_(there, non_blocking=True)
            self.ready.record(self.stream)

    def compute_and_return(self, job: HostJob) -> None:
        views = self._views(job)
        self.ready.synchronize()
        job.compute(*views)
        with torch.cuda.stream(self.stream):
            for here, there in zip(views[: job.changed], job.tensors, strict=False):
                there.copy_(here, non_blocking=True)


def work_off(jobs: Iterable[HostJob | None], stages: list[PinnedBuffers]) -> None:
    """Jobs in turn, each computed while the next one comes to the host. None: there is no next one
    yet.
    """
    turn = itertools.cycle(stages)
    begun: tuple[PinnedBuffers, HostJob] | None = None
    for job in itertools.chain(jobs, (None,)):
        coming = None if job is None else (next(turn), job)
        if coming is not None:
            coming[0].bring(coming[1])
        if begun is not None:
            begun[0].compute_and_return(begun[1])
        begun = coming


class Worker:
    """A thread that does jobs in the order in which they come, until `finish`.

    Args:
        stages, device: of GPU tensors. Without a device jobs are computed where their tensors are.
    """

    def __init__(self, stages: list[PinnedBuffers], device: torch.device | None) -> None:
        self._jobs: queue.Queue[HostJob | None] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(stages, device), name="SplitAdamW", daemon=True
        )
        self._thread.start()

    def give(self, job: HostJob) -> None:
        """Waits while `AHEAD` jobs are still to be begun."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Waits for all jobs; raises what one of them raised."""
        self._jobs.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    @torch.no_grad()  # which is a thread's own, as the current device is
    def _run(self, stages: list[PinnedBuffers], device: torch.device | None) -> None:
        try:
            if device is None:
                for job in iter(self._jobs.get, None):
                    job.compute(*job.tensors)
            else:
                with torch.cuda.device(device):
                    work_off(self._coming(), stages)
        except BaseException as error:
            self._error = error
            for _ in iter(self._jobs.get, None):  # who gives jobs must not wait for ever
                pass

    def _coming(self) -> Iterator[HostJob | None]:
        idle = True
        while True:
            try:
                job = self._jobs.get(block=idle)
            except queue.Empty:
                idle, job = True, None  # without the last gradient in hand
                yield None
                continue
            if job is None:
                return
            idle = False
            yield job
