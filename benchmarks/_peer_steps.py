"""What our own rows of `_peers.py` and that of Hugging Face's layers have in common: sharding, the
optimizer, the end of a step, and the names of kernels.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from _peer_bench import Bench
from longfactory.memory.optimizer import SplitAdamW


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


def shard(bench: Bench, model: Any) -> None:
    """FSDP2 with fp32 masters, bf16 compute, gradients reduced in fp32: a unit a layer, and one of
    everything else.
    """
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
    if bench.world > 1 and placement == "gpu":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.cuda)
    return SplitAdamW(model.parameters(), lr=1e-5, placement=placement, **leaving)  # type: ignore[arg-type]


def finish_step(
    bench: Bench, model: Any, optimizer: torch.optim.Optimizer | None, loss: Tensor, start: float
) -> tuple[float, dict[str, float]]:
    """Backward, clipping, update. Returns the row's loss and the seconds of the parts."""
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
