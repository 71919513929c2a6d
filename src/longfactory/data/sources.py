"""Data sets by name: dataset_info.json, with LLaMA-Factory's keys."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from longfactory import hub
from longfactory.config.data_names import FILE_TYPES, name_is_path
from longfactory.config.fields import plain, whole_path
from longfactory.data.on_disk import saved_files
from longfactory.errors import DataError

COLUMNS = [
    *("prompt", "query", "response", "history", "messages", "system", "tools"),
    *("images", "videos", "audios", "chosen", "rejected", "kto_tag"),
]
TAGS = [
    "role_tag",
    "content_tag",
    "user_tag",
    "assistant_tag",
    "observation_tag",
    "function_tag",
    "system_tag",
]
_TEXTS = (
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "cloud_file_name",
    "file_name",
    "formatting",
    "subset",
    "split",
    "folder",
)
_FLAGS = ("ranking", "openai_quirks")
_KNOWN = {*_TEXTS, *_FLAGS, "num_samples", "columns", "tags", "file_sha1"}


@dataclasses.dataclass(frozen=True)
class DataSource:
    """Where a data set is and how its rows are written. Columns and tags that a data set does not
    have are None.

    `openai_quirks` (a key of our own) asks for what LLaMA-Factory 0.9.5 does to rows in the openai
    format: it adds "detailed thinking off" to the system text of rows without tools, and writes
    arguments that are JSON strings as strings.
    """

    name: str
    load_from: Literal["file", "hub", "cloud"]
    location: str
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    images: str | None = None
    videos: str | None = None
    audios: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"
    openai_quirks: bool = False
    dataset_dir: str = ""

    def files(self) -> list[Path]:
        """The local files, in order of name; of a folder of datasets' `save_to_disk`, in its order.

        Raises:
            DataError: no such file, an empty folder, a file type that is not known, or files of
                several types.
        """
        path = Path(self.dataset_dir, self.location)
        try:
            if path.is_dir():
                if (saved := saved_files(path, self.split, self.name)) is not None:
                    return saved
                files = (p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
                found = sorted(files)
            elif path.is_file():
                found = [path]
            else:
                raise DataError(
                    f"Data set {self.name!r}: {path} does not exist. Check file_name in"
                    " dataset_info.json and dataset_dir."
                )
        except OSError as error:
            raise DataError(
                f"Data set {self.name!r}: file_name cannot be read: {error.strerror or error}"
                f" ({whole_path(path)})."
            ) from error
        kinds = {p: FILE_TYPES.get(p.suffix[1:].lower()) for p in found}
        other = [p.name for p, kind in kinds.items() if kind is None]
        if len(other) == len(found):
            raise DataError(
                f"Data set {self.name!r}: {path} holds no file of a known type"
                f" ({', '.join(FILE_TYPES)})."
            )
        if other:
            raise DataError(
                f"Data set {self.name!r}: of the folder {path}, {other[0]} is of no known type"
                f" ({', '.join(FILE_TYPES)}). Keep files of rows alone in it."
            )
        if len(set(kinds.values())) > 1:
            raise DataError(
                f"Data set {self.name!r}: the folder {path} mixes file types ({found[0].name},"
                f" {found[-1].name}); keep one type in a folder."
            )
        return found


# Names that columns of files that are no data set of LLaMA-Factory's go by.
_PROMPTS = ("instruction", "prompt", "question", "query", "input")
_RESPONSES = ("output", "response", "completion", "answer")
_MESSAGES = ("messages", "conversations", "conversation", "dialogue", "chat")
_LABELS = ("kto_tag", "label")
_OPENAI_TAGS = dict(
    zip(TAGS, ("role", "content", "user", "assistant", "tool", "function", "system"), strict=True)
)


def detect(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry of dataset_info.json (without the file) that rows like these need; None where their
    form is not known.

    Forms, by the columns of the rows: messages with role and content (openai) or with from and
    value (sharegpt), prompts with answers (alpaca), texts. Two answers named chosen and rejected
    make a preference pair, true or false in label makes KTO.
    """
    seen: dict[str, Any] = {}
    for row in rows:
        seen |= {k: v for k, v in row.items() if v not in (None, "", []) and k not in seen}
    for column in _MESSAGES:
        messages = parsed(seen.get(column))
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict):
            entry = _detect_messages(
                column,
                first,
                [m for row in rows for m in _listed(row.get(column)) if isinstance(m, dict)],
            )
            return None if entry is None else _with_answers(entry, seen, (dict, list))
    for suffix in ("", "_messages"):  # the second: as LLaMA-Factory's v1 names them
        columns = {c: c + suffix for c in ("chosen", "rejected")}
        ends = [parsed(seen.get(c)) for c in columns.values()]
        if not all(
            isinstance(p, list) and p and isinstance(p[0], dict) and "role" in p[0] for p in ends
        ):
            continue
        # whole conversations, which begin with the same messages
        columns |= {c: c for c in ("system", "tools") if c in seen}
        return {
            "formatting": "openai",
            "ranking": True,
            "columns": columns,
            "tags": dict(_OPENAI_TAGS),
        }
    prompt = next((c for c in _PROMPTS if isinstance(seen.get(c), str)), None)
    columns = {}
    if prompt is not None:
        columns["prompt"] = prompt
        if prompt != "input" and isinstance(seen.get("input"), str):
            columns["query"] = "input"
        pair = all(isinstance(seen.get(c), str) for c in ("chosen", "rejected"))
        # Questions for do_predict have an answer that is empty, or none.
        response = next(
            (
                c
                for c in _RESPONSES
                if isinstance(seen.get(c), str) or (c not in seen and any(c in row for row in rows))
            ),
            None,
        )
        if not pair and response is None and prompt not in ("instruction", "question"):
            return None
        if not pair and response is not None:
            columns["response"] = response
        if isinstance(parsed(seen.get("history")), list):
            columns["history"] = "history"
        return _with_answers({"columns": columns}, seen, (str,))
    text = next((c for c in ("text", "content") if isinstance(seen.get(c), str)), None)
    return None if text is None else {"columns": {"prompt": text}}


