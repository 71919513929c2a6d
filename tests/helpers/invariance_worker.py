"""Runs the trainer on many cases in one set of processes and compares each with a plain
single-process loop.

A case may also name "aux=0.5" (the routers' loss) and "recompute=1" (checkpointed layers in chunks).
A case is "sp=2 mode=ulysses rows=packed ga=3 tune=lora family=llama". Among those of zero3 a case
may name another way that DeepSpeed has: "sharding=zero1", "zero2" or "zero3-file".
"""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

import cpu_sharding
from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.sp.distance import worst

STEPS = 3
SEED = 5
CLIP = 0.5
RATE = 0.5
VOCAB = 97


def tiny(family: str) -> nn.Module:
    torch.manual_seed(7)
    common = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    special = {
        # tied head, fewer kv heads than ranks
        "llama": dict(tie_word_embeddings=True, num_key_value_heads=1),
        # soft-caps, a window
        "gemma2": dict(sliding_window=11, final_logit_softcapping=5.0, attn_logit_softcapping=7.0),
        "qwen3": {},
        "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        # sinks, a window; experts transposed and with biases
        "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=11),
        # a shared expert and a dense layer, which PEFT takes for experts; a bias on the scores
        "glm4_moe": dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
    }[family]
    config = transformers.AutoConfig.for_model(family, **{**common, **special})
    config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


def add_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(11)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    for name, p in model.named_parameters():  # B = 0 would hide the gradient of A
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def add_lora_everywhere(model: nn.Module) -> nn.Module:
    """What `lora_target: all` means, experts included."""
    from longfactory.config.arguments import FinetuningArguments, ModelArguments
    from longfactory.model.adapters import apply_finetuning

    torch.manual_seed(11)
    method = FinetuningArguments(finetuning_type="lora", lora_rank=3)
    model = apply_finetuning(model, method, ModelArguments())
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def add_oft(model: nn.Module) -> nn.Module:
    """OFT on every linear layer but the output, with rotations that are not the identity."""
    from longfactory.config.arguments import FinetuningArguments, ModelArguments
    from longfactory.model.adapters import apply_finetuning

    torch.manual_seed(11)
    method = FinetuningArguments(finetuning_type="oft", oft_block_size=8)
    model = apply_finetuning(model, method, ModelArguments())
    for name, p in model.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(p, std=0.05)
    return model


