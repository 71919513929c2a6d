"""Pass 2: forward and backward through the layers as they are installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import compare, routers
from ..compare import LayerRun
from ..probe import Probe
from ..routers import Choices
from .layers import Layers, hidden_place, name_of, token_dim
from .row import Row, draw_slope, of_documents

LARGEST = 1 << 28
"""Numbers in a weight whose gradient is compared. Those of all experts of a large mixture would
need tens of GB in a wider type; what is wrong with their gradients alone is not seen."""


def train_once(
    model: nn.Module,
    layers: Layers,
    runs: list[LayerRun],
    row: Row,
    seen: Probe,
    device: torch.device,
) -> Tensor:
    """Forward and backward through the installed layers. Fills `runs` with the whole row's tensors.

    Returns the first layer's input of the documents' tokens, [D, ...].

    The gradient of the last layer's output is drawn at random, 0 for padding. Gradients are taken,
    not accumulated.
    """
    model.train()
    local = row.plan.local_length
    for run in runs:
        if any(hasattr(p, "ds_id") for p in run.layer.parameters()):
            run.weights = _gathered_by_zero(run.layer)
    watched = _Watched(runs, local)
    # Recorded to the end of the backward pass: a router that is recomputed must not draw where the
    # recorded one did not.
    with contextlib.ExitStack() as recording:
        choices = [recording.enter_context(routers.record(run.layer)) for run in runs]
        with watched.hooked(layers), torch.enable_grad():
            row.run(model)
        seen.layer = -1
        first, begin, y = watched.first, watched.input, watched.output
        assert first is not None and begin is not None and y is not None
        slope = draw_slope(row, y, token_dim(y, local))
        trained = [(run, name, p) for run in runs for name, p in run.trained.items()]
        grads = torch.autograd.grad(
            y, [begin, *(p for _, _, p in trained)], slope, allow_unused=True
        )
    for (run, name, _), g in zip(trained, grads[1:], strict=True):
        if g is not None:
            run.gradients[name] = g.detach()
    for run, chosen in zip(runs, choices, strict=True):
        if run.dy is None or run.dx is None:
            raise ValueError(f"no gradient comes back to {name_of(layers, run.index)}")
        _gather(run, chosen, row, device)
    return of_documents(first, token_dim(first, local), row)


class _Watched:
    """What layers are called with and return during a forward pass with gradients, by hooks.

    Attributes:
        first: the input of the first layer that ran, in any pass.
        input, output: of the first layer and of the last one, in the graph.
    """

    def __init__(self, runs: list[LayerRun], local: int) -> None:
        self.runs = {id(run.layer): run for run in runs}
        # asked before the pass: while a layer runs, its parameters are whole
        self.sharded = {
            id(run.layer): any(hasattr(p, "to_local") for p in run.layer.parameters())
            for run in runs
        }
        self.local = local
        self.calls: dict[int, int] = {}
        self.first: Tensor | None = None
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    @contextlib.contextmanager
    def hooked(self, layers: Layers) -> Iterator[None]:
        hooks: list[RemovableHandle] = []
        for layer in layers.values():
            hooks += [
                layer.register_forward_pre_hook(self._before, with_kwargs=True),
                layer.register_forward_hook(self._after),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = hidden_place(args, kwargs)
        x: Tensor = args[place] if isinstance(place, int) else kwargs[place]
        if self.first is None:
            self.first = x.detach()
        self.calls[id(layer)] = self.calls.get(id(layer), -1) + 1
        # models that run their layers several times train some of the runs
        if not torch.is_grad_enabled():
            return args, kwargs
        # of a frozen embedding it has no gradient, and of a trained one none is asked for
        if self.input is None:
            x = self.input = x.detach().requires_grad_()
        x = x.view_as(x)  # used by this layer alone: its gradient is the layer's
        run = self.runs.get(id(layer))
        if run is not None and run.x is not None:
            run.trained = {}  # weights that are used again: their gradient is not of one call
        elif run is not None:
            self._begin(run, x, kwargs)
        if isinstance(place, int):
            return (*args[:place], x, *args[place + 1 :]), kwargs
        return args, {**kwargs, place: x}

    def _begin(self, run: LayerRun, x: Tensor, kwargs: dict[str, Any]) -> None:
        """Notes the first call of a layer with input `x`."""
        run.dim, run.call = token_dim(x, self.local), self.calls[id(run.layer)]
        given = kwargs.get("prev_topk_indices")
        if given is not None and given.shape[-1]:
            run.previous = given[0].detach()
        run.x = x.detach().clone()
        kind = x.device.type
        run.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if not run.weights:
            _note_weights(run, copies=self.sharded[id(run.layer)])
        # Copies: the hand-written layers write over the gradients they are given.
        x.register_hook(lambda g: setattr(run, "dx", g.detach().clone()))

    def _after(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        y = self.output = compare.first(output)
        run = self.runs.get(id(layer))
        if run is not None and run.y is None:
            run.y = y.detach().clone()
            y.register_hook(lambda g: setattr(run, "dy", g.detach().clone()))


def _note_weights(run: LayerRun, copies: bool) -> None:
    """The weights that a layer computes with, and those whose gradients are compared. `copies`: of
    a sharded layer, whose weights are whole only while it runs.
    """
    named = list(run.layer.named_parameters())
    run.weights = {
        n: p.detach().clone() if copies else p.detach() for n, p in named if _plain_tensor(p)
    }
    run.trained = {n: p for n, p in named if p.requires_grad and p.numel() <= LARGEST}


def _gather(run: LayerRun, chosen: Choices, row: Row, device: torch.device) -> None:
    """This rank's tokens -> those of the row's documents; gradients of weights are summed over
    ranks. Collective over the sequence-parallel group.
    """
    run.choices = Choices(
        {n: [of_documents(t.to(device), 0, row) for t in picks] for n, picks in chosen.of.items()}
    )
    if run.previous is not None:
        run.previous = of_documents(run.previous, 0, row)
    tensors = (run.x, run.y, run.dx, run.dy)
    assert all(t is not None for t in tensors)
    run.x, run.y, run.dx, run.dy = (of_documents(t, run.dim, row) for t in tensors)  # type: ignore[arg-type]
    for name, p in run.trained.items():
        # In the wide type: every rank's is of its own tokens.
        g = run.gradients.get(name, torch.zeros_like(p))
        run.gradients[name] = g = g.to(compare.reference_dtype(g.dtype)).contiguous()
        if row.plan.ctx.size > 1:
            dist.all_reduce(g, group=row.plan.ctx.group)


def _plain_tensor(p: Tensor) -> bool:
    return type(p) in (Tensor, nn.Parameter)


def _gathered_by_zero(layer: nn.Module) -> dict[str, Tensor]:
    """ZeRO-3 holds a parameter only while it is used. Collective."""
    import deepspeed

    # an attribute, no module of that name
    with deepspeed.zero.GatheredParameters(list(layer.parameters())):
        return {n: p.detach().clone() for n, p in layer.named_parameters()}
