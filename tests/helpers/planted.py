"""Faults that are planted into the running package, one by one, and taken out again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
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
    from longfactory.memory import decoder_layer

    own = decoder_layer.DecoderLayer.__init__

    def init(self: Any, *args: Any) -> None:
        own(self, *args)
        self.window = None

    # which would run the layer's own code in its place
    unproved = mock.patch.object(decoder_layer, "difference", lambda *args: None)
    return _all(mock.patch.object(decoder_layer.DecoderLayer, "__init__", init), unproved)


@contextlib.contextmanager
def _all(*patches: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


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

    def build(*args: Any, **kwargs: Any) -> Any:
        built = own(*args, **kwargs)
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


# -- planned from the code that trains alone, without a look at how verify works ------------------


def _mean_of_means() -> Any:
    """Each micro-batch is divided by its own items and by the number of micro-batches."""
    from longfactory.train.trainer import RowTrainer

    own = RowTrainer.compute_loss

    def loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        items = torch.tensor(float(max(1, self.stage.count_items(inputs["row"]))))
        items = items * self.args.gradient_accumulation_steps * self.ctx.dp_size
        return own(self, model, inputs, *args, **{**kwargs, "num_items_in_batch": items})

    return mock.patch.object(RowTrainer, "compute_loss", loss)


def _items_of_one_group() -> Any:
    """The items of the other data-parallel groups are not counted."""
    from longfactory.train.trainer import RowTrainer

    return mock.patch.object(
        RowTrainer, "_sum_over_groups", lambda self, x: self.ctx.dp_size * x.detach().clone()
    )


def _last_document_dropped() -> Any:
    from longfactory.data import collate

    own = collate.make_row
    return mock.patch.object(
        collate,
        "make_row",
        lambda documents: own(documents[:-1] if len(documents) > 1 else documents),
    )


def _labels_not_shifted() -> Any:
    from longfactory.data import row

    return mock.patch.object(row, "shift_labels", lambda labels: labels)


def _positions_of_the_row() -> Any:
    """Positions do not begin again in each document."""
    from longfactory.data import collate

    own = collate.make_row

    def make(documents: Any) -> Any:
        row = own(documents)
        return dataclasses.replace(row, position_ids=torch.arange(len(row)))

    return mock.patch.object(collate, "make_row", make)


def _branches_leak() -> Any:
    """The second answer of a shared prompt sees the first."""
    from longfactory import sp
    from longfactory.train import trainer

    def joined(segments: Any) -> Any:
        out = list(segments)
        for i in range(1, len(out)):
            if out[i].parent >= 0 and out[i].parent == out[i - 1].parent:
                out[i] = dataclasses.replace(out[i], parent=i - 1)
        return tuple(out)

    return mock.patch.object(
        trainer,
        "sp",
        _Replaced(
            trainer.sp, plan=lambda length, segments, ctx: sp.plan(length, joined(segments), ctx)
        ),
    )


def _window_longer_by_one() -> Any:
    from longfactory.sp.plan import RowPlan

    own = RowPlan.mask
    return mock.patch.object(
        RowPlan,
        "mask",
        lambda self, window=None, chunk=None: own(self, window + 1 if window else window, chunk),
    )


def _gather_sums_in_backward() -> Any:
    """The backward of what gathers log-probabilities sums equal gradients once more."""
    from longfactory.sp import collectives
    from longfactory.train import trainer

    def gather(x: Any, plan: Any) -> Any:
        scaled = x + (plan.ctx.size - 1) * (x - x.detach()) if x.is_floating_point() else x
        return collectives.gather(scaled, plan)

    return mock.patch.object(trainer, "sp", _Replaced(trainer.sp, gather=gather))


def _padding_trained() -> Any:
    """The padding at the end of the row has labels."""
    from longfactory.data.row import Row

    own = Row.padded

    def padded(self: Any, multiple: int, pad_id: int) -> Any:
        row = own(self, multiple, pad_id)
        labels = row.labels.clone()
        labels[len(self) :] = row.input_ids[len(self) :]
        return dataclasses.replace(row, labels=labels)

    return mock.patch.object(Row, "padded", padded)


def _adapter_scale() -> Any:
    """An adapter's update is multiplied by 1 in place of lora_alpha / lora_rank."""
    from longfactory.train import run

    own = run.build_model

    def build(*args: Any, **kwargs: Any) -> Any:
        built = own(*args, **kwargs)
        for module in built[0].modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = dict.fromkeys(module.scaling, 1.0)
        return built

    return mock.patch.object(run, "build_model", build)


