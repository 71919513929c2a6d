"""Slots of the templates people use, by LLaMA-Factory's names. What differs in LLaMA-Factory 0.9.1 is in `COMPAT_0_9_1`."""

from __future__ import annotations

from dataclasses import replace

from longfactory.data.template import BOS, EOS, Template

CONTENT = "{{content}}"


def _chatml(system: str = "", **changes: object) -> Template:
    base = Template(
        system=("<|im_start|>system\n{{content}}<|im_end|>\n",),
        user=("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
        assistant=("{{content}}<|im_end|>\n",),
        default_system=system,
        stop_words=("<|im_end|>",),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


_TOOL_TURN = ("<|im_start|>tool\n{{content}}<|im_end|>\n<|im_start|>assistant\n",)
_HELPFUL = "You are a helpful assistant."
_POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions."
)


def _qwen(system: str = "", tools: str = "qwen", **changes: object) -> Template:
    result = ("<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",)
    return _chatml(system, observation=result, tools=tools, calls=tools, replace_eos=True, **changes)


TABLE: dict[str, Template] = {
    "chatml": _chatml(observation=_TOOL_TURN, stop_words=("<|im_end|>", "<|im_start|>"), replace_eos=True, replace_chat_template=True),
    "empty": Template(assistant=(CONTENT,)),
    "qwen": _qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": _qwen(thinking=True),
    "qwen3_nothink": _qwen(),
    "smollm2": _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "llama3": Template(
        prefix=(BOS,),
        system=("<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",),
        user=("<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",),
        assistant=("{{content}}<|eot_id|>",),
        observation=(
            "<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        tools="llama3",
        calls="llama3",
        stop_words=("<|eot_id|>", "<|eom_id|>"),
        replace_eos=True,
    ),
}
TABLE = {name: replace(t, name=name) for name, t in TABLE.items()}
COMPAT_0_9_1: dict[str, Template] = {}
