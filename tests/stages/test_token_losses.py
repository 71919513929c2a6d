"""`stage: sft`: losses of tokens are their formulas, and LLaMA-Factory's on the same logits."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F

from longfactory.data.row import IGNORE, Row, TokenizedDocument, make_row
from longfactory.errors import UserError
from longfactory.model.outputs import TokenOutputs
from longfactory.stages.tokens import TokenStage
from oracles import (
    CHOSEN,
    PROMPTS,
    VOCAB,
    whole,
)
from tiny_stage_model import Tiny, assert_same


def sft_row() -> Row:
    return make_row([whole(PROMPTS[i], CHOSEN[i]) for i in range(4)]).padded(8, 0)


@pytest.mark.parametrize("loss", ["nll", "dft", "asft", "eaft", "smoothed"])
def test_token_losses(loss: str) -> None:
    model, reference, row = Tiny(4), Tiny(5), sft_row()
    every, tokens, kl, entropy, means, smooth = [], [], [], [], [], []
    for i in range(4):
        lp = model.of_text(PROMPTS[i] + CHOSEN[i])[0][len(PROMPTS[i]) - 1 :]
        ref = reference.of_text(PROMPTS[i] + CHOSEN[i])[0][len(PROMPTS[i]) - 1 :].detach()
        tokens += lp.gather(1, torch.tensor(CHOSEN[i])[:, None])[:, 0]
        kl += F.kl_div(lp, ref.exp(), reduction="none").sum(-1)
        means += lp.mean(-1)
        smooth.append(
            F.cross_entropy(lp, torch.tensor(CHOSEN[i]), reduction="sum", label_smoothing=0.4)
        )
        top = lp.detach().topk(20)[0].log_softmax(-1)
        entropy += -(top.exp() * top).sum(-1)
        every += (lp.argmax(-1) == torch.tensor(CHOSEN[i])).tolist()
    x, k, h, m = (torch.stack(parts) for parts in (tokens, kl, entropy, means))
    want = {
        "smoothed": torch.stack(smooth),
        "nll": -x,
        "dft": -x * x.detach().exp(),
        "asft": -x * x.detach().exp() + 0.4 * k,
        "eaft": -x * (h / 3) ** 0.4,
    }[loss].sum()

    trained = row.labels != IGNORE
    out = TokenOutputs(
        model.of_row(row)[0],  # with noise at untrained positions, which must not count
        top1=torch.ones(len(row), dtype=torch.bool).index_put((trained,), torch.tensor(every)),
        entropy=torch.ones(len(row)).double().masked_scatter(trained, h),
        reference_kl=torch.ones(len(row)).double().masked_scatter(trained, k),
        mean_logp=torch.ones(len(row)).double().masked_scatter(trained, m),
    )
    stage = TokenStage(loss, 0.4, accuracy=True)
    got, metrics = stage.loss_sum(out, row)
    assert_same(model, got, want)
    assert stage.count_items(row) == len(x)
    assert float(metrics["accuracy"][0]) == sum(every) and metrics["accuracy"][1] == len(every)
    if loss == "asft":
        assert float(metrics["kl"][0]) == pytest.approx(
            float(k.detach().sum()), rel=1e-12
        ) and metrics["kl"][1] == len(x)


def llamafactory_losses() -> dict[str, Any]:
    """Functions of the installed package, run by themselves: it refuses to be imported beside this
    transformers.
    """
    try:
        source = Path(
            str(importlib.metadata.distribution("llamafactory").locate_file("llamafactory"))
        )
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llamafactory is not installed")
    names = ("_dft_cross_entropy", "_asft_cross_entropy", "_kl_divergence", "_eaft_cross_entropy")
    tree = ast.parse((source / "train" / "trainer_utils.py").read_text())
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    assert len(tree.body) == len(names)
    space: dict[str, Any] = {"torch": torch, "F": F, "Optional": Optional}
    exec(compile(tree, "trainer_utils", "exec"), space)
    return space


@pytest.mark.parametrize("loss", ["dft", "asft", "eaft"])
def test_token_losses_equal_llamafactory(loss: str) -> None:
    """Its own code on logits, ours on what is made of the same logits: the mean over trained
    tokens, and the gradient.
    """
    theirs = llamafactory_losses()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (20,), generator=generator).tolist()
    row = make_row([TokenizedDocument(ids, [IGNORE] * 7 + ids[7:])])
    z, r = (2 * torch.randn(20, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_()
    want = {
        "dft": lambda: theirs["_dft_cross_entropy"](z, row.labels),
        "asft": lambda: theirs["_asft_cross_entropy"](z, row.labels, r, 0.4),
        "eaft": lambda: theirs["_eaft_cross_entropy"](z, row.labels, alpha=0.4),
    }[loss]()
    lp, top = z.log_softmax(-1), z.detach().topk(20)[0].log_softmax(-1)
    out = TokenOutputs(
        lp.gather(1, row.labels.clamp(min=0)[:, None])[:, 0],
        entropy=-(top.exp() * top).sum(-1),
        reference_kl=(r.softmax(-1) * (r.log_softmax(-1) - lp)).sum(-1),
    )
    total, _ = TokenStage(loss, 0.4).loss_sum(out, row)
    got = total / row.trained_tokens
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("loss", ["asft", "eaft"])
def test_a_missing_vector_is_refused(loss: str) -> None:
    row = sft_row()
    with pytest.raises(UserError, match=r"needs (reference_kl|entropy) from"):
        TokenStage(loss, 0.1).loss_sum(Tiny(4).of_row(row)[0], row)
