"""The optimizers that LongFactory makes itself, as runs use them."""

from __future__ import annotations

import logging
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import cpu_sharding
from invariance_worker import Samples, add_lora, collate, samples, tiny
from longfactory import sp
from longfactory.config.arguments import FinetuningArguments
from longfactory.errors import UserError
from longfactory.memory.optimizer import SplitAdamW
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.stages.tokens import TokenStage
from longfactory.train.memory_plan import Memory
from longfactory.train.optimizer_names import Narrow
from longfactory.train.optimizers import one_dtype_each, optimizer_factory
from longfactory.train.trainer import RowTrainer


def memory(
    placement: str,
    split: bool,
    overlaps: bool = False,
    narrow: Narrow | None = None,
    gradients: str = "gpu",
) -> Memory:
    settings = types.SimpleNamespace(
        optimizer=placement, gradients=gradients if placement == "host" else "gpu"
    )
    fixed, job = {"gradients": gradients}, types.SimpleNamespace(overlaps=overlaps)
    plan = types.SimpleNamespace(settings=settings, fixed=fixed, job=job)
    return Memory(plan, split, narrow)  # type: ignore[arg-type]


def configured(optim: str = "adamw_torch", ratio: float | None = None) -> Any:
    method = FinetuningArguments(loraplus_lr_ratio=ratio)
    return types.SimpleNamespace(trainer=types.SimpleNamespace(optim=optim), method=method)


def arguments(folder: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments

    keys = {
        "learning_rate": 1e-3,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "weight_decay": 0.1,
        "report_to": "none",
        "use_cpu": True,
    }
    keys |= {"label_names": [], "remove_unused_columns": False, "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **{**keys, **changes})


def test_lora_plus_on_the_host_follows_torch(tmp_path: Path) -> None:
    """Twenty steps with the same gradients; B matrices learn sixteen times as fast in both."""
    from peft.optimizers import create_loraplus_optimizer

    args = arguments(tmp_path)
    ours, theirs = add_lora(tiny("llama")), add_lora(tiny("llama"))
    make = optimizer_factory(configured(ratio=16.0), memory("host", False))
    assert make is not None
    a = make(ours, types.SimpleNamespace(args=args))
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    b = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=args.weight_decay,
        **settings,
    )
    assert isinstance(a, SplitAdamW) and a.placement == "host"
    rates = {
        n: g["lr"]
        for g in a.param_groups
        for n, p in ours.named_parameters()
        if any(p is q for q in g["params"])
    }
    assert {r for n, r in rates.items() if "lora_B" in n} == {16e-3} and {
        r for n, r in rates.items() if "lora_A" in n
    } == {1e-3}
    trained = [
        (p, q)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        if p.requires_grad
    ]
    assert len(trained) == len(rates) == 12
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)) for o in (a, b)]
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        for p, q in trained:
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        for o, schedule in zip((a, b), schedules, strict=True):
            o.step()
            schedule.step()
    for p, q in trained:
        assert float(((p - q).abs() / q.abs().clamp(min=1e-2)).max()) < 1e-6


def test_lora_plus_on_the_gpu_is_torch(tmp_path: Path) -> None:
    make = optimizer_factory(configured(ratio=16.0), memory("gpu", False))
    assert make is not None
    trainer = types.SimpleNamespace(
        args=arguments(tmp_path),
        get_optimizer_cls_and_kwargs=lambda args, model: (
            torch.optim.AdamW,
            {"lr": args.learning_rate},
        ),
    )
    optimizer = make(add_lora(tiny("llama")), trainer)
    assert type(optimizer) is torch.optim.AdamW and {
        g["lr"] for g in optimizer.param_groups if g["params"]
    } == {1e-3, 16e-3}


@pytest.mark.parametrize(("placement", "split"), [("host", False), ("gpu", True)])
def test_other_optimizers_are_refused_on_the_host(placement: str, split: bool) -> None:
    with pytest.raises(UserError, match="optim: adafactor cannot keep its states on the host"):
        optimizer_factory(configured("adafactor"), memory(placement, split))
    assert optimizer_factory(configured("adafactor"), memory("gpu", False)) is None


@pytest.mark.parametrize(
    "name",
    ["adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"],
)
def test_narrow_states_are_never_exchanged_for_wide_ones(name: str) -> None:
    for placement, split in (("host", False), ("host", True), ("gpu", True)):
        with pytest.raises(UserError, match=f"optim: {name} cannot keep its states on the host"):
            optimizer_factory(configured(name), memory(placement, split))


