"""From stored parts to documents: truncation, labels, pairs. Pure arithmetic on lengths and arrays;
nothing is tokenised here.

A stored sample is a list of parts: sft: source, target, source, target, ...; rm and dpo: prompt,
chosen, rejected; kto: prompt, answer; pt: the text. Parts are stored whole, so `cutoff_len` and the
masks can change without tokenising again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from longfactory.data.row import IGNORE, Role, TokenizedDocument

Ids = np.ndarray


@dataclasses.dataclass(frozen=True)
class Rules:
    """How parts become documents.

    `eos` is the eos id where the template closes the last answer by eos (then eos is also the label
    at the first token of each later turn), else None. `thought`: ids of the empty thought;
    `thought_trained`: whether it is part of the answer or of the prompt. `prefix`: number of tokens
    at the beginning (bos and the like) that `keep_tail` keeps.
    """

    cutoff: int
    strategy: Literal["llamafactory", "drop", "error", "keep_tail"] = "llamafactory"
    train_on_prompt: bool = False
    mask_history: bool = False
    share_prompt: bool = False
    eos: int | None = None
    eos_label_on_first_turn: bool = False
    thought: tuple[int, ...] = ()
    thought_trained: bool = True
    prefix: int = 0


def cut_pair(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """Lengths of a source and a target that share `cutoff` tokens: LLaMA-Factory's rule
    (`infer_seqlen`).

    A target shorter than half the budget is kept whole; else a source shorter than half of it is;
    else both shrink in proportion.
    """
    if 2 * target < cutoff:
        room = cutoff
    elif 2 * source < cutoff:
        room = cutoff - source
    else:
        room = int(cutoff * (target / (source + target)))
    target = min(room, target)
    return min(max(cutoff - target, 0), source), target


def cut_pairs(source: np.ndarray, target: np.ndarray, cutoff: int) -> tuple[np.ndarray, np.ndarray]:
    """`cut_pair` for arrays of lengths."""
    share = (cutoff * (target / np.maximum(source + target, 1))).astype(np.int64)
    room = np.where(
        2 * target < cutoff, cutoff, np.where(2 * source < cutoff, cutoff - source, share)
    )
    target = np.minimum(room, target)
    return np.minimum(np.maximum(cutoff - target, 0), source), target


def cut_turns(lengths: Sequence[int], rules: Rules) -> list[tuple[int, int, int]]:
    """(turn, source length, target length) of the turns that are kept, first to last. `lengths`:
    source, target, source, target, ...

    Turns are filled one after the other until the budget is used: from the first on, or from the
    last on with `mask_history` and with `keep_tail`.
    """
    used = 0 if rules.eos is None else 1
    turns = range(len(lengths) // 2)
    backwards = rules.mask_history or rules.strategy == "keep_tail"
    kept = []
    for turn in reversed(turns) if backwards else turns:
        if used >= rules.cutoff:
            break
        source, target = cut_pair(lengths[2 * turn], lengths[2 * turn + 1], rules.cutoff - used)
        used += source + target
        kept.append((turn, source, target))
    return kept[::-1] if backwards else kept


def cut(ids: Ids, length: int, rules: Rules, prefix: int = 0) -> Ids:
    """The first `length` tokens; with `keep_tail`, the first `prefix` tokens and the last ones."""
    if len(ids) <= length:
        return ids
    if rules.strategy != "keep_tail":
        return ids[:length]
    prefix = min(prefix, length)
    return np.concatenate([ids[:prefix], ids[len(ids) - (length - prefix) :]])


def sft(
    parts: Sequence[Ids], rules: Rules, sample: int, last_only: bool = False
) -> TokenizedDocument:
    """One conversation. Sources are masked unless `train_on_prompt`; with `mask_history` (or
    `last_only`) only the last target is trained."""
    n = len(parts) // 2
    ids: list[Ids] = []
    labels: list[Ids] = []
    kept = cut_turns([len(p) for p in parts], rules)
    # What a chat template writes after the last answer is a source without a target.
    last = max((t for t in range(n) if len(parts[2 * t + 1])), default=n - 1)
    for turn, source_length, target_length in kept:
        source = cut(parts[2 * turn], source_length, rules, rules.prefix if turn == 0 else 0)
        target = parts[2 * turn + 1][:target_length]
        source_label = source if rules.train_on_prompt else np.full(source_length, IGNORE, np.int32)
        if rules.eos is not None and source_length and not rules.train_on_prompt:
            # With mask_history turns are counted from the end, so it is the last turn that has no
            # such label.
            first = turn == (n - 1 if rules.mask_history else 0)
            if not first or rules.eos_label_on_first_turn:
                source_label[0] = rules.eos
        trained = turn == last if rules.mask_history or last_only else True
        ids += [source, target]
        labels += [source_label, target if trained else np.full(target_length, IGNORE, np.int32)]
    if rules.eos is not None:
        end = np.array([rules.eos], np.int32)
        ids.append(end)
        labels.append(end)
    return _document(ids, labels, "text", sample)


def question(prompt: Ids, rules: Rules, sample: int) -> TokenizedDocument:
    """A conversation up to where its answer begins (role prompt): nothing of it is trained."""
    thought = np.array(() if rules.thought_trained else rules.thought, np.int32)
    prompt = cut(prompt, max(rules.cutoff - len(thought), 0), rules, rules.prefix)
    ids = np.concatenate([prompt, thought])
    return _document([ids], [_masked(len(ids))], "prompt", sample)


def plain(ids: Ids, sample: int) -> TokenizedDocument:
    """Text of which every token is trained."""
    return _document([ids], [ids], "text", sample)


def _with_thought(prompt: Ids, answer: Ids, lacks: bool, rules: Rules) -> tuple[Ids, Ids]:
    if not lacks:
        return prompt, answer
    thought = np.array(rules.thought, np.int32)
    return (
        (prompt, np.concatenate([thought, answer]))
        if rules.thought_trained
        else (np.concatenate([prompt, thought]), answer)
    )


def _closed(answer: Ids, rules: Rules) -> Ids:
    return answer if rules.eos is None else np.append(answer, np.int32(rules.eos))


def _masked(n: int) -> Ids:
    return np.full(n, IGNORE, np.int32)


def _document(
    ids: list[Ids], labels: list[Ids], role: Role, sample: int, parent: int = -1
) -> TokenizedDocument:
    return TokenizedDocument(
        np.concatenate(ids).astype(np.int64),
        np.concatenate(labels).astype(np.int64),
        role=role,
        sample=sample,
        parent=parent,
    )


def pair_lengths(prompt: int, chosen: int, rejected: int, rules: Rules) -> tuple[int, int, int]:
    """Lengths of a pair's parts after truncation: the longer answer sets the prompt's room."""
    source, target = cut_pair(prompt, max(chosen, rejected), rules.cutoff)
    return source, min(chosen, target), min(rejected, target)


def pair(
    parts: Sequence[Ids], rules: Rules, sample: int, lacks: Sequence[bool] = (False, False)
) -> list[TokenizedDocument]:
    """A preference pair: [chosen, rejected], or with `share_prompt` [prompt, chosen branch,
    rejected branch].

    A shared prompt is cut one token before its end, and each branch begins with that token (its
    label is masked, as it is predicted by the prompt).
    """
    answers = []
    prompt = parts[0]
    for i in (0, 1):
        shown, answer = _with_thought(parts[0], parts[1 + i], lacks[i], rules)
        answers.append(_closed(answer, rules))
        # Where the empty thought is part of the prompt, the chosen answer decides whether the
        # prompt ends with it.
        prompt = shown if i == 0 else prompt
    source, *lengths = pair_lengths(len(prompt), len(answers[0]), len(answers[1]), rules)
    prompt = cut(prompt, source, rules, rules.prefix)
    answers = [a[:n] for a, n in zip(answers, lengths, strict=True)]
    roles: tuple[Role, Role] = ("chosen", "rejected")
    if rules.share_prompt and source > 1:
        return _branches(prompt, roles, answers, sample)
    return [
        _document([prompt, a], [_masked(source), a], role, sample)
        for role, a in zip(roles, answers, strict=True)
    ]


def kto(
    prompt: Ids,
    answer: Ids,
    other: Ids,
    rules: Rules,
    sample: int,
    desired: bool,
    lacks: bool = False,
    other_lacks: bool = False,
) -> list[TokenizedDocument]:
    """[the answer (role chosen or rejected), the prompt with another sample's answer (role kl)].

    With `share_prompt`, and where truncation leaves both the same prompt, [prompt, answer branch,
    kl branch], cut as for a pair.
    """
    roles: tuple[Role, Role] = ("chosen" if desired else "rejected", "kl")
    prompts, answers = [], []
    for a, lack in zip((answer, other), (lacks, other_lacks), strict=True):
        shown, a = _with_thought(prompt, a, lack, rules)
        a = _closed(a, rules)
        source, target = cut_pair(len(shown), len(a), rules.cutoff)
        prompts.append(cut(shown, source, rules, rules.prefix))
        answers.append(a[:target])
    if rules.share_prompt and len(prompts[0]) > 1 and np.array_equal(prompts[0], prompts[1]):
        return _branches(prompts[0], roles, answers, sample)
    return [
        _document([p, a], [_masked(len(p)), a], role, sample)
        for p, role, a in zip(prompts, roles, answers, strict=True)
    ]


def _branches(
    prompt: Ids, roles: tuple[Role, Role], answers: Sequence[Ids], sample: int
) -> list[TokenizedDocument]:
    """A prompt without its last token, and two answers that each begin with that token."""
    head, last = prompt[:-1], prompt[-1:]
    branches = [
        _document([last, a], [_masked(1), a], role, sample, parent=0)
        for role, a in zip(roles, answers, strict=True)
    ]
    return [_document([head], [_masked(len(head))], "prompt", sample), *branches]
