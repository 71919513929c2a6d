"""Before training: the layers as they will be trained, sharded, against transformers' own layers,
on a few tokens.

Three passes of the wrapped model over one row of two documents:

1. Forward without gradients. What the model asks of its attention and of its masks is what arrives
   at the engine, in every layer.
2. Forward and backward in training mode, through what was installed: hand-written layers,
   recomputation, offload, wrappers. Of one decoder layer of each kind the input, the output and
   both gradients are kept. No gradient reaches a parameter: nothing that waits for one runs.
3. Each document alone through the model's own attention: what its layers are called with
   (positions, masks).

Then each of those layers is computed again, one at a time: transformers' own code with its own
attention on each document alone, in the run's precision and in a wider one, from the same input and
the same gradient. `sp.compare` says what differs too much. Where images pass through the model,
`images` compares a row of two images as well.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from .. import hf, vision
from ..compare import LayerRun
from ..context import SequenceParallel
from ..probe import Probe, probe, proof
from . import images
from .alone import layers_differ
from .arrival import Executed, differently_installed, not_arrived, not_reached
from .attention import attention_differs
from .fixed import lowered_windows, no_random_trace, nothing_random, unsaid
from .layers import decoder_layers, listed_modules, marked, one_of_each_kind
from .row import SHORT, Row, compared_lengths, draw_documents
from .trained import train_once


def guard(model: nn.Module, ctx: SequenceParallel) -> None:
    """Checks on a few tokens that the sharded model equals the unsharded one. Collective: every
    process of the world must call it.

    Useful at size 1, too, where it checks that documents are isolated and that hand-written layers
    are exact. Has no side effects: gradients, random numbers, the model's mode and settings are
    restored. Call it outside autocast: the model's own wrapper turns autocast on.

    Raises:
        ValueError: an attention layer was not reached, an argument is lost on the way, or a layer's
            values or gradients differ from those of transformers' layer by more than the precision
            explains. Names the model type, the reason and what to do. Raised on every rank.
        torch.OutOfMemoryError: in the guard; says so.
    """
    inner = hf.unwrap(model)
    config = inner.config.get_text_config()
    device = _device(inner)
    training = {m: m.training for m in model.modules()}
    try:
        with proof(), nothing_random(model), no_random_trace(device), unsaid(ctx):
            reason, seen = _prove(model, inner, ctx, device)
            if vision.has_images(inner) and not _anyone(reason is not None, device):
                model.eval()
                reason = images.differences(model, inner, ctx, device)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            "The start-up guard ran out of memory: before the first step it trains on a row of "
            f"{sum(compared_lengths(ctx))} tokens and computes single layers in a wider dtype. "
            f"{error}"
        ) from error
    # whatever a model does without the mask, the cache or the arguments that it expects
    except Exception as error:
        what = (
            str(error)
            if isinstance(error, ValueError)
            else f"its forward or backward pass fails with {type(error).__name__}: {error}"
        )
        raise ValueError(
            f"Models of type {config.model_type} cannot be trained here: {what}"
        ) from error
    finally:
        for m, mode in training.items():
            m.training = mode
    if _anyone(reason is not None, device):
        raise ValueError(
            f"Models of type {config.model_type} cannot be trained here:"
            f" {reason or 'another rank refused it'}. Choose a model type that docs/models.md marks"
            " exact; if this one is, another attention_backend may compute it (attention_backend:"
            " math)."
        )
    if seen.heads:
        ctx.set_heads(math.gcd(*(h for h, _ in seen.heads)), math.gcd(*(h for _, h in seen.heads)))


def _prove(
    model: nn.Module, inner: PreTrainedModel, ctx: SequenceParallel, device: torch.device
) -> tuple[str | None, Probe]:
    """The reason to refuse the model, or None; and what its first pass asked for."""
    layers = listed_modules(inner)
    documents = draw_documents(inner, SHORT, device)
    model.eval()
    with torch.no_grad(), probe() as seen, Executed(inner) as executed, marked(layers, seen):
        Row(documents, ctx).run(model)
    reason = not_reached(inner, seen, executed) or not_arrived(seen, layers)
    if _anyone(reason is not None, device):
        return reason, seen
    documents = draw_documents(inner, compared_lengths(ctx), device)
    layers = decoder_layers(layers, seen)
    with lowered_windows(inner):
        runs = [LayerRun(layer, index) for index, layer in one_of_each_kind(layers, seen)]
        row = Row(documents, ctx)
        with probe(installed=True) as trained, marked(layers, trained):
            first = train_once(_callee(model), layers, runs, row, trained, device)
        rows = [row]
        if ctx.size > 1:  # the exchange of a row depends on its documents
            rows.append(Row([torch.cat(documents)], ctx))
        reason = differently_installed(seen, trained, layers) or attention_differs(
            trained, rows, device
        )
        # What differs here would hang the ranks that go on.
        if not _anyone(reason is not None, device):
            reason = layers_differ(model, inner, layers, runs, first, documents, device)
    return reason, seen


def _device(model: PreTrainedModel) -> torch.device:
    device = next(model.parameters()).device
    if device.type == "cpu" and dist.is_initialized() and "nccl" in str(dist.get_backend()):
        # parameters that are offloaded to the host
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _callee(model: nn.Module) -> nn.Module:
    """The model inside DDP or a DeepSpeed engine, which prepare a reduction of gradients at each
    call; none come.
    """
    kinds = ("DistributedDataParallel", "DeepSpeedEngine")
    return model.module if any(k.__name__ in kinds for k in type(model).__mro__) else model


def _anyone(refused: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return refused
    flag = torch.tensor(float(refused), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
