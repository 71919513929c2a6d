"""One contract for every backend that runs here: log-sum-exp, gradients from the whole row's out and lse, refusals."""

from __future__ import annotations

import pytest
import torch
from plain_attention import plain_attention, random_inputs
from simulated_ring import relative_rms, simulated_ring

from longfactory.sp import backends
from longfactory.sp.merge import merge_
from longfactory.sp.tiles import Tile

TILES = {
    "full": Tile(slice(0, 12), slice(0, 20), "full"),
    "causal": Tile(slice(0, 24), slice(0, 24), "causal"),
    "varlen": Tile(slice(0, 24), slice(0, 24), "varlen", (0, 1, 9, 24)),
    "causal window": Tile(slice(0, 24), slice(0, 24), "causal", window=5),
    "varlen window": Tile(slice(0, 24), slice(0, 24), "varlen", (0, 3, 24), window=5),
    "window, more keys": Tile(slice(0, 12), slice(0, 20), "full", window=3),
    "window, more queries": Tile(slice(0, 20), slice(0, 12), "full", window=9),
}


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("block", [512, 5])
def test_backend_is_plain_attention(name: str, tile: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.math, "BLOCK", block)
    backend, t = backends.BACKENDS[name], TILES[tile]
    q, _, _, dout = random_inputs(t.q_len, 4, 2, 8)
    _, k, v, _ = random_inputs(t.k_len, 4, 2, 8, seed=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*leaves, t.mask(), 0.5)  # type: ignore[arg-type]
    expected.backward(dout)
    out, lse = backend.forward(q, k, v, t, 0.5, None)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.5
    torch.testing.assert_close(lse, scores.masked_fill(~t.mask(), -torch.inf).logsumexp(-1), rtol=0, atol=1e-13)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for found, leaf in zip(backend.backward(dout, q, k, v, out, lse, t, 0.5, None), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_results(name: str, dtype: torch.dtype) -> None:
    backend, t = backends.BACKENDS[name], TILES["causal"]
    q, k, v, dout = random_inputs(24, 4, 2, 8, dtype=dtype)
    out, lse = backend.forward(q, k, v, t, 0.5, None)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (4, 24))
    assert {g.dtype for g in backend.backward(dout, q, k, v, out, lse, t, 0.5, None)} == {dtype}


def test_selection() -> None:
    q, v = torch.zeros(24, 4, 8), torch.zeros(24, 2, 8)
    t = TILES["causal"]
    assert backends.select("auto", t, q, v, None) is backends.cpu
    assert backends.select("auto", t, q, v, 30.0) is backends.math
    assert backends.select("auto", t, q, v[..., :4], None) is backends.math
    assert backends.select("math", t, q, v, None) is backends.math
    with pytest.raises(ValueError, match="cpu has no soft-cap"):
        backends.select("cpu", t, q, v, 30.0)
    with pytest.raises(ValueError, match="Choose one of: auto"):
        backends.select("fast", t, q, v, None)


def test_merge_of_blocks_that_see_nothing() -> None:
    out, lse = torch.zeros(3, 1, 2), torch.tensor([[-torch.inf, -torch.inf, 0.5]])
    block, block_lse = torch.ones(3, 1, 2), torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    merge_(out, lse, block, block_lse)
    assert out[:, 0, 0].tolist() == [0.0, 1.0, 0.0]
    assert lse[0].tolist() == [-torch.inf, 1.0, 0.5]


@pytest.mark.parametrize("ranks", [2, 32])
def test_error_does_not_grow_with_the_number_of_ranks(ranks: int) -> None:
    """bfloat16 rms error of out, dq, dk, dv of a ring of so many ranks, against one call, both measured from float64."""
    q, k, v, dout = random_inputs(512, 4, 2, 64, dtype=torch.bfloat16)
    exact = simulated_ring(1, q.double(), k.double(), v.double(), dout.double())
    one = relative_rms(simulated_ring(1, q, k, v, dout), exact)
    many = relative_rms(simulated_ring(ranks, q, k, v, dout), exact)
    assert all(m <= 1.2 * o for m, o in zip(many, one, strict=True)), (many, one)
