"""The output folder before a run: empty, an earlier part of the same run, or another run's.

What is looked at here are names and a few small files, without torch: a wrong key is told within a
second. Whether a checkpoint is whole is found later, by all processes together
(`train/checkpoint/choose.py`), which reads every byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longfactory.config.adapter_facts import trains_adapters
from longfactory.config.read import read_file
from longfactory.config.run import RunConfig
from longfactory.config.show import resolved
from longfactory.errors import ConfigError

RUN_FILE = "longfactory.yaml"
"""Written beside the checkpoints: the resolved run. `longfactory train
<output_dir>/longfactory.yaml` runs it again.
"""

RECORD = "longfactory_run.json"
"""Written beside the checkpoints: which run the folder holds, and whether it came to its end."""

TRAINER_STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint."""

STATE_FILE = "longfactory_state.json"
"""In a checkpoint: what decides which samples a step takes, and what the run has seen. With the
entry `format` there is a manifest beside it.
"""

MANIFEST = "longfactory_manifest.json"
"""What LongFactory writes last into a checkpoint: its files with sizes and checksums."""

COMPLETE = "new-model-"
"""Begins the name of a folder in the output folder: a trained model, complete, whose run was killed
while it was put in place. The next run that trains there puts it in place.
"""

RESULTS = "train_results.json"
"""Of a run that came to its end."""

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_MODEL = (("config.json",), tuple(name for name in WEIGHTS if "adapter" not in name))
"""Of a whole model; transformers loads an adapter beside one onto it."""
IDENTITY = (
    "stage",
    "finetuning_type",
    "model_name_or_path",
    "dataset",
    "template",
    "lora_rank",
    "lora_target",
)
"""Runs that differ in one of these are different runs; the rest (length, learning rate,
sequence_parallel_size) may change on resuming.
"""

