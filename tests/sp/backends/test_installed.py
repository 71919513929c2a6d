"""FlashAttention 2 and 3: what they are called with means the tile, and what they give back is
understood.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from kinds_of_tiles import KINDS
from longfactory.sp import backends
from longfactory.sp.backends.installed import Installed
from longfactory.sp.tiles import Tile


def version_2(plain: Any) -> types.ModuleType:
    """The private functions of flash_attn.flash_attn_interface 2.8, computed by the formulas."""

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):  # type: ignore[no-untyped-def]
        tile = stand_in_tile(q[0], k[0], causal, window_size_left, window_size_right)
        out, lse = plain.forward(q[0], k[0], v[0], tile, softmax_scale, softcap or None)
        return out[None], flipped(lse)[None], None, None

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tile = stand_in_tile(q, k, causal, window_size_left, window_size_right, cu_seqlens_q)
        out, lse = plain.forward(q, k, v, tile, softmax_scale, softcap or None)
        return out, flipped(lse), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tile = stand_in_tile(q[0], k[0], causal, window_size_left, window_size_right)
        inputs = (x[0] for x in (dout, q, k, v, out))
        write(
            (dq[0], dk[0], dv[0]),
            plain.backward(*inputs, flipped(softmax_lse[0]), tile, softmax_scale, softcap or None),
        )

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tile = stand_in_tile(q, k, causal, window_size_left, window_size_right, cu_seqlens_q)
        write(
            (dq, dk, dv),
            plain.backward(
                dout, q, k, v, out, flipped(softmax_lse), tile, softmax_scale, softcap or None
            ),
        )

    return module_of(
        _flash_attn_forward,
        _flash_attn_varlen_forward,
        _flash_attn_backward,
        _flash_attn_varlen_backward,
    )


def version_3(plain: Any) -> types.ModuleType:
    """The private functions of flash_attn_interface 3 (the repository's hopper folder), computed by
    the formulas.
    """

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None,
        seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
        window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        dense = cu_seqlens_q is None
        q, k, v = (x[0] for x in (q, k, v)) if dense else (q, k, v)
        tile = stand_in_tile(q, k, causal, window_size_left, window_size_right, cu_seqlens_q)
        out, lse = plain.forward(q, k, v, tile, softmax_scale, softcap or None)
        return (out[None], lse[None], None, None) if dense else (out, lse, None, None)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, max_seqlen_q=None,
        max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        tensors = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
        if cu_seqlens_q is None:
            tensors = tuple(x[0] for x in tensors)
        dout, q, k, v, out, lse, dq, dk, dv = tensors
        tile = stand_in_tile(q, k, is_causal, window_size_left, window_size_right, cu_seqlens_q)
        write(
            (dq, dk, dv),
            plain.backward(dout, q, k, v, out, flipped(lse), tile, softmax_scale, softcap or None),
        )

    return module_of(_flash_attn_forward, _flash_attn_backward)


def stand_in_tile(
    q: torch.Tensor,
    k: torch.Tensor,
    causal: bool,
    left: int,
    right: int,
    cu: torch.Tensor | None = None,
) -> Tile:
    """The mask that FlashAttention's arguments mean."""
    assert right == (0 if left >= 0 and causal else -1), "a window with causal is (left, 0)"
    window = left if left >= 0 else None
    kind = "full"
    if causal:
        kind = "causal" if cu is None else "varlen"
    bounds = None if cu is None else tuple(cu.tolist())
    return Tile(slice(0, len(q)), slice(0, len(k)), kind, bounds, window)  # type: ignore[arg-type]


def flipped(lse: torch.Tensor) -> torch.Tensor:
    """FlashAttention 2 marks rows that saw nothing with +inf."""
    return torch.where(lse.isinf(), -lse, lse)


def write(into: tuple[torch.Tensor, ...], values: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(into, values, strict=True):
        a.copy_(b)


def module_of(*functions: Any) -> types.ModuleType:
    module = types.ModuleType("stand_in")
    for function in functions:
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize(("kind", "window"), KINDS)
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attention_2_and_3_by_a_module_with_their_signature(
    version: int, kind: str, window: bool, softcap: bool
) -> None:
    """Their kernels run on GPUs alone. Here: what they are called with means the tile, and what
    they give back is understood.
    """
    backend = Installed(f"flash{version}", "stand_in", (9,))
    backend.__dict__["_functions"] = {2: version_2, 3: version_3}[version](backends.math)
    for dims in ((64, 64), (20, 12)):
        request = backends.Request("cpu", torch.float32, *dims, kind, window, softcap, True)
        assert backends.selftest(backend, request) is None
