"""Data sets by name: dataset_info.json, with LLaMA-Factory's keys."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any, Literal

from longfactory import hub
from longfactory.data.errors import DataError

COLUMNS = [
    *("prompt", "query", "response", "history", "messages", "system", "tools"),
    *("images", "videos", "audios", "chosen", "rejected", "kto_tag"),
]
TAGS = ["role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"]
FILE_TYPES = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow", "txt": "text"}
_KNOWN = {
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking", "subset"),
    *("split", "folder", "num_samples", "columns", "tags", "file_sha1", "openai_quirks"),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set is and how its rows are written. Columns and tags that a data set does not have are None.

    `openai_quirks` (a key of our own) asks for what LLaMA-Factory 0.9.5 does to rows in the openai format: it adds "detailed thinking
    off" to the system text of rows without tools, and writes arguments that are JSON strings as strings.
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
        """The local files, in order of name.

        Raises:
            DataError: no such file, an empty folder, a file type that is not known, or files of several types.
        """
        path = Path(self.dataset_dir, self.location)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        elif path.is_file():
            found = [path]
        else:
            raise DataError(f"Data set {self.name!r}: {path} does not exist. Check file_name in dataset_info.json and dataset_dir.")
        kinds = {FILE_TYPES.get(p.suffix[1:].lower()) for p in found}
        if not found or None in kinds:
            raise DataError(f"Data set {self.name!r}: {path} holds no file of a known type ({', '.join(FILE_TYPES)}).")
        if len(kinds) > 1:
            raise DataError(f"Data set {self.name!r}: the folder {path} mixes file types; keep one type in a folder.")
        return found


def read_sources(dataset_names: list[str], dataset_dir: str | dict[str, Any], warn: Any = lambda text: None) -> list[Source]:
    """The sources of these data sets.

    `dataset_dir` is a folder that holds dataset_info.json, "ONLINE" (a name is a hub id), "REMOTE:<hub data set>", or the parsed
    dictionary itself.

    Raises:
        DataError: dataset_info.json is missing or broken, or does not define a name.
    """
    if not dataset_names:
        return []
    if dataset_dir == "ONLINE":
        return [Source(name, "hub", name) for name in dataset_names]
    folder = ""
    if isinstance(dataset_dir, dict):
        info = dataset_dir
    else:
        if dataset_dir.startswith("REMOTE:"):
            from huggingface_hub import hf_hub_download

            away = hub.unreachable()  # then its cache alone is asked, without waiting
            try:
                path = Path(
                    hf_hub_download(repo_id=dataset_dir[7:], filename="dataset_info.json", repo_type="dataset", local_files_only=bool(away))
                )
            except (OSError, ValueError) as e:
                raise DataError(f"dataset_dir: {dataset_dir}: no dataset_info.json could be read from the hub ({away or e}).") from e
        else:
            folder = dataset_dir
            path = Path(dataset_dir, "dataset_info.json")
        try:
            info = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path} does not exist. Point dataset_dir at the folder that holds dataset_info.json.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise DataError(f"{path} is not valid JSON: {e}.") from None
        if not isinstance(info, dict):
            raise DataError(f"{path} holds a {type(info).__name__}; a mapping of names to data sets is needed.")
    return [_source(name, info, folder, warn) for name in dataset_names]


def _source(name: str, info: dict[str, Any], folder: str, warn: Any) -> Source:
    if name not in info:
        near = difflib.get_close_matches(name, info, n=1)
        raise DataError(f"Data set {name!r} is not in dataset_info.json." + (f" Did you mean {near[0]!r}?" if near else ""))
    entry: dict[str, Any] = info[name]
    wrong = next((k for k in ("columns", "tags") if isinstance(entry, dict) and not isinstance(entry.get(k, {}), dict)), None)
    if not isinstance(entry, dict) or wrong:
        where = f"{wrong} of data set {name!r}" if wrong else f"data set {name!r}"
        raise DataError(f"dataset_info.json: {where} is not a mapping. It looks like " + '{"file_name": "x.json", "columns": {...}}.')
    for key in entry.keys() - _KNOWN:
        warn(f"Data set {name!r}: the key {key!r} of dataset_info.json is not known and has no effect.")
    load_from: Literal["file", "hub", "cloud"] = "file"
    if "hf_hub_url" in entry:
        load_from, location = "hub", entry["hf_hub_url"]
    elif "ms_hub_url" in entry or "om_hub_url" in entry:
        raise DataError(f"Data set {name!r} is on ModelScope or openMind only. Download it and give its file_name, or give hf_hub_url.")
    elif "script_url" in entry:
        raise DataError(f"Data set {name!r} is a loading script; scripts are no longer run. Save its rows as json or parquet.")
    elif "cloud_file_name" in entry:
        load_from, location = "cloud", entry["cloud_file_name"]
    elif "file_name" in entry:
        location = entry["file_name"]
    else:
        raise DataError(f"Data set {name!r} has neither file_name nor hf_hub_url in dataset_info.json.")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"Data set {name!r}: formatting is {formatting!r}; known are alpaca, sharegpt, openai.")
    fields: dict[str, Any] = {k: entry[k] for k in ("subset", "folder", "num_samples", "openai_quirks") if k in entry}
    fields |= {"ranking": bool(entry.get("ranking", False)), "split": entry.get("split") or "train", "formatting": formatting}
    # As in LLaMA-Factory, naming one column (or tag) unsets all others: a file is described wholly or not at all.
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
            fields["messages"] = "messages"
    source = Source(name=name, load_from=load_from, location=location, dataset_dir=os.fspath(folder), **fields)
    _warn_unset(source, entry, warn)
    return source


def _warn_unset(source: Source, entry: dict[str, Any], warn: Any) -> None:
    if "columns" in entry:
        need = ["prompt"] if source.formatting == "alpaca" else ["messages"]
        if source.formatting == "alpaca" and not source.ranking and not source.response:
            warn(f"Data set {source.name!r}: columns names no response, so its rows have no answer (right for pre-training only).")
        for key in need:
            if getattr(source, key) is None:
                warn(f"Data set {source.name!r}: columns is given without {key!r}, which unsets it. Name every column that is used.")
    if "tags" in entry and source.formatting != "alpaca":
        for key in ("role_tag", "content_tag", "user_tag", "assistant_tag"):
            if getattr(source, key) is None:
                warn(f"Data set {source.name!r}: tags is given without {key!r}, which unsets it. Name every tag that is used.")
