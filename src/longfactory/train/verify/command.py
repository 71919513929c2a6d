"""`longfactory verify`: the run as it is verified, its step, and what a failure follows."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

from longfactory.config import RunConfig
from longfactory.config.adapter_facts import trains_adapters
from longfactory.errors import UserError
from longfactory.train.display import ProgressLine
from longfactory.train.run import assemble, decided
from longfactory.train.survival.start import meet
from longfactory.train.survival.watch import Watch
from longfactory.train.verify import causes, zero
from longfactory.train.verify.comparison import Comparison
from longfactory.train.verify.report import VerifyReport

ROWS = 2
"""Micro-batches of a step, by default."""
MOST_SCALED_STEPS = 24
"""float16: so often the scale of the loss may halve until gradients are finite."""


def verify(
    cfg: RunConfig,
    *,
    rows: int = ROWS,
    tokens: int | None = None,
    watch: Watch | None = None,
    traced: bool = False,
) -> VerifyReport:
    """One optimizer step of the run, compared. Every process calls it. Writes nothing to the output
    folder.

    The step has `rows` micro-batches in each data-parallel group, the first of the training data
    that train something. Dropout, noise and the
    optimizer's own work are left out, and adapters that begin at zero (half of their gradients
    would be zero) get small random numbers.

    Args:
        rows: micro-batches of each data-parallel group.
        tokens: longest row; the documents of a longer one keep their last tokens, each in
            proportion to its length. By default 2048, and on a CPU as many as take a minute.
        watch: over this process, where there is one.
        traced: where the comparison fails, the run is verified again without one thing after the
            other (`causes`).
    Raises:
        UserError: the run cannot be assembled, its data have nothing to compare on, or it is not
            the run of its configuration.
    """
    if trains_adapters(cfg.method) and cfg.model.quantization_bit:
        raise UserError(
            "verify compares with the model in float32, which a quantised model does not have."
            " Leave quantization_bit out."
        )
    if cfg.trainer.deepspeed is not None and cfg.trainer.fp16:
        raise UserError(
            "verify does not follow DeepSpeed's own loss scale. Verify the run with fp16=false"
            " (float32) or bf16=true, or without deepspeed."
        )
    if cfg.method.stage == "sft" and cfg.method.use_asft_loss:
        raise UserError(
            "verify compares log-probabilities of labels, and use_asft_loss also needs the "
            "reference's full distributions. Verify the run with use_asft_loss=false "
            "use_dft_loss=true: the same passes through the same model."
        )
    if cfg.method.stage in ("pt", "sft") and cfg.method.loss_path is not None:
        raise UserError(
            "verify must know which values a loss detaches, and cannot know it for loss_path: "
            f"{cfg.method.loss_path}. Verify the run without loss_path: the same passes "
            "through the same model."
        )
    store, _ = meet(cfg, watch, writes=False)
    cfg = decided(cfg, store)
    report = compared(cfg, rows, tokens, store)
    if report.exact or not traced:
        return report
    found = causes.variants(
        cfg,
        rows=rows,
        tokens=report.longest_row,
        several=any(len({sample for *_, sample in row.placed}) > 1 for row in report.rows),
        windows=report.windows,
        parameters=report.parameter_count,
    )
    return dataclasses.replace(
        report,
        causes=causes.trace(
            found,
            lambda variant: compared(
                variant.cfg, variant.rows, variant.tokens, None, rerun=True, apart=variant.apart
            ),
        ),
    )


def compared(
    cfg: RunConfig,
    rows: int,
    tokens: int | None,
    store: Any,
    *,
    rerun: bool = False,
    apart: bool = False,
) -> VerifyReport:
    """Assembles a run, makes its step, and compares it. Collective.

    Args:
        store: where the process group meets; None where it is open.
        rerun: an earlier comparison has failed: rows are not made longer than `tokens`, and samples
            are not shown again.
        apart: one sample a row.
    """
    with tempfile.TemporaryDirectory(prefix="longfactory-verify-") as folder:
        run = assemble(quiet(cfg, folder, rows), wide_weights=True, store=store)
        comparison = Comparison(cfg, run, rows, tokens, folder, rerun=rerun, apart=apart)
        run.trainer.add_callback(comparison)
        run.trainer.remove_callback(ProgressLine)
        with comparison.installed:
            run.trainer.train()
        return comparison.report()


def quiet(cfg: RunConfig, folder: str, rows: int) -> RunConfig:
    """The run without what it would leave behind (checkpoints, evaluation, trackers, its output
    folder), and without what is not compared: noise, and the optimizer."""
    drop: tuple[str, ...] = (
        "resume_from_checkpoint",
        "load_best_model_at_end",
        "eval_on_start",
        "eval_steps",
        "save_steps",
        "push_to_hub",
        "run_name",
    )
    drop += (
        "neftune_noise_alpha",
        "optim_args",
        "optim_target_modules",
        "lr_scheduler_kwargs",
        "dataloader_num_workers",
        "warmup_ratio",
    )
    keys = {k: v for k, v in cfg.hf.items() if k not in drop}
    keys |= {
        "output_dir": folder,
        "do_train": True,
        "do_eval": False,
        "do_predict": False,
        "eval_strategy": "no",
        "save_strategy": "no",
    }
    keys |= {
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    keys |= {
        "max_steps": MOST_SCALED_STEPS if cfg.trainer.fp16 else 1,
        "gradient_accumulation_steps": rows,
    }
    # Nothing moves, and nothing is clipped; but the norm is what the trainer's own clipping finds.
    keys |= {
        "optim": "sgd",
        "learning_rate": 0.0,
        "max_grad_norm": 1e30,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    if cfg.trainer.deepspeed is not None:
        keys["deepspeed"] = zero.without_optimizer(cfg.trainer.deepspeed, bf16=cfg.trainer.bf16)
    # the routers' auxiliary loss is of whole rows, not of documents: it is left out of both sides
    method = dataclasses.replace(
        cfg.method, early_stopping_steps=None, loraplus_lr_ratio=None, moe_aux_loss_coef=0.0
    )
    memory = dataclasses.replace(
        cfg.memory, optimizer_placement="gpu", offload_gradients=False, optimizer_overlap=False
    )
    # numbers of eight bits have no reference in float32
    model = dataclasses.replace(cfg.model, fp8=False)
    return dataclasses.replace(cfg, hf=keys, model=model, method=method, memory=memory)
