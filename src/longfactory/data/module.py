"""Data sets of a run: read, tokenised once, mixed, split, cut and packed."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from longfactory.config.data_arguments import (
    STRATEGIES,
    DataSettings,
    check_mix,
    names,
    option,
    packs,
    probabilities,
)
from longfactory.config.data_names import short_names
from longfactory.config.stage_facts import STAGES
from longfactory.data import prepare, saved, store
from longfactory.data.assemble import Rules
from longfactory.data.collate import Sample, collate
from longfactory.data.dataset import TokenizedDataset
from longfactory.data.derive import ChatTemplate
from longfactory.data.errors import bad_row_sentence
from longfactory.data.kind import Kind
from longfactory.data.kinds import KINDS
from longfactory.data.media.process import Processing, Unusable
from longfactory.data.prepare import Preparer
from longfactory.data.readers import Raw, read
from longfactory.data.report import Report, of_truncation
from longfactory.data.rollouts import RolloutDataset, load_rollouts
from longfactory.data.samples import preview
from longfactory.data.sources import DataSource, read_sources
from longfactory.data.store import Store, flags_of
from longfactory.data.stream import StreamedDataset
from longfactory.data.templates import AnyTemplate
from longfactory.data.tokens import PieceTokenizer
from longfactory.errors import DataError

__all__ = [
    "Datasets",
    "Report",
    "Sample",
    "TokenizedDataset",
    "collate",
    "load_datasets",
]

Part = tuple[Store, np.ndarray]  # a store, and which of its samples are used, in order


@dataclasses.dataclass
class Datasets:
    """`train` is a `StreamedDataset` with `streaming`. `eval` holds one data set under the name
    "eval", or with `eval_on_each_dataset` each under its own name. `processing` is what makes
    tensors of images and videos; None where no data set has any."""

    train: TokenizedDataset | StreamedDataset | RolloutDataset | None
    eval: dict[str, TokenizedDataset] | dict[str, RolloutDataset]
    processing: Processing | None = None


def cache_root() -> Path:
    """Where tokenised data sets are kept: $LONGFACTORY_CACHE, else ~/.cache/longfactory."""
    home = os.environ.get("LONGFACTORY_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "longfactory"
    )
    return Path(home).expanduser() / "tokens"


def kind_of(stage: str) -> Kind:
    """The kind of samples that a stage trains on.

    Raises:
        DataError: there is no such stage.
    """
    if stage not in STAGES or STAGES[stage].samples not in KINDS:
        raise DataError(f"stage: got {stage!r}, expected one of {', '.join(STAGES)}.")
    return KINDS[STAGES[stage].samples]


def load_datasets(
    args: DataSettings,
    *,
    stage: str,
    tokenizer: Any,
    template: AnyTemplate | None,
    seed: int,
    log: logging.Logger | None = None,
    media: Processing | Unusable | None = None,
) -> Datasets:
    """The training and evaluation data of a run.

    The same on every process; one of them tokenises while the others wait. `template` comes from
    `templates.get_template` (it may be None for pt); `media` from `media.process.make_processing`
    (None for a model that takes text alone).

    Raises:
        DataError: a data set is missing, broken, of the wrong kind for the stage, or empty once bad
            rows are skipped.
    """
    log = log or logging.getLogger("longfactory.data")
    if stage in STAGES and STAGES[stage].samples == "rollout":
        rolled, held = load_rollouts(args, tokenizer=tokenizer, template=template, log=log)
        return Datasets(
            rolled if len(rolled) else None,
            {"eval": held} if len(held) else {},
        )
    kind = kind_of(stage)
    train_names, eval_names = names(args.dataset), names(args.eval_dataset)
    _check_keys(args, train_names, eval_names)
    pieces = PieceTokenizer(tokenizer)
    rules, packed = make_rules(args, template, pieces), packs(args, stage)
    if (args.packing or args.neat_packing) and not packed:
        log.warning(
            f"packing has no effect in stage {stage}: a row already holds every document of a"
            " batch."
        )
    if saved.is_saved(args.tokenized_path):
        assert args.tokenized_path is not None
        return _load_saved(
            Path(args.tokenized_path),
            kind,
            rules,
            packed,
            tokenizer,
            stage,
            log,
            media,
            args.template,
        )

    request = _Request(args, stage, kind, template, pieces, rules, packed, seed, log, media)
    train: TokenizedDataset | StreamedDataset | None = None
    evaluation: dict[str, TokenizedDataset] = {}
    if train_names and args.streaming:
        train, evaluation = _streamed(request)
    stores, splits = _read_splits(request, [] if args.streaming else train_names, eval_names)
    for name, entries in splits.items():
        what = {"train": "training", "eval": "evaluation"}.get(name, f"evaluation ({name})")
        data = _finished(request, *_own_stores(stores, entries), what)
        if name == "train":
            train = data
            log.info("Training example: " + preview(data[0], tokenizer, stage))
        else:
            evaluation[name] = data
    if args.tokenized_path is not None and splits:
        _save(Path(args.tokenized_path), stores, splits, kind, rules, log, args, media, tokenizer)
    return Datasets(train, evaluation, _used(media, (train, *evaluation.values())))


def _check_keys(args: DataSettings, train_names: list[str], eval_names: list[str]) -> None:
    if not train_names and not eval_names and not saved.is_saved(args.tokenized_path):
        raise DataError("No data set: name one with `dataset:` (or `eval_dataset:`).")
    if eval_names and args.val_size > 1e-6:
        raise DataError("val_size and eval_dataset exclude each other: keep one.")
    if args.mask_history and args.train_on_prompt:
        raise DataError("mask_history and train_on_prompt exclude each other: keep one.")
    if args.tokenized_path is not None:
        saved.check_free(Path(args.tokenized_path))  # before hours of tokenising, not after


@dataclasses.dataclass(frozen=True)
class _Request:
    """What all data sets of a run are read with."""

    args: DataSettings
    stage: str
    kind: Kind
    template: AnyTemplate | None
    pieces: PieceTokenizer
    rules: Rules
    packed: bool
    seed: int
    log: logging.Logger
    media: Processing | Unusable | None


def _streamed(request: _Request) -> tuple[StreamedDataset, dict[str, TokenizedDataset]]:
    """The training data as a stream, and the rows at its beginning that `val_size` holds out."""
    args, log = request.args, request.log
    if args.tokenized_path is not None:
        raise DataError(
            "streaming does not tokenise the data in advance, so it cannot write "
            "tokenized_path: turn one of them off."
        )
    train = stream_dataset(
        args,
        request.stage,
        request.template,
        request.pieces,
        request.rules,
        request.packed,
        request.seed,
        log,
        request.media,
    )
    if args.val_size <= 1e-6:
        return train, {}
    if args.val_size < 1 or int(args.val_size) != args.val_size:
        raise DataError(f"With streaming, val_size is a number of rows; found {args.val_size:g}.")
    train.skip = int(args.val_size)
    held_out = train.held_out(train.skip)
    log.info(f"evaluation: {held_out.report.describe()}.")
    return train, {"eval": held_out}


def _read_splits(
    request: _Request, train_names: list[str], eval_names: list[str]
) -> tuple[list[Store], dict[str, np.ndarray]]:
    """All data sets, tokenised; and by the name of each split the entries (store, sample) of its
    samples, in order.
    """
    args, seed = request.args, request.seed
    warn = functools.lru_cache(maxsize=None)(request.log.warning)
    stores: list[Store] = []
    splits: dict[str, np.ndarray] = {}
    if train_names:
        parts = _read(request, train_names, warn)
        stores += [s for s, _ in parts]
        splits["train"] = _mix(parts, args, seed)
        if args.val_size > 1e-6:
            splits["train"], splits["eval"] = _split(splits["train"], args.val_size, seed)
    if eval_names:
        parts = _read(request, eval_names, warn, questions=bool(option(args, "do_predict")))
        groups = [("eval", parts)]
        if option(args, "eval_on_each_dataset"):
            groups = [(n, [p]) for n, p in zip(short_names(eval_names), parts, strict=True)]
        for name, group in groups:
            entries = _mix(group, args, seed)
            entries[:, 0] += len(stores)
            stores += [s for s, _ in group]
            splits[name] = entries
    return stores, splits


def _read(
    request: _Request, wanted: list[str], warn: Callable[[str], None], questions: bool = False
) -> list[Part]:
    sources = read_sources(wanted, request.args.dataset_dir, warn)
    for source in sources:
        request.kind.check_source(source, request.stage)
    return [
        _tokenised(
            source,
            request.args,
            request.kind,
            request.template,
            request.pieces,
            request.seed,
            request.log,
            questions,
            request.media,
        )
        for source in sources
    ]


def _own_stores(stores: list[Store], entries: np.ndarray) -> tuple[list[Store], np.ndarray]:
    """The stores that a split's entries name, and its entries with their numbers among these."""
    used = {int(s) for s in np.unique(entries[:, 0])}
    own = [s for i, s in enumerate(stores) if i in used] or stores
    renumber = {old: new for new, old in enumerate(sorted(used))}
    local = entries.copy()
    local[:, 0] = [renumber[int(s)] for s in entries[:, 0]]
    return own, local