def samples(rows: str, total: int) -> list[list[TokenizedDocument]]:
    """`total` samples. Labels are uneven: sample 0 is trained in its first quarter alone (a rank
    has nothing), sample 1 nowhere.
    """
    g = torch.Generator().manual_seed(3)
    out = []
    for i in range(total):
        lengths = (
            [int(n) for n in torch.randint(5, 40, (4,), generator=g)]
            if rows == "packed"
            else [int(torch.randint(30, 70, (1,), generator=g))]
        )
        docs = []
        for n in lengths:
            ids = torch.randint(3, VOCAB, (n,), generator=g)
            labels = ids.clone()
            labels[: int(torch.randint(0, n // 2 + 1, (1,), generator=g))] = IGNORE
            if i == 0:
                labels = ids.clone()
                labels[n // 4 :] = IGNORE
            if i == 1:
                labels[:] = IGNORE
            docs.append(TokenizedDocument(ids.tolist(), labels.tolist(), sample=i))
        out.append(docs)
    return out


def collate(samples: list[list[TokenizedDocument]], multiple: int, pad_id: int) -> Row:
    return make_row([d for s in samples for d in s]).padded(multiple, pad_id)


class Samples(list):
    @property
    def lengths(self) -> list[int]:
        return [sum(len(d.input_ids) for d in s) for s in self]


def noisy_inputs(
    model: nn.Module, sample: list[TokenizedDocument], step: int, alpha: float
) -> list[torch.Tensor]:
    """[1, L, d] embeddings of each document, with the noise that NEFTune draws for a row of these
    documents.
    """
    from longfactory.train.embedding_noise import token_keys, token_scales, uniform

    row = make_row(sample)
    embedded = model.get_input_embeddings()(row.input_ids)
    dim = embedded.shape[-1]
    noise = (
        uniform(token_keys(row, SEED, step), dim)
        * (token_scales(row, alpha) / math.sqrt(dim))[:, None]
    )
    return [x[None] for x in (embedded + noise).split([len(d.input_ids) for d in sample])]


def router_loss(model: nn.Module, logits: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """transformers' auxiliary loss of a row, from the router logits of its documents."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    function = sys.modules[type(inner).__module__].load_balancing_loss_func
    layers = tuple(torch.cat(parts) for parts in zip(*logits, strict=True))
    return function(layers, inner.num_experts, inner.num_experts_per_tok)


def reference(
    model: nn.Module,
    data: list,
    order: list[int],
    batch: int,
    alpha: float,
    aux: float = 0.0,
    rows: int = 1,
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The specification: each document by itself through the model, one process, plain SGD on the
    mean over the step's trained tokens. With `aux` times the routers' loss of each row of `rows`
    samples, rows weighted by their trained tokens.
    """
    model = copy.deepcopy(model).double()
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        # the grouped products of a CPU know no float64
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.set_experts_implementation("eager")
    params = [p for p in model.parameters() if p.requires_grad]
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        total, count = 0.0, 0
        in_row: list[tuple[torch.Tensor, ...]] = []
        tokens = 0
        for place, i in enumerate(order[step * batch : (step + 1) * batch]):
            for d, embedded in zip(data[i], noisy_inputs(model, data[i], step, alpha), strict=True):
                labels = torch.tensor(d.labels)
                out = model(
                    inputs_embeds=embedded, **({"output_router_logits": True} if aux else {})
                )
                logits = out.logits[0, :-1].double()
                target = labels[1:]
                keep = target != IGNORE
                logp = torch.log_softmax(logits, -1).gather(1, target.clamp(min=0)[:, None])[:, 0]
                total = total - (logp * keep).sum()
                count += int(keep.sum())
                tokens += int(keep.sum())
                if aux:
                    in_row.append(out.router_logits)
            if aux and place % rows == rows - 1:
                total = total + aux * tokens * router_loss(model, in_row)
                in_row, tokens = [], 0
        loss = total / max(count, 1)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(params, CLIP).item())
        losses.append(loss.item())
        with torch.no_grad():
            for p in params:
                p -= RATE * p.grad
    return (
        losses,
        norms,
        {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad},
    )


def deepspeed_json(sharding: str) -> dict | str:
    """What a user would write: "zero3-file" is the ready-made file, with its "auto" values; the
    others say what forces communication.
    """
    if sharding == "zero3-file":
        return str(
            Path(__file__).resolve().parents[2] / "examples" / "deepspeed" / "ds_z3_config.json"
        )
    stage = int(sharding[-1])
    return {
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10000,
            **(
                {"stage3_param_persistence_threshold": 0}
                if stage == 3
                else {"allgather_bucket_size": 10000}
            ),
        },
        "zero_allow_untested_optimizer": True,
    }


def run_case(sharding: str, case: dict[str, str]) -> dict[str, float | str]:
    from longfactory import sp
    from longfactory.memory.apply import apply_memory
    from longfactory.memory.settings import MemorySettings
    from longfactory.model.routing import Routing
    from longfactory.model.token_logprobs import TokenLogprobs
    from longfactory.shard import settings
    from longfactory.shard.export import full_state_dict
    from longfactory.sp import hf
    from longfactory.stages.tokens import TokenStage
    from longfactory.train.trainer import RowTrainer

    world = int(os.environ["WORLD_SIZE"])
    size, ga = int(case["sp"]), int(case["ga"])
    groups = world // size
    batch = 2 if case["rows"] == "batch2" else 1
    total = batch * ga * groups
    data = Samples(samples(case["rows"], total * STEPS))

    cpu_sharding.reset()
    model = tiny(case["family"])
    if case["tune"] == "lora":
        model = add_lora(model)
    if case["tune"] == "experts":
        model = add_lora_everywhere(model)
    if case["tune"] == "oft":
        model = add_oft(model)
    plain = model
    model = copy.deepcopy(model)
    (
        model.set_attn_implementation(hf.ATTENTION)
        if hasattr(model, "set_attn_implementation")
        else model.base_model.model.set_attn_implementation(hf.ATTENTION)
    )

    zero = sharding.startswith("zero")
    extra: dict[str, Any] = {}
    if zero:
        extra["deepspeed"] = settings.deepspeed_config(deepspeed_json(sharding), bf16=False)
    with tempfile.TemporaryDirectory() as folder:
        args = cpu_sharding.training_arguments(
            sharding,
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=ga,
            max_steps=STEPS,
            learning_rate=RATE,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            seed=SEED,
            neftune_noise_alpha=float(case.get("noise", 0)) or None,
            **extra,
        )
        ctx = sp.SequenceParallel.create(size, mode=case["mode"])
        hf.prepare(model, ctx)
        if case.get("recompute"):
            apply_memory(model, MemorySettings(mlp_chunk=8), longest=20)
        head = TokenLogprobs(model, chunk=13)
        trainer = RowTrainer(
            model,
            args,
            ctx=ctx,
            stage=TokenStage(),
            head=head,
            collate=collate,
            pad_id=0,
            routing=Routing(model, ctx, float(case.get("aux", 0))),
            train_dataset=data,
            eval_dataset=data,
        )
        if sharding == "fsdp2":
            settings.fix_fsdp2_plugin(trainer.accelerator, model)
        want_type = "DEEPSPEED" if zero else {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[sharding]
        assert trainer.accelerator.distributed_type == want_type, (
            trainer.accelerator.distributed_type,
            want_type,
        )
        if case.get("prove"):
            from longfactory.train.callbacks import AtStart
            from longfactory.train.prove import prove_exact

            trainer.add_callback(AtStart(lambda: prove_exact(trainer)))
        sampler = trainer.get_train_dataloader().batch_sampler
        trainer.train()
        if zero:  # the stage that was asked for is the one that trained
            assert trainer.model_wrapped.zero_optimization_stage() == int(sharding[4]), (
                trainer.model_wrapped.zero_optimization_stage()
            )
        logs = [h for h in trainer.state.log_history if "loss" in h]
        evaluated = trainer.evaluate()["eval_loss"]
        if sharding == "fsdp2":
            state = full_state_dict(trainer.model)
        elif sharding.startswith("zero3"):
            import deepspeed

            unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            state = {}
            for n, p in unwrapped.named_parameters():
                with deepspeed.zero.GatheredParameters([p]):
                    state[n] = p.detach().clone()
        else:
            state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    if dist.get_rank() != 0:
        return {}
    losses, norms, params = reference(
        plain,
        data,
        sampler.order(),
        total,
        float(case.get("noise", 0)),
        float(case.get("aux", 0)),
        batch,
    )
    return {
        "loss": worst(abs(a["loss"] - b) for a, b in zip(logs, losses, strict=True)),
        "grad_norm": worst(abs(a["grad_norm"] - b) for a, b in zip(logs, norms, strict=True)),
        "param": worst((state[n].float().cpu() - p).abs().max() for n, p in params.items()),
        "moved": worst(
            (dict(plain.named_parameters())[n].detach() - p).abs().max() for n, p in params.items()
        ),
        "eval": evaluated,
    }


def run_cases(sharding: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Body of a rank of a pool of its own: how far each case is from the specification. The first
    rank's answer counts.
    """
    cpu_sharding.start(sharding)
    results = {}
    for text in cases:
        case = dict(part.split("=") for part in text.split())
        try:
            results[text] = run_case(case.get("sharding", sharding), case)
        except Exception as error:
            raise RuntimeError(f"The case that failed: {text}") from error
    return results
