"""AdamW with exact fp32 weights at 10 bytes a parameter beside the model's own bf16 weight, on the
GPU or on the host.

Of a bf16 parameter the fp32 master weight is kept as a 16-bit remainder (`split_masters`): with the
two fp32 moments that is 2 + 4 + 4 bytes a parameter, where fp32 master weights take 12.

On the host the blocks of gradient and weight come over on a side stream while the block before is
computed, and go back likewise; about 28 bytes of host memory traffic a parameter: 15 s for 7.6
billion on the 16 cores beside an H100, before its scratch was reused. For fp32 or fp64 parameters
(FSDP2's sharded masters) there is no split: the parameter is the master, and the moments live where
asked.

Gradients of bf16 parameters are bf16. Those of several micro-batches are summed in fp32, where the
states live (`accumulate`), and rounded once, as the gradient of one micro-batch is.

Where states are on the host, gradients can leave the GPU as soon as they are final, while backward
goes on with the layers below (`during_backward`): a thread of the host takes them. With
`gradients="host"` they wait there for the norm of all and the update after it. With `overlap` the
thread updates their weights at once, which is for runs that do not clip. The weight is then written
while backward runs, which is safe: a gradient is final when every function that gives a part of it
has run, on the GPU what they read is waited for, and FSDP2 gathers a shard for backward before it
reduces its gradient. A function that saved the weight and gives no part of its gradient is stopped
by autograd's count of changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from longfactory.memory import split_masters
from longfactory.memory.host_jobs import HostJob, PinnedBuffers, Worker, work_off
from longfactory.memory.split_masters import Block, inner_length, join

# elements that travel together; `host_jobs.AHEAD` blocks of gradients that leave are on the GPU at
# most
BLOCK = 1 << 24


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; any other tensor as it is."""
    return t._local_tensor if hasattr(t, "_local_tensor") else t


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) as `torch.optim.AdamW` computes it in fp32, for bf16
    parameters without loss.

    Args:
        placement: "host" keeps states in host memory and computes there; "gpu" keeps them beside
            the parameter.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        gradients: "host" takes them off the GPU in `during_backward`, and they wait in host memory.
            For states on the host.
        overlap: updates are made in `during_backward`, and no gradient waits anywhere. For states
            on the host.

    Gradients are read from `.grad`, so clipping and accumulation can be the caller's, as with any
    optimizer; `clip` and `accumulate` do not round them to bf16. States are this rank's shards:
    `shard.optimizer_states` keeps them in checkpoints.

    Raises:
        ValueError: a parameter that is neither bf16, fp32 nor fp64; overlap, or gradients on the
            host, with states on the GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        placement: Literal["gpu", "host"] = "host",
        gradients: Literal["gpu", "host"] = "gpu",
        overlap: bool = False,
    ) -> None:
        for name, value in (("placement", placement), ("gradients", gradients)):
            if value not in ("gpu", "host"):
                raise ValueError(f"SplitAdamW: {name} is {value!r}; it must be gpu or host.")
        if placement == "gpu" and (overlap or gradients == "host"):
            raise ValueError(
                "SplitAdamW: overlap and gradients on the host are for states on the host."
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.placement, self.gradients, self.overlap = placement, gradients, overlap
        self._stages: list[PinnedBuffers] = []
        self._scale = 1.0  # of the gradients of this step
        self._limit: tuple[Tensor, float] | None = None  # their norm, and what it is scaled to
        # parameter -> fp32 sum of this rank's part of its gradient, where the states live
        self._sums: dict[Tensor, Tensor] = {}
        self._summed: set[Tensor] = set()  # those with something of this step in it
        # Parameters whose gradient left during this step's backward -> its norm, or norms of its
        # blocks.
        self._left: dict[Tensor, Tensor] = {}
        # Gradients whose norms were computed during backward, and these.
        self._norms: dict[Tensor, tuple[Tensor, Tensor]] = {}
        # those of them that are not updated yet -> their gradient on the host, flat
        self._away: dict[Tensor, Tensor] = {}
        self._rooms: dict[Tensor, Tensor] = {}  # host memory of gradients, kept from step to step
        self._worker: Worker | None = None
        self._first: set[Any] = set()  # parameters that the kernel updates before others
        self._after_first = self._after_all = _nothing
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.bfloat16, torch.float32, torch.float64):
                    raise ValueError(
                        f"SplitAdamW: a parameter is {p.dtype}; it computes bf16, fp32 and fp64."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._join()
        changed = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p in self._away:
                    raise RuntimeError(
                        "SplitAdamW: a gradient came after that of the step's last micro-batch had"
                        " left the device."
                    )
                if p.grad is not None or p in self._away:
                    self.prepare(p)
                    changed.append(p)
        by_kernel = {p for p in changed if self._is_one_pass(p)}
        self._scale = self._factor()
        self._update_in_one_pass(by_kernel)
        if changed:
            torch._foreach_add_([self.state[p]["step"] for p in changed], 1)
        if len(by_kernel) < len(changed):
            work = self._work(by_kernel)
            self._do(job for block in work for job in _update_jobs(block))
        self._after_all()
        self._scale, self._limit = 1.0, None
        self._norms.clear()
        self._left.clear()
        self._away.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._norms.clear()
        self._left.clear()
        self._away.clear()

    @contextlib.contextmanager
    def during_backward(self, last: bool = True) -> Iterator[None]:
        """Around the backward of a micro-batch: gradients leave the device as they become final,
        and `.grad` is None again, where `gradients="host"` or `overlap` says so. Elsewhere the
        norms of gradients that FSDP2 sums are computed, on the stream of its messages: after
        backward, the next kernel waits for them.

        Args:
            last: it is the step's last micro-batch. Of those before it, bf16 gradients leave;
                others stay in `.grad`, where autograd sums.

        `accumulate`, `clip` (of inf alone, with `overlap`) and `step` follow as ever. Everything is
        what it would be without, in every bit. What changes gradients in place before `clip` must
        call `forget_norms`.

        Raises:
            RuntimeError: in backward, if a gradient comes twice. Autograd and FSDP2 sum over all
                uses of a parameter before it comes.
        """
        leaves = self.overlap or self.gradients == "host"
        hooks = []
        for group in self.param_groups:
            for p in group["params"]:
                if leaves and p.requires_grad and (last or p.dtype == torch.bfloat16):
                    hooks.append((p, functools.partial(self._leave, group=group, last=last)))
                elif last and p.requires_grad and hasattr(p, "placements"):
                    hooks.append((p, self._measure))
        handles = [p.register_post_accumulate_grad_hook(hook) for p, hook in hooks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _measure(self, p: Any) -> None:
        """A hook: the gradient of this micro-batch was summed over processes."""
        if p not in self._summed:  # else `accumulate` changes it
            self._norms[p] = (p.grad, _norm(local(p.grad)))

    def forget_norms(self) -> None:
        """Gradients were changed in place: their norms are computed again in `clip`."""
        self._norms.clear()

    @torch.no_grad()
    def _leave(self, p: Any, group: dict[str, Any], last: bool) -> None:
        """A hook: the gradient of `p` in this micro-batch is final. It goes to the thread that
        sums, keeps or updates.
        """
        if p in self._left:
            raise RuntimeError(
                "SplitAdamW: the gradient of a parameter came twice in one step, and the first had"
                " left the device. Set offload_gradients: false and optimizer_overlap: false."
            )
        grad = _flat(p.grad, "gradient")
        summed = p in self._summed
        blocks, sums = grad.split(BLOCK), self._sum(p).split(BLOCK) if summed or not last else ()
        if not last:
            jobs = list(_sum_jobs(grad, self._sum(p), first=not summed, last=False))
            self._summed.add(p)
        else:
            self._summed.discard(p)
            self._left[p] = norms = torch.zeros(len(blocks)) if summed else _norm(grad)
            if self.overlap:
                self.prepare(p)
                self.state[p]["step"] += 1
                block = self._block(p, group, grad)
                jobs = list(_update_jobs(block))
                # now, and not when the thread comes to write it
                torch.autograd.graph.increment_version(block.weight)
                if summed:
                    jobs = [
                        dataclasses.replace(
                            job,
                            compute=functools.partial(
                                _sum_and_update, update=job.compute, total=t, norm=n
                            ),
                        )
                        # an empty shard is one block of sums, and no job
                        for job, t, n in zip(jobs, sums, norms, strict=False)
                    ]
            elif summed:
                self._away[p] = self._sum(p)
                keep = [
                    functools.partial(_sum_and_keep, total=t, norm=n)
                    for t, n in zip(sums, norms, strict=True)
                ]
                jobs = [HostJob((g,), k, 0) for g, k in zip(blocks, keep, strict=True)]
            else:
                self._away[p] = self._room(p, grad)
                jobs = [
                    HostJob((g,), r.copy_, 0)
                    for g, r in zip(blocks, self._away[p].split(BLOCK), strict=True)
                ]
        p.grad = None
        self._give([job for job in jobs if job.tensors[0].numel()])

    def _room(self, p: Any, grad: Tensor) -> Tensor:
        if p not in self._rooms:
            self._rooms[p] = torch.empty(grad.numel(), dtype=grad.dtype)
        return self._rooms[p]

    def _sum(self, p: Any) -> Tensor:
        if p not in self._sums:
            self._sums[p] = torch.empty(
                local(p).numel(), dtype=torch.float32, device=self._place(p)
            )
        return self._sums[p]

    def _give(self, jobs: list[HostJob]) -> None:
        """Jobs that become possible during backward, for the thread that does them."""
        if self._worker is None:
            parts = (local(q) for g in self.param_groups for q in g["params"])
            device = next((t.device for t in parts if self._streamed(t)), None)
            if device is not None:
                self._make_stages(device)
            self._worker = Worker(self._stages, device)
        for job in jobs:
            if self._streamed(job.tensors[0]):
                ready = torch.cuda.Event()
                # FSDP2's hooks run on the stream of its reductions
                ready.record(torch.cuda.current_stream(job.tensors[0].device))
                job = dataclasses.replace(job, ready=ready)
            self._worker.give(job)

    def _join(self) -> None:
        """Waits for what was begun during backward."""
        if self._worker is None:
            return
        worker, self._worker = self._worker, None
        worker.finish()
        self._await_stages()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """The norm of the whole gradient, over all shards, in fp32. The next step takes gradients
        scaled to at most `max_norm`.

        As `torch.nn.utils.clip_grad_norm_`, which computes norms of bf16 gradients in bf16 and
        rounds what it scales. Collective where parameters are sharded; `.grad` stays as it is.
        """
        self._join()
        params = [
            p
            for g in self.param_groups
            for p in g["params"]
            if p.grad is not None or p in self._left
        ]
        if not params:
            return torch.zeros(())
        if self._left and self.overlap and max_norm != math.inf:
            raise RuntimeError(
                "SplitAdamW: updates were made during backward, and cannot be clipped after it."
            )
        sharded = [p for p in params if hasattr(p, "placements")]
        whole = [p for p in params if not hasattr(p, "placements")]
        total = self._square(sharded)
        if sharded:
            torch.distributed.all_reduce(total, group=sharded[0].device_mesh.get_group())
        norm = (total + self._square(whole)).sqrt().float()
        # read in `step`: what else is computed of the gradients is queued before the host waits
        self._limit = (norm, max_norm) if max_norm != math.inf else None
        return norm

    def _factor(self) -> float:
        """What `clip` multiplies gradients by. Waits for their norm."""
        if self._limit is None:
            return 1.0
        norm, max_norm = self._limit
        return min(1.0, max_norm / (float(norm) + 1e-6))

    def _square(self, params: list[Any]) -> Tensor:
        """Sum of the squares of this rank's gradients, in fp64 on their device; 0 on the host for
        none.
        """
        norms = []
        for p in params:
            grad, norm = self._norms.get(p, (None, None))
            if p.grad is None:
                norm = _norm(self._left[p]).to(local(p).device)
            elif norm is None or grad is not p.grad:
                norm = _norm(local(p.grad))
            norms.append(norm)
        return (
            torch.stack(norms).double().square().sum()
            if norms
            else torch.zeros((), dtype=torch.float64)
        )

    @torch.no_grad()
    def accumulate(self, last: bool) -> None:
        """After the backward of a micro-batch, where a step has several: sums gradients of bf16
        parameters in fp32.

        `.grad` is taken away, and is the whole sum, rounded once, after the `last` micro-batch.
        fp32 and fp64 gradients stay in `.grad`, where autograd sums them.
        """
        if last:
            self._join()
        jobs: list[HostJob] = []
        taken: list[Tensor] = []
        for p in (p for g in self.param_groups for p in g["params"] if p.dtype == torch.bfloat16):
            begun = p in self._summed
            if last and begun and p.grad is None:
                p.grad = torch.zeros_like(p)
            if p.grad is None or (last and not begun):
                continue
            jobs += _sum_jobs(_flat(p.grad, "gradient"), self._sum(p), first=not begun, last=last)
            if not last:
                self._summed.add(p)
                taken.append(p)
        self._do(jobs)
        for p in taken:
            p.grad = None
        if last:
            self._summed.clear()

    def _do(self, jobs: Iterable[HostJob]) -> None:
        """Jobs in any order; those on GPU tensors with states on the host by way of pinned
        memory. The others are begun as they come: a GPU would wait for a list of all.
        """
        streamed = []
        for job in jobs:
            if self._streamed(job.tensors[0]):
                streamed.append(job)
            else:
                job.compute(*job.tensors)
        if streamed:
            self._stream(streamed)

    def _streamed(self, t: Tensor) -> bool:
        return t.is_cuda and self.placement == "host"

    def _place(self, p: Tensor) -> torch.device:
        return torch.device("cpu") if self.placement == "host" else local(p).device

    def prepare(self, p: Tensor) -> None:
        """States of `p` before its first step, if it has none."""
        state = self.state[p]
        if state:
            return
        here, device = local(p), self._place(p)
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros(here.shape, dtype=wide, device=device)
        state["exp_avg_sq"] = torch.zeros(here.shape, dtype=wide, device=device)
        if p.dtype == torch.bfloat16:
            state["low"] = torch.zeros(here.shape, dtype=torch.int16, device=device)

    def _is_one_pass(self, p: Any) -> bool:
        """Whether the kernel updates it."""
        if self.placement != "gpu" or "low" not in self.state[p]:
            return False
        device = local(p).device
        return device.type == "cuda" and split_masters.is_one_pass(device)

    def update_first(
        self, params: Iterable[Any], then: Callable[[], None], after_all: Callable[[], None]
    ) -> None:
        """From now on, where the kernel updates all of them: `params` are updated before the
        others. In each step `then` is called when their update has been queued, and `after_all`
        when that of all has.
        """
        self._first, self._after_first, self._after_all = set(params), then, after_all

    def _update_in_one_pass(self, params: set[Any]) -> None:
        """Of parameters with a gradient, by the kernel."""
        first = {p for p in self._first if p.grad is not None}
        if first and first <= params:
            self._call_kernel(first)
            self._after_first()
            params = params - first
        self._call_kernel(params)

    def _call_kernel(self, params: set[Any]) -> None:
        """One call for those of a group that have made as many steps. These are counted after it:
        the GPU waits for it.
        """
        for group in self.param_groups:
            alike: dict[tuple[torch.device, float], list[tuple[Tensor, ...]]] = {}
            for p in group["params"]:
                if p not in params:
                    continue
                s, weight, grad = self.state[p], local(p), local(p.grad).contiguous()
                if not weight.is_contiguous():
                    raise RuntimeError("SplitAdamW: a parameter is not contiguous in memory.")
                tensors = (weight, s["low"], grad, s["exp_avg"], s["exp_avg_sq"])
                alike.setdefault((weight.device, float(s["step"]) + 1), []).append(tensors)
            for (_, step), parameters in alike.items():
                split_masters.update_in_one_pass(parameters, group, step, self._scale)

    def _work(self, done: Container[Any] = ()) -> Iterator[Block]:
        """Of parameters that are not updated yet."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in done:
                    yield self._block(p, group, local(p.grad).contiguous().view(-1))
                elif p in self._away:
                    yield self._block(p, group, self._away[p], away=True)

    def _block(self, p: Any, group: dict[str, Any], grad: Tensor, away: bool = False) -> Block:
        s = self.state[p]
        low = s["low"].view(-1) if "low" in s else None
        m, v = s["exp_avg"].view(-1), s["exp_avg_sq"].view(-1)
        return Block(
            _flat(p.detach(), "parameter"), grad, low, m, v, s["step"], group, self._scale, away
        )

    def _make_stages(self, device: torch.device) -> None:
        if not self._stages:
            widest = max(p.element_size() for g in self.param_groups for p in g["params"])
            self._stages = [PinnedBuffers(device, widest * BLOCK) for _ in range(2)]

    def _await_stages(self) -> None:
        """What reads the weights from now on waits for those that are on their way back."""
        for stage in self._stages:
            torch.cuda.current_stream(stage.device).wait_stream(stage.stream)

    def _stream(self, jobs: list[HostJob]) -> None:
        """Jobs on GPU tensors, computed on the host."""
        self._join()  # its thread uses the same stages
        device = jobs[0].tensors[0].device
        self._make_stages(device)
        now = torch.cuda.current_stream(device)
        for stage in self._stages:
            stage.stream.wait_stream(now)  # gradients are complete
        work_off(jobs, self._stages)
        self._await_stages()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class, but states keep their type and place: they are not the parameter's."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        params = [p for g in self.param_groups for p in g["params"]]
        names = [i for g in state_dict["param_groups"] for i in g["params"]]
        for p, name in zip(params, names, strict=True):
            if name not in state_dict["state"]:
                continue
            self.state[p].clear()
            self.prepare(p)
            for key, value in state_dict["state"][name].items():
                self.state[p][key].copy_(value)

    def master(self, p: Tensor) -> Tensor:
        """The exact weight of this rank's part of `p`, in fp32 (fp64 for fp64)."""
        low = self.state.get(p, {}).get("low")
        here = local(p.detach())
        return (
            join(here, low.to(here.device))
            if low is not None
            else here.to(torch.promote_types(p.dtype, torch.float32)).clone()
        )


def _nothing() -> None:
    pass


def _flat(t: Any, what: str) -> Tensor:
    """[numel] of this rank's part, sharing its memory."""
    part = local(t)
    if not part.is_contiguous():
        raise RuntimeError(f"SplitAdamW: a {what} is not contiguous in memory.")
    return part.view(-1)


def _norm(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))


def _update_jobs(block: Block) -> Iterator[HostJob]:
    """One AdamW step, a job for each `BLOCK` numbers."""
    for a in range(0, block.weight.numel(), BLOCK):
        part = block.cut(a, a + BLOCK)
        if part.away:
            yield HostJob((part.weight,), functools.partial(part.update_at, grad=part.grad), 1)
        else:
            yield HostJob((part.weight, part.grad), part.update_at, 1)


def _sum_jobs(grad: Tensor, total: Tensor, *, first: bool, last: bool) -> Iterator[HostJob]:
    """`_add` in jobs."""
    for g, t in zip(grad.split(BLOCK), total.split(BLOCK), strict=True):
        if g.numel():
            yield HostJob((g,), functools.partial(_add, total=t, first=first, last=last), int(last))


def _add(grad: Tensor, total: Tensor, *, first: bool, last: bool) -> None:
    """fp32 `total` = `grad` (first) or `total` + `grad`; the last one rounds it into `grad`."""
    for g, t in zip(grad.split(inner_length(grad)), total.split(inner_length(grad)), strict=True):
        t.copy_(g) if first else t.add_(g)
        if last:
            g.copy_(t)


def _sum_and_update(
    weight: Tensor, grad: Tensor, *, update: Callable[..., None], total: Tensor, norm: Tensor
) -> None:
    """`update` with the sum of `grad` and the micro-batches before it; `norm` [] becomes that of
    the sum.
    """
    _add(grad, total, first=False, last=True)
    norm.copy_(_norm(grad))
    update(weight, grad)


def _sum_and_keep(grad: Tensor, *, total: Tensor, norm: Tensor) -> None:
    """fp32 `total` = itself + `grad`, rounded to the type of `grad`; `norm` [] becomes that of
    it.
    """
    _add(grad, total, first=False, last=True)
    total.copy_(grad)
    norm.copy_(_norm(grad))
