"""NaN and Inf in losses, gradients and weights, and spikes: what a run does about them.

Each case is a whole run of a tiny model on one or two processes (forked from one that has imported
everything), in which a number of one micro-batch on one rank is made NaN or Inf.

What is specified: `stop` ends every rank before the update with the step and the rows named, and no
checkpoint of a later step is there; `skip` ends with the weights of a run that leaves the same
update out, bit for bit; weights that hold NaN are refused by name; a spike is reported and changes
nothing.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_values import STAGES, base, write_inputs

LIMIT = 120.0
TOPOLOGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "sequence parallel": (2, {"sequence_parallel_size": 2}),
    "data parallel": (2, {"sharding": "ddp"}),
    "optimizer on the host": (1, {"optimizer_placement": "host", "offload_gradients": True}),
    "update in the backward": (
        1,
        {"optimizer_placement": "host", "optimizer_overlap": True, "max_grad_norm": 0},
    ),
}
WHAT = ("loss nan", "loss inf", "loss -inf", "gradient nan", "gradient inf")
STEPS = 4


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    grid = list(itertools.product(TOPOLOGIES, WHAT, ("stop", "skip")))
    draw.shuffle(grid)
    for number in range(count):
        if number % 10 == 9:
            kind = ("weights", "spike")[number // 10 % 2]
            yield {"kind": kind, "seed": seed, "number": number}
            continue
        topology, what, on_nan = grid[number % len(grid)]
        if topology == "update in the backward":
            on_nan = "stop"
        yield {
            "kind": "planted",
            "topology": topology,
            "what": what,
            "on_nan": on_nan,
            "stage": draw.choice(list(STAGES)),
            "finetuning": draw.choice(["full", "lora"]),
            "accumulation": draw.choice([1, 2]),
            "step": draw.randint(1, STEPS),
            "number": number,
        }


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    write_inputs(home)
    begun = time.monotonic()
    problem = {"planted": planted, "weights": weights, "spike": spike}[case["kind"]](case, home)
    return {
        "ok": problem is None,
        "seconds": time.monotonic() - begun,
        "limit": LIMIT,
        "end": problem or "as specified",
        "group": case["kind"] if case["kind"] != "planted" else f"{case['on_nan']}",
    }


def run(home: Path, ranks: int, given: dict[str, Any], plant: dict[str, Any]) -> list[Any]:
    from small_runs import POOLS

    words = [f"{k}={v}" for k, v in given.items() if v is not None]
    return POOLS[ranks].run(run_planted, words, str(home / "cache"), plant)


def keys(home: Path, name: str, **changes: Any) -> dict[str, Any]:
    given = base(home) | {
        "output_dir": str(home / name),
        "do_train": True,
        "max_steps": STEPS,
        "cutoff_len": 64,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "optim": "adamw_torch",
        "preprocessing_num_workers": 1,
        "lora_rank": 2,
        "overwrite_output_dir": True,
    }
    return given | changes


def run_planted(words: list[str], cache: str, plant: dict[str, Any]) -> dict[str, Any]:
    """A run in a rank. `plant`: what is made no number (`what`), in which step, on the last rank;
    "leave out": that step makes no update.
    """
    import torch.distributed as dist

    from longfactory.errors import UserError
    from longfactory.train.numbers import Numbers
    from longfactory.train.trainer import RowTrainer
    from small_runs import run_on_ranks

    told: list[str] = []

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Told()
    logging.getLogger("longfactory").addHandler(handler)
    kind, _, value = plant["what"].partition(" ")
    number = float(value) if value in ("nan", "inf", "-inf") else 1.0
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    original, may_update = RowTrainer.stage_loss, Numbers.may_update

    def stage_loss(self: Any, model: Any, row: Any) -> Any:
        loss, metrics = original(self, model, row)
        if model.training and self.state.global_step + 1 == plant["step"] and last:
            if kind == "loss":
                loss = loss * number if number != number else loss + number
            elif kind == "gradient":
                loss.register_hook(lambda g: g * number)
            elif kind == "spike":
                loss = loss * 1000
        return loss, metrics

    def may(self: Any, step: int, *args: Any) -> bool:
        return may_update(self, step, *args) and not (kind == "leave" and step == plant["step"])

    RowTrainer.stage_loss, Numbers.may_update = stage_loss, may  # type: ignore[method-assign]
    error = None
    try:
        run_on_ranks(words, cache)
    except UserError as e:
        error = str(e)
    finally:
        RowTrainer.stage_loss, Numbers.may_update = original, may_update  # type: ignore[method-assign]
        logging.getLogger("longfactory").removeHandler(handler)
    return {"error": error, "told": told}


def planted(case: dict[str, Any], home: Path) -> str | None:
    ranks, changes = TOPOLOGIES[case["topology"]]
    changes = {
        **changes,
        **STAGES[case["stage"]],
        "stage": case["stage"],
        "finetuning_type": case["finetuning"],
        "gradient_accumulation_steps": case["accumulation"],
        "on_nan": case["on_nan"],
    }
    found = run(home, ranks, keys(home, "out", **changes), case)
    errors = {r["error"] for r in found}
    out = home / "out"
    saved = sorted(int(p.name.split("-")[1]) for p in out.glob("checkpoint-*"))
    if case["on_nan"] == "stop":
        error = found[0]["error"]
        if len(errors) != 1 or error is None:
            return f"not every rank ended with the same words: {errors}"
        what = case["what"].split()[0]
        if not error.startswith(f"Step {case['step']}: the {what}") or "row" not in error:
            return f"the message does not name it: {error}"
        if saved != list(range(1, case["step"])):
            return f"checkpoints {saved} after an end at step {case['step']}"
        if any(
            (out / name).exists() for name in ("model.safetensors", "adapter_model.safetensors")
        ):
            return "weights were saved at the end"
        return None
    if errors != {None}:
        return f"the run ended: {errors}"
    run(
        home, ranks, keys(home, "reference", **changes), {"what": "leave out", "step": case["step"]}
    )
    files = ("model.safetensors", "adapter_model.safetensors")
    for name in (n for n in files if (out / n).exists()):
        if (out / name).read_bytes() != (home / "reference" / name).read_bytes():
            return f"{name} differs from that of a run that leaves the update out"
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    if not all(math.isfinite(h["loss"]) for h in log if "loss" in h):
        return "a loss in the log is no number"
    counted = [h["skipped_updates"] for h in log if "skipped_updates" in h]
    return None if counted and counted[-1] == 1 else f"skipped updates in the log: {counted}"


def weights(case: dict[str, Any], home: Path) -> str | None:
    """One number of one tensor of the checkpoint is NaN or Inf."""
    from safetensors.torch import load_file, save_file

    draw = random.Random(f"{case['seed']} {case['number']}")
    file = home / "model" / "model.safetensors"
    state = load_file(file)
    name = draw.choice(sorted(state))
    flat = state[name].view(-1)
    flat[draw.randrange(len(flat))] = draw.choice([math.nan, math.inf, -math.inf])
    save_file(state, file, metadata={"format": "pt"})
    error = run(home, 1, keys(home, "out", stage="sft"), {"what": "nothing", "step": 0})[0]["error"]
    if error is None or "NaN or Inf" not in error or name.removeprefix("model.") not in error:
        return f"{name} was not refused by its name: {error}"
    return None if not (home / "out").exists() else "an output folder was made"


def spike(case: dict[str, Any], home: Path) -> str | None:
    given = keys(home, "out", stage="sft", max_steps=30, save_strategy="no", learning_rate=1e-6)
    found = run(home, 1, given, {"what": "spike", "step": 28})[0]
    lines = [line for line in found["told"] if "a spike" in line]
    if found["error"] is not None:
        return f"the run ended: {found['error']}"
    named = [line for line in lines if line.startswith("Step 28: the loss") and "row" in line]
    return None if named else f"not reported: {lines}"
