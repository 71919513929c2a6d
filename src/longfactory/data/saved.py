"""`tokenized_path`: a tokenised data set in a folder of the user's, ours or one that LLaMA-Factory
saved.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from longfactory.data import store
from longfactory.data.assemble import Rules
from longfactory.data.errors import BadRows
from longfactory.data.kind import Kind
from longfactory.data.kinds import SavedKind
from longfactory.data.row import IGNORE
from longfactory.data.store import Store
from longfactory.errors import DataError

_FILE = "longfactory.json"
_TEMPLATE_RULES = ("eos", "eos_label_on_first_turn", "thought", "thought_trained", "prefix")


@dataclasses.dataclass
class Saved:
    """Stores, the entries of each split ("train", "eval", ...) and the kind of samples; `rules` are
    the template's, the rest of the rules is the run's."""

    stores: list[Store]
    splits: dict[str, np.ndarray]
    kind: Kind
    rules: dict[str, Any]
    template: str | None = None
    """Its name, where it is known."""

    def apply(self, rules: Rules) -> Rules:
        return dataclasses.replace(rules, **self.rules)


def is_saved(path: str | None) -> bool:
    """Whether the folder holds a tokenised data set (a folder that is empty or missing does
    not).
    """
    return path is not None and any(
        Path(path, f).exists() for f in (_FILE, "dataset_dict.json", "state.json")
    )


def check_free(path: Path) -> None:
    """Raises DataError where a data set cannot be saved because something else is there. One that
    is saved already is no reason.
    """
    # In this order: another process may be saving, and what it saves appears as a whole.
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not is_saved(str(path)):
        raise DataError(
            f"tokenized_path {path} exists and holds no tokenised data. Name another folder."
        )


def save(
    path: Path,
    stores: Sequence[Store],
    splits: dict[str, np.ndarray],
    kind: Kind,
    rules: Rules,
    media: dict[str, Any] | None = None,
    vocabulary: str | None = None,
    template: str | None = None,
) -> None:
    """Copies the stores into `path`, whole or not at all.

    Args:
        vocabulary: of the tokenizer (`vocabulary_of`).
        template: its name.
        media: what the tokens of their images and videos depend on (`Processing.facts`).
    Raises:
        DataError: there is something else, or the folder cannot be written.
    """
    check_free(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        beside.mkdir(parents=True)
        for i, s in enumerate(stores):
            shutil.copytree(s.path, beside / f"store_{i}")
        for name, entries in splits.items():
            np.save(beside / f"{name}.npy", entries)
        facts = {k: getattr(rules, k) for k in _TEMPLATE_RULES}
        about = {"kind": kind.name, "stores": len(stores), "splits": list(splits), "rules": facts}
        about |= {"media": _plain(media), "vocabulary": vocabulary, "template": template}
        (beside / _FILE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        if path.exists():
            path.rmdir()
        beside.rename(path)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"tokenized_path: {path} cannot be written: {reason}. Make room, or name another"
            " folder."
        ) from error
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _plain(media: dict[str, Any] | None) -> dict[str, Any] | None:
    """Facts of media as JSON gives them back; where files stand may change."""
    if media is None:
        return None
    kept = {k: v for k, v in media.items() if k not in ("media_dir", "allow")}
    return json.loads(json.dumps(kept, default=str))


def vocabulary_of(tokenizer: Any) -> str:
    """A digest of which token each number stands for, without tokens that were added: those of a
    template, of add_tokens or of a later model of the same family come after the others.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    return xxhash.xxh3_128_hexdigest("\n".join(map(str, tokens)).encode("utf-8", "surrogatepass"))


