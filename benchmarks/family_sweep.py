"""Every exact family of docs/models.md on GPUs in bf16, tiny but with the head dims of its default
configuration: how far our path is from float32, over how far the model's own attention is.

    python benchmarks/family_sweep.py --out benchmarks/results      # all GPUs: one, or two as SP 2
    python benchmarks/family_sweep.py --smoke llama qwen3_moe       # two CPU processes: does it run?
    python benchmarks/family_sweep.py --missing benchmarks/results/family_sweep.json
    python benchmarks/family_sweep.py --column benchmarks/results/family_sweep.json docs/models.md

For each of five seeds (weights and tokens), for a row of one document and for one of two: the model
in float32 with its eager attention, each document alone; in bf16 with the attention that it has by
default (sdpa, or eager where it has no other), each document alone; in bf16 through the engine with
sequence parallelism 1 and, on two GPUs, 2. Routers choose as in float32. Errors are root mean squares
of the difference from float32, of the logits, of all gradients, and of those of attention modules.
The number of a family is the largest of the medians over seeds of ours over its own; at most 1.2.
A model that is itself far from float32 in bf16 (`TELLS`) tells nothing, and counts as failed.

Families are handed to several groups of processes (`--groups`), each with one process on each GPU.
One that kills or hangs its group is reported and the group starts again behind it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(ROOT / "benchmarks"))

LIMIT = 1.2
TELLS = 0.3
"""So far from float32, of the value, the model itself may be in bf16: beyond, both are noise, and
their ratio is of nothing."""
SEEDS = 5
LAYOUTS = {"one document": (512,), "two documents": (201, 310)}
TOTAL = 512  # tokens of a row, padding included
WAIT = 120.0  # seconds that a family may take
Errors = dict[str, float]


def exact_families(page: Path) -> list[str]:
    """The first column of the table of exact families in docs/models.md."""
    text = page.read_text().partition("## Exact")[2].partition("\n## ")[0]
    names = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)
    return [n for n in names if n != "model type" and not n.startswith("-")]


# ---- one process of a group ----------------------------------------------------------------------


def worker(names: list[str], seeds: int) -> None:
    import torch
    import torch.distributed as dist
    import transformers

    from longfactory import sp

    transformers.logging.set_verbosity_error()
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        device_id=device if cuda else None,
        timeout=datetime.timedelta(seconds=WAIT),
    )
    contexts = [sp.SequenceParallel.create(size) for size in ((1, 2) if world > 1 else (1,))]
    for name in names:
        if rank == 0:
            print("BEGIN " + json.dumps(name), flush=True)
        start = time.perf_counter()
        try:
            found = check(name, contexts, device, seeds)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        # Where one rank failed and another did not, what they say differs.
        failed = torch.tensor(float("failed" in found), device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed.item() and "failed" not in found:
            found = {"failed": "on another rank"}
        if rank == 0:
            found |= {"family": name, "seconds": round(time.perf_counter() - start, 2)}
            print("RESULT " + json.dumps(found), flush=True)
    os._exit(0)


def check(name: str, contexts: list[Any], device: Any, seeds: int) -> dict[str, Any]:
    """Ratios of one family by degree of sequence parallelism, layout and what is compared."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from longfactory.memory.layer_kinds import kinds_of
    from longfactory_dev.families import VARIANTS
    from longfactory_dev.tiny_models import tiny_config

    family, reference, fields = VARIANTS.get(name, (name, "documents", {}))
    if family not in CONFIG_MAPPING:
        return {"skipped": "not in this transformers"}
    fields, note = with_real_heads(family, fields, device)
    ratios: dict[str, list[float]] = {}
    raw: dict[str, list[float]] = {}
    apart_of: dict[str, list[float]] = {}
    dims: set[str] = set()
    for seed in range(seeds):
        wide, narrow = build(family, seed, device, fields)
        dims |= {
            f"{k.head_dim}" if k.head_dim == k.value_dim else f"{k.head_dim}/{k.value_dim}"
            for k in kinds_of(wide, tiny_config(family, **fields))
            if k.heads
        }
        for layout, lengths in LAYOUTS.items():
            alone = reference == "row"
            # copies: rotary frequencies of dynamic NTK stay those of the longest row so far
            exact, choices = by_itself(copy.deepcopy(wide), lengths, seed, alone, None)
            sizes = distances(zeros_like(exact), exact)
            apart = copy.deepcopy(narrow)
            own = distances(by_itself(apart, lengths, seed, alone, choices)[0], exact)
            for what, error in own.items():
                if size := sizes[what]:
                    apart_of.setdefault(f"{layout}, {what}", []).append(error / size)
            for ctx in contexts:
                ours = distances(through_engine(narrow, ctx, lengths, seed, choices), exact)
                for what, error in ours.items():
                    key = f"SP {ctx.size}, {layout}, {what}"
                    ratios.setdefault(key, []).append(error / own[what] if own[what] else 1.0)
                    raw.setdefault(key, []).append(error)
    medians = {key: statistics.median(found) for key, found in ratios.items()}
    worst = max(medians, key=lambda key: (math.isnan(medians[key]), medians[key]))
    relative = max(statistics.median(found) for found in apart_of.values())
    if not relative <= TELLS:
        return {"failed": f"in bf16 the model itself is {relative:.0%} from float32: tells nothing"}
    return {
        "ratio": medians[worst],
        "worst": worst,
        "medians": medians,
        "errors": {key: statistics.median(found) for key, found in raw.items()},
        "own": relative,
        "dims": sorted(dims),
        "sp": [ctx.size for ctx in contexts],
        **({"note": note} if note else {}),
    }


