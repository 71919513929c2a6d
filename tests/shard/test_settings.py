"""The traps that defaults leave open, each shown to be closed."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from longfactory.errors import UserError
from longfactory.shard import settings
from longfactory.shard.export import cast_floats
from longfactory.testing import tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "deepspeed"
GiB = 2**30


def choose(wanted: str = "auto", **changes: Any) -> str:
    given = dict(
        world=8,
        cuda=True,
        deepspeed=False,
        quantized=False,
        state_bytes=100 * GiB,
        device_bytes=80 * GiB,
    )
    return settings.choose_sharding(wanted, **{**given, **changes})


@pytest.mark.parametrize(
    ("wanted", "changes", "got"),
    [
        ("auto", {}, "fsdp2"),
        ("auto", {"state_bytes": 15 * GiB}, "ddp"),
        ("auto", {"cuda": False}, "ddp"),
        ("auto", {"quantized": True}, "ddp"),
        ("auto", {"world": 1}, "none"),
        ("ddp", {}, "ddp"),
        ("fsdp2", {"state_bytes": 1}, "fsdp2"),
        ("fsdp2", {"world": 1}, "none"),
        ("auto", {"deepspeed": True}, "deepspeed"),
        ("auto", {"deepspeed": True, "world": 1}, "deepspeed"),
    ],
)
def test_the_choice(wanted: str, changes: dict[str, Any], got: str) -> None:
    assert choose(wanted, **changes) == got


def test_what_accelerate_would_quietly_ignore_is_refused() -> None:
    with pytest.raises(
        UserError, match="fsdp2 needs GPUs: on CPU, accelerate would silently train copies"
    ):
        choose("fsdp2", cuda=False)
    with pytest.raises(UserError, match=r"both given\. Keep one"):
        choose("fsdp2", deepspeed=True)
    with pytest.raises(UserError, match="deepspeed: several processes need GPUs"):
        choose(deepspeed=True, cuda=False)
    assert choose(deepspeed=True, cuda=False, world=1) == "deepspeed"


def arguments(tmp_path: Path, **extra: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **extra)


@pytest.mark.usefixtures("as_a_command")
def test_accelerate_takes_our_fsdp2_settings(tmp_path: Path) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin

    args = arguments(tmp_path, **settings.fsdp2_arguments())
    taken = (
        args.fsdp_plugin_args if hasattr(args, "fsdp_plugin_args") else args._process_fsdp_args()
    )
    plugin = FullyShardedDataParallelPlugin(**taken)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    # Whole checkpoints would gather the optimizer on one host; final weights are gathered and
    # written by ourselves.
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


@pytest.mark.parametrize("efficient", [True, False])
def test_who_loads_is_passed_on(efficient: bool) -> None:
    given = settings.fsdp2_arguments(efficient_loading=efficient)["fsdp_config"]
    assert given["cpu_ram_efficient_loading"] is efficient


def test_every_micro_batch_is_reduced(tmp_path: Path) -> None:
    args = arguments(tmp_path, accelerator_config=settings.accelerator_arguments())
    kept = args.accelerator_config
    assert kept.gradient_accumulation_kwargs == {"sync_each_batch": True}
    assert kept.even_batches is False and kept.dispatch_batches is False


@pytest.mark.parametrize(("precision", "split", "want"), [("bf16", False, torch.bfloat16), ("fp16", False, torch.float16),
                                                          ("no", True, torch.bfloat16), ("no", False, None)])  # fmt: skip
def test_gradients_are_reduced_in_fp32(
    precision: str, split: bool, want: torch.dtype | None
) -> None:
    plugin = types.SimpleNamespace(
        mixed_precision_policy="accelerate's own", transformer_cls_names_to_wrap=None
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision
    )
    settings.fix_fsdp2_plugin(accelerator, tiny_model(), split=split)
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    if want is None:
        assert plugin.mixed_precision_policy == "accelerate's own"
        return
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (
        want,
        torch.float32,
        None,
    )


@pytest.mark.parametrize(("world", "want"), [(2, torch.bfloat16), (4, torch.float32)])
def test_two_processes_reduce_gradients_of_split_weights_in_bf16(
    world: int, want: torch.dtype
) -> None:
    """There the sum has two terms, and is rounded to bf16 anyway; of more, each hop would round."""
    plugin = types.SimpleNamespace(mixed_precision_policy=None, transformer_cls_names_to_wrap=None)
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no"
    )
    settings.fix_fsdp2_plugin(accelerator, tiny_model(), split=True, world=world)
    assert plugin.mixed_precision_policy.reduce_dtype == want
    settings.fix_fsdp2_plugin(accelerator, tiny_model(), split=False, world=2)
    accelerator.mixed_precision = "bf16"
    settings.fix_fsdp2_plugin(accelerator, tiny_model(), split=False, world=2)
    assert plugin.mixed_precision_policy.reduce_dtype == torch.float32


def test_quantised_weights_are_gathered_without_a_cast() -> None:
    """What a float type holds there are bits: a cast would change those that look like NaN."""
    plugin = types.SimpleNamespace(mixed_precision_policy=None, transformer_cls_names_to_wrap=None)
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin), mixed_precision="bf16"
    )
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.quant_state = object()  # as bitsandbytes does
    settings.fix_fsdp2_plugin(accelerator, model)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (None, torch.float32)


def test_the_layers_to_wrap_are_in_the_model() -> None:
    model = tiny_model()
    assert settings.wrap_classes(model) == ["LlamaDecoderLayer"]
    model._no_split_modules = ["LlamaDecoderLayer", "SomeVisionLayer"]
    assert settings.wrap_classes(model) == ["LlamaDecoderLayer"]
    model._no_split_modules = None
    assert settings.wrap_classes(model) == ["LlamaDecoderLayer"]  # from the list of layers itself
    from peft import LoraConfig, get_peft_model

    assert settings.wrap_classes(
        get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    ) == ["LlamaDecoderLayer"]


@pytest.mark.parametrize("wanted", ["ddp", "fsdp2", "deepspeed", "none"])
@pytest.mark.parametrize("got", ["NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"])
def test_a_silent_fallback_is_refused(wanted: str, got: str) -> None:
    fits = {
        "none": {"NO"},
        "ddp": {"MULTI_CPU", "MULTI_GPU"},
        "fsdp2": {"FSDP"},
        "deepspeed": {"DEEPSPEED"},
    }[wanted]
    accelerator = types.SimpleNamespace(distributed_type=f"DistributedType.{got}", num_processes=4)
    if got in fits:
        settings.check_sharding(accelerator, wanted, 4)
    else:
        with pytest.raises(UserError, match=f"sharding {wanted}, but accelerate runs 4 as {got}"):
            settings.check_sharding(accelerator, wanted, 4)


def test_processes_that_train_alone_are_refused() -> None:
    accelerator = types.SimpleNamespace(distributed_type="DistributedType.NO", num_processes=1)
    with pytest.raises(UserError, match=r"8 processes were started .* accelerate runs 1 as NO"):
        settings.check_sharding(accelerator, "ddp", 8)


def test_one_process_trains_on_one_device_of_many(tmp_path: Path) -> None:
    args = arguments(tmp_path, per_device_train_batch_size=2)
    args._n_gpu = 4  # what transformers sets in one process on a machine with four GPUs
    assert args.train_batch_size == 8
    settings.train_as_one_device(args)
    assert args.n_gpu == 1 and args.train_batch_size == 2


def test_what_a_deepspeed_file_leaves_open_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    config = settings.deepspeed_config(str(path), bf16=True)
    # absent, DeepSpeed clips at 1.0 whatever max_grad_norm says
    assert config["gradient_clipping"] == "auto"
    assert config["communication_data_type"] == "fp32"  # absent, it reduces in bf16
    # absent, no weights are written
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert {
        config[k]
        for k in (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
        )
    } == {"auto"}
    assert "communication_data_type" not in settings.deepspeed_config(str(path), bf16=False)
    assert path.read_text() == '{"zero_optimization": {"stage": 3}}'


def test_what_the_user_wrote_is_never_changed() -> None:
    written = {
        "gradient_clipping": 0.3,
        "communication_data_type": "bf16",
        "train_micro_batch_size_per_gpu": 7,
        "zero_optimization": {
            "stage": 3,
            "stage3_gather_16bit_weights_on_model_save": False,
            "reduce_bucket_size": 5,
        },
    }
    before = copy.deepcopy(written)
    config = settings.deepspeed_config(written, bf16=True)
    assert written == before
    config["zero_optimization"]["reduce_bucket_size"] = 6
    assert written == before
    config["zero_optimization"]["reduce_bucket_size"] = 5
    assert before.items() <= config.items()


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.json")))
def test_the_ready_made_files_leave_nothing_open(name: str) -> None:
    written = json.loads((EXAMPLES / name).read_text())
    config = settings.deepspeed_config(str(EXAMPLES / name), bf16=True)
    assert config == written, "a file of ours should say all that is filled in"


def test_a_missing_or_broken_file_is_a_letter(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"does not exist\. Ready-made ones are in LongFactory's repository, in"
            r" examples/deepspeed/"
        ),
    ):
        settings.deepspeed_config(str(tmp_path / "no.json"), bf16=True)
    (tmp_path / "broken.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match=r"not valid JSON \(line 2"):
        settings.deepspeed_config(str(tmp_path / "broken.json"), bf16=True)


def test_casting_keeps_shared_tensors_shared() -> None:
    w = torch.randn(3, 4)
    state = {
        "embed": w,
        "head": w,
        "view": w[0],
        "count": torch.tensor(3),
        "own": torch.randn(3, 4),
    }
    out = cast_floats(state, torch.bfloat16)
    assert out["embed"] is out["head"] and out["embed"].dtype == torch.bfloat16
    assert out["view"].shape == (4,) and torch.equal(out["view"], w[0].bfloat16())
    assert out["count"] is state["count"] and torch.equal(out["own"], state["own"].bfloat16())
