"""flash-linear-attention's chunked gated delta rule from one folder, for `recurrent.py fla`: is it
right on this GPU with this Triton, and how fast. Its kernels are compiled with one setting each:
tuning all of them takes minutes. Where it refuses to run, that is printed; then its own check is
taken out, to see what the refusal is for.

    python benchmarks/_fla.py FOLDER     # a folder with the package `fla`; "." for the installed
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from _recurrent_kernels import SHAPES, errors, graded, inputs, milliseconds, ours, plan_of

FIXED = {"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 2}
"""What is preferred among a kernel's settings."""


def fix_autotuning() -> None:
    """Every kernel keeps one of its settings: the one nearest to FIXED.

    Versions from 0.5 on have a decorator of their own (`fla_cache_autotune`), which makes a class
    that is derived from Triton's.
    """
    kind = triton.runtime.autotuner.Autotuner
    own = kind.__init__

    def away(config: Any) -> int:
        found = {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}
        return sum(abs(found.get(k, v) - v) for k, v in FIXED.items())

    def one(self: Any, fn: Any, names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        kept = [min(configs, key=away)] if configs else configs
        own(self, fn, names, kept, *args, **kwargs)

    kind.__init__ = one


def take_check_out() -> list[str]:
    """Sets what chunk_o refuses by. Returns the names that were changed."""
    code = importlib.import_module("fla.ops.common.chunk_o")
    changed = [name for name in ("IS_NVIDIA_HOPPER",) if getattr(code, name, False)]
    for name in changed:
        setattr(code, name, False)
    return changed


def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    repeats = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(repeats, 1) for x in (q, k))
    out, _ = rule(
        *(x[None].contiguous() for x in (q, k, v)),
        g=g[None].contiguous(),
        beta=beta[None].contiguous(),
        use_qk_l2norm_in_kernel=True,
    )
    return out[0]


def report(what: str, **facts: Any) -> None:
    print("RESULT " + json.dumps({"what": what, **facts}), flush=True)


def attempt(what: str, work: Any) -> bool:
    started = time.time()
    try:
        facts = work()
    except Exception as error:
        facts = {"failed": f"{type(error).__name__}: {error}"[:400]}
    report(what, seconds=round(time.time() - started, 1), **facts)
    return "failed" not in facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    if a.folder != Path():
        sys.path.insert(0, str(a.folder))
    fix_autotuning()
    version = importlib.import_module("fla").__version__
    nvcc = shutil.which("nvcc") or "none"
    tilelang = importlib.util.find_spec("tilelang") is not None
    report("fla", version=version, triton=triton.__version__, nvcc=nvcc, tilelang=tilelang)
    device = "cpu" if a.smoke else "cuda"
    kind, keys, heads, dim, value_dim, channels = SHAPES["Qwen3.5-9B gated delta net"]
    few = (kind, 2, 4, dim, value_dim, channels)

    def right() -> dict[str, Any]:
        tokens = 200 if a.smoke else 1024
        x = inputs(few, tokens, device, torch.bfloat16)
        slope = torch.randn(tokens, 4, value_dim, device=device).bfloat16()
        mine = ours(few, plan_of([tokens], device))
        exact = graded(mine, [t.double() for t in x], slope.double())
        return {"fla": errors(graded(run, x, slope), exact),
                "ours": errors(graded(mine, x, slope), exact)}  # fmt: skip

    def fast() -> dict[str, Any]:
        shape = (kind, keys, heads, dim, value_dim, channels)
        x = inputs(shape, 32768, device, torch.bfloat16)
        slope = torch.randn(32768, heads, value_dim, device=device).bfloat16()
        mine = ours(shape, plan_of([32768], device))
        # One process at a time is timed.
        with (Path(tempfile.gettempdir()) / "recurrent_fla.lock").open("w") as lock:
            graded(run, x, slope)
            graded(mine, x, slope)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return {
                "fla ms": milliseconds(lambda: graded(run, x, slope), device),
                "ours ms": milliseconds(lambda: graded(mine, x, slope), device),
            }

    done = attempt("errors", right)
    if not done and take_check_out():
        done = attempt("errors without its check", right)
    if done and not a.smoke:
        attempt("forward and backward, 32,768 tokens", fast)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
