"""One hand-written autograd function for a whole decoder layer, made from the description that
`layer.recognise` reads from transformers' modules (`layer.description`: norms, residuals, kinds of
attention and MLP).

    x2 = x + attention(norm(x)) Wo        y = x2 + mlp(norm(x2))

Everything but attention works on each token alone and is done in chunks of the sequence, in both
directions. Stored between them: the layer's input, and attention's output and log-sum-exp if they
are saved. What backward computes again: q, k, v, Wo, the norms and two of the MLP's three products
(all three where a norm comes after them), but for those that are saved (`keep_mlp`: Wo's and the
MLP's); nothing twice. An MLP that is a module of its own, a
mixture of experts, runs as it is; in backward each chunk of it runs again once and is
differentiated by autograd. In bytes a local token, h = 2 * hidden (bf16), a = 2 * heads * D, kv = 2
* key heads * D:

    forward   x, k, v, out, and q of one group of heads; then y       2 h + a + 2 kv + a / groups
    backward  x, dx (written over dy), out, then dq over out,         2 h + a + 4 kv + 3 a / groups
              k, v, dk, dv, and of one group of heads q, dq, dout     + the kernel's own fp32 dq
                                                                        / groups

and h more where a norm comes after attention, or attention and MLP have one input.

A gradient of a weight is a sum over chunks, kept in fp32 and rounded once. Parameters are inputs of
the function: whatever hangs on their gradients (DDP, FSDP2, accumulation) sees one gradient a call.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from longfactory.memory import chunked
from longfactory.memory.checkpointed import CheckpointedLayer
from longfactory.memory.exchange import exchanges_heads
from longfactory.memory.layer.description import LayerParts
from longfactory.memory.layer.linears import ENDS, LayerCall, Weights, mlp_name
from longfactory.memory.layer.mlp_half import room_for_products
from longfactory.memory.layer.passes import backward, forward
from longfactory.memory.layer.proof import difference
from longfactory.memory.layer.recognise import is_four_bit, is_lora
from longfactory.memory.layer_kinds import LayerKind
from longfactory.memory.offload import Activations, LayerInput
from longfactory.memory.settings import MemorySettings
from longfactory.memory.shapes import TrainingJob
from longfactory.memory.technique import Bytes, LayerMoments, StepMoments, Technique, Work
from longfactory.memory.temporaries import (
    beyond_saved_bytes,
    stored_expert_bytes,
    temporary_bytes,
)
from longfactory.sp import probe

log = logging.getLogger(__name__)


def _active(linear: Any) -> str | None:
    """The name of the adapter that acts now, of a linear that PEFT wraps; None for none.

    Raises:
        ValueError: several do.
    """
    if linear.disable_adapters or linear.merged:
        return None
    (name,) = [n for n in linear.active_adapters if n in linear.lora_A] or [None]
    return name


def cos_sin(embedding: Any) -> tuple[Tensor, Tensor] | None:
    """What a layer is given to turn queries and keys by: cos and sin, [1, T, R] or, where it was
    one complex number an angle (DeepSeek-V2), [1, T, R/2]; None where the model turns nothing.
    """
    if isinstance(embedding, Tensor) and embedding.is_complex():
        return embedding.real, embedding.imag
    if isinstance(embedding, (tuple, list)) and len(embedding) == 2:
        return embedding[0], embedding[1]
    return None


def _facts(module: nn.Module) -> frozenset[tuple[str, Any]]:
    """The numbers and flags that a module's code may look at: layers of one class differ in them
    (windows, which of them turn queries and keys).
    """
    others = ("layer_idx", "training", "gradient_checkpointing")
    plain = (bool, int, float, str, type(None))
    facts = vars(module).items()
    return frozenset((n, v) for n, v in facts if isinstance(v, plain) and n not in others)


class DecoderLayer(CheckpointedLayer):
    """Takes the place of `layer.forward`, for layers that `recognise` knows.

    It steps aside for torch's checkpointing of the Hugging Face layer (`CheckpointedLayer`) in
    calls that it cannot compute: with weights of another type than the hidden states, with hooks on
    the layer's parts, or with several adapters at once; and in all calls where the first has shown
    that the layer's own code computes something else.
    """

    def __init__(
        self, layer: nn.Module, index: int, store: Activations, chain: Chain, parts: LayerParts
    ) -> None:
        super().__init__(layer, index, store)
        self.chain = chain
        self.shape = parts.shape
        # The start-up guard lowers `window` for its short row.
        self.scale, self.window = parts.scale, parts.window
        self.norms, self.linears, self.mlp = parts.norms, parts.linears, parts.mlp
        self.attention = parts.attention
        opaque = set() if self.mlp is None else set(self.mlp.modules())
        self.inner = [m for m in layer.modules() if m is not layer and m not in opaque]
        self.adapted = {name: m for name, m in self.linears.items() if is_lora(m)}
        bases = {name: getattr(m, "base_layer", m) for name, m in self.linears.items()}
        self.quantised = {name: base for name, base in bases.items() if is_four_bit(base)}
        self.names = (
            *self.norms,
            *(("sinks",) if self.shape.sinks else ()),
            *(name + end for name in self.linears for end in ENDS),
        )

    def token_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives the layer as its own input for each token, [1, T, P]; None for a layer
        that has none.
        """
        if self.shape.token_input is None:
            return None
        return args[1] if len(args) > 1 else kwargs.get("per_layer_input")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        own_input = self.token_input(args, kwargs)
        plan = kwargs.get("sp_plan")
        embedding = cos_sin(kwargs.get("position_embeddings"))
        if (
            plan is None
            or (embedding is None and self.shape.rotary is not None)
            or (self.shape.query_scale is not None and kwargs.get("position_ids") is None)
            or (self.shape.token_input is not None and own_input is None)
            or probe.steps_aside()
            or not isinstance(x, Tensor)
            or not self._fits(x, None if embedding is None else embedding[0])
            or not self._proved(x, args, kwargs)
        ):
            return super().__call__(*args, **kwargs)
        call = self.call(plan, kwargs, own_input)
        record = self.store.record
        if not torch.is_grad_enabled():
            y, out, lse = forward(x[0], call)
            if record is not None:  # a segment is being run forward again
                record.append((out, lse))
            return (y[None], None) if self.shape.pair else y[None]
        if not self.layer.training:
            return super().__call__(*args, **kwargs)
        rest = args[1:]
        kwargs.pop("hidden_states", None)

        def again(x: Tensor) -> Tensor:
            y = self.layer(x, *rest, **kwargs)
            return y[0] if isinstance(y, tuple) else y

        own = [call.weights[name] for name in self.names]
        y = _Layer.apply(call, again, len(own), x, own_input, *own, *call.mlp_weights())
        return (y, None) if self.shape.pair else y

    def call(self, plan: Any, given: dict[str, Any], own_input: Tensor | None) -> LayerCall:
        """What the passes over a row share.

        Args:
            given: the named arguments of the layer's call.
            own_input: see `token_input`.
        """
        cos = sin = positions = None
        embedding = cos_sin(given.get("position_embeddings"))
        if self.shape.query_scale is not None:
            positions = given["position_ids"].view(-1)
        if self.shape.rotary is not None:
            assert embedding is not None
            cos, sin = (
                self.shape.rotary.table(t.view(-1, t.shape[-1]).detach()) for t in embedding
            )
        weights, scales = self.weights()
        settings = self.store.settings
        # Groups of heads cut the key heads; ulysses deals with heads itself.
        groups = settings.attention_groups if plan.choice.ulysses == 1 else 1
        kv_heads = self.shape.kv_heads
        return LayerCall(
            self.shape,
            (*self.names, *(mlp_name(place) for place in range(len(self._mlp_weights())))),
            plan,
            cos,
            sin,
            weights,
            scales,
            self.quantised,
            {"scale": self.scale, "window": self.window},
            self._dtype(),
            chunked.chunk_length(settings),
            max(g for g in range(1, min(groups, kv_heads) + 1) if kv_heads % g == 0),
            None if self.mlp is None else self._run_mlp,
            self._mlp_weights,
            self.layer.layer_scalar if self.shape.scalar else None,
            positions,
            None if own_input is None else own_input.detach()[0],
            self,
        )

    def _dtype(self) -> torch.dtype:
        return next(m.weight.dtype for name, m in self.norms.items() if name.startswith("norm"))

    def _mlp_weights(self) -> list[Tensor]:
        """The trained ones of the MLP's module."""
        return [] if self.mlp is None else [p for p in self.mlp.parameters() if p.requires_grad]

    def _run_mlp(self, n: Tensor, start: int) -> Tensor:
        """[C, H] -> [C, H], where n begins at token `start`."""
        assert self.mlp is not None
        with chunked.whole(start):
            made = self.mlp(n[None])
        # a view: backward of `[0]` would copy the gradient into zeros
        return (made[0] if isinstance(made, tuple) else made).flatten(0, 1)

    def _fits(self, x: Tensor, cos: Tensor | None) -> bool:
        shape = self.shape
        device = x.device.type
        return (
            x.dim() == 3
            and x.shape[0] == 1
            and (cos is None or self._turns_by(x, cos))
            and all(
                m.weight.dtype == x.dtype
                for m in self.norms.values()
                if getattr(m, "weight", None) is not None
            )
            and (not shape.sinks or self.attention.sinks.dtype == x.dtype)
            and all(self._weight_fits(linear, x) for linear in self.linears.values())
            and (
                not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype
            )
            and not any(
                m._forward_hooks
                or m._forward_pre_hooks
                or m._backward_hooks
                or m._backward_pre_hooks
                for m in self.inner
            )
            and not hasattr(next(self.attention.parameters()), "ds_id")
            and self._adapters_fit(x)
        )

    def _turns_by(self, x: Tensor, cos: Tensor) -> bool:
        rotary = self.shape.rotary
        turned = cos.shape[-1] * (2 if rotary and rotary.angles == "once" else 1)
        return turned <= self.shape.head_dim and cos.numel() == x.shape[1] * cos.shape[-1]

    def _weight_fits(self, linear: Any, x: Tensor) -> bool:
        """It has x's type, or four bits that are made whole in x's type."""
        base = getattr(linear, "base_layer", linear)
        if not is_four_bit(base):
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

    def _proved(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the function was compared with the layer's own code, once for each kind of layer,
        and gives the same.
        """
        key = (
            type(self.layer),
            self.shape,
            _facts(self.layer),
            _facts(self.attention),
            tuple(self.adapted),
            tuple(self.quantised),
            x.dtype,
        )
        if key not in self.chain.proved:
            reason = difference(self, x, args, kwargs)
            self.chain.proved[key] = reason is None
            if reason is not None:
                log.warning(
                    "%s: %s, so these layers run transformers' own code.",
                    type(self.layer).__name__,
                    reason,
                )
        return self.chain.proved[key]

    def weights(self) -> tuple[Weights, dict[str, float]]:
        """The layer's parameters, and the scale of each linear's adapter by the linear's name."""
        found: Weights = dict.fromkeys(self.names)
        for name, module in self.norms.items():
            found[name] = getattr(module, "weight", None)
        if self.shape.sinks:
            found["sinks"] = self.attention.sinks
        scales: dict[str, float] = {}
        for name, linear in self.linears.items():
            base = linear
            if name in self.adapted:
                base, adapter = linear.base_layer, _active(linear)
                if adapter is not None:
                    found[f"{name}_a"] = linear.lora_A[adapter].weight
                    found[f"{name}_b"] = linear.lora_B[adapter].weight
                    scales[name] = linear.scaling[adapter]
                    if adapter in linear.lora_magnitude_vector:  # DoRA
                        found[f"{name}_m"] = linear.lora_magnitude_vector[adapter].weight
            found[name], found[f"{name}_bias"] = base.weight, base.bias
        return found, scales


class Chain:
    """What the layers of a model know of each other: when the gradient that reaches a layer is the
    tensor that the layer above made for it alone, which may then be overwritten; and which kinds of
    layers were compared with their own code.
    """

    def __init__(self) -> None:
        self.output = (-1, 0)  # forward: the layer that ran last, and the address of its output
        # backward: the layer that gets the last input gradient, and its address
        self.gradient = (-1, 0)
        self.proved: dict[Any, bool] = {}


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: LayerCall,
        again: Any,
        own: int,
        x: Tensor,
        own_input: Tensor | None,
        *weights: Tensor | None,
    ) -> Tensor:  # type: ignore[override]
        owner = call.owner
        store, chain = owner.store, owner.chain
        handle = store.layer_input(owner.index, x.detach(), again)
        if store.saves_mlp(owner.index) and handle.last_in_segment:
            call.products = room_for_products(x[0], call)
            call.kept = None if owner.mlp is None else {}
        y, out, lse = forward(x.detach()[0], call)
        ctx.products, call.products = call.products, None
        ctx.kept, call.kept = call.kept, None
        if store.saves_attention(owner.index) and handle.last_in_segment:
            handle.set_attention(store.save_attention(owner.index, [(out, lse)]))
        # The MLP's module has its own at hand in backward.
        ctx.save_for_backward(*weights[:own])
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
        call.set_weights(dict(zip(owner.names, ctx.saved_tensors, strict=True)))
        call.products, ctx.products = ctx.products, None
        call.kept, ctx.kept = ctx.kept, None
        x = handle.input()[0]
        saved = handle.attention()
        if not store.settings.late_prefetch:
            store.prefetch()
        own = chain.gradient == (owner.index, dy.data_ptr()) and dy.is_contiguous()
        dx = dy[0] if own else torch.empty_like(x)
        late = store.prefetch if store.settings.late_prefetch else None
        if ctx.needs_input_grad[4] and call.token_input is not None:
            call.token_gradient = torch.empty_like(call.token_input)
        gradients = backward(x, dy[0], dx, saved, call, ctx.needs_input_grad[5:], late)
        call.set_weights(None)
        of_own_input = None if call.token_gradient is None else call.token_gradient[None]
        chain.gradient = (owner.index - 1, dx.data_ptr()) if ctx.chained else (-1, 0)
        of_x = dx[None] if ctx.needs_input_grad[3] else None
        return None, None, None, of_x, of_own_input, *gradients


