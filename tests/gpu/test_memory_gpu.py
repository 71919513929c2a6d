"""The memory engine on a GPU: offload through pinned memory, accuracy in bf16, the optimizer
on the host, bytes a token.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fused_calls import calls
from longfactory import sp
from longfactory.memory import compiled, layer_ops, split_masters
from longfactory.memory.apply import apply_memory
from longfactory.memory.optimizer import SplitAdamW
from longfactory.memory.settings import MemorySettings
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

GiB = 2**30
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}
ALL = MemorySettings(
    keep_attention=1.0,
    offload="inputs+attention",
    pool_bytes=8 * GiB,
    last_layers_on_gpu=1,
    mlp_chunk=1024,
    attention_groups=2,
)
SETTINGS = {
    "all": ALL,
    "late": dataclasses.replace(ALL, late_prefetch=True, last_layers_on_gpu=0),
    "recomputed": MemorySettings(offload="inputs", pool_bytes=8 * GiB),
    "segments": dataclasses.replace(ALL, segment_layers=2),
    "no room": dataclasses.replace(ALL, pool_bytes=12 * 2**20),
}


def make(layers=6, dtype=torch.bfloat16, **changes) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2",
        **{**SIZES, **changes},
        num_hidden_layers=layers,
        use_cache=False,
        tie_word_embeddings=False,
    )
    torch.set_default_device("cuda")
    try:
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=hf.ATTENTION
        )
    finally:
        torch.set_default_device(None)
    return model.to(dtype).train()


def run(model: nn.Module, length: int, head: TokenLogprobs | None = None) -> float:
    ctx = sp.SequenceParallel.create(1, device_type="cuda")
    plan = sp.plan(length, None, ctx)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (length,), generator=g).cuda()
    inputs = hf.inputs(
        {"input_ids": ids, "position_ids": torch.arange(length, device="cuda")}, plan
    )
    if head is None:
        z = model(**inputs).logits[0].float()
        loss = nn.functional.cross_entropy(z[:-1], ids[1:])
    else:
        # The head of the trainer: anything in fp32 over the whole sequence would take more than the
        # layers.
        with head.labels(torch.cat([ids[1:], ids[:1]])):
            loss = -head.outputs(model(**inputs).logits).logps.mean()
    loss.backward()
    return float(loss)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(found, exact):
    return {n: float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact}


@pytest.mark.parametrize("layer", ["auto", "generic"])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_as_accurate_as_plain_bf16(name, layer):
    length = 4096
    exact_model = make(dtype=torch.float32)
    run(exact_model, length)
    exact = gradients(exact_model)
    del exact_model
    plain_model = make()
    run(plain_model, length)
    plain = errors(gradients(plain_model), exact)
    del plain_model
    model = make()
    store = apply_memory(model, dataclasses.replace(SETTINGS[name], layer=layer))
    for _ in range(3):  # slots are reused from the second step on
        model.zero_grad()
        run(model, length)
        ours = errors(gradients(model), exact)
        assert sum(ours.values()) <= 1.1 * sum(plain.values())
        assert all(ours[n] <= 1.5 * plain[n] + 1e-3 for n in exact)
    assert store.pool is not None and store.pool.offloaded_bytes > 0
    assert store.pool.locked_bytes <= store.settings.pool_bytes


def test_page_locking_works_here():
    model = make()
    store = apply_memory(model, ALL)
    run(model, 2048)
    assert store.pool is not None
    assert len(store.pool._locked) == len(store.pool._slots) > 0
    store.pool.close()


@pytest.mark.parametrize("placement", ["gpu", "host"])
def test_trajectory_is_that_of_adamw_on_fp32_weights(placement, monkeypatch):
    from longfactory.memory import optimizer

    monkeypatch.setattr(optimizer, "BLOCK", 1 << 20)
    model = make(layers=2)
    exact = [p.detach().float() for p in model.parameters()]
    plain = torch.optim.AdamW(exact, lr=1e-3, fused=True)
    opt = SplitAdamW(model.parameters(), lr=1e-3, placement=placement)
    g = torch.Generator("cuda").manual_seed(2)
    for _ in range(20):
        for p, e in zip(model.parameters(), exact, strict=True):
            p.grad = torch.randn(p.shape, generator=g, device="cuda").bfloat16()
            e.grad = p.grad.float()
        opt.step()
        plain.step()
    assert opt.state[next(model.parameters())]["exp_avg"].is_cuda == (placement == "gpu")
    for p, e in zip(model.parameters(), exact, strict=True):
        # The kernel of one pass and the host's instructions round otherwise than PyTorch's kernel, a
        # few units in the last place over 20 steps.
        assert float((opt.master(p) - e).norm() / e.norm()) < 1e-6


@pytest.mark.parametrize("placement", ["gpu", "host"])
def test_micro_batches_are_summed_in_fp32_and_clipped_without_rounding(placement, monkeypatch):
    from longfactory.memory import optimizer

    monkeypatch.setattr(optimizer, "BLOCK", 1 << 18)
    model = make(layers=2)
    opt = SplitAdamW(model.parameters(), lr=1e-3, placement=placement)
    g = torch.Generator("cuda").manual_seed(3)
    for _ in range(2):
        sums = [torch.zeros(p.shape, device="cuda") for p in model.parameters()]
        for k in range(4):
            for p, total in zip(model.parameters(), sums, strict=True):
                p.grad = torch.randn(p.shape, generator=g, device="cuda").bfloat16()
                total += p.grad.float()
            opt.accumulate(last=k == 3)
            if k < 3:
                # What was the gradients' memory is written over while the sums are made, if they
                # were let go too early.
                assert all(p.grad is None for p in model.parameters())
                [torch.full_like(p, float("nan")) for p in model.parameters()]
        for p, total in zip(model.parameters(), sums, strict=True):
            assert torch.equal(p.grad, total.bfloat16())
        norm = (
            torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
        )
        # in bf16 it would be 4e-3
        assert float(opt.clip(1.0)) == pytest.approx(float(norm), rel=1e-4)
        opt.step()
        model.zero_grad()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("leaving", "most"),
    [
        ({"overlap": True}, math.inf),
        ({"gradients": "host"}, math.inf),
        ({"gradients": "host"}, 1.0),
    ],
)
def test_steps_whose_gradients_leave_are_those_whose_gradients_stay(
    leaving, most, parts, monkeypatch
):
    """In every bit, with layers' inputs on the host as well; and gradients are not on the GPU
    together.

    Kernels add up in any order, so that no two backward passes agree: their gradients are exchanged
    for numbers that are the same always.
    """
    from longfactory.memory import host_jobs, optimizer

    def numbers(p, seed):
        return torch.randn(
            p.shape,
            generator=torch.Generator("cuda").manual_seed(seed),
            device="cuda",
            dtype=torch.bfloat16,
        )

    monkeypatch.setattr(optimizer, "BLOCK", 1 << 18)
    monkeypatch.setattr(host_jobs, "AHEAD", 4)
    found = []
    for how in ({}, leaving):
        torch.manual_seed(0)
        beneath = torch.cuda.memory_allocated()
        model = make(layers=12)
        apply_memory(model, dataclasses.replace(ALL, segment_layers=2))
        params = list(model.parameters())
        opt = SplitAdamW(params, lr=1e-2, weight_decay=0.1, **how)
        norms, peaks, passes = [], [], 0
        for i, p in enumerate(params):
            p.register_hook(lambda grad, p=p, i=i: numbers(p, 1000 * passes + i))  # noqa: B023
        for _ in range(4):
            for k in range(parts):
                last, passes = k == parts - 1, passes + 1
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                with opt.during_backward(last):
                    run(model, 1024 + 512 * k)
                    peaks.append(torch.cuda.max_memory_allocated())
                assert all((p.grad is None) == bool(how) for p in params)
                if parts > 1:
                    opt.accumulate(last=last)
            norms.append(float(opt.clip(most)))
            opt.step()
            model.zero_grad(set_to_none=True)
        # Off the GPU, and all else away: the next peak must have the same beneath it.
        found.append(
            (
                [opt.master(p).cpu() for p in params],
                [opt.state[p]["exp_avg"] for p in params],
                norms,
                peaks[-1] - beneath,
            )
        )
        del model, params, opt
        gc.collect()
    after, during = found
    # Norms of parts are added in another order before they clip.
    same = (
        torch.equal
        if most == math.inf or parts == 1
        else functools.partial(torch.allclose, rtol=1e-5, atol=1e-7)
    )
    assert all(same(a, b) for i in (0, 1) for a, b in zip(after[i], during[i], strict=True))
    assert after[2] == pytest.approx(during[2], rel=1e-5)
    gradients = sum(2 * t.numel() for t in after[0])
    print(
        f"peak after {after[3] / 2**20:.0f} MiB, during {during[3] / 2**20:.0f} MiB; gradients"
        f" {gradients / 2**20:.0f} MiB"
    )
    assert after[3] - during[3] > 0.3 * gradients


@pytest.mark.parametrize(
    ("settings", "most"),
    [(dataclasses.replace(ALL, mlp_chunk=2048, attention_groups=4, late_prefetch=True), 60_000)],
)
def test_bytes_a_token_of_the_7b_layer(settings, most):
    """Growth of the peak with length through three layers of Qwen2.5-7B's shape, less what waits
    for the last layer.
    """
    model = make(
        layers=3,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=1 << 20,
    )
    store = apply_memory(model, dataclasses.replace(settings, pool_bytes=16 * GiB))
    head, peaks = TokenLogprobs(model), []
    for length in (16384, 16384, 32768, 65536):
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run(model, length, head)
        peaks.append(torch.cuda.max_memory_allocated())
    waiting = 2 * 3584 + 2 * 3584 + 4 * 28
    slope = (peaks[3] - peaks[2]) / 32768 - waiting
    print(f"working set {slope:.0f} bytes a token; pool {store.pool.locked_bytes / GiB:.1f} GiB")
    assert slope <= most


def test_adamw_of_all_parameters_in_one_call_is_that_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every bit: of parameters of several programs, of less than a block, of none, of memory
    that is not aligned; with gradients in bf16 and fp32.
    """
    lengths = (3 * 2048 * 8 + 5, 7, 0, 2048, 100_000)

    def after_two_steps(dtype: torch.dtype, wrap: Callable[[Any], Any]) -> list[torch.Tensor]:
        monkeypatch.setattr(split_masters, "update_in_one_pass", wrap(one_call))
        torch.manual_seed(0)
        params = []
        for i, n in enumerate(lengths):
            whole = torch.randn(n + i % 2, device="cuda").bfloat16()
            params.append(torch.nn.Parameter(whole[i % 2 :]))
        adamw = SplitAdamW(params, lr=1e-3, weight_decay=0.1, placement="gpu")
        for _ in range(2):
            for p in params:
                p.grad_dtype = None  # of another type than the parameter's
                p.grad = torch.randn(p.shape, device="cuda").to(dtype)
            adamw.step()
        states = [(adamw.state[p]["low"], adamw.state[p]["exp_avg_sq"]) for p in params]
        return [*(p.detach() for p in params), *(t for both in states for t in both)]

    def each(call: Any) -> Any:
        return lambda parameters, *rest: [call([tensors], *rest) for tensors in parameters]

    one_call = split_masters.update_in_one_pass
    for dtype in (torch.bfloat16, torch.float32):
        together = after_two_steps(dtype, lambda call: call)
        assert all(map(torch.equal, together, after_two_steps(dtype, each)))


