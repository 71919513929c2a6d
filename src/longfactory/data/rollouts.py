"""Rollouts for `stage: rl`: rows of token ids or messages with advantages and, where they are
known, log-probabilities of the policy that drew them and of a reference.

A row (JSON lines, JSON, parquet, arrow):

    prompt_ids, completion_ids  token ids; or input_ids with mask (1: trained), or messages
    completion_mask             1 where a token of the completion is trained; default all
    advantage | advantages      one number, or one for each token (of the completion, or input_ids)
    logprobs, ref_logprobs      one for each token likewise (null where it is not trained)
    group                       rollouts of one group that stand together share their prompt

Rows are read into memory, since each number beside a token takes as much as the token.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from longfactory.config.data_arguments import DataSettings, names, option
from longfactory.data import readers
from longfactory.data.errors import BadRow
from longfactory.data.packing import pack
from longfactory.data.report import Report
from longfactory.data.row import IGNORE, TokenizedDocument
from longfactory.data.sources import read_sources
from longfactory.data.template import Message
from longfactory.data.templates import AnyTemplate
from longfactory.data.tokens import PieceTokenizer, check_text
from longfactory.errors import DataError

NUMBERS = {"advantages": "advantage", "logprobs": "old_logp", "ref_logprobs": "ref_logp"}
"""Columns with a number for each token -> its name in a row (`Row.numbers`)."""
READ = frozenset(
    {"prompt_ids", "completion_ids", "completion_mask", "input_ids", "mask", "messages", "tools"}
    | {"advantage", "group", *NUMBERS}
)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One rollout. `ids` and `trained` [L]; `numbers` [L] each, at the token that they are of;
    `prompt` tokens come first and are not trained.
    """

    ids: np.ndarray
    trained: np.ndarray
    numbers: Mapping[str, np.ndarray]
    prompt: int
    group: Any
    place: str


class RolloutDataset:
    """Map-style data set of groups of rollouts. Picklable. `lengths`: tokens of each item.

    Args:
        groups: each is one sample: rollouts that share their first `prompt` tokens, or one.
        cutoff: tokens of a packed row.
        packed: whether an item holds several groups, as many as `cutoff` takes.
    """

    def __init__(
        self, groups: Sequence[Sequence[Rollout]], *, cutoff: int, packed: bool, report: Report
    ) -> None:
        self.groups = list(groups)
        self.report = report
        sizes = np.array([_tokens(group) for group in self.groups], dtype=np.int64)
        self.bins: list[np.ndarray] | None = None
        self.lengths = self.sizes = sizes
        if packed and len(sizes):
            done = pack(sizes, max(cutoff, int(sizes.max())))
            self.bins = done.bins
            self.lengths = np.array([sizes[b].sum() for b in done.bins], dtype=np.int64)
            report.packed_rows, report.efficiency = len(done.bins), done.efficiency
        report.samples, report.tokens = len(sizes), int(sizes.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> list[TokenizedDocument]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"Item {i} of a data set of {len(self)} items.")
        i %= len(self)
        chosen = [i] if self.bins is None else self.bins[i].tolist()
        documents: list[TokenizedDocument] = []
        for number in chosen:
            first = len(documents)
            documents += [
                dataclasses.replace(d, parent=d.parent + first) if d.parent >= 0 else d
                for d in _documents(self.groups[number], number)
            ]
        return documents

    def where(self, sample: int) -> tuple[str, int]:
        """The file, as a message names it, and the row (from 0) of a sample's first rollout."""
        name, _, number = self.groups[sample][0].place.rpartition(":")
        return (name or "the rollouts", int(number) - 1) if number.isdigit() else (number, 0)

    def longest_uncut(self) -> int:
        """Tokens of the longest rollout."""
        return max((len(r.ids) for group in self.groups for r in group), default=0)

    def fingerprint(self) -> str:
        """A digest of all tokens, numbers and their order."""
        digest = xxhash.xxh3_128()
        for group in self.groups:
            digest.update(b"group")
            for r in group:
                for array in (r.ids, r.trained, *(r.numbers[name] for name in sorted(r.numbers))):
                    digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _tokens(group: Sequence[Rollout]) -> int:
    """Tokens of a sample: a shared prompt once, and each branch begins with its last token."""
    if len(group) == 1:
        return len(group[0].ids)
    shared = group[0].prompt
    return shared - 1 + sum(len(r.ids) - shared + 1 for r in group)


