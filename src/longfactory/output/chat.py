"""`longfactory chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from longfactory.data import limits
from longfactory.data.errors import BadRow
from longfactory.data.formats import Conversation
from longfactory.data.media import text as media_text
from longfactory.data.media.load import load_unit
from longfactory.data.media.marks import parts_of
from longfactory.data.media.process import OUTSIDE, Processing
from longfactory.data.media.units import MediaUnit
from longfactory.data.template import Message
from longfactory.data.tokens import PieceTokenizer, check_text
from longfactory.errors import DataError, UserError
from longfactory.model.generate import generation_arguments, stop_tokens
from longfactory.model.load import load_media
from longfactory.model.vision import document_inputs
from longfactory.output.load import load, named_template

if TYPE_CHECKING:
    from longfactory.config import RunConfig

WELCOME = "Type a message. `clear` forgets the conversation, `exit` ends it."
WITH_MEDIA = "<image:FILE> and <video:FILE> in a message show the model a file."
SHOWN = re.compile(r"<(image|video):([^<>]+)>")


def chat(cfg: RunConfig) -> None:
    """Reads messages until `exit` or the end of the input, and prints the model's answers as they
    come. A message that cannot be answered (an image that cannot be read) is taken back.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model, tokenizer = load(cfg, device or torch.device("cpu"))
    if cfg.data.template is None and tokenizer.chat_template is None:
        raise UserError(
            f"{cfg.model.model_name_or_path} has no chat template. Name one, for example template:"
            " chatml."
        )
    data: Any = cfg.data
    found = load_media(cfg.model, data, tokenizer)
    media = found if isinstance(found, Processing) else None
    if media is not None:
        # Paths are those of the one who types them, seen from where the command was started.
        media = dataclasses.replace(media, media_dir=".", allow=media.allow | {OUTSIDE})
    print(WELCOME if media is None else f"{WELCOME} {WITH_MEDIA}")
    start: list[dict[str, Any]] = (
        [{"role": "system", "content": cfg.data.default_system}] if cfg.data.default_system else []
    )
    messages = list(start)
    while True:
        try:
            text = input("\nUser: ").strip()
        except EOFError:
            print()
            return
        if text == "exit":
            return
        if text == "clear":
            messages = list(start)
            print("The conversation is forgotten.")
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        print("Assistant: ", end="", flush=True)
        try:
            said = answer(cfg, model, tokenizer, messages, media)
        except (BadRow, DataError) as error:
            messages.pop()
            print(f"(not answered: {error})")
            continue
        messages.append({"role": "assistant", "content": said})


def prompt(cfg: RunConfig, tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens up to the answer that is to come, as training writes them: by the template that was
    named, else the model's chat template.
    """
    return PieceTokenizer(tokenizer).pieces([_pieces(cfg, tokenizer, messages)])[0].tolist()


def prompt_with_media(
    cfg: RunConfig,
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    media: Processing | None,
) -> tuple[list[int], list[MediaUnit]]:
    """`prompt`, and the files that the messages show (`<image:FILE>`) with their places in it.

    Args:
        media: how the model's images are processed; None of a model that takes text alone, to which
            `<image:FILE>` is text.
    Raises:
        BadRow: a file that cannot be used, a placeholder without a file, or a template that leaves
            one out.
    """
    if media is None:
        return prompt(cfg, tokenizer, messages), []
    said = [m for m in messages if m["role"] != "system"]
    files = [found for m in said for found in SHOWN.findall(m["content"])]
    marked = media_text.mark(
        Conversation(
            tuple(Message("user", SHOWN.sub(r"<\1>", m["content"])) for m in said),
            (),
            images=tuple(file for kind, file in files if kind == "image"),
            videos=tuple(file for kind, file in files if kind == "video"),
        ),
        media,
        "this message",
    )
    contents = iter(m.content for m in marked.conversation.prompt)
    shown: list[dict[str, Any]] = [
        m if m["role"] == "system" else {**m, "content": next(contents)} for m in messages
    ]
    own_template = cfg.data.template is None
    if own_template:
        kinds = frozenset({"image", "video"})
        shown = [{**m, "content": parts_of(m["content"], kinds) or m["content"]} for m in shown]
    filled, numbers = media_text.fill(
        [_pieces(cfg, tokenizer, shown)],
        marked.found,
        media,
        branches=False,
        chat=own_template,
        shortened=False,
    )
    ids = PieceTokenizer(tokenizer).pieces(filled)[0]
    return ids.tolist(), media_text.placed(ids, numbers[0], marked.found, media, 0)


def _pieces(cfg: RunConfig, tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[Any]:
    if cfg.data.template is None:
        extra = (
            {}
            if cfg.data.enable_thinking is None
            else {"enable_thinking": cfg.data.enable_thinking}
        )
        try:
            with limits.limited():
                text = tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=True, tokenize=False, **extra
                )
        except Exception as error:  # whatever a template may do with a conversation
            raise UserError(
                f"The chat template refuses the conversation: {error}. Name a template with"
                " template:"
            ) from error
        check_text([[text]])
        return [text]
    template = named_template(cfg, tokenizer)
    said = [
        Message("user" if m["role"] == "user" else "assistant", m["content"])
        for m in messages
        if m["role"] != "system"
    ]
    source, _, lacks = template.one_turn(
        said, [Message("assistant", "")], cfg.data.default_system, None
    )
    if lacks[0] and template.enable_thinking is False:
        source = [*source, template.thought()]
    check_text([source])
    return list(source)


def inputs_of(
    model: Any, prompt: Sequence[int], units: Sequence[MediaUnit], media: Processing | None
) -> dict[str, Any]:
    """Further arguments of `generate`: the pixels of a prompt's images, and where they are."""
    if media is None or not units:
        return {}
    found = document_inputs(
        model.config, prompt, units, lambda unit: load_unit(unit, media), model.device
    )
    return {key: value for key, value in found.items() if key not in ("input_ids", "use_cache")}


def answer(
    cfg: RunConfig,
    model: Any,
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    media: Processing | None = None,
) -> str:
    """The model's next message, printed while it is made.

    Args:
        media: how images that messages show are processed (`prompt_with_media`).
    Raises:
        BadRow, DataError: one of them cannot be used.
    """
    from transformers import TextStreamer

    tokens, units = prompt_with_media(cfg, tokenizer, messages, media)
    images = inputs_of(model, tokens, units, media)
    ids = torch.tensor([tokens], device=model.device)
    skip = cfg.generating.skip_special_tokens
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=skip)
    length = ids.shape[1]
    options = generation_arguments(
        cfg.generating, tokenizer, length, stop_tokens(model, tokenizer, cfg.data.template)
    )
    with torch.inference_mode():
        # A streamer prints one sequence; beams are compared first and printed at the end.
        beams = cfg.generating.num_beams > 1
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **images,
            **options,
            streamer=None if beams else streamer,
        )
    text = tokenizer.decode(out[0, length:], skip_special_tokens=skip)
    if beams:
        print(text)
    return text.strip()
