"""What is installed and what the machine has, for a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

from longfactory import __version__

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "deepspeed",
    "bitsandbytes",
    "liger-kernel",
    "flash-attn",
    "flash-attn-4",
    "triton",
)


def report() -> str:
    """One line a fact."""
    lines = [
        ("longfactory", __version__),
        ("platform", platform.platform()),
        ("python", platform.python_version()),
    ]
    for name in PACKAGES:
        try:
            lines.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((name, "not installed"))
    lines.append(("cpu cores", str(os.cpu_count())))
    lines.append(("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"))
    lines += _devices()
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"- {name:<{width}}  {value}" for name, value in lines)


def _devices() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return [("devices", "none (CPU)")]
    lines = [("cuda", str(torch.version.cuda))]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            (
                f"device {i}",
                (
                    f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability"
                    f" {p.major}.{p.minor}"
                ),
            )
        )
    if torch.distributed.is_nccl_available():
        lines.append(("nccl", ".".join(str(v) for v in torch.cuda.nccl.version())))
    return lines
