"""The files that a model was loaded from: their tensors, and the model's name for each.

Names, shapes and places are read from the headers of safetensors files: a few kilobytes, whatever
the model's size.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from longfactory.errors import UserError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_FILE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PART = ".part"
BLOCK = 16 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, and where its bytes are. Of a `.bin` file that is not known: it is read
    by torch.

    Attributes:
        dtype: safetensors' name (`BF16`); torch's (`torch.bfloat16`) in a `.bin` file.
        place: the first byte and the one after the last, counted from the file's start; None in a
            `.bin` file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    place: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class Source:
    """A loaded checkpoint: its folder, its tensors, and the model's name for each of them.

    Attributes:
        folder: the local folder, or the hub cache's; None where the model was not read from
            safetensors or `.bin` files.
        tensors: by their names in the files.
        targets: name in the files -> the model's names for what was made of it; none for a tensor
            that the model has not taken.
        tied: the model's name -> the first name of the same parameter, for each parameter that has
            several names.
    """

    folder: Path | None
    tensors: Mapping[str, Stored]
    targets: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, str]

    @property
    def not_loaded(self) -> list[str]:
        """Names of the tensors that are in the files alone."""
        return [name for name, targets in self.targets.items() if not targets]


def read_source(
    model: Any, name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> Source:
    """What a model was loaded from. Call it when the model has just been loaded: adapters change
    its names.

    Args:
        model: a transformers model, not wrapped. Its parameters may be sharded or empty; names and
            identity are looked at alone.
        name_or_path: the folder or hub id that was loaded; of a hub id the local cache is read,
            without a network.
    """
    folder = local_folder(name_or_path, revision=revision, cache_dir=cache_dir)
    tensors = {} if folder is None else stored_tensors(folder)
    return Source(folder, tensors, targets_of(tensors, model), tied_names(model))


def local_folder(
    name_or_path: str, *, revision: str | None = None, cache_dir: str | None = None
) -> Path | None:
    """The folder of a model on this machine: itself, or the snapshot in the hub's cache; None where
    there is none.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(
            name_or_path, "config.json", cache_dir=cache_dir, revision=revision
        )
    except ValueError:  # no name of a hub
        return None
    return Path(found).parent if isinstance(found, str) else None


def stored_tensors(folder: str | Path) -> dict[str, Stored]:
    """The tensors of a folder's weights, by name, from the files that transformers would read.
    Empty where it has none.

    Raises:
        UserError: a file of the index is missing.
    """
    folder = Path(folder)
    out: dict[str, Stored] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise UserError(
                f"{folder}: the index names {file.name}, which is missing. Download or copy the"
                " model again."
            )
        out |= _bin_tensors(file) if file.suffix == ".bin" else read_header(file)
    return out


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in transformers' order of preference."""
    for single, index in ((FILE, INDEX), (BIN_FILE, BIN_INDEX)):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
    return []


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        out[name] = Stored(
            file, name, entry["dtype"], tuple(entry["shape"]), stop - start, (start, stop)
        )
    return out


def _bin_tensors(file: Path) -> dict[str, Stored]:
    tensors = {name: t for name, t in _read_bin(file).items() if isinstance(t, torch.Tensor)}
    return {
        name: Stored(file, name, str(t.dtype), tuple(t.shape), t.numel() * t.element_size(), None)
        for name, t in tensors.items()
    }


