"""After a save: the folder gets all that the loaded checkpoint has, under its names, and is
compared with the model and with it.

transformers does not load every tensor of every checkpoint (next-token prediction heads: `mtp.*`,
or a layer beyond the last), and saves none that it has not loaded. It may also write other names
than those it has read. A saved model must load wherever the checkpoint does: here both are made
good, by copying bytes. One process of a run does this, when the files are written.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from longfactory.errors import UserError
from longfactory.model import damaged, value_head
from longfactory.model.source import (
    DTYPES,
    FILE,
    INDEX,
    PART,
    Source,
    Stored,
    first_values,
    read_header,
    stored_tensors,
    targets_of,
    tied_duplicates,
    weight_files,
    write_stored,
)

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
COMPARED = 1024  # numbers of each tensor
SETTINGS = ("adapter_config.json", "config.json")
_READ_FIRST = (*damaged.MODEL, *damaged.INDICES, *damaged.ADAPTER)
"""Files without which a folder's weights do not load."""
WEIGHTS_PART = re.compile(r"(pytorch_)?model-\d{5}-of-\d{5}\.(safetensors|bin)")

# Files beside the weights that processors and tokenizers of other programs read, and that no part
# of the trained model writes.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_preprocessor_config.json",
    "audio_preprocessor_config.json",
)
VOCABULARY_FILES = (
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
)
# Constants that old checkpoints stored and that models compute today: not to be trained, never
# stale.
CONSTANTS = re.compile(
    r"(inv_freq|position_ids|masked_bias|(^|\.)attn\.bias|attention\.bias|relative_position_index)$"
)


@dataclasses.dataclass(frozen=True)
class Changes:
    """What a saved folder lacks of its source.

    Attributes:
        renamed: saved name -> the source's name of the same tensor.
        repeated: name in the source -> saved name with the same numbers (tied weights that the
            source holds twice).
        copied: names that are taken from the source's files unchanged.
        elsewhere: names whose numbers were saved under other names, several to one.
        missing: names for which nothing was saved.
    """

    renamed: dict[str, str]
    repeated: dict[str, str]
    copied: list[str]
    elsewhere: list[str]
    missing: list[str]


def compare_names(saved: Iterable[str], source: Source, model: Any) -> Changes:
    """What must be done so that the names of `source` are those of a saved folder.

    Args:
        saved: names in the saved files, as transformers writes them.
        model: the transformers model, without adapters.
    """
    saved = set(saved)
    model_targets = targets_of(saved, model)
    buffers = {name for name, _ in model.named_buffers()}  # of which some are never saved

    def first(target: str) -> str:
        return source.tied.get(target, target)

    theirs: dict[str, list[str]] = collections.defaultdict(list)
    for name in sorted(saved):
        for target in model_targets[name][:1]:
            theirs[first(target)].append(name)
    ours = collections.Counter(first(targets[0]) for targets in source.targets.values() if targets)
    changes = Changes({}, {}, [], [], [])
    for name, targets in source.targets.items():
        if name in saved:
            continue
        if not targets:
            changes.copied.append(name)
            continue
        target = targets[0]
        found = theirs[first(target)]
        known = [n for n in found if n in source.tensors]
        if not found:
            (changes.copied if target in buffers else changes.missing).append(name)
        elif target in source.tied and known:
            changes.repeated[name] = known[0]
        elif target in source.tied and found[0] in changes.renamed:
            changes.repeated[name] = changes.renamed[found[0]]
        elif not known and len(found) == 1 and (ours[first(target)] == 1 or target in source.tied):
            changes.renamed[found[0]] = name
        else:
            changes.elsewhere.append(name)
    return changes


