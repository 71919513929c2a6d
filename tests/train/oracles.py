"""What the tests of losses and stages share: TRL's loss on given log-probabilities, and data-parallel groups as threads."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from longfactory.train import losses
from longfactory.train.losses import DataParallel
from longfactory.train.pairs import PairLogps

ALONE = DataParallel()
LENGTHS = torch.tensor([[7, 3], [12, 12], [1, 5], [4, 9], [30, 2]])  # chosen, rejected


def smoothing(name: str) -> float:
    return 0.2 if name in losses.SMOOTHED and name != "sigmoid" else 0.0


def example(seed: int = 0, scale: float = 0.3) -> tuple[PairLogps, torch.Tensor, torch.Tensor]:
    """Five pairs: as our losses take them, and as padded token log-probabilities [10, 30] with a mask, as TRL has them."""
    g = torch.Generator().manual_seed(seed)
    n = LENGTHS.t().reshape(-1)
    mask = torch.arange(30) < n[:, None]
    policy = -torch.rand(10, 30, generator=g, dtype=torch.float64) * 3 * mask
    reference = ((policy + scale * torch.randn(10, 30, generator=g, dtype=torch.float64)) * mask).sum(1)
    sums = policy.sum(1)
    pairs = PairLogps(sums[:5], sums[5:], reference[:5], reference[5:], n[:5].double(), n[5:].double())
    return pairs, policy, mask


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def trl_dpo_loss(
    name: str, policy: torch.Tensor, mask: torch.Tensor, pairs: PairLogps, beta: float, e: float, ld_alpha: float | None = None
) -> torch.Tensor:
    """TRL's DPOTrainer._compute_loss, its model replaced by one that returns these token log-probabilities."""
    from trl.trainer.dpo_trainer import DPOTrainer

    self = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=e,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    completion = F.pad(mask.long(), (1, 0))  # one prompt token; token t is predicted at t - 1
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": pairs.chosen_reference,
        "ref_rejected_logps": pairs.rejected_reference,
    }
    zeros = torch.zeros_like(policy)
    out = SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return DPOTrainer._compute_loss(self, lambda **_: out, inputs, False)


LOG2 = math.log(2)
AT_START = {
    "sigmoid": LOG2,
    "hinge": 1.0,
    "ipo": 25.0,
    "kto_pair": 0.5,
    "nca_pair": 2 * LOG2,
    "robust": LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 50.0,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG2 + 0.5,
    "sigmoid_norm": LOG2,
}


class Groups:
    """Data-parallel groups as threads: `sum` adds up what all of them bring."""

    def __init__(self, size: int):
        self.size, self.barrier, self.brought = size, threading.Barrier(size), [torch.zeros(())] * size

    def of(self, rank: int) -> DataParallel:
        def add(x: torch.Tensor) -> torch.Tensor:
            self.brought[rank] = x.detach()
            self.barrier.wait(20)
            total = torch.stack(self.brought).sum(0)
            self.barrier.wait(20)
            return total

        return DataParallel(add, rank, self.size)

    def run(self, f) -> list:
        results: list = [None] * self.size

        def work(rank: int) -> None:
            try:
                results[rank] = f(rank, self.of(rank))
            except BaseException as e:
                results[rank] = e
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.size)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        for r in results:
            if isinstance(r, BaseException):
                raise r
        return results
