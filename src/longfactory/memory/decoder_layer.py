"""One hand-written autograd function for a whole decoder layer of the Llama shape (Llama, Mistral,
Qwen2, Qwen3).

    x2 = x + attention(norm(x)) Wo        y = x2 + mlp(norm(x2))

Everything but attention works on each token alone and is done in chunks of the sequence, in both
directions. Stored between them: the layer's input, and attention's output and log-sum-exp if they
are saved. What backward computes again: q, k, v, Wo, the norms and two of the MLP's three products;
nothing twice. In bytes a local token, h = 2 * hidden (bf16), a = 2 * heads * D, kv = 2 * key heads
* D:

    forward   x, k, v, out, and q of one group of heads; then y       2 h + a + 2 kv + a / groups
    backward  x, dx (written over dy), out, then dq over out,         2 h + a + 4 kv + 3 a / groups
              k, v, dk, dv, and of one group of heads q, dq, dout     + the kernel's own fp32 dq
                                                                        / groups

A gradient of a weight is a sum over chunks, kept in fp32 and rounded once. Parameters are inputs of
the function: whatever hangs on their gradients (DDP, FSDP2, accumulation) sees one gradient a call.

LoRA: y = x W^T + s (x A^T) B^T, in the same chunks. The low-rank product is added to the base's in
one kernel; of a frozen weight no gradient is computed, and g B serves both the input's gradient and
A's. Nothing of rank r is stored between the passes. Weights of four bits are made whole once in
each pass, and let go of when it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfactory import sp
from longfactory.memory.checkpointed import CheckpointedLayer
from longfactory.memory.chunked import GradientSum, chunk_length
from longfactory.memory.exchange import exchanges_heads
from longfactory.memory.layer_ops import (
    add_rms_norm_backward,
    gated_silu,
    gated_silu_backward,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
)
from longfactory.memory.offload import Activations, LayerInput
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, LayerMoments, Technique, Work
from longfactory.sp import probe

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


NAMES = (
    *("norm1", "q_norm", "k_norm", "norm2"),
    *(
        f"{part.removesuffix('_proj')}{end}"
        for part in _LINEARS
        for end in ("", "_bias", "_a", "_b")
    ),
)
"""A layer's parameters, in the order in which autograd gets them. Of a linear, `q`: its weight and
bias, and LoRA's A [r, in] and B [out, r].
"""
Weights = dict[str, Any]
"""By these names; None for what a layer has not."""


class Adapter(NamedTuple):
    """LoRA of one linear, in the type that the layer computes in."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float


def unknown_shape(layer: nn.Module) -> str | None:
    """Why this layer is not one that the function computes, or None."""
    name = type(layer).__name__.removeprefix("FSDP")
    origin = [c.__module__ for c in type(layer).__mro__]
    if not any(f"transformers.models.{f}.modeling_{f}" in origin for f in _FAMILIES):
        return f"{name} is not of the Llama shape"
    if {n for n, _ in layer.named_children()} != {
        "self_attn",
        "mlp",
        "input_layernorm",
        "post_attention_layernorm",
    }:
        return f"{name} has other parts than expected"
    attention, mlp = layer.self_attn, layer.mlp
    for part in _LINEARS:
        linear = getattr(attention, part, None) or getattr(mlp, part, None)
        if (reason := _unknown_linear(linear)) is not None:
            return f"its {part} {reason}"
    for module in layer.modules():
        if type(module).__module__.startswith("peft.utils"):  # a copy that is trained, beside it
            return f"{name} holds a {type(module).__name__}"
    if attention.config.hidden_act not in ("silu", "swish"):
        return f"its activation is {attention.config.hidden_act}"
    return None


def _is_lora(linear: Any) -> bool:
    """Whether it is PEFT's wrapper of a linear."""
    module = type(linear).__module__
    return module.startswith("peft.tuners.lora") and hasattr(linear, "base_layer")


def _is_four_bit(linear: Any) -> bool:
    """Whether it is a linear of bitsandbytes with weights of four bits."""
    return type(linear).__module__.startswith("bitsandbytes") and hasattr(linear, "quant_state")


