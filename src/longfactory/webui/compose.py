"""A run as it is written on the page: what its keys say, what the page refuses or warns of, and
what the forms are made of. Imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from longfactory.config import load_config
from longfactory.config.arguments import GROUPS
from longfactory.config.fields import HIDDEN, Key, describe, is_secret, keys_of
from longfactory.config.other_keys import ALIASES
from longfactory.config.run import RunConfig
from longfactory.config.show import arithmetic
from longfactory.config.trainer_keys import TRAINER_KEYS
from longfactory.errors import ConfigError, UserError
from longfactory.webui.folders import Folders

Command = Literal["train", "verify", "export", "chat", "eval", "expand"]
COMMANDS: tuple[str, ...] = typing.get_args(Command)
LONGEST = 200_000
"""Characters of a run's YAML."""
MOST_VALUES = 10_000
"""Values in it, with what its anchors repeat."""
MODELS = (
    *("model_name_or_path", "ref_model", "adapter_name_or_path", "ref_model_adapters"),
    "teacher_model",
)
"""Keys that name a folder or what the hub has."""
CODE = ("trust_remote_code", "loss_path")
"""Keys by which a run executes code that is not LongFactory's."""
FORM = (
    *("model_name_or_path", "adapter_name_or_path", "stage", "finetuning_type", "lora_rank"),
    *("dataset", "dataset_dir", "eval_dataset", "template", "cutoff_len", "packing"),
    *("sequence_parallel_size", "sequence_parallel_mode", "nproc_per_node", "memory"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "num_train_epochs", "max_steps", "bf16", "logging_steps"),
    *("save_steps", "output_dir", "export_dir", "report_to"),
)
"""Keys that have a field in the form; all others are found by a word."""


class RefusedError(UserError):
    """A run that this page does not start, though the command would."""


@dataclasses.dataclass(frozen=True)
class Checked:
    """A run's YAML, looked at. `cfg` is None where it cannot be run."""

    cfg: RunConfig | None
    values: dict[str, Any]
    """What was written, for the form; without secrets."""
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    """What the run does beyond computing and writing its files."""

    def as_json(self) -> dict[str, Any]:
        """For the page."""
        cfg = self.cfg
        return {
            "values": self.values,
            "problems": self.problems,
            "warnings": self.warnings,
            "notes": [] if cfg is None else cfg.notes,
            "arithmetic": arithmetic(cfg) if cfg is not None and cfg.trainer.output_dir else [],
        }


def check(path: Path, command: Command, folders: Folders, allow_code: bool) -> Checked:
    """Looks at the YAML of a file as the command's own reader does, and by the page's rules.

    Args:
        path: the file; its name is in messages.
        command: what it is for.
        allow_code: the server was started with --allow_code.
    """
    try:
        written = parse(path.read_text(encoding="utf-8"))
        names = {ALIASES.get(name, name): value for name, value in written.items()}
        refused = list(_refused(names, folders, allow_code))
    except UserError as error:
        return Checked(None, {}, tuple(str(error).splitlines()), ())
    shown = without_secrets(written)
    if refused:
        return Checked(None, shown, tuple(refused), tuple(_warned(names)))
    reads = {"verify": "train", "eval": "chat", "expand": "export"}
    kind: Any = reads.get(command, command)
    words = [str(path)]
    if command == "verify":
        words.append("output_dir=/dev/null/longfactory-verify")
    try:
        cfg = load_config(words, command=kind)
    except ConfigError as error:
        # The file's name is ours, and means nothing on the page.
        told = str(error).replace(str(path), "the run")
        return Checked(None, shown, tuple(told.splitlines()), tuple(_warned(names)))
    # Once more by what was made of it: a key may have been turned into another one.
    values = all_values(cfg)
    if command == "verify":
        values.pop("output_dir", None)
    refused = list(_refused(values, folders, allow_code))
    warned = tuple(dict.fromkeys([*_warned(names), *_warned(values)]))
    return Checked(None if refused else cfg, shown, tuple(refused), warned)


