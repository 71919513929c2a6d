"""The specification that `longfactory verify` compares with: each document alone, in transformers'
own model, with plain losses.

Nothing here knows of rows, plans, ranks, hand-written layers or the trainer. A second model is
built from the run's configuration, with its own eager attention, and takes the values of the
trained one. Each tokenised document is given to it as it is; labels are shifted and losses are
written down once more, in a few lines each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longfactory.data.media.load import load_unit
from longfactory.data.media.process import Processing
from longfactory.data.media.units import MediaUnit
from longfactory.data.row import IGNORE, TokenizedDocument
from longfactory.errors import UserError
from longfactory.model import adapters, load
from longfactory.model.vision import document_inputs
from longfactory.sp import hf, routers, vision
from longfactory.sp.distance import difference
from longfactory.stages import losses
from longfactory.stages.losses import DataParallel, LossOptions
from longfactory.stages.pairs import PairLogps
from longfactory.stages.preference import user_preference_loss
from longfactory.train.verify import zero

Item = Sequence[TokenizedDocument]
"""One entry of a data set: the documents of a sample, or of a packed block."""

LOSS_SCALE = 1024.0  # of float16's backward


@dataclasses.dataclass(frozen=True)
class Text:
    """One document as the model reads it alone, after its parents. `targets[t]` is the token to
    predict after `tokens[t]`, or -100.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    before: int
    """Number of tokens that are the parents'."""
    role: str
    sample: int
    media: tuple[MediaUnit, ...] = ()
    """Its images and videos and its parents', with spans from the first token."""

    @property
    def places(self) -> list[int]:
        """Where a token is to be predicted."""
        return [t for t, target in enumerate(self.targets) if target != IGNORE]


def texts_of(item: Item) -> list[Text]:
    """The documents of an item, each with the tokens of its parents in front of it."""
    out = []
    for document in item:
        chain = [document]
        while chain[0].parent >= 0:
            chain.insert(0, item[chain[0].parent])
        tokens = [int(token) for part in chain for token in part.input_ids]
        own = [int(label) for label in document.labels]
        before = len(tokens) - len(own)
        targets = [IGNORE] * before + own[1:] + [IGNORE]
        starts = itertools.accumulate((len(part.input_ids) for part in chain), initial=0)
        media = tuple(
            unit.shifted(start)
            for part, start in zip(chain, starts, strict=False)
            for unit in part.media
        )
        out.append(
            Text(tuple(tokens), tuple(targets), before, document.role, document.sample, media)
        )
    return out


# -- the model -------------------------------------------------------------------------------------


def build(
    cfg: Any,
    tokenizer: Any,
    trained: nn.Module,
    device: torch.device,
    *,
    recompute: bool,
    processing: Processing | None = None,
) -> nn.Module:
    """The run's model once more, in float32 and with transformers' own attention. Its values are
    not the trained one's yet.

    Args:
        recompute: layers are computed again in the backward pass, because eager attention keeps
            [heads, n, n] numbers a layer otherwise.
        processing: of the images in texts; None where there are none.

    Raises:
        UserError: it cannot be loaded, or has other parameters than the model of the run.
    """
    config = load.load_config(cfg.model, cfg.cutoff_len)
    args = cfg.model
    if getattr(config, "quantization_config", None) is None:
        # its values come from the run's model: reading the checkpoint again only takes time
        args = dataclasses.replace(args, train_from_scratch=True)
    state = torch.get_rng_state()
    try:
        model = load.load_model(args, config, torch.float32, attention="eager", device=device)
        model.config.use_cache = False
        new_tokens = load.has_new_tokens(cfg.model, tokenizer)
        if new_tokens:
            load.resize_vocabulary(model, tokenizer)
        inner = model
        if processing is not None:
            vision.let_in(model)
            _processing[model] = processing
        model = adapters.apply_finetuning(model, cfg.method, cfg.model, new_tokens=new_tokens)
    finally:
        torch.set_rng_state(state)
    if hasattr(trained, "v_head"):
        model.v_head = nn.Linear(trained.v_head.in_features, 1)  # type: ignore[union-attr]
    wanted, found = dict(trained.named_parameters()), dict(model.named_parameters())
    if wanted.keys() != found.keys():
        differ = sorted(wanted.keys() ^ found.keys())
        raise UserError(
            "verify loads the model a second time, and it has other parameters:"
            f" {', '.join(differ[:3])}."
        )
    for name, p in found.items():
        p.requires_grad_(wanted[name].requires_grad)
    model = model.float().to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if recompute and inner.supports_gradient_checkpointing:  # transformers' own
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def experts_by(model: nn.Module, implementation: str | None) -> None:
    """How the model's experts are computed: "eager", one after the other, is the only way that has
    float64. None: as they are.
    """
    inner: Any = hf.unwrap(model)
    if implementation is not None and hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation(implementation)