def _unknown_linear(linear: Any) -> str | None:
    """Why this is neither a plain linear nor one with plain LoRA, or None."""
    base = linear.base_layer if _is_lora(linear) else linear
    if type(base) is not nn.Linear and not _is_four_bit(base):
        return f"is a {type(linear).__name__}"
    if base is linear:
        return None
    if getattr(linear, "fan_in_fan_out", False):
        return f"is a {type(linear).__name__} of a transposed weight"
    if linear.lora_variant:
        return f"has {type(next(iter(linear.lora_variant.values()))).__name__}"
    if any(getattr(m, "p", 0.0) > 0 for m in linear.lora_dropout.values()):
        return "has lora_dropout"
    if any(linear.lora_bias.values()):
        return "has lora_bias"
    return None


def _active(linear: Any) -> str | None:
    """The name of the adapter that acts now, of a linear that PEFT wraps; None for none.

    Raises:
        ValueError: several do.
    """
    if linear.disable_adapters or linear.merged:
        return None
    (name,) = [n for n in linear.active_adapters if n in linear.lora_A] or [None]
    return name


class DecoderLayer(CheckpointedLayer):
    """Takes the place of `layer.forward`, for layers where `unknown_shape` is None.

    It steps aside for torch's checkpointing of the Hugging Face layer (`CheckpointedLayer`) in
    calls that it cannot compute: with weights of another type than the hidden states, with hooks on
    the layer's parts, or with several adapters at once.
    """

    def __init__(self, layer: nn.Module, index: int, store: Activations, chain: Chain) -> None:
        super().__init__(layer, index, store)
        self.chain = chain
        attention = layer.self_attn
        config = attention.config
        self.head_dim: int = attention.head_dim
        self.scale: float = attention.scaling
        # transformers passes the module's window where layers differ and the configuration's where
        # they do not.
        self.window: int | None = getattr(
            attention, "sliding_window", getattr(config, "sliding_window", None)
        )
        # has none, whatever the configuration says
        if any(c.__module__.endswith(".modeling_llama") for c in type(attention).__mro__):
            self.window = None
        self.eps: float = layer.input_layernorm.variance_epsilon
        self.inner = [m for m in layer.modules() if m is not layer]
        mlp = layer.mlp
        self.linears: dict[str, Any] = {
            part.removesuffix("_proj"): getattr(attention, part, None) or getattr(mlp, part)
            for part in _LINEARS
        }
        self.adapted = {name: m for name, m in self.linears.items() if _is_lora(m)}
        bases = {name: getattr(m, "base_layer", m) for name, m in self.linears.items()}
        self.quantised = {name: base for name, base in bases.items() if _is_four_bit(base)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        plan = kwargs.get("sp_plan")
        embedding = kwargs.get("position_embeddings")
        if (
            plan is None
            or embedding is None
            or probe.steps_aside()
            or not isinstance(x, Tensor)
            or not self._fits(x, embedding[0])
        ):
            return super().__call__(*args, **kwargs)
        cos, sin = (t.view(-1, t.shape[-1]).detach() for t in embedding)
        weights, scales = self.weights()
        call = LayerCall(self, plan, cos, sin, weights, scales)
        record = self.store.record
        if not torch.is_grad_enabled():
            y, out, lse = forward(x[0], call)
            if record is not None:  # a segment is being run forward again
                record.append((out, lse))
            return y[None]
        if not self.layer.training:
            return super().__call__(*args, **kwargs)
        rest = args[1:]
        kwargs.pop("hidden_states", None)

        def again(x: Tensor) -> Tensor:
            return self.layer(x, *rest, **kwargs)

        return _Layer.apply(call, again, x, *(call.weights[name] for name in NAMES))

    def _fits(self, x: Tensor, cos: Tensor) -> bool:
        layer = self.layer
        return (
            x.dim() == 3
            and x.shape[0] == 1
            and cos.shape[-1] == self.head_dim
            and cos.numel() == x.shape[1] * self.head_dim
            and layer.input_layernorm.weight.dtype == x.dtype
            and all(self._weight_fits(linear, x) for linear in self.linears.values())
            and (
                not torch.is_autocast_enabled(x.device.type)
                or torch.get_autocast_dtype(x.device.type) == x.dtype
            )
            and not any(
                m._forward_hooks
                or m._forward_pre_hooks
                or m._backward_hooks
                or m._backward_pre_hooks
                for m in self.inner
            )
            and not hasattr(layer.self_attn.q_proj.weight, "ds_id")
            and self._adapters_fit(x)
        )

    def _weight_fits(self, linear: Any, x: Tensor) -> bool:
        """It has x's type, or four bits that are made whole in x's type."""
        base = getattr(linear, "base_layer", linear)
        if not _is_four_bit(base):
            return base.weight.dtype == x.dtype
        state = getattr(base.weight, "quant_state", None)  # FSDP2's gathered weights have none
        return (
            state is not None
            and base.compute_dtype in (None, x.dtype)
            and not getattr(state, "packing_format_for_cpu", False)
        )

    def _adapters_fit(self, x: Tensor) -> bool:
        """At most one adapter acts on a linear, and PEFT would compute it in x's type: under
        autocast, or where the adapter has that type.
        """
        amp = torch.is_autocast_enabled(x.device.type)
        for linear in self.adapted.values():
            if linear.disable_adapters:
                if linear.merged:
                    return False  # PEFT takes the adapter out of the weights first
                continue
            names = [n for n in linear.active_adapters if n in linear.lora_A]
            if len(names) > 1 and not linear.merged:
                return False
            if not amp and any(linear.lora_A[n].weight.dtype != x.dtype for n in names):
                return False
        return True

    def weights(self) -> tuple[Weights, dict[str, float]]:
        """The layer's parameters, and the scale of each linear's adapter by the linear's name."""
        layer = self.layer
        found: Weights = dict.fromkeys(NAMES)
        found["norm1"] = layer.input_layernorm.weight
        found["norm2"] = layer.post_attention_layernorm.weight
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name, None)
            found[name] = None if norm is None else norm.weight
        scales: dict[str, float] = {}
        for name, linear in self.linears.items():
            base = linear
            if name in self.adapted:
                base, adapter = linear.base_layer, _active(linear)
                if adapter is not None:
                    found[f"{name}_a"] = linear.lora_A[adapter].weight
                    found[f"{name}_b"] = linear.lora_B[adapter].weight
                    scales[name] = linear.scaling[adapter]
            found[name], found[f"{name}_bias"] = base.weight, base.bias
        return found, scales