def _listed(value: Any) -> list[Any]:
    """A list, be it written as JSON; anything else is an empty one."""
    found = parsed(value)
    return found if isinstance(found, list) else []


def _detect_messages(
    column: str, first: dict[str, Any], messages: list[dict[str, Any]]
) -> dict[str, Any] | None:
    if "role" in first:
        return {"formatting": "openai", "columns": {"messages": column}, "tags": dict(_OPENAI_TAGS)}
    if "from" not in first or "value" not in first:
        return None
    entry: dict[str, Any] = {"formatting": "sharegpt", "columns": {"messages": column}}
    roles = {m.get("from") for m in messages if isinstance(m.get("from"), str)}
    users, assistants = (
        [r for r in ("human", "user") if r in roles],
        [r for r in ("gpt", "assistant") if r in roles],
    )
    if users != ["human"] or assistants not in (["gpt"], []):
        entry["tags"] = {
            "role_tag": "from",
            "content_tag": "value",
            "user_tag": (users or ["human"])[0],
            "assistant_tag": (assistants or ["gpt"])[0],
            "observation_tag": "tool" if "tool" in roles else "observation",
            "function_tag": "function_call",
            "system_tag": "system",
        }
    return entry


def _with_answers(
    entry: dict[str, Any], seen: dict[str, Any], kinds: tuple[type, ...]
) -> dict[str, Any]:
    columns = entry["columns"]
    columns |= {c: c for c in ("system", "tools") if c in seen}
    if all(isinstance(parsed(seen.get(c)), kinds) for c in ("chosen", "rejected")):
        return entry | {
            "ranking": True,
            "columns": columns | {"chosen": "chosen", "rejected": "rejected"},
        }
    label = next(
        (
            c
            for c in _LABELS
            if isinstance(seen.get(c), bool) or str(seen.get(c)).lower() in ("true", "false")
        ),
        None,
    )
    if label is not None:
        columns["kto_tag"] = label
    return entry


