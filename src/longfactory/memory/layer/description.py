"""What a decoder layer computes, in one description.

    a = attention(norm1(x)) Wo              x2 = x + r norm1_after(a)
    m = mlp(norm2(x2))                      y = s (x2 + r norm2_after(m))

Where a norm is None it is left out; s, and an input that a layer has of its own for each token
(`token_input`), come last. Parallel layers have one norm, y = x + attention(n) + mlp(n)
with n = norm1(x).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor, nn


class Norm(NamedTuple):
    """The arguments of `layer_ops.norm` behind the weight."""

    eps: float
    mean: bool = False
    zero_centred: bool = False
    wide_weight: bool = False


class Rotary(NamedTuple):
    """How queries and keys turn.

    Attributes:
        pairs: see `layer_ops.HALVES`.
        last: the last dims of a head turn, else the first.
        angles: where cos and sin hold the angles of the R/2 pairs: "twice" (one after the other,
            then again), "repeated" (each two times), "once".
    """

    pairs: str = "halves"
    last: bool = False
    angles: str = "twice"

    def table(self, values: Tensor) -> Tensor:
        """[T, R] or [T, R/2] cos or sin -> [T, R/2]."""
        if self.angles == "once":
            return values
        half = values.shape[-1] // 2
        return values[:, ::2] if self.angles == "repeated" else values[:, :half]


class Latent(NamedTuple):
    """Keys and values are made of one narrow vector a token (multi-head latent attention).

    Attributes:
        rank: of that vector.
        plain, rotary: dims of a head that do not turn, and that do (one key for all heads).
        query_rank: of the vector that queries are made of; 0: they are made of the hidden state.
    """

    rank: int
    plain: int
    rotary: int
    query_rank: int = 0


@dataclasses.dataclass(frozen=True)
class LayerDescription:
    """A decoder layer but for its weights.

    Attributes:
        heads, kv_heads, head_dim, value_dim: of attention. Latent attention has a key for each
            head, once its keys are made.
        rotary: None: nothing turns.
        softcap: of attention's scores.
        sinks: each head has one more score, without a value.
        output_gate: the activation of a gate that attention's output is multiplied by
            (`layer_ops.output_gated`); None for no gate. A linear of its own, `g`, makes it, for
            each head or for each number of a head; where there is no `g`, `q` makes it, beside each
            head's query.
        latent: see `Latent`.
        norms: by name: norm1, norm1_after, norm2, norm2_after, see above; q_norm, k_norm and v_norm
            of heads; q_a_norm and kv_a_norm of the narrow vectors of latent attention; input_norm
            of a token's own input.
        whole_norm: q_norm and k_norm are of all heads together.
        norm_of_turned: q_norm and k_norm come after rotary embedding, not before it.
        parallel: see above.
        activation: of the gated MLP (`layer_ops.ACTIVATIONS`); None: the MLP is a module of its own
            (a mixture of experts), which runs as it is and is differentiated by autograd.
        residual: r above.
        rows: projections that are some rows of a wider linear: name -> (linear, first row, last).
        scalar: the layer has s, a buffer.
        query_scale: b and n: a query at position p is multiplied by 1 + b log(1 + floor(p / n)).
        token_input: the activation of the gate of a token's own input (`layer.token_input`); None:
            there is none.
        pair: the layer returns attention's weights, None, beside its output.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary: Rotary | None
    softcap: float | None = None
    sinks: bool = False
    output_gate: str | None = None
    latent: Latent | None = None
    norms: tuple[tuple[str, Norm], ...] = ()
    whole_norm: bool = False
    norm_of_turned: bool = False
    parallel: bool = False
    activation: str | None = "silu"
    residual: float = 1.0
    rows: tuple[tuple[str, str, int, int], ...] = ()
    scalar: bool = False
    query_scale: tuple[float, float] | None = None
    token_input: str | None = None
    pair: bool = False

    def norm(self, name: str) -> Norm | None:
        """The norm of this name, where there is one."""
        return next((norm for own, norm in self.norms if own == name), None)

    @property
    def separate_gradient(self) -> bool:
        """The gradient of attention's projection is another tensor than that of x2."""
        return self.norm("norm1_after") is not None or self.residual != 1.0


class LayerParts(NamedTuple):
    """A decoder layer's modules.

    Attributes:
        shape: what it computes.
        linears: by our names: q, k, v, o, gate, up, down; qkv and gate_up where they are one; q_a,
            q_b, kv_a, kv_b of latent attention; g of attention's output gate; input_gate and
            input_up of a token's own input.
        norms: by the names in the description.
        mlp: the module that runs as it is, or None.
        attention: the attention module.
        scale, window: of attention.
    """

    shape: LayerDescription
    linears: dict[str, Any]
    norms: dict[str, nn.Module]
    mlp: nn.Module | None
    attention: Any
    scale: float
    window: int | None
