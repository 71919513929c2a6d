"""One row of the throughput and length tables: complete training steps of one system, at several
lengths, in processes of its own.

Run by `throughput.py` and `length.py`, one process a GPU, with a job as JSON (see `Job`). Every
process builds the model on its device with random weights, trains at each length in turn, and
prints a line `RESULT {...}` for each, so that what was measured before memory ran out is not lost.

Rows:
    ours            longfactory: memory: auto (the keys of `settings` on top), its own layer function
    ours-generic    the same with Hugging Face's layer code in pieces
    ours-recompute  the same with attention computed twice
    ours-overlap    the same with AdamW on the host, nothing clipped, and weights updated while backward runs
    dpo             ours on one preference pair: a row [prompt | chosen | rejected] of T tokens, 95 % of it the prompt that both answers
                    share, made, split and summed by the trainer's functions; sigmoid loss; the reference's log-probabilities are given,
                    as in every step of a run with `precompute_ref_log_probs`
    hf              Hugging Face layers and checkpointing, zigzag ring, full fp32 logits; the same sharding and optimizer as ours
    ulysses, alst   DeepSpeed: UlyssesSPAttentionHF and ZeRO-3; alst adds TiledMLP and the tiled loss. Need the package deepspeed
    alst-bf16       alst with master weights, gradients and states of the optimizer in bf16, which is not the exact trajectory
    rates           this GPU's rates: matrix products of the model's shapes, attention forward and backward at each length
    slope           some layers only, no optimizer: how peak memory grows with length

Attention kernels. DeepSpeed's rows call PyTorch's sdpa on the whole sequence and a share of the
heads: with is_causal, without a mask (DeepSpeed drops it, sdpa ignores position ids) and without
repeated keys (enable_gqa), so that every fused kernel may be taken. On Hopper PyTorch takes
cuDNN's, the kernel that `auto` takes for our rows, so `alst` is also ALST with our kernel;
`alst:flash` forbids it that one. Every result names the kernels that ran: ours as the engine logs
them, theirs as PyTorch chooses for the tensors of each call.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from _device_time import divided
from _table import variant

if TYPE_CHECKING:
    from longfactory.data.row import Row

GiB = 2**30
DEEPSPEED = ("ulysses", "alst", "alst-bf16")
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {  # Qwen2.5-7B
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "14b": {  # Qwen2.5-14B
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


@dataclasses.dataclass
class Job:
    row: str
    tokens: list[int]
    shape: str = "7b"
    layers: int | None = None  # fewer layers than the shape has; said in the result
    kernel: str = "auto"  # attention backend: auto (cuDNN on Hopper), flash (FlashAttention 2), cpu
    steps: int = 2  # timed steps at each length, the fastest counts; at most one from 100,000
    # tokens up; 0: that of `profile` alone
    warm: bool = True  # one more step at each length before them
    memory: str = "auto"  # auto, fast, long
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: bool = True
    host_share: float = 1.0  # of the host's memory, as if the machine had less
    mode: str = "zigzag-ring"
    profile: bool = False  # one further timed step under the profiler: where its time goes
    name: str = ""  # what the table calls it, where rows differ in their settings alone


def make_config(shape: str, layers: int | None = None) -> Any:
    """The transformers configuration of a shape, with another number of layers if asked."""
    from transformers import AutoConfig

    keys = dict(SHAPES[shape])
    if layers is not None:
        keys["num_hidden_layers"] = layers
    config = AutoConfig.for_model(
        "qwen2", **keys, max_position_embeddings=1 << 22, tie_word_embeddings=False, rope_theta=1e6
    )
    config.use_cache = False
    return config


class Bench:
    """The process: its device, its group, and how it reports."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = torch.cuda.is_available()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if self.cuda
            else torch.device("cpu")
        )
        if self.cuda:
            torch.cuda.set_device(self.device)
        self.tokens = 0
        self.begun = time.time()
        self.kernels: set[str] = set()  # attention kernels that ran

    def open_group(self) -> None:
        if self.world > 1:
            dist.init_process_group(
                "nccl" if self.cuda else "gloo", device_id=self.device if self.cuda else None
            )

    def say(self, **facts: Any) -> None:
        job = self.job
        about = {
            "row": job.row,
            "kernel": job.kernel,
            "tokens": self.tokens,
            "gpus": self.world,
            **variant(dataclasses.asdict(job)),
        }
        print("RESULT " + json.dumps(about | facts), flush=True)

    def log(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.time() - self.begun:6.1f} s] {text}", flush=True)

    def sync(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.time()

    def model(self, attention: str) -> Any:
        """Random bf16 weights, made on the device."""
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        torch.set_default_device(self.device)
        try:
            model = AutoModelForCausalLM.from_config(
                make_config(self.job.shape, self.job.layers),
                dtype=torch.bfloat16,
                attn_implementation=attention,
            )
        finally:
            torch.set_default_device(None)
        self.log(f"model made: {sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters")
        return model.train()

    def row(self, tokens: int, vocab: int) -> tuple[Tensor, Tensor]:
        """ids [T], and the labels of the next token; -100 at the end."""
        g = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, vocab, (tokens,), generator=g)
        return ids, torch.cat([ids[1:], torch.tensor([-100])])

    def measure(
        self,
        step: Callable[[int], tuple[float, dict[str, float]]],
        before: Callable[[int], dict[str, Any]] = lambda tokens: {},
        after: Callable[[], dict[str, Any]] = lambda: {},
    ) -> None:
        """Runs the steps at every length and reports each.

        `step` returns the loss and the seconds of its parts; `before` and `after` what else is
        known of a length.
        """
        versions = {}
        for package in (
            "torch",
            "transformers",
            *(["deepspeed"] if self.job.row in DEEPSPEED else []),
        ):
            versions[package] = importlib.metadata.version(package)
        for tokens in self.job.tokens:
            self.tokens = tokens
            facts = before(tokens)
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            times: list[tuple[float, dict[str, float]]] = []
            loss = math.nan

            def timed_step(tokens: int = tokens, times: list[Any] = times) -> None:
                nonlocal loss
                if self.world > 1:
                    dist.barrier()
                start = self.sync()
                loss, parts = step(tokens)
                times.append((self.sync() - start, parts))
                self.log(
                    f"{self.job.row} {tokens} tokens, step {len(times) - 1}: {times[-1][0]:.2f} s,"
                    f" loss {loss:.4f}, {parts}"
                )

            profiled = self.job.profile and self.cuda
            steps = self.job.steps if tokens < 100_000 else min(1, self.job.steps)
            for _ in range(steps + self.job.warm):
                timed_step()
            if profiled:
                facts["device_ms"] = divided(timed_step)
            seconds, parts = min(times[1:] if self.job.warm else times, key=lambda t: t[0])
            peak = torch.cuda.max_memory_allocated() if self.cuda else 0
            reserved = torch.cuda.max_memory_reserved() if self.cuda else 0
            facts |= {"kernels": sorted(self.kernels), **after(), "versions": versions}
            if self.rank == 0:
                self.say(
                    seconds=seconds,
                    first=times[0][0],
                    loss=loss,
                    peak=peak,
                    reserved=reserved,
                    parts=parts,
                    **facts,
                )


