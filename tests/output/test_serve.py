"""`longfactory api` and `infer_backend: vllm`: the command and the arguments that vLLM (0.33) and
transformers are given. vLLM itself is not run here.
"""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from longfactory.config import ConfigError, from_mapping
from longfactory.errors import UserError
from longfactory.output import predict_vllm, serve
from longfactory.testing import tiny_model
from small_runs import keys, write_tokenizer

# Names of vLLM 0.33.0: EngineArgs beside those of LLM, options of `vllm serve`, SamplingParams.
LLM_ARGUMENTS = (
    "model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code dtype"
    " tensor_parallel_size quantization revision tokenizer_revision chat_template seed"
    " gpu_memory_utilization enforce_eager max_model_len enable_lora max_lora_rank"
)
SERVE_OPTIONS = (
    "--host --port --chat-template --served-model-name --lora-modules --enable-lora"
    " --max-lora-rank --max-model-len --gpu-memory-utilization --tensor-parallel-size --dtype"
    " --enforce-eager --trust-remote-code"
)
SAMPLING = (
    "temperature top_p top_k repetition_penalty max_tokens stop_token_ids skip_special_tokens"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    size = write_tokenizer(tmp_path / "model")
    tiny_model("llama", seed=0, vocab_size=size).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package with vLLM's names. What it was asked."""
    asked: list[dict[str, Any]] = []

    class LLM:
        def __init__(self, model: str, **given: Any):
            assert set(given) <= set(LLM_ARGUMENTS.split()), given
            asked.append({"model": model, **given})

        def generate(
            self,
            prompts: Any,
            sampling_params: Any = None,
            *,
            use_tqdm: bool = True,
            lora_request: Any = None,
        ) -> list[Any]:
            asked.append({"prompts": prompts, "sampling": sampling_params, "adapter": lora_request})
            answer = types.SimpleNamespace(text="Ho")
            return [types.SimpleNamespace(outputs=[answer]) for _ in prompts]

    def sampling(**given: Any) -> dict[str, Any]:
        assert set(given) <= set(SAMPLING.split())
        return given

    def adapter(lora_name: str, lora_int_id: int, lora_path: str = "") -> tuple[str, int, str]:
        return lora_name, lora_int_id, lora_path

    parts = {"vllm": {"LLM": LLM, "SamplingParams": sampling}, "vllm.lora": {}}
    parts["vllm.lora.request"] = {"LoRARequest": adapter}
    for name, values in parts.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def configuration(model: Path, command: Any = "api", **changes: Any) -> Any:
    return from_mapping({"model_name_or_path": str(model), **changes}, command=command)


def test_vllm_s_server(model: Path, vllm: Any, tmp_path: Path) -> None:
    cfg = configuration(
        model,
        infer_backend="vllm",
        vllm_maxlen=512,
        adapter_name_or_path="some/adapter",
        vllm_enforce_eager=True,
    )
    environment = {"API_KEY": "secret", "API_PORT": "8123", "API_MODEL_NAME": "mine"}
    words, more = serve.server(cfg, environment, "{{x}}", tmp_path / "template.jinja")
    assert words[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"] and words[4] == str(model)
    options = [w for w in words[5:] if w.startswith("--")]
    assert set(options) <= set(SERVE_OPTIONS.split()) and len(set(options)) == len(options)
    said = dict(itertools.pairwise(words))
    assert said["--host"] == "127.0.0.1" and said["--port"] == "8123"
    assert said["--max-model-len"] == "512" and said["--lora-modules"] == "mine=some/adapter"
    assert said["--chat-template"] == str(tmp_path / "template.jinja")
    assert "--enforce-eager" in words and "--enable-lora" in words
    assert more == {"VLLM_API_KEY": "secret"} and "secret" not in " ".join(words)
    two = configuration(model, infer_backend="vllm", adapter_name_or_path="a,b")
    with pytest.raises(UserError, match="takes one adapter"):
        serve.server(two, {}, "{{x}}", tmp_path)


def test_transformers_s_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.cli.serve import Serve
    from transformers.utils import import_utils

    cfg = configuration(model, template="chatml", infer_dtype="bfloat16")
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install \"transformers\[serving\]\""):
        serve.server(cfg, {}, "{{x}}", tmp_path)
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    with pytest.raises(UserError, match="does not hold the template"):
        serve.server(cfg, {}, "{{x}}", tmp_path)
    (model / "chat_template.jinja").write_text("{{x}}")
    words, more = serve.server(cfg, {"API_HOST": "localhost"}, "{{x}}", tmp_path)
    assert words[1:5] == ["-m", "transformers.cli.transformers", "serve", str(model)] and not more
    names = {f"--{name.replace('_', '-')}" for name in inspect.signature(Serve.__init__).parameters}
    assert {w for w in words if w.startswith("--")} <= names
    with pytest.raises(UserError, match="asks for no key"):
        serve.server(cfg, {"API_KEY": "k"}, "{{x}}", tmp_path)


def test_vllm_answers_what_training_would_have_asked(
    model: Path, vllm: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = [{"instruction": "Hi", "output": "Ho"}, {"instruction": "Who?", "output": "Me, him"}]
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text('{"talks": {"file_name": "talks.json"}}')
    given = keys(
        tmp_path,
        "out",
        model_name_or_path=model,
        do_train=False,
        do_predict=True,
        predict_with_generate=True,
        infer_backend="vllm",
        dataset=None,
        eval_dataset="talks",
        packing=None,
        max_steps=None,
        do_sample=False,
        max_new_tokens=7,
        preprocessing_num_workers=1,
    )
    cfg = from_mapping(given)
    metrics = predict_vllm.predict(cfg)
    engine, call = vllm
    assert engine["model"] == str(model) and engine["max_model_len"] == 4096
    assert call["sampling"]["max_tokens"] == 7 and call["sampling"]["temperature"] == 0.0
    lines = (tmp_path / "out" / "generated_predictions.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["predict"] == "Ho" and first["label"].startswith("Ho")
    assert first["prompt"].endswith("<|im_start|>assistant\n") and "Who?" in second["prompt"]
    assert len(call["prompts"][0]["prompt_token_ids"]) > 5
    assert 0 < metrics["predict_rouge-1"] < 100 and metrics["predict_samples"] == 2
    assert json.loads((tmp_path / "out" / "predict_results.json").read_text()) == metrics


def test_what_cannot_be_asked_of_vllm(model: Path) -> None:
    run = {"dataset": "d", "output_dir": "o", "dry_run": True, "infer_backend": "vllm"}
    with pytest.raises(ConfigError, match="Leave it out of a training run"):
        configuration(model, "train", **run)
    with pytest.raises(ConfigError, match="chat is transformers'"):
        configuration(model, "chat", infer_backend="vllm")
    with pytest.raises(ConfigError, match="SGLang is not started from here"):
        configuration(model, infer_backend="sglang")
    with pytest.raises(UserError, match="pip install vllm"):
        serve.check_vllm()
    beams = configuration(model, num_beams=2).generating
    with pytest.raises(UserError, match="vLLM has no beams"):
        predict_vllm.sampling_arguments(beams, [])
