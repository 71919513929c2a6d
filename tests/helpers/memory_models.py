"""Tiny models in float64, and their loss and gradients on one row, for the memory tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from longfactory import sp
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.layout import Segment

ALL = MemorySettings(
    keep_attention=1.0,
    offload="inputs+attention",
    pool_bytes=64 << 20,
    last_layers_on_gpu=1,
    mlp_chunk=5,
    attention_groups=2,
)
IN_SEGMENTS = MemorySettings(
    segment_layers=2, keep_attention=0.5, offload="inputs", pool_bytes=64 << 20, mlp_chunk=8
)
"""Settings that take every technique at once."""

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 9, "head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 1,
    },
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": 9,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "olmo2": {},
    "gpt_neox": {},
}
LENGTH = 44
SEGMENTS = (Segment(0, 17), Segment(17, 40), Segment(40, 44))


def make_model(
    kind: str, monkeypatch: pytest.MonkeyPatch | None = None, seed: int = 0, **changes: Any
) -> nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind, **{**TINY, "attention_dropout": 0.0, "use_cache": False, **SPECIAL[kind], **changes}
    )
    config._experts_implementation = "eager"  # grouped products have no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=hf.ATTENTION).double()
    # biases and norms start at constants, where a missing gradient may hide
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    if monkeypatch is not None:
        stay_in_float64(model, monkeypatch)
    return model.train()


def stay_in_float64(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and routers of transformers compute in float32, whatever the model's type: a difference
    of 1e-16 before them is 1e-7 after.
    """

    def norm(self: Any, x: Tensor) -> Tensor:
        w = self.weight + 1.0 if "Gemma" in type(self).__name__ else self.weight
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            monkeypatch.setattr(type(module), "forward", norm)
    softmax = F.softmax
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, dim=None, _stacklevel=3, dtype=None: softmax(
            x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype
        ),
    )


def run(
    model: nn.Module,
    ctx: sp.SequenceParallel | None = None,
    seed: int = 1,
    length: int = LENGTH,
    segments: Any = SEGMENTS,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
) -> Tensor:
    """A loss with another weight for each token; its gradients are added to the parameters. Returns
    the loss of the whole row.
    """
    ctx = ctx or sp.SequenceParallel.create(1)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TINY["vocab_size"], (length,), generator=g)
    positions = torch.cat([torch.arange(s.stop - s.start) for s in segments])
    plan = sp.plan(length, segments, ctx)
    logits = model(**hf.inputs({"input_ids": ids, "position_ids": positions}, plan)).logits[0]
    weight = torch.randn(length, logits.shape[-1], generator=g, dtype=torch.float64)
    loss = (torch.log_softmax(logits, -1) * sp.shard(weight, plan)).sum() / length
    backward(loss)
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12
) -> None:
    assert found.keys() == wanted.keys()
    assert len(wanted) > 0
    for name, g in wanted.items():
        scale = max(float(g.abs().max()), 1e-3)
        error = float((found[name] - g).abs().max()) / scale
        assert error < tolerance, f"{name}: {error:.1e}"
