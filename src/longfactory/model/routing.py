"""What the routers of a mixture of experts do in a row: their auxiliary loss, and how evenly they
share the tokens out.

The auxiliary loss of transformers (Switch Transformer's) is a product of two sums over the tokens
of all layers' routers,

    aux = E * sum_e (C_e / R) (P_e / R)

C_e how often expert e is among the K most probable, P_e the sum of its probabilities, R tokens
times layers. A prompt that several answers share is computed once and counts once for each. A row
that is sharded has them on several ranks, in several chunks of each, and in layers that are
computed twice. So nothing is taken from the model's outputs. In the row's one forward pass the
routers' hooks add up C and P, the group reduces them, and aux is joined to the outputs that the
loss is made from. Its gradient is

    d aux / d probability of e = E * C_e / R^2          (C_e is a count and has none)

the same for each token, as often as it counts: in the backward pass, when C is known, it is put
into each router's logits where its scores leave it, be it in a first or a recomputed forward pass.
The sum over ranks of what ranks differentiate is the group's loss, taken `ctx.size` times, hence
that factor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory import sp
from longfactory.errors import UserError
from longfactory.memory.expert_forms import of_interface
from longfactory.model import experts
from longfactory.model.outputs import TokenOutputs
from longfactory.sp import hf
from longfactory.sp.pinned import copied
from longfactory.sp.position import position
from longfactory.sp.routers import is_router


@dataclasses.dataclass
class _RowState:
    """Of the row whose pass is at hand.

    Attributes:
        tokens: of this rank.
        times: [T/n] int64 on the device, how many sequences a token is part of: 0 at padding, the
            number of answers in a prompt that they share; None where all are 1.
        several: the numbers in it, 0 left out, on the host.
        open: the one forward pass that is counted.
        counts, probabilities: [E], C and P of this rank, then of the group.
        load: [layers, E] how many of this rank's, then the group's, tokens went to an expert.
        seen: tokens by router that were counted.
        filled: 1, or 0 where the row has no token but padding.
        slope: gradient of what is differentiated with regard to aux, in the backward pass.
    """

    tokens: int
    times: Tensor | None
    several: tuple[int, ...] = (1,)
    open: bool = True
    counts: Tensor | None = None
    probabilities: Tensor | None = None
    load: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    seen: dict[int, int] = dataclasses.field(default_factory=dict)
    slope: Tensor | None = None
    aux: Tensor | None = None
    filled: Tensor | float = 1.0


class Routing:
    """Watches the routers of a model. Its hooks do nothing outside of `row` and of the backward
    pass that follows.

    Args:
        model: a transformers model, perhaps inside PEFT, not yet wrapped by FSDP2, DDP or
            DeepSpeed.
        ctx: the place in the sequence-parallel group.
        coefficient: of the auxiliary loss; 0: it is not computed.
    Raises:
        UserError: a coefficient for a model that has no auxiliary loss in transformers.
    """

    def __init__(self, model: nn.Module, ctx: sp.SequenceParallel, coefficient: float = 0.0):
        self.ctx, self.coefficient = ctx, coefficient
        self._row: _RowState | None = None
        self._last = _RowState(0, None)
        inner = hf.unwrap(model)
        self.arguments: dict[str, Any] = {}
        """For the model's forward: it need not record what is counted here."""
        if getattr(inner.config, "output_router_logits", False):
            self.arguments["output_router_logits"] = False
        self._picks, self._experts, self._routers = 0, 0, 0
        if coefficient:
            found = _routers_with_loss(inner)
            self._picks, self._experts = inner.num_experts_per_tok, inner.num_experts
            self._routers = len(found)
            for number, router in enumerate(found):
                router.register_forward_hook(functools.partial(self._routed, number))
        blocks = _expert_blocks(inner)
        self._blocks = len(blocks)
        for number, (block, width) in enumerate(blocks):
            hook = functools.partial(self._sent, number, width)
            block.register_forward_pre_hook(hook, with_kwargs=True)

    # ---- a row -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def row(self, times: Tensor, device: torch.device) -> Iterator[None]:
        """While open, the model's forward pass over a row is counted.

        Args:
            times: [T/n] int64 on the host, in how many of the row's sequences each of this rank's
                tokens is (`Row.sequences`): 0 at padding.
            device: where the model computes.
        """
        tokens = times.bincount().tolist()  # by how often they count
        several = tuple(n for n, count in enumerate(tokens) if n and count)
        whole = several == (1,) and not tokens[0]
        self._row = state = _RowState(len(times), None if whole else copied(times, device), several)
        try:
            yield
        except BaseException:
            self._row = None
            raise
        state.open = False
        if not torch.is_grad_enabled():
            self._row = None
        self._finish(state, device)

    def _finish(self, state: _RowState, device: torch.device) -> None:
        """The group's sums. Collective."""
        if any(n != state.tokens for n in state.seen.values()) or (
            self.coefficient and len(state.seen) != self._routers
        ):
            raise RuntimeError(
                f"Of {state.tokens} tokens the {self._routers} routers have seen"
                f" {sorted(set(state.seen.values()))}: the auxiliary loss would be of another row."
            )
        tokens_of_one = float(state.tokens if state.times is None else 0)
        sums = [torch.full((1,), tokens_of_one, dtype=torch.float64, device=device)]
        if state.times is not None:
            sums[0] += state.times.sum()
        if self.coefficient:
            assert state.counts is not None and state.probabilities is not None
            sums += [state.counts, state.probabilities]
        sums += [state.load[number] for number in sorted(state.load)]
        whole = torch.cat([x.to(torch.float64) for x in sums])
        if self.ctx.size > 1:
            dist.all_reduce(whole, group=self.ctx.group)
        tokens, *parts = whole.split([len(x) for x in sums])
        state.filled = (tokens[0] > 0).to(torch.float64)
        if self.coefficient:
            state.counts, state.probabilities, *parts = parts
            rows = tokens[0].clamp(min=1) * self._routers
            state.counts = state.counts * (self._experts / rows**2)
            state.aux = (state.counts * state.probabilities).sum()
        state.load = dict(zip(sorted(state.load), parts, strict=True))
        self._last = state

    def join(self, outputs: TokenOutputs) -> TokenOutputs:
        """The same outputs of the row's pass, through which the gradient reaches the routers.
        Called after `row`.
        """
        state = self._last
        if not self.coefficient:
            return outputs
        names = [n for n, x in vars(outputs).items() if x is not None and x.requires_grad]
        if not names:
            return outputs
        tensors = [getattr(outputs, name) for name in names]
        state.aux, *joined = _Join.apply(self, state, state.aux, *tensors)
        return dataclasses.replace(outputs, **dict(zip(names, joined, strict=True)))

    def loss_sum(self, items: int) -> Tensor:
        """coefficient * aux of the last row, once for each of its items; float64."""
        assert self._last.aux is not None
        return self._last.aux * (self.coefficient * items)

    def metrics(self, items: int) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Of the last row, as (sum over items, items): `router_aux_loss`, and as (mean over layers,
        1): `expert_max_load` (the busiest expert's tokens over the mean), `expert_entropy` (of the
        shares, 1 where all are equal), `expert_dead` (share of experts that no token was sent to).
        """
        state = self._last
        out: dict[str, tuple[Tensor, Tensor | float]] = {}
        if state.aux is not None:
            out["router_aux_loss"] = (state.aux.detach() * items, float(items))
        widths = sorted({len(x) for x in state.load.values() if len(x) > 1})
        if widths:
            # [layers, E]: all layers at once, whose kernels take longer to begin than to run
            loads = [torch.stack([x for x in state.load.values() if len(x) == w]) for w in widths]
            shares = [x / x.sum(1, keepdim=True).clamp(min=1) for x in loads]
            busiest = torch.cat([s.amax(1) * s.shape[1] for s in shares]).mean()
            even = [torch.special.entr(s).sum(1) / math.log(s.shape[1]) for s in shares]
            dead = torch.cat([(x == 0).double().mean(1) for x in loads]).mean()
            out["expert_max_load"] = (busiest, state.filled)
            out["expert_entropy"] = (torch.cat(even).mean(), state.filled)
            out["expert_dead"] = (dead * state.filled, state.filled)
        return out

    # ---- hooks -----------------------------------------------------------------------------------

    def _routed(self, number: int, router: nn.Module, args: Any, output: Any) -> Any:
        state, start = self._row, position()
        if state is None or start is None:
            return None
        # dbrx's routers give their logits alone, and the block makes the scores
        alone = isinstance(output, Tensor)
        logits, scores, *others = (output, output) if alone else output
        if state.open:
            self._count(state, number, start, logits.detach())
        if not (torch.is_grad_enabled() and logits.requires_grad):
            return None
        scores = _Inject.apply(scores, logits, state, start)
        return scores if alone else (logits, scores, *others)

    @torch.no_grad()
    def _count(self, state: _RowState, number: int, start: int, logits: Tensor) -> None:
        probabilities = _softmax(logits)
        chosen = probabilities.topk(self._picks, dim=-1).indices
        times = _part(state.times, start, len(logits))
        if times is None:
            counts = _histogram(chosen, None, self._experts)
        else:
            probabilities = probabilities * times[:, None]
            counts = chosen.new_zeros(self._experts, dtype=torch.float32)
            for n in state.several:
                counts = counts + n * _histogram(chosen, times == n, self._experts)
        sums = probabilities.sum(0)
        state.counts = counts if state.counts is None else state.counts + counts
        state.probabilities = sums if state.probabilities is None else state.probabilities + sums
        state.seen[number] = state.seen.get(number, 0) + len(logits)

    @torch.no_grad()
    def _sent(self, number: int, width: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        state, start = self._row, position()
        if state is None or start is None or not state.open:
            return
        chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        times = _part(state.times, start, len(chosen))
        counts = _histogram(chosen, None if times is None else times > 0, width)
        state.load[number] = state.load[number] + counts if number in state.load else counts

    def _over(self, state: _RowState) -> None:
        """At the end of a row's backward pass."""
        if self._row is state:
            self._row = None