# ---- what the planner needs to know --------------------------------------------------------------


def _group_values(job: TrainingJob, mode: str, settings: MemorySettings) -> list[int]:
    shape = job.shape
    if exchanges_heads(job):  # each exchange is of all heads
        return [1]
    groups = [g for g in (1, 2, 4, 8) if shape.kv_heads % g == 0 and (g == 1 or job.written_layer)]
    return groups[-1:] if mode == "long" else groups


def _group_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    """Of one group of heads: q, dq, dout, and the kernel's fp32 dq; of all heads the gradient of
    their output gate. The generic layer has none.
    """
    if not job.written_layer:
        return Bytes()
    of_a_token = 5 * job.shape.attention_bytes / settings.attention_groups
    of_a_token += job.shape.width * max(kind.gates for kind in job.shape.kinds)
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


MLP_PRODUCTS = "saved MLP activations"  # item of the budget


def _mlp_layers(job: TrainingJob, share: float) -> list[LayerKind]:
    """The layers of which the MLP's products are saved."""
    shape = job.shape
    first = shape.layers - round(share * shape.layers)
    kinds = (shape.kinds[place] for place in shape.order[first:])
    return [kind for kind in kinds if job.written(kind)]


def _mlp_values(job: TrainingJob, mode: str, settings: MemorySettings) -> list[float]:
    """Where activations are sent to the host, there is no room for more of them on the GPU."""
    room = settings.offload == "none" and settings.segment_layers == 1 and mode != "long"
    if not room or settings.checkpoint == "none" or not _mlp_layers(job, 1.0):
        return [0.0]
    return [1.0, 0.75, 0.5, 0.25, 0.0]


