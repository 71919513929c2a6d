"""Every text example of LLaMA-Factory that resolves takes three steps on a tiny model: its own keys,
but for the model, the data, their sizes, and what needs a GPU or a service.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from longfactory.testing import RankError
from small_runs import POOLS, home, run_on_ranks, steps

pytestmark = [pytest.mark.slow, pytest.mark.processes]

__all__ = ["home"]  # a fixture

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "config" / "llamafactory_examples.json").read_text("utf-8")
)
IMAGES = ("media_dir", "image_max_pixels", "video_max_pixels")
RUNS = [
    name
    for name, example in EXAMPLES.items()
    if example["verdict"] == "resolves"
    and example["command"] == "train"
    and not any(key in example["keys"] for key in IMAGES)
    and "multimodal" not in name
    and not example["keys"].get("do_predict")
]
DATA = {"sft": "talks", "pt": "texts", "dpo": "pairs", "rm": "pairs", "kto": "labelled"}
PACKAGES = {
    "quantization_bit": "bitsandbytes",
    "quant_config": "bitsandbytes",
    "use_galore": "galore_torch",
    "use_apollo": "apollo_torch",
    "use_adam_mini": "adam_mini",
    "fp8": "torchao",
}
WITHOUT_LIGER = "enable_liger_kernel: (liger-kernel is not installed|Liger's kernels need a GPU)"
ELSEWHERE = (
    *("deepspeed", "fsdp", "dist_config", "report_to", "run_name", "ddp_timeout", "bf16", "fp16"),
    *("dataloader_num_workers", "preprocessing_num_workers", "overwrite_cache", "max_samples"),
    *("num_train_epochs", "save_steps", "save_strategy", "logging_steps", "flash_attn", "cp_size"),
    *("train_dataset", "model", "warmup_ratio", "eval_dataset", "eval_steps", "eval_strategy"),
    *("per_device_eval_batch_size", "adapter_name_or_path", "deepspeed_config", "val_size"),
    *("ray_run_name", "ray_storage_path", "ray_num_workers", "placement_strategy"),
    *("resources_per_worker", "ref_model", "reward_model", "ref_model_adapters", "rope_scaling"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("tokenized_path", "cp_mode", "freeze_trainable_layers", "resume_from_checkpoint"),
)
"""Keys of devices, services and sizes, which a tiny run has its own of."""


@pytest.fixture(scope="module")
def data(home: Path) -> Path:
    """Data of every kind, beside the conversations."""
    asked = [{"role": "user", "content": "abc"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("def", "fed"))
    files: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "texts": ([{"text": f"abc {i} def"} for i in range(12)], {"columns": {"prompt": "text"}}),
        "pairs": (
            [{"messages": asked, "chosen": good, "rejected": bad}] * 12,
            {
                "ranking": True,
                "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
            },
        ),
        "labelled": (
            [{"messages": [*asked, good], "label": i % 2 == 0} for i in range(12)],
            {"columns": {"messages": "messages", "kto_tag": "label"}},
        ),
    }
    info = json.loads((home / "dataset_info.json").read_text())
    for name, (rows, entry) in files.items():
        (home / f"{name}.json").write_text(json.dumps(rows))
        form = {} if name == "texts" else {"formatting": "openai"}
        info[name] = {"file_name": f"{name}.json", **form, **entry}
    (home / "dataset_info.json").write_text(json.dumps(info))
    return home


@pytest.mark.parametrize("name", RUNS)
def test_three_steps(name: str, data: Path, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    keys = {**example["keys"], **example.get("words", {})}
    for key, packages in PACKAGES.items():
        for package in packages.split():
            if keys.get(key) and importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    stage = keys.get("stage", "sft")
    given = {key: value for key, value in keys.items() if key not in ELSEWHERE}
    own = "model" if "model" in keys else "model_name_or_path"
    sets = "train_dataset" if "train_dataset" in keys else "dataset"
    if "dataset" in keys or "train_dataset" in keys:
        given[sets] = DATA[stage]
    given |= {
        own: str(data / "model"),
        "dataset_dir": str(data),
        "template": "chatml",
        "cutoff_len": 64,
        "output_dir": str(tmp_path / "out"),  # an adapter is not written beside a full model
        "overwrite_output_dir": True,
        "do_train": True,
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": bool(keys.get("fp8")),
        "fp8": False,  # torchao's own tests run it
    }
    if "micro_batch_size" in given:
        del given["per_device_train_batch_size"]
    given = {key: value for key, value in given.items() if value is not None}
    words = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    if keys.get("enable_liger_kernel") or "liger" in str(keys.get("kernel_config")):
        with pytest.raises(RankError, match=WITHOUT_LIGER):
            POOLS[1].run(run_on_ranks, words, str(data / "cache"), timeout=200)
        return
    POOLS[1].run(run_on_ranks, words, str(data / "cache"), timeout=200)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert len(steps(log)) == 3