def parse(text: str) -> dict[str, Any]:
    """The mapping in a run's YAML, as it is written: nothing in it is resolved.

    Raises:
        RefusedError: it is too long, or asks for variables of the server.
        ConfigError: it is not valid YAML, or no mapping.
    """
    if len(text) > LONGEST:
        raise RefusedError(f"The run has {len(text)} characters, expected at most {LONGEST}.")
    try:
        found = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"Not valid YAML: {where}{what}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"Not valid YAML: {type(error).__name__}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError("The run holds no keys; a mapping of keys to values is needed.")
    if _count(found) > MOST_VALUES:
        raise RefusedError(
            "The run holds too many values, with what its anchors repeat; expected at most"
            f" {MOST_VALUES}."
        )
    if any("${" in text for text in _texts(found, set())):
        raise RefusedError(
            "The run holds ${...}, which the command replaces by variables of its environment. On"
            " this page that would show the server's: write the value itself."
        )
    return {str(name): value for name, value in found.items()}


def _count(content: Any) -> float:
    """Values in a YAML file, with what its anchors repeat; infinite where one holds itself."""
    counts: dict[int, float] = {}

    def count(value: Any) -> float:
        if not isinstance(value, (dict, list)):
            return 1
        if id(value) not in counts:
            counts[id(value)] = math.inf  # until it is known: met again inside of itself
            inner = value.values() if isinstance(value, dict) else value
            counts[id(value)] = 1 + sum(count(part) for part in inner)
        return counts[id(value)]

    try:
        return count(content)
    except RecursionError:
        return math.inf


def _texts(value: Any, seen: set[int]) -> Iterator[str]:
    """Every text in a value; what an anchor repeats once."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)) and id(value) not in seen:
        seen.add(id(value))
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for part in inner:
            yield from _texts(part, seen)


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """The same keys, as JSON can hold them; values of secrets are not shown."""
    plain = {name: HIDDEN if is_secret(name) and value else value for name, value in values.items()}
    return json.loads(json.dumps(plain, default=str))


def redacted(text: str) -> str:
    """A run's YAML without the values of its secrets."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    for name, value in found.items() if isinstance(found, dict) else ():
        if is_secret(str(name)) and value:
            text = text.replace(str(value), HIDDEN)
    return text


def all_values(cfg: RunConfig) -> dict[str, Any]:
    """Every key of a checked run that was given or has a default."""
    own = {
        name: getattr(getattr(cfg, group), name)
        for group, cls in GROUPS.items()
        for name in keys_of(cls)
    }
    return {**own, **cfg.hf}


def _refused(values: dict[str, Any], folders: Folders, allow_code: bool) -> Iterator[str]:
    """Why the page does not start this run, a sentence each."""
    for name in CODE:
        value = values.get(name)
        if value and str(value).strip().lower() not in ("false", "no", "off", "0", "none"):
            what = "code that comes with the model" if name == CODE[0] else "a file of Python code"
            if not allow_code:
                yield (
                    f"{name}: the run would execute {what}. The page does so only where it was"
                    " started with --allow_code."
                )
    keys = known_keys()
    for name, value in values.items():
        key = keys.get(name)
        if key is None or not key.path:
            continue
        for part in _parts(value):
            try:
                _check_path(name, part, values, folders)
            except UserError as error:
                yield str(error)


