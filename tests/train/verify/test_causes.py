"""What is left out of a run whose comparison fails, and what is concluded."""

from __future__ import annotations

from typing import Any

from longfactory.config import from_mapping
from longfactory.errors import UserError
from longfactory.train.verify.causes import LARGEST_FULL, Variant, trace, variants
from longfactory.train.verify.report import Cause, conclusion


def config(**keys: Any) -> Any:
    given = {
        "model_name_or_path": "model",
        "stage": "sft",
        "dataset": "manual_sft",
        "dataset_dir": "data",
        "template": "chatml",
        "output_dir": "out",
        "finetuning_type": "full",
    }
    return from_mapping({**given, **keys})


def left_out(cfg: Any, **changes: Any) -> dict[str, Variant]:
    given = {"rows": 2, "tokens": 512, "several": True, "windows": (), "parameters": 10**6}
    found = variants(cfg, **{**given, **changes})
    return {variant.left_out.split(" (")[0]: variant for variant in found}


def test_only_what_a_run_has_is_left_out() -> None:
    plain = config(disable_gradient_checkpointing=True)
    assert list(left_out(plain, rows=1, several=False)) == []
    cfg = config(
        finetuning_type="lora",
        sequence_parallel_size=4,
        sequence_parallel_mode="usp",
        sequence_parallel_ulysses_degree=2,
        keep_attention=0.5,
    )
    found = left_out(cfg, windows=(300, 140))
    assert list(found) == [
        "sequence parallelism",
        "packing",
        "the window",
        "accumulation",
        "memory techniques",
        "LoRA",
    ]
    assert found["sequence parallelism"].cfg.parallel.sequence_parallel_size == 1
    assert found["packing"].apart and found["packing"].cfg is cfg
    assert (found["the window"].tokens, found["accumulation"].rows) == (140, 1)
    assert found["memory techniques"].cfg.memory.keep_attention == 0.0
    assert found["LoRA"].cfg.method.finetuning_type == "full"
    assert "LoRA" not in left_out(cfg, parameters=LARGEST_FULL + 1)


def test_a_variant_that_cannot_be_made_is_said() -> None:
    def verified(variant: Variant) -> Any:
        if variant.left_out == "LoRA":
            raise UserError("It does not fit.\nMore.")
        return type("Report", (), {"exact": variant.left_out == "packing"})

    cfg = config()
    found = [Variant(name, cfg, 1, 1) for name in ("packing", "LoRA", "the window")]
    assert trace(found, verified) == (
        Cause("packing", True),
        Cause("LoRA", None, "It does not fit."),
        Cause("the window", False),
    )


def test_the_conclusion_names_what_the_difference_follows() -> None:
    packing, window = Cause("packing", True), Cause("the window", True)
    lora, memory = Cause("LoRA", False), Cause("memory techniques", None, "too large")
    assert conclusion([packing, lora]) == ("The difference follows packing: it is gone without it.")
    assert conclusion([packing, window]).endswith("and the window: it is gone without either.")
    assert conclusion([lora, memory]).startswith(
        "The difference remains without each of LoRA: look"
    )
    assert conclusion([memory]).startswith("No part of the run could be switched off")