def router_loss_coefficient(asked: float | None, config: Any) -> float:
    """The auxiliary loss's coefficient: `moe_aux_loss_coef`, else the model's own where its
    configuration turns `output_router_logits` on, else 0.
    """
    if asked is not None:
        return asked
    text = config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return 0.0
    return float(getattr(text, "router_aux_loss_coef", 0.0) or 0.0)


def _routers_with_loss(inner: Any) -> list[nn.Module]:
    """The routers whose logits transformers' auxiliary loss is made of.

    Raises:
        UserError: this model has none, or its routers do not give logits and scores.
    """
    kind = inner.config.model_type
    module = sys.modules[type(inner).__module__]
    recorded = next(
        (m._can_record_outputs["router_logits"] for m in inner.modules()
         if "router_logits" in (getattr(m, "_can_record_outputs", None) or {})),
        None,
    )  # fmt: skip
    names = ("num_experts", "num_experts_per_tok")
    whole = all(isinstance(getattr(inner, name, None), int) for name in names)
    if not hasattr(module, "load_balancing_loss_func") or recorded is None or not whole:
        raise UserError(
            f"moe_aux_loss_coef: models of type {kind} have no auxiliary loss in transformers. "
            "Leave it out, or set it to 0. (The score bias that balances experts in some "
            "families is not changed.)"
        )
    target = getattr(recorded, "target_class", None)
    # of a router that is trained beside adapters PEFT keeps the original too
    found = [
        module
        for name, module in inner.named_modules()
        if target is not None and type(module) is target and "original_module" not in name
    ]
    if getattr(recorded, "index", None) != 0 or not found or not all(map(is_router, found)):
        raise UserError(
            f"moe_aux_loss_coef: the routers of models of type {kind} do not return their "
            "logits and scores in the usual order, so their auxiliary loss cannot be computed. "
            "Leave it out, or set it to 0."
        )
    return found