def _finished(
    request: _Request, stores: Sequence[Store], entries: np.ndarray, what: str
) -> TokenizedDataset:
    """One split as a data set, checked; the log says what is in it."""
    kind, rules, log = request.kind, request.rules, request.log
    report = _report(stores)
    data = TokenizedDataset(stores, entries, kind, rules, request.packed, report)
    if not len(data):
        first = next(
            (f" First: {p[0]}: {p[1]}." for b in report.bad_rows.values() for p in b["places"]),
            "",
        )
        raise DataError(
            f"The {what} data are empty: of {report.rows_read} rows {report.bad} were bad and"
            f" {report.dropped} dropped.{first}"
        )
    log.info(f"{what}: {report.describe()}.")
    if option(request.args, "do_eval") and report.unanswered == report.samples:
        raise DataError(
            f"None of the {report.samples} {what} samples has an answer: they can be used for "
            "do_predict, but not evaluated. Leave out do_eval and eval_strategy."
        )
    kind.check(what, flags_of(data.stores, data.entries), report, rules, log)
    if report.truncated or report.untrained:
        keeps_all = data.longest_uncut()
        log.warning(of_truncation(what, report, rules.cutoff, rules.strategy, keeps_all))
    return data


def _used(media: Processing | Unusable | None, sets: Sequence[Any]) -> Processing | None:
    """The processing where a sample has images or videos; of a stream, where one may."""
    if isinstance(media, Unusable):  # a sample with one would have ended the run
        return None
    found = any(
        isinstance(data, StreamedDataset)
        or (
            isinstance(data, TokenizedDataset)
            and bool(store.media_of(data.stores, data.entries).any())
        )
        for data in sets
    )
    return media if found else None


