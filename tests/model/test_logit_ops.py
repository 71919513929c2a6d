"""What is made of a chunk of logits, against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from longfactory.model import logit_ops
from longfactory.model.token_logprobs import LogitTransform

TRANSFORMS = {"plain": (1.0, None), "scaled": (0.25, None), "capped": (1.5, 3.0)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_statistics_and_gradient_of_logits(kind: str, dtype: torch.dtype) -> None:
    scale, softcap = TRANSFORMS[kind]
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(7, 50, generator=generator)).to(dtype)
    labels = torch.randint(0, 50, (7,), generator=generator)
    g = torch.randn(7, generator=generator).to(torch.promote_types(dtype, torch.float32))
    exact = z.double().requires_grad_()
    logits = LogitTransform(scale, softcap)(exact)
    logps = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    (want,) = torch.autograd.grad(logps, exact, g.double())
    lse, label, most = logit_ops.statistics(z, labels, scale, softcap)
    assert lse.dtype == g.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    torch.testing.assert_close(
        (label - lse).double(), logps.detach(), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(label >= most, logits.argmax(1) == labels)
    found = logit_ops.label_gradient(z.clone(), lse, labels, g, scale, softcap)
    assert found.dtype == dtype
    # 16 bit: one rounding of what float32 gives, the label's own entry too
    rounding = 2**-8 if dtype == torch.bfloat16 else tolerance
    # the cap's slope is a difference of nearly equal numbers
    torch.testing.assert_close(
        found.double(), want, rtol=rounding, atol=1e-15 if dtype == torch.float64 else 1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_product_is_added_in_the_sums_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(9, 9, generator=generator).to(dtype) for _ in range(2))
    total = torch.ones(9, 9, dtype=torch.promote_types(dtype, torch.float32))
    logit_ops.add_product(total, a.t(), b)
    torch.testing.assert_close(
        total.double(), 1 + a.double().t() @ b.double(), rtol=1e-6, atol=1e-6
    )
