"""AdamW with a split master weight follows torch's AdamW in fp32."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fake_cuda
import memory_ranks
from longfactory.memory import host_jobs, optimizer, split_masters
from longfactory.memory.optimizer import SplitAdamW
from longfactory.memory.split_masters import Block, join, split
from longfactory.testing import run_ranks


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, min_value=-(2.0**126), max_value=2.0**126),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=200, deadline=None)
def test_split_loses_nothing_and_rounds(values):
    master = torch.tensor(values, dtype=torch.float32)
    high, low = split(master)
    assert torch.equal(join(high, low), master)
    # A neighbour of the rounded value is never nearer.
    assert torch.all(
        (high.double() - master.double()).abs()
        <= (master.bfloat16().double() - master.double()).abs()
    )


def test_split_of_every_remainder():
    bits = torch.arange(0x3F80_0000 - 0x2_0000, 0x3F80_0000 + 0x2_0000, dtype=torch.int32)
    master = bits.view(torch.float32)
    assert torch.equal(join(*split(master)).view(torch.int32), bits)


def trajectories(dtype, placement, steps=20, clip=None):
    """The same gradients given to torch's AdamW in fp32 and to ours; the weights after each step."""
    torch.manual_seed(0)
    start = [torch.randn(*shape).bfloat16() for shape in ((33, 17), (5,), (1, 64))]
    reference = [
        nn.Parameter(t.to(torch.float64 if dtype == torch.float64 else torch.float32))
        for t in start
    ]
    ours = [nn.Parameter(t.to(dtype)) for t in start]

    def groups(ps: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": ps[:2], "weight_decay": 0.1},
            {"params": ps[2:], "weight_decay": 0.0, "lr": 3e-3},
        ]

    a = torch.optim.AdamW(groups(reference), lr=1e-3, betas=(0.9, 0.95))
    b = SplitAdamW(groups(ours), lr=1e-3, betas=(0.9, 0.95), placement=placement)
    schedule = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)) for o in (a, b)]
    for _ in range(steps):
        for p, q in zip(reference, ours, strict=True):
            q.grad = torch.randn(p.shape).to(dtype)
            p.grad = q.grad.to(p.dtype)
        for o, s in zip((a, b), schedule, strict=True):
            o.step()
            s.step()
    return reference, ours, b


@pytest.mark.parametrize("placement", ["host", "gpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_twenty_steps_equal_torch(dtype, placement, monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK", 100)
    monkeypatch.setattr(split_masters, "INNER", 32)
    reference, ours, opt = trajectories(dtype, placement)
    for p, q in zip(reference, ours, strict=True):
        assert (
            float(((opt.master(q) - p.detach()).abs() / p.detach().abs().clamp(min=1e-3)).max())
            < 1e-6
        )
        if dtype == torch.bfloat16:
            assert torch.equal(q, split(opt.master(q))[0])


def test_bf16_weights_alone_would_not_pass():
    """The test above is sharp: without the remainder the weights are off by a thousand times its
    tolerance.
    """
    reference, ours, _ = trajectories(torch.bfloat16, "host")
    assert (
        max(
            float(
                ((q.detach().float() - p.detach()).abs() / p.detach().abs().clamp(min=1e-3)).max()
            )
            for p, q in zip(reference, ours, strict=True)
        )
        > 1e-3
    )


def test_resumes_exactly():
    torch.manual_seed(1)
    p = nn.Parameter(torch.randn(40).bfloat16())
    first = SplitAdamW([p], lr=1e-2)
    grads = [torch.randn(40).bfloat16() for _ in range(6)]
    for g in grads[:3]:
        p.grad = g
        first.step()
    q = nn.Parameter(p.detach().clone())
    second = SplitAdamW([q], lr=1e-2)
    second.load_state_dict(first.state_dict())
    assert second.state[q]["exp_avg"].dtype == torch.float32
    for g in grads[3:]:
        for t, o in ((p, first), (q, second)):
            t.grad = g
            o.step()
    assert torch.equal(first.master(p), second.master(q))
    assert torch.equal(p, q)


@pytest.mark.processes
def test_sharded_parameters():
    whole, sharded = run_ranks(2, memory_ranks.split_adamw_on_shards)[0]
    assert torch.equal(whole, sharded)


def test_streaming_blocks_of_gpu_parameters(monkeypatch):
    """The path for parameters on a GPU and states on the host, with stand-ins for streams: bitwise
    what the direct path computes.
    """
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(optimizer, "BLOCK", 100)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    results = []
    for streamed in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n).bfloat16()) for n in (370, 60, 100)]
        opt = SplitAdamW(params, lr=1e-2)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            if streamed:
                for p in params:
                    opt.prepare(p)
                    opt.state[p]["step"] += 1
                with torch.no_grad():
                    opt._stream([j for block in opt._work() for j in optimizer._update_jobs(block)])
            else:
                opt.step()
        results.append(torch.cat([opt.master(p) for p in params]))
    assert torch.equal(*results)


