"""Which families' decoder layers have a hand-written function: tiny models of them, one forward and
backward each.

    python -m longfactory_dev.layers [model_type ...] [--write docs/layers.md]

A layer is hand-written where `memory.layer.recognise` knows it and the comparison with its own code
(`memory.layer.proof`) finds nothing. Speeds are those of `benchmarks/results/layers.json`.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers

from longfactory import sp
from longfactory.memory.apply import apply_memory
from longfactory.memory.decoder_layer import DecoderLayer
from longfactory.memory.layer.recognise import family_of, recognise
from longfactory.memory.settings import MemorySettings
from longfactory.sp import hf
from longfactory.sp.text_model import decoder_layers
from longfactory_dev.tiny_models import tiny_model

LENGTH = 48
SETTINGS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"use_qk_norm": True},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
"""Fields that a family's tiny configuration has here: what its default leaves out."""


class Found(NamedTuple):
    """What was found of a family.

    Attributes:
        written: layers that ran by the hand-written function.
        layers: of the tiny model.
        why: why the others did not.
        code: the entry of `families.FAMILIES`, or None.
    """

    family: str
    written: int
    layers: int
    why: str
    code: str | None


def look(family: str) -> Found:
    """Builds a tiny model of a family and trains it for one step. Never raises for what it does."""
    try:
        model = tiny_model(family, torch.float32, **SETTINGS.get(family, {})).train()
        context = sp.SequenceParallel.create(1)
        hf.prepare(model, context)
        layers = list(decoder_layers(model)[1])
        reasons = {r for layer in layers if isinstance(r := recognise(layer), str)}
        code = next((f for layer in layers if (f := family_of(layer))), None)
        apply_memory(model, MemorySettings(keep_attention=1.0))
        installed = [layer.forward for layer in layers]
        ids = torch.arange(LENGTH) % 50 + 3
        positions = torch.arange(LENGTH)
        plan = sp.plan(LENGTH, None, context)
        given = hf.inputs({"input_ids": ids, "position_ids": positions}, plan)
        with _warnings() as said:
            model(**given).logits.sum().backward()
    except Exception as error:
        return Found(family, 0, 0, " ".join(str(error).split())[:200], None)
    written = [f for f in installed if isinstance(f, DecoderLayer)]
    proved = {k for f in written for k, good in f.chain.proved.items() if good}
    ran = [f for f in written if any(type(f.layer) is k[0] and f.shape == k[1] for k in proved)]
    return Found(family, len(ran), len(layers), "; ".join(sorted(reasons | set(said))), code)


class _Collect(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class _warnings:
    """What the hand-written layer logs inside the block."""

    def __enter__(self) -> list[str]:
        self.handler = _Collect()
        self.log = logging.getLogger("longfactory.memory.decoder_layer")
        self.log.addHandler(self.handler)
        return self.handler.said

    def __exit__(self, *error: Any) -> None:
        self.log.removeHandler(self.handler)


def exact_families(models: str) -> Iterator[str]:
    """The model types that docs/models.md says are exact."""
    part = models.partition("\n## Exact\n")[2].partition("\n## ")[0]
    for kind in re.findall(r"^\| ([a-z0-9_]+) \|", part, re.MULTILINE):
        if kind in transformers.CONFIG_MAPPING:
            yield kind


def table(found: Sequence[Found], speeds: dict[str, list[dict[str, Any]]]) -> str:
    """docs/layers.md."""
    yes = [f for f in found if f.written]
    rows = [
        f"| {f.family} | {'all' if f.written == f.layers else f'{f.written} of {f.layers}'} |"
        f" {f.why if f.written < f.layers else ''} | {_speed(speeds.get(f.family, []))} |"
        for f in yes
    ]
    others: dict[str, list[str]] = collections.defaultdict(list)
    for f in found:
        if not f.written:
            reasons = {re.sub(r"^\w+: ", "", reason) for reason in f.why.split("; ")}
            others["; ".join(sorted(reasons))].append(f.family)
    why = [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(others.items())]
    head = f"""# Hand-written layers

Written by `python -m longfactory_dev.layers --write docs/layers.md` with transformers
{transformers.__version__}: of the families that [models.md](models.md) calls exact, those whose
decoder layer runs as one hand-written function ([memory.md](memory.md#the-techniques)), with full
weights, LoRA, rsLoRA or DoRA. A tiny model of each is built and trained for one step; the second
column says how many of its layers were hand-written. Layers with a linear recurrence run
transformers' code.

Speed: speedup over transformers' code, forward and backward of one layer of the real size
(`benchmarks/layers.py`, 32,768 tokens, bf16).

| model type | layers | other layers | speed |
|---|---|---|---|
"""
    return (
        head
        + "\n".join(rows)
        + "\n\n## Layers that run transformers' code\n\n| model type | why |\n|---|---|\n"
        + "\n".join(why)
        + "\n"
    )


def _speed(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{row['name']}: {row['speed']:.2f}" for row in rows if "speed" in row)


def speeds(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of benchmarks/layers.py by model type."""
    by: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    if path.exists():
        for row in json.loads(path.read_text()):
            by[row.get("kind", "")].append(row)
    return by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path("docs/models.md"))
    parser.add_argument(
        "--speeds", type=pathlib.Path, default=pathlib.Path("benchmarks/results/layers.json")
    )
    parser.add_argument("--write", type=pathlib.Path)
    a = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = []
    for family in a.families or list(exact_families(a.models.read_text())):
        found.append(look(family))
        print(*found[-1], sep="\t", flush=True)
    if a.write:
        a.write.write_text(table(found, speeds(a.speeds)))


if __name__ == "__main__":
    main()