def _adapter_a_without_gradients() -> Any:
    """What reaches an adapter's A is zero: with B at zero, as it begins, no one sees it."""
    from longfactory.train import run

    own = run.build_model

    def build(*args: Any, **kwargs: Any) -> Any:
        built = own(*args, **kwargs)
        for name, p in built[0].named_parameters():
            if "lora_A" in name and p.requires_grad:
                p.register_hook(torch.zeros_like)
        return built

    return mock.patch.object(run, "build_model", build)


def _last_micro_batch_lost() -> Any:
    """Gradients of the last micro-batch are not added."""
    from longfactory.train.trainer import RowTrainer

    own = RowTrainer.compute_loss

    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        value = own(self, *args, **kwargs)
        last = self.accelerator.sync_gradients and self.args.gradient_accumulation_steps > 1
        return value - (value - value.detach()) if last else value

    return mock.patch.object(RowTrainer, "compute_loss", loss)


def _answers_references_swapped() -> Any:
    """The reference of the chosen answer is taken for that of the rejected one."""
    from longfactory.stages import preference

    own = preference.reference_logps

    def swapped(*args: Any, **kwargs: Any) -> Any:
        both = own(*args, **kwargs)
        half = both.shape[0] // 2
        return torch.cat([both[half:], both[:half]])

    return mock.patch.object(preference, "reference_logps", swapped)


def _long_range_frequencies_dropped() -> Any:
    """The slowest rotary frequencies of the model that trains are those of no position at all."""
    from longfactory.train import run

    own = run.build_model

    def build(*args: Any, **kwargs: Any) -> Any:
        built = own(*args, **kwargs)
        for module in built[0].modules():
            if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
                module.inv_freq[-2:] = 0.0
        return built

    return mock.patch.object(run, "build_model", build)


def _next_token_seen() -> Any:
    """Keys and values are those of the next token: each token sees what it is to predict."""
    from longfactory.sp import hf

    own = hf.engine

    def engine(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return own(q, k, torch.cat([v[1:], v[-1:]]), *args, **kwargs)

    return mock.patch.object(hf, "engine", engine)


FURTHER = {
    "a mean of means over micro-batches": _mean_of_means,
    "items of one data-parallel group": _items_of_one_group,
    "the last document dropped": _last_document_dropped,
    "labels not shifted": _labels_not_shifted,
    "positions of the row": _positions_of_the_row,
    "an answer sees the other": _branches_leak,
    "a window longer by one": _window_longer_by_one,
    "gather sums in backward": _gather_sums_in_backward,
    "padding trained": _padding_trained,
    "an adapter's scale is 1": _adapter_scale,
    "an adapter's A without gradients": _adapter_a_without_gradients,
    "the last micro-batch lost": _last_micro_batch_lost,
    "references of the answers swapped": _answers_references_swapped,
    "slow rotary frequencies dropped": _long_range_frequencies_dropped,
    "the next token is seen": _next_token_seen,
}
"""Planned without a look at how verify works."""


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
    **FURTHER,
}


def planted(fault: str) -> Any:
    """A context in which the package has this fault; "" for none."""
    return FAULTS[fault]() if fault else contextlib.nullcontext()