def test_adamw_of_split_masters_in_one_pass() -> None:
    """The kernel follows torch's AdamW in fp32 over twenty steps, with clipping and decay."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert split_masters.split_update is not None
    assert split_masters.difference_of_one_pass(device) < 1e-5
    assert split_masters.is_one_pass(device)
    torch.manual_seed(0)
    start = [torch.randn(n, device=device).bfloat16() for n in (100_003, 7)]
    wide = [torch.nn.Parameter(t.float()) for t in start]
    ours = [torch.nn.Parameter(t.clone()) for t in start]
    reference = torch.optim.AdamW(wide, lr=1e-3, weight_decay=0.1)
    split = SplitAdamW(ours, lr=1e-3, weight_decay=0.1, placement="gpu")
    for _ in range(20):
        for p, q in zip(wide, ours, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(wide, 1.0)
        assert float(split.clip(1.0)) == pytest.approx(float(norm), rel=1e-5)
        reference.step()
        split.step()
    for p, q in zip(wide, ours, strict=True):
        master = split.master(q)
        torch.testing.assert_close(master, p.detach(), rtol=5e-6, atol=5e-6)
        assert torch.equal(q.detach(), split_masters.split(master)[0])


def test_compiled_functions_give_what_they_give_uncompiled() -> None:
    """Of all functions: none is refused at its first call."""
    compiled._compiled.clear()
    compiled._failed.clear()
    torch.manual_seed(0)
    for name, call in calls("cuda").items():
        call()
        assert not compiled._failed, name
        assert any(form.own for form in compiled._compiled.values()), name
        compiled._compiled.clear()


def test_kernels_are_as_fast_after_other_lengths_and_widths() -> None:
    """A run whose rows have many lengths, or a process with several models: what is compiled for
    16,384 tokens first and what has seen three lengths and other widths before.
    """

    def calls(length: int, width: int) -> dict[str, Callable[[], Any]]:
        x, dy = (torch.randn(length, width, device="cuda").bfloat16() for _ in range(2))
        wide, up = (torch.randn(length, 4 * width, device="cuda").bfloat16() for _ in range(2))
        heads = x.view(length, -1, 128)
        weight, own = torch.ones(width, device="cuda").bfloat16(), torch.ones(128, device="cuda")
        cos, sin = torch.randn(2, length, 64, device="cuda")
        return {
            "norm": lambda: layer_ops.norm(x, weight, 1e-6),
            "norm_backward": lambda: layer_ops.norm_backward(dy, x, weight, 1e-6),
            "norm of heads": lambda: layer_ops.norm(heads, own.bfloat16(), 1e-6),
            "rotate": lambda: layer_ops.rotate(heads, cos, sin),
            "gated": lambda: layer_ops.gated(wide, up),
            "gated_backward": lambda: layer_ops.gated_backward(wide, wide, up),
        }

    def milliseconds() -> dict[str, float]:
        found = {}
        for name, call in calls(16384, 3584).items():
            for _ in range(compiled.IN_A_ROW + 1):
                call()
            least = []
            for _ in range(5):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(10):
                    call()
                stop.record()
                torch.cuda.synchronize()
                least.append(start.elapsed_time(stop) / 10)
            found[name] = min(least)
        return found

    def forget() -> None:
        compiled._compiled.clear()
        torch._dynamo.reset()

    forget()
    alone = milliseconds()
    forget()
    for length, width in ((8192, 3584), (12000, 3584), (5000, 2048), (1000, 5120), (777, 3584)):
        for call in calls(length, width).values():
            call()
    after = milliseconds()
    for name, ms in after.items():
        print(f"{name}: {alone[name]:.3f} ms alone, {ms:.3f} ms after others", flush=True)
    assert sum(after.values()) <= 1.05 * sum(alone.values())
