"""Templates as LLaMA-Factory 0.9.1 (the base of 360-LLaMA-Factory) has them, where its tokens
differ from 0.9.5.

There the end of an answer and the separator of turns are two things: the end is a trained eos, and
the separator ("\n", say) stands masked at the beginning of the next turn; nothing follows the last
answer. In `eos_after_answer` templates eos is the label of the first token of every turn, the first
included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longfactory.data.template import BOS, EOS, Slot, Template
from longfactory.data.template_table import HELPFUL, TABLE

_ANSWER: Slot = ("{{content}}", EOS)
_OPEN: dict[str, Any] = {
    "assistant": ("{{content}}",),
    "eos_after_answer": True,
    "eos_label_on_first_turn": True,
}


def _old(name: str, **changes: Any) -> Template:
    """The template of 0.9.5 with other slots and with the old habits: no thoughts, the default
    tools, a call in lines of its own.
    """
    end = () if changes.get("eos_after_answer", TABLE[name].eos_after_answer) else (EOS,)
    habits: dict[str, Any] = {
        "tools": "default",
        "calls": "default",
        "function": ("{{content}}\n", *end),
        "call_by_call": True,
    }
    return replace(TABLE[name], **(habits | {"thinking": False} | changes))


def _chatml(name: str, system: str = "", tool_role: str = "tool", **changes: Any) -> Template:
    result = (f"<|im_start|>{tool_role}\n{{{{content}}}}<|im_end|>\n<|im_start|>assistant\n",)
    return _old(
        name,
        assistant=_ANSWER,
        observation=result,
        separator=("\n",),
        default_system=system,
        replace_eos=True,
        **changes,
    )


COMPAT_0_9_1: dict[str, Template] = {
    t.name: t
    for t in [
        _old("alpaca", assistant=_ANSWER, separator=("\n\n",)),
        _chatml("chatml"),
        _old("deepseek"),
        _old("deepseekcoder", assistant=("\n{{content}}\n<|EOT|>",), separator=("\n",)),
        _old(
            "default",
            system=("{{content}}\n",),
            user=("Human: {{content}}\nAssistant:",),
            assistant=_ANSWER,
            separator=("\n",),
        ),
        _old("empty", **_OPEN),
        _old("exaone", assistant=_ANSWER, separator=("\n",)),
        _old("falcon", separator=("\n",), **_OPEN),
        _old("fewshot", separator=("\n\n",), **_OPEN),
        _old(
            "gemma",
            system=("{{content}}",),
            stop_words=(),
            replace_eos=False,
            system_in_user=False,
            separator=("<end_of_turn>\n",),
            **_OPEN,
        ),
        _old("llama2"),
        _old("llama2_zh"),
        _old(
            "llama3",
            assistant=_ANSWER,
            observation=(
                "<|start_header_id|>tool<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            stop_words=("<|eot_id|>",),
        ),
        _old(
            "mistral",
            system=("{{content}}",),
            user=("[INST] {{content}} [/INST]",),
            assistant=_ANSWER,
            observation=None,
            system_in_user=False,
        ),
        _old("openchat"),
        _old("phi", prefix=(BOS,), assistant=_ANSWER, separator=("\n",)),
        _chatml("qwen", HELPFUL),
        _chatml("qwen2_vl", HELPFUL),
        _old("solar", eos_label_on_first_turn=True),
        _old("vicuna"),
        _chatml("yi", tool_role="user"),
        _old("zephyr"),
    ]
}
