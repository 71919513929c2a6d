"""`save_total_limit`, and folders that a killed run left."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from pathlib import Path

from longfactory.config import folder
from longfactory.model import saved
from longfactory.train.checkpoint import manifest as manifests

log = logging.getLogger("longfactory")
TEMPORARY = "tmp-checkpoint-"
MODEL = "tmp-model-"
SCRATCH = ".longfactory-dry-save-"
_LEFT = re.compile(rf"({TEMPORARY}\d+-[0-9a-f]{{12}}|{MODEL}[0-9a-f]{{12}}|{re.escape(SCRATCH)}.*)")
_COMPLETE = re.compile(rf"{folder.COMPLETE}[0-9a-f]{{12}}")


def temporary_name(step: int) -> str:
    """A name beside `checkpoint-N` that nothing takes for a checkpoint."""
    return f"{TEMPORARY}{step}-{uuid.uuid4().hex[:12]}"


def unfinished_model() -> str:
    """A name for the trained model, while it is being written into the output folder."""
    return f"{MODEL}{uuid.uuid4().hex[:12]}"


def put_model_in_place(beside: Path) -> None:
    """The trained model, which is complete in a folder of `unfinished_model`, takes the place of an
    earlier one in the folder above. What a kill interrupts is finished by `remove_leftovers`.
    """
    complete = beside.with_name(beside.name.replace(MODEL, folder.COMPLETE))
    beside.rename(complete)
    saved.put_in_place(complete, complete.parent)


def remove_leftovers(output_dir: Path) -> list[str]:
    """Removes what saves of killed runs have left in an output folder, and returns their names; a
    model that was complete is put in place. Only folders with names that this room and the dry save
    give.
    """
    if not output_dir.is_dir():
        return []
    for p in sorted(output_dir.iterdir()):
        if _COMPLETE.fullmatch(p.name) and p.is_dir():
            log.info(f"{p} is a trained model, complete: it is put in its place in {output_dir}.")
            try:
                saved.put_in_place(p, output_dir)
            except OSError as error:
                log.warning(f"{p} could not be put in its place: {error.strerror or error}.")
    left = [p for p in output_dir.iterdir() if _LEFT.fullmatch(p.name) and p.is_dir()]
    for p in left:
        shutil.rmtree(p, ignore_errors=True)
    return sorted(p.name for p in left)


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint: it is there whole, or under a name that is no checkpoint's."""
    aside = checkpoint.with_name(temporary_name(max(0, folder.step_of(checkpoint))))
    checkpoint.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def prune(
    output_dir: Path, limit: int | None, record: folder.RunRecord, best: str | None, step: int
) -> list[str]:
    """Removes the oldest checkpoints beyond `limit`, and returns their names.

    Only whole ones count (manifest and sizes are looked at, the bytes are not read again): damaged
    ones and those without a manifest are neither counted nor removed. The newest of this run and
    the best one always stay. Those of earlier runs in the folder go first. Times of files do not
    matter.

    Args:
        step: of the newest whole one, whose bytes have been read: saved now, or resumed from. Later
            ones of this run were found damaged.
    """
    if limit is None or limit <= 0:
        return []
    there = [p for p in folder.checkpoints(output_dir) if _looks_whole(p)]
    mine = [p for p in there if record.holds(folder.run_of(p), folder.step_of(p))]
    whole = [p for p in there if p not in mine or folder.step_of(p) <= step]
    mine = [p for p in mine if p in whole]
    kept = {f"checkpoint-{step}"} | ({Path(best).name} if best else set())
    by_age = [*reversed([p for p in whole if p not in mine]), *reversed(mine)]
    removed: list[str] = []
    for p in by_age:
        if len(whole) - len(removed) <= max(limit, 1):
            break
        if p.name not in kept:
            discard(p)
            removed.append(p.name)
    return removed


def _looks_whole(checkpoint: Path) -> bool:
    found, wrong = manifests.read(checkpoint)
    if found is None or wrong is not None:
        return False
    sizes = manifests.list_files(checkpoint)
    return all(sizes.get(name) == entry["size"] for name, entry in found["files"].items())
