"""`longfactory api`: an OpenAI-compatible server, which is vLLM's or transformers'. This starts it
with the run's model, adapter and template, and waits for it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longfactory.errors import UserError
from longfactory.output.load import load_tokenizer, refuse_stretched

if TYPE_CHECKING:
    from longfactory.config import RunConfig


def serve(cfg: RunConfig) -> int:
    """Starts the server and returns its exit status; 0 where it was asked to stop.

    Its address, key and name are LLaMA-Factory's variables: API_HOST (127.0.0.1 where it is not
    set), API_PORT, API_KEY, API_MODEL_NAME.

    Raises:
        UserError: the server's package is missing, or it cannot have what the run asks for.
    """
    tokenizer = load_tokenizer(cfg)
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        raise UserError(
            f"{cfg.model.model_name_or_path} has no chat template. Name one, for example template:"
            " chatml."
        )
    with tempfile.TemporaryDirectory(prefix="longfactory-api-") as scratch:
        file = Path(scratch) / "template.jinja"
        file.write_text(template, encoding="utf-8")
        words, more = server(cfg, os.environ, template, file)
        print(f"Starting: {' '.join(words[1:])}", file=sys.stderr, flush=True)
        process = subprocess.Popen(words, env={**os.environ, **more})

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return 0
        finally:
            signal.signal(signal.SIGTERM, before)
            if process.poll() is None:
                process.kill()


def server(
    cfg: RunConfig, environment: Mapping[str, str], template: str, file: Path
) -> tuple[list[str], dict[str, str]]:
    """The server's command, and variables that it needs beside this process's.

    Args:
        cfg: the run.
        environment: this process's.
        template: in Jinja, by which conversations become tokens.
        file: that holds it.
    Raises:
        UserError: as `serve`.
    """
    from longfactory.model import load

    if load.resolve(str(cfg.model.model_name_or_path))[1]:
        raise UserError(
            f"api: {cfg.model.model_name_or_path} is one file inside a package. Write it as a"
            " folder first: longfactory export model_name_or_path=... export_dir=FOLDER."
        )
    make = _vllm if cfg.model.infer_backend == "vllm" else _transformers
    refuse_stretched(cfg, f"api: {'vLLM' if make is _vllm else 'transformers'}'s server")
    address = [
        *("--host", environment.get("API_HOST", "127.0.0.1")),
        *("--port", environment.get("API_PORT", "8000")),
    ]
    return make(cfg, environment, template, file, address)


def _vllm(
    cfg: RunConfig, environment: Mapping[str, str], template: str, file: Path, address: list[str]
) -> tuple[list[str], dict[str, str]]:
    """By the options of vLLM 0.33."""
    check_vllm()
    model = cfg.model
    name = environment.get("API_MODEL_NAME") or Path(str(model.model_name_or_path)).name
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    words += [str(model.model_name_or_path), *address, "--chat-template", str(file)]
    arguments = {"served_model_name": name, **vllm_arguments(cfg)}
    if adapters := model.adapter_name_or_path:
        # requests name the adapter; the base model is there beside it
        arguments["served_model_name"] = f"{name}-base"
        arguments["lora_modules"] = f"{name}={adapters[0]}"
    for option, value in arguments.items():
        flag = f"--{option.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    key = environment.get("API_KEY")
    return words, {"VLLM_API_KEY": key} if key else {}  # not where other users can read it


def _transformers(
    cfg: RunConfig, environment: Mapping[str, str], template: str, file: Path, address: list[str]
) -> tuple[list[str], dict[str, str]]:
    """By the options of transformers 5.23; model, adapter and template lie in one folder."""
    from transformers.utils.import_utils import is_serve_available

    from longfactory.model import load

    if not is_serve_available():
        raise UserError(
            "api: the server's packages are not installed. Run: pip install"
            ' "transformers[serving]"; or set infer_backend: vllm.'
        )
    if environment.get("API_KEY"):
        raise UserError(
            "API_KEY: transformers' server asks for no key. Set infer_backend: vllm, or leave"
            " API_KEY out."
        )
    model = cfg.model
    folder = (*model.adapter_name_or_path, str(model.model_name_or_path))[0]
    own: Any = load.load_tokenizer(_named(cfg, folder))
    if len(model.adapter_name_or_path) > 1 or own.chat_template != template:
        what = "several adapters" if len(model.adapter_name_or_path) > 1 else "the template"
        raise UserError(
            f"api: transformers' server reads one folder, and {folder} does not hold {what}. Run"
            " longfactory export with the same keys first, and give model_name_or_path the folder"
            " that it writes; or set infer_backend: vllm."
        )
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, *address]
    if model.infer_dtype != "auto":
        words += ["--dtype", model.infer_dtype]
    return [*words, *(["--trust-remote-code"] if model.trust_remote_code else [])], {}


def _named(cfg: RunConfig, folder: str) -> Any:
    """The model's arguments with another folder."""
    import dataclasses

    return dataclasses.replace(cfg.model, model_name_or_path=folder, adapter_name_or_path=())


def check_vllm() -> None:
    """Raises UserError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("infer_backend: vllm is not installed. Run: pip install vllm")


def vllm_arguments(cfg: RunConfig) -> dict[str, Any]:
    """What vLLM's engine is told of the run (names of `EngineArgs` in vLLM 0.33), without model
    and tokenizer.

    Raises:
        UserError: several adapters, or a rank that vLLM would not take.
    """
    import torch

    model = cfg.model
    out: dict[str, Any] = {
        "dtype": model.infer_dtype,
        "max_model_len": model.vllm_maxlen,
        "gpu_memory_utilization": model.vllm_gpu_util,
        "tensor_parallel_size": max(torch.cuda.device_count(), 1),
    }
    out |= {"trust_remote_code": True} if model.trust_remote_code else {}
    out |= {"enforce_eager": True} if model.vllm_enforce_eager else {}
    if len(model.adapter_name_or_path) > 1:
        raise UserError(
            "infer_backend: vllm takes one adapter. Merge the others first (longfactory export)."
        )
    if model.adapter_name_or_path:
        out |= {"enable_lora": True, "max_lora_rank": model.vllm_max_lora_rank}
    return {**out, **(model.vllm_config or {})}
