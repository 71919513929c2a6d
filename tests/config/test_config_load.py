"""Whole runs: LLaMA-Factory's examples and ours resolve, and what is resolved can be read again."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import ConfigError, RunConfig, from_mapping, load_config, resolved
from longfactory.config.fields import Key
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.config.translate import OWN_KEYS
from smallest_run import BASE

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
THEIRS = sorted(p for p in FIXTURES.rglob("*.yaml") if p.parent.name != "refused")
OURS = sorted(
    p
    for p in (ROOT / "examples").rglob("*.yaml")
    if p.name not in ("export.yaml", "chat.yaml") and p.parent.name != "cluster"
)
GROUPS = ("model", "data", "method", "parallel", "limits", "memory", "generating", "output")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples name DeepSpeed's files by their path from the repository's root."""
    monkeypatch.chdir(ROOT)


def same(a: RunConfig, b: RunConfig) -> bool:
    return all(getattr(a, g) == getattr(b, g) for g in GROUPS) and {
        k: v for k, v in a.hf.items() if v is not None
    } == {k: v for k, v in b.hf.items() if v is not None}


@pytest.mark.parametrize("path", [*THEIRS, *OURS], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_an_example_resolves_and_its_resolution_is_the_same_run(path: Path, tmp_path: Path) -> None:
    cfg = load_config([str(path), "--dry_run"])
    again = tmp_path / "again.yaml"
    again.write_text(resolved(cfg), encoding="utf-8")
    assert same(load_config([str(again), "--dry_run"]), cfg)


@pytest.mark.parametrize(
    "path", sorted((FIXTURES / "refused").glob("*.yaml")), ids=lambda p: p.stem
)
def test_what_is_not_supported_is_refused_with_an_alternative(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is refused: .*; use"):
        load_config([str(path)])


def test_there_is_an_example_of_each_stage_and_method() -> None:
    seen = {
        (c.method.stage, c.method.finetuning_type)
        for c in (load_config([str(p), "--dry_run"]) for p in OURS)
    }
    wanted = {(s, f) for s in ("pt", "sft", "rm", "dpo", "kto") for f in ("full", "lora")} | {
        ("sft", "freeze")
    }
    assert wanted <= seen


def test_the_fork_s_file_means_what_it_says() -> None:
    cfg = load_config([str(FIXTURES / "fork" / "llama3_full_sft_sp.yaml"), "--dry_run"])
    assert cfg.data.dataset == ("longalpaca_12k", "sharegpt_longconv")
    assert (cfg.parallel.sequence_parallel_size, cfg.parallel.sequence_parallel_mode) == (
        8,
        "zigzag-ring",
    )
    assert cfg.hf["learning_rate"] == 1e-6
    assert cfg.hf["warmup_steps"] == 0.066
    assert cfg.hf["lr_scheduler_kwargs"] == {"min_lr": 1e-7}
    assert cfg.hf["eval_strategy"] == "steps" and cfg.hf["do_eval"] is True
    given = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "val_size": 2}
    assert from_mapping({**given, "eval_on_start": True}).hf["do_eval"] is True
    assert cfg.hf["report_to"] == ["tensorboard"]
    assert cfg.hf["deepspeed"] == "examples/deepspeed/ds_z3_offload_config.json"
    assert cfg.gradient_checkpointing and "gradient_checkpointing" not in cfg.hf
    assert cfg.output.overwrite_output_dir
    assert not {
        "warmup_ratio",
        "save_safetensors",
        "evaluation_strategy",
        "overwrite_output_dir",
    } & set(cfg.hf)


def test_yaml_flags_and_overrides_are_one_language(tmp_path: Path) -> None:
    keys = {
        **BASE,
        "learning_rate": "1e-4",
        "lora_target": "q_proj,v_proj",
        "packing": True,
        "save_strategy": "no",
    }
    yaml = tmp_path / "run.yaml"
    yaml.write_text(
        "model_name_or_path: m\ndataset: [d]\noutput_dir: nowhere/out\nlearning_rate:"
        " 1e-4\nlora_target: [q_proj, v_proj]\npacking: true\nsave_strategy: no\n"
    )
    flags = [
        "--model_name_or_path",
        "m",
        "--dataset",
        "d",
        "--output_dir",
        "nowhere/out",
        "--learning_rate",
        "1e-4",
        "--lora_target",
        "q_proj,v_proj",
        "--packing",
    ]
    cfg = from_mapping(keys)
    assert same(cfg, load_config([str(yaml)]))
    assert same(cfg, load_config([*flags, "--save_strategy", "no"]))
    assert same(cfg, load_config([f"{k}={v}" for k, v in keys.items()]))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"evaluation_strategy": "steps", "val_size": 0.1}, {"eval_strategy": "steps"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"group_by_length": False}, {"train_sampling_strategy": "random"}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.0}, {"warmup_steps": 0.0}),
        ({"warmup_ratio": "0.03", "warmup_steps": 0}, {"warmup_steps": 0.03}),
        ({"warmup_ratio": 0.1, "warmup_steps": 20}, {"warmup_steps": 20.0}),
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"include_tokens_per_second": True}, {"include_num_input_tokens_seen": True}),
        ({"report_to": "none"}, {"report_to": "none"}),
        ({"report_to": "wandb, tensorboard"}, {"report_to": ["wandb", "tensorboard"]}),
        (
            {"early_stopping_steps": 3, "eval_strategy": "steps", "val_size": 10},
            {"metric_for_best_model": "loss", "greater_is_better": False},
        ),
    ],
)
def test_keys_of_transformers(written: dict[str, Any], expected: dict[str, Any]) -> None:
    cfg = from_mapping({**BASE, "dry_run": True, **written})
    assert {k: getattr(cfg.trainer, k) for k in expected} == expected