LORA = {"finetuning_type": "lora"}
# Where a window is dropped: documents longer than the window, which is longer than a start-up probe
# of 128 tokens.
PRETRAINING = {"stage": "pt", "dataset": "manual_pt"}
WINDOW = {"window": 140, "verify_tokens": 600, **PRETRAINING}
PAIRS = {"stage": "dpo", "dataset": "manual_dpo"}
COUNTED = "Rows count wrongly in the gradient: row 1 "
FOUND_FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "a mean of means over micro-batches": (COUNTED, {}),
    "items of one data-parallel group": (COUNTED, {"sequence_parallel_size": 1}),
    "the last document dropped": ("Row 1 has 1 documents, its samples have 2.", {}),
    "labels not shifted": ("The label at token 25 of document 1 of row 1 is -100; by its", {}),
    "positions of the row": ("The position at token 1 of document 2 of row 1 is 80; by its", {}),
    "an answer sees the other": (
        "Documents see each other: in row 1 the log-probability of token",
        {**PAIRS, "pref_share_prompt": True},
    ),
    "a window longer by one": (
        "from token 141 of 300 on (its sliding window is 140); 140 before it agree",
        WINDOW,
    ),
    "gather sums in backward": ("Every gradient is 2 times what it should be", {}),
    "padding trained": ("of the row, which is padding: they are trained", {}),
    "an adapter's scale is 1": ("The difference follows LoRA: it is gone without it.", LORA),
    "an adapter's A without gradients": ("Only the gradients of lora_A are wrong", LORA),
    "the last micro-batch lost": (f"{COUNTED}1 times, row 2 0 times", {}),
    "references of the answers swapped": (
        "Log-probabilities agree but the loss does not: the stage computes it wrongly",
        PAIRS,
    ),
    "slow rotary frequencies dropped": (
        "The rotary frequencies model.rotary_emb.inv_freq are not those",
        {},
    ),
    "the next token is seen": (
        "Later tokens are seen: in row",
        {"disable_gradient_checkpointing": True},
    ),
}
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence parallelism silently off": (
        "Sequence parallelism is off: sequence_parallel_size is 2",
        {},
    ),
    "sequence parallelism off behind the context": (
        "each process computed 160 of the 160 tokens",
        {},
    ),
    "loss scaled by SP": ("The loss is 2 times what it should be", {}),
    "labels shifted twice": ("labels are shifted twice", {}),
    "prompt tokens trained": ("tokens of its prompt; train_on_prompt is not set", {}),
    "prompt tokens trained in the row": ("labels are trained,", {}),
    "a long window dropped": ("on (its sliding window is 140); 1", WINDOW),
    "the hand-written layer's window dropped": ("on (its sliding window is 140); 1", WINDOW),
    "documents leak": ("differ in document 2 of row 1 from token", {}),
    "local positions": ("differ in document", {}),
    "a dead exchange": ("differ in document 1 of row 1", {"per_device_train_batch_size": 1}),
    "gradients divided by SP": ("Every gradient is 0.5 times what it should be", {}),
    "a module left out of the reduction": ("3 trained parameters differ between processes", {}),
    "a module without gradients": (
        "No gradient reaches 3 trained parameters: model.layers.1.mlp",
        {},
    ),
    "the tower is trained": (
        "trained parameters get no gradient from any document: model.vision_tower",
        {"tower": True},
    ),
    "an adapter that is not saved": (
        "is not a complete save: 4 of 28 tensors of the model are not in what was saved",
        LORA,
    ),
    **FOUND_FURTHER,
}
"""Fault -> (a part of the sentence that names it, keys of a run that shows it)."""


def with_keys(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`window`: the model becomes a Mistral with a sliding window of so many tokens. `tower`: a
    Gemma 3 with a vision tower.
    """
    keys = {**base, **{k: v for k, v in changes.items() if k not in ("window", "tower")}}
    if "window" not in changes and "tower" not in changes:
        return keys
    own = Path(base["model_name_or_path"])
    name = "gemma3" if "tower" in changes else f"mistral-{changes['window']}"
    folder = own.parent / name
    if not folder.exists():
        shutil.copytree(own, folder)
        if "tower" in changes:
            from longfactory_dev.tiny_models import tiny_config

            tiny_config("gemma3", vocab_size=1024).save_pretrained(folder)
        else:
            config = json.loads((own / "config.json").read_text())
            config |= {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "sliding_window": changes["window"],
            }
            (folder / "config.json").write_text(json.dumps(config))
    return {**keys, "model_name_or_path": str(folder)}


def verified_with(keys: dict[str, Any], fault: str, traced: bool = False) -> tuple[bool, str]:
    """Body of a rank."""
    import os

    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.errors import UserError
    from longfactory.train.verify import verify
    from planted import planted

    os.environ["LONGFACTORY_CACHE"] = keys["cache"]
    cpu_sharding.reset()
    cfg = from_mapping({k: v for k, v in keys.items() if k not in ("cache", "verify_tokens")})
    with planted(fault):
        try:
            report = verify(cfg, rows=2, tokens=keys.get("verify_tokens", 160), traced=traced)
        except UserError as error:
            return False, str(error)
    return report.exact, report.table()