def test_a_kernel_of_one_pass_is_called_once_for_all_parameters(monkeypatch):
    """Of a group and of as many steps; the others, and those without a gradient, are left to
    blocks, or alone.
    """
    monkeypatch.setattr(
        SplitAdamW, "_is_one_pass", lambda self, p: "low" in self.state[p] and len(p) != 4
    )
    calls, blocks = [], []

    def kernel(parameters, group, step, scale):
        for tensors in parameters:
            assert [t.dtype for t in tensors] == [
                *(torch.bfloat16, torch.int16, torch.bfloat16, torch.float32, torch.float32)
            ]
        calls.append(([len(tensors[0]) for tensors in parameters], group["lr"], step, scale))

    monkeypatch.setattr(split_masters, "update_in_one_pass", kernel)
    monkeypatch.setattr(Block, "update", lambda self: blocks.append(len(self.weight)))
    first = [nn.Parameter(torch.ones(n).bfloat16()) for n in (370, 0, 100, 4)]
    second = [nn.Parameter(torch.ones(50).bfloat16()), nn.Parameter(torch.ones(3))]
    groups = [{"params": first}, {"params": second, "lr": 0.5}]
    opt = SplitAdamW(groups, lr=1e-2, placement="gpu")
    for p in (*first, *second):
        p.grad = torch.ones_like(p)
    first[2].grad = None
    scale = 5.0 / (float(opt.clip(5.0)) + 1e-6)
    assert scale == pytest.approx(5.0 / math.sqrt(370 + 4 + 50 + 3))
    opt.step()
    assert calls == [([370, 0], 1e-2, 1.0, scale), ([50], 0.5, 1.0, scale)]
    assert blocks == [4, 3]
    calls.clear()
    first[2].grad = torch.ones_like(first[2])
    opt.step()
    assert calls == [([370, 0], 1e-2, 2.0, 1.0), ([100], 1e-2, 1.0, 1.0), ([50], 0.5, 2.0, 1.0)]


def micro_gradients(shape, number, parts):
    g = torch.Generator().manual_seed(number)
    return [torch.randn(shape, generator=g).bfloat16() for _ in range(parts)]