def parsed(value: Any) -> Any:
    """A list or an object that stands in its column as a JSON string (as csv files have them),
    read; any other value as it is.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def hint(source: DataSource, row: dict[str, Any]) -> str:
    """What to write into dataset_info.json where a row is not in the form that its entry says; else
    nothing.
    """
    read = [source.prompt, source.query] if source.formatting == "alpaca" else [source.messages]
    if any(column and column in row for column in read) and (
        source.formatting == "alpaca" or _tagged(source, row)
    ):
        return ""
    entry = detect([row])
    if entry is None:
        return ""
    form = entry.get("formatting", "alpaca")
    return (
        f"The row looks like {form}: give the data set these lines in dataset_info.json:"
        f" {json.dumps(entry, ensure_ascii=False)[1:-1]}"
    )


def _tagged(source: DataSource, row: dict[str, Any]) -> bool:
    """Whether the first message of a row has the fields that the tags name."""
    messages = parsed(row.get(source.messages or ""))
    first = messages[0] if isinstance(messages, list) and messages else None
    return not isinstance(first, dict) or source.role_tag in first


def read_sources(
    dataset_names: list[str], dataset_dir: str | dict[str, Any], warn: Any = lambda text: None
) -> list[DataSource]:
    """The sources of these data sets.

    `dataset_dir` is a folder that holds dataset_info.json, "ONLINE" (a name is a hub id),
    "REMOTE:<hub data set>", or the parsed dictionary itself. A name may also be the path of a file
    (or of a folder of files), seen from here or from `dataset_dir`: its form is that of its first
    rows, and `warn` is told the entry of dataset_info.json that says the same.

    Raises:
        DataError: dataset_info.json is missing or broken, or does not define a name.
    """
    if not dataset_names:
        return []
    if dataset_dir == "ONLINE":
        return [DataSource(name, "hub", name) for name in dataset_names]
    folder = ""
    path = Path()
    remote = None
    if isinstance(dataset_dir, dict):
        info = dataset_dir
    else:
        if dataset_dir.startswith("REMOTE:"):
            remote = dataset_dir[7:]
            path = Path(_from_hub(remote, "dataset_info.json"))
        else:
            folder = dataset_dir
            path = Path(dataset_dir, "dataset_info.json")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            if remote is not None:
                raise DataError(f"{path} does not exist.") from None
            if not all(_is_file(name, folder) for name in dataset_names):
                missing = next(name for name in dataset_names if not _is_file(name, folder))
                also = f", and {missing!r} is no file" if name_is_path(missing) else ""
                raise DataError(
                    f"{path} does not exist{also}. Point dataset_dir at the folder that holds"
                    " dataset_info.json."
                ) from None
            info = {}
        except OSError as e:
            raise DataError(f"{path} cannot be read: {e.strerror or e}.") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise DataError(f"{path} is not valid JSON: {e}.") from None
        if not isinstance(info, dict):
            raise DataError(
                f"{path} holds a {type(info).__name__}; a mapping of names to data sets is needed."
            )
    if remote is not None:
        return [_of_remote(_source(name, info, "", warn), remote) for name in dataset_names]
    sources: list[DataSource] = []
    for name in dataset_names:
        if name in info or not _is_file(name, folder):
            sources.append(_source(name, info, folder, warn))
        elif name.endswith((".yaml", ".yml")):
            sources += _described(name, folder, warn)
        else:
            sources.append(_source_of_file(name, folder, warn))
    return sources


_MEDIA = {"images": "images", "videos": "videos", "audios": "audios"}
_CONVERTERS: dict[str, dict[str, Any]] = {
    "alpaca": {
        "columns": {
            **{"prompt": "instruction", "query": "input", "response": "output"},
            **{"system": "system", **_MEDIA},
        }
    },
    "sharegpt": {
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "tools": "tools", **_MEDIA},
    },
    "pair": {
        "formatting": "openai",
        "ranking": True,
        "columns": {"chosen": "chosen", "rejected": "rejected", "tools": "tools", **_MEDIA},
    },
}
"""Of LLaMA-Factory's v1, the forms of rows -> the entry of dataset_info.json that says the same."""


def _described(name: str, folder: str, warn: Any) -> list[DataSource]:
    """The data sets of a YAML file of LLaMA-Factory's v1: names with path, source, converter, ...

    Raises:
        DataError: the file is broken, or asks for what there is not.
    """
    where = Path(name) if Path(name).exists() else Path(folder, name)
    try:
        read = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{name} cannot be read as YAML: {plain(str(error))}.") from None
    if not isinstance(read, dict) or not read:
        raise DataError(f"{name}: expected data sets, each a name with path and converter.")
    sources = []
    for title, entry in read.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise DataError(f"{name}: {plain(title)} has no path.")
        for key in ("weight", "streaming"):
            if entry.get(key):
                warn(f"{name}: {key} of {title} has no effect: use interleave_probs, streaming.")
        for key in entry.keys() - {
            *("path", "source", "converter", "split", "subset", "size", "weight", "streaming"),
        }:
            warn(f"{name}: the key {key!r} of {title} is not known and has no effect.")
        local = entry.get("source", "hf_hub") == "local"
        path = entry["path"]
        converter = entry.get("converter")
        if converter is None and local:
            place = path if Path(path).exists() else os.fspath(where.parent / Path(path).name)
            found = _source_of_file(place, "", warn)
            sources.append(dataclasses.replace(found, num_samples=entry.get("size")))
            continue
        if converter not in _CONVERTERS:
            raise DataError(
                f"{name}: converter of {title} is {plain(str(converter))}; known are"
                f" {', '.join(_CONVERTERS)}."
            )
        same = {"split": entry.get("split"), "subset": entry.get("subset")}
        as_here = {
            **_CONVERTERS[converter],
            **same,
            "num_samples": entry.get("size"),
            "file_name" if local else "hf_hub_url": path,
        }
        if local and not Path(path).exists():
            as_here["file_name"] = os.fspath(where.parent / Path(path).name)
        sources.append(_source(str(title), {str(title): as_here}, "", warn))
    return sources