def stream_dataset(
    args: DataSettings,
    stage: str,
    template: AnyTemplate | None,
    pieces: PieceTokenizer,
    rules: Rules,
    packed: bool,
    seed: int,
    log: logging.Logger,
    media: Processing | Unusable | None = None,
) -> StreamedDataset:
    """The training data as a stream."""
    if args.max_samples is not None:
        raise DataError("max_samples has no meaning with streaming: set max_steps.")
    kind = kind_of(stage)
    sources = read_sources(names(args.dataset), args.dataset_dir, log.warning)
    for source in sources:
        kind.check_source(source, stage)
    return StreamedDataset(
        preparers=[
            make_preparer(source, args, kind, template, pieces, media=media) for source in sources
        ],
        readers=[
            functools.partial(read, source, option(args, "hf_hub_token")) for source in sources
        ],
        rules=rules,
        packed=packed,
        window=args.preprocessing_batch_size,
        buffer_size=1 if option(args, "disable_shuffling") else args.buffer_size,
        mix=check_mix(args) if len(sources) > 1 else "concat",
        probabilities=probabilities(args, len(sources)) if len(sources) > 1 else None,
        seed=seed,
        describe=functools.partial(preview, tokenizer=pieces.tokenizer, stage=stage),
        log=log,
    )


