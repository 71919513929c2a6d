"""The template of a run: from the table, or derived from the model's own chat template."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from typing import Any

from longfactory.config.data_arguments import DataSettings, option
from longfactory.data import tool_formats
from longfactory.data.derive import ChatTemplate, check
from longfactory.data.template import EOS, Template, fix_tokenizer
from longfactory.data.template_compat import COMPAT_0_9_1
from longfactory.data.template_table import TABLE
from longfactory.errors import DataError

AnyTemplate = Template | ChatTemplate


def get_template(
    args: DataSettings, tokenizer: Any, log: logging.Logger | None = None
) -> AnyTemplate:
    """The template that `template:` names, with the user's changes; the tokenizer is given the
    tokens it needs.

    Without a name it is the model's own chat template; without that, "empty".

    Raises:
        DataError: no template of that name, or an option that this template cannot follow.
    """
    log = log or logging.getLogger("longfactory.data")
    if args.template is None and tokenizer.chat_template is not None:
        return _derived(args, tokenizer, log)
    template = named(args, log)
    if args.train_on_prompt and template.eos_after_answer:
        raise DataError(
            f"Template {template.name!r} uses eos as a label inside prompts: it cannot be used with"
            " train_on_prompt."
        )
    if args.tool_format is not None:
        tool_formats.check_form(args.tool_format)
        slot = ("{{content}}",) if template.eos_after_answer else ("{{content}}", EOS)
        template = dataclasses.replace(
            template, function=slot, tools=args.tool_format, calls=args.tool_format
        )
    if args.default_system is not None:
        template = dataclasses.replace(template, default_system=args.default_system)
    if template.thinking:
        template = dataclasses.replace(
            template, enable_thinking=args.enable_thinking, preserve_thinking=args.preserve_thinking
        )
        if args.enable_thinking:
            log.warning(
                f"Template {template.name!r} is for a reasoning model: answers without a "
                "thought are trained with an empty one. For a non-reasoning model use the "
                "template whose name ends in _nothink, or enable_thinking: false."
            )
    fix_tokenizer(template, tokenizer, log.info)
    return template


def named(args: DataSettings, log: logging.Logger) -> Template:
    """The template of the table that `template:` names.

    Raises:
        DataError: there is none of that name.
    """
    name = args.template
    if name is None:
        log.warning(
            "The tokenizer has no chat template and `template` is not set: texts are "
            "concatenated without any markup (template: empty)."
        )
        name = "empty"
    compat = option(args, "template_compat")
    if compat not in (None, "", "0.9.1", "0.9.5"):
        raise DataError(
            f"template_compat is {compat!r}; known are 0.9.1 (the tokens of 360-LLaMA-Factory) and"
            " 0.9.5."
        )
    if compat == "0.9.1" and name in COMPAT_0_9_1:
        return COMPAT_0_9_1[name]
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise DataError(
            f"Template {name!r} is not known.{hint} Without `template:` the model's own chat"
            " template is used."
        )
    if compat == "0.9.1":
        log.warning(f"template_compat 0.9.1: template {name!r} has the tokens of 0.9.5.")
    return TABLE[name]


def _derived(args: DataSettings, tokenizer: Any, log: logging.Logger) -> ChatTemplate:
    template = ChatTemplate(tokenizer, args.default_system or "", args.enable_thinking)
    if args.tool_format is not None:
        raise DataError(
            "tool_format needs a named template; without `template:` tools are written by the"
            " model's chat template."
        )
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no eos token. Name a template with `template:`, which brings one."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    log.info("`template` is not set: the model's own chat template is used.")
    for sentence in check(template):
        log.warning(sentence)
    return template
