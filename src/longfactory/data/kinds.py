"""The kinds of samples: a text, a conversation, a pair of answers, a labelled answer. All in which
they differ stands here, one class a kind.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from longfactory.config.data_arguments import DataSettings, option
from longfactory.data import assemble
from longfactory.data.assemble import Rules
from longfactory.data.derive import ChatTemplate
from longfactory.data.errors import BadRow
from longfactory.data.formats import Conversation
from longfactory.data.kind import Kind, Lengths, PartOptions, saved_document
from longfactory.data.media.documents import Parts, documents_around
from longfactory.data.report import Report
from longfactory.data.row import Role, TokenizedDocument
from longfactory.data.sources import DataSource
from longfactory.data.store import (
    DESIRED,
    EQUAL_PAIR,
    LACKS_THOUGHT,
    LAST_ONLY,
    NO_ANSWER,
    SECOND_LACKS_THOUGHT,
    Store,
    flags_of,
    media_of,
    part_lengths,
    total_lengths,
)
from longfactory.data.template import Message, Piece
from longfactory.data.templates import AnyTemplate
from longfactory.errors import DataError


class TextKind(Kind):
    """A text, of which every token is trained. Parts: the text."""

    name = "pt"
    uses_template = False

    def options(
        self, args: DataSettings, template: AnyTemplate | None, tokenizer: Any, questions: bool
    ) -> PartOptions:
        begins = getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token
        return PartOptions(
            text_end=(
                "<|end_of_text|>" if args.template == "llama3" else tokenizer.eos_token or ""
            ),
            text_begin=tokenizer.bos_token if begins else "",
        )

    def parts(
        self, conversation: Conversation, template: AnyTemplate, options: PartOptions
    ) -> tuple[list[list[Piece]], int]:
        text = conversation.prompt[0].content
        if not text.strip():
            raise BadRow("empty text")
        return [[options.text_begin + text + options.text_end]], 0

    def fit(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        rules: Rules,
        packed: bool,
        report: Report,
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Kind`. With packing, texts longer than the cutoff become consecutive documents and
        nothing is lost: entries are [m, 4] with the range of tokens.
        """
        if not packed:
            return super().fit(stores, entries, rules, packed, report)
        totals = total_lengths(stores, entries)
        counts = np.maximum(-(-totals // rules.cutoff), 1)
        out = np.repeat(entries, counts, axis=0)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        start = (np.arange(len(out)) - first) * rules.cutoff
        stop = np.minimum(start + rules.cutoff, np.repeat(totals, counts))
        out = np.column_stack([out, start, stop])[stop > start]
        with_media = media_of(stores, entries)
        if with_media.any():
            out = self._around_media(stores, entries, out, rules, report)
        report.with_media = int(with_media.sum())
        return out, out[:, 3] - out[:, 2]

    def _around_media(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        cut: np.ndarray,
        rules: Rules,
        report: Report,
    ) -> np.ndarray:
        """[m, 4] ranges of tokens that cut no image or video: a document ends before one that does
        not fit any more. A text with one that is longer than the cutoff is left out.
        """
        without = ~media_of(stores, cut)
        out = [cut[without]]
        for s, i in entries[media_of(stores, entries)].tolist():
            units = stores[s].media(i)
            bounds = documents_around(
                [(u.spans[0][0], sum(u.spans[-1])) for u in units],
                int(stores[s].totals()[i]),
                rules.cutoff,
            )
            if bounds is None:
                report.media_cut += 1
                continue
            out.append(np.array([[s, i, a, b] for a, b in bounds], np.int64))
        joined = np.concatenate(out)
        place = {(s, i): k for k, (s, i) in enumerate(map(tuple, entries.tolist()))}
        order = [(place[s, i], a) for s, i, a, _ in joined.tolist()]
        return joined[sorted(range(len(order)), key=order.__getitem__)]

    def lengths(self, stores: Sequence[Store], entries: np.ndarray, rules: Rules) -> Lengths:
        before = total_lengths(stores, entries)
        return Lengths(before, np.minimum(before, rules.cutoff), np.zeros(len(entries), bool))

    def assembled(
        self, parts: Parts, flags: Sequence[int], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        ids = parts[0][0]
        if len(entry) == 4:
            return [assemble.plain(ids[entry[2] : entry[3]], sample)]
        return [assemble.plain(assemble.cut(ids, rules.cutoff, rules, rules.prefix), sample)]


class ConversationKind(Kind):
    """A conversation, of which the answers are trained. Parts: source, target, source, target and
    so on.
    """

    name = "sft"
    saved_columns = frozenset({"input_ids", "labels"})

    def options(
        self, args: DataSettings, template: AnyTemplate | None, tokenizer: Any, questions: bool
    ) -> PartOptions:
        last_only = args.mask_history and template is not None and template.thinking
        return PartOptions(last_only=bool(last_only), questions=questions)

    def parts(
        self, conversation: Conversation, template: AnyTemplate, options: PartOptions
    ) -> tuple[list[list[Piece]], int]:
        c = conversation
        answered = any(a.content.strip() for a in c.answers)
        if options.questions and c.desired is None and not answered:
            return [_question(c, template), []], NO_ANSWER
        if c.desired is not None or len(c.answers) != 1:
            raise BadRow("no answer: the row has no text to learn")
        if not answered:
            raise BadRow("empty answer")
        messages = _to_last_trained([*c.prompt, *c.answers])
        pieces, last_only = template.turns(messages, c.system, c.tools, options.last_only)
        return _untrained_in_sources(pieces, messages), LAST_ONLY if last_only else 0

    def lengths(self, stores: Sequence[Store], entries: np.ndarray, rules: Rules) -> Lengths:
        end = int(rules.eos is not None)
        untrained = np.zeros(len(entries), bool)
        before = total_lengths(stores, entries) + end
        asked = (flags_of(stores, entries) & NO_ANSWER) > 0
        if asked.any():
            thought = 0 if rules.thought_trained else len(rules.thought)
            before = np.where(asked, before - end + thought, before)
        after = np.minimum(before, rules.cutoff)
        for e in np.flatnonzero((before > rules.cutoff) & ~asked).tolist():
            store, i = entries[e]
            kept = assemble.cut_turns(stores[store].lengths(int(i)), rules)
            after[e] = sum(source + target for _, source, target in kept) + end
            trained = rules.train_on_prompt or end or any(target for _, _, target in kept)
            untrained[e] = not trained
        return Lengths(before, after, untrained)

    def assembled(
        self, parts: Parts, flags: Sequence[int], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        if flags[0] & NO_ANSWER:
            return [assemble.question(parts[0][0], rules, sample)]
        return [assemble.sft(parts[0], rules, sample, bool(flags[0] & LAST_ONLY))]

    def check(
        self, what: str, flags: np.ndarray, report: Report, rules: Rules, log: logging.Logger
    ) -> None:
        if report.untrained == report.samples:
            raise DataError(
                f"None of the {report.samples} {what} samples has a trained token left after"
                f" truncation to cutoff_len ({rules.cutoff}). Raise cutoff_len."
            )

    def prompt_places(
        self, lengths: Sequence[int], rules: Rules, role: str
    ) -> tuple[int, set[int]] | None:
        end = int(rules.eos is not None)
        places: set[int] = set()
        start = 0
        for _, source, target in assemble.cut_turns(lengths, rules):
            # with `end`, a turn's first token teaches the end of the one before
            places |= set(range(start + end, start + source))
            start += source + target
        return start + end, places


class PairKind(Kind):
    """A prompt with a chosen and a rejected answer. Parts: prompt, chosen, rejected."""

    name = "pair"
    branches = True
    ranking = True
    saved_prefixes = ("chosen_", "rejected_")
    saved_columns = frozenset({"chosen_input_ids"})

    def options(
        self, args: DataSettings, template: AnyTemplate | None, tokenizer: Any, questions: bool
    ) -> PartOptions:
        return PartOptions(equal_pairs=bool(option(args, "equal_pairs")))

    def parts(
        self, conversation: Conversation, template: AnyTemplate, options: PartOptions
    ) -> tuple[list[list[Piece]], int]:
        c = conversation
        if len(c.answers) != 2:
            raise BadRow("no pair: the row has no chosen and rejected answer")
        chosen, rejected = c.answers
        for side, answer in (("chosen", chosen), ("rejected", rejected)):
            if not answer.content.strip():
                raise BadRow(f"empty answer: the {side} side")
        if chosen == rejected and not options.equal_pairs:
            raise BadRow(
                "equal pair: chosen and rejected are the same, of which this loss learns nothing"
            )
        source, targets, lacks = template.one_turn(c.prompt, c.answers, c.system, c.tools)
        flags = LACKS_THOUGHT * lacks[0] + SECOND_LACKS_THOUGHT * lacks[1]
        return [source, *targets], flags + EQUAL_PAIR * (chosen == rejected)

    def lengths(self, stores: Sequence[Store], entries: np.ndarray, rules: Rules) -> Lengths:
        flags = flags_of(stores, entries)
        first_lacks = (flags & LACKS_THOUGHT) > 0
        second_lacks = (flags & SECOND_LACKS_THOUGHT) > 0
        # Where the empty thought is part of the prompt, the chosen answer decides whether the
        # prompt ends with it.
        prompt = part_lengths(stores, entries, 0) + _shown(rules) * first_lacks
        chosen = part_lengths(stores, entries, 1) + _closing(rules, first_lacks)
        rejected = part_lengths(stores, entries, 2) + _closing(rules, second_lacks)
        source, longest = assemble.cut_pairs(prompt, np.maximum(chosen, rejected), rules.cutoff)
        chosen_cut, rejected_cut = np.minimum(chosen, longest), np.minimum(rejected, longest)

        def of_prompt(n: np.ndarray) -> np.ndarray:
            # A shared prompt stands once in the row, and its last token once more at the head of
            # each branch.
            return np.where(n > 1, n + 1, 2 * n) if rules.share_prompt else 2 * n

        return Lengths(
            of_prompt(prompt) + chosen + rejected,
            of_prompt(source) + chosen_cut + rejected_cut,
            (chosen_cut == 0) | (rejected_cut == 0),
        )

    def assembled(
        self, parts: Parts, flags: Sequence[int], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        lacks = (bool(flags[0] & LACKS_THOUGHT), bool(flags[0] & SECOND_LACKS_THOUGHT))
        return assemble.pair(parts[0], rules, sample, lacks)

    def saved_documents(
        self, documents: Sequence[tuple[np.ndarray, np.ndarray]], flags: int, sample: int
    ) -> list[TokenizedDocument]:
        roles: tuple[Role, Role] = ("chosen", "rejected")
        return [
            saved_document(ids, labels, role, sample)
            for (ids, labels), role in zip(documents, roles, strict=True)
        ]

    def prompt_places(
        self, lengths: Sequence[int], rules: Rules, role: str
    ) -> tuple[int, set[int]] | None:
        if rules.thought:
            return None
        end = int(rules.eos is not None)
        answers = [n + end for n in lengths[1:]]
        source, longest = assemble.cut_pair(lengths[0], max(answers), rules.cutoff)
        answer = answers[1] if role == "rejected" else answers[0]
        return source + min(answer, longest), set(range(source))


class LabelledKind(Kind):
    """An answer marked good or bad, and for the KL estimate another sample's answer to the same
    prompt. Parts: prompt, answer. Entries are [n, 4] with the sample whose answer is borrowed, the
    entry before.
    """

    name = "kto"
    samples = 2
    branches = True
    saved_prefixes = ("", "kl_")
    saved_columns = frozenset({"kl_input_ids"})

    def check_source(self, source: DataSource, stage: str) -> None:
        super().check_source(source, stage)
        if not source.kto_tag:
            raise DataError(
                f"Stage {stage} needs the column kto_tag; data set {source.name!r} does not name it"
                " in dataset_info.json."
            )

    def parts(
        self, conversation: Conversation, template: AnyTemplate, options: PartOptions
    ) -> tuple[list[list[Piece]], int]:
        c = conversation
        if c.desired is None or len(c.answers) != 1:
            raise BadRow("no label: KTO needs an answer and kto_tag")
        if not c.answers[0].content.strip():
            raise BadRow("empty answer")
        source, targets, lacks = template.one_turn(c.prompt, c.answers, c.system, c.tools)
        return [source, *targets], DESIRED * c.desired + LACKS_THOUGHT * lacks[0]

    def borrow(self, entries: np.ndarray) -> np.ndarray:
        return np.column_stack([entries, np.roll(entries, 1, axis=0)])

    def lengths(self, stores: Sequence[Store], entries: np.ndarray, rules: Rules) -> Lengths:
        own, other = entries[:, :2], entries[:, 2:]
        lacks = (flags_of(stores, own) & LACKS_THOUGHT) > 0
        other_lacks = (flags_of(stores, other) & LACKS_THOUGHT) > 0
        alone = part_lengths(stores, own, 0)
        prompt, other_prompt = alone + _shown(rules) * lacks, alone + _shown(rules) * other_lacks
        first = part_lengths(stores, own, 1) + _closing(rules, lacks)
        second = part_lengths(stores, other, 1) + _closing(rules, other_lacks)
        source, target = assemble.cut_pairs(prompt, first, rules.cutoff)
        other_source, other_target = assemble.cut_pairs(other_prompt, second, rules.cutoff)
        # Where both keep the same prompt it stands once in the row, and its last token once more at
        # the head of each branch.
        same = (prompt == other_prompt) & (source == other_source)
        shared = same & (source > 1) & rules.share_prompt
        before = first + second + np.where(shared, prompt + 1, prompt + other_prompt)
        after = target + other_target + np.where(shared, source + 1, source + other_source)
        return Lengths(before, after, target == 0)

    def assembled(
        self, parts: Parts, flags: Sequence[int], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        prompt, answer = parts[0]
        return assemble.kto(
            prompt,
            answer,
            parts[1][1],
            rules,
            sample,
            bool(flags[0] & DESIRED),
            bool(flags[0] & LACKS_THOUGHT),
            bool(flags[1] & LACKS_THOUGHT),
        )

    def saved_flags(self, batch: dict[str, list], i: int) -> int:
        return DESIRED if batch["kto_tags"][i] else 0

    def saved_documents(
        self, documents: Sequence[tuple[np.ndarray, np.ndarray]], flags: int, sample: int
    ) -> list[TokenizedDocument]:
        roles: tuple[Role, Role] = ("chosen" if flags & DESIRED else "rejected", "kl")
        return [
            saved_document(ids, labels, role, sample)
            for (ids, labels), role in zip(documents, roles, strict=True)
        ]

    def check(
        self, what: str, flags: np.ndarray, report: Report, rules: Rules, log: logging.Logger
    ) -> None:
        good = int(((flags & DESIRED) > 0).sum())
        if good in (0, len(flags)):
            log.warning(
                f"All {len(flags)} KTO samples are {'desired' if good else 'undesired'}: KTO "
                "needs both kinds."
            )

    def prompt_places(
        self, lengths: Sequence[int], rules: Rules, role: str
    ) -> tuple[int, set[int]] | None:
        if rules.thought:
            return None
        answer = lengths[1] + int(rules.eos is not None)
        source, longest = assemble.cut_pair(lengths[0], answer, rules.cutoff)
        return source + min(answer, longest), set(range(source))


class SavedKind(Kind):
    """Documents that LLaMA-Factory saved with their labels, of samples `of` some kind. Parts: ids
    and labels of the first document, ids and labels of the second, ... They are final: nothing is
    cut or packed.
    """

    name = "made"
    final = True

    def __init__(self, of: Kind):
        self.of = of

    def fit(
        self,
        stores: Sequence[Store],
        entries: np.ndarray,
        rules: Rules,
        packed: bool,
        report: Report,
    ) -> tuple[np.ndarray, np.ndarray]:
        return entries, self.lengths(stores, entries, rules).after

    def lengths(self, stores: Sequence[Store], entries: np.ndarray, rules: Rules) -> Lengths:
        tokens = total_lengths(stores, entries) // 2
        return Lengths(tokens, tokens, np.zeros(len(entries), bool))

    def assembled(
        self, parts: Parts, flags: Sequence[int], entry: np.ndarray, rules: Rules, sample: int
    ) -> list[TokenizedDocument]:
        documents = list(zip(parts[0][::2], parts[0][1::2], strict=True))
        return self.of.saved_documents(documents, flags[0], sample)


KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (TextKind(), ConversationKind(), PairKind(), LabelledKind())
}


def _shown(rules: Rules) -> int:
    """Tokens of the empty thought at the end of a prompt whose answer lacks one."""
    return 0 if rules.thought_trained else len(rules.thought)


def _closing(rules: Rules, lacks: np.ndarray) -> np.ndarray:
    """[n] tokens beside an answer's own: its end, and the empty thought before it where it lacks
    one and that is trained.
    """
    thought = len(rules.thought) if rules.thought_trained else 0
    return int(rules.eos is not None) + thought * lacks


def _question(c: Conversation, template: AnyTemplate) -> list[Piece]:
    """What the model is to answer: all up to where its answer begins."""
    answers = () if isinstance(template, ChatTemplate) else (Message("assistant", ""),)
    return template.one_turn(c.prompt, answers, c.system, c.tools)[0]


def _to_last_trained(messages: list[Message]) -> list[Message]:
    """The conversation up to the last answer that is to be learned.

    Raises:
        BadRow: no answer is to be learned.
    """
    while messages and not messages[-1].trained:
        messages = messages[:-2]
    if not messages:
        raise BadRow(
            "no answer: the row's own flags (weight, loss, train) leave no answer to learn"
        )
    return messages


def _untrained_in_sources(pieces: list[list[Piece]], messages: list[Message]) -> list[list[Piece]]:
    """Source, target, source, target, ... where answers that are not to be learned are part of the
    source that follows.
    """
    if len(pieces) != len(messages) or all(m.trained for m in messages[1::2]):
        return pieces
    out: list[list[Piece]] = []
    before: list[Piece] = []
    for i in range(0, len(pieces), 2):
        if messages[i + 1].trained:
            out += [[*before, *pieces[i]], pieces[i + 1]]
            before = []
        else:
            before += [*pieces[i], *pieces[i + 1]]
    return out
