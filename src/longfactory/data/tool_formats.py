"""Tools in prompts and tool calls in answers: for each model family, the text that describes the
tools and the text of a call.

The texts are those the families were trained with, in the wording that LLaMA-Factory 0.9.5 uses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from longfactory.data.errors import BadRow
from longfactory.errors import DataError

Tools = list[dict[str, Any]]
Call = tuple[str, Any]  # name, arguments


def describe_tools(form: str, tools: str) -> str:
    """Text for the system message, from the JSON list of tools.

    Raises:
        BadRow: not JSON, or a tool lacks a field that the form shows.
    """
    if form == "phi4_mini":
        return f"<|tool|>{tools}<|/tool|>"
    try:
        parsed = json.loads(tools)
    except json.JSONDecodeError as e:
        raise BadRow(f"tools are not JSON: {e.msg} at character {e.pos}") from None
    if not parsed:
        return ""
    if isinstance(parsed, dict):
        parsed = [parsed]
    try:
        return FORMS[form][0](parsed)
    except (KeyError, TypeError, AttributeError) as e:
        raise BadRow(f"a tool has not the expected fields: {type(e).__name__} {e}") from None


def write_calls(form: str, calls: list[Any]) -> str:
    """Text of one or several calls, each {"name": ..., "arguments": ...}.

    Raises:
        BadRow: a call lacks a field, or the family cannot write several calls at once.
    """
    try:
        return FORMS[form][1]([(c["name"], c["arguments"]) for c in calls])
    except (KeyError, TypeError, AttributeError) as e:
        raise BadRow(f"a tool call needs a name and arguments: {type(e).__name__} {e}") from None


def between_text_and_calls(form: str) -> str:
    """What stands between the text of an answer and its first call, where the calls do not begin
    with it themselves.
    """
    return _BETWEEN.get(form, "\n")


def check_form(form: str) -> None:
    """Raises ValueError for a tool format that does not exist."""
    if form not in FORMS:
        raise DataError(
            f"tool_format {form!r} is not known. Known are: {', '.join(sorted(FORMS))}."
        )


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _bare(tool: dict[str, Any]) -> dict[str, Any]:
    """{"type": "function", "function": f} -> f."""
    return tool["function"] if tool.get("type") == "function" else tool


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if tool.get("type") == "function" else {"type": "function", "function": tool}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


# -- default: ReAct-like actions -------------------------------------------------------------------


def _default_tools(tools: Tools) -> str:
    text, known = "", []
    for tool in map(_bare, tools):
        lines = ""
        # a function without parameters has an empty schema, or none
        parameters = tool.get("parameters") or {}
        required = parameters.get("required") or []
        for name, p in (parameters.get("properties") or {}).items():
            line = (
                f"  - {name} ({p.get('type', '')}{', required' if name in required else ''}):"
                f" {p.get('description', '')}"
            )
            if p.get("enum"):
                line += f", should be one of [{', '.join(p['enum'])}]"
            if p.get("items"):
                line += f", where each item should be {p['items'].get('type', '')}"
            lines += line + "\n"
        text += (
            f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\nTool"
            f" Args:\n{lines}\n"
        )
        known.append(tool["name"])
    return (
        f"You have access to the following tools:\n{text}Use the following format if using a"
        f" tool:\n```\nAction: tool name (one of [{', '.join(known)}])\nAction Input: the input to"
        ' the tool, in a JSON format representing the kwargs (e.g. ```{"input": "hello'
        ' world", "num_beams": 5}```)\n```\n'
    )


def _default_calls(calls: list[Call]) -> str:
    return "\n".join(
        f"Action: {name}\nAction Input: {_json(arguments)}" for name, arguments in calls
    )


# -- Hermes style: qwen, ling, and families that describe tools alike ------------------------------

_SIGNATURES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALL_RULE = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments"
    ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments":'
    " <args-json-object>}\n</tool_call>"
)


def _lines(tools: Tools, form: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    return "".join("\n" + _json(form(tool)) for tool in tools)


def _qwen_tools(tools: Tools) -> str:
    return "\n\n" + _SIGNATURES + _lines(tools, _wrapped) + _CALL_RULE


def _qwen_calls(calls: list[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n{_json({'name': n, 'arguments': a})}\n</tool_call>" for n, a in calls
    )


def _ling_tools(tools: Tools) -> str:
    return _SIGNATURES + _lines(tools, _wrapped) + _CALL_RULE + "\ndetailed thinking off"


def _glm4_moe_tools(tools: Tools) -> str:
    return (
        "\n\n"
        + _SIGNATURES
        + _lines(tools, _wrapped)
        + "\n</tools>\n\nFor each function call, output the function name and arguments "
        "within the following XML"
        " format:\n<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}"
        "</arg_value>\n<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>\n"
    )


def _tagged(calls: list[Call], call: str, argument: str) -> str:
    """Calls whose arguments stand in tags.

    Args:
        call: of a name and its arguments. argument: of its name and value.
    """
    return "\n".join(
        call.format(name, "".join(argument.format(k, _value(v)) for k, v in arguments.items()))
        for name, arguments in calls
    )


def _glm4_moe_calls(calls: list[Call]) -> str:
    argument = "\n<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>"
    return _tagged(calls, "\n<tool_call>{}{}", argument)


# -- Qwen 3.5 and other XML calls ------------------------------------------------------------------


def _qwen3_5_tools(tools: Tools) -> str:
    return (
        "\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>" + _lines(tools, lambda t: t.get("function", t))
        + "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
        "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n<parameter=example_parameter_2>\n"
        "This is the value for the second parameter\nthat can span\nmultiple lines\n</parameter>\n</function>\n</tool_call>\n\n"
        "<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified format: an inner <function=...></function> block must be "
        "nested within <tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n- You may provide optional reasoning "
        "for your function call in natural language BEFORE the function call, but NOT after\n- If there is no function call available, "
        "answer the question like normal with your current knowledge and do not tell the user about function calls\n</IMPORTANT>"
    )  # fmt: skip


def _qwen3_5_calls(calls: list[Call]) -> str:
    call = "<tool_call>\n<function={}>{}\n</function>\n</tool_call>"
    return _tagged(calls, call, "\n<parameter={}>\n{}\n</parameter>")


def _seed_tools(tools: Tools) -> str:
    return (
        "system\nYou are Doubao, a helpful AI assistant. You may call one or more functions to"
        " assist with the user query.Tool List:\nYou are authorized to use the following tools"
        " (described in JSON Schema format). Before performing any task, you must decide how to"
        " call them based on the descriptions and parameters of these tools.\n"
        + _json(tools)
        + "\n工具调用请遵循如下格式:\n<seed:tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>value_1</parameter>\n<parameter=example_parameter_2>This"
        " is the value for the second parameter\nthat can span\nmultiple"
        " lines</parameter>\n</function>\n</seed:tool_call>\n"
    )


def _seed_calls(calls: list[Call]) -> str:
    # The bracket after the name is missing in 0.9.5 too.
    call = "\n<seed:tool_call>\n<function={}{}\n</function>\n</seed:tool_call>"
    return _tagged(calls, call, "\n<parameter={}>{}</parameter>")


# -- single families -------------------------------------------------------------------------------


def _llama3_tools(tools: Tools) -> str:
    """The date of today is part of the format."""
    body = "".join(_json(_wrapped(tool), indent=4) + "\n\n" for tool in tools)
    return (
        f"Cutting Knowledge Date: December 2023\nToday Date: {datetime.now():%d %b %Y}\n\nYou have"
        " access to the following functions. To call a function, please respond with JSON for a"
        ' function call. Respond in the format {"name": function name, "parameters": dictionary'
        f" of argument name and its value}}. Do not use variables.\n\n{body}"
    )


def _llama3_calls(calls: list[Call]) -> str:
    found = [{"name": n, "parameters": a} for n, a in calls]
    return _json(found[0] if len(found) == 1 else found)


def _glm4_tools(tools: Tools) -> str:
    body = "".join(
        f"\n\n## {tool['name']}\n\n{_json(tool, indent=4)}\n在调用上述函数时，请使用 Json"
        " 格式表示调用的参数。"
        for tool in map(_bare, tools)
    )
    return (
        "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱 AI 公司训练的语言模型 GLM-4 模型开发的，"
        f"你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具{body}"
    )


def _glm4_calls(calls: list[Call]) -> str:
    if len(calls) > 1:
        raise BadRow("several tool calls at once: GLM-4's format has room for one")
    return f"{calls[0][0]}\n{_json(calls[0][1])}"


def _mistral_tools(tools: Tools) -> str:
    return "[AVAILABLE_TOOLS] " + _json([_wrapped(t) for t in tools]) + "[/AVAILABLE_TOOLS]"


def _mistral_calls(calls: list[Call]) -> str:
    return _json([{"name": n, "arguments": a} for n, a in calls])


def _minimax1_tools(tools: Tools) -> str:
    body = "".join(_json(_bare(t)) + "\n" for t in tools)
    return (
        f"You are provided with these tools:\n<tools>\n{body}</tools>\n\nIf you need to call tools,"
        " please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and"
        ' json-object of arguments, following the format below:\n<tool_calls>\n{"name":'
        ' <tool-name-1>, "arguments": <args-json-object-1>}\n...\n</tool_calls>'
    )


def _minimax1_calls(calls: list[Call]) -> str:
    return (
        "<tool_calls>\n"
        + "\n".join(_json({"name": n, "arguments": a}) for n, a in calls)
        + "\n</tool_calls>"
    )


def _minimax2_tools(tools: Tools) -> str:
    body = "".join(f"<tool>{_json(_bare(t))}</tool>\n" for t in tools)
    return (
        "\n\n# Tools\n\nYou may call one or more tools to assist with the user query.\nHere are"
        f" the tools available in JSONSchema format:\n\n<tools>\n{body}</tools>\n\nWhen making tool"
        " calls, use XML format to invoke tools and pass"
        ' parameters:\n\n<minimax:tool_call>\n<invoke name="tool-name-1">\n<parameter'
        ' name="param-key-1">param-value-1</parameter>\n<parameter'
        ' name="param-key-2">param-value-2</parameter>\n...\n</invoke>\n</minimax:tool_call>'
    )


def _minimax2_calls(calls: list[Call]) -> str:
    argument = '\n<parameter name="{}">{}</parameter>'
    return _tagged(calls, '<invoke name="{}">{}\n</invoke>', argument)


def _lfm2_tools(tools: Tools) -> str:
    return f"List of tools: <|tool_list_start|>{_json([_bare(t) for t in tools])}<|tool_list_end|>"


def _lfm2_calls(calls: list[Call]) -> str:
    def argument(k: str, v: Any) -> str:
        return f'{k}="{v}"' if isinstance(v, str) else f"{k}={_json(v)}"

    texts = [
        f"{name}({', '.join(argument(k, v) for k, v in arguments.items())})"
        for name, arguments in calls
    ]
    return f"<|tool_call_start|>[{', '.join(texts)}]<|tool_call_end|>"


_Q = '<|"|>'  # Gemma 4's quotation mark


def _gemma4_tools(tools: Tools) -> str:
    def quoted(label: str, text: Any) -> str:
        return f"{label}:{_Q}{text}{_Q}"

    out = []
    for tool in tools:
        f = tool.get("function", tool) if tool.get("type") == "function" else tool
        text = f"declaration:{f['name']}{{{quoted('description', f.get('description', ''))}"
        if schema := f.get("parameters"):
            parts = []
            if schema.get("properties"):
                fields = []
                for name, p in schema["properties"].items():
                    about = (
                        [quoted("description", p["description"])] if p.get("description") else []
                    )
                    about += [quoted("type", str(p["type"]).upper())] if p.get("type") else []
                    fields.append(f"{name}:{{{','.join(about)}}}")
                parts.append(f"properties:{{{','.join(fields)}}}")
            if schema.get("required"):
                parts.append(f"required:[{','.join(_Q + r + _Q for r in schema['required'])}]")
            if schema.get("type"):
                parts.append(quoted("type", str(schema["type"]).upper()))
            text += f",parameters:{{{','.join(parts)}}}"
        if response := f.get("response"):
            parts = (
                [quoted("description", response["description"])]
                if response.get("description")
                else []
            )
            if str(response.get("type", "")).upper() == "OBJECT":
                parts.append(quoted("type", "OBJECT"))
            text += f",response:{{{','.join(parts)}}}"
        out.append(text + "}")
    return "\n".join(out)


def _gemma4_calls(calls: list[Call]) -> str:
    def write(v: Any) -> str:
        if isinstance(v, str):
            return f"{_Q}{v}{_Q}"
        if v is None or isinstance(v, bool):
            return _json(v)
        if isinstance(v, dict):
            return "{" + fields(v) + "}"
        if isinstance(v, (list, tuple)):
            return "[" + ",".join(map(write, v)) + "]"
        return str(v)

    def fields(v: dict[str, Any]) -> str:
        return ",".join(f"{k}:{write(v[k])}" for k in sorted(v))

    def body(arguments: Any) -> str:
        if isinstance(arguments, dict):
            return fields(arguments)
        return arguments if isinstance(arguments, str) else write(arguments)

    return "".join(
        f"<|tool_call>call:{name}{{{body(arguments)}}}<tool_call|>" for name, arguments in calls
    )


FORMS: dict[str, tuple[Callable[[Tools], str], Callable[[list[Call]], str]]] = {
    "default": (_default_tools, _default_calls),
    "gemma4": (_gemma4_tools, _gemma4_calls),
    "glm4": (_glm4_tools, _glm4_calls),
    "glm4_moe": (_glm4_moe_tools, _glm4_moe_calls),
    "lfm2": (_lfm2_tools, _lfm2_calls),
    "ling": (_ling_tools, _qwen_calls),
    "llama3": (_llama3_tools, _llama3_calls),
    "minimax1": (_minimax1_tools, _minimax1_calls),
    "minimax2": (_minimax2_tools, _minimax2_calls),
    "mistral": (_mistral_tools, _mistral_calls),
    "qwen": (_qwen_tools, _qwen_calls),
    "qwen3_5": (_qwen3_5_tools, _qwen3_5_calls),
    "seed_oss": (_seed_tools, _seed_calls),
}

# As the families' own chat templates have it; "\n" for all others.
_BETWEEN = {
    "qwen3_5": "\n\n",
    "glm4_moe": "",
    "seed_oss": "",
    "gemma4": "",
    "lfm2": "",
    "mistral": "",
}
