"""Parts of a chunk by PyTorch."""

import torch

from longfactory.sp.recurrent.within import inverse


def test_recurrent_inverse_of_a_matrix_whose_powers_grow() -> None:
    lower = torch.ones(3, 64, 64, dtype=torch.float64).tril(-1).requires_grad_()
    out = inverse(lower)
    exact = torch.linalg.inv(lower + torch.eye(64, dtype=torch.float64))
    assert (out - exact).abs().max() < 1e-12
    slope = torch.randn_like(out)
    mine, theirs = (torch.autograd.grad(x, lower, slope)[0] for x in (out, exact))
    assert (mine - theirs.tril(-1)).abs().max() < 1e-10