class NoteKernels(logging.Handler):
    """Our rows: the engine logs each kernel once, when `auto` first takes it."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(logging.INFO)
        self.kernels = bench.kernels
        if bench.job.kernel != "auto":
            self.kernels.add(bench.job.kernel)
        log = logging.getLogger("longfactory.sp.backends")
        log.addHandler(self)
        log.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("attention kernel ") and isinstance(record.args, tuple):
            self.kernels.add(str(record.args[0]))


def note_sdpa(bench: Bench) -> None:
    """DeepSpeed's rows: notes the kernel that sdpa takes, on the very tensors of each call that is
    differentiated.
    """
    from torch.nn.attention import SDPBackend

    names = {"CUDNN_ATTENTION": "cudnn", "FLASH_ATTENTION": "flash" if bench.cuda else "cpu"}
    real = F.scaled_dot_product_attention

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *rest: Any,
        **kwargs: Any,
    ) -> Tensor:
        if torch.is_grad_enabled():
            taken = SDPBackend(
                torch._fused_sdp_choice(query, key, value, attn_mask, *rest, **kwargs)
            ).name
            bench.kernels.add(names.get(taken, taken.lower()))
        return real(query, key, value, attn_mask, *rest, **kwargs)

    F.scaled_dot_product_attention = sdpa


def shard(bench: Bench, model: Any) -> None:
    """FSDP2 with fp32 masters, bf16 compute, gradients reduced in fp32: a unit a layer, and one of
    everything else.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(bench.device.type, (bench.world,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer.float(), mesh=mesh, mp_policy=policy)
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head):
        part.float()
    fully_shard(model, mesh=mesh, mp_policy=policy)


