"""Slots of the templates people use, by LLaMA-Factory's names (0.9.5). What differs in 0.9.1 is in
`template_compat`.

Vision and audio families are here for their text. Names that share one format are written once and
listed in `_SAME`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from longfactory.data.template import BOS, EOS, Slot, Special, Template

HELPFUL = "You are a helpful assistant."
POLITE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to "
    "the user's questions."
)


def chatml(system: str = "", end: str = "\n", tool_role: str = "", **changes: Any) -> Template:
    """The <|im_start|> family. `end` follows each <|im_end|>; `tool_role` names the turn of a
    tool's result.
    """

    def turn(role: str) -> Slot:
        return (f"<|im_start|>{role}\n{{{{content}}}}<|im_end|>{end}<|im_start|>assistant\n",)

    base = Template(
        system=(f"<|im_start|>system\n{{{{content}}}}<|im_end|>{end}",),
        user=turn("user"),
        assistant=("{{content}}<|im_end|>" + end,),
        observation=turn(tool_role) if tool_role else None,
        default_system=system,
        stop_words=("<|im_end|>",),
    )
    return replace(base, **changes)


def qwen(system: str = "", tools: str = "qwen", **changes: Any) -> Template:
    result = (
        "<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    )
    return chatml(system, observation=result, tools=tools, calls=tools, replace_eos=True, **changes)


def llama3(header: tuple[str, str], end: str, more: str) -> Template:
    opening, closing = header

    def turn(role: str) -> str:
        return f"{opening}{role}{closing}\n\n{{{{content}}}}{end}"

    answer = f"{opening}assistant{closing}\n\n"
    return Template(
        prefix=(BOS,),
        system=(turn("system"),),
        user=(turn("user") + answer,),
        assistant=("{{content}}" + end,),
        observation=(turn("ipython") + answer,),
        tools="llama3",
        calls="llama3",
        stop_words=(end, more),
        replace_eos=True,
    )


def gemma(**changes: Any) -> Template:
    base = Template(
        prefix=(BOS,),
        system=("{{content}}\n\n",),
        user=("<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
        assistant=("{{content}}<end_of_turn>\n",),
        observation=("<start_of_turn>tool\n{{content}}<end_of_turn>\n<start_of_turn>model\n",),
        stop_words=("<end_of_turn>",),
        replace_eos=True,
        system_in_user=True,
    )
    return replace(base, **changes)


def mistral(space: str, **changes: Any) -> Template:
    base = Template(
        prefix=(BOS,),
        system=("{{content}}\n\n",),
        user=(f"[INST]{space}{{{{content}}}}[/INST]",),
        assistant=(space + "{{content}}", EOS),
        function=(f"[TOOL_CALLS]{space}{{{{content}}}}", EOS),
        observation=(f'[TOOL_RESULTS]{space}{{"content": {{{{content}}}}}}[/TOOL_RESULTS]',),
        tools="mistral",
        calls="mistral",
        system_in_user=True,
    )
    return replace(base, **changes)


def glm4(tools: str = "glm4", **changes: Any) -> Template:
    base = Template(
        prefix=("[gMASK]<sop>",),
        system=("<|system|>\n{{content}}",),
        user=("<|user|>\n{{content}}<|assistant|>",),
        assistant=("\n{{content}}",),
        function=("{{content}}",),
        observation=("<|observation|>\n{{content}}<|assistant|>",),
        tools=tools,
        calls=tools,
        stop_words=("<|user|>", "<|observation|>"),
        eos_after_answer=True,
    )
    return replace(base, **changes)


def plain(user: str, **changes: Any) -> Template:
    """Turns in plain words; answers end with eos."""
    return replace(Template(user=(user,)), **changes)


def moonshot(system: str, **changes: Any) -> Template:
    base = Template(
        system=("<|im_system|>system<|im_middle|>{{content}}<|im_end|>",),
        user=(
            "<|im_user|>user<|im_middle|>{{content}}<|im_end|><|im_assistant|>assistant<|im_middle|>",
        ),
        assistant=("{{content}}<|im_end|>",),
        default_system=system,
        stop_words=("<|im_end|>",),
    )
    return replace(base, **changes)


def seed(system: str = "", **changes: Any) -> Template:
    base = Template(
        system=(BOS, "system\n{{content}}", EOS),
        user=(BOS, "user\n{{content}}", EOS, BOS, "assistant\n"),
        default_system=system,
    )
    return replace(base, **changes)


def _t(text: str) -> Special:
    return Special("token", text)


_DEEPSEEK = plain("<｜User｜>{{content}}<｜Assistant｜>", prefix=(BOS,))
_VICUNA = plain("USER: {{content}} ASSISTANT:", default_system=POLITE)
_PHI = plain(
    "<|user|>\n{{content}}<|end|>\n<|assistant|>\n",
    system=("<|system|>\n{{content}}<|end|>\n",),
    assistant=("{{content}}<|end|>\n",),
    stop_words=("<|end|>",),
    replace_eos=True,
)
_GEMMA4 = Template(
    prefix=(BOS,),
    system=("<|turn>system\n<|think|>{{content}}<turn|>\n",),
    user=("<|turn>user\n{{content}}<turn|>\n<|turn>model\n",),
    assistant=("{{content}}<turn|>\n",),
    function=("<|tool>{{content}}<tool|>",),
    observation=("<|turn>tool\n{{content}}<turn|>\n<|turn>model\n",),
    tools="gemma4",
    calls="gemma4",
    default_system=HELPFUL,
    stop_words=("<turn|>",),
    thought_words=("<|channel>thought\n", "<channel|>"),
    replace_eos=True,
    thinking=True,
)
_CLOSED_THOUGHT: dict[str, Any] = {"thought_words": ("<think>", "</think>"), "thinking": True}
_GRANITE_TURN = "<|start_of_role|>user<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
_GRANITE = plain(
    _GRANITE_TURN,
    system=("<|start_of_role|>system<|end_of_role|>{{content}}<|end_of_text|>\n",),
    assistant=("{{content}}<|end_of_text|>\n",),
)
_CODER = (
    "you only answer questions related to computer science. For politically sensitive questions, security and privacy issues, and other "
    "non-computer science questions, you will refuse to answer.\n"
)

TABLE: dict[str, Template] = {
    "alpaca": plain(
        "### Instruction:\n{{content}}\n\n### Response:\n",
        assistant=("{{content}}", EOS, "\n\n"),
        default_system="Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
        replace_chat_template=True,
    ),
    "aeva": glm4(
        "glm4_moe",
        default_system="You are an AI assistant named Aeva created by Zongzhi Lou. Your answer should be friendly, unbiased, faithful, "
        "informative and detailed.",
        empty_thought="</think>",
        **_CLOSED_THOUGHT,
    ),
    "bailing": plain(
        "<role>HUMAN</role>{{content}}<role>ASSISTANT</role>",
        system=("<role>SYSTEM</role>{{content}}",),
        assistant=("{{content}}",),
        observation=("<role>OBSERVATION</role>{{content}}<role>ASSISTANT</role>",),
        stop_words=("<|endoftext|>",),
        eos_after_answer=True,
    ),
    "bailing_v2": plain(
        "<role>HUMAN</role>{{content}}<|role_end|><role>ASSISTANT</role>",
        system=("<role>SYSTEM</role>{{content}}<|role_end|>",),
        assistant=("{{content}}<|role_end|>",),
        observation=(
            "<role>OBSERVATION</role>\n<tool_response>\n{{content}}\n</tool_response><|role_end|><role>ASSISTANT</role>",
        ),
        tools="ling",
        calls="ling",
        stop_words=("<|endoftext|>",),
        eos_after_answer=True,
    ),
    "breeze": plain(
        "[INST] {{content}} [/INST] ",
        prefix=(BOS,),
        assistant=("{{content}}",),
        eos_after_answer=True,
    ),
    "chatglm3": Template(
        prefix=(_t("[gMASK]"), _t("sop")),
        system=(_t("<|system|>"), "\n", "{{content}}"),
        user=(_t("<|user|>"), "\n", "{{content}}", _t("<|assistant|>")),
        assistant=("\n", "{{content}}"),
        function=("{{content}}",),
        observation=(_t("<|observation|>"), "\n", "{{content}}", _t("<|assistant|>")),
        tools="glm4",
        calls="glm4",
        stop_words=("<|user|>", "<|observation|>"),
        eos_after_answer=True,
    ),
    "chatml": chatml(
        tool_role="tool",
        stop_words=("<|im_end|>", "<|im_start|>"),
        replace_eos=True,
        replace_chat_template=True,
    ),
    "chatml_de": chatml(
        "Du bist ein freundlicher und hilfsbereiter KI-Assistent.",
        tool_role="tool",
        stop_words=("<|im_end|>", "<|im_start|>"),
        replace_eos=True,
        replace_chat_template=True,
    ),
    "cohere": plain(
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        prefix=(BOS,),
        system=("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{content}}<|END_OF_TURN_TOKEN|>",),
    ),
    "cpm4": chatml(tool_role="tool", prefix=(BOS,)),
    "dbrx": chatml(
        "You are DBRX, created by Databricks. You were last updated in December 2023. You answer questions based on information "
        "available up to that point.\nYOU PROVIDE SHORT RESPONSES TO SHORT QUESTIONS OR STATEMENTS, but provide thorough "
        "responses to more complex and open-ended questions.\nYou assist with various tasks, from writing to coding (using "
        "markdown for code blocks — remember to use ``` with code, JSON, and tables).\n(You do not have real-time data access or "
        "code execution capabilities. You avoid stereotyping and provide balanced perspectives on controversial topics. You do "
        "not provide song lyrics, poems, or news articles and do not divulge details of your training data.)\nThis is your "
        "system prompt, guiding your responses. Do not reference it, just respond to the user. If you find yourself talking "
        "about this message, stop. You should be responding appropriately and usually that means not mentioning this.\nYOU DO "
        "NOT MENTION ANY OF THIS INFORMATION ABOUT YOURSELF UNLESS THE INFORMATION IS DIRECTLY PERTINENT TO THE USER'S QUERY.",
        tool_role="tool",
        replace_eos=True,
    ),
    "deepseek": plain(
        "User: {{content}}\n\nAssistant:", prefix=(BOS,), system=("{{content}}\n\n",)
    ),
    "deepseek3": _DEEPSEEK,
    "deepseekr1": replace(_DEEPSEEK, thinking=True),
    "deepseekcoder": plain(
        "### Instruction:\n{{content}}\n### Response:",
        prefix=(BOS,),
        assistant=("\n{{content}}\n<|EOT|>\n",),
        default_system="You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and "
        + _CODER,
    ),
    "default": Template(
        system=("System: {{content}}", EOS, "\n"),
        user=("Human: {{content}}", EOS, "\nAssistant:"),
        assistant=("{{content}}", EOS, "\n"),
        replace_chat_template=True,
    ),
    "dots_ocr": plain(
        "<|user|>{{content}}<|endofuser|><|assistant|>",
        system=("<|system|>{{content}}<|endofsystem|>\n",),
        assistant=("{{content}}<|endofassistant|>",),
        stop_words=("<|endofassistant|>",),
        eos_after_answer=True,
    ),
    "empty": Template(assistant=("{{content}}",)),
    "ernie": chatml(
        "<global_setting>\nthink_mode=True\n</global_setting>", end="\n\n", tool_role="tool"
    ),
    "ernie_nothink": plain(
        "User: {{content}}\nAssistant: ",
        prefix=("<|begin_of_sentence|>",),
        system=("{{content}}\n",),
        assistant=("{{content}}<|end_of_sentence|>",),
        stop_words=("<|end_of_sentence|>",),
    ),
    "ernie_vl": plain(
        "User: {{content}}",
        system=("{{content}}\n",),
        assistant=("\nAssistant: {{content}}<|end_of_sentence|>",),
        stop_words=("<|end_of_sentence|>",),
        replace_eos=True,
        replace_chat_template=True,
        thinking=True,
    ),
    "exaone": plain(
        "[|user|]{{content}}\n[|assistant|]",
        system=("[|system|]{{content}}[|endofturn|]\n",),
        assistant=("{{content}}", EOS, "\n"),
    ),
    "falcon": plain(
        "User: {{content}}\nFalcon:", assistant=("{{content}}\n",), eos_after_answer=True
    ),
    "falcon_h1": chatml(
        tool_role="tool", prefix=(BOS,), stop_words=("<|im_end|>", "<|end_of_text|>")
    ),
    "fewshot": Template(
        assistant=("{{content}}\n\n",), eos_after_answer=True, replace_chat_template=True
    ),
    "gemma": gemma(),
    "gemma2": gemma(
        stop_words=("<eos>", "<end_of_turn>"), eos_after_answer=True, replace_eos=False
    ),
    "gemma3": gemma(),
    "gemma4": _GEMMA4,
    "glm4": glm4(),
    "glm4_moe": glm4("glm4_moe", thinking=True),
    "glm4_7": glm4("glm4_moe", empty_thought="</think>", **_CLOSED_THOUGHT),
    "glm4v": glm4(stop_words=("<|user|>", "<|observation|>", "</answer>"), thinking=True),
    "glm4_5v": glm4(
        "glm4_moe", stop_words=("<|user|>", "<|observation|>", "</answer>"), thinking=True
    ),
    "glm_ocr": glm4(),
    "glmz1": glm4(thinking=True),
    "gpt_oss": plain(
        "<|start|>user<|message|>{{content}}<|end|><|start|>assistant",
        system=("<|start|>system<|message|>{{content}}<|end|>",),
        assistant=("{{content}}",),
        default_system="You are ChatGPT, a large language model trained by OpenAI.",
        thought_words=(
            "<|channel|>analysis<|message|>",
            "<|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        eos_after_answer=True,
        thinking=True,
    ),
    "granite3": _GRANITE,
    "granite3_vision": plain(
        "<|user|>\n{{content}}\n<|assistant|>\n",
        system=("<|system|>\n{{content}}\n",),
        default_system=POLITE,
    ),
    "granite4": replace(
        _GRANITE,
        observation=(
            "<|start_of_role|>tool<|end_of_role|>{{content}}<|end_of_text|>\n<|start_of_role|>assistant\n",
        ),
        default_system="You are Granite, developed by IBM. You are a helpful AI assistant.",
        stop_words=("<|end_of_text|>",),
    ),
    "hunyuan": plain(
        "{{content}}<|extra_0|>",
        prefix=("<|startoftext|>",),
        system=("{{content}}<|extra_4|>",),
        assistant=("{{content}}<|eos|>",),
        stop_words=("<|eos|>",),
    ),
    "hunyuan_small": plain(
        "<｜hy_User｜>{{content}}<｜hy_place▁holder▁no▁8｜>",
        prefix=("<｜hy_begin▁of▁sentence｜>",),
        system=("{{content}}<｜hy_place▁holder▁no▁3｜>",),
        assistant=("{{content}}<｜hy_place▁holder▁no▁2｜>",),
        stop_words=("<｜hy_place▁holder▁no▁2｜>",),
    ),
    # of 0.9.6.dev
    "hy_dense_1_8b": plain(
        "<｜hy_User｜>{{content}}",
        prefix=(BOS,),
        system=("{{content}}<｜hy_place▁holder▁no▁3｜>",),
        assistant=("<｜hy_Assistant｜>{{content}}",),
        stop_words=("<｜hy_place▁holder▁no▁2｜>",),
        eos_after_answer=True,
    ),
    "hy_dense_7b": plain(
        "{{content}}<|extra_0|>",
        prefix=(BOS,),
        system=("{{content}}<|extra_4|>",),
        assistant=("{{content}}",),
        stop_words=("<|eos|>",),
        eos_after_answer=True,
    ),
    "hy3": plain(
        "<｜hy_User｜>{{content}}<｜hy_Assistant｜>",
        prefix=(BOS,),
        assistant=("{{content}}<｜hy_eos｜>",),
        stop_words=("<｜hy_eos｜>",),
        replace_eos=True,
        **_CLOSED_THOUGHT,
    ),
    "index": plain(
        "reserved_0{{content}}reserved_1",
        system=("<unk>{{content}}",),
        assistant=("{{content}}",),
        eos_after_answer=True,
    ),
    "intern2": chatml(
        "You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM (书生·浦语) is a conversational language model that is "
        "developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n- InternLM "
        "(书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文.",
        prefix=(BOS,),
    ),
    "intern_s1": chatml(prefix=(BOS,)),
    "intern_vl": chatml(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
        prefix=(BOS,),
    ),
    "keye_vl": qwen(thinking=True),
    "kimi_vl": moonshot(
        "You are a helpful assistant", thought_words=("◁think▷", "◁/think▷"), thinking=True
    ),
    "lfm2": chatml(
        "You are a helpful AI assistant.",
        observation=(
            "<|im_start|>tool\n<|tool_response_start|>{{content}}<|tool_response_end|><|im_end|>\n<|im_start|>assistant\n",
        ),
        tools="lfm2",
        calls="lfm2",
        call_words=("<|tool_call_start|>", "<|tool_call_end|>"),
        replace_eos=True,
    ),
    "llama2": Template(
        system=("<<SYS>>\n{{content}}\n<</SYS>>\n\n",),
        user=(BOS, "[INST] {{content}} [/INST]"),
        system_in_user=True,
    ),
    "llama3": llama3(("<|start_header_id|>", "<|end_header_id|>"), "<|eot_id|>", "<|eom_id|>"),
    "llama4": llama3(("<|header_start|>", "<|header_end|>"), "<|eot|>", "<|eom|>"),
    "mimo": qwen(HELPFUL, thinking=True),
    "mimo_v2": qwen(
        "You are MiMo, a helpful AI assistant engineered by Xiaomi.", **_CLOSED_THOUGHT
    ),
    "mimo_vl": qwen("You are MiMo, an AI assistant developed by Xiaomi.", thinking=True),
    "minicpm_v": chatml(HELPFUL),
    "minicpm_o": chatml(
        "You are a helpful assistant. You can accept audio and text input and output voice and text."
    ),
    "minimax1": plain(
        "<beginning_of_sentence>user name=user\n{{content}}<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n",
        system=(
            "<beginning_of_sentence>system ai_setting=assistant\n{{content}}<end_of_sentence>\n",
        ),
        assistant=("{{content}}<end_of_sentence>\n",),
        observation=(
            "<beginning_of_sentence>tool name=tools\n{{content}}<end_of_sentence>\n<beginning_of_sentence>ai name=assistant\n",
        ),
        tools="minimax1",
        calls="minimax1",
        default_system=HELPFUL,
        stop_words=("<end_of_sentence>",),
    ),
    "minimax2": plain(
        "]~b]user\n{{content}}[e~[\n]~b]ai\n",
        system=("]~!b[]~b]system\n{{content}}[e~[\n",),
        assistant=("{{content}}[e~[\n",),
        observation=("]~b]tool\n<response>{{content}}</response>[e~[\n]~b]ai\n",),
        tools="minimax2",
        calls="minimax2",
        default_system="You are a helpful assistant. Your name is MiniMax-M2.1 and is built by MiniMax.",
        stop_words=("[e~[",),
        thinking=True,
    ),
    "ministral": mistral(""),
    "mistral": mistral(" "),
    "mistral_small": mistral(
        "", system=("[SYSTEM_PROMPT]{{content}}[/SYSTEM_PROMPT]",), system_in_user=False
    ),
    "moonlight": moonshot("You are a helpful assistant provided by Moonshot-AI.", replace_eos=True),
    "olmo": plain("<|user|>\n{{content}}<|assistant|>\n", prefix=(EOS,)),
    "openchat": Template(
        prefix=(BOS,), user=("GPT4 Correct User: {{content}}", EOS, "GPT4 Correct Assistant:")
    ),
    "openchat-3.6": plain(
        "<|start_header_id|>GPT4 Correct User<|end_header_id|>\n\n{{content}}<|eot_id|><|start_header_id|>GPT4 Correct Assistant"
        "<|end_header_id|>\n\n",
        prefix=(BOS,),
        stop_words=("<|eot_id|>",),
    ),
    "opencoder": chatml("You are OpenCoder, created by OpenCoder Team.", tool_role="tool"),
    "paligemma": plain("{{content}}\n", prefix=(BOS,), system_in_user=True),
    "paligemma_chat": gemma(system=("{{content}}",)),
    "phi": _PHI,
    "phi4": plain(
        "<|im_start|>user<|im_sep|>{{content}}<|im_end|><|im_start|>assistant<|im_sep|>",
        system=("<|im_start|>system<|im_sep|>{{content}}<|im_end|>",),
        assistant=("{{content}}<|im_end|>",),
        stop_words=("<|im_end|>",),
        replace_eos=True,
    ),
    "phi4_mini": plain(
        "<|user|>{{content}}<|end|><|assistant|>",
        system=("<|system|>{{content}}<|end|>",),
        assistant=("{{content}}<|end|>",),
        tools="phi4_mini",
        stop_words=("<|end|>",),
        replace_eos=True,
    ),
    "qwen": qwen("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen2_audio": chatml(HELPFUL, replace_eos=True),
    "qwen2_vl": qwen(HELPFUL),
    "qwen3": qwen(thinking=True),
    "qwen3_nothink": qwen(),
    "qwen3_5": qwen(tools="qwen3_5", thinking=True),
    "qwen3_5_nothink": qwen(tools="qwen3_5"),
    "sailor": chatml(
        "You are an AI assistant named Sailor created by Sea AI Lab. Your answer should be friendly, unbiased, faithful, informative and "
        "detailed.",
        user=("<|im_start|>question\n{{content}}<|im_end|>\n<|im_start|>answer\n",),
    ),
    "seed_coder": seed(
        "You are an AI programming assistant, utilizing the Seed-Coder model, developed by ByteDance Seed, and "
        + _CODER
        + "\n"
    ),
    "seed_oss": seed(
        function=(BOS, "\n{{content}}", EOS),
        tools="seed_oss",
        calls="seed_oss",
        thought_words=("<seed:think>", "</seed:think>"),
        thinking=True,
    ),
    "smollm": chatml(),
    "smollm2": chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face."),
    "solar": plain(
        "### User:\n{{content}}\n\n### Assistant:\n",
        system=("### System:\n{{content}}\n\n",),
        assistant=("{{content}}",),
        eos_after_answer=True,
    ),
    "starchat": replace(
        _PHI, user=("<|user|>\n{{content}}<|end|>\n<|assistant|>",), replace_eos=False
    ),
    "telechat2": plain(
        "<_user>{{content}}<_bot>",
        system=("<_system>{{content}}",),
        default_system="你是中国电信星辰语义大模型，英文名是TeleChat，你是由中电信人工智能科技有限公司和中国电信人工智能研究院（TeleAI）研发的"
        "人工智能助手。",
    ),
    "vicuna": replace(_VICUNA, replace_chat_template=True),
    "llava": _VICUNA,
    "xuanyuan": plain(
        "Human: {{content}} Assistant:",
        default_system="以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，会对人类提出的问题给出有帮助、高质量、"
        "详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。\n",
    ),
    "yi": chatml(),
    "yi_vl": plain(
        "### Human: {{content}}\n### Assistant:",
        assistant=("{{content}}\n",),
        default_system="This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. Read all the "
        "images carefully, and respond to the human's questions with informative, helpful, detailed and polite answers. "
        "这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、"
        "详细的和礼貌的回答。\n\n",
        stop_words=("###",),
        eos_after_answer=True,
    ),
    "youtu": plain(
        "<|User|>{{content}}<|Assistant|>",
        prefix=(BOS,),
        assistant=("{{content}}<|end_of_text|>",),
        function=("{{content}}",),
        observation=("<tool_response>\n{{content}}\n</tool_response><|Assistant|>",),
        stop_words=("<|end_of_text|>",),
        replace_eos=True,
        thinking=True,
    ),
    "youtu_vl": plain(
        "<|begin_of_text|>user\n{{content}}<|end_of_text|>\n<|begin_of_text|>assistant\n",
        system=("<|begin_of_text|>system\n{{content}}<|end_of_text|>\n",),
        assistant=("{{content}}<|end_of_text|>\n",),
        default_system=HELPFUL,
        stop_words=("<|end_of_text|>",),
    ),
    "yuan": Template(
        user=("{{content}}", _t("<sep>")), assistant=("{{content}}<eod>\n",), stop_words=("<eod>",)
    ),
    "zephyr": Template(
        system=("<|system|>\n{{content}}", EOS),
        user=("<|user|>\n{{content}}", EOS, "<|assistant|>\n"),
        default_system="You are Zephyr, a helpful assistant.",
    ),
}

_SAME: dict[str, str] = {
    "gemma3n": "gemma3",
    "gemma4n": "gemma4",
    "lfm2_vl": "lfm2",
    "llama2_zh": "llama2",
    "llava_next": "llava",
    "llava_next_llama3": "llama3",
    "llava_next_mistral": "mistral",
    "llava_next_qwen": "qwen2_vl",
    "llava_next_video": "llava",
    "llava_next_video_mistral": "mistral",
    "llava_next_video_yi": "yi",
    "llava_next_yi": "yi",
    "minicpm_v_4_6": "minicpm_v",
    "ministral3": "ministral",
    "mllama": "llama3",
    "phi3": "phi",
    "phi_small": "phi",
    "pixtral": "ministral",
    "qwen2_omni": "qwen2_vl",
    "qwen3_6": "qwen3_5",
    "qwen3_omni": "qwen3",
    "qwen3_omni_nothink": "qwen3_nothink",
    "qwen3_vl": "qwen3",
    "qwen3_vl_nothink": "qwen3_nothink",
    "video_llava": "llava",
}
TABLE |= {name: TABLE[same] for name, same in _SAME.items()}
TABLE["llama2_zh"] = replace(
    TABLE["llama2"], default_system="You are a helpful assistant. 你是一个乐于助人的助手。"
)
TABLE["lfm2_vl"] = replace(
    TABLE["lfm2"], default_system="You are a helpful multimodal assistant by Liquid AI."
)
TABLE = {name: replace(t, name=name) for name, t in TABLE.items()}