def _load_saved(
    path: Path,
    kind: Kind,
    rules: Rules,
    packed: bool,
    tokenizer: Any,
    stage: str,
    log: logging.Logger,
    media: Processing | Unusable | None,
    template: str | None,
) -> Datasets:
    log.warning(
        f"The data are read from tokenized_path ({path}): dataset, template, val_size and other"
        " keys of reading rows have no effect. cutoff_len, train_on_prompt and mask_history are"
        " this run's, except in folders that LLaMA-Factory wrote."
    )
    facts = media.facts() if isinstance(media, Processing) else None
    why = media.reason if isinstance(media, Unusable) else None
    found = saved.load(path, kind, cache_root(), facts, tokenizer, why)
    if None not in (found.template, template) and found.template != template:
        log.warning(
            f"They were tokenised with template {found.template}, but this run's template, "
            f"{template}, will be saved with the model."
        )
    rules = found.apply(rules)
    made = {}
    for name, entries in found.splits.items():
        made[name] = TokenizedDataset(
            found.stores, entries, found.kind, rules, packed, _report(found.stores)
        )
        if not len(made[name]):
            raise DataError(f"The data at {path} ({name}) are empty.")
        log.info(f"{name}: {made[name].report.describe()}.")
    train = made.pop("train", None)
    if train is not None:
        log.info("Training example: " + preview(train[0], tokenizer, stage))
    return Datasets(train, made, _used(media, (train, *made.values())))


def _save(
    path: Path,
    stores: list[Store],
    splits: dict[str, np.ndarray],
    kind: Kind,
    rules: Rules,
    log: logging.Logger,
    args: DataSettings,
    media: Processing | Unusable | None,
    tokenizer: Any,
) -> None:
    if _rank(args) == 0 and not saved.is_saved(str(path)):
        facts = media.facts() if isinstance(media, Processing) else None
        vocabulary = saved.vocabulary_of(tokenizer)
        saved.save(path, stores, splits, kind, rules, facts, vocabulary, args.template)
        log.info(f"The tokenised data are saved at {path}.")


def make_rules(args: DataSettings, template: AnyTemplate | None, pieces: PieceTokenizer) -> Rules:
    """How this run cuts and masks."""
    if args.cutoff_len < 1:
        raise DataError(f"cutoff_len must be at least 1; found {args.cutoff_len}.")
    rules = Rules(
        cutoff=args.cutoff_len,
        strategy=option(args, "cutoff_strategy"),
        train_on_prompt=args.train_on_prompt,
        mask_history=args.mask_history,
        share_prompt=bool(option(args, "pref_share_prompt")),
    )
    if template is None:
        return rules
    thought, prefix = pieces.pieces([[template.thought()], list(template.prefix)])
    return dataclasses.replace(
        rules,
        eos=pieces.tokenizer.eos_token_id if template.eos_after_answer else None,
        eos_label_on_first_turn=template.eos_label_on_first_turn,
        thought=tuple(thought.tolist()) if template.thinking else (),
        thought_trained=bool(template.enable_thinking),
        prefix=len(prefix),
    )


def make_preparer(
    source: DataSource,
    args: DataSettings,
    kind: Kind,
    template: AnyTemplate | None,
    pieces: PieceTokenizer,
    questions: bool = False,
    media: Processing | Unusable | None = None,
) -> Preparer:
    """What tokenises the rows of one data set. `questions`: conversations without a last answer are
    for the model to answer.
    """
    if not kind.uses_template:
        template = None
    elif template is None:
        raise DataError("This stage needs a template.")
    options = kind.options(args, template, pieces.tokenizer, questions)
    strict = option(args, "on_bad_row") == "error"
    if isinstance(media, Processing) and isinstance(template, ChatTemplate):
        written = {"image": media.family.written_image, "video": media.family.written_video}
        template.show_media(written)
    return Preparer(kind, source, template, pieces, options, strict, media)