class Chain:
    """Knows when the gradient that reaches a layer is the tensor that the layer above made for it
    alone: then it may be overwritten.
    """

    def __init__(self) -> None:
        self.output = (-1, 0)  # forward: the layer that ran last, and the address of its output
        # backward: the layer that gets the last input gradient, and its address
        self.gradient = (-1, 0)


class LayerCall:
    """What one call's forward and backward share besides tensors to differentiate."""

    def __init__(
        self,
        owner: DecoderLayer,
        plan: Any,
        cos: Tensor,
        sin: Tensor,
        weights: Weights,
        scales: dict[str, float],
    ) -> None:
        self.owner, self.plan, self.cos, self.sin, self.scales = owner, plan, cos, sin, scales
        self.set_weights(weights)
        self.head_dim, self.eps = owner.head_dim, owner.eps
        self.heads = owner.linears["q"].out_features // self.head_dim
        self.kv_heads = owner.linears["k"].out_features // self.head_dim
        self.options: dict[str, Any] = {"scale": owner.scale, "window": owner.window}
        settings = owner.store.settings
        self.chunk = chunk_length(settings)
        # Groups of heads cut the key heads; ulysses deals with heads itself.
        groups = settings.attention_groups if plan.choice.ulysses == 1 else 1
        self.groups = max(
            g for g in range(1, min(groups, self.kv_heads) + 1) if self.kv_heads % g == 0
        )

    def set_weights(self, weights: Weights | None) -> None:
        """None: autograd saves them, and knows when they change."""
        self.weights: Any = weights
        self.adapters: dict[str, Adapter] = {}
        self._whole: dict[str, Tensor] = {}
        if weights is None:
            return
        with torch.no_grad():
            for name, scale in self.scales.items():
                a, b = weights[f"{name}_a"], weights[f"{name}_b"]
                dtype = weights["norm1"].dtype
                self.adapters[name] = Adapter(a.to(dtype), b.to(dtype), scale)

    def weight(self, name: str) -> Tensor:
        """[out, in] of a linear, in the type that the layer computes in."""
        stored = self.weights[name]
        states = self.owner.quantised
        if name not in states:
            return stored
        if name not in self._whole:
            from bitsandbytes.functional import dequantize_4bit

            whole = dequantize_4bit(stored, states[name].weight.quant_state)
            self._whole[name] = whole.to(self.weights["norm1"].dtype)
        return self._whole[name]

    def chunks(self, length: int) -> Iterator[slice]:
        chunk = self.chunk or length
        for i in range(0, length, chunk):
            yield slice(i, min(i + chunk, length))

    def group_slices(self) -> Iterator[tuple[slice, slice]]:
        """Query heads and key heads of each group."""
        heads, kv = self.heads // self.groups, self.kv_heads // self.groups
        for g in range(self.groups):
            yield slice(g * heads, (g + 1) * heads), slice(g * kv, (g + 1) * kv)

    def count(self, length: int) -> int:
        return -(-length // (self.chunk or length))


ALL = slice(None)


def _linear(x: Tensor, c: LayerCall, name: str, rows: slice = ALL) -> Tensor:
    """[C, in] -> [C, out], of some of the linear's outputs."""
    bias = c.weights[f"{name}_bias"]
    bias = None if bias is None else bias[rows].to(x.dtype)
    y = F.linear(x, c.weight(name)[rows], bias)
    if name in c.adapters:
        a, b, scale = c.adapters[name]
        y.addmm_(x @ a.t(), b[rows].t(), alpha=scale)
    return y


def _linear_backward(
    g: Tensor, c: LayerCall, name: str, into: Tensor | None = None, columns: slice = ALL
) -> tuple[Tensor, Tensor | None]:
    """[C, out] -> the gradient at some of the linear's inputs, [C, in], added to `into` if it is
    given; and g B, [C, r], where there is an adapter.
    """
    weight = c.weight(name)[:, columns]
    dx = g @ weight if into is None else into.addmm_(g, weight)
    if name not in c.adapters:
        return dx, None
    a, b, scale = c.adapters[name]
    gb = g @ b
    return dx.addmm_(gb, a[:, columns], alpha=scale), gb


def _rotated(
    n: Tensor, s: slice, c: LayerCall, name: str, norm: Tensor | None, rows: slice = ALL
) -> Tensor:
    """[C, H] normed hidden -> [C, heads, D] queries or keys."""
    y = _linear(n, c, name, rows).view(n.shape[0], -1, c.head_dim)
    if norm is not None:
        y = rms_norm(y, norm, c.eps)
    return rotate(y, c.cos[s], c.sin[s])


def _rotated_backward(
    g: Tensor, n: Tensor, s: slice, c: LayerCall, name: str, norm: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the projection's output [C, heads * D], and of the norm's weight."""
    g, dnorm = rotate_backward(g, c.cos[s], c.sin[s]), None
    if norm is not None:
        g, dnorm = rms_norm_backward(g, _linear(n, c, name).view_as(g), norm, c.eps)
    return g.reshape(g.shape[0], -1), dnorm


def _queries(x: Tensor, c: LayerCall, heads: slice) -> Tensor:
    """[T, H] -> [T, heads, D] rotated queries of some heads."""
    w = c.weights
    rows = slice(heads.start * c.head_dim, heads.stop * c.head_dim)
    q = x.new_empty(x.shape[0], heads.stop - heads.start, c.head_dim)
    for s in c.chunks(x.shape[0]):
        q[s] = _rotated(rms_norm(x[s], w["norm1"], c.eps), s, c, "q", w["q_norm"], rows)
    return q


def _keys_values(x: Tensor, c: LayerCall) -> tuple[Tensor, Tensor]:
    """[T, H] -> rotated keys and values, [T, key heads, D]."""
    w, T = c.weights, x.shape[0]
    k, v = (x.new_empty(T, c.kv_heads, c.head_dim) for _ in range(2))
    for s in c.chunks(T):
        n = rms_norm(x[s], w["norm1"], c.eps)
        k[s] = _rotated(n, s, c, "k", w["k_norm"])
        v[s] = _linear(n, c, "v").view(-1, c.kv_heads, c.head_dim)
    return k, v


def _attention(x: Tensor, k: Tensor, v: Tensor, c: LayerCall) -> tuple[Tensor, Tensor]:
    """out [T, heads, D] and its log-sum-exp, a group of heads at a time."""
    if c.groups == 1:
        return sp.attention_forward(_queries(x, c, slice(0, c.heads)), k, v, c.plan, **c.options)
    out, lses = x.new_empty(x.shape[0], c.heads, c.head_dim), []
    for mine, keys in c.group_slices():
        kg, vg = k[:, keys].contiguous(), v[:, keys].contiguous()
        out[:, mine], lse = sp.attention_forward(_queries(x, c, mine), kg, vg, c.plan, **c.options)
        lses.append(lse)
    return out, torch.cat(lses)


def forward(x: Tensor, c: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
    """[T, H] -> y [T, H], and attention's out [T, heads, D] and log-sum-exp."""
    # Types are chosen here; what autocast would add is a cast of every fp32 sum.
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return _forward(x, c)


def _forward(x: Tensor, c: LayerCall) -> tuple[Tensor, Tensor, Tensor]:
    w, T = c.weights, x.shape[0]
    k, v = _keys_values(x, c)
    out, lse = _attention(x, k, v, c)
    del k, v
    flat = out.view(T, -1)
    y = torch.empty_like(x)
    for s in c.chunks(T):
        x2 = x[s] + _linear(flat[s], c, "o")
        n = rms_norm(x2, w["norm2"], c.eps)
        hidden = gated_silu(_linear(n, c, "gate"), _linear(n, c, "up"))
        torch.add(x2, _linear(hidden, c, "down"), out=y[s])
        del hidden, n, x2
    return y, out, lse


class _Sums:
    """Gradients of the weights that need one."""

    def __init__(self, call: LayerCall, needed: tuple[bool, ...], chunks: int) -> None:
        weights = call.weights
        self._adapters = call.adapters
        self._sums = {name: GradientSum(chunks) for name, n in zip(NAMES, needed, strict=True) if n}
        self._weights = weights
        self._done: dict[str, Tensor] = {}

    def outer(self, name: str, g: Tensor, x: Tensor, gb: Tensor | None) -> None:
        """`name` += g^T x, the gradient of a linear; and of its bias and its adapter.

        Args:
            gb: g B, [C, r], of `_linear_backward`.
        """
        if name in self._sums:
            self._sums[name].add(g.t() @ x)
        if f"{name}_bias" in self._sums:
            self._sums[f"{name}_bias"].add(
                g.sum(0, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32)
            )
        if gb is None:
            return
        a, _, scale = self._adapters[name]
        if f"{name}_b" in self._sums:
            self._sums[f"{name}_b"].add(scale * (g.t() @ (x @ a.t())))
        if f"{name}_a" in self._sums:
            self._sums[f"{name}_a"].add(scale * (gb.t() @ x))

    def add(self, name: str, g: Tensor | None) -> None:
        if name in self._sums:
            self._sums[name].add(g)

    def settle(self) -> None:
        """Round what is complete: the fp32 sums of the MLP need not outlive it."""
        for name in list(self._sums):
            total = self._sums[name].total(self._weights[name])
            if total is not None:
                self._done[name] = total
                del self._sums[name]

    def result(self) -> list[Tensor | None]:
        self.settle()
        return [self._done.get(name) for name in NAMES]


def _mlp_backward(
    x: Tensor, out: Tensor, dy: Tensor, dx2: Tensor, c: LayerCall, sums: _Sums
) -> None:
    """dx2 := gradient at x + attention(x) Wo. It may be dy itself."""
    w = c.weights
    for s in c.chunks(x.shape[0]):
        x2 = x[s] + _linear(out[s], c, "o")
        n = rms_norm(x2, w["norm2"], c.eps)
        dhidden, gb = _linear_backward(dy[s], c, "down")
        hidden, dgate, dup = gated_silu_backward(
            dhidden, _linear(n, c, "gate"), _linear(n, c, "up")
        )
        del dhidden
        sums.outer("down", dy[s], hidden, gb)
        del hidden
        dn, gb = _linear_backward(dgate, c, "gate")
        sums.outer("gate", dgate, n, gb)
        del dgate
        dn, gb = _linear_backward(dup, c, "up", into=dn)
        sums.outer("up", dup, n, gb)
        del dup, n
        total, dnorm = add_rms_norm_backward(dn, x2, w["norm2"], c.eps, dy[s])
        dx2[s] = total
        del dn, x2, total
        sums.add("norm2", dnorm)
        gb = dx2[s] @ c.adapters["o"].b if "o" in c.adapters else None
        sums.outer("o", dx2[s], out[s], gb)


def _attention_backward(
    x: Tensor, out: Tensor, lse: Tensor, dx2: Tensor, k: Tensor, v: Tensor, c: LayerCall
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [T, heads, D] (with several groups: written over out), dk, dv."""
    T, D = x.shape[0], c.head_dim
    out = out.view(T, c.heads, D)
    if c.groups == 1:
        dout = _linear_backward(dx2, c, "o")[0].view(T, c.heads, D)
        dq, dk, dv, _ = sp.attention_backward(
            dout, _queries(x, c, slice(0, c.heads)), k, v, out, lse, c.plan, **c.options
        )
        return dq, dk, dv
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for mine, keys in c.group_slices():
        columns = slice(mine.start * D, mine.stop * D)
        dout = _linear_backward(dx2, c, "o", columns=columns)[0].view(T, -1, D)
        kg, vg, og, lg = (
            k[:, keys].contiguous(),
            v[:, keys].contiguous(),
            out[:, mine].contiguous(),
            lse[mine].contiguous(),
        )
        q = _queries(x, c, mine)
        dq, dkg, dvg, _ = sp.attention_backward(dout, q, kg, vg, og, lg, c.plan, **c.options)
        del q, dout, kg, vg, og, lg
        out[:, mine], dk[:, keys], dv[:, keys] = dq, dkg, dvg
        del dq, dkg, dvg
    return out, dk, dv


def _qkv_backward(
    x: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor, c: LayerCall, sums: _Sums
) -> None:
    """dx += gradient through the norm and the projections."""
    w = c.weights
    for s in c.chunks(x.shape[0]):
        n = rms_norm(x[s], w["norm1"], c.eps)
        g, dnorm = _rotated_backward(dq[s], n, s, c, "q", w["q_norm"])
        sums.add("q_norm", dnorm)
        dn, gb = _linear_backward(g, c, "q")
        sums.outer("q", g, n, gb)
        g, dnorm = _rotated_backward(dk[s], n, s, c, "k", w["k_norm"])
        sums.add("k_norm", dnorm)
        dn, gb = _linear_backward(g, c, "k", into=dn)
        sums.outer("k", g, n, gb)
        g = dv[s].reshape(g.shape)
        dn, gb = _linear_backward(g, c, "v", into=dn)
        sums.outer("v", g, n, gb)
        del g, n
        total, dnorm = add_rms_norm_backward(dn, x[s], w["norm1"], c.eps, dx[s])
        sums.add("norm1", dnorm)
        dx[s] = total


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, again: Any, x: Tensor, *weights: Tensor | None
    ) -> Tensor:  # type: ignore[override]
        owner = call.owner
        store, chain = owner.store, owner.chain
        handle = store.layer_input(owner.index, x.detach(), again)
        y, out, lse = forward(x.detach()[0], call)
        if store.saves_attention(owner.index) and handle.last_in_segment:
            handle.set_attention(store.save_attention(owner.index, [(out, lse)]))
        ctx.save_for_backward(*weights)
        call.set_weights(None)
        ctx.call, ctx.handle = call, handle
        ctx.chained = chain.output == (owner.index - 1, x.data_ptr())
        chain.output = (owner.index, y.data_ptr())
        return y[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: LayerCall = ctx.call
        handle: LayerInput | None = ctx.handle
        if handle is None:
            raise RuntimeError("A second backward through a checkpointed layer is not possible.")
        ctx.handle = None
        owner = call.owner
        store, chain = owner.store, owner.chain
        call.set_weights(dict(zip(NAMES, ctx.saved_tensors, strict=True)))
        x = handle.input()[0]
        saved = handle.attention()
        if not store.settings.late_prefetch:
            store.prefetch()
        T = x.shape[0]
        sums = _Sums(call, ctx.needs_input_grad[3:], call.count(T))
        k = v = None
        if saved is None:
            k, v = _keys_values(x, call)
            out, lse = _attention(x, k, v, call)
        else:
            ((out, lse),) = saved
        del saved
        own = chain.gradient == (owner.index, dy.data_ptr()) and dy.is_contiguous()
        dy = dy[0]
        dx = dy if own else torch.empty_like(x)
        flat = out.view(T, -1)
        _mlp_backward(x, flat, dy, dx, call, sums)
        sums.settle()
        if k is None or v is None:
            k, v = _keys_values(x, call)
        dq, dk, dv = _attention_backward(x, flat, lse, dx, k, v, call)
        del k, v, out, flat, lse
        if store.settings.late_prefetch:
            store.prefetch()
        _qkv_backward(x, dq, dk, dv, dx, call, sums)
        call.set_weights(None)
        chain.gradient = (owner.index - 1, dx.data_ptr()) if ctx.chained else (-1, 0)
        return None, None, dx[None] if ctx.needs_input_grad[2] else None, *sums.result()


# ---- what the planner needs to know --------------------------------------------------------------


def _group_values(job: TrainingJob, mode: str, settings: MemorySettings) -> list[int]:
    shape = job.shape
    if exchanges_heads(job):  # each exchange is of all heads
        return [1]
    groups = [g for g in (1, 2, 4, 8) if shape.kv_heads % g == 0 and (g == 1 or job.written_layer)]
    return groups[-1:] if mode == "long" else groups


def _group_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """Of one group of heads: q, dq, dout, and the kernel's fp32 dq. The generic layer has none."""
    if not job.written_layer:
        return Bytes()
    of_a_token = 5 * job.shape.attention_bytes / settings.attention_groups
    return Bytes(layer=LayerMoments(attention=of_a_token * job.local))


def _group_work(job: TrainingJob, settings: MemorySettings) -> Work:
    return Work(slower=0.01 * (settings.attention_groups.bit_length() - 1))


def _more_groups(job: TrainingJob, settings: MemorySettings) -> int:
    groups = settings.attention_groups
    if not job.written_layer:
        return groups
    return next((g for g in (2, 4, 8) if g > groups and job.shape.kv_heads % g == 0), groups)


def _group_words(settings: MemorySettings) -> str | None:
    if settings.checkpoint == "none" or settings.attention_groups == 1:
        return None
    return f"attention's backward in {settings.attention_groups} groups of heads"


ATTENTION_GROUPS = Technique(
    "attention_groups",
    _group_values,
    3,
    bytes=_group_bytes,
    work=_group_work,
    words=_group_words,
    leaner=_more_groups,
    ordered=True,
)
