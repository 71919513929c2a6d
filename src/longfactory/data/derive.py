"""A template for any other model: its own chat template, rendered message by message.

A conversation is rendered up to each message; what a message adds to the text is its piece. So the
tokens of a conversation are those of the model's own template, and the trained part is what the
model would have written after the generation prompt. Some chat templates rewrite earlier answers
(they drop their thoughts, say): there the pieces do not add up, and only the last answer is
trained, after the history as the model sees it. A chat template that marks what the model writes
({% generation %}) is taken at its word: what it marks is trained.

Messages of the openai format reach the chat template as the row has them (roles, ids, names,
reasoning, results one by one). What a template cannot take is given to it in the form that it can,
found by trying once: arguments as an object or as a JSON string, a content of several parts as a
list or as one text, reasoning under the name that it reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from longfactory.data import limits
from longfactory.data.errors import BadRow
from longfactory.data.formats import THOUGHTS, Conversation, content_text
from longfactory.data.media.marks import parts_of
from longfactory.data.template import Message, Piece
from longfactory.data.tokens import PieceTokenizer
from longfactory.errors import DataError

MOST_LATE = 3
"""Renderings that may take too much before the run ends."""
NOT_AT_PROMPT = "the chat template's answer does not begin where its generation prompt ends"


def _texts(templates: Any) -> list[str]:
    """The texts in what a tokenizer may hold in place of one chat template."""
    if isinstance(templates, str):
        return [templates]
    inner = templates.values() if isinstance(templates, dict) else templates or ()
    return [text for x in inner for text in _texts(x)]


class _Rewritten(BadRow):
    """What a template writes of a conversation changes with what follows."""


class ChatTemplate:
    """The tokenizer's chat template in the role of a `Template` (same two methods)."""

    def __init__(
        self, tokenizer: Any, default_system: str = "", enable_thinking: bool | None = None
    ):
        self.tokenizer = tokenizer
        self.default_system = default_system
        self.text = (
            tokenizer.chat_template
            if isinstance(tokenizer.chat_template, str)
            else json.dumps(tokenizer.chat_template)
        )
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
        self.late = 0
        self.media: frozenset[str] = frozenset()  # kinds of media that it writes (`show_media`)
        self._refuse_endless()
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", self.text) is not None
        self.texts, self.parts = self._try_contents()
        self.string_arguments, self.needs_content = self._try_calls()
        self.written: set[str] = set()  # fields of messages that were seen in the text

    def __repr__(self) -> str:
        return f"ChatTemplate({self.text!r}, {self.default_system!r}, {self.options!r})"

    def _refuse_endless(self) -> None:
        """
        Raises:
            DataError: rendering one short conversation does not end.
        """
        texts = self.tokenizer.chat_template
        for text in _texts(texts):
            limits.refuse_powers(text)
        probe = [{"role": "user", "content": "some probe"}]
        render = self.tokenizer.apply_chat_template
        if not limits.ends_apart(lambda: render(probe, tokenize=False, **self.options)):
            raise DataError(
                f"The chat template takes longer than {limits.SECONDS:g} s for one short message."
                " Name a template with `template:`."
            )

    def thought(self) -> str:
        return ""

    def render(
        self, messages: Sequence[Message], system: str | None, tools: str | None, answer_next: bool
    ) -> str:
        """The text of a conversation; with `answer_next` it ends with the generation prompt.

        Raises:
            BadRow: the chat template refuses the conversation, or the tools are not JSON.
        """
        shown, described = self._seen(messages, system, tools)
        return self._apply(shown, described, answer_next)

    def unread(self, conversation: Conversation) -> set[str]:
        """What a conversation has and the chat template does not write: without it the text is the
        same.

        A field that was written once is not looked for again.
        """
        c = conversation
        passes = any(m.shown for m in c.prompt)
        out = {field for field in c.unread if field.startswith("column ") or not passes}
        fields = {field for field in c.fields if passes and field != "tool's name"} | (
            {"tools"} if c.tools else set()
        )
        for field in fields - self.written:
            for answer in c.answers:
                shown, tools = self._seen([*c.prompt, answer], c.system, c.tools)
                whole = self._apply(shown, tools, False)
                whose, _, key = field.partition("'s ")
                key = {"function_call": "tool_calls", "refusal": "content"}.get(key, key)
                keys = THOUGHTS if key in THOUGHTS else (key,)
                bare = [
                    {k: v for k, v in m.items() if k not in keys} if _whose(m) == whose else m
                    for m in shown
                ]
                try:
                    changed = self._apply(bare, None if field == "tools" else tools, False) != whole
                except BadRow:
                    changed = True  # it cannot do without
                if changed:
                    self.written.add(field)
        for answer in c.answers:
            text = self.render([*c.prompt, answer], c.system, c.tools, False)
            # Thoughts inside the text of earlier answers are left out by design.
            said = [
                (m.before or m.content).rpartition("</think>")[2]
                for m in c.prompt[1::2]
                if m.before or m.role == "assistant"
            ]
            said += (
                [answer.before or answer.content]
                if answer.before or answer.role == "assistant"
                else []
            )
            if any(words.strip() not in text for words in said):
                out.add("all of an answer's text (the chat template leaves some of it out)")
        return out | (fields - self.written)

    # -- messages as the chat template sees them ---------------------------------------------------

    def _seen(
        self, messages: Sequence[Message], system: str | None, tools: str | None
    ) -> tuple[list[dict[str, Any]], Any]:
        shown: list[dict[str, Any]] = []
        for m in messages:
            if m.shown:
                shown += map(self._taken, m.shown)
            elif m.role == "function":
                shown.append(
                    self._taken(
                        {"role": "assistant", "content": "", "tool_calls": _calls(m.content)}
                    )
                )
            else:
                shown.append(
                    self._taken(
                        {
                            "role": "tool" if m.role == "observation" else m.role,
                            "content": m.content,
                        }
                    )
                )
        system = system or self.default_system
        if system and not (shown and shown[0]["role"] in ("system", "developer")):
            shown.insert(0, self._taken({"role": "system", "content": system}))
        try:
            described = json.loads(tools) if tools else None
        except json.JSONDecodeError as e:
            raise BadRow(f"tools are not JSON: {e.msg} at character {e.pos}") from None
        if isinstance(described, dict):
            described = [described]
        if not isinstance(described, (list, type(None))):
            raise BadRow(f"tools are not a list: found a {type(described).__name__}")
        return shown, described or None

    def _taken(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message of the row in the form that the template can take."""
        out = self._contents(message)
        if out.get("tool_calls"):
            out["tool_calls"] = [
                _with_arguments(call, self.string_arguments) for call in out["tool_calls"]
            ]
            if self.needs_content:
                out.setdefault("content", "")
        thought = next((name for name in THOUGHTS if name in out), None)
        if thought is not None and not self._names(thought):
            read = next((name for name in THOUGHTS if self._names(name)), thought)
            out[read] = out.pop(thought)
        return out

    def show_media(self, written: dict[str, str]) -> None:
        """Finds out by trying which kinds of media the template writes for a part of that type.

        Args:
            written: what stands in its text for each kind, if it does.
        """
        known = set()
        for kind, text in written.items():
            probe = [{"type": kind}, {"type": "text", "text": "some probe"}]
            try:
                found = self._apply([{"role": "user", "content": probe}], None, True)
            except BadRow:
                continue
            if text in found and "some probe" in found:
                known.add(kind)
        self.media = frozenset(known)

    def _contents(self, message: dict[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if self.media and isinstance(content, (str, list)):
            text = content if isinstance(content, str) else content_text(content)
            parts = parts_of(text, self.media)
            if parts is not None:
                return message | {"content": parts}
        if isinstance(content, list) and not self.parts:
            return message | {"content": content_text(content)}
        if isinstance(content, str) and not self.texts:
            return message | {"content": [{"type": "text", "text": content}]}
        return dict(message)

    def _names(self, key: str) -> bool:
        """Whether the template reads a field: `.key`, `["key"]`, `"key" in message`. In a sentence
        that it writes the same word is no field (gpt-oss's: "for internal reasoning").
        """
        return re.search(rf"[.'\"]{re.escape(key)}\b", self.text) is not None

    def _apply(self, shown: list[dict[str, Any]], tools: Any, answer_next: bool) -> str:
        text = self._limited(
            lambda: self.tokenizer.apply_chat_template(
                shown,
                tools=tools,
                add_generation_prompt=answer_next,
                tokenize=False,
                **self.options,
            )
        )
        for message in shown:
            for call in message.get("tool_calls") or ():
                if str(call["function"].get("name")) not in text:
                    raise BadRow(
                        "lost tool calls: the chat template does not write them; name a template"
                        " with `template:`"
                    )
        return text

    def _limited(self, render: Callable[[], Any]) -> Any:
        """What `render` returns.

        Raises:
            BadRow: the chat template refuses the conversation, or takes too much.
            DataError: it takes too much again and again.
        """
        try:
            with limits.limited():
                return render()
        except limits.TooMuch as e:
            self.late += 1
            if self.late >= MOST_LATE:
                raise DataError(
                    f"The chat template took too much for {self.late} conversations; of the last"
                    f" one: {e}. Name a template with `template:`."
                ) from None
            raise BadRow(f"the chat template takes too much: {e}") from None
        except Exception as e:  # whatever a template may do with a conversation
            what = " ".join(str(e).split()) or type(e).__name__
            raise BadRow(f"the chat template refuses the conversation: {what}") from None

    def _try_calls(self) -> tuple[bool, bool]:
        """Whether the template writes the arguments of calls as they come, so that only a JSON
        string comes out as JSON, and whether an answer that calls needs a content, be it empty."""
        if "tool_calls" not in self.text:
            return False, False
        for arguments, text in (({"key": "value"}, ""), ('{"key": "value"}', '{"key": "value"}')):
            call = {
                "id": "call00001",
                "type": "function",
                "function": {"name": "probe", "arguments": arguments},
            }
            for content in ({}, {"content": ""}):
                messages = [
                    self._contents({"role": "user", "content": "x"}),
                    {"role": "assistant", **content, "tool_calls": [call]},
                ]
                try:
                    found = self._apply(messages, None, False)
                except BadRow:
                    continue
                if text in found and "{'key'" not in found:
                    return bool(text), bool(content)
        return False, False

    def _try_contents(self) -> tuple[bool, bool]:
        """Whether a content may be a text, and whether it may be a list of parts (where it may be
        neither, a text will have to do).
        """

        def written(content: Any) -> bool:
            try:
                found = self._apply([{"role": "user", "content": content}], None, True)
            except BadRow:
                return False
            return "some probe" in found and "'text'" not in found and '"text"' not in found

        parts = written([{"type": "text", "text": "some probe"}])
        return written("some probe") or not parts, parts

    # -- pieces ------------------------------------------------------------------------------------

    def turns(
        self,
        messages: Sequence[Message],
        system: str | None,
        tools: str | None,
        last_only: bool = False,
    ) -> tuple[list[list[Piece]], bool]:
        """Pieces of every message; or [source], [target] of the last answer alone and True, where
        the turns do not add up.

        Where the chat template marks what the model writes, the pieces are what stands before each
        mark and what it holds. What follows the last mark is a source without a target.
        """
        if self.marks and all(m.trained for m in messages[1::2]):
            marked = self._marked(messages, system, tools)
            if marked:
                return marked, False
        pieces: list[list[Piece]] = []
        done = ""
        for i in range(0, len(messages), 2):
            try:
                asked, answered = self.answered(messages[: i + 1], messages[i + 1], system, tools)
            except _Rewritten:
                break
            if not asked.startswith(done):
                break
            pieces += [[asked[len(done) :]], [answered[len(asked) :]]]
            done = answered
        else:
            return pieces, False
        source, targets, _ = self.one_turn(messages[:-1], messages[-1:], system, tools)
        return [source, targets[0]], True

    def _marked(
        self, messages: Sequence[Message], system: str | None, tools: str | None
    ) -> list[list[Piece]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        shown, described = self._seen(messages, system, tools)
        whole = self._apply(shown, described, False)
        template = self.tokenizer.get_chat_template(None, described)
        shown = [{k: v for k, v in m.items() if v is not None} for m in shown]
        texts, spans = self._limited(
            lambda: render_jinja_template(
                [shown],
                tools=described,
                chat_template=template,
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **(self.tokenizer.special_tokens_map | self.options),
            )
        )
        if texts[0] != whole:
            return []
        pieces: list[list[Piece]] = []
        done = 0
        for start, end in spans[0]:
            if start < end:
                pieces += [[whole[done:start]], [whole[start:end]]]
                done = end
        if pieces and done < len(whole):
            pieces += [[whole[done:]], []]
        return pieces

    def one_turn(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Message],
        system: str | None,
        tools: str | None,
    ) -> tuple[list[Piece], list[list[Piece]], list[bool]]:
        """Pieces of the prompt and of each answer."""
        found = [self.answered(prompt, answer, system, tools) for answer in answers]
        # Two answers may meet their generation prompt at different places: what is not of both
        # prompts is of the answers.
        asked = min((a for a, _ in found), key=len)
        if not all(a.startswith(asked) for a, _ in found):
            raise _Rewritten(NOT_AT_PROMPT)
        return [asked], [[answered[len(asked) :]] for _, answered in found], [False] * len(answers)

    def answered(
        self, prompt: Sequence[Message], answer: Message, system: str | None, tools: str | None
    ) -> tuple[str, str]:
        """The text in front of an answer, and with it.

        The answer begins where the generation prompt ends. Where that opens a thought that the
        template does not write in a conversation, the answer begins where the two texts part.

        Raises:
            BadRow: the conversation with the answer goes on from another text than that in front of
                it.
        """
        asked = self.render(prompt, system, tools, True)
        answered = self.render([*prompt, answer], system, tools, False)
        if answered.startswith(asked):
            return asked, answered
        bare = self.render(prompt, system, tools, False)
        if not asked.startswith(bare) or not answered.startswith(bare):
            raise _Rewritten(NOT_AT_PROMPT)
        header, rest = asked[len(bare) :], answered[len(bare) :]
        cut = self._parting(header, rest)
        for text in (answer.content.strip(), answer.thought.strip()):
            if text in rest and text not in rest[cut:]:  # it begins as the prompt ends
                cut = rest.rfind(text)
        cut -= len(re.search(r"[<\[◁]?[|｜]?$", rest[:cut]).group(0))  # type: ignore[union-attr]  # a mark that was begun alike
        left = header[cut:]
        if not cut or not (left.isspace() or re.search("think|thought", left)):
            raise _Rewritten(NOT_AT_PROMPT)
        return answered[: len(bare) + cut], answered

    def _parting(self, one: str, other: str) -> int:
        """The number of characters of the tokens that two texts begin with alike."""
        if not getattr(self.tokenizer, "is_fast", False):
            return next(
                (i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y),
                min(len(one), len(other)),
            )
        a, b = (
            self.tokenizer(t, add_special_tokens=False, return_offsets_mapping=True)
            for t in (one, other)
        )
        cut = 0
        for x, y, (_, end) in zip(
            a["input_ids"], b["input_ids"], b["offset_mapping"], strict=False
        ):
            if x != y:
                break
            cut = end
        return cut


def _whose(message: dict[str, Any]) -> str:
    return "system" if message["role"] == "developer" else message["role"]


def _calls(content: str) -> list[dict[str, Any]]:
    """The calls of a message whose content they are."""
    try:
        calls = json.loads(content)
    except json.JSONDecodeError as e:
        raise BadRow(f"a tool call is not JSON: {e.msg} at character {e.pos}") from None
    return [
        {"type": "function", "function": c} for c in (calls if isinstance(calls, list) else [calls])
    ]


def _with_arguments(call: Any, strings: bool) -> Any:
    """A call with its arguments as an object, or as a JSON string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if isinstance(arguments, str) and not strings:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise BadRow(
                "a tool call is not JSON: its arguments are a text that is not JSON"
            ) from None
    elif strings and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


_PROBE = (
    Message("user", "What is a row?"),
    Message("assistant", "A row is one flat sequence."),
    Message("user", "And then?\n"),
    Message("assistant", "Documents, laid end to end.\n\nThat is all."),
)


def check(template: ChatTemplate) -> list[str]:
    """What is not exact about this model's chat template, in sentences for the user; an empty list
    if nothing is.

    Raises:
        ValueError: the template cannot be used to train at all.
    """
    try:
        whole = template.render(_PROBE, None, None, False)
        pieces, last_only = template.turns(_PROBE, None, None)
    except BadRow as e:
        raise DataError(
            f"The model's chat template cannot be used for training: {e}. Name a template with"
            " `template:`."
        ) from None
    found = []
    if last_only:
        found.append(
            "The model's chat template rewrites earlier answers, so only the last answer of a "
            "multi-turn conversation is trained. A named template (template: ...) trains every "
            "turn."
        )
    question, answer = _PROBE[:2]
    header = template.render([question], None, None, True)
    asked, _ = template.answered([question], answer, None, None)
    if len(asked) < len(header):
        found.append(
            f"The chat template's generation prompt ends with {header[len(asked) :]!r}, which "
            "it does not write before the answers in a conversation. Training uses the tokens "
            "of the conversation, so at generation time the prompt will end differently than "
            "in training."
        )
    tokenizer = PieceTokenizer(template.tokenizer)
    ids = [i for group in tokenizer.pieces(pieces) for i in group.tolist()]
    if ids != template.tokenizer.encode(whole, add_special_tokens=False):
        found.append(
            "This tokenizer merges tokens across the border between an answer's header and the "
            "answer. Training tokenises them separately, as the model sees them at generation "
            "time."
        )
    try:
        system = template.render((Message("user", "x"),), "a system text", None, True)
    except BadRow:
        system = ""
    if "a system text" not in system:
        found.append(
            "The model's chat template does not support a system message: rows with one lose "
            "it or are refused."
        )
    return found
