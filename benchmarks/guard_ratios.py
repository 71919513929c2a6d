"""How far apart the start-up guard's ratios of exact models and of planted faults are: what its
limit rests on.

    python benchmarks/guard_ratios.py                     # on a CPU
    python benchmarks/guard_ratios.py --device cuda       # heads as wide as those of real models
    python benchmarks/guard_ratios.py llama --faults      # some families and SmolLM2; only planted faults, or (--healthy) only exact models

Every family with random weights and trained (to below 60 % of the entropy of a uniform guess), and
SmolLM2-135M-Instruct, in four precisions, with the layers that a run installs. A ratio is the error
of the run's layer, or of the engine's attention alone, over that of the model's own arithmetic in
the same precision. Faults are those of _planted.py, in models with random weights and in SmolLM2.
Results replace those of the same runs in benchmarks/results/guard_ratios[_DEVICE].json, of which
the page guard_ratios[_DEVICE].md is made.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.settings import MemorySettings
from longfactory.model import load
from longfactory.sp import compare, guard, hf
from longfactory_dev.tiny_models import tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import _planted

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "llama4_text",
    "qwen3_next",
    "opt",
    "ctrl",
    "diffllama",
    "phimoe",
)
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "autocast": torch.float32,
}
SMOLLM2 = "SmolLM2-135M"
REAL_HEADS: dict[str, Any] = {
    "hidden_size": 512,
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = ("output", "gradient of the input", "gradients of weights", "attention")


def trained(family: str, fields: dict[str, Any], device: str) -> Any:
    """A tiny model that has learnt to guess the next token of a chain, where each token has four
    successors.
    """
    model = tiny_model(family, torch.float32, **fields).to(device).train()
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    successors = torch.randint(0, vocabulary, (vocabulary, 4), generator=draw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    goal, loss = 0.6 * math.log(vocabulary), math.inf
    for _ in range(400):
        rows = [torch.randint(0, vocabulary, (8,), generator=draw)]
        for _ in range(64):
            rows.append(successors[rows[-1], torch.randint(0, 4, (8,), generator=draw)])
        ids = torch.stack(rows, 1).to(device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        step = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        step.backward()
        optimizer.step()
        loss = step.item()
        if loss < 0.95 * goal:
            return model.eval()
    raise RuntimeError(f"{family} was not trained: its loss is {loss:.2f}, wanted below {goal:.2f}")


def smollm2() -> Any:
    path, arguments = load.resolve(load.EMBEDDED)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **arguments
    )


def installed(model: Any, precision: str, device: str, ctx: sp.SequenceParallel) -> Any:
    """A copy in the precision, with the engine and the layers of a run."""
    model = copy.deepcopy(model).to(PRECISIONS[precision]).to(device)
    if precision == "autocast":  # as accelerate does
        model.forward = torch.autocast(device, dtype=torch.bfloat16)(model.forward)
    ctx.heads = ctx.kv_heads = None
    hf.prepare(model, ctx)
    apply_memory(model, MemorySettings(), device)
    return model


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, float]]:
    """The largest ratio of each kind that the guard finds inside the block."""
    found: dict[str, float] = {}

    def note(kind: str, ratio: float) -> None:
        found[kind] = max(found.get(kind, 0.0), math.inf if math.isnan(ratio) else ratio)

    def layers(ratios: Any) -> Any:
        def call(*args: Any) -> Any:
            result = ratios(*args)
            for what, ratio in result.items():
                note(what if what in KINDS else "gradients of weights", ratio)
            return result

        return call

    def attention(ratios: Any) -> Any:
        def call(*args: Any) -> Any:
            result = ratios(*args)
            for ratio in result.values():
                note("attention", ratio)
            return result

        return call

    with (
        _planted.changed(guard.alone, "ratios", layers),
        _planted.changed(guard.attention, "attention_ratios", attention),
    ):
        yield found


def guarded(model: Any, ctx: sp.SequenceParallel) -> dict[str, Any]:
    """The ratios, the guard's sentence if it refuses, and its seconds."""
    started, refused = time.perf_counter(), None
    with recorded() as found:
        try:
            guard.guard(model, ctx)
        except ValueError as error:
            refused = str(error)
    return {"ratios": found, "refused": refused, "seconds": round(time.perf_counter() - started, 2)}