def make_optimizer(
    bench: Bench, model: Any, placement: str, **leaving: Any
) -> torch.optim.Optimizer:
    """AdamW with exact fp32 weights and states: torch's on fp32 shards, the split master on one
    GPU's bf16 weights.
    """
    from longfactory.memory.optimizer import SplitAdamW

    if bench.world > 1 and placement == "gpu":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.cuda)
    return SplitAdamW(model.parameters(), lr=1e-5, placement=placement, **leaving)  # type: ignore[arg-type]


def preference_row(tokens: int, vocab: int, multiple: int) -> Row:
    """One pair of `tokens` tokens in all as the trainer lays it: [prompt | chosen | rejected], the
    prompt 95 % of it, positions of both answers going on where the prompt ends. Padded to
    `multiple`; the documents carry reference log-probabilities."""
    from longfactory.data.assemble import Rules, pair
    from longfactory.data.collate import collate

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


def finish_step(
    bench: Bench, model: Any, optimizer: torch.optim.Optimizer | None, loss: Tensor, start: float
) -> tuple[float, dict[str, float]]:
    """Backward, clipping, update. Returns the row's loss and the seconds of the parts."""
    from longfactory.memory.optimizer import SplitAdamW

    value = loss.detach().float()
    forward = bench.sync()
    if isinstance(optimizer, SplitAdamW):
        with optimizer.during_backward():
            loss.backward()
    else:
        loss.backward()
    backward = bench.sync()
    if isinstance(optimizer, SplitAdamW):
        if not optimizer.overlap:
            optimizer.clip(1.0)
        optimizer.step()
    elif optimizer is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.zero_grad(set_to_none=True)
    end = bench.sync()
    return float(value), {
        "forward": forward - start,
        "backward": backward - forward,
        "update": end - backward,
    }


