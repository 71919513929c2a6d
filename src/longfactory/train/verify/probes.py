"""What `longfactory verify` looks at while the run's own step is made: how many tokens each layer
computes, which tokens give a gradient, and what a token's log-probability depends on.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longfactory.data.row import IGNORE, Document, Row
from longfactory.sp.text_model import decoder_layers
from longfactory.train.trainer import RowTrainer
from longfactory.train.verify.alone import Text
from longfactory.train.verify.report import Check

NO_CHANGE = 1e-3
"""A change that is less than this share of what a changed token does to its own log-probability is
rounding: kernels of experts group tokens by what other tokens are.
"""

LAYERS, ROWS_OF_DATA, MASK = "tokens of each layer", "rows and labels", "untrained tokens"
LEAK, WINDOW, SAVED = "documents and later tokens", "windows", "adapters"

Reason = tuple[str, str]
"""The check that fails, and the sentence that says why."""


# -- the layers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_layers(model: nn.Module, counts: dict[int, set[int]]) -> Iterator[None]:
    """Inside the block every call of a decoder layer adds its number of tokens to `counts`."""
    _, layers = decoder_layers(model)

    def count(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                counts.setdefault(index, set()).add(hidden.shape[-2])

        return hook

    hooks = [
        layer.register_forward_pre_hook(count(i), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_reason(counts: dict[int, set[int]], length: int, size: int, number: int) -> str | None:
    """What is wrong with the numbers of tokens that layers computed of a row of `length`, or
    None.
    """
    expected = length // size
    wrong = {i: found for i, found in counts.items() if found != {expected}}
    if not wrong:
        return None
    layer = min(wrong)
    return (
        f"Layer {layer + 1} computed {', '.join(map(str, sorted(wrong[layer])))} of the {length}"
        f" tokens of row {number} ({len(wrong)} layers did not compute {expected}); with"
        f" sequence_parallel_size: {size} it is {expected}."
    )


# -- which tokens give a gradient ------------------------------------------------------------------


@dataclasses.dataclass
class TrainedPlaces:
    """Where the loss of a row moves with the output of the model."""

    outputs: list[int] = dataclasses.field(default_factory=list)
    """Tokens of the row whose log-probability (value) the loss has a gradient in."""
    hidden: list[int] = dataclasses.field(default_factory=list)
    """Tokens of the row, of this rank, whose last hidden state it has a gradient in."""


def watch_outputs(logps: Tensor, into: TrainedPlaces) -> None:
    """Notes where the gradient of [T] log-probabilities is not zero."""
    if logps.requires_grad:
        logps.register_hook(lambda g: into.outputs.extend(g.nonzero().flatten().tolist()))


@contextlib.contextmanager
def watched_hidden(head: nn.Module, index: Tensor, into: TrainedPlaces) -> Iterator[None]:
    """Inside the block the gradient of what the output layer is given, [1, T/n, H], is noted. T/n
    `index`: the tokens' places in the row.
    """

    def before(module: nn.Module, args: Any) -> None:
        def note(g: Tensor) -> None:
            moved = (g.detach().reshape(len(index), -1) != 0).any(-1)
            into.hidden.extend(index[moved.cpu()].tolist())

        if args and args[0].requires_grad:
            args[0].register_hook(note)

    hook = head.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def mask_reason(
    found: TrainedPlaces, row: Row, texts: Sequence[Text], number: int, values: bool
) -> str | None:
    """Tokens that give a gradient though their documents do not train them, or None. Labels are
    those of the tokenised documents, shifted by `texts`.
    """
    documents = [d for d in row.documents if d.role != "pad"]
    allowed: set[int] = set()
    for d, text in zip(documents, texts, strict=False):
        own = [len(text.tokens) - 1] if values else text.places
        allowed.update(d.start + t - text.before for t in own)
    for what, places in (
        ("log-probability", found.outputs),
        ("last hidden state", found.hidden),
    ):
        if wrong := sorted(set(places) - allowed):
            return (
                f"The loss has a gradient in the {what} of {len(wrong)} tokens of row {number}"
                f" whose label is {IGNORE}, the first of them {_place(row, wrong[0])}: they are"
                " trained."
            )
    return None


def _place(row: Row, token: int) -> str:
    d = next((i for i, d in enumerate(row.documents) if d.start <= token < d.stop), None)
    if d is None or row.documents[d].role == "pad":
        return f"token {token + 1} of the row, which is padding"
    return f"token {token - row.documents[d].start + 1} of document {d + 1}"


# -- what a log-probability depends on -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Leak:
    """What became of the log-probabilities of a row when some of its tokens were changed."""

    own: float
    """Largest change at or after a changed token of the same document."""
    others: float
    """Largest change where nothing may change."""
    where: str
    """Of the largest change."""
    changed: str
    """Subject and verb of what was changed."""
    noise: float
    """Largest difference of two passes over the same tokens."""

    @property
    def exercised(self) -> bool:
        return self.own > 4 * self.noise

    @property
    def found(self) -> bool:
        return self.others > max(4 * self.noise, NO_CHANGE * self.own)


def leaves(row: Row) -> list[int]:
    """The documents of which no other is a branch."""
    parents = {d.parent for d in row.documents}
    return [i for i, d in enumerate(row.documents) if d.role != "pad" and i not in parents]


def cut_of(d: Document, borders: Sequence[int]) -> int:
    """A token inside a document, at a border of ranks if there is one."""
    middle = (d.start + d.stop + 1) // 2
    inside = [b for b in borders if d.start + 1 < b < d.stop]
    return min(inside, key=lambda b: abs(b - middle)) if inside else middle


def changed_tokens(row: Row, places: Tensor) -> Tensor:
    """[T] the row's tokens, those at `places` taken from elsewhere in the row."""
    real = row.real_tokens
    ids = row.input_ids.clone()
    ids[places] = row.input_ids[(places + max(1, real // 3)) % real]
    return ids


@torch.no_grad()
def leaks(trainer: RowTrainer, row: Row, borders: Sequence[int]) -> tuple[Leak | None, Leak]:
    """(when every other document is changed, None where the row has one; when the end of every
    document is). Four passes of the run's own model over one row. Collective: every rank of a group
    has the same row, and every group as many passes.
    """
    probe = dataclasses.replace(row, labels=row.input_ids.clone())

    def scores(ids: Tensor) -> Tensor:
        with trainer.compute_loss_context_manager():
            out = trainer.token_outputs(
                trainer.model_wrapped, dataclasses.replace(probe, input_ids=ids)
            )
        return out.logps.detach().double().cpu()

    before, again = scores(row.input_ids), scores(row.input_ids)
    noise = float((before - again).abs().max())
    real, ends = row.real_tokens, leaves(row)
    every = torch.arange(len(row))

    def compared(places: Tensor, after: Tensor, told: str) -> Leak:
        """`after`: tokens whose log-probability may change."""
        change = (scores(changed_tokens(row, places)) - before).abs()
        change[~torch.isfinite(change)] = float("inf")
        fixed = torch.ones(len(row), dtype=torch.bool)
        fixed[after] = False
        fixed[real:] = False
        others = change * fixed
        worst = int(others.argmax())
        return Leak(
            float(change[after].max()), float(others.max()), _place(row, worst), told, noise
        )

    some = [row.documents[i] for i in ends[::2]]
    whole = torch.cat([every[d.start : d.stop] for d in some])
    numbers = ", ".join(str(i + 1) for i in ends[::2][:4])
    told = f"documents {numbers} are" if len(some) > 1 else f"document {numbers} is"
    documents = compared(whole, whole, told)
    cuts = [(row.documents[i], cut_of(row.documents[i], borders)) for i in ends]
    later = torch.cat([every[cut : d.stop] for d, cut in cuts])
    future = compared(later, later, "later tokens of its document are")
    return (documents if len(ends) > 1 else None), future


def leak_check(found: Sequence[tuple[int, Leak | None, Leak]]) -> tuple[Check, list[str]]:
    """The check, and what is wrong in sentences. `found`: (number of the row, what `leaks`
    gave).
    """
    reasons, exercised = [], [False, False]
    for number, documents, future in found:
        if documents is not None and documents.found:
            reasons.append(
                f"Documents see each other: in row {number} the log-probability of"
                f" {documents.where} moves by {documents.others:.2g} when {documents.changed}"
                " changed."
            )
        elif future.found:  # else it may be the other documents' later tokens
            reasons.append(
                f"Later tokens are seen: in row {number} the log-probability of"
                f" {future.where} moves by {future.others:.2g} when {future.changed} changed."
            )
        exercised[0] |= documents is not None and documents.exercised
        exercised[1] |= future.exercised
    if reasons:
        return Check(LEAK, "failed", reasons[0]), reasons
    if not exercised[1]:
        return Check(LEAK, "not exercised", "changing a token has no effect in this model"), []
    if not exercised[0]:
        return Check(LEAK, "passed", "later tokens move no earlier ones (one document a row)"), []
    largest = max(leak.others for _, a, b in found for leak in (a, b) if leak is not None)
    own = max(future.own for _, _, future in found)
    return (
        Check(
            LEAK,
            "passed",
            f"changing them moves log-probabilities of other tokens by {largest:.1e}, of their "
            f"own by {own:.1e}",
        ),
        [],
    )