def with_real_heads(family: str, tiny: dict[str, Any], device: Any) -> tuple[dict[str, Any], str]:
    """Fields that give a tiny model the heads of the family's default, tried in a forward pass; or
    the tiny ones, and why. Some families' output maps are as wide as the hidden states both ways.
    """
    from longfactory_dev.tiny_models import real_heads

    def why(error: Exception) -> str:
        return f"tiny head dims: {type(error).__name__}: {' '.join(str(error).split())[:120]}"

    try:
        fields = {**real_heads(family), **longer_factors(family, tiny)}
    except Exception as error:
        return tiny, why(error)
    choices = [fields]
    if "head_dim" in fields:
        choices.append({**fields, "hidden_size": 4 * fields["head_dim"]})
    note = ""
    for choice in choices:
        try:
            model, _ = build(family, 0, device, choice)
            ids = tokens_of((24,), 0, model)[0].to(device)
            model(input_ids=ids[None], use_cache=False)
            return choice, ""
        except Exception as error:
            note = note or why(error)
    return tiny, note


def longer_factors(family: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a tiny variant, with longrope's factors for the head dim of the family's default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    rope = fields.get("rope_parameters", {})
    if "short_factor" not in rope:
        return fields
    default = CONFIG_MAPPING[family]().get_text_config()
    dim = getattr(default, "head_dim", None) or default.hidden_size // default.num_attention_heads
    named = {
        key: [factor for factor in rope[key] for _ in range(dim // 2 // len(rope[key]))]
        for key in ("short_factor", "long_factor")
    }
    return {**fields, "rope_parameters": {**rope, **named}}


def build(family: str, seed: int, device: Any, fields: dict[str, Any]) -> tuple[Any, Any]:
    """The model in float32 with numbers that bf16 has, and the same in bf16 with its own attention,
    made as a checkpoint in bf16 is.
    """
    import torch

    from longfactory.sp.text_model import model_class
    from longfactory_dev.tiny_models import tiny_config, tiny_model

    wide = tiny_model(family, torch.float32, seed, fan_in=1 << 30, **fields)
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.bfloat16())
        for module in wide.modules():
            tame_scores(module)
    kind = model_class(tiny_config(family, **fields))
    narrow = None
    for attention in ("sdpa", "eager"):
        try:
            narrow = kind.from_config(dtype=torch.bfloat16, attn_implementation=attention)
            break
        except (ValueError, ImportError):
            continue
    assert narrow is not None, "neither sdpa nor eager"
    narrow.load_state_dict(wide.state_dict(), strict=False)
    return wide.to(device).eval(), narrow.to(device).eval()


def tame_scores(attention: Any) -> None:
    """Where queries and keys are normalised and their product is not divided by the root of the head
    dim (Gemma 4), trained weights of the norms do that; ones would let a query see one key.
    """
    norm = getattr(attention, "q_norm", None)
    weight = getattr(norm, "weight", None)
    if getattr(attention, "scaling", None) == 1.0 and weight is not None:
        weight.copy_((weight / weight.numel() ** 0.5).bfloat16())


def tokens_of(lengths: tuple[int, ...], seed: int, model: Any) -> list[Any]:
    import torch

    vocabulary = min(model.get_input_embeddings().num_embeddings, 200)
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]


def loss_of(logits: Any, labels: Any) -> Any:
    """A sum over labels, in float32."""
    import torch

    kept = labels >= 0
    return torch.nn.functional.cross_entropy(logits.float()[kept], labels[kept], reduction="sum")


def shifted(ids: Any) -> Any:
    import torch

    return torch.cat([ids[1:], ids.new_full((1,), -100)])


Outcome = tuple[Any, dict[str, Any]]
"""Logits [tokens, V] and gradients by name, in float32."""


def taken(model: Any, logits: Any) -> Outcome:
    grads = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach().float(), grads


def by_itself(
    model: Any, lengths: tuple[int, ...], seed: int, whole: bool, choices: Any
) -> tuple[Outcome, Any]:
    """The model without the engine, each document alone (or the row, where `whole`). With
    `choices`, its routers choose so; else what they choose is returned.
    """
    import torch

    from longfactory.sp import routers

    device = next(model.parameters()).device
    documents = [ids.to(device) for ids in tokens_of(lengths, seed, model)]
    labels = torch.cat([shifted(ids) for ids in documents])
    if whole:
        places = torch.cat([torch.arange(len(ids), device=device) for ids in documents])
        parts = [(torch.cat(documents), places)]
    else:
        parts = [(ids, torch.arange(len(ids), device=device)) for ids in documents]
    logits, recorded, start = [], [], 0
    for ids, places in parts:
        keys: dict[str, Any] = {"position_ids": places[None]} if whole else {}
        if choices is None:
            with routers.record(model) as chosen:
                logits.append(model(input_ids=ids[None], use_cache=False, **keys).logits[0])
            recorded.append(chosen)
        else:
            with routers.replay(model, choices.take(slice(start, start + len(ids)))):
                logits.append(model(input_ids=ids[None], use_cache=False, **keys).logits[0])
        start += len(ids)
    every = torch.cat(logits)
    loss_of(every, labels).backward()
    return taken(model, every), routers.join(recorded) if choices is None else choices


def through_engine(
    model: Any, ctx: Any, lengths: tuple[int, ...], seed: int, choices: Any
) -> Outcome:
    """The same from one row, perhaps padded, sharded over the ranks of the context."""
    import itertools

    import torch
    import torch.distributed as dist

    from longfactory import sp
    from longfactory.model import experts
    from longfactory.sp import hf, routers

    model = copy.deepcopy(model)
    experts.install_grouped(model)
    hf.prepare(model, ctx)
    device = next(model.parameters()).device
    documents = tokens_of(lengths, seed, model)
    labels = [shifted(ids) for ids in documents]
    used = sum(lengths)
    if used < TOTAL:
        documents.append(documents[0].new_zeros(TOTAL - used))
        labels.append(documents[0].new_full((TOTAL - used,), -100))
    ends = [0, *itertools.accumulate(len(ids) for ids in documents)]
    plan = sp.plan(TOTAL, [sp.Segment(a, b) for a, b in itertools.pairwise(ends)], ctx)
    row = {
        "input_ids": torch.cat(documents).to(device),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents]).to(device),
    }
    mine = sp.shard(torch.cat(labels).to(device), plan)
    parts = [choices] if used == TOTAL else [choices, TOTAL - used]
    with routers.replay(model, routers.join(parts).take(plan.index)):
        logits = model(**hf.inputs(row, plan)).logits[0]
        # A rank without a label stays attached to the graph.
        (loss_of(logits, mine) + 0.0 * logits.float().sum()).backward()
    local, grads = taken(model, logits)
    whole = local.new_zeros(TOTAL, local.shape[1])
    whole[plan.index.to(device)] = local
    if ctx.size > 1:
        dist.all_reduce(whole, group=ctx.group)
        for name in sorted(grads):
            dist.all_reduce(grads[name], group=ctx.group)
    hf.release(model)
    return whole[:used], grads


