"""LLaMA-Factory's own data code as the oracle: imported from the wheel (installed without its
dependencies), run, never copied.

Its package imports vision and audio libraries; a module in place of `mm_plugin` stands for them,
and passes text through unchanged.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import math
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest


class _TextOnly:
    def __init__(self, name: str = "base", **tokens: Any):
        self.asked = (name, tokens)

    def process_messages(self, messages: Any, *args: Any) -> Any:
        return messages

    def process_token_ids(self, ids: Any, labels: Any, *args: Any) -> Any:
        return ids, labels


@functools.cache
def load() -> SimpleNamespace:
    """The wheel's template, formatter, converter and processor modules."""
    try:
        root = Path(
            str(importlib.metadata.distribution("llamafactory").locate_file("llamafactory"))
        )
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the llamafactory wheel is not installed", allow_module_level=True)
    for package in ("", ".extras", ".data", ".data.processor"):
        module = types.ModuleType("llamafactory" + package)
        module.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
        sys.modules["llamafactory" + package] = module
    plugin: Any = types.ModuleType("llamafactory.data.mm_plugin")
    plugin.BasePlugin = _TextOnly
    plugin.get_mm_plugin = _TextOnly
    sys.modules["llamafactory.data.mm_plugin"] = plugin
    get = importlib.import_module
    return SimpleNamespace(
        template=get("llamafactory.data.template"),
        converter=get("llamafactory.data.converter"),
        parser=get("llamafactory.data.parser"),
        supervised=get("llamafactory.data.processor.supervised"),
        pairwise=get("llamafactory.data.processor.pairwise"),
        feedback=get("llamafactory.data.processor.feedback"),
        pretrain=get("llamafactory.data.processor.pretrain"),
        utils=get("llamafactory.data.processor.processor_utils"),
    )


class Oracle:
    """The wheel's tokens of rows."""

    processor: Any = None

    def __init__(self) -> None:
        self.lf = load()
        self.names = list(self.lf.template.TEMPLATES)
        self.converters: dict[str, Any] = {}

    def template(self, tokenizer: Any, args: Any) -> Any:
        """The wheel's template; `tokenizer` is changed as the wheel changes it."""
        before = self.lf.template.TEMPLATES
        # The wheel writes the user's options into its table.
        self.lf.template.TEMPLATES = (
            {args.template: copy.deepcopy(before[args.template])} if args.template else before
        )
        try:
            return self.lf.template.get_template_and_fix_tokenizer(tokenizer, args)
        finally:
            self.lf.template.TEMPLATES = before

    def aligned(self, rows: list[dict], info: dict, args: Any) -> dict[str, list]:
        """The wheel's normal form of rows, as one batch."""
        source = self.lf.parser.get_dataset_list(["d"], {"d": {"file_name": "d.json"} | info})[0]
        convert = self.lf.converter.get_dataset_converter(source.formatting, source, args)
        converted = [convert(copy.deepcopy(row)) for row in rows]
        return {key: [c[key] for c in converted] for key in converted[0]}

    def encode(
        self, stage: str, rows: list[dict], info: dict, tokenizer: Any, args: Any
    ) -> dict[str, list]:
        """The wheel's model inputs of one map batch."""
        template = self.template(tokenizer, args)
        kinds = {
            "sft": self.lf.supervised.SupervisedDatasetProcessor,
            "rm": self.lf.pairwise.PairwiseDatasetProcessor,
            "dpo": self.lf.pairwise.PairwiseDatasetProcessor,
            "kto": self.lf.feedback.FeedbackDatasetProcessor,
            "pt": self.lf.pretrain.PretrainDatasetProcessor,
        }
        processor = kinds[stage](
            template=template, tokenizer=tokenizer, processor=self.processor, data_args=args
        )
        return dict(processor.preprocess_dataset(self.aligned(rows, info, args)))


@functools.cache
def load_plugins() -> Any:
    """The wheel's own `mm_plugin`, with stand-ins for the audio and video libraries that it
    imports.
    """
    lf = load()
    root = Path(str(lf.template.__file__)).parent
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    spec = importlib.util.spec_from_file_location(
        "llamafactory.data.real_mm_plugin", root / "mm_plugin.py"
    )
    assert spec is not None and spec.loader is not None
    plugins = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = plugins
    spec.loader.exec_module(plugins)
    return plugins


@functools.cache
def _sizes_without_torchvision() -> dict[str, Any]:
    """Modules in place of those of transformers that the plug-ins take `smart_resize` from."""
    found = {}
    for kind, family in (("video", "qwen3_vl"), ("image", "qwen2_vl")):
        name = f"{kind}_processing_{family}"
        stand_in: Any = types.ModuleType(name)
        stand_in.smart_resize = function_of(f"models/{family}/{name}.py", "smart_resize")
        found[f"transformers.models.{family}.{name}"] = stand_in
    return found


def function_of(path: str, name: str) -> Any:
    """One function of a file of transformers that cannot be imported without torchvision."""
    import transformers

    file = Path(transformers.__file__).parent / path
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    scope: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([found], []), str(file), "exec"), scope)
    return scope[name]


class VisionOracle(Oracle):
    """The wheel's tokens of rows with images and videos, for a processor as its plug-ins read
    it.
    """

    def __init__(self, processor: Any):
        super().__init__()
        self.processor = processor
        self.plugins = load_plugins()

    def template(self, tokenizer: Any, args: Any) -> Any:
        template = super().template(tokenizer, args)
        name, tokens = template.mm_plugin.asked
        template.mm_plugin = self.plugins.get_mm_plugin(name=name, **tokens)
        return template

    def encode(
        self, stage: str, rows: list[dict], info: dict, tokenizer: Any, args: Any
    ) -> dict[str, list]:
        columns = [c for c in ("images", "videos") if c in info["columns"]]
        whole = [dict.fromkeys(columns, None) | row for row in rows]
        with mock.patch.dict(sys.modules, _sizes_without_torchvision()):
            return super().encode(stage, whole, info, tokenizer, args)
