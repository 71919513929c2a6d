"""Checkpoints with a vision tower, trained on text: split over processes as in one, and saved
whole, as the class that they are.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from longfactory.testing import RankError
from small_runs import LORA, POOLS, keys, run_on_ranks, steps, train, write_tokenizer

pytestmark = pytest.mark.processes

GEMMA_MARKS = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)


def write_gemma3(folder: Path) -> None:
    """As the published 4b, 12b and 27b are, tiny."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    n = write_tokenizer(folder, GEMMA_MARKS)
    text = {
        "vocab_size": n,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
    }
    text |= {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        "eos_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = Gemma3Config(
        text_config=text | {"pad_token_id": 0},
        vision_config=vision | {"patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=n - 1,
        boi_token_index=n - 3,
        eoi_token_index=n - 2,
    )
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)


def write_qwen3_5(folder: Path) -> None:
    from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    n = write_tokenizer(folder)
    text = {
        "vocab_size": n,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    text |= {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    text |= {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 2048,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
    }
    config = Qwen3_5Config(
        text_config=text | {"pad_token_id": 0},
        vision_config=vision | {"num_position_embeddings": 16},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)


MODELS = {"gemma3": write_gemma3, "qwen3_5": write_qwen3_5}
IDLE = {"gemma3": ("vision_tower", "multi_modal_projector"), "qwen3_5": ("visual",)}
CLASSES = {"gemma3": "Gemma3ForConditionalGeneration", "qwen3_5": "Qwen3_5ForConditionalGeneration"}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("towers")
    for name, write in MODELS.items():
        write(home / name)
    r = random.Random(0)

    def text(low: int, high: int) -> str:
        return "".join(r.choice("abcdefgh ") for _ in range(r.randint(low, high)))

    rows = [{"instruction": text(5, 60), "output": text(3, 40).strip() or "x"} for _ in range(23)]
    (home / "talks.json").write_text(json.dumps(rows))
    (home / "dataset_info.json").write_text(json.dumps({"talks": {"file_name": "talks.json"}}))
    yield home
    for pool in POOLS.values():
        pool.stop()


def run(
    towers: Path, family: str, name: str, size: int, processes: int = 0, **changes: Any
) -> list[dict[str, float]]:
    given = {
        "cutoff_len": 512,
        "packing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "seed": 1,
    }
    given |= {
        "model_name_or_path": towers / family,
        "template": "gemma3" if family == "gemma3" else "qwen3_nothink",
        "max_steps": 2,
    }
    return steps(train(towers, name, size, processes=processes, **given | changes))


def same(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert len(one) == len(two) > 0
    for key in ("loss", "grad_norm"):
        assert [h[key] for h in two] == pytest.approx([h[key] for h in one], rel=2e-5), key


def check_saved(towers: Path, family: str, folder: Path, changed: bool = True) -> None:
    """Every tensor of the checkpoint, as the same class; the tower as it was."""
    before, after = (
        load_file(towers / family / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert json.loads((folder / "config.json").read_text())["architectures"] == [CLASSES[family]]
    idle = {n for n in before if any(part in n.split(".") for part in IDLE[family])}
    assert idle and all(torch.equal(before[n], after[n]) for n in idle)
    assert changed != all(torch.equal(before[n], after[n]) for n in before.keys() - idle)


@pytest.mark.parametrize("family", MODELS)
def test_full_training_is_that_of_one_process_and_saves_every_tensor(
    towers: Path, family: str
) -> None:
    one = run(towers, family, f"{family}1", 1)
    same(one, run(towers, family, f"{family}2", 2))
    if family == "gemma3":
        assert one[0]["grad_norm"] == pytest.approx(7.548, abs=6e-4)
    check_saved(towers, family, towers / f"{family}2")


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_data_parallel_and_accumulated_steps_are_those_of_one_process(
    towers: Path, family: str
) -> None:
    one = run(towers, family, f"{family}_a1", 1, gradient_accumulation_steps=4)
    same(one, run(towers, family, f"{family}_a2", 2, gradient_accumulation_steps=4))
    same(one, run(towers, family, f"{family}_d2", 1, processes=2, gradient_accumulation_steps=2))


@pytest.mark.parametrize("family", ["gemma3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_adapters_are_in_the_decoder_and_fit_the_checkpoints_own_class(
    towers: Path, family: str
) -> None:
    import transformers
    from peft import PeftModel

    one = run(towers, family, f"{family}_lora1", 1, **LORA)
    same(one, run(towers, family, f"{family}_lora2", 2, **LORA))
    saved = load_file(towers / f"{family}_lora2" / "adapter_model.safetensors")
    assert saved and not any(part in name for name in saved for part in IDLE[family])
    base = getattr(transformers, CLASSES[family]).from_pretrained(towers / family)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, towers / f"{family}_lora2")
        assert not torch.allclose(model(input_ids=ids).logits, before)
    found = {n for n in model.state_dict() if "lora_" in n}
    assert len(found) == len(saved)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["freeze", "dpo", "rm", "resized"])
def test_other_ways_of_training_them(towers: Path, family: str, kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
        "dpo": {"stage": "dpo", "dataset": "pairs", "ref_model": towers / family},
        "rm": {"stage": "rm", "dataset": "pairs"},
        "resized": {"resize_vocab": True, "add_tokens": "<new>,<newer>"},
    }
    rows = json.loads((towers / "talks.json").read_text())
    pairs = [
        {
            "instruction": r["instruction"],
            "chosen": r["output"] + "a",
            "rejected": r["output"] + "bb",
        }
        for r in rows
    ]
    (towers / "pairs.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "talks": {"file_name": "talks.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
    }
    (towers / "dataset_info.json").write_text(json.dumps(info))
    one = run(towers, family, f"{family}_{kind}1", 1, **changes[kind])
    same(one, run(towers, family, f"{family}_{kind}2", 2, **changes[kind]))
    if kind not in ("rm", "resized"):
        check_saved(towers, family, towers / f"{family}_{kind}2")


def run_with_a_trained_tower(argv: list[str], cache: str) -> None:
    """A whole run that takes every part of the model for one that text passes through."""
    from longfactory.model import adapter_targets, adapters, trained_parameters
    from longfactory.sp.text_model import Idle

    with contextlib.ExitStack() as patched:
        for module in (adapters, adapter_targets, trained_parameters):
            patched.enter_context(mock.patch.object(module, "idle", lambda model: Idle()))
        run_on_ranks(argv, cache)


def test_a_trained_parameter_without_a_gradient_is_refused_before_the_first_step(
    towers: Path,
) -> None:
    """Whatever it is: here a tower that is not known as one."""
    given = {
        "cutoff_len": 512,
        "packing": False,
        "template": "gemma3",
        "model_name_or_path": towers / "gemma3",
    }
    for size, sharded in ((2, 2), (2, 1)):
        words = keys(towers, "refused", sequence_parallel_size=sharded, **given)
        with pytest.raises(
            RankError,
            match=(
                r"\d+ trainable parameters get no gradient from text: model.multi_modal_projector"
            ),
        ):
            POOLS[size].run(
                run_with_a_trained_tower,
                [f"{k}={v}" for k, v in words.items()],
                str(towers / "cache"),
            )
    run(towers, "gemma3", "after", 2)  # the processes are in order
