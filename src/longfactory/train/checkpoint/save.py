"""A save: a temporary folder beside, every process's part, everything on the disk, a manifest, one
rename. At any moment a checkpoint is there whole or not at all, and the one before it stays.
"""

from __future__ import annotations

import functools
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longfactory.config.folder import MANIFEST, checkpoints
from longfactory.errors import UserError
from longfactory.train.checkpoint import manifest as manifests
from longfactory.train.checkpoint.place import place_of, share_of_files
from longfactory.train.checkpoint.prune import discard, temporary_name
from longfactory.train.ranks import from_all, from_main

log = logging.getLogger("longfactory")

Part = tuple[str, Callable[[Path], Any]]
"""What is saved, in words, and the function that writes it into a folder. Collective."""


def save_checkpoint(
    args: Any,
    step: int,
    parts: Sequence[Part],
    facts: dict[str, Any],
    *,
    bytes_needed: int = 0,
) -> Path:
    """Writes `checkpoint-<step>` into the output folder. Collective.

    Args:
        args: transformers' TrainingArguments.
        parts: in the order in which they are written; where one fails on a process, none of the
            later ones is begun on any.
        facts: for the manifest.
        bytes_needed: of this process's share, an estimate.
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: on every rank, where the disk refuses; the temporary folder is removed, and
            older checkpoints stay.
    """
    output_dir, begun = Path(args.output_dir), time.monotonic()
    final = output_dir / f"checkpoint-{step}"
    beside = output_dir / from_main(temporary_name(step))
    writes = args.should_save

    def step_of_it(what: str, function: Callable[[], Any]) -> None:
        together(what, function, final, beside if writes else None, output_dir)

    step_of_it("free space", lambda: _check_space(output_dir, bytes_needed, writes))
    step_of_it("the folder", lambda: beside.mkdir(parents=True) if writes else None)
    for what, write in parts:
        step_of_it(what, functools.partial(write, beside))
    files: manifests.Files = {}

    def measure() -> None:
        # The names are those that the writing process sees: others may see them late on a network.
        listed = from_all(manifests.list_files(beside) if writes else None)
        sizes = listed[place_of(args)]
        files.update(manifests.measure(beside, share_of_files(sizes), sync=True))

    step_of_it("checksums", measure)
    for place, theirs in from_all((place_of(args), files)):
        if place == place_of(args):
            files |= theirs
    size = sum(f["size"] for f in files.values())

    def seal() -> None:
        if not writes:
            return
        manifests.write(beside, facts, files)
        if final.exists():
            discard(final)
        beside.rename(final)
        manifests.sync_folder(output_dir)

    step_of_it(MANIFEST, seal)
    log.info(f"{final}: {size_in_words(size)} saved in {time.monotonic() - begun:.1f} s.")
    return final


def together(
    what: str,
    function: Callable[[], Any],
    goal: Path,
    beside: Path | None,
    output_dir: Path,
) -> None:
    """Calls a function that writes on every rank, and ends the run on all where it failed on one.

    Args:
        what: of the save, in words.
        goal: what is being saved.
        beside: the unfinished folder, which this process removes.
    Raises:
        UserError: on every rank, where the disk refuses.
        Exception: what else the function raised, on the ranks where it did.
    """
    error: Exception | None = None
    try:
        function()
    except Exception as e:
        log.debug("save of %s", what, exc_info=e)
        error = e
    found = from_all(None if error is None else _in_words(error))
    failed = [(rank, words) for rank, words in enumerate(found) if words is not None]
    if not failed:
        return
    if beside is not None:
        shutil.rmtree(beside, ignore_errors=True)
    if error is not None and not _of_the_disk(error):
        raise error
    rank, words = failed[0]
    who = f"Process {rank}: " if len(found) > 1 else ""
    last = next(iter(checkpoints(output_dir)), None)
    kept = "There is no earlier checkpoint." if last is None else f"{last} is intact."
    raise UserError(
        f"{who}{goal} could not be saved ({what}: {words}). {kept} Free up or repair the disk "
        "and run the same command again: it resumes from the last checkpoint."
    ) from error


def _of_the_disk(error: Exception) -> bool:
    """Whether an error of a save is the user's to mend: the disk's, and not the program's."""
    if isinstance(error, (OSError, UserError)):
        return True
    # safetensors and torch have errors of their own for a write that failed
    text = str(error)
    return (
        "os error" in text
        or "I/O error" in text
        or "PytorchStreamWriter" in text
        or ("inline_container" in text)
    )


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_space(output_dir: Path, bytes_needed: int, writes: bool) -> None:
    """Raises UserError where the disk has less free space than all processes will write.
    Collective.
    """
    needed = sum(from_all(bytes_needed))
    if not writes:
        return
    there = next(p for p in (output_dir, *output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"{size_in_words(free)} free, and a checkpoint needs about {size_in_words(needed)}"
        )


def size_in_words(count: float) -> str:
    """Bytes: `14.20 GB`, of a small model `3.20 MB` or `0.51 KB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.2f} KB"


def optimizer_bytes(optimizer: Any) -> int:
    """Bytes of the optimizer's states that this process holds."""
    states = getattr(optimizer, "state", None) or {}
    total = 0
    for entry in states.values() if hasattr(states, "values") else ():
        for value in entry.values() if hasattr(entry, "values") else ():
            local = value.to_local() if hasattr(value, "to_local") else value
            if hasattr(local, "element_size"):
                total += local.numel() * local.element_size()
    return total