def _mlp_fixed(arguments: Any) -> dict[str, Any]:
    share = arguments.keep_mlp
    return {} if share == "auto" else {"keep_mlp": float(share)}


def _mlp_of_a_token(job: TrainingJob, kind: LayerKind) -> float:
    """Bytes: what the output projection, gate and up give; of a mixture of experts what autograd
    stores of it.
    """
    width = job.shape.width
    if not kind.experts:
        return float(width * (kind.hidden + 2 * kind.dense_width))
    # what the output projection gives, the mixture's input and its output; the order, and the
    # router's
    numbers = 3 * kind.hidden + 4 * kind.dense_width
    routes = 40.0 * kind.used + 8.0 * kind.experts + job.router_bytes(kind)
    return width * numbers + stored_expert_bytes(job, kind) + routes


def _at_hand(job: TrainingJob, settings: MemorySettings) -> float:
    """Bytes of a layer's temporaries that are among what is saved of it."""
    chunk = min(settings.mlp_chunk or job.local, job.local)
    whole = max(temporary_bytes(job, kind) for kind in job.shape.kinds)
    beyond = max(
        beyond_saved_bytes(job, kind) if job.written(kind) else temporary_bytes(job, kind)
        for kind in job.shape.kinds
    )
    return chunk * (whole - beyond)