def measure(
    device: str, names: list[str], precisions: list[str], healthy: bool, faults: bool
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each model, when it is done."""
    ctx = sp.SequenceParallel.create(1, device_type=device)
    for name in names:
        fields = real_heads(name) if device == "cuda" and name != SMOLLM2 else {}
        whole = (
            {"published": smollm2()}
            if name == SMOLLM2
            else {"random": tiny_model(name, torch.float32, **fields)}
        )
        rows = []
        if healthy:
            every = (
                whole if name == SMOLLM2 else {**whole, "trained": trained(name, fields, device)}
            )
            rows += [
                of(name, weights, None, model, p, device, ctx)
                for weights, model in every.items()
                for p in precisions
            ]
        for fault, (_, shown_by, more) in _planted.FAULTS.items() if faults else ():
            if name in shown_by or (name == SMOLLM2 and "llama" in shown_by and not more):
                broken = (
                    {"random": tiny_model(name, torch.float32, **fields, **more)} if more else whole
                )
                rows += [
                    of(name, weights, fault, model, p, device, ctx)
                    for weights, model in broken.items()
                    for p in precisions
                ]
        yield [row for row in rows if row]


def real_heads(family: str) -> dict[str, Any]:
    from longfactory_dev.tiny_models import tiny_config

    values = tiny_config(family).to_dict()
    return {k: v for k, v in REAL_HEADS.items() if k in values and not values.get("kv_lora_rank")}


def of(
    family: str,
    weights: str,
    fault: str | None,
    model: Any,
    precision: str,
    device: str,
    ctx: sp.SequenceParallel,
) -> dict[str, Any]:
    if fault is not None and fault.startswith("hand-written") and precision == "autocast":
        return {}  # weights and hidden states differ in type: the hand-written layer does not run
    run = installed(model, precision, device, ctx)
    with _planted.FAULTS[fault][0](run) if fault else contextlib.nullcontext():
        row = {
            "family": family,
            "weights": weights,
            "precision": precision,
            "fault": fault,
            **guarded(run, ctx),
        }
    largest = max(row["ratios"].values(), default=0.0)
    print(
        f"{family:14}{weights:10}{precision:9}{largest:10.3g} {row['seconds']:6.1f}s  {fault or ''}"
        f" {(row['refused'] or '')[:90]}",
        flush=True,
    )
    return row


def table(rows: list[dict[str, Any]], device: str) -> str:
    """The page of results."""
    good, broken = [r for r in rows if r["fault"] is None], [r for r in rows if r["fault"]]
    precisions = [p for p in PRECISIONS if any(r["precision"] == p for r in rows)]
    lines = [
        "# Ratios of the start-up guard",
        "",
        (
            f"`python benchmarks/guard_ratios.py --device {device}`, torch {torch.__version__},"
            f" transformers {transformers.__version__}, on"
        ),
        f"{place(device)}.",
        "",
        (
            "A ratio is the error of what the run computes over the error of the model's own"
            " arithmetic in the same precision, both against"
        ),
        (
            f"a wider type, on {' and '.join(map(str, guard.row.DOCUMENTS))} tokens. The guard refuses"
            f" above **{compare.LIMIT:g}**"
        ),
        (
            f"in half precision and above **{compare.FULL_LIMIT:g}** in fp32. Where the ratio is"
            " above that, the model's own error is the"
        ),
        f"largest of up to {compare.SAMPLES} samples, on inputs moved by a rounding.",
        "",
        f"## Exact models: {len(good)} runs, {sum(r['refused'] is not None for r in good)} refused",
        "",
        "The largest ratio among all families and weights.",
        "",
        f"| | {' | '.join(precisions)} |",
        f"|---|{'---|' * len(precisions)}",
    ]
    for kind in KINDS:
        lines.append(f"| {kind} | " + " | ".join(largest(good, p, kind) for p in precisions) + " |")
    lines += [
        "",
        "| family | weights | " + " | ".join(precisions) + " |",
        "|---|---|" + "---|" * len(precisions),
    ]
    for family, weights in dict.fromkeys((r["family"], r["weights"]) for r in good):
        mine = [r for r in good if (r["family"], r["weights"]) == (family, weights)]
        lines.append(
            f"| {family} | {weights} | "
            + " | ".join(largest(mine, p, None) for p in precisions)
            + " |"
        )
    lines += [
        "",
        (
            f"## Planted faults: {len(broken)} runs, {sum(r['refused'] is None for r in broken)}"
            " not refused"
        ),
        "",
        (
            "Of each fault and precision the smallest ratio, among families and weights, of those"
            " by which the guard refuses. `settings`: the"
        ),
        (
            "engine is called with something that the model does not ask for, which is refused"
            " before numbers are compared; `input`: the"
        ),
        "hidden states differ before the first layer.",
        "",
        "| fault | " + " | ".join(precisions) + " |",
        "|---|" + "---|" * len(precisions),
    ]
    for fault in dict.fromkeys(r["fault"] for r in broken):
        lines.append(
            f"| {fault} | "
            + " | ".join(
                smallest([r for r in broken if r["fault"] == fault], p) for p in precisions
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def place(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "a CPU"


def largest(rows: list[dict[str, Any]], precision: str, kind: str | None) -> str:
    values = [
        v
        for r in rows
        if r["precision"] == precision
        for k, v in r["ratios"].items()
        if kind in (None, k)
    ]
    return f"{max(values):.2f}" if values else ""


def smallest(rows: list[dict[str, Any]], precision: str) -> str:
    mine = [r for r in rows if r["precision"] == precision]
    if not mine:
        return "does not run"
    if any(r["refused"] is None for r in mine):
        return (
            "**not refused: "
            + ", ".join(f"{r['family']} {r['weights']}" for r in mine if r["refused"] is None)
            + "**"
        )
    ratios = [
        max(r["ratios"].values())
        for r in mine
        if r["ratios"] and "before the first layer" not in r["refused"]
    ]
    if ratios:
        return f"{min(ratios):.3g}"
    return "input" if "before the first layer" in mine[0]["refused"] else "settings"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", help=f"model types, or {SMOLLM2}; the table's own by default"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--precision", nargs="*", choices=list(PRECISIONS), default=list(PRECISIONS)
    )
    parser.add_argument("--healthy", action="store_true", help="only exact models")
    parser.add_argument("--faults", action="store_true", help="only planted faults")
    parser.add_argument("--write", type=Path, help="where the results go, without a suffix")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    name = "guard_ratios" if args.device == "cpu" else f"guard_ratios_{args.device}"
    target = args.write or ROOT / "benchmarks" / "results" / name
    models = args.models or [*FAMILIES, SMOLLM2]
    for rows in measure(args.device, models, args.precision, not args.faults, not args.healthy):
        data = target.with_suffix(".json")
        merged = {
            key(r): r for r in [*(json.loads(data.read_text()) if data.exists() else []), *rows]
        }
        data.write_text(json.dumps(sorted(merged.values(), key=order), indent=1) + "\n")
        target.with_suffix(".md").write_text(table(sorted(merged.values(), key=order), args.device))
    print(target.with_suffix(".md").read_text())


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("family", "weights", "precision", "fault"))


def order(row: dict[str, Any]) -> tuple[int, ...]:
    """As the tables go: by fault, family, weights, precision."""
    faults, families = [None, *_planted.FAULTS], [*FAMILIES, SMOLLM2]
    place = families.index(row["family"]) if row["family"] in families else len(families)
    return (
        faults.index(row["fault"]),
        place,
        ("random", "trained", "published").index(row["weights"]),
        [*PRECISIONS].index(row["precision"]),
    )


if __name__ == "__main__":
    main()
