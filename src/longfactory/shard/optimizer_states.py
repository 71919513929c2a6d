"""States of `SplitAdamW` in a checkpoint: every rank writes its own shards as safetensors, and any
number of ranks can read them.

A checkpoint folder holds

    optimizer_rank_00003_of_00008.safetensors   "<parameter>/exp_avg", ".../exp_avg_sq", ".../low":
                                                this rank's rows of each state
    optimizer_states.json                       ranks, parameter groups with their settings, and of
                                                each parameter its shape and steps

FSDP2 shards a parameter along its first dimension as `torch.chunk` does, so that rank r of n holds
the rows [r c, (r + 1) c), c = ceil(rows / n), whatever the sequence-parallel size. A rank reads the
rows that it needs from the files that have them: its own where the world has the same size. Whole
parameters (one process, DDP) are the case n = 1, written by one rank.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longfactory.errors import UserError
from longfactory.memory.optimizer import BLOCK, SplitAdamW

INDEX = "optimizer_states.json"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int16: "I16"}


def states_file(rank: int, world: int) -> str:
    """The name of the file that `rank` of `world` writes."""
    return f"optimizer_rank_{rank:05d}_of_{world:05d}.safetensors"


def holds_states(folder: str | Path) -> bool:
    """Whether a checkpoint folder holds such states."""
    return (Path(folder) / INDEX).is_file()


def save_states(
    optimizer: SplitAdamW,
    parameters: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    *,
    writes_whole: bool = True,
) -> None:
    """Every process writes its own; none waits for another. A checkpoint is whole once all have
    returned.

    Args:
        parameters: the model's, by name; those of the optimizer are among them.
        writes_whole: this process writes the index and what every rank has alike: one process of
            each file system.
    """
    names = _names(optimizer, parameters)
    sharded = any(_is_sharded(p) for p in names)
    rank, world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    os.makedirs(folder, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for p, name in names.items():
        state = optimizer.state.get(p)
        if not state:
            continue  # it never had a gradient
        kinds = [key for key in state if key != "step"]
        index[name] = {
            "shape": list(p.shape),
            "sharded": _is_sharded(p),
            "step": int(state["step"]),
            "states": kinds,
        }
        if _is_sharded(p) or writes_whole:
            tensors |= {f"{name}/{key}": state[key] for key in kinds}
    if sharded or writes_whole:
        write_safetensors(Path(folder) / states_file(rank, world), tensors)
    if writes_whole:
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        groups = [
            {**s, "parameters": [names[p] for p in g["params"]]}
            for s, g in zip(settings, optimizer.param_groups, strict=True)
        ]
        path = Path(folder) / INDEX
        path.with_name(INDEX + ".part").write_text(
            json.dumps({"ranks": world, "groups": groups, "parameters": index}, indent=1)
        )
        os.replace(path.with_name(INDEX + ".part"), path)


def load_states(
    optimizer: SplitAdamW, parameters: Iterable[tuple[str, Tensor]], folder: str | Path
) -> None:
    """Gives the optimizer the states, learning rates and other settings of a checkpoint.

    Raises:
        UserError: they are missing, incomplete, or of other parameters.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise UserError(
            f"The checkpoint {folder} holds no {INDEX}: it was saved with save_only_model, or "
            "by AdamW with all its states on the GPU. This run keeps them on the host or with "
            "split master weights. Resume with optimizer_placement: gpu if that fits, or start "
            "a new run from its weights (model_name_or_path)."
        )
    index = json.loads(path.read_text())
    names = _names(optimizer, parameters)
    then = [g["parameters"] for g in index["groups"]]
    now = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
    if then != now:
        differ = sorted({n for g in then for n in g} ^ {n for g in now for n in g})
        what = (
            f"{len(differ)} differ, the first is {differ[0]}"
            if differ
            else "they are grouped in another way"
        )
        raise UserError(
            f"The checkpoint {folder} trained other parameters than this run: {what}. Use the same"
            " finetuning_type and weight decay."
        )
    for group, saved in zip(optimizer.param_groups, index["groups"], strict=True):
        for key, value in saved.items():
            if key != "parameters":
                group[key] = tuple(value) if isinstance(value, list) else value
    with contextlib.ExitStack() as stack:
        files = _Files(Path(folder), index["ranks"], stack)
        for p, name in names.items():
            optimizer.state[p].clear()
            if name in index["parameters"]:
                _read(optimizer, p, name, index["parameters"][name], files)


