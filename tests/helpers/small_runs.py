"""Whole runs of a tiny model in pools of one and two processes that stay alive between tests."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from longfactory.testing import RankPool, tiny_model

POOLS = {1: RankPool(1), 2: RankPool(2)}
STEPS = 4


def run_on_ranks(argv: list[str], cache: str) -> None:
    """A whole run in this process, which may hold a group that another run made."""
    os.environ["LONGFACTORY_CACHE"] = cache
    os.environ["TQDM_DISABLE"] = "1"
    if dist.is_initialized() and dist.get_world_size() == 1:
        # a run of one process has no group and was not started by torchrun
        dist.destroy_process_group()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    from longfactory.config import load_config
    from longfactory.train.run import run

    run(load_config(argv))


def write_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> int:
    """A token for each byte, chatml's marks, an end of text and `more` marks. Returns their number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *letters])}, []))
    raw.add_special_tokens(special)
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_model(folder: Path, seed: int, more: int = 0, **changes: Any) -> None:
    """A tiny Llama with a tokenizer of bytes; `more`: entries of the embeddings beyond the
    tokenizer's.
    """
    vocabulary = write_tokenizer(folder)
    tiny_model("llama", seed=seed, vocab_size=vocabulary + more, **changes).save_pretrained(folder)


def text(n: int) -> str:
    return "".join(random.choice("abcdefgh ") for _ in range(n))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model with a tokenizer, another one to refer to, one with another vocabulary, and
    conversations.
    """
    home = tmp_path_factory.mktemp("runs")
    for name, seed, more in (("model", 0, 0), ("other", 1, 0), ("larger", 1, 64)):
        write_model(home / name, seed, more, tie_word_embeddings=name == "other")
    random.seed(0)
    data = [{"instruction": text(12 + i), "output": text(25 - i)} for i in range(12)]
    (home / "talks.json").write_text(json.dumps(data))
    (home / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json"}}))
    yield home
    for pool in POOLS.values():
        pool.stop()


def keys(home: Path, name: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model_name_or_path": home / "model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": "talks",
        "dataset_dir": home,
        "template": "chatml",
        "cutoff_len": 128,
        "packing": True,
        "output_dir": home / name,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_output_dir": True,
        "preprocessing_num_workers": 1,
        "optim": "adamw_torch",
        # where a gradient is near nothing, its sign is rounding: a step of Adam must not be all
        # sign
        "adam_epsilon": 1e-3,
    }
    return {
        k: str(v) if isinstance(v, Path) else v
        for k, v in (given | changes).items()
        if v is not None
    }


def train(
    home: Path, name: str, size: int, cache: Path | None = None, processes: int = 0, **changes: Any
) -> list[dict[str, float]]:
    """The log of a run; its output folder is `home / name`. `processes`: those of the run, `size`
    where 0.
    """
    run_keys(
        keys(home, name, sequence_parallel_size=size, **changes),
        processes or size,
        cache or home / "cache",
    )
    return json.loads((home / name / "trainer_state.json").read_text())["log_history"]


def run_keys(given: dict[str, Any], size: int, cache: Path) -> None:
    """A run of `size` processes; `cache` is a folder for what is computed once."""
    POOLS[size].run(
        run_on_ranks, [f"{k}={v}" for k, v in given.items() if v is not None], str(cache)
    )


def steps(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [h for h in log if "loss" in h]


def assert_same_log(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    """The logs of two runs of all `STEPS` have the same rows, but for what is measured."""
    assert len(steps(one)) == STEPS and [h.keys() for h in one] == [h.keys() for h in two]
    for a, b in zip(one, two, strict=True):
        for key in a:
            # flos: padding is another
            if not any(word in key for word in ("time", "second", "flos")):
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2e-5), key


LORA = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": 4, "learning_rate": 1e-2}
