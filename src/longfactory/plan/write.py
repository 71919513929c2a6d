"""`longfactory plan --write`: the run's file with the keys that were chosen, in their places."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from longfactory.config import RunConfig
from longfactory.errors import UserError
from longfactory.train.auto import Way


def chosen_keys(cfg: RunConfig, found: Way) -> dict[str, Any]:
    """The keys that make a run's plan again: those of sequence parallelism, and of memory.

    What no key says (how many last layers' tensors stay on the GPU, groups of heads, fp32 or split
    masters) is found again by the same search.
    """
    settings, job = found.memory.plan.settings, found.memory.plan.job
    keys: dict[str, Any] = {"sequence_parallel_size": found.size}
    if found.size > 1 or found.mode != cfg.parallel.sequence_parallel_mode:
        keys["sequence_parallel_mode"] = found.mode
    if found.mode == "usp" and job.ulysses_degree is not None:
        keys["sequence_parallel_ulysses_degree"] = job.ulysses_degree
    if "cutoff_len" in cfg.decided:
        keys["cutoff_len"] = cfg.cutoff_len
    keys["memory"] = cfg.memory.memory
    if settings.checkpoint == "none":
        keys["disable_gradient_checkpointing"] = True
    else:
        keys |= {
            "keep_attention": settings.keep_attention,
            "offload_activations": settings.offload != "none",
            "mlp_chunk": settings.mlp_chunk or 0,
            "segment_layers": settings.segment_layers,
        }
        if settings.keep_mlp:
            keys["keep_mlp"] = settings.keep_mlp
    if found.memory.plan.job.weight_shards > 1 and not found.memory.deepspeed:
        keys["reshard_after_forward"] = not settings.keep_weights
    # "host" asks for split masters wherever these can be had
    if not found.memory.deepspeed and (settings.optimizer == "gpu" or found.memory.split):
        keys["optimizer_placement"] = settings.optimizer
    return keys


def write(source: Path, target: Path, keys: dict[str, Any], command: str) -> None:
    """Writes a run's file anew with some keys: in their lines where they have one, comments and
    order as they are, else at the end.

    Args:
        source, target: YAML, or JSON, both alike.
        command: for the comment above the added lines.
    Raises:
        UserError: it cannot be read or written.
    """
    if (source.suffix.lower() == ".json") != (target.suffix.lower() == ".json"):
        raise UserError(f"--write: {source} and {target} are of two formats. Keep one ending.")
    try:
        text = source.read_text(encoding="utf-8")
        if source.suffix.lower() == ".json":
            target.write_text(json.dumps({**json.loads(text), **keys}, indent=2) + "\n")
            return
        target.write_text(changed(text, keys, command), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write: {error.filename}: {error.strerror or error}.") from error


def changed(text: str, keys: dict[str, Any], command: str) -> str:
    """The YAML text with other values of some keys."""
    lines, rest = text.splitlines(), dict(keys)
    out = []
    skipping = False
    for line in lines:
        if skipping and re.match(r"(\s+|-\s)\S", line):
            continue  # a list or text below a key that was replaced
        skipping = False
        found = re.match(r"""(['"]?)([A-Za-z_]\w*)\1\s*:(\s.*|)$""", line)
        if found is None or found[2] not in keys:
            out.append(line)
            continue
        if found[2] in rest:
            remark = re.search(r"\s+#.*$", found[3])
            out.append(f"{found[2]}: {_value(rest.pop(found[2]))}{remark[0] if remark else ''}")
        skipping = not re.sub(r"\s+#.*$", "", found[3]).strip()
    if rest:
        out += ["", f"# chosen by: {command}"]
        out += [f"{name}: {_value(value)}" for name, value in rest.items()]
    return "\n".join(out) + "\n"


def _value(value: Any) -> str:
    """One value as YAML writes it in a line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("\n...")
