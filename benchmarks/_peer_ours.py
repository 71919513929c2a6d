"""LongFactory's rows of `_peers.py`."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor

from _peer_bench import Bench, GiB, Job
from _peer_steps import NoteKernels, finish_step, make_optimizer, shard
from longfactory import sp
from longfactory.data.assemble import Rules, pair
from longfactory.data.collate import collate
from longfactory.data.row import Row
from longfactory.memory.apply import apply_memory
from longfactory.memory.choose import choose_memory, host_memory
from longfactory.memory.shapes import ModelShape, TrainingJob, machine
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.sp import hf
from longfactory.stages.losses import LossOptions
from longfactory.stages.preference import PreferenceStage


def ours(bench: Bench) -> None:
    """Steps of LongFactory with the settings that each length's plan takes."""
    job = bench.job
    NoteKernels(bench)
    ctx = sp.SequenceParallel.create(
        bench.world, mode=job.mode, backend=job.kernel, device_type=bench.device.type
    )
    model = bench.model(hf.ATTENTION)
    hf.prepare(model, ctx)
    head = TokenLogprobs(model)
    vocab = model.config.vocab_size
    first = memory_plan(bench, model.config, max(job.tokens))[1]
    store = apply_memory(model, first, bench.device)
    if bench.world > 1:
        shard(bench, model)
    overlaps = job.row == "ours-overlap"
    leaving = {"overlap": True} if overlaps else {"gradients": first.gradients}
    optimizer = make_optimizer(bench, model, first.optimizer, **leaving) if job.optimizer else None
    bench.log("sharded, optimizer made")

    def settings(tokens: int) -> tuple[Any, Any]:
        """A length's plan, and its settings with the optimizer that there is."""
        plan, new = memory_plan(bench, model.config, tokens)
        kept = {"optimizer": first.optimizer, "gradients": first.gradients}
        return plan, dataclasses.replace(new, **kept)

    def before(tokens: int) -> dict[str, Any]:
        facts = pair_facts(tokens, vocab, sp.alignment(ctx)) if job.row == "dpo" else {}
        plan, new = settings(tokens)
        change_store(bench, store, plan, new, facts.get("computed", tokens))
        return facts | {
            "settings": dataclasses.asdict(new),
            "host_states": plan.budget.host.get("optimizer", 0.0),
            "predicted_seconds": plan.budget.seconds,
            "predicted_peak": plan.budget.gpu_total,
        }

    def after() -> dict[str, Any]:
        """Host bytes of one process for activations: pinned, and of them the most that were in
        use at once.
        """
        pool = store.pool
        return {
            "locked": pool.locked_bytes if pool is not None else 0,
            "used": pool.peak_bytes if pool is not None else 0,
        }

    def token_logps(ids: Tensor, labels: Tensor, positions: Tensor, plan: sp.RowPlan) -> Tensor:
        """[T] log-probabilities of the labels of the whole row, the same on every rank."""
        row = {"input_ids": ids.to(bench.device), "position_ids": positions.to(bench.device)}
        with head.labels(labels[plan.index]):
            out = model(**hf.inputs(row, plan))
            local = head.outputs(out.logits)
        return sp.gather(local.logps, plan)

    def text_loss(tokens: int) -> Tensor:
        ids, labels = bench.row(tokens, vocab)
        logps = token_logps(ids, labels, torch.arange(tokens), sp.plan(tokens, None, ctx))
        return -logps.sum() / (tokens - 1)

    def pair_loss(tokens: int) -> Tensor:
        row = preference_row(tokens, vocab, sp.alignment(ctx))
        plan = sp.plan(len(row), row.segments, ctx)
        logps = token_logps(row.input_ids, row.labels, row.position_ids, plan)
        stage = PreferenceStage("sigmoid", LossOptions(beta=0.1))
        loss_sum, _ = stage.loss_sum(logps, row.to(bench.device))
        return (loss_sum / stage.count_items(row)).float()

    def step(tokens: int) -> tuple[float, dict[str, float]]:
        start = bench.sync()
        # Every rank differentiates the row's loss; the sharding engine averages over ranks.
        loss = pair_loss(tokens) if job.row == "dpo" else text_loss(tokens)
        return finish_step(bench, model, optimizer, loss, start)

    if bench.cuda and not job.warm:
        store.change(settings(16384)[1])
        step(16384)  # kernels are compiled once a process
    bench.measure(step, before, after)


