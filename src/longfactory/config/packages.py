"""Packages that a run needs beside those that are always installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from longfactory.config import optimizer_facts
from longfactory.config.run import RunConfig
from longfactory.kernel_names import not_installed

TRACKERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""What report_to can name, and the packages of which transformers needs one."""


def trackers(cfg: RunConfig) -> tuple[str, ...]:
    """What report_to names."""
    names = cfg.hf.get("report_to") or ()
    return (names,) if isinstance(names, str) else tuple(names)


_BNB = ("bitsandbytes", "bitsandbytes")
OPTIMIZERS = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    **dict.fromkeys(
        ("lion_", "paged_lion_", "ademamix", "paged_ademamix", "paged_adamw_32bit", "rmsprop_bnb"),
        _BNB,
    ),
}
"""How names of optimizers begin -> the module that makes them, and its package. AdamW in 8 and 4
bit is asked for with its memory.
"""


def missing(cfg: RunConfig) -> Iterator[str]:
    """Packages that the run needs and that are not installed."""

    def absent(module: str) -> bool:
        return importlib.util.find_spec(module) is None

    if cfg.trainer.deepspeed is not None and absent("deepspeed"):
        yield 'deepspeed: the package is not installed. Run: pip install "longfactory[deepspeed]"'
    by_hqq = cfg.model.quantization_method == "hqq"
    if cfg.model.quantization_bit is not None and not by_hqq and absent("bitsandbytes"):
        yield (
            "quantization_bit: bitsandbytes is not installed. Run: pip install"
            ' "longfactory[quantization]"'
        )
    if cfg.model.quantization_bit is not None and by_hqq and absent("hqq"):
        yield 'quantization_method: hqq is not installed. Run: pip install "longfactory[hqq]"'
    if cfg.model.infer_backend == "vllm" and absent("vllm"):
        yield "infer_backend: vllm is not installed. Run: pip install vllm"
    if cfg.model.fp8 and absent("torchao"):
        yield 'fp8: torchao is not installed. Run: pip install "longfactory[fp8]"'
    if cfg.model.enable_liger_kernel and absent("liger_kernel"):
        yield (
            "enable_liger_kernel: liger-kernel is not installed. Run: pip install"
            ' "longfactory[liger]"'
        )
    yield from _optimizer(cfg)
    for name in trackers(cfg):
        packages = TRACKERS.get(name, ())
        if packages and all(absent(package) for package in packages):
            yield f"report_to: {name} is not installed. Run: pip install {packages[0]}"
    backend = cfg.parallel.attention_backend
    remedy = not_installed(backend)
    if remedy is not None:
        yield (
            f"attention_backend: {backend} is not installed. {remedy}, or use "
            "attention_backend: auto, which needs only torch."
        )


def _optimizer(cfg: RunConfig) -> Iterator[str]:
    facts = optimizer_facts.chosen(cfg)
    if facts is not None and facts.module and importlib.util.find_spec(facts.module) is None:
        yield (
            f"{facts.name} needs {facts.package}, which is not installed. Run: pip install"
            f" {facts.package}; or leave {facts.name} out."
        )
    name = str(cfg.trainer.optim)
    for start, (module, package) in OPTIMIZERS.items():
        if name.startswith(start) and importlib.util.find_spec(module) is None:
            yield (
                f"optim: {name} needs {package}, which is not installed. Run: pip install"
                f" {package}; or use optim: adamw_torch_fused."
            )
