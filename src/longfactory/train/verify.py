"""`longfactory verify`: the run's own model and data, split over the ranks, against the same documents one by one without the engine.

The specification here is the model's own attention on each document alone, whole, on every rank, with nothing of sequence parallelism and
no hand-written layer in it. Loss, gradient norm and the gradient of every trained parameter must agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longfactory import sp
from longfactory.config import RunConfig
from longfactory.data.row import Row, TokenizedDocument
from longfactory.errors import UserError
from longfactory.model.adapters import decoder_layers
from longfactory.model.memory.checkpointed import CheckpointedLayer
from longfactory.model.outputs import TokenOutputs
from longfactory.sp import hf
from longfactory.sp.guard import _own_attention
from longfactory.train.callbacks import AtStart
from longfactory.train.reference import disable_dropout
from longfactory.train.run import Assembled, assemble
from longfactory.train.trainer import RowTrainer

ROWS, TOKENS = 2, 2048

# Largest relative differences: of loss and gradient norm, and of one parameter's gradient. Half precision rounds each layer's result to 8
# (bf16) or 11 (fp16) bits, and the two ways add in another order; `bf16=false` gives the sharp proof.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (5e-3, 3e-2)}
# A gradient that is zero in exact arithmetic (the bias of a key projection) is noise: differences count against at least this share of
# the whole gradient's norm.
FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Difference:
    """One row's numbers, both ways. `parameters`: name -> relative difference of the gradient, the worst first."""

    tokens: int
    documents: int
    loss: tuple[float, float]
    grad_norm: tuple[float, float]
    parameters: dict[str, float]

    @property
    def worst(self) -> tuple[float, float]:
        """(of loss and gradient norm, of one parameter)."""
        pairs = (relative(*self.loss), relative(*self.grad_norm))
        return max(pairs, key=_nan_first), max(self.parameters.values(), key=_nan_first, default=0.0)


@dataclasses.dataclass(frozen=True)
class Report:
    """`exact`: every difference is within the tolerance of `dtype`."""

    rows: tuple[Difference, ...]
    dtype: torch.dtype
    title: str

    @property
    def exact(self) -> bool:
        limits = TOLERANCE[self.dtype]
        # `<=` is false for NaN.
        return bool(self.rows) and all(all(d <= limit for d, limit in zip(r.worst, limits, strict=True)) for r in self.rows)

    def table(self) -> str:
        limits = TOLERANCE[self.dtype]
        lines = [self.title, f"{'':32}{'split':>16}{'alone':>16}{'difference':>14}"]
        for i, r in enumerate(self.rows):
            lines.append(f"row {i + 1}: {r.tokens} tokens, {r.documents} documents")
            for name, (a, b) in (("loss", r.loss), ("grad_norm", r.grad_norm)):
                lines.append(f"  {name:<30}{a:>16.8g}{b:>16.8g}{relative(a, b):>14.1e}")
            lines.append(f"  gradients of {len(r.parameters)} parameters; the worst:")
            lines += [f"    {name:<60}{d:>14.1e}" for name, d in list(r.parameters.items())[:5]]
        verdict = "The same." if self.exact else "NOT the same."
        lines.append(f"{verdict} Tolerated: {limits[0]:.0e} for loss and grad_norm, {limits[1]:.0e} for a gradient ({_short(self.dtype)}).")
        if self.dtype != torch.float32:
            lines.append("Half precision rounds. For the sharp proof add bf16=false fp16=false pure_bf16=false.")
        return "\n".join(lines)


def relative(a: float, b: float) -> float:
    """|a - b| / |b|, and 0 where both are 0."""
    return abs(a - b) / max(abs(b), 1e-12) if a != b else 0.0