def whole(x: Tensor) -> Tensor:
    """A parameter or gradient that may be sharded, whole. Collective if it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[operator]


@torch.no_grad()
def copy_values(trained: nn.Module, model: nn.Module | None) -> dict[str, torch.dtype]:
    """The trained model's values into `model`, on the process that has one. Collective. Returns the
    dtypes of the run's parameters.

    Buffers that no checkpoint holds (rotary frequencies) follow from the configuration, and are not
    copied: those of the trained model may be wrong.
    """
    parameters = dict(model.named_parameters()) if model is not None else {}
    buffers = {} if model is None else saved_buffers(model)
    dtypes = {}
    for name, p in trained.named_parameters():
        dtypes[name] = p.dtype
        with zero.whole(p):
            value = whole(p.detach())
            if name in parameters:
                parameters[name].copy_(value)
    for name, b in trained.named_buffers():
        if name in buffers and buffers[name].shape == b.shape:
            buffers[name].copy_(whole(b))
    return dtypes


def wrong_frequencies(trained: nn.Module, model: nn.Module) -> list[str]:
    """Rotary frequencies of the trained model that are not those of its configuration, as
    sentences.
    """
    saved, expected = saved_buffers(model), dict(model.named_buffers())
    reasons = []
    for name, found in trained.named_buffers():
        wanted = expected.get(name)
        if name in saved or not name.endswith("inv_freq") or wanted is None:
            continue
        same = found.shape == wanted.shape and torch.allclose(
            found.detach().double().cpu(), wanted.double().cpu(), rtol=1e-2, atol=0.0
        )
        if not same:
            reasons.append(
                f"The rotary frequencies {name} are not those of the model's configuration:"
                " positions are encoded wrongly."
            )
    return reasons[:1]


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a model that its checkpoints hold, by name."""
    derived = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: b for name, b in model.named_buffers() if name not in derived}


@dataclasses.dataclass(frozen=True)
class Precision:
    """How numbers are rounded: the dtype of parameters, or of each by name, and what autocast
    computes in (None: it is off).
    """

    parameters: dict[str, torch.dtype] | torch.dtype = torch.float32
    autocast: torch.dtype | None = None

    @property
    def scale(self) -> float:
        return LOSS_SCALE if self.autocast == torch.float16 else 1.0

    @contextlib.contextmanager
    def of(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        """Inside the block the model computes so. Rounding loses nothing that the run's own
        parameters have.
        """
        before = {name: p.data for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            if p.is_floating_point():
                p.data = p.data.to(
                    self.parameters
                    if isinstance(self.parameters, torch.dtype)
                    else self.parameters[name]
                )
        try:
            with torch.autocast(
                device.type, dtype=self.autocast, enabled=self.autocast is not None
            ):
                yield
        finally:
            for name, p in model.named_parameters():
                p.grad = None
                p.data = before[name]


# -- one document ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Scores:
    """What a loss reads of one text. `logps` [k]: of the k tokens to predict (rm: [1], the value at
    the last token).
    """

    text: Text
    row: int
    logps: Tensor
    entropy: Tensor | None = None
    """[k] nats, of the 20 most probable tokens."""
    reference: Tensor | float | None = None
    """The reference's log-probability of the whole text, or [k] of its tokens."""

    @property
    def length(self) -> int:
        return len(self.text.places)


_processing: weakref.WeakKeyDictionary[nn.Module, Processing] = weakref.WeakKeyDictionary()
"""What makes tensors of the images of texts, by the model that reads them."""


def inputs_of(inner: Any, text: Text, device: torch.device) -> dict[str, Any]:
    """What transformers' own forward is given for a text, with its images."""
    load = functools.partial(load_unit, processing=_processing.get(inner))  # type: ignore[arg-type]
    return document_inputs(inner.config, text.tokens, text.media, load, device)


def read_text(
    model: nn.Module, text: Text, values: bool, entropy: bool, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """([k] log-probabilities of the tokens to predict, their entropy) or, with `values`, ([1] the
    value at the last token, None).
    """
    inner = hf.unwrap(model)
    inputs = inputs_of(inner, text, device)
    if values:
        seen: list[Tensor] = []
        hook = inner.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0])
        )
        try:
            model(**inputs)
        finally:
            hook.remove()
        head: Any = model.v_head
        with torch.autocast(device.type, enabled=False):
            return (
                _wide(
                    F.linear(seen[0][0, -1:].to(head.weight.dtype), head.weight, head.bias)[:, 0]
                ),
                None,
            )
    places = torch.tensor(text.places, dtype=torch.int64, device=device)
    logits = _wide(model(**inputs).logits[0, places])
    labels = torch.tensor([text.targets[t] for t in text.places], dtype=torch.int64, device=device)
    logps = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    if not entropy:
        return logps, None
    top = logits.detach().topk(min(20, logits.shape[-1]), -1).values.log_softmax(-1)
    return logps, -(top.exp() * top).sum(-1)


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


