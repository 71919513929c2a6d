"""What starting the kernels of a layer takes: steps of narrow models with rows that are too short to
keep a GPU busy, at several depths. The seconds that a layer adds are the least that it can take,
and what `longfactory plan` would have to count for it: today it counts `LAYER_START`, of FSDP2,
alone, and says so of rows that are too short.

    python benchmarks/short_rows.py [--layers 4 12 28] [--tokens 256] [--steps 12] [--out FOLDER]

One GPU; about 45 s. Without a GPU it runs on the CPU, to try it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

from _log import step_seconds  # noqa: E402
from longfactory.config import load_config  # noqa: E402
from longfactory.train.run import run  # noqa: E402
from make_model import make_model  # noqa: E402

FIRST = 4
"""Steps that are not counted: kernels are compiled and measured in them."""


def one(layers: int, tokens: int, steps: int, home: Path) -> float:
    """Median seconds of a step of a model of so many layers."""
    folder = make_model("tiny", home / f"layers-{layers}")
    shape = json.loads((folder / "config.json").read_text())
    shape |= {"num_hidden_layers": layers, "hidden_size": 512, "intermediate_size": 1024}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    (folder / "config.json").write_text(json.dumps(shape))
    keys: dict[str, Any] = {
        "model_name_or_path": folder,
        "train_from_scratch": True,
        "stage": "sft",
        "finetuning_type": "full",
        "dataset_dir": HERE.parent / "data",
        "dataset": "manual_sft",
        "template": "chatml",
        "cutoff_len": tokens,
        "packing": True,
        "output_dir": home / f"out-{layers}",
        "overwrite_output_dir": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "max_steps": FIRST + steps,
        "nproc_per_node": 1,
        "report_to": "none",
        "bf16": torch.cuda.is_available(),
    }
    if not torch.cuda.is_available():
        keys["use_cpu"] = True
    run(load_config([f"{name}={value}" for name, value in keys.items()]))
    lines = (home / f"out-{layers}" / "trainer_log.jsonl").read_text().splitlines()
    return statistics.median(step_seconds([json.loads(line) for line in lines])[FIRST - 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 28])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="folder of short_rows.json")
    args = parser.parse_args()
    logging.getLogger("longfactory").setLevel(logging.WARNING)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found: dict[int, float] = {}
    print(f"{name}, torch {torch.__version__}, rows of {args.tokens} tokens", flush=True)
    with tempfile.TemporaryDirectory(prefix="short-rows-") as home:
        for layers in args.layers:
            try:
                found[layers] = one(layers, args.tokens, args.steps, Path(home))
                print(f"{layers:>4} layers  {1000 * found[layers]:8.2f} ms a step", flush=True)
            except Exception as error:
                print(f"{layers:>4} layers  failed: {error!r}"[:300], flush=True)
    if len(found) > 1:
        each, rest = np.polyfit(list(found), list(found.values()), 1)
        print(f"a layer {1000 * each:.2f} ms, beside {1000 * rest:.2f} ms of a step", flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        facts = {"device": name, "torch": torch.__version__, "tokens": args.tokens}
        (args.out / "short_rows.json").write_text(json.dumps(facts | {"seconds": found}, indent=1))


if __name__ == "__main__":
    main()