def zeros_like(outcome: Outcome) -> Outcome:
    logits, grads = outcome
    return logits.new_zeros(()), {n: g.new_zeros(()) for n, g in grads.items()}


def distances(found: Outcome, exact: Outcome) -> Errors:
    """Root mean squares of the difference."""
    logits, grads = found
    expected, reference = exact
    square = {n: float((grads[n] - g).square().sum()) for n, g in reference.items() if n in grads}
    missing = reference.keys() - grads.keys()
    if missing or grads.keys() - reference.keys():
        raise ValueError(f"gradients of other parameters: {sorted(missing)[:3]}")
    count = {n: g.numel() for n, g in reference.items()}
    attention = [n for n in square if re.search("attn|attention|mixer", n)]

    def mean(names: Any) -> float:
        total = sum(count[n] for n in names)
        return (sum(square[n] for n in names) / total) ** 0.5 if total else 0.0

    return {
        "logits": float((logits - expected).square().mean().sqrt()),
        "gradients": mean(list(square)),
        "attention's gradients": mean(attention),
    }


# ---- groups of processes -------------------------------------------------------------------------


def run_group(
    names: list[str], processes: int, seeds: int, end: float, results: list[dict[str, Any]]
) -> None:
    """Checks the families one after the other in a group of processes, and starts another behind a
    family that ended it.
    """
    left = list(names)
    while left and time.time() < end:
        begun = None
        for kind, value in lines_of(left, processes, seeds, end):
            if kind == "BEGIN":
                begun = value
            else:
                results.append(value)
                print(short(value), flush=True)
                left.remove(value["family"])
                begun = None
        if left and time.time() < end:
            name = begun or left[0]
            results.append({"family": name, "failed": "it ended or held up its processes"})
            print(short(results[-1]), flush=True)
            left.remove(name)