# -- losses ----------------------------------------------------------------------------------------

MicroBatch = list[Scores]
"""The texts of one micro-batch of all data-parallel groups."""


Constant = Callable[[Tensor], Tensor]
"""What is done to numbers that training takes for constants (detached); the identity, to learn how
the value of a loss moves.
"""


def step_loss(
    method: Any, micro_batches: Sequence[MicroBatch], constant: Constant = torch.Tensor.detach
) -> Tensor:
    """The loss of an optimizer step: the sum over all items (tokens, pairs, samples) by their
    number.
    """
    total, items = torch.zeros((), dtype=torch.float64), 0
    rewards: list[Tensor] = []
    for batch in micro_batches:
        if method.stage in ("pt", "sft"):
            total = total + sum(_token_loss(method, scores, constant).cpu() for scores in batch)
            items += sum(scores.length for scores in batch)
        elif method.stage == "kto":
            total = total + _kto(method, batch, constant)
            items += sum(
                scores.text.role != "kl" for scores in batch if scores.text.role != "prompt"
            )
        else:
            pairs = _pairs(batch)
            total = total + (
                _reward(pairs)
                if method.stage == "rm"
                else _preference(method, pairs, rewards, constant)
            )
            items += len(pairs)
    return total / max(items, 1)


def _token_loss(method: Any, scores: Scores, constant: Constant) -> Tensor:
    logps = scores.logps.double()
    if method.stage == "sft" and method.use_dft_loss:
        return -(constant(logps).exp() * logps).sum()
    if method.stage == "sft" and method.use_eaft_loss:
        assert scores.entropy is not None
        return -((scores.entropy / 3) ** method.eaft_alpha * logps).sum()
    return -logps.sum()


def _pairs(batch: MicroBatch) -> list[tuple[Scores, Scores]]:
    """(chosen, rejected) of each sample."""
    chosen = {scores.text.sample: scores for scores in batch if scores.text.role == "chosen"}
    rejected = {scores.text.sample: scores for scores in batch if scores.text.role == "rejected"}
    return [(chosen[sample], rejected[sample]) for sample in chosen]


def _reward(pairs: Sequence[tuple[Scores, Scores]]) -> Tensor:
    return sum(
        (-F.logsigmoid(c.logps[0].double() - r.logps[0].double()).cpu() for c, r in pairs),
        torch.zeros((), dtype=torch.float64),
    )


def _sum(logps: Tensor, alpha: float | None, other: int) -> Tensor:
    """A text's log-probability; with `ld_alpha`, tokens beyond the other answer's length weigh that
    much.
    """
    logps = logps.double().cpu()
    if alpha is None:
        return logps.sum()
    return logps[:other].sum() + alpha * logps[other:].sum()


def _reference_sum(scores: Scores, alpha: float | None = None, other: int = 0) -> float:
    reference = scores.reference
    return (
        float(_sum(reference, alpha, other))
        if isinstance(reference, Tensor)
        else float(reference or 0.0)
    )