def _documents(group: Sequence[Rollout], sample: int) -> list[TokenizedDocument]:
    if len(group) == 1:
        return [_document(group[0], 0, sample, -1)]
    shared = group[0].prompt - 1
    prompt = group[0].ids[:shared]
    first = TokenizedDocument(prompt, np.full(shared, IGNORE), "prompt", sample)
    return [first, *(_document(r, shared, sample, 0) for r in group)]


def _document(r: Rollout, start: int, sample: int, parent: int) -> TokenizedDocument:
    labels = np.where(r.trained, r.ids, IGNORE)[start:]
    numbers = {name: values[start:] for name, values in r.numbers.items()}
    return TokenizedDocument(r.ids[start:], labels, "text", sample, parent, numbers=numbers)


def load_rollouts(
    args: DataSettings,
    *,
    tokenizer: Any,
    template: AnyTemplate | None,
    log: logging.Logger,
) -> list[RolloutDataset]:
    """[training data, evaluation data] of a run, where they are asked for.

    Rollouts longer than cutoff_len are dropped and counted, never shortened: their numbers belong
    to the whole.

    Raises:
        DataError: a file is missing, every row is bad, rows have and have not log-probabilities, or
            keys are given that rollouts do not know.
    """
    for key in ("streaming", "tokenized_path", "train_on_prompt", "mask_history"):
        if getattr(args, key, None):
            raise DataError(f"{key} is not for rollouts (stage: rl). Leave it out.")
    reader = _Reader(args, tokenizer, template, log)
    found = [reader.groups(wanted) for wanted in (args.dataset, args.eval_dataset)]
    if args.val_size > 1e-6 and found[0]:
        count = len(found[0])
        held = int(args.val_size) if args.val_size >= 1 else max(1, round(count * args.val_size))
        if held >= count:
            raise DataError(f"val_size leaves no training data: there are {count} groups.")
        found = [found[0][:-held], found[0][-held:]]
    packed = bool(args.packing or args.neat_packing)
    out = []
    for what, groups in zip(("training", "evaluation"), found, strict=True):
        data = RolloutDataset(
            groups,
            cutoff=int(args.cutoff_len),
            packed=packed,
            report=dataclasses.replace(reader.report),
        )
        if groups:
            rollouts = sum(len(g) for g in groups)
            log.info(
                f"{what}: {rollouts} rollouts in {len(groups)} groups, {data.report.tokens:,}"
                f" tokens; {reader.report.dropped} dropped (longer than cutoff_len),"
                f" {reader.bad.total()} bad rows."
            )
        out.append(data)
    if not len(out[0]) and names(args.dataset):
        raise DataError(
            f"The training data are empty: {reader.report.dropped} rollouts are longer than"
            f" cutoff_len ({args.cutoff_len}), {reader.bad.total()} rows were bad."
            f" {reader.first_bad}"
        )
    return out