def _read(
    optimizer: SplitAdamW, p: Tensor, name: str, entry: dict[str, Any], files: _Files
) -> None:
    optimizer.prepare(p)
    state = optimizer.state[p]
    if entry["shape"] != list(p.shape):
        raise UserError(
            f"{name} has the shape {entry['shape']} in {files.folder}, and {list(p.shape)} in this"
            " run: it is another model."
        )
    kinds = [key for key in state if key != "step"]
    if entry["states"] != kinds:
        raise UserError(
            f"{files.folder} holds {', '.join(entry['states'])} of {name}, this run needs"
            f" {', '.join(kinds)}: one of them has bf16 weights with a 16-bit remainder (low), the"
            " other fp32 weights. Use the same bf16, pure_bf16 and optimizer_placement, and"
            " accumulate gradients as before."
        )
    state["step"].fill_(entry["step"])
    parts = files.ranks if entry["sharded"] else 1
    for key in kinds:
        target = state[key]
        if target.ndim == 0:
            target.copy_(files.open(0).get_tensor(f"{name}/{key}"))
            continue
        here = _rows(p)
        if here[1] - here[0] != len(target):
            raise RuntimeError(
                f"{name}: this rank holds {len(target)} rows, {here[1] - here[0]} were expected."
            )
        for rank in range(parts):
            there = chunk(p.shape[0], parts, rank)
            a, b = max(here[0], there[0]), min(here[1], there[1])
            if a < b:
                rows = files.open(rank).get_slice(f"{name}/{key}")[a - there[0] : b - there[0]]
                target[a - here[0] : b - here[0]].copy_(rows)


class _Files:
    """The ranks' files of a checkpoint, opened where they are needed and read without loading them
    whole.
    """

    def __init__(self, folder: Path, ranks: int, stack: contextlib.ExitStack) -> None:
        self.folder, self.ranks, self._stack, self._open = folder, ranks, stack, dict[int, Any]()

    def open(self, rank: int) -> Any:
        from safetensors import safe_open

        if rank not in self._open:
            path = self.folder / states_file(rank, self.ranks)
            if not path.is_file():
                raise UserError(
                    f"{path} is missing, and this rank needs it. The folder must be on a file"
                    " system that all machines share, or hold every rank's file."
                )
            self._open[rank] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[rank]


def chunk(rows: int, parts: int, part: int) -> tuple[int, int]:
    """[start, stop) of a part of `rows` rows, as `torch.chunk` and FSDP2 cut them: the last parts
    may be shorter, or empty.
    """
    size = -(-rows // parts)
    return min(part * size, rows), min((part + 1) * size, rows)


def _is_sharded(p: Any) -> bool:
    """Raises RuntimeError for a sharding that is not FSDP2's over all ranks."""
    if not hasattr(p, "placements"):
        return False
    if (
        len(p.placements) != 1
        or not p.placements[0].is_shard(0)
        or p.device_mesh.size() != dist.get_world_size()
    ):
        raise RuntimeError(
            "Optimizer states are saved of parameters whose first dimension is sharded over all"
            f" ranks, not {p.placements}."
        )
    return True


def _rows(p: Tensor) -> tuple[int, int]:
    """Rows of a parameter that this rank holds."""
    return (
        chunk(p.shape[0], dist.get_world_size(), dist.get_rank())
        if _is_sharded(p)
        else (0, p.shape[0])
    )


def _names(optimizer: SplitAdamW, parameters: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    """The optimizer's parameters, in its order, with their names in the model."""
    named = {p: name for name, p in parameters}
    return {p: named[p] for g in optimizer.param_groups for p in g["params"]}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """As safetensors' own `save_file`, a block at a time: there may be no room for a second copy of
    what is written.

    Raises:
        KeyError: a tensor is neither fp32, fp64 nor int16.
    """
    # readers want numbers aligned to their size
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, at = {}, 0
    for name, t in ordered:
        end = at + t.numel() * t.element_size()
        header[name] = {
            "dtype": _DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, t in ordered:
            for piece in t.detach().contiguous().view(-1).split(BLOCK):
                f.write(piece.cpu().numpy())
    os.replace(part, path)
