"""Tiny vision-language models and data sets with pictures, for whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

import tiny_media
import vision_models
from longfactory.sp.text_model import model_class
from small_runs import run_on_ranks

FAMILIES = {
    "qwen3_vl": ("qwen3_vl", "qwen3_vl"),
    "qwen2_5_vl": ("qwen2_vl", "qwen2_vl"),
    "gemma3": ("gemma3", "gemma3"),
}
"""Of a model type: the family of its images and its template."""
TRAINED = {
    "freeze_vision_tower": False,
    "freeze_multi_modal_projector": False,
}


def write_model(folder: Path, family: str) -> None:
    """A tiny model with a tower, a tokenizer and an image processor."""
    from transformers import AutoConfig

    processor = FAMILIES[family][0]
    tiny_media.folder(folder, processor)
    tokenizer = tiny_media.tokenizer(processor)
    tokenizer.save_pretrained(folder)
    given = vision_models.config(family).to_dict()
    given["text_config"]["vocab_size"] = len(tokenizer)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        given["text_config"][key] = tokenizer.pad_token_id
    vision = given["vision_config"]
    if family == "gemma3":
        vision |= {"image_size": 56, "patch_size": 14}
        given["image_token_index"] = tokenizer.convert_tokens_to_ids("<image_soft_token>")
        given.pop("image_token_id", None)
    else:
        vision["patch_size"] = 16 if family == "qwen3_vl" else 14
        if "window_size" in vision:
            vision["window_size"] = 56
        for kind in ("image", "video"):
            given[f"{kind}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
    config = AutoConfig.for_model(**given)
    torch.manual_seed(0)
    model = model_class(config).from_config()
    about = json.loads((folder / "config.json").read_text())
    model.save_pretrained(folder)
    assert about["model_type"] == model.config.model_type


def write_data(home: Path) -> None:
    draw = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh ") for _ in range(draw.randint(low, high))).strip()

    for i in range(6):
        tiny_media.picture(64 + 32 * (i % 3), 64 + 16 * i, seed=i).save(home / f"{i}.png")
    rows: dict[str, list[dict[str, Any]]] = {"talks": [], "pairs": [], "labels": [], "texts": []}
    for i in range(16):
        count = i % 3
        images = [f"{draw.randrange(6)}.png" for _ in range(count)]
        prompt = "<image>" * count + text(5, 30) + "?"
        answer, worse = text(3, 30) + "a", text(3, 20) + "b"
        rows["talks"].append({"instruction": prompt, "output": answer, "images": images})
        rows["pairs"].append(
            {"instruction": prompt, "chosen": answer, "rejected": worse, "images": images}
        )
        turns = [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": answer},
        ]
        rows["labels"].append({"conversations": turns, "label": i % 2 == 0, "images": images})
        rows["texts"].append({"text": prompt + answer, "images": images})
    columns = {
        "talks": {"prompt": "instruction", "response": "output"},
        "pairs": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        "labels": {"messages": "conversations", "kto_tag": "label"},
        "texts": {"prompt": "text"},
    }
    info: dict[str, Any] = {}
    for name, entries in rows.items():
        (home / f"{name}.json").write_text(json.dumps(entries))
        info[name] = {
            "file_name": f"{name}.json",
            "columns": columns[name] | {"images": "images"},
        }
    info["pairs"]["ranking"] = True
    info["labels"]["formatting"] = "sharegpt"
    words = [{"instruction": text(5, 30), "output": text(3, 30) + "a"} for _ in range(8)]
    (home / "words.json").write_text(json.dumps(words))
    info["words"] = {"file_name": "words.json"}
    (home / "dataset_info.json").write_text(json.dumps(info))


def of_run(home: Path, name: str, family: str = "qwen3_vl", **changes: Any) -> dict[str, Any]:
    """Keys of a small run on pictures, beside those of `small_runs.keys`."""
    given: dict[str, Any] = {
        "model_name_or_path": home / family,
        "template": FAMILIES[family][1],
        "media_dir": home,
        "cutoff_len": 1024,
        "packing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "image_max_pixels": 4096,
        "seed": 3,
    }
    return given | changes


def run_sharded(argv: list[str], cache: str, sharding: str) -> None:
    """A whole run on ranks of a CPU whose parameters are sharded all the same: "fsdp2" or
    "deepspeed". This process is changed for good.
    """
    import cpu_sharding
    from longfactory import shard
    from longfactory.shard import settings
    from longfactory.train import memory_plan

    cpu_sharding.start("zero3" if sharding == "deepspeed" else sharding)
    for module in (shard, settings, memory_plan.shard):
        if hasattr(module, "choose_sharding"):
            module.choose_sharding = lambda *args, **kwargs: sharding  # type: ignore[attr-defined]
    run_on_ranks(argv, cache)


def write_zero3(folder: Path) -> Path:
    """DeepSpeed's file of ZeRO-3 in which no parameter stays whole."""
    zero = {"stage": 3, "reduce_bucket_size": 10000, "stage3_param_persistence_threshold": 0}
    config = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }
    path = folder / "zero3.json"
    path.write_text(json.dumps(config))
    return path
