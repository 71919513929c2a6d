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
    assert backends.select("cpu", t, q, v, 30.0) is backends.math, "what the named backend cannot do goes to one that can"
    with pytest.raises(ValueError, match="flash runs on GPUs"):
        backends.select("flash", t, q, v, None)
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


FORWARD_ARGS = (
    "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, "
    "Tensor? seqused_k=None, Tensor? alibi_slopes=None"
)
FORWARD_RESULTS = ") -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)"
SCHEMAS = {
    "_flash_attention_forward": [
        FORWARD_ARGS + FORWARD_RESULTS,
        FORWARD_ARGS + ", Tensor? block_table=None, int? num_splits=None" + FORWARD_RESULTS,  # from torch 2.13 on
    ],
    "_flash_attention_backward": [
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, "
        "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, "
        "SymInt? window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
    ],
    "_scaled_dot_product_cudnn_attention": [
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0., bool is_causal=False, "
        "bool return_debug_mask=False, *, float? scale=None) -> (Tensor output, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, "
        "SymInt max_q, SymInt max_k, Tensor philox_seed, Tensor philox_offset, Tensor debug_attn_mask)"
    ],
    "_scaled_dot_product_cudnn_attention_backward": [
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor philox_seed, "
        "Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
        "bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)"
    ],
    "_scaled_dot_product_flash_attention_for_cpu": [
        "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, "
        "float? scale=None) -> (Tensor output, Tensor logsumexp)"
    ],
    "_scaled_dot_product_flash_attention_for_cpu_backward": [
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float dropout_p, bool is_causal, *, "
        "Tensor? attn_mask=None, float? scale=None) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    ],
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_private_operators_have_the_known_schema(name: str) -> None:
    """A change here means: read the operator's new contract before trusting it."""
    found = str(getattr(torch.ops.aten, name).default._schema)
    assert found.removeprefix(f"aten::{name}") in SCHEMAS[name]