def ours(bench: Bench) -> None:
    from longfactory import sp
    from longfactory.memory.apply import apply_memory
    from longfactory.memory.choose import choose_memory, host_memory
    from longfactory.memory.shapes import ModelShape, TrainingJob, machine
    from longfactory.model.token_logprobs import TokenLogprobs
    from longfactory.sp import hf
    from longfactory.stages.losses import LossOptions
    from longfactory.stages.preference import PreferenceStage

    job = bench.job
    NoteKernels(bench)
    ctx = sp.SequenceParallel.create(
        bench.world, mode=job.mode, backend=job.kernel, device_type=bench.device.type
    )
    model = bench.model(hf.ATTENTION)
    hf.prepare(model, ctx)
    head = TokenLogprobs(model)
    config = model.config
    gpu_bytes = torch.cuda.mem_get_info()[1] if bench.cuda else 0
    gpu = torch.cuda.get_device_name() if bench.cuda else "cpu"
    user: dict[str, Any] = {
        k: v for k, v in job.settings.items() if k not in ("layer", "pool_bytes")
    }
    if job.row == "ours-recompute":
        user["keep_attention"] = 0.0
    overlap = job.row == "ours-overlap"
    if overlap:
        user["optimizer"] = "host"
    layer = "generic" if job.row == "ours-generic" else "auto"
    stage = PreferenceStage("sigmoid", LossOptions(beta=0.1))

    def settings(tokens: int) -> Any:
        training = TrainingJob(
            # lora: the layer's own bytes
            shape=ModelShape.of(config, written=layer != "generic"),
            machine=machine(
                gpu, bench.world, int(host_memory() * job.host_share), gpu_bytes=gpu_bytes
            ),
            tokens=tokens,
            sp=bench.world,
            sharded=bench.world > 1,
            master=2 if bench.world == 1 else 4,
            leavable=True,
            overlaps=overlap,
        )
        plan = choose_memory(training, user, job.memory)
        bench.log(plan.table)
        return plan, dataclasses.replace(plan.settings, layer=layer)

    first = settings(max(job.tokens))[1]
    store = apply_memory(model, first, bench.device)
    if bench.world > 1:
        shard(bench, model)
    leaving = {"overlap": True} if overlap else {"gradients": first.gradients}
    optimizer = make_optimizer(bench, model, first.optimizer, **leaving) if job.optimizer else None
    bench.log("sharded, optimizer made")

    def before(tokens: int) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if job.row == "dpo":
            row = preference_row(tokens, config.vocab_size, sp.alignment(ctx))
            whole = {i: d.stop - d.start for i, d in enumerate(row.documents)}
            facts["computed"] = len(row)
            facts["as_two_rows"] = sum(
                whole[i] + whole[d.parent] for i, d in enumerate(row.documents) if d.parent >= 0
            )
        plan, new = settings(tokens)
        new = dataclasses.replace(new, optimizer=first.optimizer, gradients=first.gradients)
        if store.pool is not None:
            store.pool.close()  # slots of another length would be counted
        store.change(new)
        start = time.time()
        if store.pool is not None:
            store.pool.peak_bytes = 0
            # A slot holds a layer's input or what its attention returned, whichever is more.
            of_a_token = plan.job.shape.hidden_bytes
            if new.offload == "inputs+attention":
                of_a_token = max(of_a_token, plan.job.shape.saved_attention_bytes)
            store.reserve(facts.get("computed", tokens) // bench.world * of_a_token + 512)
            bench.log(
                f"{store.pool.locked_bytes / GiB:.1f} GiB pinned in {time.time() - start:.1f} s"
            )
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
        ids, labels = bench.row(tokens, config.vocab_size)
        return -token_logps(ids, labels, torch.arange(tokens), sp.plan(tokens, None, ctx)).sum() / (
            tokens - 1
        )

    def pair_loss(tokens: int) -> Tensor:
        row = preference_row(tokens, config.vocab_size, sp.alignment(ctx))
        logps = token_logps(
            row.input_ids, row.labels, row.position_ids, sp.plan(len(row), row.segments, ctx)
        )
        loss_sum, _ = stage.loss_sum(logps, row.to(bench.device))
        return (loss_sum / stage.count_items(row)).float()

    def step(tokens: int) -> tuple[float, dict[str, float]]:
        start = bench.sync()
        # Every rank differentiates the row's loss; the sharding engine averages over ranks.
        loss = pair_loss(tokens) if job.row == "dpo" else text_loss(tokens)
        return finish_step(bench, model, optimizer, loss, start)

    if bench.cuda and job.warm is False:
        store.change(
            dataclasses.replace(
                settings(16384)[1], optimizer=first.optimizer, gradients=first.gradients
            )
        )
        step(16384)  # kernels are compiled once a process
    bench.measure(step, before, after)


def hf_recipe(bench: Bench) -> None:
    from longfactory import sp
    from longfactory.sp import hf

    job = bench.job
    NoteKernels(bench)
    ctx = sp.SequenceParallel.create(
        bench.world, mode=job.mode, backend=job.kernel, device_type=bench.device.type
    )
    model = bench.model(hf.ATTENTION)
    hf.prepare(model, ctx)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if bench.world > 1:
        shard(bench, model)
    optimizer = (
        make_optimizer(bench, model, job.settings.get("optimizer", "gpu"))
        if job.optimizer
        else None
    )

    def step(tokens: int) -> tuple[float, dict[str, float]]:
        start = bench.sync()
        ids, labels = bench.row(tokens, model.config.vocab_size)
        plan = sp.plan(tokens, None, ctx)
        row = {
            "input_ids": ids.to(bench.device),
            "position_ids": torch.arange(tokens, device=bench.device),
        }
        logits = model(**hf.inputs(row, plan)).logits[0].float()
        mine = labels[plan.index].to(bench.device)
        loss = (
            F.cross_entropy(logits, mine, reduction="sum", ignore_index=-100)
            * bench.world
            / (tokens - 1)
        )
        del logits
        value, parts = finish_step(bench, model, optimizer, loss, start)
        total = torch.tensor(value / bench.world, device=bench.device)
        if bench.world > 1:
            dist.all_reduce(total)
        return float(total), parts

    bench.measure(step)


def deepspeed_row(bench: Bench) -> None:
    """DeepSpeed's ALST as its documentation composes it, or (row ulysses) its sequence parallelism
    alone with full logits.
    """
    try:
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import (
            TiledFusedLogitsLoss,
            TiledMLP,
            UlyssesSPAttentionHF,
        )
    except Exception as error:
        bench.tokens = bench.job.tokens[0]
        if bench.rank == 0:
            bench.say(
                error=(
                    "deepspeed cannot be imported:"
                    f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                )
            )
        return
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen2 import modeling_qwen2

    job, world = bench.job, bench.world
    tiled = job.row != "ulysses"
    if not bench.cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed.init_distributed("nccl" if bench.cuda else "gloo")
    if bench.cuda and job.kernel == "flash":
        torch.backends.cuda.enable_cudnn_sdp(False)
    note_sdpa(bench)
    if tiled:

        def mlp(self: Any, x: Tensor) -> Tensor:
            def compute(self: Any, x: Tensor) -> Tensor:
                return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

            shards = max(1, math.ceil(x.shape[-2] / self.hidden_size))
            return TiledMLP.apply(
                compute,
                self,
                x,
                shards,
                [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight],
            )

        modeling_qwen2.Qwen2MLP.forward = mlp
    zero = {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
        "stage3_prefetch_bucket_size": 5e8,
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {
            "enabled": True,
            **dict.fromkeys(
                ("bf16_master_weights_and_grads", "bf16_optimizer_states"), job.row == "alst-bf16"
            ),
        },
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": (
            zero
            | (
                {}
                if job.shape != "tiny"
                else {"reduce_bucket_size": 1e5, "stage3_prefetch_bucket_size": 1e5}
            )
        ),
        "sequence_parallel_size": world,
    }
    torch.manual_seed(0)
    config = make_config(job.shape, job.layers)
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=world,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    # TiledMLP needs the reentrant kind
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": tiled})
    model.enable_input_require_grads()
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.cuda)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=settings, mpu=mpu)
    bench.log("DeepSpeed engine made")

    def head_loss(self: Any, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            self.lm_head(h).float().view(-1, config.vocab_size),
            y.view(-1),
            reduction="sum",
            ignore_index=-100,
        )

    def step(tokens: int) -> tuple[float, dict[str, float]]:
        start = bench.sync()
        ids, labels = bench.row(tokens, config.vocab_size)
        mine = slice(bench.rank * tokens // world, (bench.rank + 1) * tokens // world)
        x, y = ids[None, mine].to(bench.device), labels[None, mine].to(bench.device)
        positions = torch.arange(mine.start, mine.stop, device=bench.device)[None]
        if tiled:
            h = engine.module.model(input_ids=x, position_ids=positions).last_hidden_state
            shards = max(1, math.ceil(x.shape[1] * config.vocab_size * 4 / GiB))
            total = TiledFusedLogitsLoss.apply(
                head_loss, engine.module, h, y, None, shards, [engine.module.lm_head.weight], "sum"
            )
            loss = total / (tokens - 1)
        else:
            logits = engine(input_ids=x, position_ids=positions).logits.float()
            loss = F.cross_entropy(
                logits.view(-1, config.vocab_size), y.view(-1), reduction="sum", ignore_index=-100
            ) / (tokens - 1)
            del logits
        value = loss.detach().clone()
        forward = bench.sync()
        engine.backward(loss * world)
        backward = bench.sync()
        engine.step()
        end = bench.sync()
        dist.all_reduce(value)
        return float(value), {
            "forward": forward - start,
            "backward": backward - forward,
            "update": end - backward,
        }

    bench.measure(step)


def rates(bench: Bench) -> None:
    """What this GPU's kernels reach: the roofline is made of these."""
    from longfactory import sp

    shape = SHAPES[bench.job.shape]
    h, f, heads, kv = (
        shape[k]
        for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    dim, dtype = h // heads, torch.bfloat16
    ctx = sp.SequenceParallel.create(1, backend=bench.job.kernel, device_type=bench.device.type)

    def timed(work: Callable[[], Any], repeats: int) -> float:
        work()
        start = bench.sync()
        for _ in range(repeats):
            work()
        return (bench.sync() - start) / repeats

    rows = 8192 if bench.cuda else 64
    flops = seconds = 0.0
    for n, m in ((h, h), (h, f), (f, h)):
        a, b = (
            torch.randn(rows, n, device=bench.device, dtype=dtype),
            torch.randn(n, m, device=bench.device, dtype=dtype),
        )
        seconds += timed(lambda a=a, b=b: a @ b, 20 if bench.cuda else 1)
        flops += 2.0 * rows * n * m
    gemm = flops / seconds
    for tokens in bench.job.tokens:
        bench.tokens = tokens
        # Rates are the same above this length, and one call takes seconds.
        measured = min(tokens, 131072)
        plan = sp.plan(measured, None, ctx)
        q = torch.randn(measured, heads, dim, device=bench.device, dtype=dtype)
        k, v = (torch.randn(measured, kv, dim, device=bench.device, dtype=dtype) for _ in range(2))
        out, lse = sp.attention_forward(q, k, v, plan)
        repeats = max(1, int(3e14 / (2.0 * measured**2 * heads * dim))) if bench.cuda else 1
        forward = timed(lambda: sp.attention_forward(q, k, v, plan), min(repeats, 20))
        backward = timed(
            lambda: sp.attention_backward(out, q, k, v, out, lse, plan), min(repeats, 20)
        )
        area = 2.0 * measured**2 * heads * dim
        bench.say(
            gemm=gemm,
            attention_forward=area / forward,
            attention_backward=2.5 * area / backward,
            measured_at=measured,
        )


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    bench = Bench(job)
    rows = {
        "ours": ours,
        "ours-generic": ours,
        "ours-recompute": ours,
        "ours-overlap": ours,
        "slope": ours,
        "dpo": ours,
        "hf": hf_recipe,
        "rates": rates,
    }
    rows |= dict.fromkeys(DEEPSPEED, deepspeed_row)
    try:
        if job.row not in DEEPSPEED:
            bench.open_group()
        rows[job.row](bench)
    except (torch.OutOfMemoryError, MemoryError) as error:
        bench.say(error="out of memory", detail=str(error).splitlines()[0][:300])
        sys.stdout.flush()
        os._exit(3)  # others may wait in a collective: leaving at once lets the launcher end them
    except BaseException as error:
        traceback.print_exc()
        bench.say(
            error=(
                f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
            )
        )
        sys.stdout.flush()
        os._exit(4)
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