def test_what_is_not_usual_is_in_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("longfactory"), "propagate", True)
    caplog.set_level("INFO", "longfactory")

    def said() -> list[str]:
        """Each message once: in a run of many tests a record may arrive twice."""
        return list(dict.fromkeys(caplog.messages))

    assert (
        optimizer_factory(
            configured("adamw_8bit"),
            memory("gpu", False, narrow=Narrow("8 bit", 2, "bitsandbytes")),
        )
        is None
    )
    assert (
        optimizer_factory(configured(), memory("gpu", False, narrow=Narrow("bf16", 4, None)))
        is None
    )
    optimizer_factory(configured(), memory("host", True, overlaps=True))
    assert said() == [
        "AdamW states in 8 bit (bitsandbytes): training does not follow the exact fp32 trajectory.",
        "AdamW states in bf16 (pure_bf16): training does not follow the exact fp32 trajectory.",
        "No gradient clipping (max_grad_norm: 0): the host updates weights during the backward pass.",
    ]
    caplog.clear()
    optimizer_factory(configured(), memory("host", True, gradients="host"))
    assert not caplog.messages
    optimizer_factory(configured(), memory("gpu", False, overlaps=True))
    optimizer_factory(configured(), memory("gpu", True, gradients="host"))
    assert [m.split(":")[0] for m in said()] == [
        "optimizer_overlap has no effect",
        "offload_gradients has no effect",
    ]


@pytest.mark.processes
@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_a_run_sums_micro_batches_in_fp32_and_clips_without_rounding(
    clip: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 samples, 3 a step: the last step of the epoch has one micro-batch."""
    cpu_sharding.reset()
    args = arguments(
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        num_train_epochs=1,
        max_grad_norm=clip,
    )
    args.logging_steps = 1
    model = tiny("llama").to(torch.bfloat16)
    model.set_attn_implementation(hf.ATTENTION)
    ctx = sp.SequenceParallel.create(1)
    hf.prepare(model, ctx)
    make = optimizer_factory(configured(), memory("host", True))
    trainer = RowTrainer(
        model,
        args,
        ctx=ctx,
        stage=TokenStage(),
        head=TokenLogprobs(model, chunk=13),
        collate=collate,
        pad_id=0,
        make_optimizer=make,
        train_dataset=Samples(samples("single", 7)),
    )
    accumulate, step = SplitAdamW.accumulate, SplitAdamW.step
    micro: list[list[torch.Tensor]] = []
    steps: list[tuple[int, float, float]] = []

    def gradients(o: SplitAdamW) -> list[torch.Tensor]:
        return [p.grad.clone() for g in o.param_groups for p in g["params"]]

    def watched(self: SplitAdamW, last: bool) -> None:
        micro.append(gradients(self))
        accumulate(self, last)

    def stepped(self: SplitAdamW, closure: Any = None) -> Any:
        sums = [sum(g.float() for g in parts).bfloat16() for parts in zip(*micro, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(sums, gradients(self), strict=True))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in sums))
        steps.append((len(micro), norm, self._factor()))
        micro.clear()
        return step(self, closure)

    monkeypatch.setattr(SplitAdamW, "accumulate", watched)
    monkeypatch.setattr(SplitAdamW, "step", stepped)
    trainer.train()
    assert [n for n, _, _ in steps] == [3, 3, 1]
    logged = [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h]
    assert logged == pytest.approx([norm for _, norm, _ in steps], rel=1e-6)
    assert [s for _, _, s in steps] == pytest.approx(
        [min(1.0, clip / norm) if clip else 1.0 for _, norm, _ in steps], rel=1e-3
    )
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_groups_of_two_types_are_divided() -> None:
    """In DeepSpeed's flat buffers bf16 weights beside a float32 value head became float32."""
    narrow = [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)) for _ in range(2)]
    wide = torch.nn.Parameter(torch.zeros(3))
    groups = [
        {"params": [narrow[0], wide, narrow[1]], "weight_decay": 0.1},
        {"params": [], "lr": 1.0},
    ]
    assert one_dtype_each(groups) == [
        {"params": narrow, "weight_decay": 0.1},
        {"params": [wide], "weight_decay": 0.1},
    ]
