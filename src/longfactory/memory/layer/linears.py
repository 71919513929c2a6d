"""One call of the hand-written layer: its weights as autograd has them, products with them in both
directions, sums of their gradients.

LoRA: y = x W^T + s (x A^T) B^T, in the same chunks. The low-rank product is added to the base's in
one kernel; of a frozen weight no gradient is computed, and g B serves both the input's gradient and
A's. Nothing of rank r is stored between the passes. Weights of four bits are made whole once in
each pass, and let go of when it ends.

DoRA: y = f * (x W^T + s (x A^T) B^T), f = m / |W + s B A| for each output, by the norms of rows,
which count as constants (PEFT, and the paper). The gradient of m is the sum of g * y over tokens,
over m: where y is at hand it is used, else it is made again.

Letters in shapes: C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from longfactory.memory.chunked import GradientSum
from longfactory.memory.layer.description import LayerDescription
from longfactory.memory.layer_ops import (
    column_products,
    norm,
    norm_backward,
    row_norms,
    scaled,
    scaled_gradient,
    wide,
)

ALL = slice(None)
Rows: TypeAlias = slice | Tensor
Weights = dict[str, Any]
"""By the names of `names_of`; None for what a layer has not."""
ENDS = ("", "_bias", "_a", "_b", "_m")
"""Of a linear, `q`: its weight and bias, LoRA's A [r, in] and B [out, r], and DoRA's m [out]."""


class Adapter(NamedTuple):
    """LoRA of one linear, in the type that the layer computes in, and DoRA's magnitudes."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float
    magnitude: Tensor | None = None  # [out]


