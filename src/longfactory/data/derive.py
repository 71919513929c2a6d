"""A template for any other model: its own chat template, rendered message by message.

A conversation is rendered up to each message; what a message adds to the text is its piece. So the tokens of a conversation are
those of the model's own template, and the trained part is what the model would have written after the generation prompt. Some chat
templates rewrite earlier answers (they drop their thoughts, say): there the pieces do not add up, and only the last answer is
trained, after the history as the model sees it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from longfactory.data.errors import BadRow, DataError
from longfactory.data.template import Message, Piece
from longfactory.data.tokens import PieceTokenizer


class ChatTemplate:
    """The tokenizer's chat template in the role of a `Template` (same two methods)."""

    def __init__(self, tokenizer: Any, default_system: str = "", enable_thinking: bool | None = None):
        self.tokenizer = tokenizer
        self.default_system = default_system
        self.text = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else json.dumps(tokenizer.chat_template)
        self.options: dict[str, Any] = {}
        if enable_thinking is not None and "enable_thinking" in self.text:
            self.options["enable_thinking"] = enable_thinking
        # What the stages read from a table template.
        self.name = ""
        self.eos_after_answer = False
        self.eos_label_on_first_turn = False
        self.enable_thinking = True
        self.thinking = False
        self.prefix: tuple[Piece, ...] = ()

    def __repr__(self) -> str:
        return f"ChatTemplate({self.text!r}, {self.default_system!r}, {self.options!r})"

    def thought(self) -> str:
        return ""

    def render(self, messages: Sequence[Message], system: str | None, tools: str | None, answer_next: bool) -> str:
        """The text of a conversation; with `answer_next` it ends with the generation prompt.

        Raises:
            BadRow: the chat template refuses the conversation, or the tools are not JSON.
        """
        import jinja2

        system = system or self.default_system
        shown: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for m in messages:
            if m.role == "function":
                shown.append({"role": "assistant", "content": "", "tool_calls": _calls(m.content)})
            else:
                shown.append({"role": "tool" if m.role == "observation" else m.role, "content": m.content})
        try:
            described = json.loads(tools) if tools else None
        except json.JSONDecodeError as e:
            raise BadRow(f"tools are not JSON: {e.msg} at character {e.pos}") from None
        try:
            return self.tokenizer.apply_chat_template(
                shown, tools=described or None, add_generation_prompt=answer_next, tokenize=False, **self.options
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as e:
            raise BadRow(f"the chat template refuses the conversation: {e}") from None

    def turns(
        self, messages: Sequence[Message], system: str | None, tools: str | None, last_only: bool = False
    ) -> tuple[list[list[Piece]], bool]:
        """Pieces of every message; or [source], [target] of the last answer alone and True, where the turns do not add up."""
        pieces: list[list[Piece]] = []
        done = ""
        for i in range(0, len(messages), 2):
            asked = self.render(messages[: i + 1], system, tools, True)
            answered = self.render(messages[: i + 2], system, tools, False)
            if not asked.startswith(done) or not answered.startswith(asked):
                break
            pieces += [[asked[len(done) :]], [answered[len(asked) :]]]
            done = answered
        else:
            return pieces, False
        source, targets, _ = self.one_turn(messages[:-1], messages[-1:], system, tools)
        return [source, targets[0]], True

    def one_turn(
        self, prompt: Sequence[Message], answers: Sequence[Message], system: str | None, tools: str | None
    ) -> tuple[list[Piece], list[list[Piece]], list[bool]]:
        """Pieces of the prompt and of each answer."""
        asked = self.render(prompt, system, tools, True)
        targets: list[list[Piece]] = []
        for answer in answers:
            answered = self.render([*prompt, answer], system, tools, False)
            if not answered.startswith(asked):
                raise BadRow("the chat template's answer does not begin where its generation prompt ends")
            targets.append([answered[len(asked) :]])
        return [asked], targets, [False] * len(answers)


def _calls(content: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content)
    except json.JSONDecodeError as e:
        raise BadRow(f"a tool call is not JSON: {e.msg} at character {e.pos}") from None
    return [{"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])]


_PROBE = (
    Message("user", "What is a row?"),
    Message("assistant", "A row is one flat sequence."),
    Message("user", "And then?\n"),
    Message("assistant", "Documents, laid end to end.\n\nThat is all."),
)


def check(template: ChatTemplate) -> list[str]:
    """What is not exact about this model's chat template, in sentences for the user; an empty list if nothing is.

    Raises:
        ValueError: the template cannot be used to train at all.
    """
    try:
        whole = template.render(_PROBE, None, None, False)
        pieces, last_only = template.turns(_PROBE, None, None)
    except BadRow as e:
        raise DataError(f"The model's chat template cannot be used for training: {e}. Name a template with `template:`.") from None
    found = []
    if last_only:
        found.append(
            "The model's chat template rewrites earlier answers: of a conversation of several turns only the last answer is trained. "
            "A template from the table (template: ...) trains every turn."
        )
    tokenizer = PieceTokenizer(template.tokenizer)
    ids = [i for group in tokenizer.pieces(pieces) for i in group.tolist()]
    if ids != template.tokenizer.encode(whole, add_special_tokens=False):
        found.append(
            "Tokens differ where an answer meets its header: this tokenizer merges across that border. Training uses the tokens that the "
            "model sees when it answers (header and answer tokenised apart)."
        )
    try:
        system = template.render((Message("user", "x"),), "a system text", None, True)
    except BadRow:
        system = ""
    if "a system text" not in system:
        found.append("The model's chat template has no place for a system message: rows with a system text lose it or are refused.")
    return found