RESTARTS = ("LONGFACTORY_ATTEMPT", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that count how often a launcher, ours or torchrun, has started anew."""

REMEDY = "Choose another folder, or set overwrite_output_dir: true."


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Which run an output folder holds."""

    run: str
    """Drawn when a run begins; the manifests of its checkpoints name it."""
    configuration: str
    """`configuration_digest` of the command that began it or went on with it last."""
    finished: bool
    """Whether that command came to its end."""
    ancestors: tuple[tuple[str | None, int], ...] = ()
    """Runs that it went on from, each with the step: None for a checkpoint without a manifest."""

    def holds(self, run: str | None, step: int) -> bool:
        """Whether a checkpoint is of this run or of what it went on from."""
        return run == self.run or any(run == r and step <= at for r, at in self.ancestors)


def read_record(folder: Path) -> RunRecord | None:
    """The record of an output folder; None where there is none that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        ancestors = tuple((run, int(step)) for run, step in found["ancestors"])
        return RunRecord(
            str(found["run"]), str(found["configuration"]), bool(found["finished"]), ancestors
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(folder: Path, record: RunRecord) -> None:
    """Writes the record, whole or not at all. For one process to call."""
    write_whole(folder / RECORD, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place, puts it on the disk and renames it: after a kill or on a full
    disk the old file stays.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def keys_beside(folder: str | Path) -> dict[str, Any]:
    """The keys of the run that wrote a model's or an adapter's folder, or a checkpoint in it; empty
    where they are not there or cannot be read.
    """
    path = Path(folder)
    for place in (path, *([path.parent] if path.name.startswith("checkpoint-") else [])):
        with contextlib.suppress(ConfigError):
            return read_file(place / RUN_FILE)
    return {}


def configuration_digest(cfg: RunConfig) -> str:
    """A hash of a run's keys, as they resolve, and of `resume_from_checkpoint`: the same command
    has the same.
    """
    lines = [x for x in resolved(undecided(cfg)).splitlines() if not x.startswith("#")]
    text = "\n".join([*lines, str(cfg.trainer.resume_from_checkpoint)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def undecided(cfg: RunConfig) -> RunConfig:
    """The run as it was written: keys that have been decided are `auto` again."""
    parallel, data = cfg.parallel, cfg.data
    if "sequence_parallel_size" in cfg.decided:
        parallel = dataclasses.replace(parallel, sequence_parallel_size="auto")
    if "cutoff_len" in cfg.decided:
        data = dataclasses.replace(data, cutoff_len="auto")
    return dataclasses.replace(cfg, parallel=parallel, data=data, decided=())


def last_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-N` with the greatest N that seems to be written to its end, or None."""
    return next((p for p in checkpoints(folder) if _seems_whole(p)), None)


def checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-N` of an output folder, the last one first."""
    found = [
        (int(m[1]), p)
        for p in folder.glob("checkpoint-*")
        if p.is_dir() and (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [p for _, p in sorted(found, reverse=True)]


def step_of(checkpoint: Path | str) -> int:
    """N of `checkpoint-N`, -1 for another name."""
    m = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
    return int(m[1]) if m else -1


def run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; None where it has no manifest that can be read."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["manifest"]["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seems_whole(checkpoint: Path) -> bool:
    return (checkpoint / TRAINER_STATE).is_file()


def find_checkpoints(cfg: RunConfig) -> tuple[tuple[str, ...], list[str]]:
    """Where the run may go on from, as in LLaMA-Factory: what was asked for, else the last
    checkpoint of the output folder.

    `overwrite_output_dir: true` and a folder in `resume_from_checkpoint` say where a run begins.
    The same command started again after it was killed goes on with what it has saved since.

    Returns:
        The checkpoints' folders, the first choice first, the others in case that it is damaged;
        empty where the run begins anew. And notes for the user.
    Raises:
        ConfigError: the checkpoint does not exist, or the folder holds another run.
    """
    asked = cfg.trainer.resume_from_checkpoint
    out = cfg.output_dir
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir: {out} is a file, expected a folder.")
    if cfg.trainer.do_train and _holds_the_model_of(cfg, out):
        raise ConfigError(
            f"output_dir: {out} is the folder that the model is read from. Choose another."
        )
    if cfg.trainer.do_train and trains_adapters(cfg.method) and _saved(out, *_MODEL):
        left = ", ".join(f"{p.name}/" for p in _saved_in(out)[1:])
        raise ConfigError(
            f"output_dir: {out} holds a full model (config.json and its weights"
            f"{', in ' + left if left else ''}), and loading the adapter from there would also load"
            " that model. Choose another folder, or remove the model."
        )
    begun = _begun(cfg, out) if cfg.trainer.do_train else None
    if begun is not None and (own := _candidates(out, begun)):
        notes = [f"The run in {out} was stopped; resuming from {own[0]}. {_anew(cfg)}"]
        if isinstance(asked, str) and str(Path(asked)) not in own:
            own.append(asked)
        return tuple(own), notes
    if asked is False or isinstance(asked, str):
        _refuse_to_replace_an_adapter(cfg, out)
    if isinstance(asked, str):
        if not Path(asked).is_dir():
            raise ConfigError(f"resume_from_checkpoint: there is no folder {asked}.")
        if not _seems_whole(Path(asked)):
            raise ConfigError(
                f"resume_from_checkpoint: {asked} holds no {TRAINER_STATE}, so it is not a "
                "checkpoint. Give a folder checkpoint-<step>; to start from weights only, set "
                "model_name_or_path."
            )
        return (asked,), []
    if not cfg.trainer.do_train or asked is False:
        return (), []
    record = read_record(out)
    found = _candidates(out, record)
    if asked is True and not found:
        raise ConfigError(
            f"resume_from_checkpoint: there is no checkpoint in {out}. Give the folder of one, or"
            " leave the key out."
        )
    if cfg.output.overwrite_output_dir and asked is not True:
        last = last_checkpoint(out)
        if last is None or begun is not None:
            return (), []
        return (), [
            f"{out} still has checkpoints of an earlier run, up to {last.name}. Remove them, "
            "or a later run may resume from them."
        ]
    other = _differences(cfg, out)
    if other:
        remedy = REMEDY
        if cfg.output.overwrite_output_dir:  # and resume_from_checkpoint: true, which goes before
            remedy = "Leave resume_from_checkpoint out to overwrite it, or choose another folder."
        raise ConfigError(f"output_dir: {out} holds another run ({'; '.join(other)}). {remedy}")
    incomplete = [p.name for p in checkpoints(out) if not _seems_whole(p)]
    notes = [
        f"{out}/{name} is incomplete ({TRAINER_STATE} is missing) and will be ignored."
        for name in incomplete
    ]
    if found:
        return tuple(found), [*notes, f"Resuming from {found[0]}. To start over: {REMEDY}"]
    unfinished = _died_at_its_end(out) if record is None else not record.finished
    if _saved(out, WEIGHTS) and not unfinished:
        raise ConfigError(f"output_dir: {out} holds a finished run without checkpoints. {REMEDY}")
    return (), notes


def _holds_the_model_of(cfg: RunConfig, out: Path) -> bool:
    """Whether the run would write into the folder of the model that it reads; of a name on the hub
    that is seen when the model is loaded (`train.output`).
    """
    model = Path(cfg.model.model_name_or_path or "").expanduser()
    return out.is_dir() and model != Path() and model.is_dir() and model.samefile(out)


def _saved_in(out: Path) -> list[Path]:
    """Where a run may have saved its trained model: the output folder, and what a kill has left in
    it complete.
    """
    return [out, *sorted(p for p in out.glob(f"{COMPLETE}*") if p.is_dir())]


def _saved(out: Path, *kinds: Sequence[str]) -> bool:
    """Whether a file of each kind is in the output folder or in what a kill has left in it: one
    that moved a model into its place has moved a part of it.
    """
    places = _saved_in(out)
    return all(any((p / name).is_file() for p in places for name in names) for names in kinds)


def _refuse_to_replace_an_adapter(cfg: RunConfig, out: Path) -> None:
    """Where a run begins without a look at the folder: a whole model that is saved there removes
    the adapter beside it.
    """
    replaces = cfg.trainer.do_train and not trains_adapters(cfg.method)
    if not replaces or cfg.output.overwrite_output_dir:
        return
    if _saved(out, ("adapter_config.json",)):
        raise ConfigError(
            f"output_dir: {out} holds an adapter, which this run's model would replace. {REMEDY}"
        )


def _begun(cfg: RunConfig, out: Path) -> RunRecord | None:
    """The record of the folder, where this same command began its run and did not come to its end.

    `resume_from_checkpoint: false` begins anew at each start but those of the launcher
    (MAX_RESTARTS).
    """
    record = read_record(out)
    if record is None or record.finished or record.configuration != configuration_digest(cfg):
        return None
    restart = any(os.environ.get(name, "") not in ("", "0") for name in RESTARTS)
    return record if restart or cfg.trainer.resume_from_checkpoint is not False else None


def _candidates(out: Path, record: RunRecord | None) -> list[str]:
    """Checkpoints of the run that the folder holds, the last one first; and those that do not say
    any more whose they are, to be named as damaged.
    """
    return [
        str(p)
        for p in checkpoints(out)
        if _seems_whole(p)
        and (record is None or record.holds(run_of(p), step_of(p)) or _lost_its_manifest(p))
    ]


def _lost_its_manifest(checkpoint: Path) -> bool:
    """Whether there was a manifest, and it is gone or cannot be read."""
    if run_of(checkpoint) is not None:
        return False
    if (checkpoint / MANIFEST).is_file():
        return True
    try:
        return "format" in json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _anew(cfg: RunConfig) -> str:
    if cfg.output.overwrite_output_dir or isinstance(cfg.trainer.resume_from_checkpoint, str):
        return "To start over: choose another folder, or set resume_from_checkpoint: false."
    return f"To start over: {REMEDY}"


def _died_at_its_end(out: Path) -> bool:
    """Whether a run that left no record was stopped while it wrote its weights: what comes after
    them is missing.
    """
    return (out / RUN_FILE).is_file() and not (out / RESULTS).is_file()


def _differences(cfg: RunConfig, out: Path) -> list[str]:
    """In what the run that wrote the folder differs from this one; empty where there is none, or
    none that wrote its file.
    """
    path = out / RUN_FILE
    if not path.is_file() or (last_checkpoint(out) is None and not _saved(out, WEIGHTS)):
        return []
    old = read_file(path)
    found = []
    for name in IDENTITY:
        if name.startswith("lora_") and cfg.method.finetuning_type != "lora":
            continue
        new = next(
            (getattr(g, name) for g in (cfg.model, cfg.data, cfg.method) if hasattr(g, name)), None
        )
        if name in old and _plain(old[name]) != _plain(new):
            found.append(f"its {name} is {_words(old[name])}, this run's {_words(new)}")
    return found


def _plain(value: Any) -> Any:
    return sorted(str(v) for v in value) if isinstance(value, (list, tuple)) else value


def _words(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def write(cfg: RunConfig) -> None:
    """Writes the resolved run beside the checkpoints. For one process to call."""
    cfg.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(cfg.output_dir / RUN_FILE, resolved(cfg))
