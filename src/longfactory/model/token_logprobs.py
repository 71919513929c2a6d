"""Log-probabilities of the labels straight from hidden states: the [T, vocab] logits never exist.

The forward of the model's output layer is replaced on the *instance*. It still runs inside
`lm_head.__call__`, so whatever hooks are on the layer (FSDP2's unshard, ZeRO-3's gather, PEFT's
wrapper) see an ordinary call, and the weight found here is whole. Logits are made for a chunk of
tokens at a time, in the forward for the log-sum-exp and again in the backward: two chunk buffers of
`chunk * V` numbers are all that the vocabulary costs. Letters: T local tokens, N trained local
tokens, H hidden size, V vocabulary.

The idea is that of the fused linear cross-entropies (Liger Kernel; Cut Your Losses, arXiv
2411.09009), kept to a value per token so that every loss, not only cross-entropy, can be made from
it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longfactory.errors import UserError
from longfactory.memory.compiled import compiles
from longfactory.model import logit_ops
from longfactory.model.outputs import TokenOutputs
from longfactory.sp.distance import difference
from longfactory.sp.pinned import copied

MADE = {"top1", "entropy", "mean_logit", "mean_logp", "reference_kl", "candidates"}
"""Fields of `TokenOutputs` that are made here."""

# Numbers in a chunk of logits: 2^28 is 1 GiB in fp32. Twice as many where they are in 16 bit alone.
CHUNK_NUMBERS = 2**28


@dataclasses.dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the output layer: `cap * tanh(scale * z / cap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return logit_ops.transformed(z, self.scale, self.softcap)


# Configuration key -> the factor that it puts on logits.
_SCALES = {
    "logit_scale": lambda v: v,  # Cohere
    "lm_head_multiplier": lambda v: v,  # Falcon-H1
    "logits_scaling": lambda v: 1 / v,  # Granite
}


def logit_transform(config: Any) -> LogitTransform:
    """The transform that a transformers configuration describes. `check_head` proves it on the
    model before training.
    """
    text = config.get_text_config()
    scale = 1.0
    for key, factor in _SCALES.items():
        value = getattr(text, key, None)
        if value:
            scale = float(factor(value))
            break
    if getattr(text, "model_type", "") == "hyperclovax" and getattr(text, "logits_scaling", None):
        scale = float(text.logits_scaling)  # this family multiplies
    caps = (getattr(text, key, None) for key in ("final_logit_softcapping", "logits_soft_cap"))
    return LogitTransform(scale, next((cap for cap in caps if cap), None))


@dataclasses.dataclass(frozen=True)
class ReferenceHidden:
    """The reference's next-token distributions at a rank's trained tokens, not yet multiplied out.

    `hidden` is what its output layer was given there, [N, H'] (one row where nothing is trained);
    `head` turns it into logits.
    """

    hidden: Tensor
    head: TokenLogprobs


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is made of each trained token beside the label's log-probability.

    `mean_logit`: the mean of the logits, without gradient. `mean_logp`: the mean log-probability
    over the vocabulary. `candidates` [N, K]: vocabulary entries whose log-probabilities are given.
    """

    mean_logit: bool = False
    mean_logp: bool = False
    candidates: Tensor | None = None


@dataclasses.dataclass
class Made:
    """Of each trained token: what the output layer made, [N] (`candidates` [N, K]); None where it
    was not asked for.
    """

    logps: Tensor
    top1: Tensor
    kl: Tensor | None = None
    mean_logit: Tensor | None = None
    mean_logp: Tensor | None = None
    candidates: Tensor | None = None


# A slice of the trained tokens -> the reference's logits there, [n, V], a buffer that may be
# overwritten.
_LogitsOf = Callable[[slice], Tensor]


class _ChunkedLogps(torch.autograd.Function):
    """[T, H] hidden, [V, H] weight, [N] labels -> [N] log-probabilities in fp32 (fp64 for fp64),
    [N] whether the label is the top token, with a `reference` [N] KL(reference || policy), and what
    is `wanted`: [N] the mean of the logits, [N] the mean log-probability, [N, K] log-probabilities
    of candidates; else None.

    `rows` [N] are the rows of the hidden states that have a label, None for all: they are picked a
    chunk at a time, without a copy of all.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: Tensor | None,
        transform: LogitTransform,
        chunk: int,
        grad_dtype: torch.dtype,
        reference: _LogitsOf | None,
        wanted: Wanted,
    ) -> tuple[Tensor | None, ...]:
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        logps = torch.empty(labels.shape[0], dtype=wide, device=h.device)
        lse = torch.empty_like(logps)
        top1 = torch.empty(labels.shape[0], dtype=torch.bool, device=h.device)
        kl, reference_lse = (
            (torch.empty_like(logps), torch.empty_like(logps))
            if reference is not None
            else (None, None)
        )
        mean = torch.empty_like(logps) if wanted.mean_logit else None
        mean_logp = torch.empty_like(logps) if wanted.mean_logp else None
        ids = wanted.candidates
        picked = None if ids is None else logps.new_empty(ids.shape)
        for i in range(0, labels.shape[0], chunk):
            s = slice(i, i + chunk)
            z = F.linear(h[s] if rows is None else h[rows[s]], weight, bias)
            if reference is None and wanted == Wanted():
                lse[s], label, most = logit_ops.statistics(
                    z, labels[s], transform.scale, transform.softcap
                )
                logps[s] = label - lse[s]
                top1[s] = label >= most
                continue
            z = transform(z.to(wide))
            label = z.gather(1, labels[s, None])[:, 0]
            lse[s] = z.logsumexp(1)
            logps[s] = label - lse[s]
            top1[s] = label >= z.amax(1)
            if mean is not None:
                mean[s] = z.mean(1)
            if mean_logp is not None:
                mean_logp[s] = z.mean(1) - lse[s]
            if picked is not None and ids is not None:
                picked[s] = z.gather(1, ids[s]) - lse[s, None]
            if reference is not None and kl is not None and reference_lse is not None:
                r = reference(s)
                reference_lse[s] = r.logsumexp(1)
                # Logarithms first, then their difference: where both distributions are the same, it
                # is 0 and not a rounding error.
                r -= reference_lse[s, None]
                z.sub_(lse[s, None]).neg_().add_(r)
                kl[s] = r.exp_().mul_(z).sum(1)
                del r
            del z
        ctx.save_for_backward(h, weight, bias, labels, lse, rows, reference_lse, ids)
        ctx.transform, ctx.chunk, ctx.grad_dtype, ctx.reference = (
            transform,
            chunk,
            grad_dtype,
            reference,
        )
        ctx.mark_non_differentiable(top1, *(() if mean is None else (mean,)))
        return logps, top1, kl, mean, mean_logp, picked

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        g: Tensor,
        _: Tensor | None,
        g_kl: Tensor | None,
        __: Tensor | None,
        g_mean: Tensor | None,
        g_picked: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        h, weight, bias, labels, lse, rows, reference_lse, ids = ctx.saved_tensors
        transform, wide = ctx.transform, lse.dtype
        needs_h, needs_w, needs_b = ctx.needs_input_grad[:3]
        gh = None
        if needs_h:
            gh = torch.empty_like(h) if rows is None else torch.zeros_like(h)
        # The weight's gradient is a sum over chunks: kept in fp32, else its error would grow with
        # length.
        gw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_w else None
        gb = torch.zeros(bias.shape, dtype=wide, device=weight.device) if needs_b else None
        for i in range(0, labels.shape[0], ctx.chunk):
            s = slice(i, i + ctx.chunk)
            hs = h[s] if rows is None else h[rows[s]]
            z = F.linear(hs, weight, bias)
            plain = g_kl is None and g_mean is None and g_picked is None and gb is None
            if plain:
                p = logit_ops.label_gradient(
                    z, lse[s], labels[s], g[s], transform.scale, transform.softcap
                )
                _multiplied(p, weight, hs, s, rows, gh, gw)
                del z, p, hs
                continue
            z = z.to(wide)
            slope = transform.scale
            if transform.softcap:
                t = torch.tanh(z * (transform.scale / transform.softcap))
                z = transform.softcap * t
                slope = transform.scale * (1 - t * t)
            elif transform.scale != 1.0:
                z = z * transform.scale
            p = z.sub_(lse[s, None]).exp_()
            q = None
            if ctx.reference is not None and g_kl is not None:
                # d KL / dz = softmax(z) - softmax(r)
                q = ctx.reference(s).sub_(reference_lse[s, None]).exp_().neg_().add_(p)
                q *= g_kl[s, None]
            # d logp / dz = onehot(label) - softmax(z); of candidates likewise; of the mean
            # log-probability 1/V - softmax(z)
            softmaxes = g[s]
            if g_mean is not None:
                softmaxes = softmaxes + g_mean[s]
            if g_picked is not None and ids is not None:
                softmaxes = softmaxes + g_picked[s].sum(1)
            p *= -softmaxes[:, None]
            p.scatter_add_(1, labels[s, None], g[s, None])
            if g_mean is not None:
                p += g_mean[s, None] / p.shape[1]
            if g_picked is not None and ids is not None:
                p.scatter_add_(1, ids[s], g_picked[s])
            if q is not None:
                p += q
                del q
            if transform.softcap or transform.scale != 1.0:
                p *= slope
            if gb is not None:
                gb += p.sum(0)
            p = p.to(h.dtype)
            _multiplied(p, weight, hs, s, rows, gh, gw)
            del z, p, hs
        return (
            gh,
            gw.to(ctx.grad_dtype) if gw is not None else None,
            gb.to(ctx.grad_dtype) if gb is not None else None,
            *(None,) * 7,
        )


def _wide(transform: LogitTransform, z: Tensor) -> Tensor:
    """Logits of the output layer -> the model's logits, in fp32 (fp64 for fp64)."""
    return transform(z.to(torch.float64 if z.dtype == torch.float64 else torch.float32))


def _multiplied(
    p: Tensor,
    weight: Tensor,
    hs: Tensor,
    s: slice,
    rows: Tensor | None,
    gh: Tensor | None,
    gw: Tensor | None,
) -> None:
    """From the gradient of a chunk's logits, p [n, V]: that of its hidden states hs [n, H], written
    into `gh`, and the weight's, added to `gw`.
    """
    if gh is not None and rows is None:
        torch.mm(p, weight, out=gh[s])
    elif gh is not None:
        assert rows is not None
        gh[rows[s]] = p @ weight
    if gw is not None:
        logit_ops.add_product(gw, p.t(), hs)


class TokenLogprobs:
    """Takes over a model's output layer. Outside `labels(...)` the layer behaves as before.

    Args:
        model: a transformers model with an output embedding (possibly wrapped by PEFT, not yet by
            FSDP, DDP or DeepSpeed).
        chunk: tokens whose logits exist at a time; by default as many as make `CHUNK_NUMBERS`
            numbers.
        needs: fields of TokenOutputs that a loss reads beside the log-probabilities
            (`Stage.needs`).

    Raises:
        UserError: a need that is not made here.
        ValueError: the model has no output layer.
    """

    def __init__(self, model: Any, chunk: int | None = None, needs: frozenset[str] = frozenset()):
        if unknown := sorted(needs - MADE):
            raise UserError(
                f"This loss needs {', '.join(unknown)}, which the output layer does not make."
            )
        self.needs = needs
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{type(model).__name__} has no output layer (get_output_embeddings() is None):"
                " there is nothing to take token log-probabilities from. Use a causal language"
                " model."
            )
        self.head = head
        self.transform = logit_transform(model.config)
        self.chunk = chunk
        self._forward = head.forward
        self._plain = type(head) is nn.Linear
        self._labels: Tensor | None = None
        self._trained: Tensor | None = None
        self._reference: ReferenceHidden | None = None
        self._candidates: Tensor | None = None
        # what the layer was given at the trained tokens, while `hidden` is open
        self._picked: Tensor | None = None
        self._picking = False
        self._out: TokenOutputs | None = None
        self._logits_too = False
        head.forward = self._fused

    def release(self) -> None:
        """Gives the layer its own forward back."""
        self.head.__dict__.pop("forward", None)
        if self.head.forward != self._forward:
            self.head.forward = self._forward

    @contextlib.contextmanager
    def labels(
        self,
        labels: Tensor,
        reference: ReferenceHidden | None = None,
        candidates: Tensor | None = None,
    ) -> Iterator[TokenLogprobs]:
        """While open, a forward of the model computes the log-probabilities of `labels`.

        Args:
            labels: [T] on the host, -100 where nothing is predicted. On the host so that the
                trained positions are known without waiting for the device; untrained positions then
                cost nothing.
            reference: of a forward on the same tokens and labels (`hidden`); the outputs then have
                `reference_kl`. Where it is this very head's, the reference is the layer without its
                adapter.
            candidates: [T, K] on the host, vocabulary entries at each position; the outputs then
                have their log-probabilities.
        """
        trained = torch.nonzero(labels >= 0)[:, 0]
        if reference is not None and reference.hidden.shape[0] != max(1, trained.numel()):
            raise RuntimeError(
                f"The reference has hidden states of {reference.hidden.shape[0]} tokens, the labels"
                f" {trained.numel()}."
            )
        self._trained, self._labels, self._out, self._reference = (
            trained,
            labels[trained],
            None,
            reference,
        )
        self._candidates = None if candidates is None else candidates[trained]
        try:
            yield self
        finally:
            self._trained = self._labels = self._out = self._reference = None
            self._candidates = None

    @contextlib.contextmanager
    def hidden(self, labels: Tensor) -> Iterator[Callable[[], ReferenceHidden]]:
        """While open, a forward of the model stops before its output layer; the function given then
        says what the layer was given.

        Args:
            labels: as in `labels`.
        """

        def result() -> ReferenceHidden:
            if self._picked is None:
                raise RuntimeError("The model's forward did not call its output layer.")
            return ReferenceHidden(self._picked, self)

        self._picking = True
        try:
            with self.labels(labels):
                yield result
        finally:
            self._picking, self._picked = False, None

    def outputs(self, model_logits: Tensor | None = None) -> TokenOutputs:
        """The result of the last forward: [T] log-probabilities (0 where nothing is predicted) and
        whether each label was the top token.

        `model_logits` (what the model returned in place of logits) is tied in with weight zero, so
        that wrappers that watch a module's outputs see them used.
        """
        if self._out is None:
            raise RuntimeError(
                "The model's forward did not call its output layer, so no log-probabilities were"
                " made."
            )
        out = self._out
        if model_logits is not None and model_logits.requires_grad:
            out = dataclasses.replace(
                out, logps=out.logps + 0.0 * model_logits.float().sum().to(out.logps.dtype)
            )
        return out

    def _fused(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._labels is None or self._trained is None:
            return self._forward(hidden, *args, **kwargs)
        h = hidden.reshape(-1, hidden.shape[-1])
        trained, labels = self._trained, self._labels
        nothing = trained.numel() == 0
        if nothing:
            # A rank without a trained token still takes part in the graph and in every collective
            # of the layer: one token, weight zero.
            trained, labels = trained.new_zeros(1), labels.new_zeros(1)
        trained = copied(trained, h.device)
        if self._picking:
            self._picked = h.detach().index_select(0, trained)
            return h.new_zeros(*hidden.shape[:-1], 1)
        labels = copied(labels, h.device)
        candidates = self._candidates
        if candidates is not None:
            if nothing:
                candidates = candidates.new_zeros(1, candidates.shape[1])
            candidates = copied(candidates, h.device)
        wanted = Wanted("mean_logit" in self.needs, "mean_logp" in self.needs, candidates)
        rows = None if trained.numel() == h.shape[0] else trained
        made = self._logps(h, labels, rows, wanted)
        entropy = None
        if "entropy" in self.needs:
            entropy = self._entropy(h.detach().index_select(0, trained)).to(made.logps.dtype)

        def spread(values: Tensor | None) -> Tensor | None:
            """[N, ...] of trained tokens -> [T, ...], 0 elsewhere."""
            if values is None:
                return None
            if nothing:
                values = values * 0 if values.is_floating_point() else torch.zeros_like(values)
            return values.new_zeros(h.shape[0], *values.shape[1:]).index_copy(0, trained, values)

        full = spread(made.logps)
        assert full is not None
        self._out = TokenOutputs(
            logps=full,
            top1=spread(made.top1),
            entropy=spread(entropy),
            mean_logit=spread(made.mean_logit),
            mean_logp=spread(made.mean_logp),
            reference_kl=spread(made.kl),
            candidates=spread(made.candidates),
        )
        if self._logits_too:
            # What the model does to its logits is then computed in float32, as in the chunks.
            logits = self._forward(hidden, *args, **kwargs)
            return logits if logits.dtype == torch.float64 else logits.float()
        return full.view(*hidden.shape[:-1], 1)

    def _logps(self, h: Tensor, labels: Tensor, rows: Tensor | None, wanted: Wanted) -> Made:
        numbers = CHUNK_NUMBERS
        if self._reference is not None:
            numbers //= 2  # two distributions at once, in the memory of one
        elif self._narrow(h) and wanted == Wanted():
            numbers *= 2
        chunk = self.chunk or max(128, numbers // self._vocabulary())
        if self._plain:
            weight, bias = self.head.weight, self.head.bias
            dtype = weight.dtype
            # Autocast is off in a backward; so the cast that it would make is made here, once.
            if torch.is_autocast_enabled(h.device.type):
                low = torch.get_autocast_dtype(h.device.type)
                h, weight, bias = h.to(low), weight.to(low), None if bias is None else bias.to(low)
            elif h.dtype != dtype:
                h = h.to(dtype)
            reference = self._reference_logits(weight, bias)
            with torch.autocast(h.device.type, enabled=False):
                return Made(
                    *_ChunkedLogps.apply(
                        h,
                        weight,
                        bias,
                        labels,
                        rows,
                        self.transform,
                        chunk,
                        weight.dtype,
                        reference,
                        wanted,
                    )
                )
        # LoRA on the head, modules_to_save, quantised weights: the layer's own forward, a chunk at
        # a time, recomputed in the backward.
        h = h if rows is None else h.index_select(0, rows)
        reference = self._reference_logits()
        parts = [
            checkpoint(
                self._generic,
                h[s],
                labels[s],
                s,
                reference,
                wanted,
                use_reentrant=False,
                preserve_rng_state=True,
            )
            for s in (slice(i, i + chunk) for i in range(0, h.shape[0], chunk))
        ]
        joined = [None if of[0] is None else torch.cat(of) for of in zip(*parts, strict=True)]
        return Made(*joined)  # type: ignore[arg-type]

    def _generic(
        self, h: Tensor, labels: Tensor, s: slice, reference: _LogitsOf | None, wanted: Wanted
    ) -> tuple[Tensor | None, ...]:
        z = _wide(self.transform, self._forward(h))
        label, lse = z.gather(1, labels[:, None])[:, 0], z.logsumexp(1)
        kl, ids = None, wanted.candidates
        if reference is not None:
            with torch.no_grad():
                r = reference(s)
                r -= r.logsumexp(1, keepdim=True)
            kl = (r.exp() * (r - (z - lse[:, None]))).sum(1)
        return (
            label - lse,
            label.detach() >= z.detach().amax(1),
            kl,
            z.detach().mean(1) if wanted.mean_logit else None,
            z.mean(1) - lse if wanted.mean_logp else None,
            None if ids is None else z.gather(1, ids[s]) - lse[:, None],
        )

    def _reference_logits(
        self, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> _LogitsOf | None:
        """The reference's logits of some trained tokens, made anew at each call: in the forward and
        again in the backward.

        Args:
            weight, bias: this layer's, as the policy uses them: those of the reference too, where
                it is the same model.
        """
        if self._reference is None:
            return None
        hidden, head = self._reference.hidden, self._reference.head
        if head is not self or weight is None:
            weight, bias = (head.head.weight, head.head.bias) if head._plain else (None, None)
            if weight is not None and torch.is_autocast_enabled(hidden.device.type):
                low = torch.get_autocast_dtype(hidden.device.type)
                weight, bias = weight.to(low), None if bias is None else bias.to(low)
        if weight is not None:
            hidden = hidden.to(weight.dtype)
        layer = head._without_adapter() if weight is None else None

        @torch.no_grad()
        def logits(s: slice) -> Tensor:
            z = F.linear(hidden[s], weight, bias) if weight is not None else layer(hidden[s])  # type: ignore[misc]
            return _wide(head.transform, z)

        return logits

    def _logits_of(self, hidden: ReferenceHidden) -> _LogitsOf:
        """The logits of some tokens of `hidden`, whose model this layer is of."""
        self._reference = hidden
        try:
            own = (self.head.weight, self.head.bias) if self._plain else (None, None)
            logits = self._reference_logits(*own)
        finally:
            self._reference = None
        assert logits is not None
        return logits

    def _without_adapter(self) -> Callable[[Tensor], Tensor]:
        """The forward of the layer that PEFT wrapped, or the layer's own."""
        for name in ("base_layer", "original_module"):
            inner = getattr(self.head, name, None)
            if isinstance(inner, nn.Module):
                return inner
        return self._forward

    @torch.no_grad()
    def _entropy(self, h: Tensor) -> Tensor:
        """[N, H] -> [N] entropy of the 20 most probable tokens, renormalised. One more pass of the
        output layer, a chunk at a time.
        """
        chunk = self.chunk or max(128, CHUNK_NUMBERS // self._vocabulary())
        parts = []
        for part in h.split(chunk):
            z = _wide(self.transform, self._forward(part))
            top = z.topk(min(20, z.shape[1])).values.log_softmax(1)
            parts.append(-(top.exp() * top).sum(1))
        return torch.cat(parts)

    def _narrow(self, h: Tensor) -> bool:
        """Whether a chunk of logits exists in 16 bit alone: `logit_ops` is compiled."""
        kind, dtype = h.device.type, self.head.weight.dtype if self._plain else torch.float32
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        narrow = dtype in (torch.bfloat16, torch.float16)
        return self._plain and self.head.bias is None and narrow and compiles(h)

    def _vocabulary(self) -> int:
        out = getattr(self.head, "out_features", None)
        return int(out) if out else int(self.head.weight.shape[0])


@torch.no_grad()
def top_candidates(hidden: ReferenceHidden, k: int, limit: int) -> tuple[Tensor, Tensor]:
    """([N, k] the most probable entries of the vocabulary, [N, k] their log-probabilities), most
    probable first, of a model stopped before its output layer. Logits are made a chunk at a time.

    Args:
        limit: entries from this number on are not taken (another model does not have them).
    """
    head = hidden.head
    chunk = head.chunk or max(128, CHUNK_NUMBERS // head._vocabulary())
    logits = head._logits_of(hidden)
    ids, logps = [], []
    for start in range(0, hidden.hidden.shape[0], chunk):
        z = logits(slice(start, start + chunk))
        top = z[:, :limit].topk(k)
        ids.append(top.indices)
        logps.append(top.values - z.logsumexp(1, keepdim=True))
    return torch.cat(ids), torch.cat(logps)


HEAD_TOLERANCE = 1e-3
"""Nats, in every precision."""


@torch.no_grad()
def check_head(model: Any, head: TokenLogprobs, inputs: dict[str, Any], labels: Tensor) -> float:
    """Compares the chunked log-probabilities with those of the model's own logits, in one forward
    over a few tokens.

    Args:
        inputs: what the model's forward takes, [1, T].
        labels: [T] on the host.
    Returns:
        The median difference, in nats.
    Raises:
        ValueError: they differ: the model does something to its logits that is not known here.
    """
    head._logits_too = True
    try:
        with head.labels(labels):
            logits = model(**inputs).logits[0]
            got = head.outputs().logps
    finally:
        head._logits_too = False
    trained = torch.nonzero(labels >= 0)[:, 0].to(logits.device)
    want = torch.log_softmax(logits[trained].float(), -1).gather(
        1, labels.to(logits.device)[trained][:, None]
    )[:, 0]
    error = difference(got[trained], want).abs().median().item() if want.numel() else 0.0
    # Both come from the same product in the same precision; its roundings differ in few tokens,
    # which a median does not see.
    if not error <= HEAD_TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} transforms its logits in a way that LongFactory does not "
            f"know: log-probabilities differ by {error:.3g} from the model's own on a short "
            "text. This model cannot be trained exactly here; please report its name."
        )
    return error
