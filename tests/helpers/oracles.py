"""What the tests of losses and stages share: small samples, formulas written plainly, TRL's loss,
data-parallel groups as threads.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from longfactory.config.loss_facts import PREFERENCE_FACTS
from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.stages.losses import DataParallel
from longfactory.stages.pairs import PairLogps

ALONE = DataParallel()
LENGTHS = torch.tensor([[7, 3], [12, 12], [1, 5], [4, 9], [30, 2]])  # chosen, rejected


def smoothing(name: str) -> float:
    return 0.2 if PREFERENCE_FACTS[name].smoothing != "unread" and name != "sigmoid" else 0.0


def example(seed: int = 0, scale: float = 0.3) -> tuple[PairLogps, torch.Tensor, torch.Tensor]:
    """Five pairs: as our losses take them, and as padded token log-probabilities [10, 30] with a
    mask, as TRL has them.
    """
    g = torch.Generator().manual_seed(seed)
    n = LENGTHS.t().reshape(-1)
    mask = torch.arange(30) < n[:, None]
    policy = -torch.rand(10, 30, generator=g, dtype=torch.float64) * 3 * mask
    reference = (
        (policy + scale * torch.randn(10, 30, generator=g, dtype=torch.float64)) * mask
    ).sum(1)
    sums = policy.sum(1)
    pairs = PairLogps(
        sums[:5], sums[5:], reference[:5], reference[5:], n[:5].double(), n[5:].double()
    )
    return pairs, policy, mask


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather


def trl_dpo_loss(
    name: str,
    policy: torch.Tensor,
    mask: torch.Tensor,
    pairs: PairLogps,
    beta: float,
    e: float,
    ld_alpha: float | None = None,
) -> torch.Tensor:
    """TRL's DPOTrainer._compute_loss, its model replaced by one that returns these token
    log-probabilities.
    """
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
        self.size, self.barrier, self.brought = (
            size,
            threading.Barrier(size),
            [torch.zeros(())] * size,
        )

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


VOCAB = 23


def texts(seed: int, count: int, longest: int = 7) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, VOCAB, (n,), generator=g).tolist()
        for n in torch.randint(1, longest + 1, (count,), generator=g).tolist()
    ]


PROMPTS, CHOSEN, REJECTED = texts(0, 4), texts(1, 4), texts(2, 4)


def whole(prompt: list[int], answer: list[int], **kw) -> TokenizedDocument:
    return TokenizedDocument(prompt + answer, [IGNORE] * len(prompt) + answer, **kw)


def pair_documents(
    samples: list[int], shared: bool, reference: dict | None = None
) -> list[TokenizedDocument]:
    docs: list[TokenizedDocument] = []
    for i in samples:
        parent = -1
        prompt = PROMPTS[i]
        if shared and len(prompt) > 1:
            docs.append(
                TokenizedDocument(
                    prompt[:-1], [IGNORE] * (len(prompt) - 1), role="prompt", sample=i
                )
            )
            parent, prompt = len(docs) - 1, prompt[-1:]
        # the order of documents does not matter
        for role, answers in (("rejected", REJECTED), ("chosen", CHOSEN)):
            ref = None if reference is None else reference[role, i]
            docs.append(
                whole(prompt, answers[i], role=role, sample=i, parent=parent, reference_logp=ref)
            )
    return docs


def pair_row(samples: list[int], shared: bool, reference: dict | None = None) -> Row:
    return make_row(pair_documents(samples, shared, reference)).padded(8, 0)


def kto_documents(labels: list[int], kl: bool = True) -> list[TokenizedDocument]:
    docs = []
    for i, label in enumerate(labels):
        docs.append(whole(PROMPTS[i], CHOSEN[i], role="chosen" if label else "rejected", sample=i))
        if kl:
            docs.append(whole(PROMPTS[i], REJECTED[i - 1], role="kl", sample=i))
    return docs


def s(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def naive(
    name: str,
    pi: list[Tensor],
    ref: list[Tensor],
    n: list[Tensor],
    b: float,
    e: float,
    gamma: float,
) -> Tensor:
    """The formulas once more, as plainly as they can be written: pi, ref, n are (chosen, rejected),
    each [P].
    """
    (c, r), (fc, fr), (nc, nr) = pi, ref, n
    h = (c - fc) - (r - fr)
    h_mean = (c - fc) / nc - (r - fr) / nr
    log = torch.log

    def odds(x: Tensor) -> Tensor:
        return log(torch.exp(x) / (1 - torch.exp(x)))

    def smooth(z: Tensor) -> Tensor:
        return -(1 - e) * log(s(b * z)) - e * log(s(-b * z))

    match name:
        case "sigmoid":
            return -log(s(b * h))
        case "hinge":
            return torch.stack([torch.clamp(1 - b * x, min=0) for x in h])
        case "ipo":
            return (h_mean - 1 / (2 * b)) ** 2
        case "sigmoid_norm":
            return -log(s(b * h_mean))
        case "kto_pair":
            kc, kr = max(0.0, (c - fc).mean().item()), max(0.0, (r - fr).mean().item())
            return 0.5 * (1 - s(b * (c - fc - kr))) + 0.5 * (1 - s(b * (kc - (r - fr))))
        case "orpo":
            return -c / nc - b * log(s(odds(c / nc) - odds(r / nr)))
        case "simpo":
            return -log(s(b * (c / nc - r / nr) - gamma))
        case "exo_pair":
            return s(b * h) * log(s(b * h) / (1 - e)) + s(-b * h) * log(s(-b * h) / e)
        case "nca_pair":
            return -log(s(b * (c - fc))) - 0.5 * log(s(-b * (c - fc))) - 0.5 * log(s(-b * (r - fr)))
        case "robust":
            return (-(1 - e) * log(s(b * h)) + e * log(s(-b * h))) / (1 - 2 * e)
        case "bco_pair":
            return -log(s(b * (c - fc))) - log(s(-b * (r - fr)))
        case "sppo_hard":
            return (c - fc - 0.5 / b) ** 2 + (r - fr + 0.5 / b) ** 2
        case "aot":
            return smooth((c - r).sort()[0] - (fc - fr).sort()[0])
        case "aot_unpaired":
            return smooth((c - fc).sort()[0] - (r - fr).sort()[0])
        case "apo_zero":
            return 1 - s(b * (c - fc)) + s(b * (r - fr))
        case "apo_down":
            return s(b * (c - fc)) + 1 - s(b * h)
        case "discopop":
            m = s(b * h / 0.05)
            return (1 - m) * -log(s(b * h)) + m * torch.exp(-b * h)
        case "sft":
            return (-c.sum() / nc.sum()).expand(len(c))
    raise AssertionError(name)