def lines_of(names: list[str], processes: int, seeds: int, end: float) -> Iterator[tuple[str, Any]]:
    from _table import MARK, end_marked

    mark = f"{os.getpid()}-{time.monotonic_ns()}-{threading.get_ident()}"
    command = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), __file__]
    command += ["--worker", json.dumps(names), "--seeds", str(seeds)]
    # small models of many shapes: compiling would take longer than they do
    env = {**os.environ, MARK: mark, "OMP_NUM_THREADS": "1", "LONGFACTORY_COMPILE": "0"}
    env.setdefault("NCCL_NVLS_ENABLE", "0")
    path = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )
    # ended when a family takes too long, or the time is up
    last = [time.time()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if time.time() > min(end, last[0] + WAIT):
                end_marked(mark, process.pid)
                return

    threading.Thread(target=watch, daemon=True).start()
    assert process.stdout is not None
    try:
        for line in process.stdout:
            kind, _, rest = line.partition(" ")
            if kind in ("BEGIN", "RESULT"):
                last[0] = time.time()
                yield kind, json.loads(rest)
    finally:
        done.set()
        end_marked(mark, process.pid)


def short(r: dict[str, Any]) -> str:
    if "ratio" not in r:
        return f"{r['family']:28} {r.get('failed') or r.get('skipped')}"
    mark = "" if r["ratio"] <= LIMIT else "  OVER"
    return (
        f"{r['family']:28} {r['ratio']:.2f}  ({r['worst']}; head dims {', '.join(r['dims'])};"
        f" {r['seconds']} s) {r.get('note', '')}{mark}"
    )


def column(results: Path, page: Path) -> None:
    """Writes the numbers into the table of exact families as its last column."""
    from longfactory_dev.families import ABOUT_GPUS, ON_GPUS, on_gpus

    by = on_gpus(results)
    before, mark, rest = page.read_text().partition("## Exact")
    table, end, after = rest.partition("\n## ")
    out = []
    for line in table.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split(" | ")][:4]
        if line.startswith("|---"):
            line = "|---|---|---|---|---|"
        elif line.startswith("| "):
            new = ON_GPUS if cells[0] == "model type" else by.get(cells[0], "")
            line = f"| {' | '.join([*cells, new])} |"
        out.append(line)
    if ABOUT_GPUS not in before:
        told = "on a few tokens.\n"
        assert told in before, page
        before = before.replace(told, told + ABOUT_GPUS, 1)
    page.write_text(before + mark + "\n".join(out) + ("\n" if end else "") + end + after)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="model types; all exact ones by default")
    parser.add_argument("--gpus", type=int, default=None, help="1 or 2; by default those there are")
    parser.add_argument("--groups", type=int, default=4, help="of processes, side by side")
    parser.add_argument("--share", default="1/1", help="k/n: the k-th of n shares of the families")
    parser.add_argument("--missing", type=Path, help="measure what this file has no number of")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--limit", type=float, default=230, help="seconds for the whole command")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--column", nargs=2, type=Path, metavar=("RESULTS", "PAGE"))
    args = parser.parse_args()
    if args.column:
        column(*args.column)
        return 0
    if args.worker:
        worker(json.loads(args.worker), args.seeds)
    import torch
    import transformers

    from _table import command_line, machine_name

    every = exact_families(ROOT / "docs" / "models.md")
    names = args.families or every
    earlier = json.loads(args.missing.read_text())["families"] if args.missing else []
    known = {r["family"] for r in earlier if "ratio" in r}
    names = [n for n in names if n not in known]
    k, n = map(int, args.share.split("/"))
    names = names[k - 1 :: n]
    processes = 2 if args.smoke else min(args.gpus or 2, torch.cuda.device_count())
    groups = 1 if args.smoke else args.groups
    results: list[dict[str, Any]] = []
    end = time.time() + args.limit
    about = {
        "device": f"{processes} x {machine_name()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / ("family_sweep.json" if n == 1 else f"family_sweep_{k}_of_{n}.json")

    def write() -> None:
        """What is known so far: the command may be ended from outside."""
        found = {r["family"]: r for r in [*earlier, *results]}
        ordered = sorted(found.values(), key=lambda r: place.get(r["family"], len(place)))
        path.write_text(json.dumps({**about, "families": ordered}, indent=1) + "\n")

    place = {name: i for i, name in enumerate(every)}
    threads = [
        threading.Thread(
            target=run_group, args=(names[i::groups], processes, args.seeds, end, results)
        )
        for i in range(groups)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(5.0)
            write()
    from longfactory_dev.families import NOT_REACHED

    seen = {r["family"] for r in results}
    results += [{"family": f, "failed": NOT_REACHED} for f in names if f not in seen]
    write()
    over = [r["family"] for r in results if r.get("ratio", 0) > LIMIT]
    failed = [r["family"] for r in results if "failed" in r]
    ran = sum("ratio" in r for r in results)
    print(
        f"{ran} families measured, {len(over)} over {LIMIT}: {', '.join(over) or 'none'};"
        f" {len(failed)} failed: {', '.join(failed) or 'none'}"
    )
    return int(bool(over or failed))


if __name__ == "__main__":
    sys.exit(main())