def _tokenised(
    source: DataSource,
    args: DataSettings,
    kind: Kind,
    template: AnyTemplate | None,
    pieces: PieceTokenizer,
    seed: int,
    log: logging.Logger,
    questions: bool = False,
    media: Processing | Unusable | None = None,
) -> Part:
    """The store of one data set, and which of its samples are used, in order."""
    preparer = make_preparer(source, args, kind, template, pieces, questions, media)
    limit = args.max_samples if source.num_samples is None else None
    path = cache_root() / prepare.key(preparer, limit)
    rank = _rank(args)

    def build(path: Path) -> None:
        from tqdm import tqdm

        count = [0]

        def rows() -> Iterator[tuple[str, Raw]]:
            for item in read(source, option(args, "hf_hub_token")):
                if limit is not None and count[0] >= limit:
                    return
                count[0] += 1
                yield item

        meta: dict[str, Any] = {"name": source.name, "kind": kind.name}
        with tqdm(desc=f"Tokenising {source.name}", unit=" rows", disable=rank != 0) as bar:
            chunks = prepare.run(
                preparer, rows(), args.preprocessing_num_workers, args.preprocessing_batch_size, bar
            )
            store.write(path, _with_count(chunks, meta, count), meta)

    opened = store.open_or_build(
        path, build, rebuild=args.overwrite_cache and rank == 0, first=rank == 0, log=log.info
    )
    if opened.bad.count:
        log.warning(f"Data set {source.name!r}: {opened.bad.describe()}")
        if preparer.strict:
            place, reason = opened.bad.places[0]
            raise DataError(bad_row_sentence(source.name, place, reason, opened.bad.hint))
    opened.bad.tell_unread(source.name, log)
    if not len(opened):
        found = (
            f"Of {opened.meta['rows']} rows {opened.bad.count} were bad."
            if opened.meta.get("rows")
            else "There are no rows in it."
        )
        first = next((f" First: {place}: {reason}." for place, reason in opened.bad.places), "")
        more = f" {opened.bad.hint}" if opened.bad.hint else ""
        raise DataError(f"Data set {source.name!r} has no usable row. {found}{first}{more}")
    chosen = np.arange(len(opened))
    if source.num_samples is not None and len(opened):
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(len(opened))[: source.num_samples]
        if source.num_samples > len(chosen):
            chosen = np.concatenate(
                [chosen, rng.choice(len(opened), source.num_samples - len(chosen))]
            )
        chosen = chosen[: args.max_samples]
    return opened, chosen


def _rank(args: DataSettings) -> int:
    """0 in the process that goes first: on each node, or with `data_shared_file_system` in the
    whole run.
    """
    return int(
        os.environ.get("RANK" if option(args, "data_shared_file_system") else "LOCAL_RANK", "0")
    )


def _with_count(
    chunks: Iterator[store.Chunk], meta: dict[str, Any], count: list[int]
) -> Iterator[store.Chunk]:
    yield from chunks
    meta["rows"] = count[0]


def _mix(parts: Sequence[Part], args: DataSettings, seed: int) -> np.ndarray:
    """[n, 2] entries (store, sample): the data sets joined or interleaved, in the order that
    `datasets` gives rows.
    """
    each = [
        np.column_stack([np.full(len(chosen), s), chosen]).astype(np.int64)
        for s, (_, chosen) in enumerate(parts)
    ]
    if len(each) == 1 or check_mix(args) == "concat":
        return np.concatenate(each)
    import datasets

    chances = probabilities(args, len(each))
    for (opened, _), e in zip(parts, each, strict=True):
        if not len(e):
            raise DataError(
                f"Data set {opened.meta['name']!r} has no usable row, so it cannot be interleaved."
            )
    starts = np.cumsum([0, *(len(e) for e in each)])
    numbered = [datasets.Dataset.from_dict({"e": np.arange(a, b)}) for a, b in pairwise(starts)]
    mixed = datasets.interleave_datasets(
        numbered, probabilities=chances, seed=seed, stopping_strategy=STRATEGIES[args.mix_strategy]  # type: ignore[arg-type]
    )  # fmt: skip
    return np.concatenate(each)[np.asarray(mixed["e"][:], dtype=np.int64)]


def _split(entries: np.ndarray, val_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out entries; `val_size` is a count from 1 on, below it a share."""
    import datasets

    size = int(val_size) if val_size >= 1 else float(val_size)
    if (size if val_size >= 1 else math.ceil(size * len(entries))) >= len(entries):
        raise DataError(
            f"val_size {val_size:g} leaves nothing to train on: there are {len(entries)} samples."
        )
    split = datasets.Dataset.from_dict({"e": np.arange(len(entries))}).train_test_split(
        test_size=size, seed=seed
    )
    return entries[np.asarray(split["train"]["e"][:])], entries[np.asarray(split["test"]["e"][:])]


def _report(stores: Sequence[Store]) -> Report:
    report = Report()
    for opened in stores:
        report.rows_read += opened.meta["rows"]
        if opened.bad.count:
            report.bad_rows[opened.meta["name"]] = opened.bad.to_json()
    return report
