"""LLaMA-Factory's own data code as the oracle: imported from the wheel (installed without its
dependencies), run, never copied.

Its package imports vision and audio libraries; a module in place of `mm_plugin` stands for them,
and passes text through unchanged.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.metadata
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


class _TextOnly:
    def __init__(self, **kwargs: Any):
        pass

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
    plugin.get_mm_plugin = lambda name, **kwargs: _TextOnly()
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
            template=template, tokenizer=tokenizer, processor=None, data_args=args
        )
        return dict(processor.preprocess_dataset(self.aligned(rows, info, args)))