def complete(
    folder: str | Path, source: Source, model: Any, max_bytes: int = 50 * 10**9
) -> Changes:
    """Gives the tensors of a saved folder the names that they have in the source, and adds those
    that were not loaded. On one process.

    New files are written beside and renamed. A folder that lacks nothing is left alone.

    Args:
        folder: holds what `save_pretrained` has just written, as safetensors.
        model: what was saved: a transformers model without adapters.
        max_bytes: the largest file of added tensors.
    Raises:
        UserError: a tensor of the source can no longer be read.
    """
    folder = Path(folder)
    files = weight_files(folder)
    saved = stored_tensors(folder)
    changes = compare_names(saved, source, model)
    if not (changes.renamed or changes.repeated or changes.copied):
        return changes
    for file in files:
        held = {name: entry for name, entry in saved.items() if entry.file == file}
        if changes.renamed.keys() & held.keys():
            write_stored(
                file, {changes.renamed.get(name, name): entry for name, entry in held.items()}
            )
    new = {name: source.tensors[name] for name in changes.copied}
    now = (
        stored_tensors(folder)
        if not (folder / INDEX).is_file()
        else {n: e for f in files for n, e in read_header(f).items()}
    )
    new |= {name: now[partner] for name, partner in changes.repeated.items()}
    parts: list[dict[str, Stored]] = []
    size = 0
    for name, entry in new.items():
        if not parts or size + entry.size > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += entry.size
    added = [folder / f"added-{i}{PART}" for i in range(len(parts))]
    for path, part in zip(added, parts, strict=True):
        write_stored(path, part)
    total = len(files) + len(added)
    names = (
        [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
        if total > 1
        else [FILE]
    )
    # Two passes: a new name may be another file's old one.
    for i, path in enumerate([*files, *added]):
        os.replace(path, folder / f"{i}{PART}")
    for i, name in enumerate(names):
        os.replace(folder / f"{i}{PART}", folder / name)
    if total > 1:
        _write_index(folder, names)
    return changes


def _write_index(folder: Path, names: list[str]) -> None:
    path = folder / INDEX
    metadata = (
        json.loads(path.read_text(encoding="utf-8")).get("metadata", {}) if path.is_file() else {}
    )
    held = {name: read_header(folder / name) for name in names}
    metadata["total_size"] = sum(
        entry.size for entries in held.values() for entry in entries.values()
    )
    weight_map = {tensor: name for name, entries in held.items() for tensor in sorted(entries)}
    text = (
        json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        + "\n"
    )
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def copy_side_files(source: Path | None, folder: str | Path, *, whole: bool) -> list[str]:
    """Copies what the source has beside its weights and a saved folder lacks. Returns the names.

    Args:
        source: the folder that was loaded (`Source.folder`).
        whole: the folder holds a whole model, not an adapter: processor files of a vision-language
            model come along.
    """
    if source is None or source.resolve() == Path(folder).resolve():
        return []
    folder = Path(folder)
    described = ("config.json", "tokenizer_config.json") if whole else ("tokenizer_config.json",)
    own_code = any('"auto_map"' in _text(source / name) for name in described)
    patterns = [
        *(["*.py"] if own_code else []),
        *VOCABULARY_FILES,
        *(PROCESSOR_FILES if whole else ()),
    ]
    has_template = (folder / "chat_template.jinja").is_file() or (
        folder / "additional_chat_templates"
    ).is_dir()
    if whole and not has_template and any((source / name).is_file() for name in PROCESSOR_FILES):
        patterns.append("chat_template.json")
    copied = []
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
                copied.append(file.name)
    return copied


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def put_in_place(beside: Path, folder: Path) -> None:
    """Moves a complete save into the folder above it, in place of an earlier one, and removes its
    own. A README.md that is there stays: its author may be a person.

    It may be called again after it was ended at any place. Until then the folder holds no weights
    that load: never those of one save with the settings or the parts of another.
    """
    left = {path.name for path in beside.iterdir()}
    # which is moved first: while it is here, nothing that was moved can be taken for earlier
    settings = next((name for name in SETTINGS if name in left), None)
    if settings is not None:
        remove_earlier(folder, adapter=settings == "adapter_config.json")
    for name in sorted(left, key=lambda name: (name != settings, name in _READ_FIRST, name)):
        there = folder / name
        if name == "README.md" and there.exists():
            continue
        if there.is_dir():
            shutil.rmtree(there)
        os.replace(beside / name, there)
    shutil.rmtree(beside, ignore_errors=True)


def remove_earlier(folder: Path, *, adapter: bool, kept: Collection[str] = ()) -> None:
    """Removes the weights of an earlier save: a single file of before would be read in place of
    new ones, which are several, an adapter would be loaded onto them, and a reward model would
    begin with the value head.

    Args:
        adapter: what takes its place. It is saved beside no whole model (`config.folder`), so no
            weights of one are looked for.
        kept: names of files that stay.
    """
    for path in earlier_files(folder, adapter=adapter):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def earlier_files(folder: Path, *, adapter: bool) -> list[Path]:
    """What `remove_earlier` removes, of what is there."""
    names = {value_head.FILE, *damaged.ADAPTER}
    if not adapter:
        parts = (path.name for path in folder.glob("*-of-*"))
        names |= {"adapter_config.json", *damaged.MODEL, *damaged.INDICES}
        names |= {name for name in parts if WEIGHTS_PART.fullmatch(name)}
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def fits_alone(folder: Path, needed: int, *, adapter: bool) -> bool:
    """Whether a save of so many bytes has room in a folder without the earlier save there, and none
    beside it.

    Args:
        adapter: what is to be saved.
    """
    free = shutil.disk_usage(folder).free
    earlier = sum(path.stat().st_size for path in earlier_files(folder, adapter=adapter))
    return free < needed <= free + earlier


def make_room(folder: Path, *, adapter: bool) -> None:
    """Removes an earlier save. What is read first goes first: ended at any place, the folder holds
    nothing that loads, and no part of the earlier save that could be taken for a whole one.
    """
    for name in SETTINGS[:1] if adapter else SETTINGS:
        (folder / name).unlink(missing_ok=True)
    remove_earlier(folder, adapter=adapter)


# ---- before a save -------------------------------------------------------------------------------


def names_and_shapes(model: Any) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` writes of a whole model, on the meta device, under the
    names that they get in its files.

    Args:
        model: a transformers model without adapters. Its parameters may be sharded or empty.
    """
    from transformers.core_model_loading import revert_weight_conversion

    parameters = dict(model.named_parameters(remove_duplicate=False))
    duplicates = tied_duplicates(model)
    tensors = {}
    for name, t in model.state_dict().items():
        if name in duplicates:
            continue
        shape = (
            getattr(parameters[name], "ds_shape", parameters[name].shape)
            if name in parameters
            else t.shape
        )
        tensors[name] = torch.empty(shape, dtype=t.dtype, device="meta")
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    return revert_weight_conversion(model, tensors)


def check_saveable(model: Any, source: Source | None) -> None:
    """Proves without writing anything that each tensor of a model can be saved, and that every
    tensor of the source will be.

    Args:
        model: a transformers model, perhaps inside PEFT, not yet sharded by FSDP2.
        source: of the loaded checkpoint.
    Raises:
        UserError: which tensor cannot be saved, and why.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        names = get_peft_model_state_dict(
            model, state_dict={name: torch.empty(0) for name in model.state_dict()}
        )
        expected = {
            name: adapter_name(name) for name, p in model.named_parameters() if p.requires_grad
        }
        heads = [name for name in expected if name.startswith("v_head.")]  # in a file of their own
        lost = [
            name for name, there in expected.items() if there not in names and name not in heads
        ]
        _raise(lost, "are trained, but PEFT does not save them with the adapter")
        names_for_peft(model)
        return
    state = dict(model.state_dict())
    _raise(
        [name for name, t in state.items() if t.dtype not in DTYPES.values()],
        "have a dtype that safetensors does not know",
    )
    # under ZeRO-3 every tensor is empty, and they look alike
    if not any(hasattr(p, "ds_id") for p in model.parameters()):
        remove_tied_weights_from_state_dict(state, model)
    names = names_and_shapes(model)
    if source is not None:
        _raise(
            compare_names(names, source, model).missing,
            f"stand in {source.folder} and would not be saved",
        )


def names_for_peft(model: Any) -> dict[str, str]:
    """Names in an adapter's file that PEFT does not find again -> names of the same tensors that it
    does find.

    While it loads, PEFT renames by transformers' patterns for old checkpoints, and a pattern may
    fit today's names too: the last point of Laguna's `mlp.shared_expert.` stands for any letter, so
    that `mlp.shared_experts` changes and is left out, with no more than a warning. By the old name
    such a tensor is found.

    Args:
        model: inside PEFT. Its parameters may be sharded or empty.
    Raises:
        UserError: a tensor is found under no name.
    """
    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_adapter_state_dict_for_transformers,
        )
    except ImportError:  # an earlier PEFT, which renames nothing
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    trained = {
        adapter_name(n): p
        for n, p in model.named_parameters()
        if p.requires_grad and not n.startswith("v_head.")
    }
    tensors = {name: torch.empty(_shape(p), device="meta") for name, p in trained.items()}

    def found(names: Mapping[str, str]) -> set[str]:
        """Those of today's names under which PEFT finds something. names: today's -> in the
        file.
        """
        stored = {there: tensors[name] for name, there in names.items()}
        return set(
            convert_peft_adapter_state_dict_for_transformers(
                model, model.peft_config["default"], stored
            )
        )

    lost = tensors.keys() - found({name: name for name in tensors})
    renamed: dict[str, str] = {}
    for pattern in get_model_conversion_mapping(model.get_base_model()) if lost else ():
        if not isinstance(pattern, WeightRenaming):
            continue
        back = pattern.reverse_transform()
        old = {
            name: PEFT_PREFIX + back.rename_source_key(name.removeprefix(PEFT_PREFIX))[0]
            for name in lost
        }
        seen = found(old)
        renamed |= {name: there for name, there in old.items() if there != name and name in seen}
        lost = lost - renamed.keys()
    _raise(
        sorted(lost),
        "of the adapter are trained, but PEFT would not find them when it loads the adapter",
    )
    return renamed


def rename_for_peft(folder: str | Path, model: Any) -> None:
    """Gives the tensors of a saved adapter the names that PEFT finds them by (see
    `names_for_peft`). On one process.
    """
    file = Path(folder) / ADAPTER_FILE
    if file.is_file() and (renamed := names_for_peft(model)):
        write_stored(
            file, {renamed.get(name, name): entry for name, entry in read_header(file).items()}
        )


def _raise(names: list[str], what: str) -> None:
    if names:
        raise UserError(
            f"{len(names)} tensors {what}:"
            f" {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}."
        )


def bytes_to_save(model: Any) -> int:
    """Bytes of what a save writes: the trained parameters of an adapter, all of a whole model."""
    adapter = hasattr(model, "peft_config")
    sizes = (
        (getattr(p, "ds_numel", p.numel()) * p.element_size(), p.requires_grad)
        for p in model.parameters()
    )
    return sum(size for size, trained in sizes if trained or not adapter)


# ---- the check -----------------------------------------------------------------------------------


def check_saved(
    folder: str | Path, model: Any, source: Source | None = None, *, merged: bool = False
) -> list[str]:
    """Compares a saved folder with the model in memory, and with the checkpoint that was loaded.
    Empty where all is there.

    Names and shapes of every tensor are compared, and the first numbers of those that this process
    holds whole. Of an adapter: every trained parameter is in its file (or in the value head's). Of
    a whole model: every parameter; every tensor of the source under its own name; and frozen ones
    still have the source's numbers.

    Args:
        folder: written by `save_model` or `save_pretrained`.
        model: as it was saved: a transformers model, perhaps inside PEFT; not wrapped by DDP.
        source: of the loaded checkpoint, for a whole model.
        merged: adapters were added to the weights, or they were quantised: they are not the
            source's although nothing is trained.
    Returns:
        Sentences, each naming what is wrong and the first tensors concerned.
    """
    folder = Path(folder)
    parameters = dict(model.named_parameters())
    # Name in the files -> the parameter's name, and the shape that it must have.
    owners: dict[str, str]
    if hasattr(model, "peft_config"):
        file = folder / ADAPTER_FILE
        stored = read_header(file) if file.is_file() else {}
        renamed = names_for_peft(model)
        saved_as = {name: adapter_name(name) for name, p in parameters.items() if p.requires_grad}
        owners = {renamed.get(there, there): name for name, there in saved_as.items()}
        shapes = {there: _shape(parameters[name]) for there, name in owners.items()}
    else:
        stored = stored_tensors(folder)
        tensors = names_and_shapes(model)
        renamed = {} if source is None else compare_names(tensors, source, model).renamed
        owners = {renamed.get(name, name): name for name in tensors}
        shapes = {renamed.get(name, name): tuple(t.shape) for name, t in tensors.items()}
    head = folder / value_head.FILE
    if head.is_file():
        stored |= {
            f"v_head.{name.rsplit('.', 1)[-1]}": entry for name, entry in read_header(head).items()
        }
    lost = [name for name in owners if name not in stored]
    problems = _told(
        lost, f"{len(lost)} of {len(owners)} tensors of the model are not in what was saved"
    )
    kept = [name for name in owners if name in stored]
    other = [name for name in kept if math.prod(stored[name].shape) != math.prod(shapes[name])]
    problems += _told(other, "tensors have another shape in what was saved than in the model")
    held = [name for name in kept if name not in other and owners[name] in parameters]
    changed = [name for name in held if not _equal(parameters[owners[name]], stored[name])]
    problems += _told(changed, "tensors have other numbers in what was saved than in the model")
    if source is None or hasattr(model, "peft_config"):
        return problems
    lost = [name for name in source.tensors if name not in stored]
    problems += _told(
        lost,
        f"{len(lost)} of {len(source.tensors)} tensors of {source.folder} are not in what was saved"
        " under their names",
    )
    if merged:
        return problems
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    changed = []
    for name, entry in source.tensors.items():
        # A value head came after the model was loaded, which had no such name then.
        if name not in stored or not trained.isdisjoint({name, *source.targets[name]}):
            continue
        before, after = first_values(entry, COMPARED), first_values(stored[name], COMPARED)
        if (
            before is not None
            and after is not None
            and not torch.equal(before.to(after.dtype), after)
        ):
            changed.append(name)
    return problems + _told(
        changed, f"tensors that were not trained have other numbers than in {source.folder}"
    )


ADAPTED = (
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "oft_R",
    "trainable_tokens_delta",
)
"""What PEFT holds by the adapter's name, and saves without it."""


def adapter_name(name: str) -> str:
    """A trained parameter's name in a PEFT model -> its name in `adapter_model.safetensors`."""
    name = name.replace(".modules_to_save.default.", ".")
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    for kind in ADAPTED:
        name = name.replace(f".{kind}.default", f".{kind}")
    return name


def _told(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what}: {', '.join(names[:3])}{more}"]


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def _equal(p: Any, entry: Stored) -> bool:
    """Whether the first numbers of a parameter are those in a file; True where this process does
    not hold it whole.
    """
    if hasattr(p, "ds_id") or hasattr(p, "placements") or p.device.type == "meta":
        return True
    there = first_values(entry, COMPARED)
    if there is None:
        return True
    here = p.detach().flatten()[:COMPARED].cpu().to(there.dtype)
    return (
        torch.equal(torch.nan_to_num(here), torch.nan_to_num(there))
        if here.is_floating_point()
        else torch.equal(here, there)
    )
