"""Which checkpoint a run goes on from: the newest that is whole.

Every byte of the chosen one is read once before anything is loaded from it, each process a share
of the files. What is read stays in the system's memory for the loading that follows.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from pathlib import Path
from typing import Any

from longfactory.config import RunConfig, folder
from longfactory.errors import UserError
from longfactory.train.checkpoint import manifest as manifests
from longfactory.train.checkpoint import old
from longfactory.train.checkpoint.place import share_of_files
from longfactory.train.checkpoint.progress import read_state
from longfactory.train.ranks import from_all, from_main

log = logging.getLogger("longfactory")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins."""

    checkpoint: str | None
    """The folder of a checkpoint that was read and found whole, or None: the run begins anew."""
    manifest: dict[str, Any] | None
    """Of that checkpoint; None for one that was written without."""
    record: folder.RunRecord
    """Which run this is; not written yet."""
    was_finished: bool = False
    """Whether the run in the output folder had come to its end before."""


def choose_start(cfg: RunConfig) -> Start:
    """Reads the checkpoints that the run may go on from, the newest first, until one is whole.
    Collective: the first process's list counts.

    Raises:
        UserError: on every rank, where the checkpoint that was asked for cannot be resumed from.
    """
    asked = from_main(cfg.trainer.resume_from_checkpoint)
    candidates = _here(cfg, from_main(_places(cfg)))
    before = folder.read_record(cfg.output_dir)
    was_finished = from_main(before is not None and before.finished)
    passed: list[str] = []
    for name in candidates:
        found, problems, weights_alone = _examine(Path(name))
        if not problems and not weights_alone:
            for line in passed:
                log.warning(line)
            if found is None:
                log.warning(
                    f"{name} has no {folder.MANIFEST}: resuming from it, but damage can be "
                    "detected only in part."
                )
            return Start(name, found, _record(cfg, name, found), was_finished)
        if weights_alone and not problems:
            passed.append(
                f"{name} holds only weights (save_only_model), so it cannot be resumed from. "
                f"To start from its weights: model_name_or_path: {name}, or "
                "adapter_name_or_path."
            )
        else:
            passed.append(f"{name} is damaged and is passed over: {'; '.join(problems[:3])}.")
    if passed and (isinstance(asked, str) or asked is True):
        raise UserError("\n".join([*passed, _advice(asked)]))
    for line in passed:
        log.warning(line)
    if passed:
        log.warning("No checkpoint is left to resume from: the run begins anew.")
    return Start(None, None, _record(cfg, None, None))


def _places(cfg: RunConfig) -> list[tuple[str, str]]:
    """The checkpoints in words that every machine can read: output folders, and the checkpoint that
    was asked for, may lie elsewhere on each.
    """
    places = []
    for name in cfg.checkpoints:
        if name == cfg.trainer.resume_from_checkpoint:
            places.append(("asked", name))
        elif Path(name).parent == cfg.output_dir:
            places.append(("output_dir", Path(name).name))
        else:
            places.append(("path", name))
    return places


def _here(cfg: RunConfig, places: list[tuple[str, str]]) -> list[str]:
    """The same on this machine."""
    asked = cfg.trainer.resume_from_checkpoint
    own = {"asked": lambda n: asked if isinstance(asked, str) else n}
    own |= {"output_dir": lambda n: str(cfg.output_dir / n), "path": lambda n: n}
    return [own[kind](name) for kind, name in places]


def _advice(asked: str | bool) -> str:
    if asked is True:
        return (
            "resume_from_checkpoint: true needs an intact checkpoint, and there is none. Leave "
            "the key out to start over."
        )
    others = [
        p
        for p in folder.checkpoints(Path(str(asked)).parent)
        if p != Path(str(asked)) and not manifests.read(p)[1] and (p / folder.MANIFEST).is_file()
    ]
    older = f" ({others[0]} is there)" if others else ""
    return f"Name another checkpoint in resume_from_checkpoint{older}, or leave the key out."


def _examine(path: Path) -> tuple[dict[str, Any] | None, list[str], bool]:
    """The manifest, what is wrong, and whether there is nothing but weights. Collective."""
    here, wrong = manifests.read(path) if path.is_dir() else (None, "the folder is missing")
    seen = from_all((here is not None, wrong, None if here is None else here["step"]))
    if len(set(seen)) > 1:
        # The machines have folders of their own, and not the same in them.
        lines = [f"process {rank} finds {_words(*x)}" for rank, x in enumerate(seen)]
        return None, ["the processes do not find the same there: " + ", ".join(lines)], False
    if wrong is not None:
        return None, [wrong], False
    if here is None:
        return None, *from_main(_examine_old(path))
    names = share_of_files({n: f["size"] for n, f in here["files"].items()})
    problems = manifests.problems_of(path, here["files"], names)
    return here, _together(problems), not here["resumable"]


def _words(there: bool, wrong: str | None, step: int | None) -> str:
    if wrong is not None:
        return wrong
    return f"step {step}" if there else f"no {folder.MANIFEST}"


def _together(problems: list[str]) -> list[str]:
    return list(dict.fromkeys(p for each in from_all(problems) for p in each))


def _examine_old(path: Path) -> tuple[list[str], bool]:
    state = read_state(path)
    if state is not None and state.get("format", 1) > 1:
        return [
            f"{folder.MANIFEST} is missing, and {folder.STATE_FILE} says that there was one"
        ], False
    problems = old.problems_of(path)
    resumable = old.resumable(path)
    return [*problems, *(old.missing_states(path) if resumable else [])], not resumable


def _record(
    cfg: RunConfig, checkpoint: str | None, found: dict[str, Any] | None
) -> folder.RunRecord:
    """The record of the run that begins or goes on. Collective: the first process draws its
    name.
    """
    digest = folder.configuration_digest(cfg)
    before = folder.read_record(cfg.output_dir)
    record = folder.RunRecord(uuid.uuid4().hex[:12], digest, False)
    if checkpoint is not None:
        step, run = folder.step_of(checkpoint), None if found is None else found["run"]
        within = Path(checkpoint).resolve().parent == cfg.output_dir.resolve()
        if within and before is not None:
            later = [p for p in folder.checkpoints(cfg.output_dir) if folder.step_of(p) > step]
            # going back to an earlier checkpoint, by its name, is another run from there
            back = checkpoint == cfg.trainer.resume_from_checkpoint and any(
                before.holds(folder.run_of(p), folder.step_of(p)) for p in later
            )
            if before.holds(run, step) and not back:
                return from_main(dataclasses.replace(before, configuration=digest, finished=False))
        if within:
            older = () if before is None else before.ancestors
            kept = tuple((r, min(at, step)) for r, at in older)
            record = dataclasses.replace(record, ancestors=((run, step), *kept))
    return from_main(record)
