"""Checkpoints without a manifest: of LongFactory before it wrote one, of LLaMA-Factory, of
transformers.

Nothing says what such a folder held when it was written, so only what can be told from the files
themselves is: a safetensors file knows its length, a torch file has checksums of its entries, the
JSON files can be read, and what resuming needs is there.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from longfactory.config.folder import TRAINER_STATE
from longfactory.errors import UserError

_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "*_model.bin")

_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


def problems_of(folder: Path) -> list[str]:
    """Why a checkpoint without a manifest cannot be resumed from; empty where nothing is seen."""
    found: list[str] = []
    try:
        if "global_step" not in json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8")):
            found.append(f"{TRAINER_STATE} names no step")
    except OSError:
        return [f"{TRAINER_STATE} is missing"]
    except (ValueError, TypeError):
        found.append(f"{TRAINER_STATE} ends early or is no JSON")
    for path in sorted(folder.rglob("*.safetensors")):
        found += _told(path, _cut(path), "has another length than its header says")
    for path in sorted([*folder.rglob("*.pt"), *folder.rglob("*.pth"), *folder.rglob("*.bin")]):
        found += _told(path, _torch_file_is_damaged(path), "is damaged")
    sharded = any(folder.glob("*_fsdp_*")) or any(folder.glob("global_step*"))
    if not sharded and not any(p for pattern in _WEIGHTS for p in folder.glob(pattern)):
        found.append("model.safetensors or adapter_model.safetensors is missing")
    return found


def refuse_other_kind(folder: Path, *, adapter: bool) -> None:
    """Refuses a checkpoint of an adapter where all parameters are trained, and of a whole model
    where an adapter is. Of sharded states nothing is said: their files name no kind.

    Args:
        adapter: what this run trains.
    Raises:
        UserError: it holds the other.
    """
    holds_adapter = any(folder.glob("adapter_model.*"))
    holds_model = any(p for pattern in _WEIGHTS for p in folder.glob(pattern)) and not holds_adapter
    if not (holds_model if adapter else holds_adapter):
        return
    held, trained = (
        ("a whole model", "an adapter") if adapter else ("an adapter", "the model itself")
    )
    key = "model_name_or_path" if adapter else "adapter_name_or_path, with finetuning_type: lora"
    raise UserError(
        f"The checkpoint {folder} holds {held}, and this run trains {trained}. Use the same"
        f" finetuning_type. To start from its weights alone, name it in {key}."
    )


def resumable(folder: Path) -> bool:
    """Whether it holds what is more than weights, or a part of that."""
    return any(p for name in (*_OPTIMIZER, "scheduler.pt", "rng_state*") for p in folder.glob(name))


def missing_states(folder: Path) -> list[str]:
    """Of a checkpoint that holds a part of what is more than weights: the rest."""
    found = []
    if not any(p for name in _OPTIMIZER for p in folder.glob(name)):
        found.append("optimizer.pt is missing")
    own_scheduler = any(folder.glob("global_step*"))
    if not own_scheduler and not (folder / "scheduler.pt").is_file():
        found.append("scheduler.pt is missing")
    ranks = [int(p.stem.rsplit("_", 1)[1]) for p in folder.glob("rng_state_*.pth")]
    if not ranks and not (folder / "rng_state.pth").is_file():
        found.append("rng_state.pth is missing")
    found += [
        f"rng_state_{r}.pth is missing" for r in range(max(ranks, default=0)) if r not in ranks
    ]
    return found


def _told(path: Path, wrong: bool, words: str) -> list[str]:
    return [f"{path.name} {words}"] if wrong else []


def _cut(path: Path) -> bool:
    """Whether a safetensors file is shorter or longer than its header says."""
    try:
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0) != path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
        return True


def _torch_file_is_damaged(path: Path) -> bool:
    """Whether an entry of a file that torch has written differs from its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        with open(path, "rb") as f:
            start = f.read(2)
        return start != b"\x80\x02"  # what torch wrote before it wrote archives
    except Exception:  # zipfile's many errors: an entry that cannot be unpacked is damaged
        return True
