"""`stage: rl`: losses are the formulas in float64, and TRL's on the same tokens; rows that share a
prompt and rows that do not give the same gradients.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.stages.policy import PolicyOptions, PolicyStage

LENGTHS = (5, 3, 8, 1)
PROMPT = [3, 4, 5, 6]


def rollouts(seed: int = 0) -> list[dict[str, Any]]:
    g = np.random.default_rng(seed)
    out = []
    for n in LENGTHS:
        mask = g.random(n) < 0.8
        mask[0] = True
        out.append(
            {
                "ids": g.integers(3, 90, n),
                "mask": mask,
                "advantage": np.full(n, g.normal()),
                "old_logp": g.normal(-2.0, 0.6, n),
                "ref_logp": g.normal(-2.0, 0.6, n),
            }
        )
    return out


def row_of(given: list[dict[str, Any]], *, share: bool, without: tuple[str, ...] = ()) -> Row:
    documents = []
    start = len(PROMPT) - 1 if share else 0
    if share:
        documents.append(TokenizedDocument(PROMPT[:-1], [IGNORE] * 3, "prompt"))
    for r in given:
        ids = np.concatenate([PROMPT, r["ids"]])[start:]
        pad = len(PROMPT) - start
        labels = np.concatenate([np.full(pad, IGNORE), np.where(r["mask"], r["ids"], IGNORE)])
        numbers = {
            k: np.concatenate([np.zeros(pad), r[k]])
            for k in ("advantage", "old_logp", "ref_logp")
            if k not in without
        }
        documents.append(
            TokenizedDocument(ids, labels, "text", 0, 0 if share else -1, numbers=numbers)
        )
    return make_row(documents).padded(8, 0)


def logps_in(row: Row, values: list[Tensor], share: bool) -> Tensor:
    """[T] with each rollout's log-probabilities where they are predicted, noise elsewhere."""
    out = torch.full((len(row),), -7.0, dtype=torch.float64)
    start = 3 if share else 0
    for value in values:
        at = start + (0 if share else 3)
        out = out.index_put((torch.arange(at, at + len(value)),), value)
        start += len(value) + (1 if share else 4)
    return out


