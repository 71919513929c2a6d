"""Stages with pairs or a reference under DDP, FSDP2 and ZeRO against a plain single-process loop;
cases as in `invariance_worker.py`.

A case is "stage=dpo tune=lora sp=2". With tune=lora the reference is the model with its adapter
off; with tune=full dpo and kto take it from a pass before the first step, and asft holds a second
model. Among the cases of zero3 one may name "sharding=zero1" or "zero2".
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import cpu_sharding
from invariance_worker import (
    CLIP,
    RATE,
    STEPS,
    VOCAB,
    Samples,
    add_lora,
    collate,
    deepspeed_json,
    tiny,
)
from longfactory import sp
from longfactory.config import from_mapping
from longfactory.data.row import IGNORE, TokenizedDocument
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.value_head import TokenValues
from longfactory.shard import settings
from longfactory.shard.export import full_state_dict
from longfactory.sp import hf
from longfactory.sp.distance import worst
from longfactory.stages.base import Stage
from longfactory.stages.kto import KTOStage
from longfactory.stages.losses import LossOptions
from longfactory.stages.preference import PreferenceStage
from longfactory.stages.reward import RewardStage
from longfactory.stages.tokens import TokenStage
from longfactory.train import reference
from longfactory.train.callbacks import AtStart
from longfactory.train.reference.attach import attach_reference
from longfactory.train.trainer import RowTrainer

BETA, ALPHA = 0.5, 2.0


def samples(stage: str, total: int) -> Samples:
    """Each with two documents: two answers to a prompt; for kto an answer, good or bad, and another
    one for the KL term.
    """
    g = torch.Generator().manual_seed(3)
    out = Samples()
    for i in range(total):
        prompt = torch.randint(
            3, VOCAB, (int(torch.randint(2, 20, (1,), generator=g)),), generator=g
        ).tolist()
        docs = []
        for role in (
            (("rejected", "chosen")[i % 3 > 0], "kl") if stage == "kto" else ("chosen", "rejected")
        ):
            answer = torch.randint(
                3, VOCAB, (int(torch.randint(1, 20, (1,), generator=g)),), generator=g
            ).tolist()
            docs.append(
                TokenizedDocument(
                    prompt + answer,
                    [IGNORE] * len(prompt) + answer,
                    role="" if stage == "asft" else role,
                    sample=i,
                )
            )
        out.append(docs)
    return out


def make_stage(name: str) -> Stage:
    if name == "dpo":
        return PreferenceStage(options=LossOptions(beta=BETA))
    return {
        "rm": RewardStage(),
        "kto": KTOStage(BETA, 1.5, 0.5),
        "asft": TokenStage("asft", ALPHA),
    }[name]


def make_value_head(model: nn.Module) -> TokenValues:
    torch.manual_seed(13)
    return TokenValues(model)


def another(model: nn.Module) -> nn.Module:
    """The same model with other weights."""
    other = copy.deepcopy(model)
    torch.manual_seed(17)
    for p in other.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return other


def rate(stage: str) -> float:
    """Weighted by its probability, a token that the model does not know moves little."""
    return 10 * RATE if stage == "asft" else RATE


def specification(
    stage: str, model: nn.Module, reference: nn.Module, data: Samples, order: list[int], batch: int
) -> dict[str, Any]:
    """Each document by itself, one process, float64, plain SGD with clipping."""
    model, first = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    head = make_value_head(model).value.double() if stage == "rm" else None
    params = [p for p in model.parameters() if p.requires_grad]

    def log_p(m: nn.Module, d: TokenizedDocument) -> Tensor:
        return m(input_ids=torch.tensor(d.input_ids)[None]).logits[0, :-1].log_softmax(-1)

    def before(d: TokenizedDocument) -> Tensor:
        with (
            torch.no_grad(),
            (
                first.disable_adapter()
                if hasattr(first, "disable_adapter")
                else contextlib.nullcontext()
            ),
        ):
            return log_p(first, d)

    def of_labels(x: Tensor, d: TokenizedDocument) -> Tensor:
        target = torch.tensor(d.labels)[1:]
        return x.gather(1, target.clamp(min=0)[:, None])[:, 0] * (target != IGNORE)

    def ratio(d: TokenizedDocument) -> Tensor:
        return of_labels(log_p(model, d), d).sum() - of_labels(before(d), d).sum()

    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model

    def value(d: TokenizedDocument) -> Tensor:
        return head(inner.model(input_ids=torch.tensor(d.input_ids)[None])[0][0, -1])[0]  # type: ignore[misc, operator]

    def asft(d: TokenizedDocument) -> Tensor:
        lp, lq = log_p(model, d), before(d)
        x = of_labels(lp, d)
        return (
            -x * x.detach().exp()
            + ALPHA * (lq.exp() * (lq - lp)).sum(-1) * (torch.tensor(d.labels)[1:] != IGNORE)
        ).sum()

    def step_loss(batch: list[list[TokenizedDocument]]) -> Tensor:
        if stage == "dpo":
            return torch.stack(
                [-F.logsigmoid(BETA * (ratio(c) - ratio(r))) for c, r in batch]
            ).mean()
        if stage == "rm":
            return torch.stack([-F.logsigmoid(value(c) - value(r)) for c, r in batch]).mean()
        if stage == "asft":
            docs = [d for pair in batch for d in pair]
            return torch.stack([asft(d) for d in docs]).sum() / sum(
                x != IGNORE for d in docs for x in d.labels
            )
        kl = torch.stack([ratio(other).detach() for _, other in batch]).mean().clamp(min=0)
        each = [
            (
                1.5 * (1 - torch.sigmoid(BETA * (ratio(d) - kl)))
                if d.role == "chosen"
                else 0.5 * (1 - torch.sigmoid(BETA * (kl - ratio(d))))
            )
            for d, _ in batch
        ]
        return torch.stack(each).mean()

    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        loss = step_loss([data[i] for i in order[step * batch : (step + 1) * batch]])
        loss.backward()
        norms.append(
            nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], CLIP).item()
        )
        losses.append(loss.item())
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p -= rate(stage) * p.grad
    return {
        "losses": losses,
        "norms": norms,
        "params": {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad},
    }


def run_case(sharding: str, case: dict[str, str], shared: str) -> dict[str, float]:
    size, batch = int(case["sp"]), 2
    groups = int(os.environ["WORLD_SIZE"]) // size
    data = samples(case["stage"], batch * groups * STEPS)
    cpu_sharding.reset()
    plain = tiny("qwen3")
    if case["tune"] == "lora":
        plain = add_lora(plain)
    model = copy.deepcopy(plain)
    compared = another(plain) if case["stage"] == "asft" and case["tune"] == "full" else plain
    zero = sharding.startswith("zero")
    extra: dict[str, Any] = {}
    if zero:
        extra["deepspeed"] = settings.deepspeed_config(deepspeed_json(sharding), bf16=False)
    with tempfile.TemporaryDirectory() as folder:
        args = cpu_sharding.training_arguments(
            sharding,
            folder,
            per_device_train_batch_size=batch,
            max_steps=STEPS,
            learning_rate=rate(case["stage"]),
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            **extra,
        )
        ctx = sp.SequenceParallel.create(size)
        hf.prepare(model, ctx)
        head = make_value_head(model) if case["stage"] == "rm" else TokenLogprobs(model, chunk=13)
        trainer = RowTrainer(
            model,
            args,
            ctx=ctx,
            stage=make_stage(case["stage"]),
            head=head,
            collate=collate,
            pad_id=0,
            train_dataset=data,
        )
        if sharding == "fsdp2":
            settings.fix_fsdp2_plugin(trainer.accelerator, model)

        def precompute() -> None:
            def logps_of(row: Any) -> Tensor:
                with reference.as_reference(trainer.model_wrapped, adapter_off=False):
                    return trainer.token_outputs(trainer.model_wrapped, row).logps

            rows = (item["row"] for item in trainer.loader(data, batch, True))
            numbers = reference.precompute(
                rows, logps_of, len(data), dp_sum=trainer._sum_over_groups
            )
            trainer.reference = reference.Reference(computed=((data, numbers),))

        if case["stage"] == "asft":
            start = Path(shared) / "start"
            if case["tune"] == "full" and dist.get_rank() == 0:
                compared.save_pretrained(start)
            dist.barrier()
            cfg = from_mapping(
                {
                    "stage": "sft",
                    "use_asft_loss": True,
                    "finetuning_type": case["tune"],
                    "output_dir": folder,
                    "do_train": True,
                }
                | {
                    "model_name_or_path": str(start),
                    "dataset": "any",
                    "template": "empty",
                    "use_cpu": True,
                },
            )
            trainer.add_callback(AtStart(lambda: attach_reference(trainer, cfg)))
        elif case["stage"] != "rm" and case["tune"] == "full":
            trainer.add_callback(AtStart(precompute))
        elif case["stage"] != "rm":
            trainer.reference = reference.Reference(by_adapter=True)
        order = trainer.get_train_dataloader().batch_sampler.order()
        trainer.train()
        if zero:  # the stage that was asked for is the one that trained
            assert trainer.model_wrapped.zero_optimization_stage() == int(sharding[4]), (
                trainer.model_wrapped.zero_optimization_stage()
            )
        logs = [h for h in trainer.state.log_history if "loss" in h]
        if sharding == "fsdp2":
            state = full_state_dict(trainer.model)
        elif sharding == "zero3":
            import deepspeed

            state = {}
            for n, p in trainer.accelerator.unwrap_model(trainer.model_wrapped).named_parameters():
                with deepspeed.zero.GatheredParameters([p]):
                    state[n] = p.detach().clone()
        else:
            state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    if dist.get_rank() != 0:
        return {}
    want = specification(case["stage"], plain, compared, data, order, batch * groups)
    start = dict(plain.named_parameters())
    return {
        "first": logs[0]["loss"],
        "loss": worst(abs(a["loss"] - b) for a, b in zip(logs, want["losses"], strict=True)),
        "grad_norm": worst(
            abs(a["grad_norm"] - b) for a, b in zip(logs, want["norms"], strict=True)
        ),
        "param": worst((state[n].float().cpu() - p).abs().max() for n, p in want["params"].items()),
        "moved": worst(
            (start[n].detach() - p).abs().max() for n, p in want["params"].items() if n in start
        ),
    }


def run_cases(sharding: str, cases: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """Body of a rank of a pool of its own: how far each case is from the specification. The first
    rank's answer counts.
    """
    cpu_sharding.start(sharding)
    results = {}
    for text in cases:
        case = dict(part.split("=") for part in text.split())
        try:
            results[text] = run_case(case.get("sharding", sharding), case, folder)
        except Exception as error:
            raise RuntimeError(f"The case that failed: {text}") from error
    return results
