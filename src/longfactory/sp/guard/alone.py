"""Pass 3, and the comparison: transformers' own layers on each document alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .. import compare, hf
from ..compare import Alone, LayerRun, OwnCall
from ..recurrent import layers as recurrent
from .fixed import eager_experts, exact_matmul
from .layers import Layers, hidden_place, name_of, token_dim
from .words import short, times_as_far, worst

log = logging.getLogger(__name__)


def layers_differ(
    model: nn.Module,
    inner: PreTrainedModel,
    layers: Layers,
    runs: list[LayerRun],
    first: Tensor,
    documents: list[Tensor],
    device: torch.device,
) -> str | None:
    """Compares the layers as they trained with transformers' own on each document alone.

    Args:
        runs: of the layers that are compared, on the whole row.
        first: [T, hidden], what the first layer was given.
        documents: token ids of each, [L].
    Returns:
        The first difference that is more than rounding, in words; None where there is none.
    """
    calls: dict[int, list[list[OwnCall]]] = {run.index: [] for run in runs}
    model.eval()
    start, reason = 0, None
    with hf.own_attention(inner):
        for number, ids in enumerate(documents):
            inputs = _own_calls(model, layers, runs, calls, ids)
            part = first[start : start + len(ids)]
            start += len(ids)
            reason = reason or _other_input(inputs, part, number, runs)
        lengths = [len(ids) for ids in documents]
        for run in runs:
            found = ratios(
                run, [of_document[run.call] for of_document in calls[run.index]], lengths, device
            )
            log.debug("guard: %s: %s", name_of(layers, run.index), found)
            what, ratio = worst(found)
            if reason is None and not ratio <= compare.limit(run.dtype):
                reason = (
                    f"the {what} of {name_of(layers, run.index)}, as it is trained, is"
                    f" {times_as_far(ratio, run.dtype)} as that of transformers' own layer and"
                    f" attention in the run's precision ({short(run.dtype)})"
                )
    return reason


def _other_input(own: Tensor, run: Tensor, number: int, runs: list[LayerRun]) -> str | None:
    """What comes before the layers (embeddings, learned positions) adds little up: both ways give
    the same up to a rounding.
    """
    own = own.movedim(token_dim(own, len(run)), 0)
    error = (own.double() - run.double()).norm() / own.double().norm().clamp(min=1e-30)
    limit = max(2 * compare.rounding(runs[0].dtype), 1e-3)  # products in float32 may be of TF32
    if not error <= limit:
        return (
            f"the hidden states of document {number + 1} differ by {error:.1e} before the first"
            f" layer, tolerated are {limit:.1e}"
        )
    return None


def _own_calls(
    model: nn.Module,
    layers: Layers,
    runs: list[LayerRun],
    calls: dict[int, list[list[OwnCall]]],
    ids: Tensor,
) -> Tensor:
    """One document through the model's own attention: how its layers are called. Returns the first
    layer's input.
    """
    inputs: list[Tensor] = []
    hooks: list[RemovableHandle] = []

    def note(index: int | None) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            place = hidden_place(args, kwargs)
            if not inputs:
                inputs.append(args[place] if isinstance(place, int) else kwargs[place])
            if index is not None:
                calls[index][-1].append(OwnCall(args, kwargs, place))

        return hook

    chosen = {run.index for run in runs}
    for index in chosen:
        calls[index].append([])
    for index, layer in layers.items():
        hooks.append(
            layer.register_forward_pre_hook(
                note(index if index in chosen else None), with_kwargs=True
            )
        )
    try:
        with torch.no_grad(), recurrent.without_packages():
            model(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs[0]


def ratios(
    run: LayerRun, calls: list[OwnCall], lengths: list[int], device: torch.device
) -> dict[str, float]:
    """What `compare.judge` says of one layer. Under `hf.own_attention`."""
    own, reference = _own_and_reference(run, calls, lengths, device)
    if not compare.is_finite(own):
        log.warning(
            "transformers' own %s is not finite in %s on the start-up guard's tokens, so those "
            "values were not compared. Train in bf16, or expect skipped updates.",
            type(run.layer).__name__,
            short(run.dtype),
        )
    own_errors = compare.own_errors(own, reference, lengths)
    found = compare.judge(run, own_errors, reference, lengths)
    for seed in range(1, compare.SAMPLES):
        if not compare.limit(run.dtype) < worst(found)[1] < math.inf:
            break
        other = _own_and_reference(compare.perturbed(run, seed), calls, lengths, device)
        own_errors = compare.larger(own_errors, compare.own_errors(*other, lengths))
        found = compare.judge(run, own_errors, reference, lengths)
    return found


def _own_and_reference(
    run: LayerRun, calls: list[OwnCall], lengths: list[int], device: torch.device
) -> tuple[Alone, Alone]:
    """transformers' own layer on each document alone, in the run's precision and in the wider
    one.
    """
    wide = compare.reference_dtype(run.dtype)
    with eager_experts(run.layer):
        plain = compare.plain_layer(run.layer, run.weights).train()
        recurrent.as_reference(plain)
        own = compare.run_alone(plain, run, calls, lengths, None, device)
        plain = compare.plain_layer(run.layer, run.weights, wide).train()
        recurrent.as_reference(plain)
        with exact_matmul():
            reference = compare.run_alone(plain, run, calls, lengths, wide, device)
    return own, reference
