"""DPO and reward models under DDP, FSDP2 and ZeRO-3 against a plain single-process loop; started like `invariance_worker.py`.

A case is "stage=dpo tune=lora sp=2". dpo with tune=full takes its reference from a pass before the first step, with tune=lora from the
model with its adapter off.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import traceback
from typing import Any

import cpu_sharding
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from invariance_worker import CLIP, RATE, STEPS, VOCAB, Samples, add_lora, collate, deepspeed_json, tiny
from torch import Tensor, nn

from longfactory import sp
from longfactory.data.row import IGNORE, TokenizedDocument
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.model.value_head import TokenValues
from longfactory.shard import settings
from longfactory.shard.export import full_state_dict
from longfactory.sp import hf
from longfactory.train import reference
from longfactory.train.callbacks import AtStart
from longfactory.train.stages import PreferenceStage, RewardStage
from longfactory.train.trainer import RowTrainer

BETA = 0.5


def pairs(total: int) -> Samples:
    g = torch.Generator().manual_seed(3)
    out = Samples()
    for i in range(total):
        prompt = torch.randint(3, VOCAB, (int(torch.randint(2, 20, (1,), generator=g)),), generator=g).tolist()
        docs = []
        for role in ("chosen", "rejected"):
            answer = torch.randint(3, VOCAB, (int(torch.randint(1, 20, (1,), generator=g)),), generator=g).tolist()
            docs.append(TokenizedDocument(prompt + answer, [IGNORE] * len(prompt) + answer, role=role, sample=i))
        out.append(docs)
    return out


def make_value_head(model: nn.Module) -> TokenValues:
    torch.manual_seed(13)
    return TokenValues(model)


def specification(stage: str, model: nn.Module, data: Samples, order: list[int], batch: int) -> dict[str, Any]:
    """Each document by itself, one process, float64, plain SGD with clipping."""
    model = copy.deepcopy(model).double()
    head = make_value_head(model).value.double() if stage == "rm" else None
    first = copy.deepcopy(model)
    params = [p for p in model.parameters() if p.requires_grad]

    def logp(m: nn.Module, d: TokenizedDocument) -> Tensor:
        ids, target = torch.tensor(d.input_ids), torch.tensor(d.labels)[1:]
        lp = m(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
        return (lp * (target != IGNORE)).sum()

    def ratio(d: TokenizedDocument) -> Tensor:
        with torch.no_grad():
            if hasattr(first, "disable_adapter"):
                with first.disable_adapter():
                    before = logp(first, d)
            else:
                before = logp(first, d)
        return logp(model, d) - before

    def value(d: TokenizedDocument) -> Tensor:
        return head(model.model(input_ids=torch.tensor(d.input_ids)[None])[0][0, -1])[0]  # type: ignore[misc, operator]

    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        each = []
        for i in order[step * batch : (step + 1) * batch]:
            c, r = data[i]
            each.append(-F.logsigmoid(value(c) - value(r) if stage == "rm" else BETA * (ratio(c) - ratio(r))))
        loss = torch.stack(each).mean()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_([p for p in params if p.grad is not None], CLIP).item())
        losses.append(loss.item())
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p -= RATE * p.grad
    return {"losses": losses, "norms": norms, "params": {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}}


def run_case(sharding: str, case: dict[str, str]) -> dict[str, float]:
    size, batch = int(case["sp"]), 2
    groups = int(os.environ["WORLD_SIZE"]) // size
    data = pairs(batch * groups * STEPS)
    cpu_sharding.reset()
    plain = tiny("qwen3")
    if case["tune"] == "lora":
        plain = add_lora(plain)
    model = copy.deepcopy(plain)
    extra: dict[str, Any] = {"accelerator_config": settings.accelerator_arguments(), "ddp_find_unused_parameters": False, "label_names": []}
    if sharding == "fsdp2":
        extra |= settings.fsdp2_arguments(efficient_loading=False)
    if sharding == "zero3":
        extra["deepspeed"] = settings.deepspeed_config(deepspeed_json(sharding), bf16=False)
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=STEPS,
            learning_rate=RATE,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=5,
            remove_unused_columns=False,
            use_cpu=sharding != "zero3",
            dataloader_num_workers=0,
            **extra,
        )
        args.device  # noqa: B018
        ctx = sp.SequenceParallel.create(size)
        hf.prepare(model, ctx)
        head = make_value_head(model) if case["stage"] == "rm" else TokenLogprobs(model, chunk=13)
        stage = RewardStage() if case["stage"] == "rm" else PreferenceStage()
        if isinstance(stage, PreferenceStage):
            stage.options = type(stage.options)(beta=BETA)
        trainer = RowTrainer(model, args, ctx=ctx, stage=stage, head=head, collate=collate, pad_id=0, train_dataset=data)
        if sharding == "fsdp2":
            settings.fix_fsdp2_plugin(trainer.accelerator, model)

        def precompute() -> None:
            def logps_of(row: Any) -> Tensor:
                with reference.as_reference(trainer.model_wrapped, adapter_off=False):
                    return trainer.token_outputs(trainer.model_wrapped, row).logps

            rows = (item["row"] for item in trainer.loader(data, batch, True))
            trainer.reference_caches[id(data)] = reference.precompute(rows, logps_of, len(data), dp_sum=trainer._sum_over_groups)

        if case["stage"] == "dpo" and case["tune"] == "full":
            trainer.add_callback(AtStart(precompute))
        trainer.reference_by_adapter = case["stage"] == "dpo" and case["tune"] == "lora"
        order = trainer.get_train_dataloader().batch_sampler.order()
        trainer.train()
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
    want = specification(case["stage"], plain, data, order, batch * groups)
    start = dict(plain.named_parameters())
    return {
        "first": logs[0]["loss"],
        "loss": max(abs(a["loss"] - b) for a, b in zip(logs, want["losses"], strict=True)),
        "grad_norm": max(abs(a["grad_norm"] - b) for a, b in zip(logs, want["norms"], strict=True)),
        "param": max((state[n].float().cpu() - p).abs().max().item() for n, p in want["params"].items()),
        "moved": max((start[n].detach() - p).abs().max().item() for n, p in want["params"].items() if n in start),
    }


def main() -> None:
    sharding, path, cases = sys.argv[1], sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    if sharding == "fsdp2":
        cpu_sharding.install_fsdp()
    if sharding == "zero3":
        cpu_sharding.install_deepspeed()
    elif not dist.is_initialized():
        dist.init_process_group("gloo")
    results: dict[str, Any] = {}
    for text in cases:
        try:
            results[text] = run_case(sharding, dict(part.split("=") for part in text.split()))
        except BaseException:
            results[text] = {"error": traceback.format_exc()}
            raise
        finally:
            if dist.get_rank() == 0:
                with open(path, "w") as f:
                    json.dump(results, f)


if __name__ == "__main__":
    main()
