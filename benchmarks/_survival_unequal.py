"""Two machines whose processes differ, in a key, the data, the code or a version: refused before
anything is loaded, by rank and key, on both.

Both launchers run on this machine; each has the environment, the files and the code of its own.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _survival_processes import ROOT, STARTED, all_gone, descendants, keys, make_home, result, start
from _survival_stopped import free_port

OTHER_KEYS: dict[str, Any] = {
    "learning_rate": "2e-3",
    "seed": 7,
    "cutoff_len": 96,
    "max_steps": 8,
    "gradient_accumulation_steps": 4,
    "per_device_train_batch_size": 2,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "packing": True,
    "template": "llama3",
    "save_steps": 2,
    "max_grad_norm": 0.5,
    "step_timeout": 100,
    "warmup_steps": 2,
    "train_on_prompt": True,
    "sequence_parallel_mode": "ulysses",
}
"""Keys that the second machine has another value of."""
TOKEN = "hf_surVIVALsecretsecretsecret"
LIMIT = 2 * STARTED


def cases(seed: int, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    names = draw.sample(sorted(OTHER_KEYS), len(OTHER_KEYS))
    kinds = ["key", "data", "key", "code", "key", "version", "key", "loss", "key", "model"]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        name = names[number % len(names)] if kind == "key" else kind
        yield {"number": number, "kind": kind, "name": name, "second": draw.randrange(2)}


def run_case(case: dict[str, Any], home: Path) -> dict[str, Any]:
    """`second` is the machine that differs: its rank, and its node."""
    begun = time.monotonic()
    homes = [make_home(home / "a"), home / "b"]
    shutil.copytree(homes[0], homes[1])
    given = [keys(h, h / "out", nproc_per_node=1, hub_token=TOKEN) for h in homes]
    variables: list[dict[str, str]] = [{}, {}]
    odd, kind = case["second"], case["kind"]
    told = _make_odd(case, homes[odd], given[odd], variables[odd])
    port = str(free_port())
    commands = [
        start(
            homes[node],
            given[node],
            name=f"node-{node}",
            NNODES="2",
            NODE_RANK=str(node),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **variables[node],
        )
        for node in (0, 1)
    ]
    statuses = [c.wait(LIMIT) for c in commands]
    took = time.monotonic() - begun
    pids = [p for c in commands for p in (c.process.pid, *descendants(c.process.pid))]
    text = "\n".join(c.text() for c in commands)
    wrong = [] if all_gone(pids) else ["processes are left"]
    if statuses != [2, 2]:
        wrong.append(f"exit statuses {statuses}")
    if not any(told in line and "on rank 1" in line for line in text.splitlines()):
        wrong.append(f"not told: {told!r} on rank 1")
    if "Traceback" in text:
        wrong.append("a stack trace")
    if TOKEN in text:
        wrong.append("the token is told")
    if any((h / "out").exists() for h in homes):
        wrong.append("an output folder is left")
    words = "; ".join(wrong) or f"both refused in {took:.0f} s: {told}"
    return result(not wrong, begun, LIMIT, words, commands[0], kind=kind)


def _make_odd(
    case: dict[str, Any], home: Path, given: dict[str, Any], variables: dict[str, str]
) -> str:
    """Makes one machine another one; returns what must be told."""
    kind, name = case["kind"], case["name"]
    if kind == "key":
        given[name] = OTHER_KEYS[name]
        return f"- {name}: "
    if kind == "data":
        rows = json.loads((home / "talks.json").read_text())
        rows[3]["output"] = "another answer"
        (home / "talks.json").write_text(json.dumps(rows))
        return "- data set talks, talks.json: "
    if kind == "loss":
        hooks = home / "hooks.py"
        hooks.write_text(hooks.read_text() + "\n# another version of it\n")
        return "- loss_path, the file: "
    if kind == "model":
        config = home / "model" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-5}))
        return "- model_name_or_path, config.json: "
    folder = home / "other"
    if kind == "code":
        shutil.copytree(ROOT / "src", folder)
        path = folder / "longfactory" / "stages" / "losses.py"
        path.write_text(path.read_text() + "\n# an edit on one machine\n")
        variables["PYTHONPATH"] = str(folder)
        return "- code of longfactory: "
    about = folder / "peft-9.9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9.9\n")
    variables["PYTHONPATH"] = f"{folder}:{ROOT / 'src'}"
    return "- version of peft: "
