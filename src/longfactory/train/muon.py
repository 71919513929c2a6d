"""Muon for the matrices inside the model, AdamW for the rest, on whole and on FSDP2-sharded
parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory.shard.optimizer_states import chunk


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al., 2024; the scale of Liu et al., 2025) on the groups with `muon:
    True`, torch's AdamW on the others.

    The Newton-Schulz iteration needs a whole matrix. Under FSDP2 each device makes as many matrices
    whole as its share is, iterates, and sends the rows back: the update is that of one process.

    Args:
        groups: parameter groups with `params`, `muon` and `weight_decay`.
        lr: of both.
        betas, eps: AdamW's.
        momentum: Muon's, with Nesterov's look-ahead.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr, betas=betas, eps=eps)
        super().__init__(list(groups), {**adamw.defaults, "momentum": momentum, "muon": False})
        self._adamw = adamw
        for group in self.param_groups:
            for p in group["params"]:
                if group["muon"] and p.ndim != 2:
                    raise ValueError(f"Muon trains matrices; got a shape of {tuple(p.shape)}.")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update from the gradients. Collective under FSDP2."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.state = self.state
        self._adamw.param_groups = [g for g in self.param_groups if not g["muon"]]
        if self._adamw.param_groups:
            self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                self._muon(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        directions = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            buffer = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
            directions.append(p.grad.lerp(buffer, group["momentum"]))
        sharded = [hasattr(p, "placements") for p in parameters]
        if any(sharded) and not all(sharded):
            raise RuntimeError("Muon: some parameters are sharded and others are not.")
        updates = whole_updates if not any(sharded) else sharded_updates
        for p, update in zip(parameters, updates(directions, group["lr"]), strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            here = p.to_local() if hasattr(p, "to_local") else p
            here.add_(update.to(here.dtype))


def orthogonal_update(direction: Tensor, lr: float) -> Tensor:
    """What torch's Muon adds to a matrix [m, n] for this direction: the nearest semi-orthogonal
    matrix by five Newton-Schulz steps in bf16, scaled so that its entries are as large as AdamW's.
    """
    update = nn.Parameter(torch.zeros_like(direction))
    update.grad = direction
    torch.optim.Muon(
        [update],
        lr=lr,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        adjust_lr_fn="match_rms_adamw",
    ).step()
    return update.detach()


def whole_updates(directions: list[Tensor], lr: float) -> Iterable[Tensor]:
    """The updates of whole matrices, one after the other."""
    return (orthogonal_update(direction, lr) for direction in directions)


def sharded_updates(directions: list[Any], lr: float) -> Iterable[Tensor]:
    """This rank's rows of the updates of matrices whose rows FSDP2 shards over n ranks. Collective.

    n matrices at a time: rank r gets every row of the r-th, iterates, and sends the rows back.
    """
    if not directions:
        return
    mesh = directions[0].device_mesh
    if any(len(d.placements) != 1 or not d.placements[0].is_shard(0) for d in directions):
        raise RuntimeError("Muon expects parameters whose first dimension FSDP2 shards.")
    group, n, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    for start in range(0, len(directions), n):
        batch = directions[start : start + n]
        shapes = [tuple(d.shape) for d in batch] + [(0, 0)] * (n - len(batch))
        parts = [
            [stop - begin for begin, stop in (chunk(rows, n, r) for r in range(n))]
            for rows, _ in shapes
        ]
        send = [d.to_local().flatten() for d in batch]
        sent = [parts[owner][rank] * shapes[owner][1] for owner in range(n)]
        received = [rows * shapes[rank][1] for rows in parts[rank]]
        whole = send[0].new_empty(sum(received))
        dist.all_to_all_single(whole, torch.cat(send), received, sent, group=group)
        if whole.numel():
            # rows of all ranks, in order -> [m, n]
            whole = orthogonal_update(whole.view(shapes[rank]), lr).flatten()
        back = send[0].new_empty(sum(sent))
        dist.all_to_all_single(back, whole, sent, received, group=group)
        for local, shape in zip(back.split(sent), shapes[: len(batch)], strict=False):
            yield local.view(-1, shape[1])


def muon_groups(model: nn.Module, decay: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices that are neither an embedding nor the output layer get Muon (with
    weight decay, as in LLaMA-Factory); the rest gets AdamW.

    Args:
        model: unsharded.
        decay: names of the parameters with weight decay.
    """
    apart = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is not None:
        apart |= {id(p) for p in head.parameters()}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for _, p in trained if p.ndim == 2 and id(p) not in apart]
    chosen = {id(p) for p in muon}
    rest = [(n, p) for n, p in trained if id(p) not in chosen]
    groups = [
        {"params": muon, "muon": True, "weight_decay": weight_decay},
        {"params": [p for n, p in rest if n in decay], "weight_decay": weight_decay},
        {"params": [p for n, p in rest if n not in decay], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