def memory_plan(bench: Bench, config: Any, tokens: int) -> tuple[Any, Any]:
    """The plan of a length on this machine, and the settings that a row runs with."""
    job = bench.job
    layer = "generic" if job.row == "ours-generic" else "auto"
    training = TrainingJob(
        # lora: the layer's own bytes
        shape=ModelShape.of(config, written=layer != "generic"),
        machine=machine(
            torch.cuda.get_device_name() if bench.cuda else "cpu",
            bench.world,
            int(host_memory() * job.host_share),
            gpu_bytes=torch.cuda.mem_get_info()[1] if bench.cuda else 0,
        ),
        tokens=tokens,
        sp=bench.world,
        sharded=bench.world > 1,
        master=2 if bench.world == 1 else 4,
        leavable=True,
        overlaps=job.row == "ours-overlap",
    )
    plan = choose_memory(training, asked_for(job), job.memory)
    bench.log(plan.table)
    return plan, dataclasses.replace(plan.settings, layer=layer)


def asked_for(job: Job) -> dict[str, Any]:
    """The memory settings that a row does not leave to the plan."""
    user = {k: v for k, v in job.settings.items() if k not in ("layer", "pool_bytes")}
    if job.row == "ours-recompute":
        user["keep_attention"] = 0.0
    if job.row == "ours-overlap":
        user["optimizer"] = "host"
    return user


def change_store(bench: Bench, store: Any, plan: Any, new: Any, computed: int) -> None:
    """Gives the store of activations the settings of another length, of so many tokens with padding,
    and pins what it needs.
    """
    if store.pool is not None:
        store.pool.close()  # slots of another length would be counted
    store.change(new)
    if store.pool is None:
        return
    start = time.time()
    store.pool.peak_bytes = 0
    # A slot holds a layer's input or what its attention returned, whichever is more.
    of_a_token = plan.job.shape.hidden_bytes
    if new.offload == "inputs+attention":
        of_a_token = max(of_a_token, plan.job.shape.saved_attention_bytes)
    store.reserve(computed // bench.world * of_a_token + 512)
    bench.log(f"{store.pool.locked_bytes / GiB:.1f} GiB pinned in {time.time() - start:.1f} s")


def pair_facts(tokens: int, vocab: int, multiple: int) -> dict[str, Any]:
    """Tokens of a pair that are computed, with padding, and those of the same pair as two rows."""
    row = preference_row(tokens, vocab, multiple)
    whole = {i: d.stop - d.start for i, d in enumerate(row.documents)}
    as_two_rows = sum(
        whole[i] + whole[d.parent] for i, d in enumerate(row.documents) if d.parent >= 0
    )
    return {"computed": len(row), "as_two_rows": as_two_rows}


def preference_row(tokens: int, vocab: int, multiple: int) -> Row:
    """One pair of `tokens` tokens in all as the trainer lays it: [prompt | chosen | rejected], the
    prompt 95 % of it, positions of both answers going on where the prompt ends. Padded to
    `multiple`; the documents carry reference log-probabilities."""
    answer = tokens // 40
    prompt = tokens - 2 * answer - 1  # each branch begins with the prompt's last token
    ids = torch.randint(
        0, vocab, (prompt + 2 * answer,), generator=torch.Generator().manual_seed(tokens)
    ).numpy()
    parts = [ids[:prompt], ids[prompt : prompt + answer], ids[prompt + answer :]]
    documents = pair(parts, Rules(cutoff=tokens, share_prompt=True), sample=0)
    # Numbers from before the first step: here those of a reference that finds all tokens equally
    # probable.
    known = [
        (
            d
            if d.role == "prompt"
            else dataclasses.replace(d, reference_logp=-answer * math.log(vocab))
        )
        for d in documents
    ]
    return collate([known], multiple, 0)
