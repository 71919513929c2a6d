"""Files for LLaMA-Factory's rewritten engine (v1) are read as runs, with its defaults."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping
from longfactory.config.v1_keys import translated

BASE: dict[str, Any] = {
    "model": "m",
    "model_class": "llm",
    "train_dataset": "data/v1_sft_demo.yaml",
    "output_dir": "o",
    "dry_run": True,
}


def test_names_and_defaults() -> None:
    cfg = from_mapping({**BASE, "micro_batch_size": 4, "sequence_parallel_size": 2, "stage": "dpo"})
    assert cfg.model.model_name_or_path == "m" and cfg.data.dataset == ("data/v1_sft_demo.yaml",)
    assert cfg.method.stage == "dpo" and cfg.method.finetuning_type == "full"
    assert cfg.sequence_parallel_size == 2 and cfg.trainer.bf16
    hf = cfg.hf
    assert hf["per_device_train_batch_size"] == 4 and hf["learning_rate"] == 1e-4
    assert hf["lr_scheduler_type"] == "constant" and hf["weight_decay"] == 0.01
    assert hf["save_strategy"] == "no" and hf["logging_steps"] == 1


def test_parts() -> None:
    cfg = from_mapping(
        {
            **BASE,
            "peft_config": {"name": "lora", "r": 16, "target_modules": ["q_proj", "v_proj"]},
            "dist_config": {"name": "fsdp2", "dcp_path": None},
            "cp_size": 2,
            "cp_mode": "ulysses",
            "batching_strategy": "dynamic_batching",
            "save_steps": 5,
            "learning_rate": 1e-5,
        }
    )
    m = cfg.method
    assert (m.finetuning_type, m.lora_rank, m.lora_alpha, m.lora_dropout) == ("lora", 16, 16, 0.05)
    assert m.lora_target == ("q_proj", "v_proj") and cfg.parallel.sharding == "fsdp2"
    assert cfg.sequence_parallel_size == 2 and cfg.parallel.sequence_parallel_mode == "ulysses"
    assert cfg.data.packing and cfg.hf["save_steps"] == 5 and cfg.hf["learning_rate"] == 1e-5
    muon = {"name": "muon", "wd": 0.2, "adamw_betas": [0.8, 0.9], "ns_steps": 5}
    cfg = from_mapping({**BASE, "optim_config": muon})
    assert cfg.method.use_muon and cfg.hf["weight_decay"] == 0.2 and cfg.hf["adam_beta1"] == 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 16}, "Give gradient_accumulation_steps"),
        ({"model_class": "other"}, "language models train here"),
        ({"optim_config": {"name": "muon", "ns_steps": 7}}, "ns_steps: 7 is refused: it is 5"),
        ({"peft_config": {"name": "lora", "rank": 7}}, "there is no entry rank; known are r,"),
        ({"peft_config": "lora"}, "expected a mapping with name"),
        ({"dist_config": {"name": "fsdp2", "dcp_path": "x"}}, "a folder of safetensors"),
        ({"batching_strategy": "other"}, "Use normal, padding_free"),
        ({"custom_chat_template": "{{x}}"}, "chat_template.jinja"),
        ({"micro_batch": 1}, "There is no key micro_batch. Did you mean"),
    ],
)
def test_what_there_is_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping({**BASE, **changes})


def test_media_are_opened_from_the_working_folder() -> None:
    assert from_mapping(BASE).data.media_dir == "."
    assert from_mapping({**BASE, "media_dir": "pictures"}).data.media_dir == "pictures"


def test_entries_of_parts_are_refused_or_named() -> None:
    values = {"model": "m", "train_dataset": "d", "stage": "sft"}
    sharding = {"name": "fsdp2", "ep_size": 2}
    _, notes = translated({**values, "dist_config": sharding})
    assert "dist_config: ep_size: no effect here." in notes
    with pytest.raises(ConfigError, match="optim_config: lr is refused: give learning_rate"):
        translated({**values, "optim_config": {"name": "muon", "lr": 1e-3}})


def test_kernels_and_attention_are_named() -> None:
    """Liger's are used; what else a file asks for has no effect and is named, or is refused."""
    values = {"model": "m", "train_dataset": "d", "stage": "sft"}
    kernels = {
        "name": "auto, liger_kernel, flash-linear-attention",
        "include_kernels": "chunk_gated_delta_rule",
        "chunk_size": 64,
    }
    out, notes = translated({**values, "kernel_config": kernels, "flash_attn": "flash_attention_2"})
    assert out["enable_liger_kernel"] and "flash_attn" not in out
    assert "kernel_config: include_kernels, chunk_size: no effect here." in notes
    assert any(n.startswith("kernel_config: name: flash-linear-attention: no eff") for n in notes)
    assert any(n.startswith("flash_attn: flash_attention_2: no effect here") for n in notes)
    out, notes = translated({**values, "kernel_config": {"name": "auto"}})
    assert len(notes) == 1 and "enable_liger_kernel" not in out
    with pytest.raises(ConfigError, match="kernel_config: there is no entry tiles; known are inc"):
        translated({**values, "kernel_config": {"name": "auto", "tiles": 4}})
    with pytest.raises(ConfigError, match="flash_attn: got other, expected one of eager, sdpa"):
        translated({**values, "flash_attn": "other"})