def _expert_blocks(inner: nn.Module) -> list[tuple[nn.Module, int]]:
    """The modules that are called with each token's experts, or PEFT's outermost wrappers of them,
    and how many experts they have.
    """
    outermost: dict[int, nn.Module] = {}
    for wrapper in inner.modules():  # an outer module comes before those in it
        if experts.is_wrapper(wrapper):
            base: Any = wrapper.get_base_layer()  # type: ignore[operator]
            outermost.setdefault(id(base), wrapper)
    return [
        (outermost.get(id(m), m), width)
        for m in inner.modules()
        if of_interface(m) and isinstance(width := getattr(m, "num_experts", None), int)
    ]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _part(times: Tensor | None, start: int, length: int) -> Tensor | None:
    return None if times is None else times[start : start + length]


def _histogram(chosen: Tensor, mask: Tensor | None, width: int) -> Tensor:
    """[tokens, K] experts -> [E] how often each occurs at tokens of the mask. Nothing waits for the
    device.
    """
    if mask is not None:
        # not masked_fill, by which routers choose: it is watched where choices are replayed
        chosen = torch.where(mask[:, None], chosen, width)
    chosen = chosen.to(torch.int32 if chosen.is_cuda else torch.float32)
    return torch.histc(chosen, bins=width, min=0, max=width - 1)


class _Join(torch.autograd.Function):
    """(aux, outputs) -> the same. One node, so that aux's gradient is known before any layer's
    backward pass begins.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, routing: Routing, state: _RowState, aux: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.routing, ctx.state = routing, state
        return (aux.clone(), *(x.view_as(x) for x in outputs))

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *gradients: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        ctx.state.slope = slope * ctx.routing.ctx.size
        over: Callable[[], None] = functools.partial(ctx.routing._over, ctx.state)
        torch.autograd.Variable._execution_engine.queue_callback(over)
        return None, None, None, *gradients


class _Inject(torch.autograd.Function):
    """[tokens, K] scores, [tokens, E] logits -> scores; the backward pass adds aux's gradient to
    the logits'. The scores may be the logits themselves.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, scores: Tensor, logits: Tensor, state: _RowState, start: int
    ) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.state, ctx.start = state, start
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        state: _RowState = ctx.state
        if state.slope is None or state.counts is None:
            return gradient, None, None, None
        probabilities = _softmax(logits)
        # of each probability, the same for all tokens: [E]
        each = (state.counts * state.slope).to(probabilities.dtype)
        inner = (probabilities * each).sum(-1, keepdim=True)
        g = probabilities * (each - inner)
        times = _part(state.times, ctx.start, len(logits))
        if times is not None:
            g = g * times[:, None]
        return gradient, g.to(logits.dtype), None, None