def _preference(
    method: Any, pairs: Sequence[tuple[Scores, Scores]], rewards: list[Tensor], constant: Constant
) -> Tensor:
    """The sum over pairs. `rewards` are those of earlier micro-batches, and get this one's."""
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    alpha = method.ld_alpha
    c = torch.stack([_sum(a.logps, alpha, b.length) for a, b in pairs])
    r = torch.stack([_sum(b.logps, alpha, a.length) for a, b in pairs])
    c_ref = r_ref = None
    if pairs[0][0].reference is not None:
        c_ref = torch.tensor(
            [_reference_sum(a, alpha, b.length) for a, b in pairs], dtype=torch.float64
        )
        r_ref = torch.tensor(
            [_reference_sum(b, alpha, a.length) for a, b in pairs], dtype=torch.float64
        )
    lengths = [
        torch.tensor([float(s[i].length) for s in pairs], dtype=torch.float64) for i in (0, 1)
    ]
    beta, smoothing = method.pref_beta, method.dpo_label_smoothing
    numbers = PairLogps(c, r, c_ref, r_ref, *lengths)
    options = LossOptions.of(method)
    user_loss = user_preference_loss(method)
    if user_loss is not None:
        each = user_loss(c, numbers, options, DataParallel())
    elif method.pref_loss == "sigmoid" and c_ref is not None and r_ref is not None:
        margin = beta * ((c - c_ref) - (r - r_ref))
        each = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    else:  # a function of these numbers alone, which its own tests compare with its paper
        each = losses.PREFERENCE_LOSSES[method.pref_loss](numbers, options, DataParallel())
    if method.pref_bco_weight:
        rewards.append(constant(beta * torch.cat([numbers.chosen_ratio, numbers.rejected_ratio])))
        shift = torch.cat(rewards).mean()
        each = (each + method.pref_bco_weight * losses.bco(numbers, options, shift)) / (
            1 + method.pref_bco_weight
        )
    return (each - method.pref_ftx * c / lengths[0].clamp(min=1)).sum()


def _kto(method: Any, batch: MicroBatch, constant: Constant) -> Tensor:
    def ratio(scores: Scores) -> Tensor:
        return scores.logps.double().sum().cpu() - _reference_sum(scores)

    others = [constant(ratio(scores)) for scores in batch if scores.text.role == "kl"]
    kl = torch.stack(others).mean().clamp(min=0) if others else torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for scores in batch:
        if scores.text.role == "chosen":
            total = total + method.kto_chosen_weight * (
                1 - torch.sigmoid(method.pref_beta * (ratio(scores) - kl))
            )
            total = total - method.pref_ftx * scores.logps.double().sum().cpu() / max(
                scores.length, 1
            )
        if scores.text.role == "rejected":
            total = total + method.kto_rejected_weight * (
                1 - torch.sigmoid(method.pref_beta * (kl - ratio(scores)))
            )
    return total


# -- the step --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """One optimizer step over texts."""

    loss: float
    gradients: dict[str, Tensor]
    """Float32 (or wider), on the host. A parameter that nothing reaches has none."""
    logps: list[list[Tensor]]
    """[micro-batch][text] log-probabilities (values)."""
    sensitivity: list[list[Tensor]]
    """[micro-batch][text] how the value of the loss moves with each of them."""
    choices: dict[Text, routers.Choices]
    """Which experts the tokens of each text chose, its parents' first."""
    references: dict[Text, float]
    samples: dict[int, dict[str, Tensor]]
    """[row] a few numbers of each gradient that the row's texts give (`sampled`)."""


SAMPLED = 256
"""Numbers of a parameter's gradient by which the shares of rows are told apart."""


def sampled(g: Tensor) -> Tensor:
    """At most `SAMPLED` numbers of a tensor, spread over it, in float64 on the host."""
    flat = g.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED)
    return flat[::step][:SAMPLED].to("cpu", torch.float64)


Reference = Callable[[Text, float], float]
"""(a text, its log-probability) -> the reference's."""


