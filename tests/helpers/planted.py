"""Faults that are planted into the running package, one by one, and taken out again."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any
from unittest import mock

import torch


def _sp_off() -> Any:
    """Size 1 in place of N: every process is a group of its own."""
    from longfactory import sp

    create = sp.SequenceParallel.create
    return mock.patch.object(
        sp.SequenceParallel, "create", staticmethod(lambda size, **kwargs: create(1, **kwargs))
    )


def _sp_off_behind_the_context() -> Any:
    """The context says N, and every process computes the whole row."""
    from longfactory import sp
    from longfactory.train import trainer

    single = sp.SequenceParallel.create(1)
    return mock.patch.object(
        trainer,
        "sp",
        _Replaced(trainer.sp, plan=lambda length, segments, ctx: sp.plan(length, segments, single)),
    )


class _Replaced:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update({"_module": module, **names})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _loss_scaled() -> Any:
    from longfactory.train.trainer import RowTrainer

    own = RowTrainer.compute_loss
    return mock.patch.object(
        RowTrainer,
        "compute_loss",
        lambda self, *args, **kwargs: self.ctx.size * own(self, *args, **kwargs),
    )


def _labels_shifted_twice() -> Any:
    from longfactory.data import row

    own = row.shift_labels
    return mock.patch.object(row, "shift_labels", lambda labels: own(own(labels)))


def _prompt_trained() -> Any:
    """The data's own rule is ignored."""
    from longfactory.data import assemble

    own = assemble.sft
    return mock.patch.object(
        assemble,
        "sft",
        lambda parts, rules, *args: own(
            parts, dataclasses.replace(rules, train_on_prompt=True), *args
        ),
    )


def _prompt_trained_in_the_row() -> Any:
    """The documents are right, and the row trains all of their tokens."""
    from longfactory.data import collate

    own = collate.make_row
    return mock.patch.object(
        collate,
        "make_row",
        lambda documents: own([dataclasses.replace(d, labels=d.input_ids) for d in documents]),
    )


def _window_dropped(above: int) -> Any:
    """Windows of more than `above` tokens, wherever attention is computed."""
    from longfactory.sp.plan import RowPlan

    own = RowPlan.mask

    def mask(self: Any, window: int | None = None, chunk: int | None = None) -> Any:
        return own(self, None if (window or 0) > above else window, chunk)

    return mock.patch.object(RowPlan, "mask", mask)


def _layer_window_dropped() -> Any:
    """In the hand-written layer alone."""
    from longfactory.memory.decoder_layer import DecoderLayer

    own = DecoderLayer.__init__

    def init(self: Any, *args: Any) -> None:
        own(self, *args)
        self.window = None

    return mock.patch.object(DecoderLayer, "__init__", init)


def _documents_leak() -> Any:
    from longfactory import sp
    from longfactory.train import trainer

    return mock.patch.object(
        trainer,
        "sp",
        _Replaced(
            trainer.sp,
            plan=lambda length, segments, ctx: sp.plan(length, (sp.Segment(0, length),), ctx),
        ),
    )


def _local_positions() -> Any:
    """Each process counts its own tokens."""
    from longfactory.train import trainer

    own = trainer.hf.inputs

    def inputs(row: Any, plan: Any) -> Any:
        given = own(row, plan)
        positions = torch.arange(given["position_ids"].shape[1])[None]
        positions.sp_plan = plan  # type: ignore[attr-defined]
        return {**given, "position_ids": positions}

    return mock.patch.object(trainer, "hf", _Replaced(trainer.hf, inputs=inputs))


def _dead_exchange() -> Any:
    """What arrives is what was sent: the ring stands still."""
    from longfactory.sp.schedules import ring

    own = ring.Exchange.wait

    def wait(self: Any) -> torch.Tensor:
        own(self)
        return self.sent.clone()

    return mock.patch.object(ring.Exchange, "wait", wait)


def _gradients_divided() -> Any:
    from longfactory.train.trainer import RowTrainer

    own = RowTrainer._clip_grad_norm

    def clip(self: Any, model: Any) -> Any:
        for p in model.parameters():
            if p.grad is not None:
                p.grad /= self.ctx.size
        return own(self, model)

    return mock.patch.object(RowTrainer, "_clip_grad_norm", clip)


def _module_unreduced() -> Any:
    """A part of the model that DDP leaves out of the reduction, as it does with what the first
    forward did not use.
    """
    from longfactory.train import run

    own = run.build_model

    def build(*args: Any) -> Any:
        built = own(*args)
        model = built[0]
        names = [name for name, _ in model.named_parameters() if ".layers.1.mlp" in name]
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, names
        )
        return built

    return mock.patch.object(run, "build_model", build)


def _module_without_gradients() -> Any:
    """A part of the model whose gradients are lost on the way."""
    from longfactory.train.trainer import RowTrainer

    own = RowTrainer._clip_grad_norm

    def clip(self: Any, model: Any) -> Any:
        for name, p in model.named_parameters():
            if ".layers.1.mlp" in name:
                p.grad = None
        return own(self, model)

    return mock.patch.object(RowTrainer, "_clip_grad_norm", clip)


def _tower_trained() -> Any:
    """A vision tower, through which no text passes, is trained with the rest; DDP then leaves out
    other gradients too.
    """
    from longfactory.model import adapters

    return mock.patch.object(adapters, "freeze_idle", lambda model: None)


def _adapter_not_saved() -> Any:
    """Of the adapter's tensors those of one projection are not written."""
    from transformers import Trainer

    own = Trainer._save

    def save(self: Any, output_dir: Any = None, state_dict: Any = None) -> None:
        state = state_dict or self.accelerator.unwrap_model(self.model).state_dict()
        own(
            self,
            output_dir,
            {name: value for name, value in state.items() if ".q_proj.lora_" not in name},
        )

    return mock.patch.object(Trainer, "_save", save)


FAULTS = {
    "sequence parallelism silently off": _sp_off,
    "sequence parallelism off behind the context": _sp_off_behind_the_context,
    "loss scaled by SP": _loss_scaled,
    "labels shifted twice": _labels_shifted_twice,
    "prompt tokens trained": _prompt_trained,
    "prompt tokens trained in the row": _prompt_trained_in_the_row,
    # larger than what a start-up probe of 128 tokens would exceed
    "a long window dropped": lambda: _window_dropped(128),
    "a small window dropped": lambda: _window_dropped(0),
    "the hand-written layer's window dropped": _layer_window_dropped,
    "documents leak": _documents_leak,
    "local positions": _local_positions,
    "a dead exchange": _dead_exchange,
    "gradients divided by SP": _gradients_divided,
    "a module left out of the reduction": _module_unreduced,
    "a module without gradients": _module_without_gradients,
    "the tower is trained": _tower_trained,
    "an adapter that is not saved": _adapter_not_saved,
}


def planted(fault: str) -> Any:
    """A context in which the package has this fault; "" for none."""
    return FAULTS[fault]() if fault else contextlib.nullcontext()
