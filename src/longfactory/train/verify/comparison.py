"""An optimizer step of the run itself, against the same documents one by one in transformers' own
model.

The step is the trainer's: its loader, its count of items, its loss and scale, its micro-batches,
reduction and clipping, on the model as it is wrapped and sharded, with the layers and kernels that
train. The specification (`train/verify/alone.py`) shares none of that. Both are compared with the
specification in a wider precision (float32, for float32 float64); a step may be off by a few times
what transformers' own attention in the run's precision is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from longfactory.config import RunConfig
from longfactory.data.row import Row
from longfactory.data.samples import DecodedSample, decoded_samples
from longfactory.errors import UserError
from longfactory.memory.chunked import runs_in_chunks
from longfactory.model.routing import router_loss_coefficient
from longfactory.shard.settings import in_words, whole_models
from longfactory.sp import hf, routers, vision
from longfactory.train.ranks import everywhere, from_all, from_main, is_distributed
from longfactory.train.reference import Reference, adapter_is_reference, disable_dropout
from longfactory.train.run import Assembled
from longfactory.train.trainer import RowTrainer
from longfactory.train.verify import alone, zero
from longfactory.train.verify.alone import Precision, Step, Text
from longfactory.train.verify.cost import KEPT_BYTES, affordable, kept_bytes, longest_row
from longfactory.train.verify.gradients import (
    gradient_deviations,
    kind_reasons,
    plain_name,
    scale_reasons,
    share_reasons,
    stir_adapters,
    take_gradients,
)
from longfactory.train.verify.probes import (
    LAYERS,
    MASK,
    ROWS_OF_DATA,
    SAVED,
    WINDOW,
    Reason,
    leak_check,
)
from longfactory.train.verify.report import (
    FLOOR,
    Check,
    Deviation,
    RowShape,
    State,
    VerifyReport,
    relative,
)
from longfactory.train.verify.rows import (
    Chosen,
    choose,
    crossed,
    exercises,
    lengthened,
    mask_reasons,
    padded,
    row_shape,
    windows_of,
)
from longfactory.train.verify.scores import compare_scores, loss_deviation, scores_of
from longfactory.train.verify.watch import Seen, probe_leaks, row_reasons, watch_step

UNDECIDED = 0.3
"""From here on the own gradients' relative error says that a model's gradients are rounding."""
OFFSETS = {"chosen": 0.5, "rejected": -0.25, "kl": -0.5}
"""The reference is the model itself, moved by these shares of 1 / beta: at the model's own numbers
many losses are flat.
"""


class _References:
    """Gives the documents of a row the reference's numbers, by role and sample."""

    def __init__(self, numbers: dict[tuple[str, int], float]) -> None:
        self.numbers = numbers

    def attach(self, row: Row) -> Row:
        documents = [
            dataclasses.replace(d, reference_logp=self.numbers.get((d.role, d.sample)))
            for d in row.documents
        ]
        return dataclasses.replace(row, documents=tuple(documents))


