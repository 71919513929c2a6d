"""Gives a run its reference: the adapter switched off, or numbers computed once before the first
step and kept on disk.

Without `ref_model` the reference is the model as it is before the first step, so the pass is made
with the very model that is trained, wrapped and sharded as it is: no second model is ever held.
With `ref_model` that model is loaded for the pass and dropped.

asft compares distributions over the whole vocabulary, of which no number a document is left to
keep: where no adapter can be switched off, a second model is held beside the trained one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longfactory import progress
from longfactory.config import RunConfig
from longfactory.config.arguments import ModelArguments
from longfactory.data.module import cache_root
from longfactory.data.row import Row
from longfactory.errors import UserError
from longfactory.memory.apply import apply_memory
from longfactory.memory.checkpointed import CheckpointedLayer
from longfactory.model import adapters, load
from longfactory.model.token_logprobs import TokenLogprobs
from longfactory.shard.settings import whole_models
from longfactory.sp import hf, vision
from longfactory.sp.text_model import decoder_layers
from longfactory.train import reference
from longfactory.train.ranks import everywhere
from longfactory.train.reference.model import Reference
from longfactory.train.trainer import RowTrainer


def attach_reference(trainer: RowTrainer, cfg: RunConfig) -> None:
    """Gives the trainer its reference. Called once the model is wrapped and before the first step,
    or before an evaluation without training. Collective.

    Raises:
        UserError: see `make_reference`.
    """
    trainer.reference = make_reference(trainer, cfg)


def make_reference(trainer: RowTrainer, cfg: RunConfig) -> Reference:
    """The reference that the run's loss needs; an empty one for losses without. Collective.

    Dropout of a model that is compared with a reference is set to 0.

    Raises:
        UserError: the run resumes and the numbers of its beginning are gone; the data are a stream;
            or the reference model does not fit.
    """
    if "candidates" in trainer.stage.needs:
        from longfactory.train.reference.teacher import make_teacher

        return make_teacher(trainer, cfg)
    by_adapter = reference.adapter_is_reference(cfg.method)
    if "reference_kl" in trainer.stage.needs:
        if by_adapter:
            return Reference(by_adapter=True)
        return Reference(model=load_reference(trainer, cfg))
    if not trainer.stage.needs_reference:
        return Reference()
    reference.disable_dropout(trainer.model_wrapped)
    if by_adapter and not cfg.method.precompute_ref_log_probs:
        return Reference(by_adapter=True)
    datasets: list[tuple[Any, int, bool]] = []
    if trainer.train_dataset is not None:
        datasets.append((trainer.train_dataset, trainer._train_batch_size, trainer.shuffle))
    evaluation = trainer.eval_dataset or {}
    for d in evaluation.values() if isinstance(evaluation, dict) else [evaluation]:
        datasets.append((d, trainer.args.eval_batch_size, False))
    if any(not hasattr(d, "__len__") for d, _, _ in datasets):
        raise UserError(
            "Reference log-probabilities are computed before training, which a stream does not"
            " allow. Set streaming: false."
        )
    # A pass draws seeds for its loaders, and numbers from the cache need none: what training draws
    # must not depend on it.
    with torch.random.fork_rng(devices=[]), _pass(trainer, cfg, by_adapter) as logps_of:
        return Reference(
            computed=tuple(
                (dataset, _numbers(trainer, cfg, logps_of, dataset, batch, shuffle))
                for dataset, batch, shuffle in datasets
            )
        )


@contextlib.contextmanager
def _pass(
    trainer: RowTrainer, cfg: RunConfig, by_adapter: bool
) -> Iterator[Callable[[Row], Tensor]]:
    """What computes a row's reference log-probabilities, [T]. `ref_model` is loaded for the time
    that this is open; otherwise it is the model that is trained.
    """
    if cfg.method.ref_model is None:
        model, head = trainer.model_wrapped, trainer.head

        def mode() -> contextlib.AbstractContextManager[None]:
            return reference.as_reference(model, adapter_off=by_adapter)
    else:
        model, head = load_reference(trainer, cfg)
        mode = torch.no_grad

    def logps_of(row: Row) -> Tensor:
        with mode(), trainer.compute_loss_context_manager():
            return trainer.token_outputs(model, row, head=head).logps

    try:
        yield logps_of
    finally:
        if cfg.method.ref_model is not None:
            del model, head
            if trainer.args.device.type == "cuda":
                torch.cuda.empty_cache()


def _numbers(
    trainer: RowTrainer,
    cfg: RunConfig,
    logps_of: Callable[[Row], Tensor],
    dataset: Any,
    batch: int,
    shuffle: bool,
) -> reference.ReferenceCache:
    """The numbers of one data set, from the cache or by one pass over it. Collective."""
    parts = reference_parts(cfg, dataset)
    folder = cache_root().parent / "reference"
    policy_is_reference = cfg.method.ref_model is None and not reference.adapter_is_reference(
        cfg.method
    )
    started = trainer.state.global_step > 0 and policy_is_reference
    agreed = functools.partial(everywhere, device=trainer.args.device)
    if started and not agreed(_file(folder, parts, trainer).exists()):
        raise UserError(
            "The run resumes, and the reference log-probabilities of the initial model are not "
            f"in the cache ({folder}): the model has changed since. Start over "
            "(overwrite_output_dir: true), or name a ref_model."
        )
    cache, _ = reference.load_or_precompute(
        folder,
        parts,
        functools.partial(_rows, trainer, dataset, batch, shuffle),
        logps_of,
        len(dataset),
        ld_alpha=trainer.stage.ld_alpha,
        dp_sum=trainer._sum_over_groups,
        everywhere=agreed,
        write=trainer.args.local_process_index == 0,
    )
    return cache


def _rows(trainer: RowTrainer, dataset: Any, batch: int, shuffle: bool) -> Iterator[Row]:
    """The rows of the first epoch, as training will see them: the numbers are then the same to the
    last bit.
    """
    from tqdm import tqdm

    loader = trainer.loader(dataset, batch, shuffle)
    for item in tqdm(
        loader, desc="Reference log-probabilities", disable=not trainer.is_world_process_zero()
    ):
        progress.moved("computing the reference's log-probabilities")
        yield item["row"]


def _file(folder: Path, parts: dict[str, Any], trainer: RowTrainer) -> Path:
    return reference.cache_file(folder, {**parts, "ld_alpha": trainer.stage.ld_alpha})


def reference_parts(cfg: RunConfig, dataset: Any) -> dict[str, Any]:
    """What the numbers depend on. The tokens themselves are checked document by document when they
    are used.
    """
    other = cfg.method.ref_model
    name = other or cfg.model.model_name_or_path or ""
    paths = cfg.method.ref_model_adapters if other else cfg.model.adapter_name_or_path
    scratch = cfg.model.train_from_scratch and not other
    lengths = hashlib.sha256(str(list(map(int, dataset.lengths))).encode()).hexdigest()[:16]
    # The reference of a run that trains on an adapter is the model without it, merged adapters
    # stay.
    last_off = (
        bool(paths)
        and reference.adapter_is_reference(cfg.method)
        and not cfg.method.create_new_adapter
    )
    # Tokens that are new to the embedding begin at random, and every softmax runs over them.
    grown = load.may_have_new_tokens(cfg.model) and not other
    bits = cfg.method.ref_model_quantization_bit if other else cfg.model.quantization_bit
    return {
        "model": name,
        "weights": _weights(cfg, name, "config.json", scratch),
        "adapters": [[path, _weights(cfg, path, "adapter_config.json")] for path in paths],
        "last_adapter_off": last_off,
        "stage": cfg.method.stage,
        "data": [*cfg.data.dataset, *cfg.data.eval_dataset],
        "lengths": lengths,
        "template": cfg.data.template,
        "cutoff_len": cfg.cutoff_len,
        "bf16": bool(cfg.trainer.bf16),
        "fp16": bool(cfg.trainer.fp16),
        "pure_bf16": cfg.method.pure_bf16,
        "from_scratch": cfg.trainer.seed if scratch else None,
        "new_tokens": (
            [cfg.trainer.seed, *cfg.model.add_tokens, *cfg.model.add_special_tokens]
            if grown
            else None
        ),
        "rope_scaling": cfg.model.rope_scaling,
        "quantization_bit": bits,
        "quantization": _quantised_by(cfg) if bits else None,
    }


def _weights(cfg: RunConfig, name: str, config: str, config_only: bool = False) -> str:
    """What tells weights of one name apart: a hash of local files, the commit of a hub id (as far
    as it is in the hub's cache).
    """
    path, extra = load.resolve(name)
    if os.path.isdir(path):
        return reference.weights_fingerprint(
            [os.path.join(path, config if config_only else extra.get("gguf_file", ""))]
        )
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(
        path, config, cache_dir=cfg.model.cache_dir, revision=cfg.model.model_revision
    )
    return Path(file).parent.name if isinstance(file, str) else "unknown"


def _quantised_by(cfg: RunConfig) -> list[Any]:
    """What of a quantised reference changes its numbers, beside its bits."""
    if cfg.model.quantization_method == "hqq":
        return ["hqq"]
    return [cfg.model.quantization_type, cfg.model.double_quantization]


def reference_arguments(cfg: RunConfig) -> ModelArguments:
    """What names the reference: `ref_model`, else the model from which training starts."""
    named = dataclasses.replace(cfg.model, train_from_scratch=False)
    if cfg.method.ref_model is None:
        return named
    return dataclasses.replace(
        named,
        model_name_or_path=cfg.method.ref_model,
        adapter_name_or_path=cfg.method.ref_model_adapters,
        quantization_bit=cfg.method.ref_model_quantization_bit,
    )


def check_ref_model(cfg: RunConfig, model_config: Any) -> None:
    """`ref_model` is there and fits the trained model, before anything is loaded. A vocabulary that
    resize_vocab will change is compared later, in `load_reference`.

    Args:
        cfg: the run.
        model_config: transformers' configuration of the trained model.
    Raises:
        UserError: its configuration cannot be read, or does not fit (`check_reference`).
    """
    if cfg.method.ref_model is None:
        return
    try:
        config = load.load_config(reference_arguments(cfg), cfg.cutoff_len)
    except UserError as error:
        said = str(error).removeprefix("model_name_or_path: ")
        raise UserError(f"ref_model: {said}") from error
    if not load.may_have_new_tokens(cfg.model):
        reference.check_reference(model_config, config)


def load_reference(
    trainer: RowTrainer, cfg: RunConfig, *, same_architecture: bool = True
) -> tuple[nn.Module, TokenLogprobs]:
    """A second model and its output layer, frozen: `ref_model`, else the model from which training
    starts, read from its place again.

    Sharded like the policy where that is sharded by FSDP2, else whole on each device. Its layers
    run in the same chunks as the policy's, and with the same roundings.

    Raises:
        UserError: it cannot be loaded, or it is of another architecture or vocabulary.
    """
    args = trainer.args
    named = reference_arguments(cfg)
    config = load.load_config(named, cfg.cutoff_len)
    reference.check_reference(
        trainer.accelerator.unwrap_model(trainer.model_wrapped).config,
        config,
        same_architecture=same_architecture,
    )
    dtype = load.compute_dtype(args)
    sharded = trainer.is_fsdp_enabled and args.device.type == "cuda"
    by_hqq = named.quantization_bit and named.quantization_method == "hqq"
    if sharded and (by_hqq or named.quantization_bit == 8):
        raise UserError(
            "FSDP2 cannot shard the reference's weights of 8 bits, or those of hqq. Use"
            " ref_model_quantization_bit: 4 with quantization_method: bnb, or sharding: ddp."
        )
    quantization = load.quantization_config(named, dtype, sharded=sharded)
    with whole_models(args):
        model = load.load_model(
            named, config, dtype, attention=hf.ATTENTION, quantization=quantization
        )
        key = "ref_model_adapters" if cfg.method.ref_model else "adapter_name_or_path"
        for path in named.adapter_name_or_path:
            model = adapters.merge_adapter(model, path, key=key)
    model.requires_grad_(False)
    hf.prepare(model, copy.copy(trainer.ctx))
    if trainer.images is not None:
        vision.install(model)
    head = TokenLogprobs(model, trainer.head.chunk)
    policy_layer = decoder_layers(trainer.model)[1][0].__dict__.get("forward")
    if same_architecture and isinstance(policy_layer, CheckpointedLayer):
        settings = dataclasses.replace(
            policy_layer.store.settings,
            keep_attention=0.0,
            offload="none",
            pool_bytes=0,
            segment_layers=1,
        )
        apply_memory(model, settings, args.device)
    if sharded:
        shard_frozen(model)
    elif not named.quantization_bit:
        model.to(args.device)
    model.eval()
    return model, head


def shard_frozen(model: nn.Module, **kwargs: Any) -> None:
    """FSDP2 for a model that is only read. Its layers are gathered one at a time; embeddings and
    output layer stay whole once gathered, so that the output layer's weight can be used after the
    forward (`ReferenceHidden`).

    Args:
        kwargs: passed to `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(model)[1]:
        fully_shard(layer, reshard_after_forward=True, **kwargs)
    fully_shard(model, reshard_after_forward=False, **kwargs)


__all__ = [
    "attach_reference",
    "load_reference",
    "make_reference",
    "reference_parts",
    "shard_frozen",
]