def _nan_first(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _short(dtype: torch.dtype) -> str:
    return str(dtype).rsplit(".", 1)[-1]


class _Finished(Exception):
    """Leaves the trainer before its first step."""


def verify(cfg: RunConfig, *, rows: int = ROWS, tokens: int = TOKENS) -> Report:
    """Compares both ways on the first rows of the training data. Every process calls it. Writes nothing to the output folder.

    Everything is assembled and wrapped as for training; the comparison takes the place of the first step. DeepSpeed is left out: the
    parameters are spread as without it, since what is compared does not depend on that. Dropout is switched off.

    Args:
        rows: how many rows are compared; those without a trained token do not count.
        tokens: longest row; the documents of a longer one keep their last tokens, each in proportion to its length.
    Raises:
        UserError: the run cannot be assembled, or its data have nothing to compare on.
    """
    if cfg.method.finetuning_type == "lora" and cfg.model.quantization_bit:
        raise UserError("verify compares in full precision; quantised weights are rounded anew in each pass. Leave quantization_bit out.")
    if cfg.method.stage == "sft" and cfg.method.use_asft_loss:
        raise UserError(
            "verify compares log-probabilities of labels, and use_asft_loss also needs whole distributions of a reference. Verify the run "
            "with use_asft_loss=false use_dft_loss=true: the same passes through the same model."
        )
    report: list[Report] = []
    with tempfile.TemporaryDirectory(prefix="longfactory-verify-") as folder:
        run = assemble(quiet(cfg, folder), compares=True)

        def compare() -> None:
            report.append(compare_rows(run.trainer, run.datasets.train, rows, tokens, _title(cfg, run)))
            raise _Finished

        run.trainer.add_callback(AtStart(compare))
        with contextlib.suppress(_Finished):
            run.trainer.train()
    return report[0]


def quiet(cfg: RunConfig, folder: str) -> RunConfig:
    """The run without what it would leave behind: checkpoints, evaluation, trackers, its output folder."""
    drop = ("deepspeed", "resume_from_checkpoint", "load_best_model_at_end", "eval_steps", "save_steps", "push_to_hub", "run_name")
    keys = {k: v for k, v in cfg.hf.items() if k not in drop}
    keys |= {"output_dir": folder, "do_train": True, "do_eval": False, "do_predict": False, "eval_strategy": "no", "save_strategy": "no"}
    keys |= {"report_to": "none", "disable_tqdm": True, "max_steps": 1, "logging_strategy": "no"}
    # References are taken from the model itself, in the comparison.
    method = dataclasses.replace(cfg.method, early_stopping_steps=None)
    return dataclasses.replace(cfg, hf=keys, method=method)


def _title(cfg: RunConfig, run: Assembled) -> str:
    ctx = run.trainer.ctx
    mode = f"{ctx.size} ranks, {cfg.parallel.sequence_parallel_mode}" if ctx.size > 1 else "the engine on one rank"
    return f"{cfg.model.model_name_or_path}, stage {cfg.method.stage}: {mode}, parameters {run.sharding}; against documents alone"


def compare_rows(trainer: RowTrainer, dataset: Any, rows: int, tokens: int, title: str = "") -> Report:
    """Both ways over the first `rows` rows that train something, on the wrapped model. Collective; the model's gradients are cleared."""
    model = trainer.model_wrapped
    disable_dropout(model)
    model.train()
    batch = trainer._train_batch_size
    found: list[Difference] = []
    samples: list[Any] = []
    for sample in dataset if not hasattr(dataset, "__len__") else (dataset[i] for i in range(len(dataset))):
        samples.append(sample)
        if len(samples) < batch:
            continue
        row = trainer.collate(truncate(samples, tokens), sp.alignment(trainer.ctx), trainer.pad_id)
        samples = []
        if trainer.stage.count_items(row) and (row.trained_tokens or trainer.stage.output == "values"):
            found.append(_compare(trainer, model, row))
        if len(found) == rows:
            break
    if not found:
        raise UserError(f"No row of the training data trains a token among the last {tokens} of its documents: nothing can be compared.")
    return Report(tuple(found), _precision(trainer), title)


def _precision(trainer: RowTrainer) -> torch.dtype:
    args = trainer.args
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    dtypes = {p.dtype for p in trainer.model.parameters() if p.is_floating_point()}
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)


