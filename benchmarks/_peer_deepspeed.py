"""DeepSpeed's rows of `_peers.py`."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from _peer_bench import Bench, GiB, make_config


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


def deepspeed_row(bench: Bench) -> None:
    """DeepSpeed's ALST as its documentation composes it, or (row ulysses) its sequence parallelism
    alone with full logits.
    """
    if not bench.cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss
    except Exception as error:
        bench.tokens = bench.job.tokens[0]
        if bench.rank == 0:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            bench.say(error=f"deepspeed cannot be imported: {why}")
        return
    tiled = bench.job.row != "ulysses"
    deepspeed.init_distributed("nccl" if bench.cuda else "gloo")
    if bench.cuda and bench.job.kernel == "flash":
        torch.backends.cuda.enable_cudnn_sdp(False)
    note_sdpa(bench)
    if tiled:
        tile_mlp()
    engine = make_engine(bench, tiled)
    vocab = engine.module.config.vocab_size
    bench.log("DeepSpeed engine made")

    def head_loss(self: Any, h: Tensor, y: Tensor) -> Tensor:
        return summed_loss(self.lm_head(h).float(), y)

    def loss_of(tokens: int) -> Tensor:
        """This rank's part of the row's loss."""
        ids, labels = bench.row(tokens, vocab)
        mine = slice(bench.rank * tokens // bench.world, (bench.rank + 1) * tokens // bench.world)
        x, y = ids[None, mine].to(bench.device), labels[None, mine].to(bench.device)
        positions = torch.arange(mine.start, mine.stop, device=bench.device)[None]
        if not tiled:
            logits = engine(input_ids=x, position_ids=positions).logits.float()
            return summed_loss(logits, y) / (tokens - 1)
        h = engine.module.model(input_ids=x, position_ids=positions).last_hidden_state
        shards = max(1, math.ceil(x.shape[1] * vocab * 4 / GiB))
        weights = [engine.module.lm_head.weight]
        total = TiledFusedLogitsLoss.apply(
            head_loss, engine.module, h, y, None, shards, weights, "sum"
        )
        return total / (tokens - 1)

    def step(tokens: int) -> tuple[float, dict[str, float]]:
        start = bench.sync()
        loss = loss_of(tokens)
        value = loss.detach().clone()
        forward = bench.sync()
        engine.backward(loss * bench.world)
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


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), reduction="sum", ignore_index=-100
    )


def tile_mlp() -> None:
    """Qwen2's MLP in tiles of as many tokens as a hidden state is wide, as ALST has it. Each tile is
    computed again in the backward, besides what activation checkpointing computes again.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.qwen2 import modeling_qwen2

    def compute(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def mlp(self: Any, x: Tensor) -> Tensor:
        shards = max(1, math.ceil(x.shape[-2] / self.hidden_size))
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(compute, self, x, shards, weights)

    modeling_qwen2.Qwen2MLP.forward = mlp


def make_engine(bench: Bench, tiled: bool) -> Any:
    """The model with random weights, sharded by ZeRO-3, and AdamW."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AutoModelForCausalLM

    settings = zero_settings(bench)
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=settings, dtype=torch.bfloat16):
        model = AutoModelForCausalLM.from_config(
            make_config(bench.job.shape, bench.job.layers),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=bench.world,
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    # TiledMLP needs the reentrant kind
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": tiled})
    model.enable_input_require_grads()
    model.train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.cuda)
    return deepspeed.initialize(model=model, optimizer=adam, config=settings, mpu=mpu)[0]


def zero_settings(bench: Bench) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    bucket = 1e5 if bench.job.shape == "tiny" else 5e8
    in_bf16 = bench.job.row == "alst-bf16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {
            "enabled": True,
            "bf16_master_weights_and_grads": in_bf16,
            "bf16_optimizer_states": in_bf16,
        },
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
        },
        "sequence_parallel_size": bench.world,
    }
