"""Settings of FSDP2, DeepSpeed and DDP that keep the gradient exact. Each closes a trap that a
default leaves open.

- accelerate's FSDP2 policy for bf16 reduces gradients in bf16 and rounds module outputs to bf16:
  here gradients are reduced in fp32.
- Its `no_sync` during gradient accumulation keeps whole, unsharded gradients on every rank: here
  every micro-batch is reduced.
- `SHARDED_STATE_DICT` makes `save_model` write nothing: here the final weights are gathered and
  written as safetensors (`shard/export.py`).
- DeepSpeed clips at 1.0 where `gradient_clipping` is absent, and reduces in bf16 where
  `communication_data_type` is.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longfactory.errors import UserError

# Below this share of one device's memory for weights, gradients and Adam's moments (16 bytes a
# parameter), copies are simpler and as good.
SMALL_SHARE = 0.2


def in_words(sharding: str) -> str:
    """Where parameters are, for people: `none` would be read as no parameters.

    Args:
        sharding: none, ddp, fsdp2 or deepspeed.
    """
    words = {
        "none": "not sharded (one process)",
        "ddp": "replicated (ddp)",
        "fsdp2": "sharded (fsdp2)",
        "deepspeed": "sharded by DeepSpeed, as its JSON says",
    }
    return words[sharding]


def choose_sharding(
    wanted: str,
    *,
    world: int,
    cuda: bool,
    deepspeed: bool,
    quantized: bool,
    state_bytes: int,
    device_bytes: int,
) -> str:
    """`auto | fsdp2 | ddp` -> "none", "ddp", "fsdp2" or "deepspeed".

    Args:
        state_bytes: weights, gradients and optimizer state of the whole model.
        device_bytes: memory of one device.
    Raises:
        UserError: FSDP2 or several processes of DeepSpeed without GPUs, or FSDP2 together with
            DeepSpeed.
    """
    if deepspeed:
        if wanted == "fsdp2":
            raise UserError(
                "sharding: fsdp2 and a deepspeed: file were both given. Keep one of them."
            )
        if world > 1 and not cuda:
            raise UserError(
                "deepspeed: several processes need GPUs: on CPU, accelerate would let each of them"
                " train alone. Leave deepspeed out, or start one process."
            )
        return "deepspeed"
    if world == 1:
        return "none"
    if wanted == "fsdp2":
        if not cuda:
            raise UserError(
                "sharding: fsdp2 needs GPUs: on CPU, accelerate would silently train copies (DDP)."
                " Use sharding: ddp."
            )
        return "fsdp2"
    if wanted == "ddp" or not cuda or quantized or state_bytes < SMALL_SHARE * device_bytes:
        return "ddp"
    return "fsdp2"


def fsdp2_arguments(*, efficient_loading: bool = True) -> dict[str, Any]:
    """Keyword arguments for transformers' TrainingArguments that turn FSDP2 on."""
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "reshard_after_forward": True,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_ram_efficient_loading": efficient_loading,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }


def loads_for_all(args: Any) -> bool:
    """Whether the first process sends the others their weights, as FSDP2 shards the model.

    Args:
        args: transformers' TrainingArguments.
    """
    return bool(args.fsdp and (args.fsdp_config or {}).get("cpu_ram_efficient_loading"))


def receives_weights(args: Any) -> bool:
    """Whether this process is sent its weights. (The first one of each host reads the files.)"""
    return loads_for_all(args) and args.local_process_index != 0


def accelerator_arguments() -> dict[str, Any]:
    """`accelerator_config` for TrainingArguments: gradients are reduced after every micro-batch."""
    return {
        "gradient_accumulation_kwargs": {"sync_each_batch": True},
        "even_batches": False,
        "dispatch_batches": False,
    }


def _computed_unequally(model: Any) -> set[str]:
    """Classes of layers that the ranks run unequally often: those of a tower that images pass
    through. A layer that is wrapped by itself gathers its weights in each call, which all ranks
    must make; the tower's are gathered with those outside the layers, once.
    """
    from longfactory.sp import hf, text_model, vision

    try:
        inner = hf.unwrap(model)
    except ValueError:
        return set()
    if not text_model.enters_more_than_text(inner):
        return set()
    tower = [m for part in vision.modules_of(inner).values() for m in part]
    return {type(layer).__name__ for m in tower for layer in m.modules()}


def wrap_classes(model: Any) -> list[str]:
    """Names of the decoder layer classes that are in the model. `_no_split_modules` may also name
    classes that are absent.
    """
    named = (
        getattr(model, "_no_split_modules", None)
        or getattr(getattr(model, "base_model", None), "_no_split_modules", None)
        or []
    )
    present = {type(m).__name__ for m in model.modules()}
    present -= _computed_unequally(model)
    found = sorted(set(named) & present)
    if not found:
        from longfactory.sp.text_model import decoder_layers

        found = sorted({type(layer).__name__ for layer in decoder_layers(model)[1]})
    return found