def truncate(samples: Sequence[Sequence[TokenizedDocument]], tokens: int) -> list[list[TokenizedDocument]]:
    """Samples of at most about `tokens` tokens together: each document keeps its last ones, in proportion to its length, at least two."""
    total = sum(len(d.input_ids) for s in samples for d in s)
    if total <= tokens:
        return [list(s) for s in samples]

    def cut(d: TokenizedDocument) -> TokenizedDocument:
        keep = max(2, len(d.input_ids) * tokens // total)
        return dataclasses.replace(d, input_ids=d.input_ids[-keep:], labels=d.labels[-keep:])

    return [[cut(d) for d in s] for s in samples]


def _compare(trainer: RowTrainer, model: nn.Module, row: Row) -> Difference:
    alone = alone_outputs(trainer, model, row)
    reference = alone.logps if trainer.stage.needs_reference else None  # any constant will do; the model's own is there
    loss_a = _loss(trainer, dataclasses.replace(_split_outputs(trainer, model, row), reference=reference), row)
    loss_a.backward()
    split = _take_gradients(model)

    x = alone.logps.requires_grad_()
    constant = None if reference is None else reference.detach().clone()
    loss_b = _loss(trainer, dataclasses.replace(alone, logps=x, reference=constant), row)
    (slope,) = torch.autograd.grad(loss_b, x)
    for document in _alone(trainer, model, row):
        # One backward a document: the chain rule through `slope`, which wrappers take for gradient accumulation.
        (document.logps * slope[document.where]).sum().backward()
    own = _take_gradients(model)
    norms, differences = _norms(split, own)
    return Difference(row.real_tokens, len(row.documents), (float(loss_a.detach()), float(loss_b.detach())), norms, differences)


def _loss(trainer: RowTrainer, outputs: TokenOutputs, row: Row) -> Tensor:
    """What every rank differentiates where each data-parallel group holds this row: DP * S / N with N = DP * items."""
    ctx = trainer.ctx
    loss_sum, _ = trainer.stage.loss_sum(
        outputs, row.to(trainer.args.device), dp_sum=trainer._sum_over_groups, dp_rank=ctx.dp_rank, dp_size=ctx.dp_size
    )
    return loss_sum / max(trainer.stage.count_items(row), 1)


def _split_outputs(trainer: RowTrainer, model: nn.Module, row: Row) -> TokenOutputs:
    with trainer.compute_loss_context_manager():
        return trainer.token_outputs(model, row)


@dataclasses.dataclass(frozen=True)
class _Document:
    where: slice
    logps: Tensor
    others: dict[str, Tensor]


def _alone(trainer: RowTrainer, model: nn.Module, row: Row) -> Iterator[_Document]:
    """Each document after its parents through the model's own layers and attention, without the engine."""
    device = trainer.args.device
    with _own_layers(hf.unwrap(model)):
        for d in row.documents:
            if d.role == "pad":
                continue
            chain = [d]
            while chain[0].parent >= 0:
                chain.insert(0, row.documents[chain[0].parent])
            ids = torch.cat([row.input_ids[c.start : c.stop] for c in chain])
            before = len(ids) - (d.stop - d.start)
            labels = torch.cat([torch.full((before,), -100), row.labels[d.start : d.stop]])
            positions = torch.arange(len(ids), device=device)[None]
            with trainer.compute_loss_context_manager(), trainer.head.labels(labels):
                out = model(input_ids=ids[None].to(device), position_ids=positions, use_cache=False)
                full = trainer.head.outputs(out.logits)
            fields = {k: v[before:] for k, v in vars(full).items() if v is not None}
            yield _Document(slice(d.start, d.stop), fields.pop("logps"), fields)


@torch.no_grad()
def alone_outputs(trainer: RowTrainer, model: nn.Module, row: Row) -> TokenOutputs:
    """[T] what `token_outputs` gives, made document by document. Padding is 0."""
    out: dict[str, Tensor] = {}
    for document in _alone(trainer, model, row):
        for name, value in {"logps": document.logps, **document.others}.items():
            out.setdefault(name, value.new_zeros(len(row)))[document.where] = value
    return TokenOutputs(**out)


@contextlib.contextmanager
def _own_layers(inner: Any) -> Iterator[None]:
    """Inside the block decoder layers and attention are transformers' own."""
    held = []
    for layer in decoder_layers(inner)[1]:
        if isinstance(layer.__dict__.get("forward"), CheckpointedLayer):
            held.append((layer, layer.__dict__.pop("forward")))
            if held[-1][1].forward != layer.forward:  # another hook was under it
                layer.forward = held[-1][1].forward
    try:
        with _own_attention(inner):
            yield
    finally:
        for layer, forward in held:
            layer.forward = forward


def _take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by name (this rank's part of sharded ones), moved to the host; the model's are cleared."""
    out = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            g = p.grad if p.grad is not None else torch.zeros_like(p)
            local = g.to_local() if hasattr(g, "to_local") else g
            out[name] = local.detach().to("cpu", torch.float32, copy=True) if local.dtype != torch.float64 else local.detach().cpu().clone()
            p.grad = None
    sharded = {name for name, p in model.named_parameters() if hasattr(p, "to_local")}
    return {f"{'sharded ' if name in sharded else ''}{name}": g for name, g in out.items()}


def _norms(split: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[tuple[float, float], dict[str, float]]:
    """((norm of the split gradient, of the other), name -> relative difference), over all ranks."""
    squares = torch.tensor(
        [[(x.double() ** 2).sum().item() for x in (a, own[name], a.double() - own[name].double())] for name, a in split.items()],
        dtype=torch.float64,
    )
    if dist.is_available() and dist.is_initialized():
        parts = torch.tensor([name.startswith("sharded ") for name in split])
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, squares)
        every = torch.stack(gathered)
        # Parts of sharded gradients add up; of copies the rank that differs most counts.
        copies = every.gather(0, every[..., 2].argmax(0)[None, :, None].expand(1, -1, 3))[0]
        squares = torch.where(parts[:, None], every.sum(0), copies)
    norms = squares.sum(0).sqrt()
    floor = FLOOR * norms[1]
    errors = squares[:, 2].sqrt() / torch.maximum(squares[:, 1].sqrt(), floor).clamp(min=1e-30)
    named = {_plain_name(name): float(e) for name, e in zip(split, errors, strict=True)}
    return (float(norms[0]), float(norms[1])), dict(sorted(named.items(), key=lambda item: -_nan_first(item[1])))


def _plain_name(name: str) -> str:
    return name.removeprefix("sharded ").removeprefix("module.").replace("base_model.model.", "")