@pytest.mark.parametrize("placement", ["host", "gpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_micro_batches_are_summed_in_fp32(dtype, placement, monkeypatch):
    monkeypatch.setattr(optimizer, "BLOCK", 100)
    monkeypatch.setattr(split_masters, "INNER", 32)
    torch.manual_seed(0)
    shapes = [(33, 17), (5,), (3, 4), (7,)]
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    opt = SplitAdamW(params, lr=1e-2, placement=placement)
    for step, parts in enumerate((5, 5, 1)):
        gradients = [micro_gradients(p.shape, 10 * step + i, parts) for i, p in enumerate(params)]
        # One parameter has no gradient in the first micro-batches, one in the last ones, one in
        # none.
        present = [range(parts), range(parts // 2, parts), range(0, (parts + 1) // 2), range(0)]
        for k in range(parts):
            for p, g, there in zip(params, gradients, present, strict=True):
                if k in there:
                    g = g[k].to(dtype, copy=True)
                    p.grad = g if p.grad is None else p.grad + g
            opt.accumulate(last=k == parts - 1)
            if dtype == torch.bfloat16 and k < parts - 1:
                assert all(p.grad is None for p in params)
        for p, g, there in zip(params, gradients, present, strict=True):
            if not there:
                assert p.grad is None
                continue
            assert torch.equal(p.grad, sum(g[k].float() for k in there).to(dtype))
        if dtype == torch.bfloat16 and parts > 1:
            in_bf16 = sum(gradients[0][1:], gradients[0][0])
            assert not torch.equal(in_bf16, params[0].grad), "the test would not see sums in bf16"
        opt.step()
        opt.zero_grad()


def test_streaming_sums(monkeypatch):
    """Gradients on a GPU, sums on the host, with stand-ins for streams."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(optimizer, "BLOCK", 100)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(SplitAdamW, "_do", lambda self, jobs: self._stream(jobs) if jobs else None)
    p = nn.Parameter(torch.randn(370).bfloat16())
    opt = SplitAdamW([p], lr=1e-2)
    parts = micro_gradients(p.shape, 0, 4)
    for k, g in enumerate(parts):
        p.grad = g.clone()
        opt.accumulate(last=k == 3)
    assert torch.equal(p.grad, sum(g.float() for g in parts).bfloat16())


@pytest.mark.processes
def test_sums_of_sharded_gradients():
    for found, expected in run_ranks(2, memory_ranks.split_adamw_sums_on_shards):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most", [0.5, 1e6])
def test_clipping_rounds_nothing(dtype, most):
    torch.manual_seed(0)
    reference = [nn.Parameter(torch.randn(n).bfloat16().float()) for n in (370, 60)]
    ours = [nn.Parameter(p.detach().to(dtype)) for p in reference]
    # so large an eps that scale matters
    a, b = torch.optim.AdamW(reference, lr=1e-2, eps=1.0), SplitAdamW(ours, lr=1e-2, eps=1.0)
    for _ in range(5):
        for p, q in zip(reference, ours, strict=True):
            q.grad = torch.randn(p.shape).to(dtype)
            p.grad = q.grad.to(torch.float32, copy=True)
        expected = nn.utils.clip_grad_norm_(reference, most)
        kept = [q.grad.clone() for q in ours]
        assert float(b.clip(most)) == pytest.approx(float(expected), rel=1e-6)
        assert all(torch.equal(q.grad, g) for q, g in zip(ours, kept, strict=True))
        a.step()
        b.step()
    for p, q in zip(reference, ours, strict=True):
        assert (
            float(((b.master(q) - p.detach()).abs() / p.detach().abs().clamp(min=1e-3)).max())
            < 1e-6
        )


@pytest.mark.processes
def test_the_norm_of_sharded_gradients():
    for after, expected, during, early in run_ranks(2, memory_ranks.split_adamw_norm_of_shards):
        assert after == pytest.approx(expected, rel=1e-6)
        assert during == after
        assert early == [4, 0, 0]


# ---- gradients that leave during backward --------------------------------------------------------


@pytest.mark.parametrize("fake_gpu", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("leaving", "most"), memory_ranks.LEAVING)
def test_steps_whose_gradients_leave_are_those_whose_gradients_stay(
    leaving, most, dtype, parts, fake_gpu, monkeypatch
):
    """Tied weights, a layer called twice, a frozen one, one without a gradient in the last
    micro-batch, two groups, a schedule.
    """
    monkeypatch.setattr(optimizer, "BLOCK", 100)
    monkeypatch.setattr(split_masters, "INNER", 32)
    if fake_gpu:
        fake_cuda.install(monkeypatch)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
        monkeypatch.setattr(SplitAdamW, "_streamed", lambda self, t: True)
    after, during = (
        memory_ranks.steps_of_a_small_model(how, dtype, parts, most) for how in ({}, leaving)
    )
    memory_ranks.same_trajectories(after, during, exact=most == math.inf or parts == 1)


@pytest.mark.processes
def test_gradients_of_shards_that_leave():
    for after, during in run_ranks(2, memory_ranks.overlap_on_shards):
        memory_ranks.same_trajectories(after, during, exact=True)


def test_gradients_leave_layer_by_layer_and_backward_waits_for_slow_updates(monkeypatch):
    monkeypatch.setattr(host_jobs, "AHEAD", 2)
    release, begun = threading.Event(), []
    compute = Block.update_at

    def slow(self, weight, grad):
        begun.append(len(begun))
        assert release.wait(60)
        compute(self, weight, grad)

    monkeypatch.setattr(Block, "update_at", slow)
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))
    before = [layer.weight.detach().clone() for layer in layers]
    opt = SplitAdamW(layers.parameters(), lr=1e-2, overlap=True)
    loss = layers(torch.randn(3, 4)).square().sum()

    def backward():
        with opt.during_backward():
            loss.backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join(1)
    assert thread.is_alive() and begun == [0], (
        "backward is held up while one update is made and two gradients wait"
    )
    assert all(p.grad is None for p in layers.parameters())
    assert torch.equal(layers[0].weight, before[0])
    release.set()
    thread.join(60)
    opt.step()
    assert len(begun) == 6 and not any(
        torch.equal(layer.weight, w) for layer, w in zip(layers, before, strict=True)
    )


def test_what_goes_wrong_in_an_update_is_raised_by_step(monkeypatch):
    monkeypatch.setattr(host_jobs, "AHEAD", 1)

    def broken(self, weight, grad):
        raise ArithmeticError("broken")

    monkeypatch.setattr(Block, "update_at", broken)
    params = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    opt = SplitAdamW(params, overlap=True)
    with opt.during_backward():
        sum(p.sum() for p in params).backward()
    with pytest.raises(ArithmeticError, match="broken"):
        opt.step()


def test_nothing_leaves_outside_and_clipping_is_refused():
    p = nn.Parameter(torch.ones(3))
    opt = SplitAdamW([p], overlap=True)
    p.sum().backward()
    assert torch.equal(p.grad, torch.ones(3))
    p.grad = None
    with opt.during_backward():
        p.sum().backward()
    with pytest.raises(RuntimeError, match="cannot be clipped"):
        opt.clip(1.0)
    for leaving in ({"overlap": True}, {"gradients": "host"}):
        with pytest.raises(ValueError, match="states on the host"):
            SplitAdamW([p], placement="gpu", **leaving)


@pytest.mark.parametrize("leaving", [{"overlap": True}, {"gradients": "host"}])
def test_a_gradient_that_comes_twice_is_refused(leaving):
    p = nn.Parameter(torch.ones(3))
    opt = SplitAdamW([p], **leaving)
    with opt.during_backward():
        p.sum().backward()
        with pytest.raises(
            RuntimeError, match="offload_gradients: false and optimizer_overlap: false"
        ):
            p.sum().backward()


def test_gradients_on_the_host_wait_for_the_step_and_no_longer():
    p = nn.Parameter(torch.ones(3))
    opt = SplitAdamW([p], lr=0.1, gradients="host")

    def backward():
        with opt.during_backward():
            (2 * p).sum().backward()

    backward()
    assert (
        p.grad is None
        and torch.equal(p, torch.ones(3))
        and float(opt.clip(1.0)) == pytest.approx(12**0.5)
    )
    opt.zero_grad()  # given up: nothing is left of it
    opt.step()
    assert torch.equal(p, torch.ones(3)) and not opt.state
    backward()
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="came after"):
        opt.step()
    p.grad = None
    opt.step()
    assert torch.allclose(p, torch.full((3,), 0.9), atol=2e-3) and opt.state[p]["step"] == 1
    opt.step()
    assert opt.state[p]["step"] == 1


def test_a_weight_that_backward_still_needs_is_not_changed_quietly():
    """A function that saved the weight without giving a part of its gradient: autograd sees the
    change.
    """
    p, x = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = SplitAdamW([p], lr=0.1, overlap=True)
    y = x * p.detach()  # its backward reads p, and runs after p's gradient is final
    with (
        opt.during_backward(),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        (y.square().sum() + (y.detach() * p).sum()).backward()