def fix_fsdp2_plugin(accelerator: Any, model: Any, split: bool = False, world: int = 0) -> None:
    """After the Trainer exists and before the model is wrapped: the mixed-precision policy and the
    layers to wrap.

    `split`: the weights are bf16 by themselves (split masters); their gradients are reduced in fp32
    all the same, and then rounded to bf16. Of two processes (`world`) the reduction is one sum of
    two bf16 numbers, halved: in bf16 it rounds the same sum once, to the same bits, and the
    messages have half the bytes.

    Quantised weights stay as they are stored while they are gathered, and with them all others:
    what a float type holds there are bits, and a cast changes those that look like NaN. The layers
    then compute in half precision as under DDP, by autocast.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = wrap_classes(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(
        "bf16" if split else accelerator.mixed_precision
    )
    if dtype is not None:
        gathered = None if any(hasattr(p, "quant_state") for p in model.parameters()) else dtype
        reduced = dtype if split and world == 2 else torch.float32
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=gathered, reduce_dtype=reduced, output_dtype=None
        )


def train_as_one_device(args: Any) -> None:
    """A run of one process trains on one device: transformers would wrap the model in DataParallel
    over all that it can see.

    Args:
        args: transformers' TrainingArguments, changed in place.
    """
    if args.n_gpu > 1:
        args._n_gpu = 1  # as the Trainer itself does for a model that is placed by hand


def forget_launcher() -> None:
    """Takes a launcher's marks out of the environment of a process that it has started alone
    (FORCE_TORCHRUN, torchrun on one GPU).

    accelerate would wrap the model in DDP, with a second copy of the gradients, to average over
    nobody.
    """
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"):
        os.environ.pop(name, None)


def check_sharding(accelerator: Any, sharding: str, world: int) -> None:
    """Refuses a run in which accelerate silently chose something else: each process would then
    train alone, on its own part.

    Raises:
        UserError: with what was asked for and what accelerate made of it.
    """
    got = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    fits = {
        "none": ("NO",),
        "ddp": ("MULTI_CPU", "MULTI_GPU"),
        "fsdp2": ("FSDP",),
        "deepspeed": ("DEEPSPEED",),
    }[sharding]
    if got not in fits or accelerator.num_processes != world:
        raise UserError(
            f"{world} processes were started to train with sharding {sharding}, but accelerate runs"
            f" {accelerator.num_processes} as {got}. Check that use_cpu, the launcher and the"
            " accelerate configuration agree with the machine."
        )


PURE = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
"""DeepSpeed's words for `pure_bf16`."""


def deepspeed_config(
    path_or_dict: str | dict[str, Any], *, bf16: bool, pure: bool = False
) -> dict[str, Any]:
    """The user's DeepSpeed JSON with what it leaves open filled in. What the user wrote is never
    changed.

    Args:
        path_or_dict: the file, or what it holds.
        bf16: gradients are bf16, and summed in float32.
        pure: ZeRO-3 keeps its masters and the optimizer's states in bf16.
    Raises:
        UserError: the file is missing or is not JSON.
    """
    if isinstance(path_or_dict, dict):
        config = copy.deepcopy(path_or_dict)
    else:
        path = Path(path_or_dict)
        if not path.is_file():
            raise UserError(
                f"deepspeed: the file {path} does not exist. Ready-made ones are in LongFactory's"
                " repository, in examples/deepspeed/."
            )
        try:
            config = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise UserError(
                f"deepspeed: {path} is not valid JSON (line {error.lineno}: {error.msg})."
            ) from error
    config.setdefault("gradient_clipping", "auto")
    config.setdefault("train_batch_size", "auto")
    config.setdefault("train_micro_batch_size_per_gpu", "auto")
    config.setdefault("gradient_accumulation_steps", "auto")
    if bf16:
        config.setdefault("communication_data_type", "fp32")
    if pure:
        given = config.get("bf16")
        config["bf16"] = {**PURE, **(given if isinstance(given, dict) else {"enabled": "auto"})}
    zero = config.get("zero_optimization")
    if isinstance(zero, dict) and zero.get("stage") == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return config


@contextlib.contextmanager
def whole_models(args: Any) -> Iterator[None]:
    """Inside the block transformers loads and makes models whole. Under ZeRO-3 it would partition
    them, and only an engine could gather them again. `args`: its TrainingArguments.
    """
    hf_config = getattr(args, "hf_deepspeed_config", None)
    if hf_config is None:
        yield
        return
    from transformers.integrations import deepspeed

    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(hf_config)
