"""`--dry_run`: whether everything on this machine that a run needs is there and can be read. No
download, no GPU, no weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longfactory.errors import UserError

if TYPE_CHECKING:
    from longfactory.config import RunConfig
    from longfactory.data.kind import Kind
    from longfactory.data.sources import DataSource

ROWS = 20
"""Rows of each data set that are read and tokenised."""


@dataclasses.dataclass
class Found:
    """`problems` would end the run; `unchecked` is what nobody looked at, with the reason. A
    sentence each.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    unchecked: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def problem(self, text: object) -> None:
        if str(text) not in self.problems:
            self.problems.append(str(text))


def look(cfg: RunConfig) -> Found:
    """Looks at the model, its tokenizer, adapters and reference, the data, the template, and the
    folders that are written to.
    """
    found = Found()
    tokenizer = _model(cfg, found)
    _adapters(cfg, found)
    if cfg.method.loss_path is not None:
        _loss(cfg, found)
    if cfg.method.ref_model is not None:
        folder = _folder(cfg, "ref_model", cfg.method.ref_model, found)
        if folder is not None:
            _weights("ref_model", folder, found)
    _data(cfg, tokenizer, found)
    for key, path in _written(cfg):
        _writable(key, path, found)
    return found


def _loss(cfg: RunConfig, found: Found) -> None:
    """Runs the file of `loss_path` and looks at its function."""
    from longfactory.stages.make import make_stage

    try:
        make_stage(cfg.method.stage, cfg.method)
    except UserError as error:
        found.problem(error)


def _folder(cfg: RunConfig, key: str, name: str, found: Found) -> Path | None:
    """The folder of a model or an adapter: of that path, or the hub's snapshot in the cache; None
    where there is neither.
    """
    from longfactory.model.load import looks_local

    path = Path(name).expanduser()
    if path.exists() or looks_local(name):
        if path.is_dir():
            return path
        found.problem(
            f"{key}: {name} is a file; a folder is needed."
            if path.exists()
            else f"{key}: the folder {name} does not exist."
        )
        return None
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        revision = cfg.model.model_revision if key == "model_name_or_path" else None
        try:
            cached = try_to_load_from_cache(
                name, file, cache_dir=cfg.model.cache_dir, revision=revision
            )
        except ValueError:  # of huggingface_hub: not what a name on the hub can be
            found.problem(
                f"{key}: there is no folder {name}, and it cannot be a name on the hub either."
            )
            return None
        if isinstance(cached, str):
            found.unchecked.append(
                f"{key}: {name} was checked in this machine's cache, not on the hub."
            )
            return Path(cached).parent
    found.unchecked.append(
        f"{key}: there is no folder {name}; whether the hub has a model of this name was not"
        " looked up."
    )
    return None


def _model(cfg: RunConfig, found: Found) -> Any:
    """Looks at configuration, class, weights and tokenizer of the model. Returns the tokenizer, or
    None.
    """
    from longfactory.model import load

    name = cfg.model.model_name_or_path or ""
    model = cfg.model
    if name.lower() != load.EMBEDDED:
        folder = _folder(cfg, "model_name_or_path", name, found)
        if folder is None:
            return None
        model = dataclasses.replace(model, model_name_or_path=str(folder))
        if (folder / "config.json").is_file() and not model.train_from_scratch:
            _weights("model_name_or_path", folder, found)
    try:
        config = load.load_config(model, cfg.known_cutoff_len)
        load.empty_model(model, config)
    except UserError as error:
        found.problem(error)
    try:
        return load.load_tokenizer(model)
    except UserError as error:
        found.problem(error)
        return None


def _weights(key: str, folder: Path, found: Found) -> None:
    """Whether the files of a model's weights are there and whole, all that its index names."""
    from longfactory.model import damaged

    if (wrong := damaged.found(folder)) is not None:
        found.problem(f"{key}: {wrong}")


def _adapters(cfg: RunConfig, found: Found) -> None:
    from longfactory.model import damaged

    for key, names in (
        ("adapter_name_or_path", cfg.model.adapter_name_or_path),
        ("ref_model_adapters", cfg.method.ref_model_adapters),
    ):
        for name in names:
            folder = _folder(cfg, key, name, found)
            if folder is None:
                continue
            try:
                kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))[
                    "peft_type"
                ]
            except FileNotFoundError:
                found.problem(
                    f"{key}: {name} holds no adapter_config.json. It should be a folder that PEFT"
                    " saved."
                )
                continue
            except (ValueError, KeyError, TypeError):
                found.problem(f"{key}: the adapter_config.json of {name} is not valid.")
                continue
            if kind != "LORA":
                found.problem(f"{key}: {name} holds an adapter of type {kind}; LORA is supported.")
            if (wrong := damaged.found(folder, damaged.ADAPTER)) is not None:
                found.problem(f"{key}: {wrong}")


