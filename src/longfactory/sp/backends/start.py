"""What is said of attention kernels before the first step: which will run, how fast their kind is,
what would be faster.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch

from ..bulk import SMALLEST
from . import BACKENDS, cuts_documents, mark_told, resolve
from .request import Request

HOPPER = {"fa4": 610, "flash3": 590, "cudnn": 540, "flash2": 320, "flash": 320}
"""TFLOP/s of forward and backward on Hopper in bf16: causal, 64k tokens, head dim 128. Measured on
H200 (benchmarks/results), flash3: as published. The kernels that are not here have no such figure.
"""
OTHER_DIMS = {
    ("cudnn", 64): 430,
    ("flash2", 64): 290,
    ("flash", 64): 290,
    ("cudnn", 192): 500,
    ("flash2", 192): 240,
    ("flash", 192): 240,
    ("cudnn", 256): 430,
    ("flash2", 256): 270,
    ("flash", 256): 270,
}
"""The same with heads of another size (of queries), 32k tokens (benchmarks/results/kernels.md)."""
KINDS = ("causal", "full", "varlen")
WORDS = {"causal": "causal tiles", "full": "rectangles", "varlen": "several documents"}


def teraflops(kernel: str, head_dim: int) -> int | None:
    """What the kernel reaches on Hopper, None where no figure is known."""
    return OTHER_DIMS.get((kernel, head_dim), HOPPER.get(kernel))


def requests_of(
    device_type: str,
    dtype: torch.dtype,
    dims: Iterable[tuple[int, int]],
    *,
    windows: bool,
    softcap: bool,
    group: int = 2,
) -> list[Request]:
    """The kinds of tiles that a model will ask for: first those that most of the work is in.

    Args:
        dims: head dims of queries and of values, one pair for each kind of layer.
        windows: some layer has a sliding window. softcap: scores are capped.
        group: query heads for each key head.
    """
    ordered = torch.are_deterministic_algorithms_enabled()
    shapes = [(kind, kind != "varlen") for kind in KINDS] + [
        (kind, False) for kind in KINDS if kind != "varlen"
    ]
    if device_type != "cuda":
        shapes = [(kind, False) for kind in KINDS]
    return [
        Request(device_type, dtype, d, dv, kind, window, softcap, aligned, ordered, group=group)
        for kind, aligned in shapes
        for window in ((False, True) if windows else (False,))
        for d, dv in sorted(set(dims))
    ]


def lines(name: str, requests: Iterable[Request]) -> list[str]:
    """Chooses and self-tests a kernel for each request; one line says which, others what is wrong.

    Raises:
        ValueError: the kernel `name` was asked for and cannot be used.
    """
    requests = list(requests)
    if not requests:
        return []
    uses: dict[str, list[str]] = {}
    better: dict[str, str] = {}
    asked: dict[str, str] = {}
    for request in requests:
        chosen, refusals = resolve(name, request)
        mark_told(chosen, request)
        what = WORDS[request.kind] + (" in a window" if request.window else "")
        if request.kind == "varlen" and cuts_documents(name, request):
            what = f"documents of less than {SMALLEST:,} tokens"
        if request.device_type == "cuda" and request.kind != "varlen" and not request.aligned:
            if chosen in uses:
                continue
            what = "lengths that are no multiple of 128"
        if what not in uses.setdefault(chosen, []):
            uses[chosen].append(what)
        if name in refusals:
            asked.setdefault(refusals[name], what)
        for candidate, reason in refusals.items():
            if candidate != name and _faster(candidate, chosen, request.head_dim):
                better.setdefault(candidate, reason)
    first = requests[0]
    hopper = first.device_type == "cuda" and torch.cuda.get_device_capability()[0] == 9
    parts = []
    for kernel, kinds in uses.items():
        figure = teraflops(kernel, first.head_dim)
        known = hopper and figure is not None and first.dtype != torch.float32
        speed = f" (about {figure} TFLOP/s)" if known else ""
        parts.append(f"{kernel}{speed}" + (f" for {', '.join(kinds)}" if len(uses) > 1 else ""))
    dims = ", ".join(
        sorted(
            {
                str(r.head_dim) if r.head_dim == r.v_head_dim else f"{r.head_dim}/{r.v_head_dim}"
                for r in requests
            }
        )
    )
    line = (
        f"Attention kernel{'s' if len(uses) > 1 else ''}"
        f" ({str(first.dtype).removeprefix('torch.')}, head dim {dims}): {'; '.join(parts)}."
    )
    line += "".join(
        f" {name} does not compute {what}: it {reason}." for reason, what in asked.items()
    )
    if first.device_type == "cuda" and first.dtype in (torch.float32, torch.float64):
        return [f"{line} float32 is slow: set bf16: true."]
    if better and name == "auto" and first.device_type == "cuda":
        # The fastest alone: who has it needs no other.
        fastest = max(better, key=lambda kernel: HOPPER[kernel])
        line += f" Faster: {fastest} {better[fastest]}."
    out = [line]
    if "cudnn" in uses and (found := foreign_cudnn()) is not None:
        out.append(found)
    return out


def _faster(candidate: str, chosen: str, head_dim: int) -> bool:
    speeds = [teraflops(kernel, head_dim) or 0 for kernel in (candidate, chosen)]
    return speeds[0] > 1.05 * speeds[1] and BACKENDS[candidate] is not BACKENDS[chosen]


def foreign_cudnn(
    maps: str | None = None, own: Path | None = None, version: int | None = None
) -> str | None:
    """A sentence, where the process has loaded another cuDNN than the one that was installed with
    PyTorch.

    Another one, of the system's CUDA in LD_LIBRARY_PATH, may be older, and then attention is slower
    or goes to another kernel.

    Args:
        maps: what /proc/self/maps holds. own: folder of PyTorch's own libraries. version: of the
            loaded one. By default of this process.
    """
    if version is None:
        version = torch.backends.cudnn.version()  # loads the library
    if own is None:
        spec = (
            importlib.util.find_spec("nvidia.cudnn")
            if importlib.util.find_spec("nvidia") is not None
            else None
        )
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        own = Path(folders[0]) if folders else None
    if maps is None:
        maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    if own is None or version is None:
        return None  # PyTorch was built with cuDNN inside, or has none
    loaded = {
        Path(line.split(maxsplit=5)[5].strip()) for line in maps.splitlines() if "/libcudnn" in line
    }
    strange = sorted(
        {str(path.parent) for path in loaded if not path.resolve().is_relative_to(own.resolve())}
    )
    if not strange:
        return None
    packages = sorted(own.parent.parent.glob("nvidia_cudnn_cu*.dist-info"))
    shipped = (
        packages[0].name.removesuffix(".dist-info").split("-")[1] if packages else "another version"
    )
    return (
        f"cuDNN {version // 10000}.{version % 10000 // 100}.{version % 100} is loaded from "
        f"{', '.join(strange)}, not PyTorch's own ({shipped} in {own}): attention may run at "
        "half speed. Remove that folder from LD_LIBRARY_PATH."
    )
