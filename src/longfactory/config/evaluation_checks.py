"""Contradictions about evaluations, generated answers, and the best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from longfactory.config.data_names import short_names
from longfactory.config.run import RunConfig
from longfactory.config.stage_facts import STAGES


def predicting(cfg: RunConfig) -> Iterator[str]:
    """Generated answers: do_predict, predict_with_generate, infer_backend."""
    m, trainer = cfg.method, cfg.trainer
    predicts = trainer.predict_with_generate
    if predicts and not STAGES[m.stage].predicts:
        yield (
            f"predict_with_generate is for stage: sft; this run's stage is {m.stage}. Leave it out."
        )
    if cfg.model.infer_backend == "vllm" and (
        not trainer.do_predict or trainer.do_train or trainer.do_eval
    ):
        yield (
            "infer_backend: vllm generates with a saved model: use do_predict: true with "
            "do_train: false and do_eval: false. Leave it out of a training run."
        )
    if trainer.do_predict and not predicts:
        yield "do_predict writes generated answers. Set predict_with_generate: true."
    if predicts and m.compute_accuracy:
        yield (
            "predict_with_generate and compute_accuracy cannot be used together. Keep one of them."
        )
    if predicts and cfg.parallel.sequence_parallel_size not in (1, "auto"):
        yield (
            "predict_with_generate generates on one device. Set sequence_parallel_size: 1, or"
            " generate from the exported model."
        )


def best_checkpoint(cfg: RunConfig) -> Iterator[str]:
    """By what the best checkpoint is chosen, and when a run stops for want of a better one."""
    m, trainer = cfg.method, cfg.trainer
    if not STAGES[m.stage].reloads_best and trainer.load_best_model_at_end:
        yield (
            f"load_best_model_at_end is not supported with stage: {m.stage}. Leave it out and"
            " choose the checkpoint by its evaluation."
        )
    if m.early_stopping_steps is not None and trainer.eval_strategy == "no":
        yield "early_stopping_steps counts evaluations. Set eval_strategy and eval_steps."
    judged = (
        trainer.load_best_model_at_end
        or trainer.save_strategy == "best"
        or m.early_stopping_steps is not None
    )
    compared = trainer.metric_for_best_model and trainer.eval_strategy != "no"
    each = _evaluated_alone(cfg)
    if each and (judged or compared):
        metric = str(trainer.metric_for_best_model or "loss").removeprefix("eval_")
        if not any(metric.startswith(f"{name}_") for name in each):
            yield (
                "With eval_on_each_dataset each data set has its own loss, and the best "
                "checkpoint is chosen by one of them. Set metric_for_best_model: "
                f"eval_{each[0]}_loss (or another's)."
            )
    if trainer.metric_for_best_model and trainer.eval_strategy != "no":
        yield from _metric(cfg, trainer.metric_for_best_model)
    if trainer.save_strategy == "best" and not trainer.metric_for_best_model:
        yield (
            "save_strategy: best compares evaluations. Set metric_for_best_model, for example loss."
        )


def _evaluated_alone(cfg: RunConfig) -> list[str]:
    """The data sets that have metrics of their own, by the names in these; none where one
    evaluation is of all.
    """
    several = cfg.data.eval_on_each_dataset and len(cfg.data.eval_dataset) > 1
    return short_names(cfg.data.eval_dataset) if several else []


OF_TOKENS = (
    *("loss", "accuracy", "kl"),
    *("router_aux_loss", "expert_max_load", "expert_entropy", "expert_dead"),
)
"""What evaluations of pt and sft may compute."""


def _metric(cfg: RunConfig, given: str) -> Iterator[str]:
    """A metric that no evaluation computes would end the run after its first one."""
    name = given.removeprefix("eval_")
    each = _evaluated_alone(cfg)
    # one data set's name may begin with another's
    names = [name.removeprefix(f"{of}_") for of in each if name.startswith(f"{of}_")]
    if each and not names:
        return  # it is told that each has its own
    names = names or [name]
    if all(n.startswith(("rouge-", "bleu-")) for n in names):
        yield (
            f"metric_for_best_model: {given} measures generated answers, and evaluation during "
            "training generates none. Set loss, or compare saved checkpoints with do_predict "
            "and predict_with_generate."
        )
    elif cfg.method.stage in ("pt", "sft"):
        computed = [n for n in names if n in OF_TOKENS]
        if computed == ["accuracy"] and not cfg.method.compute_accuracy:
            yield f"metric_for_best_model: {given} needs compute_accuracy: true."
        elif not computed:
            yield (
                f"metric_for_best_model: no evaluation computes {given}. Choose loss, or accuracy"
                " with compute_accuracy: true."
            )
