"""`longfactory chat`: a conversation with a model in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from longfactory.data import limits
from longfactory.data.template import Message
from longfactory.data.tokens import PieceTokenizer
from longfactory.errors import UserError
from longfactory.model.generate import generation_arguments, stop_tokens
from longfactory.output.load import load, named_template

if TYPE_CHECKING:
    from longfactory.config import RunConfig

WELCOME = "Type a message. `clear` forgets the conversation, `exit` ends it."


def chat(cfg: RunConfig) -> None:
    """Reads messages until `exit` or the end of the input, and prints the model's answers as they
    come.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model, tokenizer = load(cfg, device or torch.device("cpu"))
    if cfg.data.template is None and tokenizer.chat_template is None:
        raise UserError(
            f"{cfg.model.model_name_or_path} has no chat template. Name one, for example template:"
            " chatml."
        )
    print(WELCOME)
    start: list[dict[str, str]] = (
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
        messages.append({"role": "assistant", "content": answer(cfg, model, tokenizer, messages)})


def prompt(cfg: RunConfig, tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Tokens up to the answer that is to come, as training writes them: by the template that was
    named, else the model's chat template.
    """
    if cfg.data.template is None:
        extra = (
            {}
            if cfg.data.enable_thinking is None
            else {"enable_thinking": cfg.data.enable_thinking}
        )
        try:
            with limits.limited():
                text = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **extra
                )
        except Exception as error:  # whatever a template may do with a conversation
            raise UserError(
                f"The chat template refuses the conversation: {error}. Name a template with"
                " template:"
            ) from error
        return tokenizer.encode(text, add_special_tokens=False)
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
    return PieceTokenizer(tokenizer).pieces([source])[0].tolist()


def answer(cfg: RunConfig, model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The model's next message, printed while it is made."""
    from transformers import TextStreamer

    ids = torch.tensor([prompt(cfg, tokenizer, messages)], device=model.device)
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
            **options,
            streamer=None if beams else streamer,
        )
    text = tokenizer.decode(out[0, length:], skip_special_tokens=skip)
    if beams:
        print(text)
    return text.strip()
