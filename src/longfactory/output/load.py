"""A trained model for use: base weights, adapters merged, the tokenizer that training saved."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longfactory.config.folder import keys_beside
from longfactory.errors import UserError
from longfactory.model import rope
from longfactory.model.adapters import merge_adapter
from longfactory.model.source import Source

if TYPE_CHECKING:
    from longfactory.config import RunConfig

log = logging.getLogger("longfactory")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load(cfg: RunConfig, device: torch.device) -> tuple[Any, Any]:
    """`load_with_source`, without the files."""
    model, tokenizer, _ = load_with_source(cfg, device)
    return model, tokenizer


def load_with_source(cfg: RunConfig, device: torch.device) -> tuple[Any, Any, Source]:
    """The model in evaluation mode, its adapters merged; the tokenizer; and the files of the base
    model.

    Raises:
        UserError: a model or adapter that cannot be loaded, or an adapter of another model.
    """
    from longfactory.model import load as models

    if cfg.model.train_from_scratch and cfg.model.adapter_name_or_path:
        raise UserError(
            "train_from_scratch creates new random weights, and the adapter in "
            "adapter_name_or_path belongs to other weights (random weights are not saved with "
            "an adapter). Train with finetuning_type: full, or name a model with weights."
        )
    tokenizer = load_tokenizer(cfg)
    cfg = with_positions(cfg)
    config = models.load_config(cfg.model, cfg.known_cutoff_len)
    _check_positions(cfg, config)
    dtype = DTYPES.get(cfg.model.infer_dtype) or getattr(config, "dtype", None) or torch.float32
    quantization = models.quantization_config(cfg.model, dtype)
    model = models.load_model(cfg.model, config, dtype, attention=None, quantization=quantization)
    source = models.source_of(model, cfg.model)
    if models.has_new_tokens(cfg.model, tokenizer) or (
        cfg.model.adapter_name_or_path
        and len(tokenizer) > model.get_input_embeddings().weight.shape[0]
    ):
        models.resize_vocabulary(model, tokenizer)
    # On the host, as in training: a device has random numbers of its own, with which PiSSA would
    # begin elsewhere.
    for path in cfg.model.adapter_name_or_path:
        model = merge(model, path)
    if quantization is None:
        model = model.to(device)
    model.config.use_cache = True
    return model.eval(), tokenizer, source


def with_positions(cfg: RunConfig) -> RunConfig:
    """The run with the rope_scaling and the cutoff_len that its last adapter was trained with,
    where it gives no rope_scaling, or the same without such a length: an adapter fits the positions
    it was trained with, and is one of another model without them.
    """
    adapters = cfg.model.adapter_name_or_path
    trained = rope.of_adapter(adapters[-1]) if adapters else None
    if trained is None or trained.rope_scaling is None:
        return cfg
    if cfg.model.rope_scaling not in (None, trained.rope_scaling):
        log.warning(
            "rope_scaling: %s, but %s was trained with %s.",
            *(cfg.model.rope_scaling, adapters[-1], trained.rope_scaling),
        )
        return cfg
    log.info(
        "%s was trained with rope_scaling: %s and cutoff_len: %d, which are used here too.",
        *(adapters[-1], trained.rope_scaling, trained.cutoff_len),
    )
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, rope_scaling=trained.rope_scaling),
        data=dataclasses.replace(cfg.data, cutoff_len=trained.cutoff_len),
    )


def refuse_stretched(cfg: RunConfig, server: str) -> None:
    """Refuses a run whose model has stretched positions that its folder does not say.

    Raises:
        UserError: with what to do.
    """
    from longfactory.model import load as models

    cfg = with_positions(cfg)
    kind = cfg.model.rope_scaling
    if kind is None:
        return
    before = models.load_config(dataclasses.replace(cfg.model, rope_scaling=None), 0)
    if rope.differ(before, models.load_config(cfg.model, cfg.known_cutoff_len)):
        raise UserError(
            f"{server} reads the model's own positions, without rope_scaling: {kind}. Run"
            f" longfactory export with rope_scaling={kind} cutoff_len={cfg.known_cutoff_len}"
            " first, and give model_name_or_path the folder that it writes, without adapters and"
            " rope_scaling."
        )


def _check_positions(cfg: RunConfig, config: Any) -> None:
    """Says what rope_scaling does.

    Raises:
        UserError: nothing, in front of an adapter that was trained with it.
    """
    from longfactory.model import load as models

    kind = cfg.model.rope_scaling
    if kind is None:
        return
    before = models.load_config(dataclasses.replace(cfg.model, rope_scaling=None), 0)
    words, warns = rope.in_words(before, config, kind, cfg.known_cutoff_len)
    adapters = cfg.model.adapter_name_or_path
    # with its own run's keys an adapter has the positions it was trained with: unstretched ones
    own = rope.Trained(kind, cfg.known_cutoff_len)
    if adapters and not rope.differ(before, config) and rope.of_adapter(adapters[-1]) != own:
        raise UserError(f"{words} Set cutoff_len to that of the run that trained the adapter.")
    log.log(logging.WARNING if warns else logging.INFO, words)


def load_tokenizer(cfg: RunConfig) -> Any:
    """The tokenizer that was saved with the last adapter, which has the template's tokens; else the
    model's own.
    """
    from longfactory.model import load as models

    args = cfg.model
    wrote = (str(args.model_name_or_path), *args.adapter_name_or_path)[-1]
    had = keys_beside(wrote).get("template")
    if had and cfg.data.template not in (None, had):
        log.warning(
            "template: %s, but %s was trained with %s: its answers may not end.",
            *(cfg.data.template, wrote, had),
        )
    if (
        args.adapter_name_or_path
        and (Path(args.adapter_name_or_path[-1]) / "tokenizer_config.json").is_file()
    ):
        args = dataclasses.replace(
            args, model_name_or_path=args.adapter_name_or_path[-1], model_revision="main"
        )
    tokenizer = models.load_tokenizer(args)
    if cfg.data.template is not None or tokenizer.chat_template is None:
        named_template(cfg, tokenizer)  # gives the tokenizer what the template needs
    return tokenizer


def named_template(cfg: RunConfig, tokenizer: Any) -> Any:
    """The template of `template:`, without the advice for training."""
    from longfactory.data.templates import get_template

    quiet = logging.Logger("longfactory.output")  # of this call alone
    quiet.disabled = True
    data: Any = cfg.data
    return get_template(data, tokenizer, quiet)


def merge(model: Any, path: str) -> Any:
    """The model with one adapter's product added to its weights.

    Raises:
        UserError: there is no adapter in the folder, or it was trained on another model.
    """
    try:
        return merge_adapter(model, path, safe_merge=True)
    except (ValueError, RuntimeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"adapter_name_or_path: {path} cannot be merged: {' '.join(str(e).split())}"
        ) from e