def _from_hub(repository: str, name: str) -> str:
    """The path, in the hub's cache, of a file of a data set on the hub.

    Raises:
        DataError: it is not there, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    away = hub.unreachable()  # then its cache alone is asked, without waiting
    try:
        return hf_hub_download(
            repo_id=repository, filename=name, repo_type="dataset", local_files_only=bool(away)
        )
    except (OSError, ValueError) as e:
        raise DataError(
            f"dataset_dir: REMOTE:{repository}: no {name} could be read from the hub ({away or e})."
        ) from e


FAR = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oss")
"""Protocols of other machines: what a dataset_info.json from the hub may name."""


def _of_remote(source: DataSource, repository: str) -> DataSource:
    """A source of a dataset_info.json that came from the hub: a stranger's file, which names data
    on the hub and on other machines, and files beside it, and nothing of this machine.

    Raises:
        DataError: it names a path of this machine.
    """
    where = source.location
    begin = f"Data set {source.name!r} of REMOTE:{repository}"
    if source.load_from == "file":
        parts = where.replace("\\", "/").split("/")
        if where.startswith(("/", "~")) or ":" in where or ".." in parts:
            raise DataError(
                f"{begin} names the file {where!r}, outside of the folder of its"
                " dataset_info.json. Copy the data here, and give a dataset_dir of your own."
            )
        return dataclasses.replace(source, location=_from_hub(repository, where))
    if source.load_from == "cloud":
        protocols = [link.partition("://")[0] for link in where.split("::")]
        if not all("://" in link for link in where.split("::")) or not set(protocols) <= set(FAR):
            raise DataError(
                f"{begin} names {where!r}, which is not on another machine ({', '.join(FAR)})."
                " Give a dataset_dir of your own."
            )
    elif Path(where).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where):
        raise DataError(
            f"{begin} names {where!r} as a data set of the hub, which is a path of this machine or"
            " no name. Give a dataset_dir of your own."
        )
    return source


def _is_file(name: str, folder: str) -> bool:
    """Whether a data set's name is the path of a file or a folder of files."""
    return name_is_path(name) and (Path(name).exists() or Path(folder, name).exists())


def _source_of_file(name: str, folder: str, warn: Any) -> DataSource:
    """The source of a file that is named by its path."""
    from longfactory.data.readers import first_rows

    where = Path(name) if Path(name).exists() else Path(folder, name)
    bare = DataSource(name=name, load_from="file", location=os.fspath(where.resolve()))
    rows = first_rows(bare)
    entry = detect(rows)
    if entry is None:
        found = ", ".join(repr(c) for c in dict.fromkeys(c for row in rows for c in row)) or "none"
        raise DataError(
            f"The format of {name} cannot be inferred from its first rows (columns: {found}). "
            "Describe it in dataset_info.json: formatting, columns, tags."
        )
    entry = {"file_name": bare.location} | entry
    warn(
        f"{name} is read as {entry.get('formatting', 'alpaca')}, judging by its first rows. "
        "The matching entry in dataset_info.json: "
        + json.dumps({where.stem: entry}, ensure_ascii=False)[1:-1]
    )
    return _source(name, {name: entry}, "", warn)