class _Reader:
    """Reads files into rollouts, counting what is left out."""

    def __init__(
        self, args: DataSettings, tokenizer: Any, template: AnyTemplate | None, log: logging.Logger
    ) -> None:
        self.args, self.template, self.log = args, template, log
        self.pieces = PieceTokenizer(tokenizer)
        self.vocabulary = len(tokenizer)
        self.report = Report()
        self.bad: Counter[str] = Counter()
        self.first_bad = ""
        self.unread: set[str] = set()

    def groups(self, wanted: Any) -> list[list[Rollout]]:
        """The rollouts of these data sets; neighbours of one group with one prompt together."""
        groups: list[list[Rollout]] = []
        shares = bool(option(self.args, "rl_share_prompt"))
        for r in self._rollouts(names(wanted)):
            last = groups[-1] if groups else None
            if shares and last is not None and _together(last[0], r):
                last.append(r)
            else:
                groups.append([r])
        kinds = {tuple(sorted(r.numbers)) for group in groups for r in group}
        if len(kinds) > 1:
            every = {name for kind in kinds for name in kind}
            some = {name for name in every if any(name not in kind for kind in kinds)}
            columns = [column for column, name in NUMBERS.items() if name in some]
            raise DataError(
                f"Some rollouts have {', '.join(columns)} and others have not. Give every row the"
                " same columns."
            )
        if self.unread:
            self.log.info(f"Columns that are not read: {', '.join(sorted(self.unread))}.")
        for reason, count in self.bad.items():
            self.log.warning(f"{count} rows were left out: {reason}.")
        return groups

    def _rollouts(self, data_sets: list[str]) -> Iterator[Rollout]:
        for place, raw in _rows(data_sets, self.args):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                row = readers.parse_line(raw) if isinstance(raw, bytes) else raw
                r = self._rollout(row, place)
            except BadRow as error:
                if option(self.args, "on_bad_row") == "error":
                    raise DataError(f"{place}: {error}.") from error
                self.bad[str(error)] += 1
                self.first_bad = self.first_bad or f"First: {place}: {error}."
                continue
            self.unread |= {k for k in row if k not in READ}
            if len(r.ids) > int(self.args.cutoff_len):
                if option(self.args, "cutoff_strategy") == "error":
                    raise DataError(
                        f"{place}: a rollout of {len(r.ids)} tokens is longer than cutoff_len"
                        f" ({self.args.cutoff_len}). Raise it, or leave cutoff_strategy out."
                    )
                self.report.dropped += 1
                continue
            yield r

    def _rollout(self, row: dict[str, Any], place: str) -> Rollout:
        forms = [k for k in ("completion_ids", "input_ids", "messages") if row.get(k) is not None]
        if len(forms) != 1:
            raise BadRow(
                "expected one of completion_ids (with prompt_ids), input_ids (with mask), messages"
            )
        turns: list[float] | None = None
        if forms[0] == "completion_ids":
            prompt = _ids(row.get("prompt_ids"), "prompt_ids")
            completion = _ids(row["completion_ids"], "completion_ids")
            mask = _mask(row.get("completion_mask"), len(completion), "completion_mask")
            ids = np.concatenate([prompt, completion])
            trained = np.concatenate([np.zeros(len(prompt), bool), mask])
        elif forms[0] == "input_ids":
            ids = _ids(row["input_ids"], "input_ids")
            if row.get("mask") is None:
                raise BadRow("input_ids without mask")
            trained = _mask(row["mask"], len(ids), "mask")
        else:
            ids, trained, turns = self._of_messages(row)
        if len(ids) and int(ids.max()) >= self.vocabulary:
            raise BadRow("a token id that the tokenizer does not have")
        if len(ids) < 2 or not trained[1:].any():
            raise BadRow("no trained token")
        trained[0] = False  # nothing comes before it
        offset = len(ids) - len(row["completion_ids"]) if forms[0] == "completion_ids" else 0
        numbers = {
            name: _per_token(row[column], column, ids, offset, trained)
            for column, name in NUMBERS.items()
            if row.get(column) is not None
        }
        if "advantage" in numbers and row.get("advantage") is not None:
            raise BadRow("advantage and advantages")
        if "advantage" not in numbers:
            one = row.get("advantage", 1.0 if turns is None else None)
            if one is None and turns is None:
                raise BadRow("advantage is null")
            values = np.where(trained, _number(one) if one is not None else 1.0, 0.0)
            if turns is not None:
                values = values * np.asarray(turns)
            numbers["advantage"] = values.astype(np.float32)
        prompt_length = int(np.argmax(trained))
        return Rollout(ids, trained, numbers, prompt_length, row.get("group"), place)

    def _of_messages(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """(ids, trained, a factor of the advantage for each token) of a conversation. A message of
        the assistant may say train: false, and advantage: its own number.
        """
        if self.template is None:
            raise DataError("Rollouts of messages need a template. Set template.")
        given = row["messages"]
        if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
            raise BadRow("messages is not a list of messages")
        system = ""
        if given and given[0].get("role") == "system":
            system, given = str(given[0].get("content", "")), given[1:]
        roles = [m.get("role") for m in given]
        known = {"user": "user", "tool": "observation", "assistant": "assistant"}
        pairs = zip(roles, given, strict=True)
        if any((role == "assistant") != (i % 2 == 1) for i, (role, _) in enumerate(pairs)):
            raise BadRow("user and assistant do not take turns")
        if not roles or set(roles) - set(known) or roles[-1] != "assistant":
            raise BadRow("expected turns of user (or tool) and assistant, the last of assistant")
        messages = [
            Message(known[role], str(m.get("content", "")))  # type: ignore[arg-type]
            for role, m in zip(roles, given, strict=True)
        ]
        parts, _ = self.template.turns(messages, system, "", False)
        check_text(parts)
        tokens = self.pieces.pieces(parts)
        ids: list[np.ndarray] = []
        trained: list[np.ndarray] = []
        factors: list[float] = []
        for i, part in enumerate(tokens):
            own = given[i] if i < len(given) else {}
            learns = i % 2 == 1 and own.get("train", True) is not False
            ids.append(np.asarray(part, dtype=np.int64))
            trained.append(np.full(len(part), learns))
            factors += [_number(own.get("advantage", 1.0)) if learns else 0.0] * len(part)
        return np.concatenate(ids), np.concatenate(trained), factors


def _rows(data_sets: list[str], args: DataSettings) -> Iterator[tuple[str, Any]]:
    for name in data_sets:
        path = next(
            (p for p in (Path(name), Path(str(args.dataset_dir), name)) if p.is_file()), None
        )
        if path is not None:
            yield from readers.read_file(path)
        else:
            (source,) = read_sources([name], args.dataset_dir)
            yield from readers.read(source)


def _together(first: Rollout, r: Rollout) -> bool:
    """Whether two rollouts are of one group and begin with the same prompt of several tokens."""
    return (
        r.group is not None
        and r.group == first.group
        and r.prompt == first.prompt
        and r.prompt > 1
        and bool(np.array_equal(r.ids[: r.prompt], first.ids[: first.prompt]))
    )


def _ids(value: Any, what: str) -> np.ndarray:
    whole = isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)
    if not whole or not value:
        raise BadRow(f"{what} is not a list of token ids")
    return np.array(value, dtype=np.int64)


def _mask(value: Any, length: int, what: str) -> np.ndarray:
    if value is None:
        return np.ones(length, bool)
    if not isinstance(value, list) or any(x not in (0, 1) for x in value):
        raise BadRow(f"{what} is not a list of 0 and 1")
    if len(value) != length:
        raise BadRow(f"{what} has another length than its tokens")
    return np.array(value, dtype=bool)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise BadRow("an advantage that is not a number")
    return float(value)


def _per_token(
    value: Any, column: str, ids: np.ndarray, offset: int, trained: np.ndarray
) -> np.ndarray:
    """[L] float32 of a column with a number for each token behind `offset`."""
    if not isinstance(value, list) or len(value) != len(ids) - offset:
        raise BadRow(f"{column} has another length than its tokens")
    out = np.zeros(len(ids), dtype=np.float32)
    for i, x in enumerate(value, start=offset):
        if x is None and not trained[i]:
            continue
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not np.isfinite(x):
            raise BadRow(f"{column} holds something else than a number at a trained token")
        out[i] = x
    return out
