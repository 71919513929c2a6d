"""What a run does not read is said, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping
from smallest_run import BASE, problem


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"flash_attn": "fa2"}, "flash_attn: fa2 has no effect"),
        ({"audio_sampling_rate": 8000}, "audio is not supported"),
        ({"pref_beta": 0.3}, "pref_beta has no effect: stage is sft"),
        ({"stage": "rm", "pref_beta": 0.3}, "pref_beta has no effect: stage is rm"),
        (
            {"finetuning_type": "full", "lora_rank": 16},
            "lora_rank has no effect: finetuning_type is full",
        ),
        (
            {"stage": "dpo", "pref_loss": "orpo", "ref_model": "r"},
            "ref_model has no effect: this run has no reference model",
        ),
        ({"stage": "dpo", "simpo_gamma": 1.0}, "simpo_gamma has no effect"),
        (
            {"use_dft_loss": True, "asft_alpha": 0.3},
            "asft_alpha has no effect: it is read by use_asft_loss alone",
        ),
        ({"eaft_alpha": 0.3}, "eaft_alpha has no effect: it is read by use_eaft_loss alone"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "warmup_ratio: 0.1 has no effect"),
        ({"fsdp": "hybrid_shard"}, "full sharding over all devices"),
        ({"buffer_size": 5}, "buffer_size has no effect: streaming is off"),
        (
            {"stage": "dpo", "ref_model_adapters": "a"},
            "ref_model_adapters has no effect: ref_model is not given",
        ),
        ({"create_new_adapter": True}, "adapter_name_or_path is not given"),
        ({"double_quantization": False}, "has no effect: quantization_bit is not given"),
        ({"pissa_iter": 4}, "pissa_iter has no effect: pissa_init is off"),
        ({"loraplus_lr_embedding": 1e-3}, "has no effect: loraplus_lr_ratio is not given"),
        ({"profiler_active_steps": 9}, "has no effect: enable_torch_profiler is off"),
        ({"stage": "pt", "default_system": "x"}, "whose texts go through no template"),
        ({"max_length": 4096}, "the length of training samples is cutoff_len (2048)"),
    ],
)
def test_what_has_no_effect_is_said(keys: dict[str, Any], note: str) -> None:
    assert any(note in n for n in from_mapping({**BASE, **keys}).notes)


@pytest.mark.parametrize("kind", ["full", "oft"])
def test_expanded_layers_are_trained_by_freeze_and_lora(kind: str) -> None:
    given = {**BASE, "finetuning_type": kind, "use_llama_pro": True}
    with pytest.raises(ConfigError, match=f"adapters on them, with lora; this run's is {kind}"):
        from_mapping(given)
    keys = {**BASE, "finetuning_type": "lora", "freeze_trainable_layers": 1}
    assert any("freeze_trainable_layers has no effect" in n for n in from_mapping(keys).notes)
    notes = from_mapping({**keys, "use_llama_pro": True}).notes
    assert not any("freeze_trainable_layers" in n for n in notes)


def test_defaults_pass_without_a_word() -> None:
    copied = {
        "use_galore": False,
        "flash_attn": "auto",
        "vllm_maxlen": "4096",
        "swanlab_project": "llamafactory",
        "export_quantization_bit": None,
        "freeze_vision_tower": False,  # of every finetuning_type
        "freeze_multi_modal_projector": False,
    }
    assert (
        from_mapping(
            {**BASE, **copied, "label_smoothing_factor": 0, "pref_beta": 0.1, "reward_model": None}
        ).notes
        == ()
    )


def test_steps_below_0_mean_what_they_mean_to_transformers() -> None:
    cfg = from_mapping({**BASE, "save_steps": -1})
    assert cfg.hf["save_steps"] == -1
    assert cfg.notes == ("save_steps: -1: one checkpoint is written, after the last step.",)
    cfg = from_mapping(
        {
            **BASE,
            "val_size": 5,
            "eval_strategy": "steps",
            "eval_steps": -1,
            "logging_steps": "-1",
            "save_strategy": "no",
        }
    )
    assert [n.partition(":")[0] for n in cfg.notes] == ["logging_steps", "eval_steps"]
    assert "-1 to log after the last step alone" in problem(logging_steps=0)