def _source(name: str, info: dict[str, Any], folder: str, warn: Any) -> DataSource:
    if name not in info:
        near = difflib.get_close_matches(name, info, n=1)
        also = " and is no file" if name_is_path(name) else ""
        raise DataError(
            f"Data set {name!r} is not in dataset_info.json{also}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    entry: dict[str, Any] = info[name]
    wrong = next(
        (
            k
            for k in ("columns", "tags")
            if isinstance(entry, dict) and not isinstance(entry.get(k, {}), (dict, type(None)))
        ),
        None,
    )
    if not isinstance(entry, dict) or wrong:
        where = f"{wrong} of data set {name!r}" if wrong else f"data set {name!r}"
        raise DataError(
            f"dataset_info.json: {where} is not a mapping. It looks like "
            + '{"file_name": "x.json", "columns": {...}}.'
        )
    _check_values(name, entry)
    for key in entry.keys() - _KNOWN:
        warn(
            f"Data set {name!r}: the key {key!r} of dataset_info.json is not known and has no"
            " effect."
        )
    load_from: Literal["file", "hub", "cloud"] = "file"
    entry = {k: v for k, v in entry.items() if v is not None}
    if "hf_hub_url" in entry:
        load_from, location = "hub", entry["hf_hub_url"]
    elif "ms_hub_url" in entry or "om_hub_url" in entry:
        raise DataError(
            f"Data set {name!r} is on ModelScope or openMind only. Download it and give its"
            " file_name, or give hf_hub_url."
        )
    elif "script_url" in entry:
        raise DataError(
            f"Data set {name!r} is a loading script; scripts are no longer run. Save its rows as"
            " json or parquet."
        )
    elif "cloud_file_name" in entry:
        load_from, location = "cloud", entry["cloud_file_name"]
    elif "file_name" in entry:
        location = entry["file_name"]
    else:
        found = f" Its keys are {', '.join(entry)}." if entry else ""
        raise DataError(
            f"Data set {name!r} has neither file_name nor hf_hub_url in dataset_info.json.{found}"
        )
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(
            f"Data set {name!r}: formatting is {formatting!r}; known are alpaca, sharegpt, openai."
        )
    fields: dict[str, Any] = {
        k: entry[k] for k in ("subset", "folder", "num_samples", "openai_quirks") if k in entry
    }
    fields |= {
        "ranking": bool(entry.get("ranking", False)),
        "split": entry.get("split") or "train",
        "formatting": formatting,
    }
    # As in LLaMA-Factory, naming one column (or tag) unsets all others: a file is described wholly
    # or not at all.
    for group, keys in (("columns", COLUMNS), ("tags", TAGS)):
        if group in entry:
            given = entry[group]
            for key in given.keys() - set(keys):
                warn(f"Data set {name!r}: {group} has no {key!r}; known are {', '.join(keys)}.")
            fields |= {k: given.get(k) for k in keys}
    if formatting == "openai":
        if "tags" not in entry:
            roles = ("role", "content", "user", "assistant", "tool", "function", "system")
            fields |= dict(zip(TAGS, roles, strict=True))
        if "columns" not in entry:
            fields |= {"messages": "messages", "tools": "tools"}
    source = DataSource(
        name=name, load_from=load_from, location=location, dataset_dir=os.fspath(folder), **fields
    )
    _warn_unset(source, entry, warn)
    return source


def _check_values(name: str, entry: dict[str, Any]) -> None:
    """Raises DataError where a value of an entry is of the wrong kind. null stands for a key that
    is not given.
    """

    def check(key: str, value: Any, right: bool, need: str) -> None:
        if value is not None and not right:
            raise DataError(
                f"dataset_info.json: {key} of data set {name!r} must be {need}; found"
                f" {plain(json.dumps(value, ensure_ascii=False))}."
            )

    for key in _TEXTS:
        value = entry.get(key)
        check(key, value, isinstance(value, str) and value.strip() != "", "a text")
    for key in _FLAGS:
        check(key, entry.get(key), isinstance(entry.get(key), bool), "true or false")
    count = entry.get("num_samples")
    check(
        "num_samples",
        count,
        isinstance(count, int) and not isinstance(count, bool) and 0 < count <= 10**12,
        "a whole number of at least 1",
    )
    for group in ("columns", "tags"):
        for key, value in (entry.get(group) or {}).items():
            check(
                f"{group}: {key}",
                value,
                isinstance(value, str),
                "the name of one column, a text" if group == "columns" else "a text",
            )


def _warn_unset(source: DataSource, entry: dict[str, Any], warn: Any) -> None:
    if "columns" in entry:
        need = ["prompt"] if source.formatting == "alpaca" else ["messages"]
        if source.formatting == "alpaca" and not source.ranking and not source.response:
            warn(
                f"Data set {source.name!r}: columns names no response, so its rows have no answer"
                " (right for pre-training only)."
            )
        if source.formatting == "openai" and source.ranking and source.chosen and source.rejected:
            need = []  # pairs of whole conversations
        for key in need:
            if getattr(source, key) is None:
                warn(
                    f"Data set {source.name!r}: columns is given without {key!r}, which is "
                    "therefore not used. Name every column that is used."
                )
    if "tags" in entry and source.formatting != "alpaca":
        for key in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
            if getattr(source, key) is None:
                warn(
                    f"Data set {source.name!r}: tags is given without {key!r}, which is "
                    "therefore not used. Name every tag that is used."
                )
