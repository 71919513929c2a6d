"""Templates: how messages become pieces of text and special tokens.

A template is a set of slots. A slot is a tuple of pieces; a piece is a string, in which
`{{content}}` stands for the message, or a special token. Every string piece is tokenised on its own
and the ids are laid end to end: that rule, and which piece is trained, are LLaMA-Factory's, so the
tokens of a known template equal its tokens. The generation header ("assistant\n") ends the source
of a turn; the end token belongs to its target and is trained.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from longfactory.data import tool_formats
from longfactory.data.errors import BadRow

MessageRole = Literal["user", "assistant", "observation", "function"]


@dataclasses.dataclass(frozen=True)
class Special:
    """A token that is named, not spelled: the tokenizer's bos or eos, or a token by its exact
    text.
    """

    kind: Literal["bos", "eos", "token"]
    text: str = ""


BOS = Special("bos")
EOS = Special("eos")

Piece = str | Special
Slot = tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Message:
    """One message in the normal form. The content of a "function" message is JSON: a call or a list
    of calls.

    `before` is text that an answer has in front of its calls, `thought` its reasoning where the row
    has it in a field of its own. `results` are the contents of several tool results that follow one
    another, which are one message here. `trained` is false where the row says that this answer is
    not to be learned. `shown` are the messages as the row has them (the system's in front of the
    first): what the model's own chat template sees. It is empty where the row is not made of such
    messages.
    """

    role: MessageRole
    content: str
    before: str = ""
    thought: str = ""
    results: tuple[str, ...] = ()
    trained: bool = True
    shown: tuple[dict[str, Any], ...] = ()


def fill(slot: Slot, content: str) -> list[Piece]:
    """The slot with the content in place. Only the first mark of each piece is replaced, so a
    content may hold the mark.
    """
    return [p.replace("{{content}}", content, 1) if isinstance(p, str) else p for p in slot]


@dataclasses.dataclass(frozen=True)
class Template:
    """Slots and habits of one chat format.

    `eos_after_answer`: the last answer is closed by eos, and eos is also the label (not the input)
    at the first token of each later turn; the sample's budget is one token smaller.
    `system_in_user`: the system text is put inside the first user message. `call_by_call`: of
    several tool calls each fills the function slot, else one fill holds them all. `thinking`:
    answers without a thought get an empty one: trained when `enable_thinking` is true, else masked.
    """

    name: str = ""
    prefix: Slot = ()
    system: Slot = ("{{content}}",)
    user: Slot = ("{{content}}",)
    assistant: Slot = ("{{content}}", EOS)
    function: Slot | None = None
    observation: Slot | None = None
    separator: Slot = ()
    tools: str = "default"
    calls: str = "default"
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thought_words: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    eos_after_answer: bool = False
    eos_label_on_first_turn: bool = False
    replace_eos: bool = False
    replace_chat_template: bool = False
    system_in_user: bool = False
    call_by_call: bool = False
    thinking: bool = False
    empty_thought: str | None = None
    enable_thinking: bool | None = True
    preserve_thinking: bool = False

    # -- what the stages ask for -------------------------------------------------------------------

    def turns(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: str | None,
        last_only: bool = False,
    ) -> tuple[list[list[Piece]], bool]:
        """Pieces of every message, for multi-turn training: source, target, source, target, ...

        `last_only` (mask_history) drops the thoughts of earlier answers. The second value is true
        where only the last target may be trained although the user asked for all (never for a table
        template).
        """
        messages = [self._spoken(m) for m in messages]
        last_only = last_only and not self.preserve_thinking
        if self.thinking:
            if self.enable_thinking is False:
                messages = [self._thoughtless(m) if i % 2 else m for i, m in enumerate(messages)]
            if last_only:
                messages = [
                    self._thoughtless(m) if i % 2 and i < len(messages) - 2 else m
                    for i, m in enumerate(messages)
                ]
        pieces = self._pieces(messages, system, tools)
        if self.thinking:
            for i in [len(messages) - 2] if last_only else range(0, len(messages), 2):
                if not self._thinks(messages[i + 1]):
                    if self.enable_thinking:
                        pieces[i + 1].insert(0, self.thought())
                    else:
                        pieces[i].append(self.thought())
        return pieces, False

    def one_turn(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Message],
        system: str | None,
        tools: str | None,
    ) -> tuple[list[Piece], list[list[Piece]], list[bool]]:
        """Pieces of the prompt, of each answer, and whether an answer lacks the thought that the
        template wants (see `thought`).
        """
        history = [self._spoken(m) for m in prompt]
        answers = [self._spoken(a) for a in answers]
        if self.thinking and not self.preserve_thinking:
            history = [self._thoughtless(m) if i % 2 else m for i, m in enumerate(history)]
        if self.thinking and self.enable_thinking is False:
            answers = [self._thoughtless(a) for a in answers]
        pieces = self._pieces([*history, answers[0]], system, tools)
        source = [p for message in pieces[:-1] for p in message]
        targets = [pieces[-1], *(self._message(a, "") for a in answers[1:])]
        lacks = [self.thinking and not self._thinks(a) for a in answers]
        return source, targets, lacks

    # -- thoughts ----------------------------------------------------------------------------------

    def thought(self) -> str:
        """The empty thought."""
        return (
            self.thought_words[0] + self.thought_words[1]
            if self.empty_thought is None
            else self.empty_thought
        )

    def has_thought(self, content: str) -> bool:
        return any(word.strip() in content for word in self.thought_words)

    def without_thought(self, content: str) -> str:
        opening, closing = map(re.escape, self.thought_words)
        return re.sub(f"{opening}(.*?){closing}", "", content, flags=re.DOTALL).lstrip("\n")

    def _spoken(self, message: Message) -> Message:
        """The message with its thought in front of its text, between the template's words.

        Raises:
            BadRow: the text holds another thought already.
        """
        if not message.thought:
            return message
        if self._thinks(message):
            if message.thought.strip() not in message.before + message.content:
                raise BadRow(
                    "two thoughts: an answer has one in its content and another in a field of"
                    " its own"
                )
            return dataclasses.replace(message, thought="")
        thought = self.thought_words[0] + message.thought.strip("\n") + self.thought_words[1]
        if message.role == "function":
            return dataclasses.replace(
                message, before=thought + message.before.lstrip("\n"), thought=""
            )
        return dataclasses.replace(
            message, content=thought + message.content.lstrip("\n"), thought=""
        )

    def _thinks(self, message: Message) -> bool:
        return self.has_thought(message.before + message.content)

    def _thoughtless(self, message: Message) -> Message:
        before = self.without_thought(message.before)
        return dataclasses.replace(
            message, content=self.without_thought(message.content), before=before
        )

    # -- pieces ------------------------------------------------------------------------------------

    def _pieces(
        self, messages: Sequence[Message], system: str | None, tools: str | None
    ) -> list[list[Piece]]:
        system = system or self.default_system
        header: list[Piece] = []
        if system or tools:
            header = fill(
                self.system,
                system + (tool_formats.describe_tools(self.tools, tools) if tools else ""),
            )
        out: list[list[Piece]] = []
        for i, message in enumerate(messages):
            pieces: list[Piece] = []
            inside = ""
            if i == 0:
                pieces += self.prefix
                if self.system_in_user:
                    inside = str(header[0]) if header else ""
                else:
                    pieces += header
            elif i % 2 == 0:
                pieces += self.separator
            out.append(pieces + self._message(message, inside))
        return out

    def _message(self, message: Message, inside: str) -> list[Piece]:
        match message.role:
            case "user":
                return fill(self.user, inside + message.content)
            case "assistant":
                return fill(self.assistant, message.content)
            case "observation":
                slot = self.user if self.observation is None else self.observation
                return fill(slot, self._results(slot, message))
            case "function":
                return self._function(message)

    def _results(self, slot: Slot, message: Message) -> str:
        """The content of a tool's message. Several results are closed and opened again where the
        slot wraps each of them.
        """
        if not message.results:
            return message.content
        wraps = any(isinstance(p, str) and "</tool_response>" in p for p in slot)
        return ("\n</tool_response>\n<tool_response>\n" if wraps else "\n").join(message.results)

    def _function(self, message: Message) -> list[Piece]:
        """An answer that calls tools. Text in front of the calls stands where the text of an answer
        does.
        """
        texts = self._call_texts(message.content)
        if not message.before:
            slot = self.assistant if self.function is None else self.function
            return [piece for text in texts for piece in fill(slot, text)]
        before = message.before
        # a thought ends as its words do
        if not any(before.endswith(word) for word in self.thought_words):
            before += tool_formats.between_text_and_calls(self.calls)
        if self.function is None:
            texts[0] = before + texts[0]
            return [piece for text in texts for piece in fill(self.assistant, text)]
        opening: list[Piece] = []
        for piece in self.assistant:
            if isinstance(piece, str) and "{{content}}" in piece:
                opening.append(piece.partition("{{content}}")[0] + before)
                break
            opening.append(piece)
        return opening + [piece for text in texts for piece in fill(self.function, text)]

    def _call_texts(self, content: str) -> list[str]:
        """Texts of a message's tool calls. A thought around the JSON is kept in front of the
        first.
        """
        before, text = "", content
        if not self.system_in_user and not _is_json(content):
            opening, closing = map(re.escape, self.call_words)
            call = re.search(f"{opening}(.*?){closing}", content, re.DOTALL)
            if call:
                before, text = content.replace(call.group(0), ""), call.group(1)
            else:
                opening, closing = map(re.escape, self.thought_words)
                thought = re.search(f"{opening}(.*?){closing}", content, re.DOTALL)
                if thought:
                    before, text = thought.group(0), content.replace(thought.group(0), "")
        try:
            calls = json.loads(text)
        except json.JSONDecodeError as e:
            raise BadRow(f"a tool call is not JSON: {e.msg} at character {e.pos}") from None
        calls = calls if isinstance(calls, list) else [calls]
        if not calls:
            raise BadRow("a tool call is empty: the message lists no call")
        groups = [[call] for call in calls] if self.call_by_call else [calls]
        first, *rest = [tool_formats.write_calls(self.calls, group) for group in groups]
        return [before + first, *rest]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def fix_tokenizer(template: Template, tokenizer: Any, log: Callable[[str], None]) -> None:
    """Gives the tokenizer what the template needs: the eos token, a pad token, stop words as
    special tokens, a chat template.

    These changes are saved with the model, so that its answers end where the training data ended.
    """
    size = len(tokenizer)
    stop_words = list(template.stop_words)
    if template.replace_eos:
        eos = stop_words.pop(0)
        if tokenizer.eos_token != eos:
            log(f"The eos token becomes {eos} (it was {tokenizer.eos_token}).")
            tokenizer.add_special_tokens({"eos_token": eos})
    if tokenizer.eos_token_id is None:
        log("The tokenizer has no eos token: <|endoftext|> is added.")
        tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if stop_words:
        try:
            tokenizer.add_special_tokens(
                {"extra_special_tokens": stop_words}, replace_extra_special_tokens=False
            )
        except (TypeError, ValueError):
            tokenizer.add_special_tokens(
                {"additional_special_tokens": stop_words}, replace_additional_special_tokens=False
            )
    if len(tokenizer) > size:
        log(
            f"{len(tokenizer) - size} tokens were added to the tokenizer. Set resize_vocab: "
            "true if the model's embedding has no rows for them."
        )
    if tokenizer.chat_template is None or template.replace_chat_template:
        written = chat_template(template, tokenizer)
        if written is not None:
            tokenizer.chat_template = written


def chat_template(template: Template, tokenizer: Any) -> str | None:
    """The template as a Jinja chat template (system, user, assistant), or None where a slot names a
    token by its text.
    """

    def expression(slot: Slot, variable: str) -> str:
        parts = []
        for piece in slot:
            if isinstance(piece, Special):
                if piece.kind == "token":
                    raise LookupError
                token = tokenizer.bos_token if piece.kind == "bos" else tokenizer.eos_token
                parts += [json.dumps(token, ensure_ascii=False)] if token else []
            else:
                before, mark, after = piece.partition("{{content}}")
                parts += [json.dumps(before, ensure_ascii=False)] if before else []
                parts += [variable] if mark else []
                parts += [json.dumps(after, ensure_ascii=False)] if after else []
        return " + ".join(parts)

    try:
        prefix, user = expression(template.prefix, ""), expression(template.user, "content")
        assistant, system = (
            expression(template.assistant, "content"),
            expression(template.system, "system"),
        )
    except LookupError:
        return None
    default = json.dumps(template.default_system, ensure_ascii=False)
    out = (
        "{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest ="
        " messages[1:] %}"
    )
    out += "{% else %}{% set system = " + default + " %}{% set rest = messages %}{% endif %}"
    out += "{{ " + prefix + " }}" if prefix else ""
    if template.system_in_user:
        out += "{% set head = " + (system or '""') + " if system else '' %}"
    else:
        out += "{% if system %}{{ " + (system or '""') + " }}{% endif %}"
    out += "{% for message in rest %}{% set content = message.content %}"
    if template.system_in_user:
        out += "{% if loop.first %}{% set content = head + content %}{% endif %}"
    out += (
        "{% if message.role == 'user' %}{{ "
        + user
        + " }}{% elif message.role == 'assistant' %}{{ "
        + assistant
        + " }}{% endif %}"
    )
    return out + "{% endfor %}"