def _parts(value: Any) -> list[str]:
    """The texts of a key that takes one or several, comma lists included."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (list, tuple)):
        return [str(part) for part in value]
    return []


def _check_path(name: str, part: str, values: dict[str, Any], folders: Folders) -> None:
    """Raises OutsideError for a path outside of the chosen folders."""
    if part.lstrip().startswith("{"):  # JSON in the place of a file
        return
    if name == "loss_path":
        part = part.rpartition(":")[0] or part
    if name == "dataset_dir" and (part == "ONLINE" or part.startswith("REMOTE:")):
        return
    if name in MODELS and not _is_path(part):
        return
    if name in ("dataset", "eval_dataset"):
        from longfactory.config.data_names import name_is_path

        folder = str(values.get("dataset_dir") or "data")
        if not name_is_path(part) or folder == "ONLINE":
            return
        for place in (Path(part), Path(folder, part)):
            if place.exists():
                folders.inside(place, name)
        if _is_path(part):
            folders.inside(part, name)
        return
    folders.inside(part, name)


def _is_path(name: str) -> bool:
    """Whether a model's or a data set's name means a place on this machine: it is there, or it
    begins as paths do, or has more slashes than a name on the hub.
    """
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _warned(values: dict[str, Any]) -> Iterator[str]:
    """What the user should know before the run is started."""
    if values.get("trust_remote_code"):
        yield "trust_remote_code: the run executes code that comes with the model."
    if values.get("loss_path"):
        yield "loss_path: the run executes that file's code."
    if values.get("push_to_hub") or values.get("export_hub_model_id"):
        yield "The model is uploaded to the hub."
    if values.get("overwrite_output_dir"):
        yield "overwrite_output_dir: results in the output folder are replaced."


# -- forms -----------------------------------------------------------------------------------------


@functools.cache
def known_keys() -> dict[str, Key]:
    """Every key of a run by name."""
    own = {name: key for cls in GROUPS.values() for name, key in keys_of(cls).items()}
    return {**own, **TRAINER_KEYS}


def form_keys() -> list[dict[str, Any]]:
    """Every key with what a form needs: those of the form first."""
    known = known_keys()
    order = [name for name in FORM if name in known]
    order += [name for name in known if name not in order]
    return [_described(known[name], name in FORM) for name in order]


def _described(key: Key, in_form: bool) -> dict[str, Any]:
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    return {
        "name": key.name,
        "help": key.help,
        "kind": describe(key.kind),
        "choices": _choices(key.kind),
        "default": default,
        "secret": is_secret(key.name),
        "form": in_form,
    }


def _choices(kind: Any) -> list[str]:
    """The values of a key that has few; an empty list where any may be written."""
    if kind is bool:
        return ["true", "false"]
    if typing.get_origin(kind) is Literal:
        return [str(x).lower() if isinstance(x, bool) else str(x) for x in typing.get_args(kind)]
    inner = typing.get_args(kind)
    if type(None) in inner and len(inner) == 2:
        return _choices(inner[0] if inner[1] is type(None) else inner[1])
    return []


def recipes(folders: Folders, more: Path | None = None) -> list[dict[str, str]]:
    """YAML files that hold a run: those that come with LongFactory, and those in the chosen
    folders. Name and path each.

    Args:
        more: the folder of those that come with it.
    """
    found: dict[str, str] = {}
    if more is not None and more.is_dir():
        for path in sorted(more.rglob("*.yaml")):
            if _is_run(path):
                found[str(path.resolve())] = str(path.relative_to(more))
    for folder, files in folders.walk():
        for name in files:
            path = folder / name
            if name.endswith((".yaml", ".yml")) and folders.holds(path) and _is_run(path):
                root = next(r for r in folders.roots if r == folder or r in folder.parents)
                found.setdefault(str(path.resolve()), str(path.relative_to(root)))
    return [{"path": path, "name": name} for path, name in found.items()]


def _is_run(path: Path) -> bool:
    """Whether a file is a run of ours: it has a key that each of them has."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST)
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.startswith("model_name_or_path:") for line in text.splitlines())


def data_sets(folder: str, folders: Folders) -> list[str]:
    """Names in the dataset_info.json of a folder; empty where there is none that can be read.

    Raises:
        OutsideError: the folder is not one of the chosen ones.
    """
    path = folders.inside(Path(folder) / "dataset_info.json", "dataset_dir")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [str(name) for name in found] if isinstance(found, dict) else []


def template_names() -> list[str]:
    """Names that the key template takes."""
    from longfactory.data.template_table import TABLE

    return sorted(TABLE)
