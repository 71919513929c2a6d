"""How far steps of `longfactory verify` are from float32, over how far transformers' own attention
in the run's precision is.

    python benchmarks/verify_ratios.py --write benchmarks/results/verify_ratios.md

Healthy runs: families x precisions x methods and stages, tiny models with weights of two sizes, two
processes on a CPU. Then the same with planted faults that change numbers
(tests/helpers/planted.py). `verify` allows `FACTOR` times: it must lie between the two.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "helpers")]

from longfactory.sp.distance import worst  # noqa: E402
from longfactory.testing import run_ranks  # noqa: E402

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 48},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": 48,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {"head_dim": 16, "sliding_window": 48},
    "phi3": {},
    "granite": {},
    "olmo2": {},
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
}
NOT_IN_THE_TABLE: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
"""Families of runs of the tests."""
EXPERTS = ("gpt_oss", "qwen3_moe", "mixtral", "olmoe")
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "pure_bf16": {"bf16": True, "pure_bf16": True},
}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft", "dataset": "manual_sft"},
    "sft, packed": {"stage": "sft", "dataset": "manual_sft", "packing": True, "per_device_train_batch_size": 1},
    "sft, dft": {"stage": "sft", "dataset": "manual_sft", "use_dft_loss": True},
    "sft, eaft": {"stage": "sft", "dataset": "manual_sft", "use_eaft_loss": True},
    "pt": {"stage": "pt", "dataset": "manual_pt"},
    "dpo": {"stage": "dpo", "dataset": "manual_dpo"},
    "dpo, shared prompt, ipo": {"stage": "dpo", "dataset": "manual_dpo", "pref_share_prompt": True, "pref_loss": "ipo"},
    "dpo, simpo": {"stage": "dpo", "dataset": "manual_dpo", "pref_loss": "simpo"},
    "dpo, orpo": {"stage": "dpo", "dataset": "manual_dpo", "pref_loss": "orpo"},
    "dpo, kto_pair": {"stage": "dpo", "dataset": "manual_dpo", "pref_loss": "kto_pair"},
    "dpo, bco, ftx, ld": {
        "stage": "dpo", "dataset": "manual_dpo", "pref_bco_weight": 0.5, "pref_ftx": 0.2, "ld_alpha": 0.5
    },
    "kto": {"stage": "kto", "dataset": "manual_kto"},
    "rm": {"stage": "rm", "dataset": "manual_dpo"},
}  # fmt: skip
PLANTED = (
    "documents leak",
    "local positions",
    "a dead exchange",
    "loss scaled by SP",
    "labels shifted twice",
    "gradients divided by SP",
)


def make_folder(folder: Path, family: str, spread: float, **changes: Any) -> Path:
    """A tiny model's configuration, changed by `changes`, and a tokenizer. `spread`: standard
    deviation of its random weights.
    """
    from transformers import AutoConfig

    from make_model import make_model

    make_model("tiny", folder, vocabulary=600)
    fields: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "attention_dropout": 0.0,
        "initializer_range": spread,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    own = {**FAMILIES, **NOT_IN_THE_TABLE}[family]
    AutoConfig.for_model(family, **{**fields, **own, **changes}).save_pretrained(folder)
    return folder


def measured_on_rank(keys: dict[str, Any], fault: str, cache: str) -> dict[str, Any]:
    """Body of a rank: one verification. Differences over the own attention's: `None` where that has
    none (float32).
    """
    import cpu_sharding
    from longfactory.config import from_mapping
    from longfactory.train.verify import verify
    from planted import planted

    os.environ["LONGFACTORY_CACHE"] = cache
    cpu_sharding.reset()
    with planted(fault):
        report = verify(from_mapping(keys), rows=2, tokens=240)
    measures = {"loss": report.loss, "grad_norm": report.grad_norm, "logps": report.logps}
    ratios = {name: m.difference / m.own if m.own else None for name, m in measures.items()}
    first = next(iter(report.parameters.values()))  # the farthest from what is allowed, or NaN
    ratios["gradients"] = first.difference / first.own if first.own else None
    of_allowed = worst(
        m.difference / m.allowed for m in [*measures.values(), *report.parameters.values()]
    )
    return {
        "ratios": ratios,
        "of_allowed": of_allowed,
        "exact": report.exact,
        "reasons": len(report.reasons),
    }


def cases(quick: bool) -> Iterator[tuple[str, str, str, str, float, dict[str, Any], str]]:
    """(family, precision, what, method, spread, keys, fault)"""
    lora = {"finetuning_type": "lora"}
    for family in FAMILIES:
        for precision, keys in PRECISIONS.items():
            for spread in (0.02, 0.15):
                yield family, precision, "sft", "full", spread, {**STAGES["sft"], **keys}, ""
            if family in (*EXPERTS, "qwen2") and precision != "pure_bf16":
                yield family, precision, "dpo", "lora", 0.15, {**STAGES["dpo"], **keys, **lora}, ""
    for what, stage in STAGES.items():
        for precision, keys in PRECISIONS.items():
            for family in ("qwen2", "qwen3_moe"):
                if what != "sft" and not (quick and precision == "pure_bf16"):
                    yield family, precision, what, "full", 0.15, {**stage, **keys}, ""
    for family in FAMILIES:
        for precision, keys in PRECISIONS.items():
            for fault in PLANTED if family in ("llama", "qwen3_moe", "gpt_oss") else PLANTED[:3]:
                more = {"per_device_train_batch_size": 1} if fault == "a dead exchange" else {}
                yield family, precision, "pt", "full", 0.15, {**STAGES["pt"], **keys, **more}, fault
            if "sliding_window" in FAMILIES[family]:
                yield (
                    family,
                    precision,
                    "pt",
                    "full",
                    0.15,
                    {**STAGES["pt"], **keys},
                    "a small window dropped",
                )
            # Under autocast the hand-written layer steps aside.
            if family == "mistral" and precision != "bf16":
                yield (
                    family,
                    precision,
                    "pt",
                    "full",
                    0.15,
                    {**STAGES["pt"], **keys},
                    "the hand-written layer's window dropped",
                )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, help="the table, with the numbers beside it as .json")
    parser.add_argument("--only", default="", help="families, separated by commas")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    from verify_ratios import measured_on_rank as body  # by a name that the ranks can import

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for family, precision, what, method, spread, keys, fault in cases(options.quick):
            if options.only and family not in options.only.split(","):
                continue
            folder = Path(scratch) / f"{family}-{spread}"
            if not folder.exists():
                make_folder(folder, family, spread)
            given = {
                "model_name_or_path": str(folder),
                "train_from_scratch": True,
                "template": "chatml",
                "dataset_dir": str(ROOT / "data"),
                "max_samples": 12,
                "cutoff_len": 120,
                "finetuning_type": "full",
                "per_device_train_batch_size": 2,
                "sequence_parallel_size": 2,
                "output_dir": str(Path(scratch) / "out"),
                **keys,
            }
            row: dict[str, Any] = {
                "family": family, "precision": precision, "what": what, "method": method, "spread": spread, "fault": fault
            }  # fmt: skip
            try:
                row |= run_ranks(2, body, given, fault, str(Path(scratch) / "cache"), timeout=200)[
                    0
                ]
            except Exception as error:  # a family that is refused is a row too
                row["error"] = str(error).strip().splitlines()[-1][:300]
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.write:
        options.write.write_text(table(rows))
        options.write.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """The distributions, in the form of a page."""
    import torch
    import transformers

    from longfactory.train.verify import FACTOR

    def told(row: dict[str, Any]) -> str:
        return ", ".join(str(row[key]) for key in ("family", "what", "method", "spread"))

    good = [row for row in rows if not row["fault"] and "error" not in row]
    bad = [row for row in rows if row["fault"] and "error" not in row]
    lines = [
        "# Distances of `longfactory verify`",
        "",
        (
            f"Written by `benchmarks/verify_ratios.py` with torch {torch.__version__}, transformers"
            f" {transformers.__version__}, on a CPU: {len(good)} healthy runs and {len(bad)} with a"
            f" planted fault, of {len({row['family'] for row in rows})} families, two processes."
        ),
        "",
        (
            "A step's distance from a wider precision, over the distance of transformers' own"
            " attention in the run's precision; of gradients, that of the parameter that is"
            f" nearest to its limit. `verify` allows {FACTOR:g} times, and takes differences below"
            " 1e-4 for none: in float32 the last column, the largest distance over what is"
            " allowed, counts."
        ),
        "",
        (
            "| precision | healthy runs | alarms | loss | grad_norm | log-probabilities | gradients"
            " | of what is allowed |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision in PRECISIONS:
        some = [row for row in good if row["precision"] == precision]
        largest = [
            worst([0.0, *(row["ratios"][key] or 0.0 for row in some)])
            for key in ("loss", "grad_norm", "logps", "gradients")
        ]
        cells = [f"{x:.2f}" if x else "-" for x in largest]
        alarms = sum(not row["exact"] for row in some)
        lines.append(
            f"| {precision} | {len(some)} | {alarms} | {' | '.join(cells)} |"
            f" {worst([0.0, *(row['of_allowed'] for row in some)]):.3f} |"
        )
    lines += [
        "",
        "Each cell is the largest of all runs. The healthy runs that come nearest to an alarm:",
        "",
    ]
    lines += [
        f"- {told(row)}, {row['precision']}: {row['of_allowed']:.2f}"
        for row in sorted(good, key=lambda r: -r["of_allowed"])[:5]
    ]
    lines += [
        "",
        (
            "| planted fault | precision | runs | missed | smallest of what is allowed | smallest"
            " ratio of gradients | of log-probabilities |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for fault in dict.fromkeys(row["fault"] for row in bad):
        for precision in PRECISIONS:
            some = [row for row in bad if row["precision"] == precision and row["fault"] == fault]
            if some:
                smallest = [
                    min(row["ratios"][key] or 0.0 for row in some) for key in ("gradients", "logps")
                ]
                cells = [f"{x:.1f}" if x else "-" for x in smallest]
                missed = sum(row["exact"] for row in some)
                least = min(row["of_allowed"] for row in some)
                lines.append(
                    f"| {fault} | {precision} | {len(some)} | {missed} | {least:.1f} |"
                    f" {' | '.join(cells)} |"
                )
    refused = [row for row in rows if "error" in row]
    if refused:
        lines += [
            "",
            "Not run:",
            "",
            *[f"- {told(row)}, {row['precision']}: {row['error']}" for row in refused],
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
