"""One contract for every backend that runs here: log-sum-exp, gradients from the whole row's out
and lse, refusals.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kinds_of_tiles import TILES
from largest_tensor import LargestTensor
from longfactory import config, kernel_names
from longfactory.sp import SequenceParallel, backends
from longfactory.sp.tiles import Tile
from plain_attention import plain_attention, random_inputs
from smallest_run import BASE

RUN = {**BASE, "dry_run": True}


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("block", [512, 5])
def test_backend_is_plain_attention(
    name: str, tile: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends.math, "BLOCK", block)
    monkeypatch.setattr(backends.math, "KEY_BLOCK", block)
    backend, t = backends.BACKENDS[name], TILES[tile]
    q, _, _, dout = random_inputs(t.q_len, 4, 2, 8)
    _, k, v, _ = random_inputs(t.k_len, 4, 2, 8, seed=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*leaves, t.mask(), 0.5)  # type: ignore[arg-type]
    expected.backward(dout)
    out, lse = backend.forward(q, k, v, t, 0.5, None)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.5
    torch.testing.assert_close(
        lse, scores.masked_fill(~t.mask(), -torch.inf).logsumexp(-1), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for found, leaf in zip(
        backend.backward(dout, q, k, v, out, lse, t, 0.5, None), leaves, strict=True
    ):
        torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-13)


@pytest.mark.processes
def test_triton_kernels_are_the_formulas_where_they_are_interpreted() -> None:
    """All of `TILES` with and without a soft-cap, heads that fill their blocks and such that do
    not. Triton looks at the environment when it is imported.
    """
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import test_backends; test_backends.interpreted()"]
    folder = Path(__file__).parent
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def interpreted() -> None:
    """Compares, in a process in which Triton interprets; raises where something differs."""
    from longfactory.sp.backends import tile_calls as kernels

    small = {"forward": (16, 16), "keys": (16, 16), "queries": (16, 32)}
    for kernel, (m, n) in small.items():
        kernels.SETTINGS[kernel] = {256: kernels.Blocks(m, n, 4, 2)}
    shapes = ((4, 2, 16, 16), (3, 1, 20, 12))
    for (name, t), softcap, (heads, kv_heads, dim, value) in itertools.product(
        TILES.items(), (None, 7.0), shapes
    ):
        q, _, _, dout = random_inputs(t.q_len, heads, kv_heads, dim, value, torch.float16)
        _, k, v, _ = random_inputs(t.k_len, heads, kv_heads, dim, value, torch.float16, seed=1)
        wide = [x.double() for x in (q, k, v)]
        out, lse = kernels.forward(q, k, v, t, 0.5, softcap)
        true_out, true_lse = backends.math.forward(*wide, t, 0.5, softcap)
        assert (lse - true_lse).abs().max() <= 1e-3, name
        # as much probability lies outside of the tile as inside
        found = (out, *kernels.backward(dout, q, k, v, out * 0.5, lse + 0.69, t, 0.5, softcap))
        grads = backends.math.backward(
            dout.double(), *wide, out.double() * 0.5, true_lse + 0.69, t, 0.5, softcap
        )
        for a, b in zip(found, (true_out, *grads), strict=True):
            assert float((a.double() - b).norm()) <= 3e-3 * float(b.norm()), (name, softcap, dim)


@pytest.mark.parametrize("name", ["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_of_results(name: str, dtype: torch.dtype) -> None:
    backend, t = backends.BACKENDS[name], TILES["causal"]
    q, k, v, dout = random_inputs(24, 4, 2, 8, dtype=dtype)
    out, lse = backend.forward(q, k, v, t, 0.5, None)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, torch.float32, (4, 24))
    assert {g.dtype for g in backend.backward(dout, q, k, v, out, lse, t, 0.5, None)} == {dtype}


def test_selection() -> None:
    q, v = torch.zeros(24, 4, 8), torch.zeros(24, 2, 8)
    t = TILES["causal"]
    assert backends.select("auto", t, q, v, None) is backends.cpu
    assert backends.select("auto", t, q, v, 30.0) is backends.math
    assert backends.select("auto", t, q, v[..., :4], None) is backends.math
    assert backends.select("math", t, q, v, None) is backends.math
    assert backends.select("cpu", t, q, v, 30.0) is backends.math, (
        "what the named backend cannot do goes to one that can"
    )
    with pytest.raises(ValueError, match="flash runs on GPUs"):
        backends.select("flash", t, q, v, None)
    with pytest.raises(ValueError, match="Choose one of: auto"):
        backends.select("fast", t, q, v, None)


def test_every_name_means_the_same_in_a_run_and_in_the_engine() -> None:
    """Each name that a run's file may hold reaches the engine as a backend, and the engine takes
    the other spellings too.
    """
    assert set(backends.BACKENDS) == set(kernel_names.KERNELS), "one list"
    for name in ("auto", *kernel_names.KERNELS, *kernel_names.OTHER_NAMES, "FA2"):
        found = config.from_mapping({**RUN, "attention_backend": name}).parallel.attention_backend
        assert found == kernel_names.canonical(name.lower()) and found in (
            "auto",
            *backends.BACKENDS,
        )
        assert SequenceParallel.create(backend=name.lower()).backend == found
    assert kernel_names.canonical("fa2") == "flash2" and kernel_names.canonical("fa3") == "flash3"
    # What LLaMA-Factory's key may hold passes: it has no effect here, and that is said of all but
    # its default.
    for name in ("auto", "disabled", "sdpa", "fa2", "fa3"):
        notes = config.from_mapping({**RUN, "flash_attn": name}).notes
        assert any("attention_backend chooses" in n for n in notes) == (name != "auto")
    with pytest.raises(config.ConfigError, match="Choose from auto, fa4, flash3"):
        config.from_mapping({**RUN, "attention_backend": "fast"})


def test_a_package_of_the_same_name_is_not_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention 2 and 4 share the package flash_attn."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    importlib.invalidate_caches()
    assert kernel_names.not_installed("fa4") is None
    assert "pip install flash-attn" in (kernel_names.not_installed("flash2") or "")
    assert "FlashAttention 3" in (kernel_names.not_installed("flash3") or "")
    assert kernel_names.not_installed("cudnn") is None
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text("")
    assert kernel_names.not_installed("flash2") is None


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_plain_attention_needs_no_memory_that_grows_with_the_row(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of queries and keys: the largest tensor of a forward and backward pass is an input,
    not scores of all keys.
    """
    monkeypatch.setattr(backends.math, "BLOCK", 16)
    monkeypatch.setattr(backends.math, "KEY_BLOCK", 16)
    largest = []
    for rows in (128, 256):
        tile = Tile(slice(0, rows), slice(0, rows), kind)  # type: ignore[arg-type]
        q, k, v, dout = random_inputs(rows, 2, 1, 4, dtype=torch.float32)
        with LargestTensor() as seen:
            out, lse = backends.math.forward(q, k, v, tile, 0.5, None)
            backends.math.backward(dout, q, k, v, out, lse, tile, 0.5, None)
        largest.append(seen.numel)
        assert seen.numel <= max(q.numel(), 2 * 16 * 16)
    assert largest[1] == 2 * largest[0]