def _data(cfg: RunConfig, tokenizer: Any, found: Found) -> None:
    """Looks at the template, the entries of dataset_info.json, their files and their first rows."""
    from longfactory.data import module, saved
    from longfactory.errors import DataError

    options, stage = cfg.data_options(), cfg.method.stage
    template = None
    try:
        template = _template(cfg, options, tokenizer, found)
    except DataError as error:
        found.problem(error)
        tokenizer = None
    kind = module.kind_of(stage)
    if saved.is_saved(cfg.data.tokenized_path):
        try:
            saved.load(Path(str(cfg.data.tokenized_path)), kind, module.cache_root())
        except UserError as error:
            found.problem(error)
        return
    reader = Reader(cfg, options, kind, template, tokenizer, found)
    names = (*cfg.data.dataset, *cfg.data.eval_dataset)
    for name in dict.fromkeys(names):
        try:
            questions = bool(options.do_predict) and name not in cfg.data.dataset
            _data_set(name, questions, reader)
        except DataError as error:
            found.problem(error)
    if names:
        found.unchecked.append(
            f"Rows beyond the first {ROWS} of each data set; they are read when the run starts."
        )


def _template(cfg: RunConfig, options: Any, tokenizer: Any, found: Found) -> Any:
    from longfactory.data import templates

    if cfg.method.stage == "pt" and cfg.data.template is None:
        return None
    quiet = logging.getLogger("longfactory.dry_run")
    quiet.setLevel(logging.ERROR)
    if tokenizer is not None:
        return templates.get_template(options, tokenizer, quiet)
    if cfg.data.template is not None:
        templates.named(options, quiet)
    found.unchecked.append("Tokenisation of the first rows: the tokenizer is not on this machine.")
    return None


@dataclasses.dataclass(frozen=True)
class Reader:
    """What the first rows of the run's data sets are read with.

    Attributes:
        kind: of samples that the stage learns from.
        template, tokenizer: None where they are not known; rows are then parsed alone.
        found: gets notes, and what could not be checked.
    """

    cfg: RunConfig
    options: Any
    kind: Kind
    template: Any
    tokenizer: Any
    found: Found


def _data_set(name: str, questions: bool, reader: Reader) -> None:
    """Raises DataError for what is wrong with one name of `dataset`.

    Args:
        questions: answers may be missing: it is for do_predict.
    """
    from longfactory.data.sources import read_sources

    folder, found = reader.cfg.data.dataset_dir, reader.found
    if folder == "ONLINE" or folder.startswith("REMOTE:"):
        found.unchecked.append(
            f"Data set {name!r} is on the hub (dataset_dir: {folder}) and was not looked up."
        )
        return
    for source in read_sources([name], folder, found.notes.append):
        _source(source, questions, reader)


def _source(source: DataSource, questions: bool, reader: Reader) -> None:
    """The same, of one data set of it."""
    from longfactory.data import module
    from longfactory.data.errors import BadRow
    from longfactory.data.readers import parse_line, read
    from longfactory.data.tokens import PieceTokenizer
    from longfactory.errors import DataError
    from longfactory.model import load

    name, cfg, options, found = source.name, reader.cfg, reader.options, reader.found
    kind, tokenizer = reader.kind, reader.tokenizer
    kind.check_source(source, cfg.method.stage)
    if source.load_from != "file":
        where = "the hub" if source.load_from == "hub" else "another machine"
        found.unchecked.append(f"Data set {name!r} is on {where} ({source.location}).")
        return
    source.files()
    rows = list(islice(read(source), ROWS))
    if not rows:
        raise DataError(f"Data set {name!r} has no rows.")
    if tokenizer is None:
        for place, raw in rows:
            try:
                if isinstance(raw, BadRow):
                    raise raw
                if isinstance(raw, bytes):
                    parse_line(raw)
            except BadRow as error:
                raise DataError(f"Data set {name!r}, {place}: {error}.") from None
        return
    media = load.load_media(cfg.model, options, tokenizer)
    preparer = module.make_preparer(
        source, options, kind, reader.template, PieceTokenizer(tokenizer), questions, media
    )
    bad = preparer.chunk([(i, place, raw) for i, (place, raw) in enumerate(rows)]).bad
    if bad.count == len(rows):
        place, reason = bad.places[0]
        more = f" {bad.hint}" if bad.hint else ""
        raise DataError(
            f"Data set {name!r}: none of its first {len(rows)} rows can be used. First: {place}:"
            f" {reason}.{more}"
        )
    if bad.count:
        found.notes.append(f"Data set {name!r}, first {len(rows)} rows: {bad.describe()}")


def _written(cfg: RunConfig) -> Iterator[tuple[str, Path]]:
    """The folders that the run makes or writes into."""
    from longfactory.data import saved
    from longfactory.data.module import cache_root

    yield "output_dir", cfg.output_dir
    yield "LONGFACTORY_CACHE", cache_root()
    if cfg.data.tokenized_path is not None and not saved.is_saved(cfg.data.tokenized_path):
        yield "tokenized_path", Path(cfg.data.tokenized_path)
    if cfg.output.logging_dir is not None:
        yield "logging_dir", Path(cfg.output.logging_dir)


def _writable(key: str, path: Path, found: Found) -> None:
    try:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as error:
        found.problem(f"{key}: {path} cannot be used: {error.strerror or error}.")
        return
    if not there.is_dir():
        found.problem(f"{key}: {path} cannot be made: {there} is a file.")
    elif not os.access(there, os.W_OK | os.X_OK):
        found.problem(
            f"{key}: {path} cannot be written: there is no permission to write into {there}."
        )
