"""Checkpoints of whole parameters (one process, DDP) loaded into FSDP2 models, and the other way
round.

Both hold the weights as whole safetensors. Of the optimizer's states the one has `optimizer.pt`,
numbered in the order of the parameter groups, the other `optimizer_0/`, torch's distributed
checkpoint by parameters' names; both orders are those in which this run has made its groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longfactory.errors import UserError
from longfactory.model.saved import ADAPTER_FILE, adapter_name, names_for_peft
from longfactory.model.source import stored_tensors

WHOLE, SHARDED, SHARDED_MODEL = "optimizer.pt", "optimizer_0", "pytorch_model_fsdp_0"


def states_of(folder: str | Path) -> Literal["whole", "sharded", "other"]:
    """Which optimizer states a checkpoint holds."""
    if (Path(folder) / WHOLE).is_file():
        return "whole"
    return "sharded" if (Path(folder) / SHARDED).is_dir() else "other"


def load_weights(model: Any, folder: str | Path, *, sharded: bool) -> None:
    """The weights of a checkpoint's safetensors, into a model that is FSDP2's (`sharded`) or whole.
    Collective for a sharded one.

    Raises:
        UserError: a parameter that is trained is not in the files under the model's name.
    """
    found = _adapter(model, folder) if hasattr(model, "peft_config") else _tensors(folder)
    own = model.state_dict()
    there = {_address(t) for name, t in own.items() if name in found}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    needed = trained if hasattr(model, "peft_config") else own.keys()
    # tied weights are stored once; a value head is read by itself
    missing = [
        n
        for n in needed
        if n not in found and _address(own[n]) not in there and not n.startswith("v_head.")
    ]
    if missing:
        raise UserError(
            f"{folder} does not hold {missing[0]} under that name ({len(missing)} such): it was"
            " saved with another sharding, and cannot be read by this one. Use the same sharding."
        )
    if not sharded:
        model.load_state_dict({n: t for n, t in found.items() if n in own}, strict=False)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, {n: t for n, t in found.items() if n in own}, options=options)


def _tensors(folder: str | Path) -> dict[str, Tensor]:
    files: dict[Path, list[str]] = {}
    for name, entry in stored_tensors(folder).items():
        files.setdefault(entry.file, []).append(name)
    found: dict[str, Tensor] = {}
    for file, names in files.items():
        with safe_open(file, framework="pt") as f:
            found |= {name: f.get_tensor(name) for name in names}
    return found


def _adapter(model: Any, folder: str | Path) -> dict[str, Tensor]:
    """Tensors of an adapter's file by the model's names."""
    renamed = names_for_peft(model)
    with safe_open(Path(folder) / ADAPTER_FILE, framework="pt") as f:
        stored = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    names = {n: adapter_name(n) for n, p in model.named_parameters() if p.requires_grad}
    return {n: stored[k] for n, a in names.items() if (k := renamed.get(a, a)) in stored}


def _address(t: Any) -> int:
    return (t.to_local() if hasattr(t, "to_local") else t).data_ptr()


def load_whole_states(optimizer: Any, model: nn.Module, folder: str | Path) -> None:
    """States of `optimizer.pt` into an FSDP2 model's optimizer. Collective.

    Raises:
        UserError: they are of other parameters.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    saved = torch.load(Path(folder) / WHOLE, map_location="cpu", mmap=True, weights_only=True)
    groups = _names(optimizer, model)
    numbers = [group["params"] for group in saved["param_groups"]]
    if [len(g) for g in groups] != [len(g) for g in numbers]:
        raise _other(folder)
    named = {n: name for g, ns in zip(groups, numbers, strict=True) for name, n in zip(g, ns)}  # noqa: B905
    state = {
        "state": {named[n]: dict(entry) for n, entry in saved["state"].items()},
        "param_groups": [
            {**group, "params": names}
            for group, names in zip(saved["param_groups"], groups, strict=True)
        ],
    }
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def load_sharded_states(optimizer: Any, model: nn.Module, folder: str | Path) -> None:
    """States of `optimizer_0/` into an optimizer of whole parameters; each process reads all.

    Raises:
        UserError: they are of other parameters.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(Path(folder) / SHARDED)
    entries = reader.read_metadata().state_dict_metadata
    prefix = "optimizer.state."
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(prefix) and hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, kind = key.removeprefix(prefix).rsplit(".", 1)
        states.setdefault(name, {})[kind] = value
    names = [name for group in _names(optimizer, model) for name in group]
    if not states.keys() <= set(names):
        raise _other(folder)
    whole = optimizer.state_dict()
    numbers = [n for group in whole["param_groups"] for n in group["params"]]
    whole["state"] = {
        n: states[name] for n, name in zip(numbers, names, strict=True) if name in states
    }
    optimizer.load_state_dict(whole)


def _names(optimizer: Any, model: nn.Module) -> list[list[str]]:
    """The parameters' names of each group."""
    named = {p: name for name, p in model.named_parameters()}
    return [[named[p] for p in group["params"]] for group in optimizer.param_groups]


def _other(folder: str | Path) -> UserError:
    return UserError(
        f"The optimizer's states in {folder} are of other parameters than this run trains. Use the"
        " same finetuning_type and weight decay."
    )