def run_step(
    model: nn.Module,
    method: Any,
    batches: Sequence[Sequence[Sequence[Text]]],
    precision: Precision,
    device: torch.device,
    *,
    reference: Reference | None,
    adapter_off: bool,
    step: Step | None = None,
) -> Step:
    """Loss and gradients of one optimizer step.

    Args:
        batches: of each micro-batch the texts of each row, one row a data-parallel group.
        reference: gives the reference's number of a text; None where the loss has none or the model
            without its adapter is it.
        adapter_off: the model without its adapter is the reference.
        step: an earlier one, whose expert choices are replayed and whose reference numbers are
            used.
    """
    reader = _Reader(model, method, device, reference, adapter_off, step)
    with precision.of(model, device):
        micro_batches: list[MicroBatch] = []
        for m, rows in enumerate(batches):
            numbered = [(m * len(rows) + g, t) for g, texts in enumerate(rows) for t in texts]
            scored = [reader.scores(text, row) for row, text in numbered]
            micro_batches.append([scores for scores in scored if scores is not None])
        loss = step_loss(method, micro_batches)
        every = [scores for batch in micro_batches for scores in batch]
        leaves = [scores.logps for scores in every]
        moves = iter(_slopes(step_loss(method, micro_batches, lambda x: x), leaves))
        sums = _Sums(model, precision.scale)
        for scores, slope in zip(every, _slopes(loss, leaves), strict=True):
            if slope.any():
                sums.add(scores.row, reader.gradients(scores.text, slope, sums))
    return Step(
        float(loss.detach()),
        {name: g.cpu() for name, g in sums.gradients.items()},
        [[scores.logps.detach().cpu() for scores in batch] for batch in micro_batches],
        [[next(moves).cpu() for _ in batch] for batch in micro_batches],
        reader.passes,
        {scores.text: scores.reference for scores in every if isinstance(scores.reference, float)},
        sums.samples,
    )


class _Sums:
    """Gradients over the texts of a step, whole; and some numbers of each row's own, by row."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self.wanted = [p for _, p in named]
        self.scale = scale
        self.gradients: dict[str, Tensor] = {}
        self.samples: dict[int, dict[str, Tensor]] = {}

    def add(self, row: int, grads: Sequence[Tensor | None]) -> None:
        few = self.samples.setdefault(row, {})
        for name, g in zip(self.names, grads, strict=True):
            if g is None:
                continue
            wide = _wide(g) / self.scale
            for sums, more in ((self.gradients, wide), (few, sampled(wide))):
                sums[name] = sums[name] + more if name in sums else more


class _Reader:
    """Texts through the model, one at a time; `passes`: what its routers chose for each.

    Args: as of `run_step`.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Any,
        device: torch.device,
        reference: Reference | None,
        adapter_off: bool,
        step: Step | None,
    ) -> None:
        self.model, self.device = model, device
        self.reference, self.adapter_off, self.step = reference, adapter_off, step
        self.values = method.stage == "rm"
        self.entropy = bool(method.stage == "sft" and method.use_eaft_loss)
        self.passes: dict[Text, routers.Choices] = {}

    def scores(self, text: Text, row: int) -> Scores | None:
        """What the loss reads of a text, as a leaf of its graph; None where nothing is learnt of
        it: its experts are read by others.
        """
        if self.step is None:
            recorder = routers.record(hf.unwrap(self.model))
        else:
            recorder = _replayed(self.model, self.step.choices, text)
        with torch.no_grad(), recorder as choices:
            logps, bits = read_text(self.model, text, self.values, self.entropy, self.device)
        self.passes[text] = choices if self.step is None else self.step.choices[text]
        if text.role == "prompt" or not (text.places or self.values):
            return None
        number = self._reference_number(text, logps)
        return Scores(text, row, logps.detach().requires_grad_(), bits, number)

    def _reference_number(self, text: Text, logps: Tensor) -> Tensor | float | None:
        if self.adapter_off:
            without: Any = self.model.disable_adapter  # type: ignore[operator]
            with torch.no_grad(), without(), _replayed(self.model, self.passes, text):
                return read_text(self.model, text, False, False, self.device)[0]
        if self.step is not None:
            return self.step.references.get(text)
        if self.reference is not None:
            return self.reference(text, float(logps.double().sum()))
        return None

    def gradients(self, text: Text, slope: Tensor, sums: _Sums) -> Sequence[Tensor | None]:
        """Of the parameters, where `slope` is the loss's gradient in the text's numbers; scaled."""
        with _replayed(self.model, self.passes, text):
            logps, _ = read_text(self.model, text, self.values, False, self.device)
            total = (logps * slope).sum() * sums.scale
            return torch.autograd.grad(total, sums.wanted, allow_unused=True)


def _slopes(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient in each of `leaves`."""
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, grads, strict=True)
    ]


def _replayed(model: nn.Module, choices: dict[Text, routers.Choices], text: Text) -> Any:
    return routers.replay(hf.unwrap(model), choices[text])


def rms(found: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """Root mean square of the differences of all log-probabilities."""
    differences = [
        difference(a, b)
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    return math.sqrt(float((torch.cat(differences) ** 2).mean())) if differences else 0.0