def formula(given: list[dict[str, Any]], values: list[Tensor], o: PolicyOptions) -> Tensor:
    """The sum over items, a rollout and a token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for r, logp in zip(given, values, strict=True):
        mask = torch.tensor(r["mask"])
        a, old, ref = (torch.tensor(r[k]) for k in ("advantage", "old_logp", "ref_logp"))
        log_r = logp - old
        if o.ratio == "sequence":
            log_r = (log_r * mask).sum() / mask.sum() * torch.ones_like(logp)
        each = []
        for t in range(len(logp)):
            ratio = log_r[t].exp()
            if o.loss == "nll":
                loss = -a[t] * logp[t]
            elif o.loss == "reinforce":
                weight = ratio.detach()
                loss = -(weight if o.is_cap is None else min(weight, o.is_cap)) * a[t] * logp[t]
            else:
                low, high = 1 - o.clip_low, 1 + o.clip_high
                inside = ratio.clamp(low, high)
                if o.dual_clip is not None and ratio > o.dual_clip:
                    ratio = torch.tensor(o.dual_clip, dtype=torch.float64)
                loss = -min(ratio * a[t], inside * a[t])
            d = ref[t] - logp[t]
            each.append(loss + o.kl_beta * (d.exp() - d - 1))
        summed = (torch.stack(each) * mask).sum()
        if o.normalization == "sequence":
            summed = summed / mask.sum()
        total = total + summed / (o.constant_length if o.normalization == "constant" else 1)
    return total


OPTIONS = {
    "dapo": PolicyOptions(clip_high=0.28),
    "grpo": PolicyOptions(normalization="sequence", kl_beta=0.04),
    "dr_grpo": PolicyOptions(normalization="constant", constant_length=9),
    "gspo": PolicyOptions(
        ratio="sequence", normalization="sequence", clip_low=3e-2, clip_high=4e-2
    ),
    "dual": PolicyOptions(dual_clip=1.5),
    "reinforce": PolicyOptions("reinforce"),
    "cispo": PolicyOptions("reinforce", is_cap=1.2, kl_beta=0.1),
    "nll": PolicyOptions("nll", normalization="sequence"),
}


def leaves(given: list[dict[str, Any]]) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [
        (-2 + 0.7 * torch.randn(len(r["ids"]), generator=g, dtype=torch.float64)).requires_grad_()
        for r in given
    ]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_losses_are_the_formulas(name: str, share: bool) -> None:
    options, given = OPTIONS[name], rollouts()
    stage, row = PolicyStage(options), row_of(given, share=share)
    values, expected = leaves(given), leaves(given)
    got, metrics = stage.loss_sum(logps_in(row, values, share), row)
    want = formula(given, expected, options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got.backward()
    want.backward()
    for v, e in zip(values, expected, strict=True):
        torch.testing.assert_close(v.grad, e.grad, rtol=1e-12, atol=1e-13)
    trained = sum(int(r["mask"].sum()) for r in given)
    assert stage.count_items(row) == (trained if options.normalization == "token" else 4)
    total, count = metrics["staleness"]
    by_hand = sum(
        float(((torch.tensor(r["old_logp"]) - v.detach()) * torch.tensor(r["mask"])).sum())
        for r, v in zip(given, values, strict=True)
    )
    assert float(total) == pytest.approx(by_hand, rel=1e-12) and count == trained


def test_without_behaviour_the_ratio_is_one() -> None:
    """The gradient is that of REINFORCE."""
    given = rollouts()
    row = row_of(given, share=False, without=("old_logp",))
    a, b = leaves(given), leaves(given)
    PolicyStage(PolicyOptions()).loss_sum(logps_in(row, a, False), row)[0].backward()
    PolicyStage(PolicyOptions("reinforce")).loss_sum(logps_in(row, b, False), row)[0].backward()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-13)


def test_a_row_of_padding_trains_nothing() -> None:
    from longfactory.train.loader import empty_row

    row, stage = empty_row(8, 0), PolicyStage()
    logps = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    loss, _ = stage.loss_sum(logps, row)
    loss.backward()
    assert float(loss) == 0 and stage.count_items(row) == 0 and not logps.grad.any()


TRL = {
    "grpo": ({"loss_type": "grpo", "beta": 0.04}, {}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"max_completion_length": 9}),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-2,
            "epsilon_high": 4e-2,
        },
        {},
    ),
    "dual": ({"loss_type": "dapo", "delta": 1.5}, {}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1}, {}),
}


@pytest.mark.parametrize("name", list(TRL))
def test_losses_are_trls(name: str) -> None:
    """TRL's own method, given these log-probabilities in place of a model's."""
    from trl import GRPOTrainer

    keys, more = TRL[name]
    options, given = OPTIONS[name], rollouts()
    values, expected = leaves(given), leaves(given)
    longest = max(LENGTHS)

    def padded(parts: list[Any], fill: float = 0.0) -> Tensor:
        rows = [torch.as_tensor(p).double() for p in parts]
        return torch.stack([torch.cat([r, r.new_full((longest - len(r),), fill)]) for r in rows])

    class Other(GRPOTrainer):
        def __init__(self) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_metrics"):
                raise AttributeError(name)
            return None

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            stacked = padded(expected)
            return stacked, torch.zeros_like(stacked), None

    other = Other()
    count = torch.tensor(float(sum(int(r["mask"].sum()) for r in given)))
    accelerator = types.SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    settings = {
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "accelerator": accelerator,
        "model": types.SimpleNamespace(training=True),
        "args": types.SimpleNamespace(
            delta=keys.get("delta"), use_bias_correction_kl=False, steps_per_generation=1
        ),
        "_metrics": {"train": __import__("collections").defaultdict(list)},
    }
    vars(other).update({**settings, **keys, **more})
    mask = padded([r["mask"] for r in given])
    inputs = {
        "prompt_ids": torch.tensor([PROMPT] * 4),
        "prompt_mask": torch.ones(4, 4, dtype=torch.int64),
        "completion_ids": padded([r["ids"] for r in given]).long(),
        "completion_mask": mask.long(),
        "advantages": torch.tensor([r["advantage"][0] for r in given]),
        "old_per_token_logps": padded([r["old_logp"] for r in given]),
        "ref_per_token_logps": padded([r["ref_logp"] for r in given]),
        "num_items_in_batch": count,
    }
    want = GRPOTrainer._compute_loss(other, None, inputs)
    row, stage = row_of(given, share=True), PolicyStage(options)
    loss, _ = stage.loss_sum(logps_in(row, values, True), row)
    got = loss / stage.count_items(row)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    got.backward()
    want.backward()
    for v, e in zip(values, expected, strict=True):
        torch.testing.assert_close(v.grad, e.grad, rtol=1e-6, atol=1e-9)
