"""What LongFactory relies on of transformers' Trainer, public or private: the methods that
`RowTrainer` overrides and those that it calls, by name and signature.

A method that is renamed would never be called, and the run would go on with transformers' own loss
or checkpoint; an argument that is added would be dropped on the way. Both end the run at start.
"""

from __future__ import annotations

import inspect

import transformers
import transformers.trainer

from longfactory.errors import UserError

SUPPORTED = "5.17 to 5.23"
"""Versions of transformers whose Trainer has these signatures."""

OVERRIDDEN = {
    "get_train_dataloader": "",
    "get_eval_dataloader": "eval_dataset=",
    "get_total_train_batch_size": "args",
    "set_initial_training_values": "args, dataloader",
    "get_batch_samples": "epoch_iterator, num_batches, device",
    "compute_loss": "model, inputs, return_outputs=, num_items_in_batch=",
    "floating_point_ops": "inputs",
    "create_optimizer": "model=",
    "create_scheduler": "num_training_steps, optimizer=",
    "training_step": "model, inputs, num_items_in_batch=",
    "prediction_step": "model, inputs, prediction_loss_only, ignore_keys=",
    "evaluate": "eval_dataset=, ignore_keys=, metric_key_prefix=",
    "evaluation_loop": (
        "dataloader, description, prediction_loss_only=, ignore_keys=, metric_key_prefix="
    ),
    "log": "logs, start_time=",
    "save_model": "output_dir=, _internal_call=",
    "_clip_grad_norm": "model",
    "_get_grad_norm": "model, grad_norm=",
    "_determine_best_metric": "metrics, trial",
    "_save_checkpoint": "model, trial",
    "_maybe_log_save_evaluate": (
        "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate="
    ),
    "_finalize_training": "trial, num_train_samples, start_time",
    "_load_rng_state": "checkpoint",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_from_checkpoint": "resume_from_checkpoint, model=",
    "_load_best_model": "",
    "_push_from_checkpoint": "checkpoint_folder",
    "_finish_current_push": "",
}
"""Method of the Trainer -> its parameters after `self`; `=` follows one that has a default."""

CALLED = {
    "_save": "output_dir=, state_dict=",
    "compute_loss_context_manager": "",
    "store_flos": "",
    "_save_scaler": "output_dir",
    "_save_rng_state": "output_dir",
}
"""The same, of methods that are called and not overridden."""


def signature_of(method: object) -> str:
    """The parameters of a method after `self`, as `OVERRIDDEN` writes them.

    Args:
        method: a function of a class.
    Returns:
        Names in order; `=` after one with a default, `*` or `**` before one that takes the rest.
    """
    stars: dict[object, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    names = []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:  # type: ignore[arg-type]
        default = "" if parameter.default is inspect.Parameter.empty else "="
        names.append(stars.get(parameter.kind, "") + parameter.name + default)
    return ", ".join(names)


def check_trainer(trainer_class: type) -> None:
    """Compares the methods of transformers' Trainer with those that LongFactory was built on.

    Args:
        trainer_class: `transformers.Trainer`.
    Raises:
        UserError: a method is missing or has another signature; names each.
    """
    problems = []
    for name, expected in {**OVERRIDDEN, **CALLED}.items():
        method = getattr(trainer_class, name, None)
        if method is None:
            problems.append(f"Trainer.{name} is missing, expected Trainer.{name}({expected})")
        elif (found := signature_of(method)) != expected:
            problems.append(f"got Trainer.{name}({found}), expected Trainer.{name}({expected})")
    if not hasattr(transformers.trainer, "skip_first_batches"):
        problems.append("got no transformers.trainer.skip_first_batches, by which a run resumes")
    if problems:
        raise UserError(
            f"transformers {transformers.__version__} has another Trainer than LongFactory"
            f" overrides: {'; '.join(problems)}. Install transformers {SUPPORTED}, or a newer"
            " LongFactory."
        )