@pytest.mark.parametrize(
    ("written", "group", "expected"),
    [
        ({"new_special_tokens": "<a>,<b>"}, "model", {"add_special_tokens": ("<a>", "<b>")}),
        ({"quantization_method": "bitsandbytes"}, "model", {"quantization_method": "bnb"}),
        ({"context_parallel_size": 4}, "parallel", {"sequence_parallel_size": 4}),
        (
            {"cp_size": 2, "cp_mode": "ulysses"},
            "parallel",
            {"sequence_parallel_size": 2, "sequence_parallel_mode": "ulysses"},
        ),
        ({"shuffle_for_sequence_parallel": False}, "method", {"disable_shuffling": True}),
        ({"train_sampling_strategy": "sequential"}, "method", {"disable_shuffling": True}),
        ({"eval_num_beams": 4, "max_new_tokens": 8}, "generating", {"num_beams": 4}),
        ({"eval_num_beams": None}, "generating", {"num_beams": 1}),
        ({"use_liger_kernel": False}, "model", {"enable_liger_kernel": False}),
        ({"gradient_checkpointing": False}, "memory", {"disable_gradient_checkpointing": True}),
        ({"gradient_checkpointing": True}, "memory", {"disable_gradient_checkpointing": False}),
        ({"use_unsloth_gc": True}, "memory", {"offload_activations": True}),
        ({"offload_activations": False}, "memory", {"offload_activations": False}),
        ({"fsdp": "full_shard auto_wrap"}, "parallel", {"sharding": "fsdp2"}),
        ({"fsdp": ["full_shard", "auto_wrap"]}, "parallel", {"sharding": "fsdp2"}),
        ({"fsdp": ""}, "parallel", {"sharding": "auto"}),
        ({"dpo_beta": 0.3, "stage": "dpo"}, "method", {"pref_beta": 0.3}),
        ({"lora_target": None}, "method", {"lora_target": ()}),
    ],
)
def test_other_names(written: dict[str, Any], group: str, expected: dict[str, Any]) -> None:
    cfg = from_mapping({**BASE, **written})
    assert {k: getattr(getattr(cfg, group), k) for k in expected} == expected


def _another(key: Key) -> Any:
    """A value of the key's type that is not its default."""
    union = typing.get_origin(key.kind) in (types.UnionType, typing.Union)
    kind = next(
        k for k in (typing.get_args(key.kind) if union else (key.kind,)) if k is not type(None)
    )
    if typing.get_origin(kind) is typing.Literal:
        return next((c for c in typing.get_args(kind) if c != key.default), key.default)
    if typing.get_origin(kind) is tuple:
        return [0.25, 0.75] if typing.get_args(kind)[0] is float else ["x", "y"]
    if kind is bool:
        return key.default is not True
    return {int: 3, float: 0.375, str: "1e5", dict: {"a": {"b": 1e-7}}}[kind]


@pytest.mark.parametrize("name", sorted({**OWN_KEYS, **TRAINER_KEYS}))
def test_every_key_arrives_and_survives_being_written(name: str) -> None:
    key = (OWN_KEYS | TRAINER_KEYS)[name]
    value = _another(key)
    try:
        cfg = from_mapping({**BASE, name: value, "dry_run": True})
    except ConfigError as e:
        assert name in str(e)
        return
    groups = [getattr(cfg, g) for g in GROUPS if hasattr(getattr(cfg, g), name)]
    got = getattr(groups[0], name) if groups else cfg.hf.get(name)
    assert got == key.parse(value) or got == value or name == "resume_from_checkpoint"
    if name in ("dry_run", "hub_token", "hf_hub_token", "swanlab_api_key"):
        return
    # what stands below is read with each example
    chosen = resolved(cfg).partition("# Defaults\n")[0]
    assert same(from_mapping({**_yaml(chosen), "dry_run": True}), cfg)


def _yaml(text: str) -> dict[str, Any]:
    import tempfile

    from longfactory.config.read import read_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return read_file(path)


def test_packing_follows_the_stage() -> None:
    assert from_mapping({**BASE, "stage": "pt"}).packing
    assert not from_mapping({**BASE, "stage": "pt", "packing": False}).packing
    assert not from_mapping(BASE).packing
    assert from_mapping(
        {**BASE, "neat_packing": True, "sequence_parallel_size": 2}, world_size=2
    ).packing