class LayerCall:
    """What one call's forward and backward share besides tensors to differentiate.

    Args:
        shape: the layer.
        names: of its weights, in the order in which autograd gets them.
        plan: of the row.
        cos, sin: [T, R/2]; None where nothing turns.
        weights: by `names`.
        scales: of each linear's adapter that acts.
        quantised: the linears whose weights have four bits.
        options: of attention: scale and window.
        chunk: tokens that are worked on at once; None for all.
        groups: groups of heads that attention's backward takes one after the other.
        mlp: runs the MLP that is a module of its own: (tokens [C, H], first token) -> [C, H].
        mlp_weights: its trained parameters, asked for in each pass.
        scalar: s of the description, [1].
        positions: [T], of a layer whose queries grow with them.
        token_input: [T, P], of a layer that has an input of its own for each token.
        owner: the `DecoderLayer`.
    """

    def __init__(
        self,
        shape: LayerDescription,
        names: Sequence[str],
        plan: Any,
        cos: Tensor | None,
        sin: Tensor | None,
        weights: Weights,
        scales: dict[str, float],
        quantised: dict[str, Any],
        options: dict[str, Any],
        dtype: torch.dtype,
        chunk: int | None = None,
        groups: int = 1,
        mlp: Any = None,
        mlp_weights: Any = tuple,
        scalar: Tensor | None = None,
        positions: Tensor | None = None,
        token_input: Tensor | None = None,
        owner: Any = None,
    ) -> None:
        self.owner = owner
        self.shape, self.names, self.plan, self.cos, self.sin = shape, names, plan, cos, sin
        self.scales, self.quantised, self.dtype = scales, quantised, dtype
        self.options = {**options, "softcap": shape.softcap}
        self.chunk, self.groups, self.mlp, self.mlp_weights = chunk, groups, mlp, mlp_weights
        self.scalar, self.token_input = scalar, token_input
        self.token_gradient: Tensor | None = None
        """[T, P], that of the token's own input, where it is asked for."""
        self.products: dict[str, Tensor] | None = None
        """What the output projection, gate and up give for all tokens, [T, out] by linear, where
        they are saved: written in the forward pass, read in the backward pass."""
        self.kept: dict[int, tuple[Tensor, Tensor]] | None = None
        """Of an MLP that is a module of its own, where what it stores is kept for the backward
        pass: what each chunk gave it and what it made of that, by the chunk's first token."""
        self.before_norm: dict[str, Tensor] | None = None
        """In a backward pass over whole rows: the queries and keys that attention's backward makes
        again, before their norm, for the norm's own backward."""
        self.growth = None if positions is None else self._growth(positions)
        """[T, 1, 1]: what queries are multiplied by, where they grow with their position."""
        self._rows = {name: (linear, slice(i, j)) for name, linear, i, j in shape.rows}
        self.set_weights(weights)

    def set_weights(self, weights: Weights | None) -> None:
        """None: autograd saves them, and knows when they change."""
        self.weights: Any = weights
        self.adapters: dict[str, Adapter] = {}
        self._whole: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        if weights is None:
            return
        weights |= {mlp_name(i): p for i, p in enumerate(self.mlp_weights())}
        with torch.no_grad():
            factors = [weights[f"{name}{end}"] for name in self.scales for end in ("_a", "_b")]
            cast = in_types(factors, [self.dtype] * len(factors))
        for place, (name, scale) in enumerate(self.scales.items()):
            a, b = cast[2 * place : 2 * place + 2]
            self.adapters[name] = Adapter(a, b, scale, weights[f"{name}_m"])

    def weight(self, name: str) -> Tensor:
        """[out, in] of a linear, in the type that the layer computes in."""
        stored = self.weights[name]
        if name not in self.quantised:
            return stored
        if name not in self._whole:
            from bitsandbytes.functional import dequantize_4bit

            whole = dequantize_4bit(stored, self.quantised[name].weight.quant_state)
            self._whole[name] = whole.to(self.dtype)
        return self._whole[name]

    def factor(self, name: str) -> Tensor | None:
        """DoRA's f of a linear, [out], in the type of sums; None without one."""
        adapter = self.adapters.get(name)
        if adapter is None or adapter.magnitude is None:
            return None
        if name not in self._factors:
            with torch.no_grad():
                weight = self.weight(name)
                # PEFT rounds the norms to the weight's type, as m is where training begins
                norms = row_norms(weight, adapter.b @ adapter.a, adapter.scale)
                self._factors[name] = (adapter.magnitude / norms).to(wide(self.dtype))
        return self._factors[name]

    def width(self, name: str) -> int:
        """Outputs of a linear."""
        if name in self.quantised:
            return int(self.quantised[name].out_features)
        return int(self.weights[name].shape[0])

    @property
    def gate_beside_queries(self) -> bool:
        """Whether `q` makes attention's output gate too."""
        return self.shape.output_gate is not None and "g" not in self.weights

    def rows(self, name: str) -> tuple[str, slice]:
        """The linear that makes a projection, and which of its outputs."""
        return self._rows.get(name, (name, ALL))

    def _growth(self, positions: Tensor) -> Tensor:
        assert self.shape.query_scale is not None
        beta, step = self.shape.query_scale
        factor = 1 + beta * torch.log(1 + torch.floor(positions / step))
        return factor.to(self.dtype)[:, None, None]

    def sinks(self, heads: slice) -> dict[str, Any]:
        """The argument of attention for some heads."""
        return {"sinks": self.weights["sinks"][heads]} if self.shape.sinks else {}

    def chunks(self, length: int) -> Iterator[slice]:
        chunk = self.chunk or length
        for i in range(0, length, chunk):
            yield slice(i, min(i + chunk, length))

    def count(self, length: int) -> int:
        return -(-length // (self.chunk or length))

    def group_slices(self) -> Iterator[tuple[slice, slice]]:
        """Query heads and key heads of each group."""
        heads, kv = self.shape.heads // self.groups, self.shape.kv_heads // self.groups
        for g in range(self.groups):
            yield slice(g * heads, (g + 1) * heads), slice(g * kv, (g + 1) * kv)


def columns_of(heads: slice, each: int) -> slice:
    """The numbers of some heads, `each` for one of them."""
    return heads if heads == ALL else slice(heads.start * each, heads.stop * each)


def in_types(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each in its type: one kernel for all that are cast alike. Adapters are many small tensors,
    and a kernel for each takes longer to begin than to run.
    """
    made = [
        t if t.dtype == dtype else torch.empty_like(t, dtype=dtype)
        for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    alike: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (t, dtype) in enumerate(zip(tensors, dtypes, strict=True)):
        if t.dtype != dtype:
            alike.setdefault((t.dtype, dtype), []).append(i)
    for places in alike.values():
        torch._foreach_copy_([made[i] for i in places], [tensors[i] for i in places])
    return made


def _scaled_product(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale * a b, in one kernel."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def mlp_name(place: int) -> str:
    """What a trained parameter of the MLP's module is called among a call's names."""
    return f"mlp.{place}"


def normed(x: Tensor, call: LayerCall, name: str, heads: slice = ALL) -> Tensor:
    """A norm of the description, of some heads where it has a weight for each; x where there is
    none.
    """
    form = call.shape.norm(name)
    return x if form is None else norm(x, _norm_weight(call, name, heads), *form)


def normed_backward(
    dy: Tensor,
    x: Tensor,
    call: LayerCall,
    name: str,
    sums: Sums,
    other: Tensor | None = None,
) -> Tensor:
    """The gradient at a norm's input, `other` added to it; `dy` where there is no norm."""
    form = call.shape.norm(name)
    if form is None:
        return dy if other is None else dy + other
    dx, dweight = norm_backward(
        dy, x, _norm_weight(call, name, ALL), form.eps, form.mean, form.zero_centred, other
    )
    sums.add(name, dweight)
    return dx


def _norm_weight(call: LayerCall, name: str, heads: slice) -> Tensor | None:
    weight = call.weights.get(name)
    return weight[heads] if weight is not None and weight.dim() == 2 else weight


def linear(
    x: Tensor, call: LayerCall, name: str, rows: Rows = ALL, out: Tensor | None = None
) -> Tensor:
    """[C, in] -> [C, out], of some of the linear's outputs; written to `out` if it is given."""
    bias = given = call.weights[f"{name}_bias"]
    bias = None if bias is None else bias[rows].to(x.dtype)
    weight, factor = call.weight(name)[rows], call.factor(name)
    if factor is not None:
        bias = None
    if out is None:
        y = F.linear(x, weight, bias)
    elif bias is None:
        y = torch.mm(x, weight.t(), out=out)
    else:
        y = torch.addmm(bias, x, weight.t(), out=out)
    if name in call.adapters:
        a, b, scale, _ = call.adapters[name]
        y.addmm_(x @ a.t(), b[rows].t(), alpha=scale)
    if factor is None:
        return y
    y_scaled = scaled(y, factor[rows], None if given is None else given[rows])
    return y_scaled if out is None else out.copy_(y_scaled)


def linear_backward(
    g: Tensor, call: LayerCall, name: str, into: Tensor | None = None, columns: slice = ALL
) -> tuple[Tensor, Tensor | None]:
    """[C, out] -> the gradient at some of the linear's inputs, [C, in], added to `into` if it is
    given; and g B, [C, r], where there is an adapter (with DoRA of f g).
    """
    weight = call.weight(name)[:, columns]
    g = _of_product(g, call, name)
    dx = g @ weight if into is None else into.addmm_(g, weight)
    if name not in call.adapters:
        return dx, None
    a, b, scale, _ = call.adapters[name]
    gb = g @ b
    return dx.addmm_(gb, a[:, columns], alpha=scale), gb


def _of_product(g: Tensor, call: LayerCall, name: str) -> Tensor:
    """The gradient of the products with a linear's weights, from that of what it gives."""
    factor = call.factor(name)
    return g if factor is None else scaled_gradient(g, factor)


def low_gradient(g: Tensor, call: LayerCall, name: str) -> Tensor | None:
    """g B, [C, r], as `linear_backward` gives it; None without an adapter."""
    return _of_product(g, call, name) @ call.adapters[name].b if name in call.adapters else None


def through(
    g: Tensor,
    x: Tensor,
    call: LayerCall,
    name: str,
    sums: Sums,
    into: Tensor | None = None,
    made: Tensor | None = None,
) -> Tensor:
    """`linear_backward` at the input x, and the gradients of the linear's weights.

    Args:
        made: what the linear gives, where it is at hand.
    """
    dx, gb = linear_backward(g, call, name, into)
    sums.outer(name, g, x, gb, made)
    return dx


class Sums:
    """Gradients of the weights that need one.

    Args:
        needed: of each of the call's names.
        chunks: how many are summed.
    """

    def __init__(self, call: LayerCall, needed: Sequence[bool], chunks: int) -> None:
        self._names = call.names
        self._call = call
        self._adapters = call.adapters
        self._weights = call.weights
        self._sums = {
            n: GradientSum(chunks) for n, yes in zip(call.names, needed, strict=True) if yes
        }
        self._done: dict[str, Tensor] = {}

    def outer(
        self, name: str, g: Tensor, x: Tensor, gb: Tensor | None, made: Tensor | None = None
    ) -> None:
        """`name` += g^T x, the gradient of a linear; and of its bias and its adapter.

        Args:
            gb: g B, [C, r], of `linear_backward`.
            made: what the linear gives at x, where it is at hand.
        """
        if f"{name}_bias" in self._sums:
            self._sums[f"{name}_bias"].add(
                g.sum(0, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
            )
        if f"{name}_m" in self._sums:
            made = linear(x, self._call, name) if made is None else made
            products = column_products(g, made, self._weights[f"{name}_bias"])
            self._sums[f"{name}_m"].add(products / self._weights[f"{name}_m"])
        if name in self._sums or f"{name}_b" in self._sums:
            g = _of_product(g, self._call, name)
        if name in self._sums:
            self._sums[name].add(g.t() @ x)
        if gb is None:
            return
        a, _, scale, _ = self._adapters[name]
        if f"{name}_b" in self._sums:
            self._sums[f"{name}_b"].add(_scaled_product(scale, g.t(), x @ a.t()))
        if f"{name}_a" in self._sums:
            self._sums[f"{name}_a"].add(_scaled_product(scale, gb.t(), x))

    def add(self, name: str, g: Tensor | None) -> None:
        if name in self._sums:
            self._sums[name].add(g)

    def settle(self) -> None:
        """Round what is complete: the fp32 sums of the MLP need not outlive it."""
        taken = {name: total.take() for name, total in self._sums.items()}
        ready = {name: t for name, t in taken.items() if t is not None}
        likes = [self._weights[name] for name in ready]
        rounded = in_types(list(ready.values()), [like.dtype for like in likes])
        for name, total, like in zip(ready, rounded, likes, strict=True):
            self._done[name] = total.view(like.shape)
            del self._sums[name]

    def result(self) -> list[Tensor | None]:
        """By the call's names. Zeros of a weight that no chunk used, as an expert that no token
        chose: DDP waits for every gradient.
        """
        self.settle()
        unused = {name: torch.zeros_like(self._weights[name]) for name in self._sums}
        return [(self._done | unused).get(name) for name in self._names]