def _mlp_bytes(job: TrainingJob, settings: MemorySettings) -> Bytes:
    if settings.checkpoint == "none" or settings.keep_mlp == 0:
        return Bytes()
    layers = _mlp_layers(job, settings.keep_mlp)
    each = [job.local * _mlp_of_a_token(job, kind) for kind in layers]
    whole = sum(each)
    return Bytes(
        {MLP_PRODUCTS: StepMoments(whole, whole, max(each, default=0.0))},
        layer=LayerMoments(after_attention=-_at_hand(job, settings)),
    )


def _mlp_work(job: TrainingJob, settings: MemorySettings) -> Work:
    if settings.keep_mlp == 0:
        return Work()
    layers = _mlp_layers(job, settings.keep_mlp)
    saved = sum(1.0 if kind.experts else 2 / 3 for kind in layers)
    count = job.shape.layers
    return Work(again_mlp=-saved / count, again_output=-len(layers) / count)


def _mlp_words(settings: MemorySettings) -> str | None:
    if settings.checkpoint == "none" or settings.keep_mlp == 0:
        return None
    return f"MLP activations saved in {settings.keep_mlp:.0%} of layers"


def _mlp_advice(job: TrainingJob, settings: MemorySettings) -> tuple[int, str] | None:
    return (4, "keep_mlp: 0") if settings.keep_mlp > 0 else None


def _less_mlp(job: TrainingJob, settings: MemorySettings) -> float:
    return max(0.0, settings.keep_mlp - 0.25)


SAVED_MLP = Technique(
    "keep_mlp",
    _mlp_values,
    10,
    _mlp_fixed,
    _mlp_bytes,
    _mlp_work,
    words=_mlp_words,
    advice=_mlp_advice,
    leaner=_less_mlp,
    ordered=True,
)