def load(
    path: Path,
    kind: Kind,
    cache: Path,
    media: dict[str, Any] | None = None,
    tokenizer: Any = None,
    why: str | None = None,
) -> Saved:
    """The data set saved at `path`.

    Args:
        media: as this run would process images and videos; None where it would not.
        tokenizer: the run's; None: nothing is known of it.
        why: why a model that has images could not process any.
    Raises:
        DataError: it was made for another kind of stage, by another tokenizer, has images that this
            run would process otherwise, or cannot be used without mixing documents.
    """
    if not (path / _FILE).exists():
        found = _from_llamafactory(path, kind, cache)
        _check_tokens(path, found.stores, tokenizer)
        return found
    try:
        about = json.loads((path / _FILE).read_text(encoding="utf-8"))
        count, rules = int(about["stores"]), dict(about["rules"])
        rules["thought"] = tuple(rules["thought"])
        names, made_for = [str(name) for name in about["splits"]], str(about["kind"])
        problem = next(
            (d for i in range(count) if (d := store.damage(path / f"store_{i}")) is not None), None
        )
        splits = {name: np.load(path / f"{name}.npy") for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{_FILE} or a split cannot be read ({type(error).__name__}: {error})"
    if problem is not None:
        raise DataError(
            f"The data at {path} (tokenized_path) are damaged: {problem}. Remove the folder to "
            "tokenise again, or copy it again."
        )
    if made_for != kind.name:
        raise DataError(
            f"The data at {path} were tokenised for {made_for}; this stage needs {kind.name}."
            " Name another tokenized_path."
        )
    vocabulary = about.get("vocabulary")  # of older folders not known
    if None not in (vocabulary, tokenizer) and vocabulary != vocabulary_of(tokenizer):
        raise DataError(
            f"The data at {path} (tokenized_path) were tokenised by another tokenizer: its numbers"
            " stand for other tokens than this model's. Name another tokenized_path."
        )
    stores = [Store(path / f"store_{i}") for i in range(count)]
    _check_tokens(path, stores, tokenizer)
    if any(s.has_media().any() for s in stores):
        _check_media(path, about.get("media"), _plain(media), why)
    return Saved(stores, splits, kind, rules, about.get("template"))


def _check_tokens(path: Path, stores: Sequence[Store], tokenizer: Any) -> None:
    """Raises DataError where the data have a token that the tokenizer has not: of a tokenizer that
    had more tokens added, and of LLaMA-Factory's, which does not write down which one it was.
    """
    if tokenizer is None:
        return
    largest = max((int(s.tokens.max()) for s in stores if len(s.tokens)), default=0)
    # there may be numbers that no token has, so their count is not the last one
    last = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    if largest > last:
        raise DataError(
            f"The data at {path} (tokenized_path) have the token {largest}, and the last one of"
            f" this model's tokenizer is {last}: they were tokenised by another one, or with tokens"
            " added (add_tokens, add_special_tokens). Give the same tokens, or name another"
            " tokenized_path."
        )


def _check_media(
    path: Path, made: dict[str, Any] | None, media: dict[str, Any] | None, why: str | None
) -> None:
    """Raises DataError where the run would make other tokens of the images."""
    if why is not None:
        raise DataError(f"The data at {path} (tokenized_path) have images or videos. {why}")
    if media is None:
        raise DataError(
            f"The data at {path} (tokenized_path) have images or videos, and the model takes text"
            " alone here: it has no tower, one of a family that is not read (the log names those"
            " that are), or its folder has no preprocessor_config.json or processor_config.json."
        )
    if made is None or made == media:
        return
    differing = sorted(
        name
        for part in ("keys", "processor", "facts")
        for name in made[part].keys() | media[part].keys()
        if made[part].get(name) != media[part].get(name)
    )
    differing += ["family"] * (made["family"] != media["family"])
    raise DataError(
        f"The data at {path} (tokenized_path) were tokenised with other settings of images and"
        f" videos: {', '.join(differing)}. Set them as they were, or name another tokenized_path."
    )


def _from_llamafactory(path: Path, kind: Kind, cache: Path) -> Saved:
    """LLaMA-Factory's DatasetDict: tokens and labels are final, so its documents are taken as they
    are (`SavedKind`).
    """
    import datasets

    try:
        found = datasets.load_from_disk(os.fspath(path))
    except Exception as error:  # whatever damaged files make of the library
        raise DataError(
            f"The data at {path} (tokenized_path) cannot be read: {type(error).__name__}:"
            f" {' '.join(str(error).split())[:300]}. Save them again."
        ) from error
    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    stores: list[Store] = []
    splits: dict[str, np.ndarray] = {}
    for name, data in parts.items():
        target = cache / f"llamafactory-{kind.name}-{data._fingerprint}"
        stores.append(
            store.open_or_build(
                target, functools.partial(_convert, data=data, kind=kind, name=os.fspath(path))
            )
        )
        n = len(stores[-1])
        split = "eval" if name == "validation" else name.removeprefix("validation_")
        splits[split] = np.column_stack([np.full(n, len(stores) - 1), np.arange(n)])
    return Saved(stores, splits, SavedKind(kind), {})


def _convert(target: Path, data: Any, kind: Kind, name: str) -> None:
    store.write(target, _chunks(data, kind), {"name": name, "rows": len(data)})


def _chunks(data: Any, kind: Kind) -> Iterator[store.Chunk]:
    """Parts of a sample of `SavedKind`."""
    columns = set(data.column_names)
    if not kind.saved_columns <= columns:
        raise DataError(
            f"The saved data have the columns {sorted(columns)}: they were tokenised for another"
            f" stage than {kind.name}."
        )
    for batch in data.iter(batch_size=1000):
        for name in sorted(columns & {"images", "videos", "audios"}):
            if any(batch[name]):
                raise DataError(
                    f"The saved data have {name}: LLaMA-Factory saves them without what their"
                    " placeholder tokens stand for in the model. Name the data set by dataset:,"
                    " which tokenises it here."
                )
        parts: list[np.ndarray] = []
        counts, flags = [], []
        for i in range(len(batch[f"{kind.saved_prefixes[0]}input_ids"])):
            documents: list[tuple[np.ndarray, np.ndarray]] = []
            for prefix in kind.saved_prefixes:
                ids = np.asarray(batch[f"{prefix}input_ids"][i], np.int32)
                labels = (
                    np.asarray(batch[f"{prefix}labels"][i], np.int32)
                    if f"{prefix}labels" in columns
                    else ids
                )
                documents += (
                    _documents(ids, labels, np.asarray(batch["position_ids"][i]))
                    if "position_ids" in columns
                    else [(ids, labels)]
                )
            parts += [p for d in documents for p in d]
            counts.append(2 * len(documents))
            flags.append(kind.saved_flags(batch, i))
        yield store.Chunk(
            np.concatenate([np.zeros(0, np.int32), *parts]),
            np.array([len(p) for p in parts], np.int64),
            np.array(counts, np.int64),
            np.array(flags, np.uint8),
            np.zeros(len(counts), np.int64),
            BadRows(),
        )


def _documents(
    ids: np.ndarray, labels: np.ndarray, positions: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A packed row cut where its positions begin anew; padding (single tokens at position 0 without
    a label) is left out.
    """
    starts = np.flatnonzero(positions == 0)
    stops = np.append(starts[1:], len(ids))
    if len(starts) == 1 and (labels == IGNORE).any() and labels[-1] == IGNORE:
        raise DataError(
            "The saved data are packed without a mark where documents begin (LLaMA-Factory 0.9.1):"
            " documents would see each other. Tokenise the data set again."
        )
    return [
        (ids[a:b], labels[a:b])
        for a, b in zip(starts, stops, strict=True)
        if b - a > 1 or labels[a] != IGNORE
    ]