def _read_bin(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written by a torch of before 1.6, whose files cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


# ---- names ---------------------------------------------------------------------------------------


def targets_of(names: Iterable[str], model: Any) -> dict[str, tuple[str, ...]]:
    """Name in a checkpoint -> names in the model, by the rules with which transformers loaded it;
    none where the model has no such tensor.

    Several names may have one target (experts that are stored one by one), and one name several
    (queries, keys and values in one).
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = getattr(model, "_weight_conversions", None) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = dict(model.state_dict())
    prefix = model.base_model_prefix
    out: dict[str, tuple[str, ...]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        found = [target]
        if target in state and pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            found += [target.replace(first, other) for other in others]
        if target not in state:
            # Names that the model has already are left alone, as transformers does.
            found = [rename_source_key(name, [], [], prefix, state)[0]]
        out[name] = tuple(target for target in found if target in state)
    return out


def tied_names(model: Any) -> dict[str, str]:
    """Name -> first name, for the names of parameters that have several."""
    groups: dict[int, list[str]] = collections.defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {name: names[0] for names in groups.values() if len(names) > 1 for name in names}


def tied_duplicates(model: Any) -> set[str]:
    """Names of tied parameters that transformers does not save: it saves each once, under the name
    that its class declares.
    """
    tied = tied_names(model)
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    return {name for name in tied if name in declared and tied.get(declared[name]) == tied[name]}


def in_words(names: Iterable[str], limit: int = 4) -> str:
    """`mtp.layers.0.a, mtp.norm, model.layers.9.b` -> `mtp.* (2), model.layers.9.* (1)`."""
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        end = places[0] + 1 if places and parts[0] != "mtp" else 1
        counts[".".join(parts[:end]) + (".*" if end < len(parts) else "")] += 1
    words = [f"{name} ({count})" for name, count in counts.most_common(limit)]
    return ", ".join(words) + (
        f" and {len(counts) - limit} groups more" if len(counts) > limit else ""
    )


# ---- copying -------------------------------------------------------------------------------------


def write_stored(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A safetensors file of tensors that stand in other files, under new names. Written beside and
    renamed.

    Bytes are copied a block at a time; tensors of `.bin` files pass through memory.

    Raises:
        UserError: a file cannot be read or written.
    """
    part = path.with_name(path.name + ".new")
    try:
        if any(entry.place is None for entry in tensors.values()):
            _save_loaded(part, tensors)
        else:
            _copy_bytes(part, tensors)
        os.replace(part, path)
    except OSError as error:
        raise UserError(
            f"{path.parent}: tensors of the loaded checkpoint could not be copied into it: {error}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _save_loaded(path: Path, tensors: Mapping[str, Stored]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    loaded: dict[str, torch.Tensor] = {}
    for file in sorted({entry.file for entry in tensors.values()}):
        wanted = {name: entry.name for name, entry in tensors.items() if entry.file == file}
        if file.suffix == ".bin":
            state = _read_bin(file)
            loaded |= {name: state[there].contiguous().clone() for name, there in wanted.items()}
        else:
            with safe_open(file, "pt") as f:
                loaded |= {name: f.get_tensor(there) for name, there in wanted.items()}
    save_file(loaded, path, metadata={"format": "pt"})


def _copy_bytes(path: Path, tensors: Mapping[str, Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Readers want numbers aligned to their size: wide ones first.
    ordered = sorted(
        tensors.items(), key=lambda item: -item[1].size // max(math.prod(item[1].shape), 1)
    )
    for name, entry in ordered:
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.size],
        }
        at += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.ExitStack() as stack, open(path, "wb") as out:
        opened = {
            file: stack.enter_context(open(file, "rb"))
            for file in {entry.file for entry in tensors.values()}
        }
        out.write(len(text).to_bytes(8, "little") + text)
        for name, entry in ordered:
            assert entry.place is not None
            f = opened[entry.file]
            f.seek(entry.place[0])
            left = entry.size
            while left:
                block = f.read(min(left, BLOCK))
                if not block:
                    raise OSError(f"{entry.file} ends in the middle of {name}")
                out.write(block)
                left -= len(block)


def first_values(entry: Stored, count: int) -> torch.Tensor | None:
    """The first numbers of a tensor in a safetensors file, flat; None where torch has no such
    dtype, or in a `.bin` file.
    """
    dtype = DTYPES.get(entry.dtype)
    if dtype is None or entry.place is None:
        return None
    with open(entry.file, "rb") as f:
        f.seek(entry.place[0])
        data = f.read(min(entry.size, count * dtype.itemsize))
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
