"""Chunks of logits on a GPU: compiled functions and in-place products against float64."""

from __future__ import annotations

import pytest
import torch

from longfactory.memory import compiled
from longfactory.model import logit_ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 30.0)])
@pytest.mark.parametrize("rows", [300, 77])
def test_compiled_functions_of_logits(rows: int, scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    z = 3 * torch.randn(rows, 50_257, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, 50_257, (rows,), device="cuda")
    z[: rows // 2].scatter_(1, labels[: rows // 2, None], 40.0)  # half are the most probable
    g = torch.randn(rows, device="cuda")
    exact = z.double().requires_grad_()
    logits = exact * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    (want,) = torch.autograd.grad(logps, exact, g.double())
    lse, label, most = logit_ops.statistics(z, labels, scale, softcap)
    assert "statistics" not in compiled._failed
    torch.testing.assert_close((label - lse).double(), logps.detach(), rtol=1e-5, atol=1e-5)
    assert (label >= most)[: rows // 2].all()
    found = logit_ops.label_gradient(z, lse, labels, g, scale, softcap)
    assert "_softmax_gradient" not in compiled._failed
    # of a label that is nearly certain, 1 - softmax has the rounding of a log-sum-exp around 30,
    # 1e-6, times g
    torch.testing.assert_close(found.double(), want, rtol=2**-8, atol=1e-6 * float(g.abs().max()))


def test_products_of_16_bit_are_added_in_float32_in_place() -> None:
    torch.manual_seed(0)
    a = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    total = torch.randn(1024, 256, device="cuda")
    want = total.double() + a.double().t() @ b.double()
    assert logit_ops._adds_on_cuda(), "this PyTorch has no such product"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logit_ops.add_product(total, a.t(), b)
    made = torch.cuda.max_memory_allocated() - before
    torch.testing.assert_close(total.double(), want, rtol=1e-4, atol=1e-3)
    assert made < total.numel() * 4, "no second sum"