class Comparison(TrainerCallback):
    """Before the first step: the specification, on one process. In it: what the trainer does is
    watched. After it: both are compared.
    """

    def __init__(
        self,
        cfg: RunConfig,
        run: Assembled,
        rows: int,
        tokens: int | None,
        folder: str,
        *,
        rerun: bool = False,
        apart: bool = False,
    ) -> None:
        self.rerun = rerun
        self.cfg, self.run, self.trainer, self.folder = cfg, run, run.trainer, folder
        ctx = self.trainer.ctx
        self.groups, self.main = ctx.dp_size, not is_distributed() or dist.get_rank() == 0
        if apart:
            self.trainer._train_batch_size = 1
        batch = self.trainer._train_batch_size
        if tokens is None:
            tokens = longest_row(self.trainer, rows * ctx.dp_size)
        self.tokens = tokens
        self.items = choose(run.datasets.train, rows * ctx.dp_size, batch, tokens, apart)
        crossed(self.items[0], self.trainer)
        padded(self.items[-1], self.trainer)
        self.windows = windows_of(hf.unwrap(self.trainer.model).config.get_text_config())
        self.window_checks = [] if rerun else self._exercise_windows(tokens)
        self.texts = [[text for item in row for text in alone.texts_of(item)] for row in self.items]
        self.data = Chosen([item for row in self.items for item in row])
        self.trainer.train_dataset = self.data
        self.trainer.shuffle = False
        self.seen = Seen()
        self.gradients: dict[str, Tensor] = {}
        self.unreduced: dict[str, float] = {}
        self.finished = False
        self.stirred = 0
        self.derived: list[str] = []
        self.spec: Step | None = None
        self.own: Step | None = None
        self.choices: dict[Text, routers.Choices] = {}
        self.installed = contextlib.ExitStack()
        """Takes away what `watch_step` put on the trainer and its model."""

    # What is compared.

    def _exercised(self, size: int) -> bool:
        return any(exercises(texts, size) for texts in self.texts)

    def _exercise_windows(self, tokens: int) -> list[Check]:
        """Makes the last row one in which the model's windows hide keys, where none does. What is
        to be said of each window.
        """
        checks = []
        for key, size in self.windows.items():
            made = ""
            if not any(exercises(_texts(row), size) for row in self.items):
                needed = size + size // 4 + 16
                if needed > tokens and not affordable(self.trainer, needed):
                    words = (
                        f"{key}; rows have {tokens} tokens, and one of {needed} would take too much"
                        f" memory or time. verify_tokens={needed} asks for it"
                    )
                    checks.append(Check(f"window {size}", "not exercised", words))
                    continue
                last = self.items[-1]
                i = next(i for i, item in enumerate(last) if any(t.places for t in _texts([item])))
                last[i] = lengthened(last[i], size, self.run.datasets.train)
                made = f"; row {len(self.items)} was made longer for it"
            words = f"trained tokens have keys that it hides ({key}){made}"
            checks.append(Check(f"window {size}", "passed", words))
        return checks

    def _checks(
        self, rows: Sequence[RowShape], reasons: Sequence[Reason], leak: Check
    ) -> Iterator[Check]:
        """What was looked at, in the order of a step."""
        size = self.cfg.sequence_parallel_size
        failed: dict[str, str] = {}
        for name, told in reasons:
            failed.setdefault(name, told)

        def check(name: str, words: str) -> Check:
            state: State = "failed" if name in failed else "passed"
            return Check(name, state, failed.get(name, words))

        counted = max((len(layers) for layers in self.seen.layers), default=0)
        yield check(LAYERS, f"{counted} layers computed 1/{size} of each row")
        if size > 1 and not any(row.crossing for row in rows):
            words = "no document of these rows lies on several ranks"
            yield Check("documents across ranks", "not exercised", words)
        words = "each row holds its documents' tokens, positions and shifted labels"
        yield check(ROWS_OF_DATA, words)
        padding = sum(row.padding for row in rows)
        yield check(MASK, f"they get no gradient, and neither do {padding} tokens of padding")
        yield leak
        for window in self.window_checks:
            wrong = WINDOW in failed and window.state == "passed"
            yield Check(window.name, "failed", failed[WINDOW]) if wrong else window
        if self.stirred:
            words = (
                f"{self.stirred} matrices that start at zero got small random values, so that "
                "both matrices of each pair have gradients"
            )
            yield check(SAVED, words)

    def _samples(self) -> tuple[DecodedSample, ...]:
        seed = self.trainer.args.seed
        return decoded_samples(self.run.datasets.train, self.run.tokenizer, seed)

    # Before the step.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, method = self.trainer, self.cfg.method
        disable_dropout(trainer.model_wrapped)
        self.stirred = stir_adapters(trainer.model)
        adapter_off = (
            trainer.stage.needs_reference
            and adapter_is_reference(method)
            and not method.precompute_ref_log_probs
        )
        trainer.reference = Reference(by_adapter=adapter_off)
        model, failure = None, None
        if self.main:
            try:
                with whole_models(args):
                    longest = max(len(text.tokens) for row in self.texts for text in row)
                    model = alone.build(
                        self.cfg,
                        self.run.tokenizer,
                        trainer.model,
                        args.device,
                        recompute=kept_bytes(trainer, longest) > KEPT_BYTES,
                        processing=None if trainer.images is None else trainer.images.processing,
                    )
            except UserError as error:
                failure = str(error)
            except Exception as error:  # the other processes wait for this one
                failure = f"transformers cannot make the model a second time: {_first_line(error)}"
        if (failure := from_main(failure)) is not None:
            raise UserError(failure)
        dtypes = alone.copy_values(trainer.model, model)
        if model is not None:
            self.derived = alone.wrong_frequencies(trainer.model, model)
            try:
                self._specify(model, dtypes, adapter_off)
            except torch.OutOfMemoryError as error:
                failure = (
                    "The first device cannot hold, next to the run, the model in a wider "
                    "precision and the attention of a whole document. Lower verify_tokens, or "
                    f"verify on larger devices ({_first_line(error)})."
                )
            except Exception as error:  # whatever the model's own code does in this precision
                told = _first_line(error)
                failure = f"transformers' own model cannot compute the documents alone: {told}"
            del model
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
        if (failure := from_main(failure)) is not None:
            raise UserError(failure)
        if (failure := from_main(self._idle())) is not None:
            raise UserError(failure)
        spec = self.spec
        self.choices, references = from_main(
            None if spec is None else (spec.choices, spec.references)
        )
        if trainer.stage.needs_reference and not adapter_off:
            numbers = {(text.role, text.sample): number for text, number in references.items()}
            trainer.reference = Reference(computed=((self.data, _References(numbers)),))
        watch_step(trainer, self.seen, self.choices, self.installed)
        if self.run.sharding == "deepspeed":
            self.installed.callback(zero.before_step(trainer.model_wrapped, self._take))

    def _specify(self, model: nn.Module, dtypes: dict[str, torch.dtype], adapter_off: bool) -> None:
        """The step in a wider precision, and in the run's, by transformers' own model."""
        method, device = self.cfg.method, self.trainer.args.device
        # Row m * groups + g is the m-th micro-batch of group g.
        batches = [self.texts[i : i + self.groups] for i in range(0, len(self.texts), self.groups)]
        beta = method.pref_beta

        def reference(text: Text, logp: float) -> float:
            return logp + OFFSETS.get(text.role, 0.0) / beta

        wanted = reference if self.trainer.stage.needs_reference and not adapter_off else None
        precision = run_precision(self.trainer, self.run.sharding, dtypes)
        wider = Precision(torch.float64 if precision == Precision() else torch.float32)
        # Rounding is compared with the run's own way of computing experts.
        experts = getattr(
            hf.unwrap(self.trainer.model).config.get_text_config(), "_experts_implementation", None
        )
        alone.experts_by(model, "eager")
        self.spec = alone.run_step(
            model, method, batches, wider, device, reference=wanted, adapter_off=adapter_off
        )
        alone.experts_by(model, experts)
        self.own = alone.run_step(
            model,
            method,
            batches,
            precision,
            device,
            reference=wanted,
            adapter_off=adapter_off,
            step=self.spec,
        )

    def _idle(self) -> str | None:
        """Under DDP: trained parameters that no document reaches. The first step would leave them
        and others unreduced, the next fail.
        """
        if self.spec is None or self.run.sharding != "ddp":
            return None
        model = self.trainer.model
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        given_zeros = tuple(
            f"{name}." for name, module in model.named_modules() if runs_in_chunks(module)
        )
        of_images = self._of_images()
        idle = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad
            and name not in self.spec.gradients
            and not name.startswith(given_zeros)
            and id(p) not in of_images
        ]
        if not idle or getattr(self.trainer.args, "ddp_find_unused_parameters", False):
            return None
        return (
            f"{len(idle)} of {len(trained)} trained parameters get no gradient from any document:"
            f" {', '.join(map(plain_name, idle[:3]))}. DDP waits for them, and leaves gradients of"
            " others out of the reduction. Freeze them, or set ddp_find_unused_parameters: true."
        )

    def _of_images(self) -> set[int]:
        """Parameters that every row gives a gradient, zeros without images: of tower and
        projector.
        """
        if self.trainer.images is None:
            return set()
        inner = hf.unwrap(self.trainer.model)
        modules = [m for part in vision.modules_of(inner).values() for m in part]
        found = {id(p) for module in modules for p in module.parameters()}
        return found | {id(p) for p in vision.own_parameters(inner)}

    # The step.

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.sharding != "deepspeed":  # its engine has made its step by now
            self._take()
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        finite = scaler is None or everywhere(
            all(bool(torch.isfinite(g).all()) for g in self.gradients.values()), args.device
        )
        self.finished = finite or state.global_step + 1 >= args.max_steps

    def _take(self) -> None:
        if self.run.sharding == "deepspeed":
            self.gradients = zero.gradients(self.trainer.model, self.main)
        else:
            self.gradients, self.unreduced = take_gradients(self.trainer.model, self.main)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.finished
        if control.should_training_stop:
            probe_leaks(self.trainer, self.seen, self.groups)

    # After it.

    def report(self) -> VerifyReport:
        """The same on every process. Collective."""
        trainer, cfg = self.trainer, self.cfg
        size, ctx = cfg.sequence_parallel_size, trainer.ctx
        mine = [m * self.groups + ctx.dp_rank for m in range(len(self.seen.rows))]
        values = trainer.stage.output == "values"
        reasons = row_reasons(self.seen, mine, self.texts, size, values)
        outputs = {
            i: scores_of(row, out, self.texts[i], values)
            for i, row, out in zip(mine, self.seen.rows, self.seen.outputs, strict=False)
        }
        shapes = {i: row_shape(row, ctx) for i, row in zip(mine, self.seen.rows, strict=False)}
        parts = from_all((reasons, outputs, shapes, self.seen.leaks))
        unsaved = incomplete_save(trainer, self.folder)
        report = self._compared(parts, unsaved) if self.main else None
        return from_main(report)

    def _compared(
        self,
        parts: Sequence[tuple[list[Reason], dict[int, Any], dict[int, RowShape], list[Any]]],
        unsaved: str | None,
    ) -> VerifyReport:
        spec, own, trainer = self.spec, self.own, self.trainer
        assert spec is not None and own is not None
        tagged = list(dict.fromkeys(reason for found, *_ in parts for reason in found))
        outputs = {i: out for _, found, *_ in parts for i, out in found.items()}
        shapes = {i: shape for _, _, found, _ in parts for i, shape in found.items()}
        leaked = {number: (number, *found) for *_, leaks_ in parts for number, *found in leaks_}
        used = [d for row in self.items for item in row for d in item]
        tagged += [(MASK, told) for told in mask_reasons(self.run.datasets.train, used)]
        reasons = [told for _, told in tagged]

        logs: dict[str, float] = next(
            (entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {}
        )
        losses = loss_deviation(float(logs.get("loss", math.nan)), spec, own)
        logps, where, distances = compare_scores(
            outputs,
            self.texts,
            self.groups,
            spec,
            own,
            values=trainer.stage.output == "values",
            window=getattr(
                hf.unwrap(trainer.model).config.get_text_config(), "sliding_window", None
            ),
        )
        parameters, total = gradient_deviations(self.gradients, spec.gradients, own.gradients)
        logged = float(logs.get("grad_norm", math.nan))
        grad_norm = dataclasses.replace(
            total, split=logged, difference=relative(logged, total.alone)
        )

        if total.own > UNDECIDED and not all(m.exact for m in parameters.values()):
            reasons.append(
                "In this precision the gradients of transformers' own model are "
                f"{100 * total.own:.0f} % off as well: they are dominated by rounding and "
                "cannot be compared. Verify in float32 (bf16=false fp16=false pure_bf16=false)."
            )
        seen, sentences = leak_check([leaked[number] for number in sorted(leaked)])
        reasons += sentences
        reasons += where
        tagged += [(WINDOW, told) for told in where if "its sliding window is" in told]
        reasons += self.derived
        scaled = scale_reasons(losses, self.gradients, spec.gradients, total)
        scaled = scaled or share_reasons(self.gradients, spec.samples, total)
        reasons += scaled
        reasons += self._gradient_reasons(spec, total)
        if unsaved is not None:
            reasons.append(unsaved)
            tagged.append((SAVED, unsaved))
        if logps.exact and not losses.exact and not scaled:
            reasons.append(
                "Log-probabilities agree but the loss does not: the stage computes it wrongly "
                "from them (its sum, its number of items, or the reference's values)."
            )
        if logps.exact and losses.exact and not scaled:
            reasons += kind_reasons(parameters)
        rows = tuple(shapes[i] for i in sorted(shapes))
        return VerifyReport(
            rows,
            losses,
            grad_norm,
            logps,
            parameters,
            tuple(reasons),
            tuple(self._notes()),
            _precision(trainer),
            _title(self.cfg, self.run),
            () if self.rerun else tuple(self._checks(rows, tagged, seen)),
            samples=() if self.rerun else self._samples(),
            tokens=tuple(distances),
            longest_row=self.tokens,
            windows=tuple(s for s in self.windows.values() if self._exercised(s)),
            parameter_count=sum(map(zero.count, trainer.model.parameters())),
        )

    def _gradient_reasons(self, spec: Step, total: Deviation) -> Iterator[str]:
        """Trained parameters whose gradients are missing, or differ between processes."""
        unreached = [
            name
            for name, g in spec.gradients.items()
            if g.norm() > FLOOR * total.alone
            and (name not in self.gradients or not self.gradients[name].any())
        ]
        if unreached:
            yield (
                f"No gradient reaches {len(unreached)} trained parameters:"
                f" {', '.join(map(plain_name, unreached[:3]))}."
            )
        if self.unreduced:
            worst = sorted(self.unreduced, key=lambda name: -self.unreduced[name])
            yield (
                f"The gradients of {len(worst)} trained parameters differ between processes, which"
                f" would train different models: {', '.join(map(plain_name, worst[:3]))}. They are"
                " left out of the reduction."
            )

    def _notes(self) -> list[str]:
        notes = []
        inner = hf.unwrap(self.trainer.model)
        if router_loss_coefficient(self.cfg.method.moe_aux_loss_coef, inner.config):
            notes.append(
                "The routers' auxiliary loss (moe_aux_loss_coef) is left out of both sides: it was"
                " not compared."
            )
        experts = any("Experts" in type(m).__name__ for m in self.trainer.model.modules())
        if experts and all(choices.tokens is None for choices in self.choices.values()):
            notes.append(
                "The routers of this model are not known: near ties, a different choice of "
                "experts may cause differences."
            )
        if not hasattr(self.run.datasets.train, "stores"):
            notes.append(
                "The data are streamed: prompt masking was checked on the documents, not on "
                "their parts."
            )
        return notes


def _texts(row: Sequence[alone.Item]) -> list[Text]:
    return [text for item in row for text in alone.texts_of(item)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _precision(trainer: RowTrainer) -> torch.dtype:
    args = trainer.args
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    dtypes = {p.dtype for p in trainer.model.parameters() if p.is_floating_point()}
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)


def run_precision(trainer: RowTrainer, sharding: str, dtypes: dict[str, torch.dtype]) -> Precision:
    """How the run computes. FSDP2 gathers weights in the dtype that autocast computes in."""
    args = trainer.args
    autocast = _precision(trainer) if args.bf16 or args.fp16 else None
    if sharding == "deepspeed":  # its engine computes in the weights' own type
        return Precision(dtypes if autocast is not None else torch.float32, None)
    if autocast is not None and sharding == "fsdp2":
        dtypes = dict.fromkeys(dtypes, autocast)
    plain = all(d in (torch.float32, torch.float64) for d in dtypes.values())
    return Precision(torch.float32 if plain else dtypes, autocast)


def _title(cfg: RunConfig, run: Assembled) -> str:
    ctx = run.trainer.ctx
    mode = (
        f"{ctx.size} ranks, {cfg.parallel.sequence_parallel_mode}"
        if ctx.size > 1
        else "the engine on one rank"
    )
    return (
        f"{cfg.model.model_name_or_path}, stage {cfg.method.stage}: {mode}, parameters "
        f"{in_words(run.sharding)}; one optimizer step, compared with each document alone "
        f"({str(_precision(run.trainer)).rsplit('.', 1)[-1]})"
    )


def incomplete_save(trainer: RowTrainer, folder: str) -> str | None:
    """Saves an adapter into `folder`, as the end of a run does. What the check of that save says,
    on the process that writes; of whole weights, which take long to write, None. Collective."""
    if not hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
        return None
    try:
        trainer.save_model(str(Path(folder) / "adapter"))
    except UserError as error:
        return str(error)
    return None