def test_a_run_that_only_evaluates_does_not_train() -> None:
    cfg = from_mapping(
        {
            "model_name_or_path": "m",
            "output_dir": "nowhere/out",
            "do_eval": True,
            "eval_dataset": "d",
        }
    )
    assert not cfg.trainer.do_train
    assert from_mapping(BASE).trainer.do_train


def test_arithmetic_of_a_run() -> None:
    cfg = from_mapping(
        {
            **BASE,
            "cutoff_len": 131072,
            "sequence_parallel_size": 4,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
        }
    )
    text = resolved(cfg, world_size=16)
    assert "131072 / sequence_parallel_size 4 = 32768" in text
    assert "processes: 16 = 4 groups x sequence_parallel_size 4" in text
    assert (
        "samples per step: 4 groups x batch 1 x accumulation 2 = 8, at most 1,048,576 tokens"
        in text
    )


def test_secrets_are_not_written() -> None:
    text = resolved(from_mapping({**BASE, "hub_token": "hf_secret", "hf_hub_token": "hf_other"}))
    assert "hf_secret" not in text and "hf_other" not in text


def test_swanlab() -> None:
    keys = {
        "use_swanlab": True,
        "swanlab_run_name": "mine",
        "swanlab_api_key": "secret",
        "report_to": "none",
        "dry_run": True,
    }
    cfg = from_mapping({**BASE, **keys})
    assert cfg.hf["report_to"] == ["swanlab"] and cfg.hf["run_name"] == "mine"
    want = {"SWANLAB_PROJECT": "llamafactory", "SWANLAB_MODE": "cloud", "SWANLAB_API_KEY": "secret"}
    assert cfg.reporting_environment() == want
    assert "secret" not in resolved(cfg)
    assert from_mapping({**BASE, "logging_dir": "tb"}).reporting_environment() == {
        "TENSORBOARD_LOGGING_DIR": "tb"
    }


def test_training_arguments_of_transformers() -> None:
    cfg = from_mapping(
        {
            **BASE,
            "use_cpu": True,
            "warmup_ratio": 0.1,
            "learning_rate": "2e-5",
            "group_by_length": True,
            "report_to": "none",
            "logging_steps": 1,
        }
    )
    args = cfg.training_arguments(logging_steps=5)
    assert args.learning_rate == 2e-5
    assert args.get_warmup_steps(200) == 20
    assert args.train_sampling_strategy == "group_by_length"
    assert args.remove_unused_columns is False and not args.gradient_checkpointing
    assert args.logging_steps == 5
    with pytest.raises(ConfigError, match="transformers refuses"):
        from_mapping({**BASE, "use_cpu": True, "load_best_model_at_end": True}).training_arguments()


def test_a_whole_run_of_warming_up() -> None:
    """transformers takes 1 for one step: a ratio of 1 must stay a share."""
    args = from_mapping({**BASE, "use_cpu": True, "warmup_ratio": 1.0}).training_arguments()
    assert args.get_warmup_steps(200) == 200


@pytest.mark.processes
def test_loading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from longfactory.config import load_config, resolved\n"
        "words = ['--model_name_or_path', 'm', '--dataset', 'd', '--output_dir', 'nowhere/out']\n"
        "resolved(load_config(words))\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_arguments_are_frozen() -> None:
    cfg = from_mapping(BASE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.data.cutoff_len = 1  # type: ignore[misc]


def test_a_run_is_frozen_with_all_its_keys() -> None:
    """No reader changes a run, and transformers' own changes to its arguments do not reach it."""
    cfg = from_mapping({**BASE, "use_cpu": True, "lr_scheduler_kwargs": {"min_lr": 1e-7}})
    with pytest.raises(TypeError):
        cfg.hf["seed"] = 1  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.trainer.seed = 1  # type: ignore[misc]
    environment = dict(os.environ)
    args = cfg.training_arguments()
    args.lr_scheduler_kwargs["min_lr"] = 1.0
    assert cfg.trainer.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert dict(os.environ) == environment
    assert cfg.trainer.seed == 42 and "seed" not in cfg.hf
    again = dataclasses.replace(cfg, hf={**cfg.hf, "seed": 7})
    assert (again.trainer.seed, cfg.trainer.seed) == (7, 42)


def test_variables_of_llamafactory_that_are_not_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hubs(model: object) -> list[str]:
        cfg = from_mapping({**BASE, "model_name_or_path": str(model)})
        return [note for note in cfg.notes if "is not read" in note]

    monkeypatch.setenv("IMAGE_PLACEHOLDER", "<image>")
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    assert hubs("Qwen/Qwen3-8B") == []
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    assert hubs(tmp_path) == []
    (note,) = hubs("Qwen/Qwen3-8B")
    assert note.startswith("USE_MODELSCOPE_HUB is not read: 'Qwen/Qwen3-8B' is looked up on")
    monkeypatch.setenv("IMAGE_PLACEHOLDER", "[img]")
    with pytest.raises(
        ConfigError, match=r"sets IMAGE_PLACEHOLDER to '\[img\]'.* placeholder is always <image>"
    ):
        hubs(tmp_path)
