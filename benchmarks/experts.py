"""Seconds of a layer's routed experts on one GPU, forward and backward: every implementation that
transformers registers beside the one that runs train through, at the shapes of today's mixtures.

    python benchmarks/experts.py --out benchmarks/results      # one GPU, about two minutes
    python benchmarks/experts.py --smoke                       # tiny shapes on the CPU: does it run?

Weights are bf16, or fp32 masters under autocast. `products` are the grouped products alone (forward,
gradient of the input, gradient of the weights); `share` is their time over that of the whole.
`dispatch` is what stands around them: sorting, sending tokens to experts, gate, weighting, putting
back in order and summing, and their adjoints. `recomputed`: with one forward pass more, as when
layers are recomputed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
from _table import command_line, machine_name  # noqa: E402
from longfactory.model import experts as ours  # noqa: E402
from plan_accuracy import FURTHER  # noqa: E402


class Case(NamedTuple):
    """`tokens`: of the row. `masters`: weights are fp32 and autocast is on."""

    shape: str
    tokens: int
    masters: bool = False
    trained: bool = True


CASES = [
    Case("qwen3-30b-a3b", 16384),
    Case("qwen3-30b-a3b", 65536),
    Case("qwen3-30b-a3b", 16384, masters=True),
    Case("qwen3-30b-a3b", 16384, trained=False),
    Case("gpt-oss-20b", 32768),
    Case("glm-4.5-air", 16384),
    Case("deepseek-v2-lite", 16384),
    Case("qwen3-30b-a3b", 256),
]
SMALL = {"hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48, "vocab_size": 256}


def implementations() -> list[str]:
    """LongFactory's, then what transformers registers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["longfactory", "eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]


def make_block(case: Case, device: str) -> tuple[Any, Any]:
    """The experts of one layer, and its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = dict(FURTHER[case.shape])
    kind = keys.pop("model_type")
    keys |= {"num_hidden_layers": 1, "vocab_size": 256, "first_k_dense_replace": 0}
    if device == "cpu":
        keys |= {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = AutoConfig.for_model(kind, **keys)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if case.masters else torch.bfloat16
        )
    ours.install_grouped(model)
    block = next(m for m in model.modules() if ours.of_interface(m))
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.02)
    return block.requires_grad_(case.trained), config


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def products(block: Any, pairs: int, trained: bool, device: str) -> dict[str, float]:
    """Seconds of the grouped products alone, at tokens that are sent at random, and their FLOPs."""
    found = {"forward": 0.0, "backward": 0.0, "flop": 0.0}
    for p in block.parameters(recurse=False):
        if p.dim() != 3:
            continue
        weight = p.detach().bfloat16()
        weight = weight if block.is_transposed else weight.transpose(1, 2)
        x = torch.randn(pairs, weight.shape[1], device=device, dtype=torch.bfloat16)
        dy = torch.randn(pairs, weight.shape[2], device=device, dtype=torch.bfloat16)
        expert = torch.randint(0, len(weight), (pairs,), device=device)
        ends = torch.bincount(expert, minlength=len(weight)).cumsum(0).to(torch.int32)
        flop = 2.0 * pairs * weight.shape[1] * weight.shape[2]
        one = seconds_of(lambda: ours.grouped_mm(x, weight, ends), device)
        back = seconds_of(lambda: ours.grouped_mm(dy, weight.transpose(1, 2), ends), device)
        if trained and device == "cuda":
            back += seconds_of(lambda: F.grouped_mm(x.t(), dy, offs=ends), device)
        found["forward"] += one
        found["backward"] += back
        found["flop"] += flop * (3 if trained else 2)
    return found


def measure(case: Case, name: str, device: str) -> dict[str, Any]:
    block, config = make_block(case, device)
    text = config.get_text_config()
    count, used = block.num_experts, text.num_experts_per_tok
    block.config._experts_implementation = "grouped_mm" if name == "longfactory" else name
    if name == "grouped_mm":  # transformers' own
        del vars(block)["forward"]
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(case.tokens, text.hidden_size, device=device, generator=generator)
    scores = torch.rand(case.tokens, count, device=device, generator=generator)
    chosen = scores.topk(used).indices
    shares = torch.rand(case.tokens, used, device=device, generator=generator).bfloat16()
    x, shares = x.bfloat16().requires_grad_(), shares.requires_grad_()
    dy = torch.randn(case.tokens, text.hidden_size, device=device).bfloat16()

    def forward() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=case.masters):
            return block(x, chosen, shares)

    wanted = [x, shares, *(p for p in block.parameters() if p.requires_grad)]

    def both() -> None:
        torch.autograd.grad(forward(), wanted, dy)

    with torch.no_grad():
        once = seconds_of(forward, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    whole = seconds_of(both, device)
    row: dict[str, Any] = {"forward_ms": 1e3 * once, "both_ms": 1e3 * whole}
    row["recomputed_ms"] = row["forward_ms"] + row["both_ms"]
    if device == "cuda":
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    alone = products(block, case.tokens * used, case.trained, device)
    row["products_ms"] = 1e3 * (alone["forward"] + alone["backward"])
    row["share"] = row["products_ms"] / row["both_ms"]
    row["dispatch_ms"] = row["both_ms"] - row["products_ms"]
    row["tflops"] = alone["flop"] / whole / 1e12
    return row


def label(case: Case) -> str:
    kind = "fp32 masters, autocast" if case.masters else "bf16"
    return f"{case.shape}, {case.tokens:,} tokens, {kind}{'' if case.trained else ', frozen'}"


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| experts of | implementation | forward, ms | forward and backward, ms | recomputed, ms |"
        " products, ms | share | dispatch, ms | TFLOP/s | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        start = f"| {r['case']} | {r['implementation']} |"
        if "failed" in r:
            lines.append(f"{start} {r['failed']} | | | | | | | |")
            continue
        lines.append(
            f"{start} {r['forward_ms']:.1f} | {r['both_ms']:.1f} | {r['recomputed_ms']:.1f} |"
            f" {r['products_ms']:.1f} | {r['share']:.2f} | {r['dispatch_ms']:.1f} |"
            f" {r['tflops']:.0f} | {r.get('peak_gib', 0):.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--limit", type=float, default=150, help="seconds; no row begins later")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    cases = CASES
    if args.smoke:
        cases = [case._replace(tokens=64) for case in CASES[2:6]]
    end = time.time() + args.limit
    rows: list[dict[str, Any]] = []
    about = {
        "device": machine_name(),
        "torch": torch.__version__,
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    for case in cases:
        for name in implementations():
            if time.time() > end:
                continue
            if name == "batched_mm" and case.tokens > 1024:
                continue  # it copies a matrix for each token and expert
            row: dict[str, Any] = {"case": label(case), "implementation": name}
            try:
                row |= measure(case, name, device)
            except Exception as error:  # the other rows go on
                traceback.print_exc()
                lines = str(error).strip().splitlines() or [""]
                row["failed"] = f"{type(error).__name__}: {lines[0]}"[:200]
            if device == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "experts.json").write_text(json.dumps({**about, "rows": rows}, indent=1))
            facts = ", ".join(f"{k}: {v}" for k, v in about.items())
            text = f"# Routed experts of one layer\n\n{facts}\n\n{render(rows)}"
            (args.out / "experts.md").write_text(text)
    print(render(rows))
    return int(
        args.smoke and any("failed" in r for r in rows if r["implementation"] == "longfactory")
    )


if __name__ == "__main__":
    sys.exit(main())
