"""What the trainer does in the step that is compared: noted as it happens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longfactory import sp
from longfactory.data.row import Row
from longfactory.sp import hf, routers
from longfactory.train.trainer import RowTrainer
from longfactory.train.verify.alone import Text
from longfactory.train.verify.probes import (
    LAYERS,
    MASK,
    ROWS_OF_DATA,
    Leak,
    Reason,
    TrainedPlaces,
    counted_layers,
    layer_reason,
    leaks,
    mask_reason,
    watch_outputs,
    watched_hidden,
)
from longfactory.train.verify.rows import row_reason


@dataclasses.dataclass
class Seen:
    """What this process saw of the step."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    """[T] of each row: what the loss was given."""
    local: list[int] = dataclasses.field(default_factory=list)
    """Tokens of each row that went into the model here."""
    layers: list[dict[int, set[int]]] = dataclasses.field(default_factory=list)
    """Of each row how many tokens the decoder layers were called with."""
    trained: list[TrainedPlaces] = dataclasses.field(default_factory=list)
    leaks: list[tuple[int, Leak | None, Leak]] = dataclasses.field(default_factory=list)

    def clear(self) -> None:
        """Another step begins."""
        for field in dataclasses.fields(self):
            getattr(self, field.name).clear()


def watch_step(
    trainer: RowTrainer,
    seen: Seen,
    choices: Mapping[Text, routers.Choices],
    installed: contextlib.ExitStack,
) -> None:
    """Notes rows, the model's inputs and what the loss was given; and replays the experts of the
    specification.

    Args:
        seen: gets what is noted.
        choices: of experts, by the specification.
        installed: takes away what is put on the trainer and its model.
    """
    inner = hf.unwrap(trainer.model_wrapped)
    training_step, token_outputs = trainer.training_step, trainer.token_outputs
    step: list[tuple[Row, contextlib.ExitStack]] = []

    def watched_step(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        seen.rows.append(inputs["row"])
        seen.trained.append(TrainedPlaces())
        with contextlib.ExitStack() as stack:
            step.append((inputs["row"], stack))
            try:
                return training_step(model, inputs, *args, **kwargs)
            finally:
                step.pop()

    def watched_outputs(*args: Any, **kwargs: Any) -> Any:
        outputs = token_outputs(*args, **kwargs)
        if step and torch.is_grad_enabled() and len(seen.outputs) < len(seen.rows):
            seen.outputs.append(outputs.logps.detach().cpu())
            watch_outputs(outputs.logps, seen.trained[-1])
        return outputs

    def before_forward(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not step or len(seen.local) == len(seen.rows):
            return
        row, stack = step[-1]
        seen.local.append(kwargs["input_ids"].shape[1])
        seen.layers.append({})
        stack.enter_context(counted_layers(module, seen.layers[-1]))
        # A pass of the reference may come first: it notes nothing, for want of gradients.
        index, head = kwargs["sp_plan"].index, module.get_output_embeddings()
        stack.enter_context(watched_hidden(head, index, seen.trained[-1]))
        chosen = row_choices(row, choices)
        if chosen.tokens is not None:
            stack.enter_context(routers.replay(module, chosen.take(kwargs["sp_plan"].index)))

    trainer.training_step = watched_step  # type: ignore[method-assign]
    trainer.token_outputs = watched_outputs  # type: ignore[method-assign]
    installed.callback(trainer.__dict__.pop, "training_step")
    installed.callback(trainer.__dict__.pop, "token_outputs")
    hook = inner.register_forward_pre_hook(before_forward, with_kwargs=True)
    installed.callback(hook.remove)


def row_choices(row: Row, choices: Mapping[Text, routers.Choices]) -> routers.Choices:
    """Which experts the tokens of a row chose, by what their documents hold."""
    known = {(text.tokens, text.before): chosen for text, chosen in choices.items()}
    parts: list[routers.Choices | int] = []
    for d in row.documents:
        chain = [d]
        while chain[0].parent >= 0:
            chain.insert(0, row.documents[chain[0].parent])
        tokens = tuple(
            int(token) for part in chain for token in row.input_ids[part.start : part.stop].tolist()
        )
        before = len(tokens) - (d.stop - d.start)
        chosen = known.get((tokens, before))
        parts.append(
            d.stop - d.start
            if chosen is None or chosen.tokens is None
            else chosen.take(slice(before, None))
        )
    return routers.join(parts)


def row_reasons(
    seen: Seen, numbers: Sequence[int], texts: Sequence[Sequence[Text]], size: int, values: bool
) -> list[Reason]:
    """What is wrong with the rows that this process saw.

    Args:
        numbers: which of the rows that were chosen they are.
        texts: of the rows that were chosen.
        size: ranks of a row.
        values: the loss is given values, not log-probabilities.
    """
    reasons: list[Reason] = []
    for j, i in enumerate(numbers):
        if j >= len(seen.local):
            break
        row, local = seen.rows[j], seen.local[j]
        if (reason := row_reason(row, texts[i], i + 1)) is not None:
            reasons.append((ROWS_OF_DATA, reason))
        if local * size != len(row):
            told = (
                f"Sequence parallelism is off: each process computed {local} of the {len(row)}"
                f" tokens of a row; with sequence_parallel_size: {size} it is"
                f" {len(row) // size}."
            )
            reasons.append((LAYERS, told))
        elif (reason := layer_reason(seen.layers[j], len(row), size, i + 1)) is not None:
            reasons.append((LAYERS, reason))
        reason = mask_reason(seen.trained[j], row, texts[i], i + 1, values)
        if reason is not None:
            reasons.append((MASK, reason))
    return reasons


def probe_leaks(trainer: RowTrainer, seen: Seen, groups: int) -> None:
    """Notes what log-probabilities depend on: of the row with most documents, on every group."""
    number = max(range(len(seen.rows)), key=lambda i: (len(seen.rows[i].documents), -i))
    row, ctx = seen.rows[number], trainer.ctx
    held = sp.plan(len(row), row.segments, ctx).layout.intervals
    borders = sorted({a for intervals in held for a, _ in intervals} - {0})
    found = leaks(trainer, row, borders)
    seen.leaks.append((number * groups + ctx.dp_rank + 1, *found))
