"""transformers' Trainer on rows: loaders, the count of items, loss and evaluation under sequence
parallelism. Checkpoints: `checkpoint/trainer.py`.

The gradient rule. N counts the items (tokens, pairs, samples) of all data-parallel groups and all
micro-batches of the optimizer step. Every rank of group d differentiates DP * S_d / N, S_d the sum
over the group's items, made from log-probabilities that were gathered by a collective whose
backward is its exact adjoint. DDP, FSDP2 and ZeRO average over all W = DP * SP ranks: (1/W) * sum_d
SP * DP * S_d / N = S / N, however the row is sharded. There is no division by accumulation steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers.trainer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import EvalLoopOutput

from longfactory import sp, startup
from longfactory.data.media.load import MediaLoading
from longfactory.data.row import Row
from longfactory.errors import UserError
from longfactory.memory.gathered import give_up_weights
from longfactory.memory.optimizer import SplitAdamW
from longfactory.model.outputs import TokenOutputs
from longfactory.model.routing import Routing
from longfactory.model.source import Source
from longfactory.model.token_logprobs import ReferenceHidden, TokenLogprobs
from longfactory.model.value_head import TokenValues
from longfactory.model.vision import RowImages
from longfactory.sp import hf
from longfactory.sp.threads import one_thread
from longfactory.stages.base import Stage
from longfactory.stages.metrics import Metrics, MetricSums
from longfactory.train.block_adamw import BlockAdamW
from longfactory.train.checkpoint import settings
from longfactory.train.checkpoint.facts import RunFacts
from longfactory.train.checkpoint.trainer import ResumableTrainer
from longfactory.train.contracts import check_trainer
from longfactory.train.embedding_noise import noisy_embeddings, token_keys, token_scales
from longfactory.train.gradients import refuse_missing
from longfactory.train.loader import (
    Collate,
    RowSampler,
    empty_row,
    make_loader,
    skip_first_batches,
)
from longfactory.train.meter import Meter, TokensLeft
from longfactory.train.numbers import Numbers
from longfactory.train.optimizers import one_dtype_each
from longfactory.train.package_optimizers import keep_projections
from longfactory.train.ratio_adamw import RatioAdamW
from longfactory.train.reference import Reference, as_reference

log = logging.getLogger("longfactory")

check_trainer(Trainer)
transformers.trainer.skip_first_batches = skip_first_batches  # type: ignore[attr-defined]


class RowTrainer(ResumableTrainer):
    """A Trainer whose batches are rows and whose loss is a stage's.

    Args:
        model: prepared by `sp.hf.prepare`; its output layer taken over by `head`.
        args: transformers' TrainingArguments.
        ctx: the place in the sequence-parallel and data-parallel axes.
        stage: counts items and sums the loss (`stages/base.py`).
        head: TokenLogprobs or TokenValues.
        routing: watches the routers; None: without their loss.
        collate: samples -> Row.
        pad_id: token of the padding document.
        shuffle: whether training samples are shuffled.
        make_optimizer: builds the optimizer in place of the Trainer's own (LoRA+, optimizer on the
            host), or None.
        log_tokens: count input tokens and log throughput.
        source: the checkpoint that was loaded: what is saved gets all that it has.
        on_nan: what a loss or gradient that is NaN or Inf does: "stop" or "skip".
        facts: what the run's checkpoints say of it.
        meter: counts what steps cost.
        images: of a model that images pass through; None: rows of text.
    """

    # compute_loss divides by N: the Trainer must not divide by accumulation steps
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        ctx: sp.SequenceParallel,
        stage: Stage,
        head: TokenLogprobs | TokenValues,
        collate: Callable[[list[Any], int, int], Row],
        pad_id: int,
        shuffle: bool = True,
        make_optimizer: Callable[[nn.Module, Any], torch.optim.Optimizer] | None = None,
        log_tokens: bool = False,
        source: Source | None = None,
        on_nan: Literal["stop", "skip"] = "stop",
        facts: RunFacts | None = None,
        routing: Routing | None = None,
        meter: Meter | None = None,
        images: RowImages | None = None,
        **kwargs: Any,
    ):
        # For `auto`: given a row before its plan is made, finds the schedule that is fastest for
        # rows like it (sp.measure).
        self.measure: Callable[[int, tuple[sp.Segment, ...]], None] | None = None
        self.make_optimizer, self.log_tokens = make_optimizer, log_tokens
        self.collate, self.pad_id, self.images = collate, pad_id, images
        self.source, self.copies_reported = source, False
        # Made when the model is wrapped (`reference.attach`).
        self.reference = Reference()
        self._eval_metrics = MetricSums()
        self._evaluation: tuple[int, dict[str, float]] | None = None
        self.meter = Meter() if meter is None else meter
        self._sums = torch.zeros(0)
        # Of a GPU: the end of the last step's backward pass, and where log rows are read after it.
        self._backward_ended: torch.cuda.Event | None = None
        self._log_stream: torch.cuda.Stream | None = None
        self.routing = Routing(model, ctx) if routing is None else routing
        super().__init__(
            model, args, ctx=ctx, stage=stage, head=head, shuffle=shuffle, facts=facts, **kwargs
        )
        # transformers before 5.19 has no loss_is_scaled_for_ga; it does not divide where the model
        # takes the count itself.
        self.model_accepts_loss_kwargs = True
        self.neftune_noise_alpha = None  # of the Trainer's own hook, which knows no documents
        self.parameter_count = 0
        if hasattr(self.model, "num_parameters"):
            self.parameter_count = self.model.num_parameters(exclude_embeddings=True)
        self.numbers = Numbers(
            on_nan, self._where, lambda: getattr(self.accelerator, "scaler", None) is not None
        )

    # ---- data ------------------------------------------------------------------------------------

    def loader(self, dataset: Any, batch: int, shuffle: bool, endless: bool = False) -> DataLoader:
        """Rows of a data set for this data-parallel group. `endless`: a stream begins again where
        it ends.
        """
        ctx, args = self.ctx, self.args
        media = self._media_loading()
        collate = Collate(self.collate, sp.alignment(ctx), self.pad_id, empty_row, media)
        sampler = None
        if hasattr(dataset, "__len__"):
            by_length = (
                shuffle and getattr(args, "train_sampling_strategy", "random") == "group_by_length"
            )
            sampler = RowSampler(
                len(dataset),
                batch,
                groups=ctx.dp_size,
                group=ctx.dp_rank,
                seed=self.data_seed if shuffle else None,
                lengths=list(dataset.lengths) if by_length else None,
                window=50 * self.get_total_train_batch_size(args) if by_length else 0,
                drop_last=shuffle and args.dataloader_drop_last,
                step=self.get_total_train_batch_size(args),
            )
        return make_loader(
            dataset,
            sampler,
            collate,
            batch=batch,
            groups=ctx.dp_size,
            group=ctx.dp_rank,
            workers=args.dataloader_num_workers,
            pin=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch=args.dataloader_prefetch_factor,
            endless=endless,
            reference=functools.partial(self._reference_numbers, dataset),
        )

    def _reference_numbers(self, dataset: Any) -> Any:
        """What the reference gave for a data set, which is made after the training loader is."""
        return self.reference.numbers_of(dataset)

    def _media_loading(self) -> MediaLoading | None:
        """How a loader decodes what this rank is dealt of a row's images."""
        if self.images is None or self.images.processing is None:
            return None
        return MediaLoading(self.images.processing, self.images.dealing)

    def get_train_dataloader(self) -> DataLoader:
        loader = self.loader(self.train_dataset, self._train_batch_size, self.shuffle, endless=True)
        source: Any = loader.dataset if loader.batch_sampler is None else loader.batch_sampler
        if isinstance(source, RowSampler) and not len(source):
            raise UserError(
                f"dataloader_drop_last leaves no step: {source.length} samples are fewer than "
                f"the {source.step} of one optimizer step. Leave it out, or lower "
                "per_device_train_batch_size or gradient_accumulation_steps."
            )
        loader.set_epoch = source.set_epoch  # type: ignore[attr-defined]
        if isinstance(source, RowSampler):
            self.meter.left = TokensLeft(source, getattr(self.train_dataset, "lengths", None))
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        return self.loader(
            eval_dataset if eval_dataset is not None else self.eval_dataset,
            self.args.eval_batch_size,
            False,
        )

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.ctx.dp_size

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """The Trainer's numbers; without an epoch to come where the checkpoint has made every step:
        the Trainer would make one more.
        """
        epochs, updates, *others = super().set_initial_training_values(args, dataloader)
        self._train_samples, self._updates, self._epochs = others[1], updates, epochs
        self.finished = self.resumed_at >= others[-1] or self._stopped_early()
        return (
            min(epochs, self.resumed_at // updates) if self.finished else epochs,
            updates,
            *others,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of an optimizer step and N, counted on the host and summed over
        data-parallel groups.
        """
        batches = []
        self.meter.begin()
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        rows = [b["row"] for b in batches]
        self.numbers.begin(rows)
        if self.numbers.on_nan == "skip":
            loss = getattr(self, "_tr_loss", None)
            self._logged.before = (
                None if loss is None else loss.clone(),
                self._train_metrics.copy(),
                dict(vars(self.stage)),
            )
        measured = self.meter.fetched(rows, sum(b.get("samples", 0) for b in batches))
        items = sum(self.stage.count_items(r) for r in rows)
        here = torch.tensor([items, *measured], dtype=torch.float64)
        counts = self._sum_over_groups(here.to(device, non_blocking=True))
        self._tokens += counts[1].long()
        # Read once the device is waited for anyway (`_get_grad_norm`).
        self._sums = (counts if self.ctx.dp_size > 1 else here)[1:]
        return batches, counts[0].clamp(min=1)

    def _sum_over_groups(self, x: Tensor) -> Tensor:
        """Sum over the data-parallel axis (detached): once for each sequence-parallel group."""
        x = x.detach().clone()
        if self.ctx.dp_size > 1:
            dist.all_reduce(x, group=self.ctx.dp_group)
        return x

    # ---- loss ------------------------------------------------------------------------------------

    def _model_inputs(self, row: Row) -> tuple[sp.RowPlan, dict[str, Any]]:
        """Where this rank's tokens of a row (on the host) are, and the model's keyword arguments
        for them.
        """
        segments, positions = row.segments, row.position_ids
        if self.images is not None:
            segments, positions = self.images.segments(row), self.images.positions(row)
        elif row.media:
            raise RuntimeError("A row has images, and the model was prepared for text alone.")
        if self.measure is not None:
            with startup.within(startup.SCHEDULES):
                self.measure(len(row), segments)
        plan = sp.plan(len(row), segments, self.ctx)
        tensors = {
            name: x.to(self.args.device, non_blocking=True)
            for name, x in (("input_ids", row.input_ids), ("position_ids", positions))
        }
        inputs = hf.inputs(tensors, plan)
        if self.images is not None:
            inputs["sp_media"] = self.images.media(row, plan, self.args.device)
        return plan, inputs

    def token_outputs(
        self,
        model: nn.Module,
        row: Row,
        reference: ReferenceHidden | None = None,
        head: TokenLogprobs | TokenValues | None = None,
        *,
        routed: bool = False,
    ) -> TokenOutputs:
        """[T] log-probabilities of the whole row (or values), the same on every rank of the group.
        `row` is on the host.

        Args:
            model: as it is wrapped.
            row: T tokens.
            reference: of this row (`reference_hidden`), for a stage that needs `reference_kl`.
            head: the model's output layer, where it is not the trained model.
            routed: this is the trained model's pass, whose routers are watched.
        """
        layer: Any = self.head if head is None else head
        more: dict[str, Any] = {} if reference is None else {"reference": reference}
        watched: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        with one_thread():
            plan, inputs = self._model_inputs(row)
            labels = row.labels[plan.index]
            if head is None and "candidates" in self.stage.needs and "teacher_ids" in row.numbers:
                more["candidates"] = row.numbers["teacher_ids"][plan.index]
            if routed:
                watched = self.routing.row(row.sequences(plan.index), self.args.device)
        with (
            self._noise(model, row, plan),
            layer.labels(labels, **more),
            watched,
        ):
            out = model(**inputs, **self.routing.arguments)
            local = layer.outputs(out.logits)
        if routed:
            local = self.routing.join(local)
        gathered = {
            name: (
                sp.gather(value if value.is_floating_point() else value.to(torch.uint8), plan).to(
                    value.dtype
                )
            )
            for name, value in vars(local).items()
            if value is not None
        }
        return TokenOutputs(**gathered)

    def _noise(
        self, model: nn.Module, row: Row, plan: sp.RowPlan
    ) -> contextlib.AbstractContextManager[None]:
        """NEFTune's noise on this rank's embeddings of a row, in training alone."""
        alpha = self.args.neftune_noise_alpha
        if not alpha or not model.training:
            return contextlib.nullcontext()
        keys, scales = (
            token_keys(row, self.args.seed, self.state.global_step),
            token_scales(row, alpha),
        )
        return noisy_embeddings(
            hf.unwrap(model).get_input_embeddings(), keys[plan.index], scales[plan.index]
        )

    def reference_hidden(self, model: nn.Module, head: TokenLogprobs, row: Row) -> ReferenceHidden:
        """What a reference's output layer is given for this rank's trained tokens of a row, under
        `as_reference`.
        """
        with one_thread():
            plan, inputs = self._model_inputs(row)
            labels = row.labels[plan.index]
        with head.hidden(labels) as result:
            model(**inputs, **self.routing.arguments)
            return result()

    def _outputs_with_reference(self, model: nn.Module, row: Row) -> TokenOutputs:
        if "reference_kl" in self.stage.needs:
            if self.reference.model is None and not self.reference.by_adapter:
                raise RuntimeError(
                    "The loss compares with a reference, and attach_reference was not called."
                )
            other, head = self.reference.model or (model, self.head)
            with as_reference(other, adapter_off=self.reference.by_adapter):
                hidden = self.reference_hidden(other, head, row)
            return self.token_outputs(model, row, hidden, routed=True)
        if not self.reference.by_adapter:
            return self.token_outputs(model, row, routed=True)
        with as_reference(model, adapter_off=True):
            reference = self.token_outputs(model, row).logps
        policy = self.token_outputs(model, row, routed=True)
        return dataclasses.replace(policy, reference=reference)

    def stage_loss(self, model: nn.Module, row: Row) -> tuple[Tensor, Metrics]:
        """Sum of the loss over this group's items, in float64, and the stage's metrics."""
        outputs, ctx = self._outputs_with_reference(model, row), self.ctx
        loss_sum, metrics = self.stage.loss_sum(
            outputs,
            dataclasses.replace(row, pixels=()).to(self.args.device, non_blocking=True),
            dp_sum=self._sum_over_groups,
            dp_rank=ctx.dp_rank,
            dp_size=ctx.dp_size,
        )
        items = self.stage.count_items(row)
        if self.routing.coefficient:
            loss_sum = loss_sum + self.routing.loss_sum(items)
        return loss_sum, {**metrics, **self.routing.metrics(items)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss_sum, metrics = self.stage_loss(model, inputs["row"])
        if num_items_in_batch is None:
            raise RuntimeError(
                "compute_loss needs the number of items of the whole optimizer step"
                " (get_batch_samples gives it)."
            )
        self._train_metrics.add(metrics)
        # Divided in float64: the mean of n times log 2 is then log 2. The cast costs the gradient
        # nothing.
        loss = (loss_sum * (self.ctx.dp_size / num_items_in_batch.to(loss_sum))).float()
        return (loss, {"loss": loss}) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 6 * (len(inputs["row"]) // self.ctx.size) * self.parameter_count

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.make_optimizer is not None:  # type: ignore[has-type]
            self.optimizer = self.make_optimizer(self.model if model is None else model, self)
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if str(self.args.optim.value).startswith(("galore_", "apollo_")):
            keep_projections(optimizer)  # transformers' own
        if self.is_deepspeed_enabled:
            optimizer.param_groups[:] = one_dtype_each(optimizer.param_groups)
        return optimizer

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        try:
            return super()._determine_best_metric(*args, **kwargs)
        except KeyError as error:
            raise UserError(str(error.args[0])) from error

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        try:
            scheduler = super().create_scheduler(*args, **kwargs)
            self._own_settings = settings.settings_of(self.optimizer)
            return scheduler
        except (ValueError, TypeError) as error:
            given = self.args.lr_scheduler_kwargs
            raise UserError(
                f"lr_scheduler_type: {self.args.lr_scheduler_type.value} cannot be made with"
                f" lr_scheduler_kwargs: {given}: {error}"
            ) from error

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        optimizer, last = self._split_adamw(), self.accelerator.sync_gradients
        with contextlib.nullcontext() if optimizer is None else optimizer.during_backward(last):
            loss = super().training_step(*args, **kwargs)
        if optimizer is None and last:
            refuse_missing(self.model_wrapped)
        self.numbers.add(loss)
        if optimizer is not None and self.args.gradient_accumulation_steps > 1:
            optimizer.accumulate(last=last)
        return loss

    def _drop_inactive(self) -> None:
        """BAdam: gradients of what is not trained in this turn are neither clipped nor counted."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, BlockAdamW | RatioAdamW):
            optimizer.drop_inactive()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        optimizer = self._split_adamw()
        self._drop_inactive()
        if optimizer is None:
            return super()._clip_grad_norm(model)
        return self._clip(optimizer, self.args.max_grad_norm)

    def _clip(self, optimizer: SplitAdamW, max_norm: float) -> Tensor:
        """As accelerate clips: gradients of fp16, which are scaled, are divided by the scale before
        their norm is taken. Else the scaler would divide what is clipped already.
        """
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimizer)
            optimizer.forget_norms()
        return optimizer.clip(max_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        optimizer = self._split_adamw()
        self._drop_inactive()
        if optimizer is None or grad_norm is not None:
            grad_norm = super()._get_grad_norm(model, grad_norm)
        else:
            grad_norm = self._clip(optimizer, math.inf)
        self._logged.all += 1
        may_update = self.numbers.may_update(self.state.global_step + 1, grad_norm, model)
        self.meter.summed(self._sums.tolist())
        if not may_update:
            self._skip_update()
        if self.args.device.type == "cuda":
            self._backward_ended = torch.cuda.Event()
            self._backward_ended.record()
        return grad_norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self._beside_the_update():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _beside_the_update(self) -> Iterator[None]:
        """What is only logged was computed before the update of the weights. It is read on a stream
        of its own, which does not wait for the update: while the GPU updates, the host writes the
        row and prepares the next step, for which the GPU would wait.

        An evaluation or a save uses the new weights, on the stream that makes them.
        """
        ended, control = self._backward_ended, self.control
        only_logs = control.should_log and not (control.should_evaluate or control.should_save)
        if ended is None or not only_logs:
            yield
            return
        if self._log_stream is None:
            # first served: a small kernel would else wait for the whole of one of the update's
            self._log_stream = torch.cuda.Stream(self.args.device, priority=-1)
        self._log_stream.wait_event(ended)
        with torch.cuda.stream(self._log_stream):
            yield
        torch.cuda.current_stream(self.args.device).wait_stream(self._log_stream)

    def _skip_update(self) -> None:
        """Leaves out the update of this step: without gradients no optimizer changes a weight or a
        state. Its loss and metrics are not in what is logged.
        """
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss, self._train_metrics, stage = self._logged.before
        vars(self.stage).update(stage)  # a running mean of rewards, say
        if loss is not None:
            self._tr_loss = loss
        self._logged.skipped += 1

    def _where(self, sample: int) -> tuple[str, int]:
        """Data set and row of a training sample; of a stream, which sample it is."""
        where = getattr(self.train_dataset, "where", None)
        return ("the stream", sample) if where is None else where(sample)

    # ---- evaluation ------------------------------------------------------------------------------

    def shard_model(self) -> None:
        """Shards the model by FSDP2 or ZeRO-3 where training has not: an evaluation, or the
        reference's pass, would fail. Collective.
        """
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
            self.__dict__.update(
                model_wrapped=(engine := self.accelerator.prepare(self.model)), deepspeed=engine
            )
        if self.is_fsdp_enabled and not isinstance(self.model_wrapped, FSDPModule):
            # accelerate takes a model for FSDP2 only together with an optimizer. This one is never
            # used.
            sharded, _ = self.accelerator.prepare(
                self.model_wrapped, torch.optim.SGD(self.model_wrapped.parameters())
            )
            self.__dict__.update(model=sharded, model_wrapped=sharded)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        row = inputs["row"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss_sum, metrics = self.stage_loss(model, row)
        items = torch.tensor(
            float(self.stage.count_items(row)), dtype=torch.float64, device=loss_sum.device
        )
        self._eval_metrics.add({"loss": (loss_sum, items), **metrics})
        return (loss_sum / items.clamp(min=1)).float(), None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None:
            self._evaluation = self.state.global_step, dict(metrics)
        return metrics

    def evaluated(self) -> dict[str, float]:
        """The metrics of the evaluation data for the weights as they are: those of the evaluation
        that was made after the last step, or of one that is made now. Collective.
        """
        if self._evaluation is None or self._evaluation[0] != self.state.global_step:
            return self.evaluate()
        return self._evaluation[1]

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._evaluation = None  # of other weights

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The Trainer's loop, with loss and metrics as sums divided by counts: no sample is
        repeated, dropped or weighted wrong.
        """
        self._eval_metrics = MetricSums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        give_up_weights(self.model_wrapped)
        assert output.metrics is not None
        for name, value in self._eval_metrics.means(self._sum_over_groups).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    # ---- logging ---------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            logs.update(self._of_the_whole_run(logs["train_runtime"]))
        if "loss" in logs:
            logs.update(self._train_metrics.means(self._sum_over_groups))
            self.meter.compare_memory(self.args.device)
        self._logged.correct(logs, self.numbers.skipped)
        if self.log_tokens:
            self.state.num_input_tokens_seen = int(self._tokens)
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        super().log(logs, start_time)
